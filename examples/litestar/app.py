"""A small but complete Litestar application on context-sqla.

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
from contextlib import suppress
from pathlib import Path
from typing import Any

from context_sqla import (
    DBConnect,
    close_db_session,
    commit_db_session,
    db_context,
    db_session,
    on_commit,
    run_in_new_ctx,
)
from context_sqla_litestar import ContextSQLAPlugin
from litestar import Litestar, MediaType, Request, Response, WebSocket, get, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException, NotFoundException, WebSocketDisconnect
from litestar.params import FromPath, FromQuery
from litestar.response import Stream
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

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
        raise NotFoundException("nobody has this name")
    return user


async def count_users(*, greeted: bool | None = None) -> int:
    session = await db_session(db)
    query = select(func.count()).select_from(User)
    if greeted is not None:
        query = query.where(User.greeted == greeted)
    return await session.scalar(query) or 0


@post("/users")
async def create(name: FromQuery[str]) -> dict[str, str]:
    await create_user(name)
    return {"name": name}  # committed before the client sees it


@get("/users")
async def list_users(session: NamedDependency[AsyncSession]) -> list[dict[str, Any]]:
    """Take the session as a dependency: it is the one that `db_session(db)` returns."""
    users = await session.scalars(select(User).order_by(User.id))
    return [{"name": one.name, "greeted": one.greeted, "score": one.score} for one in users]


@get("/export")
async def export() -> Stream:
    """Stream rows in a transaction of the body, which ends before the last byte."""

    async def lines() -> AsyncIterator[str]:
        session = await db_session(db)
        query = select(User).order_by(User.id).execution_options(yield_per=100)
        users = await session.stream_scalars(query)
        yield "name,score\n"
        async for user in users:
            yield f"{user.name},{user.score}\n"

    return Stream(lines(), media_type="text/csv")


@post("/users/{name:str}/greeting")
async def greet(name: FromPath[str]) -> Response[dict[str, str]]:
    """Answer at once; the job runs afterwards, in a unit of work of its own."""
    user = await find_user(name)
    job = BackgroundTask(send_greeting, user.name)
    return Response({"name": user.name}, status_code=202, background=job)


async def send_greeting(name: str) -> None:
    await asyncio.sleep(0.05)  # no connection is held meanwhile
    user = await find_user(name)
    user.greeted = True  # committed at the end of the job


@get("/stats")
async def stats() -> dict[str, int]:
    """Ask two questions at once, each in a unit and on a connection of its own."""
    users, greeted = await asyncio.gather(
        run_in_new_ctx(count_users),
        run_in_new_ctx(count_users, greeted=True),
    )
    return {"users": users, "greeted": greeted}


@post("/users/{name:str}/score", status_code=200)
async def score(name: FromPath[str]) -> dict[str, Any]:
    """Give the connection back for as long as something slow takes."""
    user = await find_user(name)
    await commit_db_session(db)
    await close_db_session(db)

    points = await ask_a_slow_service(user.name)

    user = await find_user(user.name)  # a new session, a new transaction
    user.score = points
    return {"name": user.name, "score": user.score}


async def ask_a_slow_service(name: str) -> int:
    await asyncio.sleep(0.05)
    return len(name)


@websocket("/ws")
async def talk(socket: WebSocket[Any, Any, Any]) -> None:
    """Create a user for each message, in a unit of work that ends with it."""
    await socket.accept()
    with suppress(WebSocketDisconnect):
        while True:
            name = await socket.receive_text()
            try:
                async with db_context():
                    await create_user(name)
            except IntegrityError:
                await socket.send_json({"detail": "this name is taken"})
            else:
                await socket.send_json({"name": name})


@get("/outbox")
async def read_outbox() -> list[str]:
    return outbox


@get("/health")
async def health() -> dict[str, int]:
    """Answer 503 with `Retry-After` while the database does not."""
    await db.ping(timeout=1)
    return {"checked_out": db.pool_status().checked_out}


def name_is_taken(
    request: Request[Any, Any, Any],
    exc: IntegrityError,
) -> Response[dict[str, str]]:
    """Answer the unique constraint, also when it speaks only at the commit."""
    answer = {"detail": "this name is taken"}
    return Response(answer, status_code=409, media_type=MediaType.JSON)


def refuse(request: Request[Any, Any, Any], exc: HTTPException) -> Response[dict[str, str]]:
    answer = {"detail": exc.detail}
    return Response(answer, status_code=exc.status_code, media_type=MediaType.JSON)


async def create_tables() -> None:
    async with db_context():  # a unit of work outside a request
        connection = await (await db_session(db)).connection()
        await connection.run_sync(Base.metadata.create_all)


app = Litestar(
    [create, list_users, export, greet, stats, score, talk, read_outbox, health],
    exception_handlers={IntegrityError: name_is_taken, HTTPException: refuse},
    on_startup=[create_tables],
    # A unit of work per request; db is closed at shutdown.
    plugins=[ContextSQLAPlugin(db, session_key="session")],
)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from demo import main

    main(app)
