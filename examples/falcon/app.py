"""A small but complete Falcon application on context-sqla.

python app.py             serve it, on an SQLite file that is gone afterwards
python app.py --check     make the requests, print what came, exit 0 or 1

DATABASE_URL names another database, and a file that stays:
sqlite+aiosqlite:///users.db, postgresql+asyncpg://user:secret@host/app
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import falcon
import falcon.asgi
from context_sqla import (
    DBConnect,
    close_db_session,
    commit_db_session,
    db_context,
    db_session,
    on_commit,
    run_in_new_ctx,
)
from context_sqla_falcon import setup
from falcon.asgi import Request, Response, WebSocket
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
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
        raise falcon.HTTPNotFound(description="nobody has this name")
    return user


async def count_users(*, greeted: bool | None = None) -> int:
    session = await db_session(db)
    query = select(func.count()).select_from(User)
    if greeted is not None:
        query = query.where(User.greeted == greeted)
    return await session.scalar(query) or 0


class Users:
    async def on_post(self, req: Request, resp: Response) -> None:
        name = req.get_param("name", required=True)
        await create_user(name)
        resp.status, resp.media = 201, {"name": name}  # committed before the client sees it

    async def on_get(self, req: Request, resp: Response) -> None:
        session = await db_session(db)
        users = await session.scalars(select(User).order_by(User.id))
        rows = [{"name": one.name, "greeted": one.greeted, "score": one.score} for one in users]
        resp.media = rows


class Export:
    async def on_get(self, req: Request, resp: Response) -> None:
        """Stream rows in a transaction of the body, which ends before the last byte."""

        async def lines() -> AsyncIterator[bytes]:
            session = await db_session(db)
            query = select(User).order_by(User.id).execution_options(yield_per=100)
            users = await session.stream_scalars(query)
            yield b"name,score\n"
            async for user in users:
                yield f"{user.name},{user.score}\n".encode()

        resp.content_type, resp.stream = "text/csv; charset=utf-8", lines()


class Greeting:
    async def on_post(self, req: Request, resp: Response, name: str) -> None:
        """Answer at once; the job runs afterwards, in a unit of work of its own."""
        user = await find_user(name)
        resp.schedule(partial(send_greeting, user.name))
        resp.status, resp.media = 202, {"name": user.name}


async def send_greeting(name: str) -> None:
    await asyncio.sleep(0.05)  # no connection is held meanwhile
    user = await find_user(name)
    user.greeted = True  # committed at the end of the job


class Stats:
    async def on_get(self, req: Request, resp: Response) -> None:
        """Ask two questions at once, each in a unit and on a connection of its own."""
        users, greeted = await asyncio.gather(
            run_in_new_ctx(count_users),
            run_in_new_ctx(count_users, greeted=True),
        )
        resp.media = {"users": users, "greeted": greeted}


class Score:
    async def on_post(self, req: Request, resp: Response, name: str) -> None:
        """Give the connection back for as long as something slow takes."""
        user = await find_user(name)
        await commit_db_session(db)
        await close_db_session(db)

        points = await ask_a_slow_service(user.name)

        user = await find_user(user.name)  # a new session, a new transaction
        user.score = points
        resp.media = {"name": user.name, "score": user.score}


async def ask_a_slow_service(name: str) -> int:
    await asyncio.sleep(0.05)
    return len(name)


class Talk:
    async def on_websocket(self, req: Request, ws: WebSocket) -> None:
        """Create a user for each message, in a unit of work that ends with it."""
        await ws.accept()
        with contextlib.suppress(falcon.WebSocketDisconnected):
            while True:
                name = await ws.receive_text()
                try:
                    async with db_context():
                        await create_user(name)
                except IntegrityError:
                    await ws.send_text(json.dumps({"detail": "this name is taken"}))
                else:
                    await ws.send_text(json.dumps({"name": name}))


class Outbox:
    async def on_get(self, req: Request, resp: Response) -> None:
        resp.media = outbox


class Health:
    async def on_get(self, req: Request, resp: Response) -> None:
        """Answer 503 with `Retry-After` while the database does not."""
        await db.ping(timeout=1)
        resp.media = {"checked_out": db.pool_status().checked_out}


async def name_is_taken(
    req: Request,
    resp: Response,
    exc: IntegrityError,
    params: dict[str, Any],
) -> None:
    """Answer the unique constraint, also when it speaks only at the commit."""
    resp.status, resp.media = 409, {"detail": "this name is taken"}


async def refuse(
    req: Request,
    resp: Response,
    exc: falcon.HTTPNotFound,
    params: dict[str, Any],
) -> None:
    resp.status, resp.media = exc.status, {"detail": exc.description}


class Tables:
    async def process_startup(self, scope: dict[str, Any], event: dict[str, Any]) -> None:
        async with db_context():  # a unit of work outside a request
            connection = await (await db_session(db)).connection()
            await connection.run_sync(Base.metadata.create_all)


app = falcon.asgi.App(middleware=[Tables()])
app.add_route("/users", Users())
app.add_route("/users/{name}/greeting", Greeting())
app.add_route("/users/{name}/score", Score())
app.add_route("/export", Export())
app.add_route("/stats", Stats())
app.add_route("/outbox", Outbox())
app.add_route("/health", Health())
app.add_route("/ws", Talk())
app.add_error_handler(IntegrityError, name_is_taken)
app.add_error_handler(falcon.HTTPNotFound, refuse)
setup(app, db)  # a unit of work per request; db is closed at shutdown


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from demo import main

    main(app)
