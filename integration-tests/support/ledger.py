"""An observer of a database, over a connection of its own: what others see, and what is left behind.

It goes past SQLAlchemy, so that no fault of a pool or a session under test can hide itself.
"""

import asyncio
import contextlib
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]

from .deadline import until
from .postgres import Postgres
from .workers import settle

Row = tuple[Any, ...]
OBSERVER = "ledger"


@dataclass(frozen=True)
class Backend:
    """A client's connection as the server sees it."""

    pid: int
    database: str
    application_name: str
    state: str
    waits_for: str
    query: str

    @property
    def idle_in_transaction(self) -> bool:
        """Whether a transaction is open and nobody works on it."""
        return self.state.startswith("idle in transaction")


class Ledger(ABC):
    """What every database can be asked for."""

    @abstractmethod
    async def rows(self, sql: str, *args: object) -> list[Row]:
        """Return the rows of a query, as anybody else sees them at this moment."""

    @abstractmethod
    async def execute(self, sql: str, *args: object) -> None:
        """Run a statement and commit it at once."""

    async def value(self, sql: str, *args: object) -> Any:
        """Return the first column of the first row."""
        return (await self.rows(sql, *args))[0][0]

    async def names(self, table: str = "items") -> list[str]:
        """Return the names in a table (items or parents), in the order of the alphabet."""
        return [name for (name,) in await self.rows(f"SELECT name FROM {table} ORDER BY name")]

    async def count(self, table: str = "items") -> int:
        """Return the number of committed rows of a table."""
        return int(await self.value(f"SELECT count(*) FROM {table}"))

    async def backends(self, application_name: str | None = None) -> list[Backend]:
        """Return the connections of the whole server, or of one application name, ours left out."""
        return []

    async def prepared(self) -> list[str]:
        """Return the gids of the transactions that are prepared in this database and not finished."""
        return []

    async def idle_in_transaction(self) -> list[Backend]:
        """Return the connections that hold a transaction open and do nothing."""
        return [backend for backend in await self.backends() if backend.idle_in_transaction]

    @abstractmethod
    async def close(self) -> None:
        """Close the observer's connection."""


class PostgresLedger(Ledger):
    """The observer of one database of a PostgreSQL server."""

    def __init__(self, server: Postgres, database: str) -> None:
        self.server = server
        self.database = database
        self._connection: Any = None
        # Observers that wait side by side take turns.
        self._turn = asyncio.Lock()
        self._process = os.getpid()

    async def rows(self, sql: str, *args: object) -> list[Row]:
        async with self._taking_turns(), self._ours() as connection:
            rows = [tuple(row) for row in await connection.fetch(sql, *args)]
        settle()
        return rows

    async def execute(self, sql: str, *args: object) -> None:
        async with self._taking_turns(), self._ours() as connection:
            await connection.execute(sql, *args)

    async def backends(self, application_name: str | None = None) -> list[Backend]:
        rows = await self.rows(
            "SELECT pid, coalesce(datname, ''), application_name, coalesce(state, ''), coalesce(wait_event_type, ''), query"
            " FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> $1 ORDER BY pid",
            OBSERVER,
        )
        found = [Backend(*row) for row in rows]
        return [one for one in found if application_name in (None, one.application_name)]

    async def prepared(self) -> list[str]:
        return [gid for (gid,) in await self.rows("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")]

    async def terminate(self, pid: int) -> None:
        """Cut a backend, as an administrator, a crash or a failover does; returns when it is gone."""
        await self.execute("SELECT pg_terminate_backend($1)", pid)
        await until(lambda: self._gone(pid), message=f"backend {pid} is still there")

    async def cancel(self, pid: int) -> None:
        """Cancel the running statement of a backend."""
        await self.execute("SELECT pg_cancel_backend($1)", pid)

    async def waiting(self, application_name: str | None = None, count: int = 1) -> list[Backend]:
        """Return the backends that wait for a lock, as soon as there are ``count`` of them."""
        found: list[Backend] = []

        async def enough() -> bool:
            found[:] = [one for one in await self.backends(application_name) if one.waits_for == "Lock"]
            return len(found) >= count

        await until(enough, message=f"fewer than {count} backends wait for a lock")
        return found

    @contextlib.asynccontextmanager
    async def lock(self, table: str = "items") -> AsyncIterator[None]:
        """Keep everybody else from reading and writing a table for the length of the block: their statements wait."""
        connection = await self._connect()
        try:
            async with connection.transaction():
                await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
                yield
        finally:
            await connection.close()

    async def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(asyncpg.PostgresError, OSError):
                await connection.close(timeout=5)

    def _taking_turns(self) -> asyncio.Lock:
        if self._process != os.getpid():  # forked: the connection is the other process's
            self._process, self._connection, self._turn = os.getpid(), None, asyncio.Lock()
        return self._turn

    async def _gone(self, pid: int) -> bool:
        return not await self.rows("SELECT 1 FROM pg_stat_activity WHERE pid = $1", pid)

    @contextlib.asynccontextmanager
    async def _ours(self) -> AsyncIterator[Any]:
        """Give the observer's connection; after an error a fresh one, for it may be that of a server which is gone."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect()
        try:
            yield self._connection
        except BaseException:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.terminate()
            raise

    async def _connect(self) -> Any:
        return await asyncpg.connect(
            host=self.server.host,
            port=self.server.port,
            user=self.server.user,
            password=self.server.password,
            database=self.database,
            timeout=10,
            server_settings={"application_name": OBSERVER},
            statement_cache_size=0,
        )


class SqliteLedger(Ledger):
    """The observer of a SQLite file; a connection for every look, so that it holds nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def rows(self, sql: str, *args: object) -> list[Row]:
        rows = await asyncio.to_thread(self._run, sql, args)
        settle()
        return rows

    async def execute(self, sql: str, *args: object) -> None:
        await asyncio.to_thread(self._run, sql, args)

    async def close(self) -> None:
        """Nothing is open."""

    def _run(self, sql: str, args: Sequence[object]) -> list[Row]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            return list(connection.execute(sql, args))
