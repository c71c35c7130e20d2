"""Clients under load, and what they saw: which writes were acknowledged, by which server, when; which failed."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from context_sqla import DBConnect, db_context, db_session
from context_sqla_hosts import Choice, Hosts, bind_engine
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from .cluster import DATABASE, MONITOR, PASSWORD, USER, Sql

TABLE = "CREATE TABLE item (id bigint PRIMARY KEY, number int)"
#: What a driver needs behind a pool of transactions: a prepared statement belongs to one server connection.
POOLED: Mapping[str, Mapping[str, Any]] = {"asyncpg": {"statement_cache_size": 0}, "psycopg": {"prepare_threshold": None}}
_INSERT = text("INSERT INTO item (id) VALUES (:id) RETURNING inet_server_port()")
_numbers = itertools.count(1)

Write = Callable[[int], Awaitable[int]]
"""Writes a row with this id, in a transaction of its own, and returns the port of the server that took it."""


class Ack(NamedTuple):
    at: float
    id: int
    port: int
    began: float


class Failed(NamedTuple):
    at: float
    error: BaseException


@dataclass
class Load:
    """Workers that write without a pause."""

    write: Write
    acked: list[Ack] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    busy_since: dict[int, float] = field(default_factory=dict)

    async def work(self, worker: int) -> None:
        while True:
            number = next(_numbers)
            began = self.busy_since[worker] = time.monotonic()
            try:
                port = await self.write(number)
            except Exception as exc:
                self.failed.append(Failed(time.monotonic(), exc))
                await asyncio.sleep(0)
            else:
                self.acked.append(Ack(time.monotonic(), number, port, began))

    def acked_after(self, moment: float) -> list[Ack]:
        return [ack for ack in self.acked if ack.at > moment]

    def acked_by(self, node: Sql, *, since: float = 0.0) -> list[Ack]:
        """The writes that a server acknowledged and that began after a moment."""
        return [ack for ack in self.acked if ack.port == node.port and ack.began > since]

    def gap(self) -> float:
        """The longest time without an acknowledged write."""
        times = [ack.at for ack in self.acked]
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def hanging(self, longer_than: float) -> int:
        """How many workers are in a write that began so long ago."""
        return sum(time.monotonic() - since > longer_than for since in self.busy_since.values())

    async def until(self, count: int, timeout: float = 60) -> None:
        """Wait for so many more acknowledged writes."""
        goal = len(self.acked) + count
        async with asyncio.timeout(timeout):
            while len(self.acked) < goal:
                await asyncio.sleep(0.005)

    async def until_by(self, node: Sql, count: int, timeout: float = 90) -> None:
        """Wait until a server has acknowledged so many writes."""
        try:
            async with asyncio.timeout(timeout):
                while len(self.acked_by(node)) < count:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{len(self.acked_by(node))} of {count} writes to {node}; errors: {self.kinds()}") from None

    def kinds(self) -> dict[str, int]:
        """The errors by kind, for messages."""
        kinds: dict[str, int] = {}
        for failed in self.failed:
            name = f"{type(failed.error).__name__}: {str(failed.error)[:100]}"
            kinds[name] = kinds.get(name, 0) + 1
        return kinds


@asynccontextmanager
async def load(write: Write, workers: int = 20) -> AsyncIterator[Load]:
    """Run workers, and cancel them at the end."""
    running = Load(write)
    tasks = [asyncio.create_task(running.work(worker)) for worker in range(workers)]
    try:
        yield running
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=10)
        assert all(task.done() for task in tasks), "a worker hangs and cannot be cancelled"


def watch(nodes: Sequence[Sql], *, user: str = MONITOR, **options: Any) -> Hosts:
    """Make a monitor of these nodes."""
    return Hosts([node.address for node in nodes], user=user, password=PASSWORD, database=DATABASE, **options)


@asynccontextmanager
async def following(
    choice: Choice | None, *, driver: str = "asyncpg", pool: int = 20, host: str = "nowhere", pooled: bool = False, **options: Any
) -> AsyncIterator[DBConnect[Any]]:
    """Give a connect whose sessions go where the choice says, or to one host; `pooled`: through pgbouncer."""
    engine_options: dict[str, Any] = {"pool_size": pool, "max_overflow": 0}
    if pooled:
        engine_options["connect_args"] = POOLED[driver]
    db = DBConnect.from_url(
        f"postgresql+{driver}://{USER}:{PASSWORD}@{host}/{DATABASE}",
        engine_options=engine_options,
        before_create_session_handler=choice,
        **options,
    )
    try:
        yield db
    finally:
        await db.close()


def writing(db: DBConnect[Any]) -> Write:
    """Write in a unit of work."""

    async def write(number: int) -> int:
        async with db_context():
            session = await db_session(db)
            port = (await session.execute(_INSERT, {"id": number})).scalar_one()
        return int(port)

    return write


@asynccontextmanager
async def bound(choice: Choice, *, driver: str = "asyncpg", pool: int = 20) -> AsyncIterator[Write]:
    """Write over an engine of plain SQLAlchemy that is bound to a choice."""
    engine = create_async_engine(f"postgresql+{driver}://{USER}:{PASSWORD}@nowhere/{DATABASE}", pool_size=pool, max_overflow=0)
    maker = async_sessionmaker(bind_engine(engine, choice))

    async def write(number: int) -> int:
        async with maker.begin() as session:
            port = (await session.execute(_INSERT, {"id": number})).scalar_one()
        return int(port)

    try:
        yield write
    finally:
        await engine.dispose()


async def promote_visibly(node: Sql) -> float:
    """Promote a node, and return when it first said that it is a primary."""
    async with node.session() as connection:
        await connection.execute("SELECT pg_promote(false)")
        while await connection.fetchval("SELECT pg_is_in_recovery()"):
            await asyncio.sleep(0.002)
        return time.monotonic()


async def lost(acked: Sequence[Ack], node: Sql) -> int:
    """Count the acknowledged writes that a node does not have."""
    async with node.session() as connection:
        there = {row["id"] for row in await connection.fetch("SELECT id FROM item")}
    return sum(ack.id not in there for ack in acked)
