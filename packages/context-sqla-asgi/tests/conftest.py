"""A database, an observer of it, and the server's side of a request."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from context_sqla import DBConnect, db_session
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine


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

    async def write(self, name: str) -> None:
        """Write a row in the unit of work in which this runs."""
        session = await db_session(self.db)
        await session.execute(text("INSERT INTO item (name) VALUES (:name)"), {"name": name})

    async def write_orphan(self, name: str) -> None:
        """Write a row whose foreign key fails at COMMIT."""
        session = await db_session(self.db)
        await session.execute(text("INSERT INTO item (name, parent) VALUES (:name, 'nobody')"), {"name": name})


class Server:
    """The server's side of one request: what it hands in, and what it is given, each with the rows that are committed by then."""

    def __init__(self, ledger: Ledger, *messages: dict) -> None:
        self.ledger = ledger
        self.messages = list(messages)
        self.gone = asyncio.Event()
        self.log: list[str] = []

    async def receive(self) -> dict:
        if self.messages:
            return self.messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        kind = message["type"].removeprefix("http.response.")
        what = message.get("status", message.get("body", b""))
        text = what.decode() if isinstance(what, bytes) else str(what)
        self.log.append(f"{kind} {text}{'+' if message.get('more_body') else ''} [{self.ledger.names()}]")

    async def call(self, app, method: str = "GET", path: str = "/", **scope) -> list[str]:
        """Make the request and return the log."""
        scope = {"type": "http", "method": method, "path": path, "headers": [], "asgi": {"version": "3.0"}} | scope
        try:
            await app(scope, self.receive, self.send)
        except BaseException as error:
            self.log.append(f"raised {type(error).__name__} [{self.ledger.names()}]")
            raise
        return self.log


def _check_foreign_keys(engine: AsyncEngine, host: str) -> None:
    event.listen(engine.sync_engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))


@pytest.fixture(name="ledger")
async def _ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "app.db")
    yield ledger
    assert ledger.db.pool_status().checked_out == 0
    await ledger.db.close()


@pytest.fixture(name="server")
def _server(ledger: Ledger) -> Server:
    return Server(ledger)
