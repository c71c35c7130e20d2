"""A small but complete aiohttp application on context-sqla.

python app.py             serve it, on an SQLite file that is gone afterwards
python app.py --check     make the requests, print what came, exit 0 or 1

DATABASE_URL names another database, and a file that stays:
sqlite+aiosqlite:///users.db, postgresql+asyncpg://user:secret@host/app
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web
from context_sqla import (
    DBConnect,
    close_db_session,
    commit_db_session,
    db_context,
    db_session,
    on_commit,
    run_in_new_ctx,
)
from context_sqla_aiohttp import setup
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

folder = tempfile.TemporaryDirectory(prefix="context-sqla-", ignore_cleanup_errors=True)
url = os.environ.get("DATABASE_URL") or f"sqlite+aiosqlite:///{folder.name}/users.db"
db = DBConnect.from_url(url, name="users")
jobs: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected
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
        raise web.HTTPNotFound(text="nobody has this name")
    return user


async def count_users(*, greeted: bool | None = None) -> int:
    session = await db_session(db)
    query = select(func.count()).select_from(User)
    if greeted is not None:
        query = query.where(User.greeted == greeted)
    return await session.scalar(query) or 0


async def create(request: web.Request) -> web.Response:
    name = request.query["name"]
    await create_user(name)
    # What was added is committed before the client sees this.
    return web.json_response({"name": name}, status=201)


async def list_users(request: web.Request) -> web.Response:
    session = await db_session(db)
    users = await session.scalars(select(User).order_by(User.id))
    rows = [{"name": one.name, "greeted": one.greeted, "score": one.score} for one in users]
    return web.json_response(rows)


async def export(request: web.Request) -> web.Response:
    """Stream rows in a transaction of the body, which ends before the last byte."""

    async def lines() -> AsyncIterator[bytes]:
        session = await db_session(db)
        query = select(User).order_by(User.id).execution_options(yield_per=100)
        users = await session.stream_scalars(query)
        yield b"name,score\n"
        async for user in users:
            yield f"{user.name},{user.score}\n".encode()

    return web.Response(body=lines(), content_type="text/csv")


async def greet(request: web.Request) -> web.Response:
    """Answer at once; the job is a unit of its own, and runs only if this one commits."""
    user = await find_user(request.match_info["name"])
    name = user.name
    on_commit(lambda: start(send_greeting, name))
    return web.json_response({"name": name}, status=202)


def start(job: Callable[[str], Awaitable[None]], name: str) -> None:
    """Run a job in the background, for which aiohttp has no place.

    A plain task would share the request's unit of work.
    """
    task = asyncio.create_task(run_in_new_ctx(job, name))
    jobs.add(task)
    task.add_done_callback(jobs.discard)


async def send_greeting(name: str) -> None:
    await asyncio.sleep(0.05)  # no connection is held meanwhile
    user = await find_user(name)
    user.greeted = True  # committed at the end of the job


async def stats(request: web.Request) -> web.Response:
    """Ask two questions at once, each in a unit and on a connection of its own."""
    users, greeted = await asyncio.gather(
        run_in_new_ctx(count_users),
        run_in_new_ctx(count_users, greeted=True),
    )
    return web.json_response({"users": users, "greeted": greeted})


async def score(request: web.Request) -> web.Response:
    """Give the connection back for as long as something slow takes."""
    user = await find_user(request.match_info["name"])
    await commit_db_session(db)
    await close_db_session(db)

    points = await ask_a_slow_service(user.name)

    user = await find_user(user.name)  # a new session, a new transaction
    user.score = points
    return web.json_response({"name": user.name, "score": user.score})


async def ask_a_slow_service(name: str) -> int:
    await asyncio.sleep(0.05)
    return len(name)


async def websocket(request: web.Request) -> web.WebSocketResponse:
    """Create a user for each message, in a unit of work that ends with it."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        name = message.data
        try:
            async with db_context():
                await create_user(name)
        except IntegrityError:
            await socket.send_json({"detail": "this name is taken"})
        else:
            await socket.send_json({"name": name})
    return socket


async def read_outbox(request: web.Request) -> web.Response:
    return web.json_response(outbox)


async def health(request: web.Request) -> web.Response:
    """Answer 503 with `Retry-After` while the database does not."""
    await db.ping(timeout=1)
    return web.json_response({"checked_out": db.pool_status().checked_out})


@web.middleware
async def errors(
    request: web.Request,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    """Answer the unique constraint, also when it speaks only at the commit."""
    try:
        return await handler(request)
    except IntegrityError:
        return web.json_response({"detail": "this name is taken"}, status=409)
    except web.HTTPClientError as exc:
        return web.json_response({"detail": exc.text}, status=exc.status)


async def tables(app: web.Application) -> AsyncIterator[None]:
    async with db_context():  # a unit of work outside a request
        connection = await (await db_session(db)).connection()
        await connection.run_sync(Base.metadata.create_all)
    yield
    await asyncio.gather(*jobs)


def make_app() -> web.Application:
    app = web.Application(middlewares=[errors])
    app.cleanup_ctx.append(tables)
    app.router.add_post("/users", create)
    app.router.add_get("/users", list_users)
    app.router.add_post("/users/{name}/greeting", greet)
    app.router.add_post("/users/{name}/score", score)
    app.router.add_get("/export", export)
    app.router.add_get("/stats", stats)
    app.router.add_get("/outbox", read_outbox)
    app.router.add_get("/health", health)
    app.router.add_get("/ws", websocket)
    setup(app, db)  # a unit of work per request; db is closed at cleanup
    return app


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from demo import AiohttpServer, main

    main(AiohttpServer(make_app()))
