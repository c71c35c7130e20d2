"""A small ASGI application without a framework, on context-sqla.

python app.py             serve it, on an SQLite file that is gone afterwards
python app.py --check     make the requests, print what came, exit 0 or 1

DATABASE_URL names another database, and a file that stays:
sqlite+aiosqlite:///users.db, postgresql+asyncpg://user:secret@host/app
"""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from context_sqla import (
    DBConnect,
    close_db_session,
    commit_db_session,
    db_context,
    db_session,
    on_commit,
    run_in_new_ctx,
)
from context_sqla_asgi import setup
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

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


class NotFoundError(Exception):
    pass


async def create_user(name: str) -> None:
    session = await db_session(db)
    session.add(User(name=name))
    on_commit(lambda: outbox.append(f"welcome, {name}"))


async def find_user(name: str) -> User:
    session = await db_session(db)
    user = await session.scalar(select(User).where(User.name == name))
    if user is None:
        raise NotFoundError(name)
    return user


async def count_users(*, greeted: bool | None = None) -> int:
    session = await db_session(db)
    query = select(func.count()).select_from(User)
    if greeted is not None:
        query = query.where(User.greeted == greeted)
    return await session.scalar(query) or 0


async def create(scope: Scope, send: Send) -> None:
    name = parse_qs(scope["query_string"].decode())["name"][0]
    await create_user(name)
    # This raises the error of the commit, or what was added is there before it leaves.
    await answer(send, 201, {"name": name})


async def list_users(scope: Scope, send: Send) -> None:
    session = await db_session(db)
    users = await session.scalars(select(User).order_by(User.id))
    rows = [{"name": one.name, "greeted": one.greeted, "score": one.score} for one in users]
    await answer(send, 200, rows)


async def export(scope: Scope, send: Send) -> None:
    """Stream rows in a transaction of the body, which ends before the last byte."""
    headers = [(b"content-type", b"text/csv")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send(chunk("name,score\n"))
    session = await db_session(db)
    query = select(User).order_by(User.id).execution_options(yield_per=100)
    users = await session.stream_scalars(query)
    async for user in users:
        await send(chunk(f"{user.name},{user.score}\n"))
    await send({"type": "http.response.body"})


async def greet(scope: Scope, send: Send) -> None:
    """Answer at once; what comes after the last byte is a unit of work of its own."""
    user = await find_user(scope["path"].split("/")[2])
    await answer(send, 202, {"name": user.name})
    await asyncio.sleep(0.05)  # no connection is held meanwhile
    user = await find_user(user.name)
    user.greeted = True


async def stats(scope: Scope, send: Send) -> None:
    """Ask two questions at once, each in a unit and on a connection of its own."""
    users, greeted = await asyncio.gather(
        run_in_new_ctx(count_users),
        run_in_new_ctx(count_users, greeted=True),
    )
    await answer(send, 200, {"users": users, "greeted": greeted})


async def score(scope: Scope, send: Send) -> None:
    """Give the connection back for as long as something slow takes."""
    user = await find_user(scope["path"].split("/")[2])
    await commit_db_session(db)
    await close_db_session(db)

    await asyncio.sleep(0.05)  # a slow service
    points = len(user.name)

    user = await find_user(user.name)  # a new session, a new transaction
    user.score = points
    await answer(send, 200, {"name": user.name, "score": user.score})


async def read_outbox(scope: Scope, send: Send) -> None:
    await answer(send, 200, outbox)


async def health(scope: Scope, send: Send) -> None:
    """Answer 503 with `Retry-After` while the database does not."""
    await db.ping(timeout=1)
    await answer(send, 200, {"checked_out": db.pool_status().checked_out})


ROUTES: dict[tuple[str, str], Callable[[Scope, Send], Awaitable[None]]] = {
    ("POST", ""): create,
    ("GET", ""): list_users,
    ("POST", "greeting"): greet,
    ("POST", "score"): score,
    ("GET", "export"): export,
    ("GET", "stats"): stats,
    ("GET", "outbox"): read_outbox,
    ("GET", "health"): health,
}


async def http(scope: Scope, send: Send) -> None:
    action = scope["path"].rpartition("/")[2]
    route = ROUTES.get((scope["method"], "" if action == "users" else action))
    if route is None:
        await answer(send, 404, {"detail": "no such page"})
        return
    try:
        await route(scope, send)
    except NotFoundError:
        await answer(send, 404, {"detail": "nobody has this name"})
    except IntegrityError:  # also that of the commit: `send` raised it, and sent no head
        await answer(send, 409, {"detail": "this name is taken"})


async def websocket(receive: Receive, send: Send) -> None:
    """Create a user for each message, in a unit of work that ends with it."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        reply = {"name": message["text"]}
        try:
            async with db_context():
                await create_user(message["text"])
        except IntegrityError:
            reply = {"detail": "this name is taken"}
        await send({"type": "websocket.send", "text": json.dumps(reply)})


async def lifespan(receive: Receive, send: Send) -> None:
    await receive()
    async with db_context():  # a unit of work outside a request
        connection = await (await db_session(db)).connection()
        await connection.run_sync(Base.metadata.create_all)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def answer(send: Send, status: int, content: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


def chunk(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await http(scope, send)
    elif scope["type"] == "websocket":
        await websocket(receive, send)
    else:
        await lifespan(receive, send)


app = setup(application, db)  # a unit of work per request; db is closed at shutdown


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from demo import main

    main(app)
