"""A small but complete Starlette application on context-sqla.

python app.py             serve it, on an SQLite file that is gone afterwards
python app.py --check     make the requests, print what came, exit 0 or 1

DATABASE_URL names another database, and a file that stays:
sqlite+aiosqlite:///users.db, postgresql+asyncpg://user:secret@host/app
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from context_sqla import (
    DBConnect,
    close_db_session,
    commit_db_session,
    db_context,
    db_session,
    on_commit,
    run_in_new_ctx,
)
from context_sqla_starlette import setup
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

folder = tempfile.TemporaryDirectory(prefix="context-sqla-", ignore_cleanup_errors=True)
url = os.environ.get("DATABASE_URL") or f"sqlite+aiosqlite:///{folder.name}/users.db"
db = DBConnect.from_url(url, name="users")
outbox: list[str] = []  # stands for a queue, a mail server, a cache


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    greeted: Mapped[bool] = mapped_column(default=False)
    score: Mapped[int | None]


async def create_user(name: str) -> None:
    session = await db_session(db)
    session.add(User(name=name))
    on_commit(lambda: outbox.append(f"welcome, {name}"))


async def find_user(name: str) -> User:
    session = await db_session(db)
    user = await session.scalar(select(User).where(User.name == name))
    if user is None:
        raise HTTPException(404, "nobody has this name")
    return user


async def count_users(*, greeted: bool | None = None) -> int:
    session = await db_session(db)
    query = select(func.count()).select_from(User)
    if greeted is not None:
        query = query.where(User.greeted == greeted)
    return await session.scalar(query) or 0


async def create(request: Request) -> JSONResponse:
    name = request.query_params["name"]
    await create_user(name)
    # What was added is committed before the client sees this.
    return JSONResponse({"name": name}, status_code=201)


async def list_users(request: Request) -> JSONResponse:
    session = await db_session(db)
    users = await session.scalars(select(User).order_by(User.id))
    rows = [{"name": one.name, "greeted": one.greeted, "score": one.score} for one in users]
    return JSONResponse(rows)


async def export(request: Request) -> StreamingResponse:
    """Stream rows in a transaction of the body, which ends before the last byte."""

    async def lines() -> AsyncIterator[str]:
        session = await db_session(db)
        query = select(User).order_by(User.id).execution_options(yield_per=100)
        users = await session.stream_scalars(query)
        yield "name,score\n"
        async for user in users:
            yield f"{user.name},{user.score}\n"

    return StreamingResponse(lines(), media_type="text/csv")


async def greet(request: Request) -> JSONResponse:
    """Answer at once; the job runs afterwards, in a unit of work of its own."""
    user = await find_user(request.path_params["name"])
    job = BackgroundTask(send_greeting, user.name)
    return JSONResponse({"name": user.name}, status_code=202, background=job)


async def send_greeting(name: str) -> None:
    await asyncio.sleep(0.05)  # no connection is held meanwhile
    user = await find_user(name)
    user.greeted = True  # committed at the end of the job


async def stats(request: Request) -> JSONResponse:
    """Ask two questions at once, each in a unit and on a connection of its own."""
    users, greeted = await asyncio.gather(
        run_in_new_ctx(count_users),
        run_in_new_ctx(count_users, greeted=True),
    )
    return JSONResponse({"users": users, "greeted": greeted})


async def score(request: Request) -> JSONResponse:
    """Give the connection back for as long as something slow takes."""
    user = await find_user(request.path_params["name"])
    await commit_db_session(db)
    await close_db_session(db)

    points = await ask_a_slow_service(user.name)

    user = await find_user(user.name)  # a new session, a new transaction
    user.score = points
    return JSONResponse({"name": user.name, "score": user.score})


async def ask_a_slow_service(name: str) -> int:
    await asyncio.sleep(0.05)
    return len(name)


async def websocket(websocket: WebSocket) -> None:
    """Create a user for each message, in a unit of work that ends with it."""
    await websocket.accept()
    async for name in websocket.iter_text():
        try:
            async with db_context():
                await create_user(name)
        except IntegrityError:
            await websocket.send_json({"detail": "this name is taken"})
        else:
            await websocket.send_json({"name": name})


async def read_outbox(request: Request) -> JSONResponse:
    return JSONResponse(outbox)


async def health(request: Request) -> JSONResponse:
    """Answer 503 with `Retry-After` while the database does not."""
    await db.ping(timeout=1)
    return JSONResponse({"checked_out": db.pool_status().checked_out})


async def name_is_taken(request: Request, exc: Exception) -> JSONResponse:
    """Answer the unique constraint, also when it speaks only at the commit."""
    return JSONResponse({"detail": "this name is taken"}, status_code=409)


async def refuse(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)
    return JSONResponse({"detail": exc.detail}, status_code=exc.status_code)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with db_context():  # a unit of work outside a request
        connection = await (await db_session(db)).connection()
        await connection.run_sync(Base.metadata.create_all)
    yield


app = Starlette(
    routes=[
        Route("/users", create, methods=["POST"]),
        Route("/users", list_users),
        Route("/users/{name}/greeting", greet, methods=["POST"]),
        Route("/users/{name}/score", score, methods=["POST"]),
        Route("/export", export),
        Route("/stats", stats),
        Route("/outbox", read_outbox),
        Route("/health", health),
        WebSocketRoute("/ws", websocket),
    ],
    exception_handlers={IntegrityError: name_is_taken, HTTPException: refuse},
    lifespan=lifespan,
)
setup(app, db)  # a unit of work per request; db is closed at shutdown


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from demo import main

    main(app)
