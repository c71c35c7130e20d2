"""A small but complete Quart application on context-sqla.

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
from context_sqla_quart import setup
from quart import Quart, Response, abort, jsonify, request, websocket
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.exceptions import HTTPException

folder = tempfile.TemporaryDirectory(prefix="context-sqla-", ignore_cleanup_errors=True)
url = os.environ.get("DATABASE_URL") or f"sqlite+aiosqlite:///{folder.name}/users.db"
db = DBConnect.from_url(url, name="users")
outbox: list[str] = []  # stands for a queue, a mail server, a cache

app = Quart(__name__)
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
        abort(404, "nobody has this name")
    return user


async def count_users(*, greeted: bool | None = None) -> int:
    session = await db_session(db)
    query = select(func.count()).select_from(User)
    if greeted is not None:
        query = query.where(User.greeted == greeted)
    return await session.scalar(query) or 0


@app.post("/users")
async def create() -> tuple[dict[str, str], int]:
    name = request.args["name"]
    await create_user(name)
    return {"name": name}, 201  # committed before the client sees it


@app.get("/users")
async def list_users() -> Response:
    session = await db_session(db)
    users = await session.scalars(select(User).order_by(User.id))
    rows = [{"name": one.name, "greeted": one.greeted, "score": one.score} for one in users]
    return jsonify(rows)


@app.get("/export")
async def export() -> Response:
    """Stream rows in a transaction of the body, which ends before the last byte."""

    async def lines() -> AsyncIterator[str]:
        session = await db_session(db)
        query = select(User).order_by(User.id).execution_options(yield_per=100)
        users = await session.stream_scalars(query)
        yield "name,score\n"
        async for user in users:
            yield f"{user.name},{user.score}\n"

    return Response(lines(), mimetype="text/csv")


@app.post("/users/<name>/greeting")
async def greet(name: str) -> tuple[dict[str, str], int]:
    """Answer at once; the job runs afterwards, in a unit of work of its own."""
    user = await find_user(name)
    app.add_background_task(send_greeting, user.name)
    return {"name": user.name}, 202


async def send_greeting(name: str) -> None:
    await asyncio.sleep(0.05)  # no connection is held meanwhile
    user = await find_user(name)
    user.greeted = True  # committed at the end of the job


@app.get("/stats")
async def stats() -> dict[str, int]:
    """Ask two questions at once, each in a unit and on a connection of its own."""
    users, greeted = await asyncio.gather(
        run_in_new_ctx(count_users),
        run_in_new_ctx(count_users, greeted=True),
    )
    return {"users": users, "greeted": greeted}


@app.post("/users/<name>/score")
async def score(name: str) -> dict[str, str | int]:
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


@app.websocket("/ws")
async def users_socket() -> None:
    """Create a user for each message, in a unit of work that ends with it."""
    while True:
        name = await websocket.receive()
        try:
            async with db_context():
                await create_user(name)
        except IntegrityError:
            await websocket.send_json({"detail": "this name is taken"})
        else:
            await websocket.send_json({"name": name})


@app.get("/outbox")
async def read_outbox() -> Response:
    return jsonify(outbox)


@app.get("/health")
async def health() -> dict[str, int]:
    """Answer 503 with `Retry-After` while the database does not."""
    await db.ping(timeout=1)
    return {"checked_out": db.pool_status().checked_out}


@app.errorhandler(IntegrityError)
async def name_is_taken(exc: IntegrityError) -> tuple[dict[str, str], int]:
    """Answer the unique constraint, also when it speaks only at the commit."""
    return {"detail": "this name is taken"}, 409


@app.errorhandler(HTTPException)
async def refuse(exc: HTTPException) -> tuple[dict[str, str | None], int]:
    return {"detail": exc.description}, exc.code or 500


@app.before_serving
async def create_tables() -> None:
    async with db_context():  # a unit of work outside a request
        connection = await (await db_session(db)).connection()
        await connection.run_sync(Base.metadata.create_all)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from demo import main

    main(app)
