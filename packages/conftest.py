"""What the unit tests of all packages share: a database, an observer of it, and clients of an application.

Nothing of a package is imported here but the core, which each of them needs: the tests of one run without the others.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from context_sqla import DBConnect, db_session
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession


class Ledger:
    """Sees the database over connections of its own, as everybody else does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = DBConnect.from_url(f"sqlite+aiosqlite:///{path}", name="ledger")
        self.db.engine_created.append(_check_foreign_keys)
        with self.connection() as connection:
            connection.execute("CREATE TABLE parent (name TEXT PRIMARY KEY)")
            connection.execute(
                "CREATE TABLE item (name TEXT, parent TEXT REFERENCES parent (name) DEFERRABLE INITIALLY DEFERRED)"
            )

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as connection:
            yield connection

    def names(self) -> str:
        """The names that are committed at this moment."""
        with self.connection() as connection:
            return " ".join(name for (name,) in connection.execute("SELECT name FROM item ORDER BY name"))

    async def session(self) -> AsyncSession:
        """The session of the unit of work in which this runs."""
        return await db_session(self.db)

    async def write(self, name: str) -> None:
        """Write a row in the unit of work in which this runs."""
        session = await db_session(self.db)
        await session.execute(text("INSERT INTO item (name) VALUES (:name)"), {"name": name})

    async def write_orphan(self, name: str) -> None:
        """Write a row whose foreign key fails at COMMIT."""
        session = await db_session(self.db)
        await session.execute(text("INSERT INTO item (name, parent) VALUES (:name, 'nobody')"), {"name": name})


def _check_foreign_keys(engine: AsyncEngine, host: str) -> None:
    event.listen(engine.sync_engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))


@pytest.fixture(name="ledger")
async def _ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "app.db")
    yield ledger
    assert ledger.db.pool_status().checked_out == 0
    await ledger.db.close()


@pytest.fixture(name="client_of")
async def _client_of():
    """Make a client of an application, in this task and loop; exceptions that escape it are the server's affair."""
    async with contextlib.AsyncExitStack() as stack:

        async def client_of(app) -> httpx.AsyncClient:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))

        yield client_of


@pytest.fixture(name="messages_of")
def _messages_of(ledger: Ledger):
    """Make a request at the level of ASGI: what the server is given, each with the rows that are committed by then."""

    async def messages_of(app, path: str = "/", *, kind: str = "http", log: list[str] | None = None, **scope) -> list[str]:
        log = [] if log is None else log
        complete = asyncio.Event()
        received = [{"type": f"{kind}.{'connect' if kind == 'websocket' else 'request'}"}]

        async def receive():
            if not received:
                await complete.wait()  # as servers do; Litestar and Quart wait for it
                return {"type": f"{kind}.disconnect"}
            return received.pop()

        async def send(message):
            what = message.get("status", message.get("body", message.get("text", b"")))
            text = what.decode(errors="replace") if isinstance(what, bytes) else str(what)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                complete.set()
            log.append(f"{message['type'].split('.')[-1]} {text}{'+' if message.get('more_body') else ''} [{ledger.names()}]")

        scope = {"type": kind, "method": "GET", "path": path, "headers": [], "query_string": b"", "root_path": ""} | scope
        if kind == "websocket":
            del scope["method"]
        await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)
        return log

    return messages_of
