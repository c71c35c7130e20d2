"""The databases of a test: connects with small pools over known tables, and the proof that nothing was left behind."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from context_sqla import DBConnect, is_context_initiated
from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from . import tables
from .deadline import DEADLINE, until
from .ledger import Ledger, PostgresLedger, SqliteLedger
from .mirror import There
from .postgres import Postgres

#: Drivers of databases, the default one first.
DRIVERS: Mapping[str, str] = {"asyncpg": "postgresql", "psycopg": "postgresql", "aiosqlite": "sqlite"}

HostHandler = Callable[[DBConnect[Any]], Awaitable[str | None]]


class Database:
    """One database with its tables, and its observer."""

    def __init__(self, driver: str, name: str, place: Postgres | Path) -> None:
        self.driver = driver
        self.dialect = DRIVERS[driver]
        self.name = name
        self.place = place
        self.ledger: Ledger
        if isinstance(place, Postgres):
            self.ledger = PostgresLedger(place, name)
        else:
            self.ledger = SqliteLedger(place)

    @property
    def host(self) -> str:
        """The host of a connect to this database."""
        return self.place.address if isinstance(self.place, Postgres) else "local"

    def url(self, host: str | None = None) -> URL:
        """Return the URL, of another host ("name:port") if told so."""
        if isinstance(self.place, Path):
            return URL.create(f"sqlite+{self.driver}", database=str(self.place))
        name, _, port = (host or self.host).partition(":")
        return URL.create(
            f"postgresql+{self.driver}",
            username=self.place.user,
            password=self.place.password,
            host=name,
            port=int(port),
            database=self.name,
        )

    def engine(self, host: str, application_name: str, **options: Any) -> AsyncEngine:
        """Make an engine whose connections the observer knows by ``application_name``."""
        settings: dict[str, Any] = {
            "asyncpg": {"server_settings": {"application_name": application_name}},
            "psycopg": {"application_name": application_name},
            "aiosqlite": {"timeout": DEADLINE},
        }
        arguments = {**settings[self.driver], **options.pop("connect_args", {})}
        engine = create_async_engine(self.url(host), connect_args=arguments, **options)
        if self.dialect == "sqlite":
            event.listen(engine.sync_engine, "connect", _enforce_foreign_keys)
        return engine

    async def prepare(self) -> None:
        """Make the tables, or empty them."""
        if isinstance(self.place, Path):
            with contextlib.closing(sqlite3.connect(self.place)) as connection:
                # A reader does not wait for a writer then: the observer sees what is committed, at any moment.
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(";".join(tables.definitions(self.dialect)))
        elif self.name in self.place.prepared:
            await self.ledger.execute("TRUNCATE items, parents, children RESTART IDENTITY")
        else:
            await self.ledger.execute(";".join(tables.definitions(self.dialect)))
            self.place.prepared.add(self.name)


def _enforce_foreign_keys(dbapi: Any, record: object) -> None:
    cursor = dbapi.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


class Databases:
    """What a test uses of databases; ``whole`` and ``gone`` are the proof at its end."""

    SHARED = ("engines",)  # with the workers of a server

    def __init__(self, driver: str, place: Postgres | Path) -> None:
        self.driver = driver
        self.place = place
        self.connects: list[DBConnect[Any]] = []
        self.engines: list[AsyncEngine] = []
        self._databases: dict[tuple[str, str], Database] = {}

    async def database(self, name: str = "first", *, server: Postgres | None = None) -> Database:
        """Return a database (first, second or third) with empty tables; ``server`` asks for it on another server."""
        place = self.place / f"{name}.sqlite3" if isinstance(self.place, Path) else server or self.place
        key = (str(place), name)
        if key not in self._databases:
            self._databases[key] = database = Database(self.driver, name, place)
            await database.prepare()
        return self._databases[key]

    def connect(
        self,
        database: Database,
        name: str = "db",
        *,
        host: str | None = None,
        handler: HostHandler | None = None,
        session_class: type[AsyncSession] = AsyncSession,
        twophase: bool = False,
        engine_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> DBConnect[Any]:
        """Make a connect with a pool of five connections, closed at the end of the test.

        ``name`` is also the application name that the observer sees; ``engine_options`` are SQLAlchemy's; ``options`` are the
        connect's own.
        """
        pool = {"pool_size": 5, "max_overflow": 0, "pool_timeout": DEADLINE, **(engine_options or {})}

        def create_engine(wanted: str) -> AsyncEngine:
            engine = database.engine(wanted, name, **pool)
            self.engines.append(engine)
            return engine

        def create_maker(engine: AsyncEngine) -> async_sessionmaker[Any]:
            return async_sessionmaker(engine, class_=session_class, expire_on_commit=False, twophase=twophase)

        connect = DBConnect(create_engine, create_maker, host or database.host, handler, name=name, **options)
        self.connects.append(connect)
        return connect

    def checked_out(self) -> int:
        """Return how many connections are out of all pools together, whoever has them."""
        return sum(engine.sync_engine.pool.checkedout() for engine in self.engines if not _is_over(engine))  # type: ignore[attr-defined]

    async def whole(self, problems: list[str]) -> None:
        """Add what is not as it should be once all requests are over, and while the pools are still open."""
        await _expect_nothing("connections are checked out", self.checked_out, problems)
        for database in self._reachable():
            ledger = database.ledger
            await _expect_nothing("idle in transaction", ledger.idle_in_transaction, problems)
            await _expect_nothing("prepared transactions", ledger.prepared, problems)
            for gid in await ledger.prepared():
                await ledger.execute(f"ROLLBACK PREPARED '{gid}'")

    async def gone(self, problems: list[str]) -> None:
        """Close everything, and add what is still there to the problems."""
        for connect in self.connects:
            await connect.close()
        for database in self._reachable():
            await _expect_nothing("connections are still open", database.ledger.backends, problems)
            for backend in await database.ledger.backends():
                await database.ledger.execute("SELECT pg_terminate_backend($1)", backend.pid)
        for database in self._databases.values():
            await database.ledger.close()
        if is_context_initiated():
            problems.append("the context variable is still set")

    def _reachable(self) -> list[Database]:
        """The databases whose server the test has not stopped."""
        return [one for one in self._databases.values() if isinstance(one.place, Path) or one.place.running]


def _is_over(engine: Any) -> bool:
    """Whether it is the engine of a worker whose process has ended."""
    return isinstance(engine, There) and engine.is_over


@contextlib.asynccontextmanager
async def no_tasks_left() -> AsyncIterator[list[str]]:
    """Yield a list of problems, to which the tasks are added that the block has started and not ended."""
    before = asyncio.all_tasks()
    problems: list[str] = []
    yield problems

    def left() -> set["asyncio.Task[Any]"]:
        here = asyncio.current_task()
        return {task for task in asyncio.all_tasks() - before if task is not here}

    await _expect_nothing("tasks are left over", left, problems)


async def _expect_nothing(what: str, look: Callable[[], Any], problems: list[str]) -> None:
    """Wait until the value is empty or zero, or add a problem; patiently the first time, because one leads to the next."""
    seen: Any = None

    async def empty() -> bool:
        nonlocal seen
        seen = look()
        if isinstance(seen, Awaitable):
            seen = await seen
        return not seen

    try:
        await until(empty, deadline=0.5 if problems else DEADLINE)
    except TimeoutError:
        problems.append(f"{what}: {seen}")
