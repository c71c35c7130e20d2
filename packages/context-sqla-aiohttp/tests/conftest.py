"""A database, an observer of it, and aiohttp's own test client."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
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


def _check_foreign_keys(engine: AsyncEngine, host: str) -> None:
    event.listen(engine.sync_engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))


@pytest.fixture(name="ledger")
async def _ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "app.db")
    yield ledger
    async with asyncio.timeout(10):  # a unit may end in a task of its own, after its request
        while ledger.db.pool_status().checked_out:
            await asyncio.sleep(0)
    await ledger.db.close()


@pytest.fixture(name="client_of")
async def _client_of():
    """Serve an application in this loop, and make a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def client_of(app: web.Application) -> TestClient:
            return await stack.enter_async_context(TestClient(TestServer(app)))

        yield client_of
