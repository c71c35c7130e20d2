"""The benchmarks: each has its contenders, the first of which is what the others are compared with."""

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from context_sqla import DBConnect, db_context, db_session, run_in_new_ctx
from context_sqla.adapters import Unit
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.postgres import Postgres

from .contenders import NO_DB, OURS, WITH_SESSION, asgi_bare, connect_to, dispose, drive, installed, maker_of
from .drive import asgi
from .rounds import Contender, Result, measure


@dataclass
class Report:
    """What one benchmark found."""

    title: str
    goal: str
    results: list[Result] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How thoroughly is measured.

    Args:
        rounds: how often each contender has its turn.
        scale: of the length of a turn.
        only: leave out the libraries but this one: where one needs versions that the others cannot have.
    """

    rounds: int = 41
    scale: float = 1.0
    only: str | None = None

    async def measure(self, contenders: Sequence[Contender], seconds: float, *, rounds: int | None = None) -> list[Result]:
        """Measure in turns of so many seconds each."""
        return await measure(contenders, rounds=rounds or self.rounds, seconds=seconds * self.scale)

    def takes(self, library: str | None) -> bool:
        """Return whether a contender takes part at all."""
        return library is None or self.only in (None, library)


@asynccontextmanager
async def _engine(server: Postgres, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"postgresql+asyncpg://{server.user}:{server.password}@{server.address}/postgres", **options)
    try:
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE IF NOT EXISTS bench (id bigserial PRIMARY KEY, name text)"))
        yield engine
    finally:
        await dispose(engine)


_SELECT = text("SELECT 1")
_INSERT = text("INSERT INTO bench (name) VALUES (:name)")


async def _query(session: Any) -> None:
    await session.execute(_SELECT)
    await session.execute(_INSERT, {"name": "a"})


async def _nothing(session: Any) -> None:
    pass


async def no_db(framework: str, server: Postgres, effort: Effort) -> Report:
    """A request that does not use the database."""
    report = Report(f"request without database, {framework}", _NO_DB_GOALS[framework])
    async with _engine(server) as engine:
        contenders = []
        for name, (make, library) in NO_DB[framework].items():
            if not effort.takes(library):
                continue
            if library is not None and not installed(library):
                report.missing.append(name)
                continue
            contenders.append(Contender(name, await drive(framework, make(engine, None))))
        report.results = await effort.measure(contenders, 0.03)
    return report


_NO_DB_GOALS = {
    "asgi": "adds at most 1.2 us",
    "starlette": "adds at most 2.5 us",
    "fastapi": "adds at most 4 us",
    "litestar": "at most 1.20",
    "quart": "at most 1.03",
    "falcon": "adds at most 4 us",
    "aiohttp": "at most 1.08",
    "sanic": "at most 1.08",
}


async def _in_requests(title: str, goal: str, work: Any, server: Postgres, effort: Effort, seconds: float) -> Report:
    report = Report(title, goal)
    async with _engine(server) as engine:
        contenders = []
        for name, (make, library) in WITH_SESSION.items():
            if not effort.takes(library):
                continue
            if library is not None and not installed(library):
                report.missing.append(name)
                continue
            contenders.append(Contender(name, await drive("fastapi", make(engine, work))))
        report.results = await effort.measure(contenders, seconds)
    return report


async def one_query(server: Postgres, effort: Effort) -> Report:
    """One SELECT and one INSERT, committed, in FastAPI."""
    return await _in_requests("one SELECT and one INSERT, FastAPI", "at most 0.97", _query, server, effort, 0.06)


async def empty_session(server: Postgres, effort: Effort) -> Report:
    """A session that does nothing, in FastAPI."""
    return await _in_requests("a session that does nothing, FastAPI", "at most 0.60", _nothing, server, effort, 0.03)


async def same_without_framework(server: Postgres, effort: Effort) -> Report:
    """The same two statements, without a framework around them: the unit alone."""
    report = Report("one SELECT and one INSERT, the unit alone", "at most 0.97")
    async with _engine(server) as engine:
        maker, db = maker_of(engine), connect_to(engine)

        async def by_hand(count: int) -> None:
            for _ in range(count):
                async with maker() as session, session.begin():
                    await _query(session)

        async def ours(count: int) -> None:
            for _ in range(count):
                unit = Unit.enter()
                await _query(await db_session(db))
                await unit.head(200)
                await unit.end_of_body()
                await unit.close()

        contenders = [Contender("by hand", by_hand), Contender(OURS, ours)]
        report.results = await effort.measure(contenders, 0.06)
    return report


async def same_without_work(server: Postgres, effort: Effort) -> Report:
    """A session that does nothing, without a framework around it."""
    report = Report("a session that does nothing, the unit alone", "at most 0.60")
    async with _engine(server) as engine:
        maker, db = maker_of(engine), connect_to(engine)

        async def by_hand(count: int) -> None:
            for _ in range(count):
                async with maker() as session, session.begin():
                    await _nothing(session)

        async def ours(count: int) -> None:
            for _ in range(count):
                unit = Unit.enter()
                await _nothing(await db_session(db))
                await unit.head(200)
                await unit.end_of_body()
                await unit.close()

        report.results = await effort.measure([Contender("by hand", by_hand), Contender(OURS, ours)], 0.02)
    return report


async def asked_again(server: Postgres, effort: Effort) -> Report:
    """`db_session()` within a request that has its session."""
    report = Report("db_session() again", "at most 110 ns on the machine of the floor's 97 ns: 1.13")
    async with _engine(server) as engine:
        db = connect_to(engine)
        variable = _variable()

        async def ours(count: int) -> None:
            async with db_context():
                await db_session(db)
                for _ in range(count):
                    await db_session(db)

        async def floor(count: int) -> None:
            variable.set({"db": object()})

            async def session(key: str) -> Any:
                return variable.get()[key]

            for _ in range(count):
                await session("db")

        contenders = [Contender("a variable, a dict, an await", floor), Contender(OURS, ours)]
        if installed("context_async_sqlalchemy"):
            contenders.append(Contender("context-async-sqlalchemy", _seed_again(engine)))
        else:
            report.missing.append("context-async-sqlalchemy")
        report.results = await effort.measure(contenders, 0.02)
    return report


def _variable() -> Any:
    from contextvars import ContextVar

    return ContextVar("sessions")


def _seed_again(engine: AsyncEngine) -> Callable[[int], Awaitable[None]]:
    from context_async_sqlalchemy import DBConnect as SeedConnect
    from context_async_sqlalchemy import close_all_sessions, init_db_session_ctx, reset_db_session_ctx
    from context_async_sqlalchemy import db_session as seed_session

    db = SeedConnect(engine_creator=lambda host: engine, session_maker_creator=maker_of, host="localhost")

    async def run(count: int) -> None:
        token = init_db_session_ctx()
        await seed_session(db)
        for _ in range(count):
            await seed_session(db)
        await close_all_sessions()
        await reset_db_session_ctx(token)

    return run


async def gathered(server: Postgres, effort: Effort) -> Report:
    """Ten units under `gather`, one SELECT each."""
    report = Report("ten run_in_new_ctx under gather", "at most 1.00")
    async with _engine(server, pool_size=10) as engine:
        maker, db = maker_of(engine), connect_to(engine)

        async def one_by_hand() -> None:
            async with maker() as session, session.begin():
                await session.execute(_SELECT)

        async def one() -> None:
            await (await db_session(db)).execute(_SELECT)

        async def by_hand(count: int) -> None:
            for _ in range(count):
                await asyncio.gather(*(one_by_hand() for _ in range(10)))

        async def ours(count: int) -> None:
            for _ in range(count):
                await asyncio.gather(*(run_in_new_ctx(one) for _ in range(10)))

        contenders = [Contender("by hand", by_hand), Contender(OURS, ours)]
        report.results = await effort.measure(contenders, 0.08)
    return report


async def slow_afterwards(server: Postgres, effort: Effort) -> Report:
    """A query of 20 ms, then 50 ms of background work, pool of five, sixty requests at once."""
    report = Report("20 ms of query, 50 ms afterwards, pool of five: time per request", "at most 1 / 0.97 of released by hand")
    sleep = text("SELECT pg_sleep(0.02)")
    async with _engine(server, pool_size=5, max_overflow=0) as engine:
        maker, db = maker_of(engine), connect_to(engine)
        contenders = [Contender("released by hand", _at_once(_by_hand_and_on(maker, sleep)))]
        contenders.append(Contender(OURS, _at_once(_ours_and_on(db, sleep))))
        contenders.append(Contender("Depends(yield)", _at_once(_depends_and_on(maker, sleep))))
        report.results = await effort.measure(contenders, 0.4, rounds=max(3, effort.rounds // 6))
    return report


def _at_once(app: Any, clients: int = 60) -> Callable[[int], Awaitable[None]]:
    request = asgi(app)

    async def run(count: int) -> None:
        left = iter(range(count))

        async def client() -> None:
            for _ in left:
                await request(1)

        await asyncio.gather(*(client() for _ in range(clients)))

    return run


async def _afterwards() -> None:
    await asyncio.sleep(0.05)


def _by_hand_and_on(maker: Any, statement: Any) -> Any:
    from fastapi import BackgroundTasks, FastAPI

    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> str:
        async with maker() as session, session.begin():
            await session.execute(statement)
        tasks.add_task(_afterwards)
        return "ok"

    return app


def _ours_and_on(db: DBConnect[Any], statement: Any) -> Any:
    from context_sqla_fastapi import setup
    from fastapi import BackgroundTasks, FastAPI

    app = FastAPI()
    setup(app)

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> str:
        await (await db_session(db)).execute(statement)
        tasks.add_task(_afterwards)
        return "ok"

    return app


def _depends_and_on(maker: Any, statement: Any) -> Any:
    from typing import Annotated

    from fastapi import BackgroundTasks, Depends, FastAPI

    app = FastAPI()

    async def get_session() -> AsyncIterator[Any]:
        async with maker() as session, session.begin():
            yield session

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks, session: Annotated[Any, Depends(get_session)]) -> str:
        await session.execute(statement)
        tasks.add_task(_afterwards)
        return "ok"

    return app


async def several_connects(server: Postgres, effort: Effort) -> Report:
    """One, two, four, eight connects in one unit, a SELECT on each."""
    report = Report("1, 2, 4, 8 connects in one unit", "linear: at most 2, 4, 8")
    async with _engine(server, pool_size=10) as engine:
        connects = [connect_to(engine) for _ in range(8)]

        def units(number: int) -> Callable[[int], Awaitable[None]]:
            async def run(count: int) -> None:
                for _ in range(count):
                    unit = Unit.enter()
                    for db in connects[:number]:
                        await (await db_session(db)).execute(_SELECT)
                    await unit.head(200)
                    await unit.end_of_body()
                    await unit.close()

            return run

        contenders = [Contender(f"{number}", units(number)) for number in (1, 2, 4, 8)]
        report.results = await effort.measure(contenders, 0.06)
    return report


async def many_at_once(server: Postgres, effort: Effort) -> Report:
    """1, 10, 100, 1000 requests at once, which all wait once: the time of each."""
    report = Report("1, 10, 100, 1000 requests at once, bare and with units: time per request", "flat per request beside bare")
    for number in (1, 10, 100, 1000):
        contenders = [
            Contender(f"{number}, bare", _crowd(number, units=False), number),
            Contender(f"{number}", _crowd(number, units=True), number),
        ]
        report.results += await effort.measure(contenders, 0.03)
    return report


def _crowd(number: int, *, units: bool) -> Callable[[int], Awaitable[None]]:
    async def bare() -> None:
        await asyncio.sleep(0)

    async def in_unit() -> None:
        unit = Unit.enter()
        await asyncio.sleep(0)
        await unit.head(200)
        await unit.end_of_body()
        await unit.close()

    async def run(count: int) -> None:
        for _ in range(count):
            await asyncio.gather(*((in_unit if units else bare)() for _ in range(number)))

    return run


async def steps(server: Postgres, effort: Effort) -> Report:
    """A request without database through a pure ASGI application, with one part of the middleware after the other."""
    report = Report("where the time of a request without database goes, pure ASGI", "each line has what the one before has")
    async with _engine(server) as engine:
        app = asgi_bare(engine, None)
        contenders = [Contender("the application alone", asgi(app))]
        contenders += [Contender(name, asgi(make(app))) for name, make in _STEPS.items()]
        report.results = await effort.measure(contenders, 0.02)
    return report


def _passed_on(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return middleware


def _made_current(app: Any) -> Any:
    variable = _variable()

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        token = variable.set(scope)
        await app(scope, receive, send)
        variable.reset(token)

    return middleware


def _in_unit(app: Any) -> Any:
    enter = Unit.enter

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        unit = enter()
        await app(scope, receive, send)
        unit.close()

    return middleware


def _decided(app: Any) -> Any:
    enter = Unit.enter

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        unit = enter()
        await app(scope, receive, send)
        unit.head(200)
        unit.end_of_body()
        unit.close()

    return middleware


def _wired(app: Any) -> Any:
    from context_sqla_asgi import Wire

    enter = Unit.enter

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        unit = enter()
        wire = Wire(unit, None, receive, send)
        await app(scope, wire.receive, wire.send)
        unit.close()

    return middleware


def _whole(app: Any) -> Any:
    from context_sqla_asgi import setup

    return setup(app)


_STEPS: Mapping[str, Callable[[Any], Any]] = {
    "a call in between": _passed_on,
    "a context variable, set and reset": _made_current,
    "the unit, opened and closed": _in_unit,
    "its two decisions: head, end of body": _decided,
    "by what the application sends": _wired,
    "the middleware: scope, nesting, errors": _whole,
}


async def memory(server: Postgres, effort: Effort) -> Report:
    """The bytes that an open, idle unit holds."""
    report = Report("memory of an open unit", "at most 600 bytes")
    number = 2000
    kept: list[Unit] = []
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        kept.extend(Unit() for _ in range(number))
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    report.facts["bytes for each open unit"] = (after - before - sys.getsizeof(kept)) / number
    return report


async def imports(server: Postgres, effort: Effort) -> Report:
    """The time to import the core, beside SQLAlchemy's own, in fresh interpreters."""
    report = Report("import of the core, beside SQLAlchemy's own", "adds at most 3 ms")
    both = "import gc; gc.disable(); import time, sqlalchemy.ext.asyncio, sqlalchemy.orm; a = time.perf_counter(); import context_sqla; print(time.perf_counter() - a)"
    alone = "import gc; gc.disable(); import time; a = time.perf_counter(); import sqlalchemy.ext.asyncio, sqlalchemy.orm; print(time.perf_counter() - a)"

    times: Mapping[str, list[float]] = {both: [], alone: []}
    with tempfile.TemporaryDirectory() as cache:
        # Compiled, as where it is installed, whatever is set here.
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        for number in range(1 + max(1, effort.rounds // 4)):
            for code, values in times.items():
                done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
                if number:  # the first one compiles
                    values.append(float(done.stdout) * 1e3)
    report.facts["ms added"] = median(times[both])
    report.facts["ms of SQLAlchemy"] = median(times[alone])
    return report


WORKLOADS: Mapping[str, Callable[[Postgres, Effort], Awaitable[Report]]] = {
    **{f"no-db-{name}": (lambda server, effort, name=name: no_db(name, server, effort)) for name in NO_DB},  # type: ignore[misc]
    "steps": steps,
    "query": one_query,
    "empty": empty_session,
    "query-unit": same_without_framework,
    "empty-unit": same_without_work,
    "again": asked_again,
    "gather": gathered,
    "pool": slow_afterwards,
    "connects": several_connects,
    "at-once": many_at_once,
    "memory": memory,
    "import": imports,
}
