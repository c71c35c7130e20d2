"""A small but complete Sanic application on context-sqla.

python app.py             serve it, on an SQLite file that is gone afterwards
python app.py --check     make the requests, print what came, exit 0 or 1
sanic app:app             serve it on Sanic's own server

DATABASE_URL names another database, and a file that stays:
sqlite+aiosqlite:///users.db, postgresql+asyncpg://user:secret@host/app
"""

import asyncio
import os
import sys
import tempfile
from json import dumps
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
from context_sqla_sanic import setup
from sanic import Request, Sanic, Websocket, json
from sanic.exceptions import NotFound, SanicException
from sanic.response import JSONResponse
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

folder = tempfile.TemporaryDirectory(prefix="context-sqla-", ignore_cleanup_errors=True)
url = os.environ.get("DATABASE_URL") or f"sqlite+aiosqlite:///{folder.name}/users.db"
db = DBConnect.from_url(url, name="users")
outbox: list[str] = []  # stands for a queue, a mail server, a cache

app = Sanic("example")
setup(app, db)  # a unit of work per request; db is closed at shutdown


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
        raise NotFound("nobody has this name")
    return user


async def count_users(*, greeted: bool | None = None) -> int:
    session = await db_session(db)
    query = select(func.count()).select_from(User)
    if greeted is not None:
        query = query.where(User.greeted == greeted)
    return await session.scalar(query) or 0


@app.post("/users")
async def create(request: Request) -> JSONResponse:
    name = request.args["name"][0]
    await create_user(name)
    return json({"name": name}, status=201)  # committed before the client sees it


@app.get("/users")
async def list_users(request: Request) -> JSONResponse:
    session = await db_session(db)
    users = await session.scalars(select(User).order_by(User.id))
    rows = [{"name": one.name, "greeted": one.greeted, "score": one.score} for one in users]
    return json(rows)


@app.get("/export")
async def export(request: Request) -> None:
    """Stream rows in a transaction of the body, which ends before the last byte."""
    response = await request.respond(content_type="text/csv")
    session = await db_session(db)
    query = select(User).order_by(User.id).execution_options(yield_per=100)
    users = await session.stream_scalars(query)
    await response.send("name,score\n")
    async for user in users:
        await response.send(f"{user.name},{user.score}\n")


@app.post("/users/<name>/greeting")
async def greet(request: Request, name: str) -> JSONResponse:
    """Answer at once; the job starts after the commit, in a unit of its own."""
    await find_user(name)
    job = f"greeting for {name}"
    on_commit(lambda: app.add_task(run_in_new_ctx(send_greeting, name), name=job))
    return json({"name": name}, status=202)


async def send_greeting(name: str) -> None:
    user = await find_user(name)
    user.greeted = True  # committed at the end of the job


@app.get("/stats")
async def stats(request: Request) -> JSONResponse:
    """Ask two questions at once, each in a unit and on a connection of its own."""
    users, greeted = await asyncio.gather(
        run_in_new_ctx(count_users),
        run_in_new_ctx(count_users, greeted=True),
    )
    return json({"users": users, "greeted": greeted})


@app.post("/users/<name>/score")
async def score(request: Request, name: str) -> JSONResponse:
    """Give the connection back for as long as something slow takes."""
    await find_user(name)
    await commit_db_session(db)
    await close_db_session(db)

    points = await ask_a_slow_service(name)

    user = await find_user(name)  # a new session, a new transaction
    user.score = points
    return json({"name": user.name, "score": user.score})


async def ask_a_slow_service(name: str) -> int:
    await asyncio.sleep(0.05)
    return len(name)


@app.websocket("/ws")
async def users_socket(request: Request, ws: Websocket) -> None:
    """Create a user for each message, in a unit of work that ends with it."""
    while (name := await ws.recv()) is not None:
        try:
            async with db_context():
                await create_user(str(name))
        except IntegrityError:
            await ws.send(dumps({"detail": "this name is taken"}))
        else:
            await ws.send(dumps({"name": name}))


@app.get("/outbox")
async def read_outbox(request: Request) -> JSONResponse:
    return json(outbox)


@app.get("/health")
async def health(request: Request) -> JSONResponse:
    """Answer 503 with `Retry-After` while the database does not."""
    await db.ping(timeout=1)
    return json({"checked_out": db.pool_status().checked_out})


@app.exception(IntegrityError)
async def name_is_taken(request: Request, exc: IntegrityError) -> JSONResponse:
    """Answer the unique constraint, also when it speaks only at the commit."""
    return json({"detail": "this name is taken"}, status=409)


@app.exception(SanicException)
async def refuse(request: Request, exc: SanicException) -> JSONResponse:
    return json({"detail": str(exc)}, status=exc.status_code)


@app.before_server_start
async def create_tables(app: Sanic) -> None:
    async with db_context():  # a unit of work outside a request
        connection = await (await db_session(db)).connection()
        await connection.run_sync(Base.metadata.create_all)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from demo import main

    main(app)
