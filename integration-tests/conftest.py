"""Options, stacks and fixtures of every test that needs a real database or a real server."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from context_sqla import DBConnect
from contract.drivers import FRAMEWORKS, Framework
from support.bench import Bench, bench
from support.databases import DRIVERS, Database
from support.ledger import Ledger
from support.postgres import PASSWORD, Postgres
from support.results import Recorder, complaints, promise_of, table
from support.stacks import Selection, Stack, choose

_SERVERS = sorted({server for framework in FRAMEWORKS.values() for server in framework.servers})
_MARKERS = (
    "wire: what the test shows depends on the server, so that it runs on each of them",
    "postgresql: the test needs what only PostgreSQL has",
    "sqlite: the test is about SQLite",
    "loops(*names): event loops to run on, of asyncio and uvloop",
)
_numbers = pytest.StashKey[dict[str, int]]()
_recorder = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stacks", "frameworks, servers and databases to test on")
    group.addoption("--framework", action="append", choices=sorted(FRAMEWORKS), help="repeatable; default: all")
    group.addoption("--server", action="append", choices=_SERVERS, help="repeatable; default: the first, the others pairwise")
    group.addoption("--database", action="append", choices=sorted(DRIVERS), help="repeatable; default: asyncpg, others pairwise")
    group.addoption("--full", action="store_true", help="every server with every database, for every test")
    group.addoption("--support-table", action="store_true", help="print how many tests of each promise passed on each stack")
    group.addoption("--support-results", type=Path, metavar="FILE", help="write the same as JSON, for nox -s results")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_numbers] = {}
    config.stash[_recorder] = Recorder(full=config.getoption("full"))
    config.pluginmanager.register(_Listener(config.stash[_recorder]), "support-results")
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    for name in config.getoption("framework") or ():
        try:
            FRAMEWORKS[name].driver()
        except ImportError as exc:
            raise pytest.UsageError(f"--framework={name}: {exc}") from exc


def pytest_report_header(config: pytest.Config) -> str:
    asked = {name: config.getoption(name) or "all" for name in ("framework", "server", "database")}
    return "stacks: " + ", ".join(f"{name} {value}" for name, value in asked.items()) + f", full {config.getoption('full')}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stack" not in metafunc.fixturenames:
        return
    stacks = list(_stacks(metafunc))
    metafunc.parametrize("stack", stacks, ids=[str(stack) for stack in stacks])


def _stacks(metafunc: pytest.Metafunc) -> Iterator[Stack]:
    config, definition = metafunc.config, metafunc.definition
    numbers = config.stash[_numbers]
    number = numbers[metafunc.module.__name__] = numbers.get(metafunc.module.__name__, -1) + 1
    only = {name for name in ("postgresql", "sqlite") if definition.get_closest_marker(name)} or set(DRIVERS.values())
    databases = [driver for driver, dialect in DRIVERS.items() if dialect in only]
    wire = definition.get_closest_marker("wire") is not None
    selection = Selection(config.getoption("server"), config.getoption("database"), config.getoption("full"))
    serves = "serve" in metafunc.fixturenames or "framework" in metafunc.fixturenames
    names = (config.getoption("framework") or list(FRAMEWORKS)) if serves else [""]
    counts = set()
    for name in names:
        servers = FRAMEWORKS[name].servers if name else [""]
        pairs = choose(servers, databases, number=number, wire=wire, selection=selection)
        counts.add(len(pairs))
        yield from (Stack(name, server, database) for server, database in pairs)
    if len(counts) > 1:
        raise pytest.UsageError(f"{definition.nodeid}: the frameworks do not collect the same number of tests")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say in the report of a test, which comes from another process with xdist, what it is about."""
    if not isinstance(item, pytest.Function):
        return
    stack = item.callspec.params.get("stack") if hasattr(item, "callspec") else None
    if stack is not None and (promise := promise_of(item.path, item.function.__doc__)):
        item.user_properties.append(("support", (promise, stack.framework, stack.server, stack.database)))


class _Listener:
    """Takes the reports; a plugin of its own, because this hook has no other way to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._recorder.record(report.nodeid, report.user_properties, report.outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    result = config.stash[_recorder].result()
    if (path := config.getoption("support_results")) is not None:
        result.write(path)
        terminalreporter.write_line(f"what was seen: {path}")
    if config.getoption("support_table"):
        terminalreporter.section("support")
        for line in [*table([result]).splitlines(), *complaints([result])]:
            terminalreporter.write_line(line)


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    marker = item.get_closest_marker("loops")
    return {name: _loop_factory(name) for name in (marker.args if marker else ("asyncio",))}


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.SelectorEventLoop
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


@pytest.fixture(name="postgres", scope="session")
def _postgres() -> Iterator[Postgres]:
    """The PostgreSQL server of the session; a test leaves it running."""
    with Postgres() as server:
        yield server


@pytest.fixture(name="spare_postgres_of_the_session", scope="session")
def _spare_postgres_of_the_session() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(name="spare_postgres")
def _spare_postgres(spare_postgres_of_the_session: Postgres) -> Postgres:
    """A second server, with the same databases, that a test may stop, kill and switch to."""
    spare_postgres_of_the_session.start()
    return spare_postgres_of_the_session


@pytest.fixture(name="framework")
def _framework(stack: Stack) -> Framework:
    """The framework's row: what it lacks on this server, and why."""
    return FRAMEWORKS[stack.framework].on(stack.server)


@pytest.fixture(name="bench")
async def _bench(
    stack: Stack, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Bench]:
    """What the other fixtures are views of; its end is the proof that the test has left nothing behind."""
    place = request.getfixturevalue("postgres") if stack.dialect == "postgresql" else tmp_path
    async with bench(stack, place) as work:
        yield work
    logged = "\n".join(map(logging.Formatter().format, caplog.get_records("call")))
    assert PASSWORD not in logged, "the password of the database was logged (P20)"


@pytest.fixture(name="serve")
def _serve(bench: Bench, framework: Framework) -> Callable[..., Any]:
    """``await serve(*routes, **application)`` mounts and serves; the client comes back."""
    return bench.serve


@pytest.fixture(name="build")
def _build(bench: Bench, framework: Framework) -> Callable[..., Any]:
    """``build(*routes, **application)`` is ``serve`` without serving: the framework's application, for its test client."""
    return bench.build


@pytest.fixture(name="connect")
def _connect(bench: Bench) -> Callable[..., Any]:
    """``await connect(name, database=..., **options)`` makes one more connect."""
    return bench.connect


@pytest.fixture(name="database")
async def _database(bench: Bench) -> Database:
    """The first database, with empty tables."""
    return await bench.databases.database("first")


@pytest.fixture(name="other_database")
async def _other_database(bench: Bench) -> Database:
    """A second database, on the same server."""
    return await bench.databases.database("second")


@pytest.fixture(name="spare_database")
async def _spare_database(bench: Bench, spare_postgres: Postgres) -> Database:
    """The first database of the second server."""
    return await bench.databases.database("first", server=spare_postgres)


@pytest.fixture(name="db")
async def _db(bench: Bench, database: Database) -> DBConnect[Any]:
    """A connect to the first database, with five connections."""
    return await bench.connect("db", database=database)


@pytest.fixture(name="other")
async def _other(bench: Bench, other_database: Database) -> DBConnect[Any]:
    """A connect to the second database."""
    return await bench.connect("other", database=other_database)


@pytest.fixture(name="ledger")
def _ledger(database: Database) -> Ledger:
    """The observer of the first database."""
    return database.ledger


@pytest.fixture(name="other_ledger")
def _other_ledger(other_database: Database) -> Ledger:
    """The observer of the second database."""
    return other_database.ledger
