"""The plugin: options, markers and fixtures. `pytest --fixtures` and `pytest --markers` show what there is."""

import importlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from typing import Any

import pytest
from context_sqla import DBConnect
from sqlalchemy.ext.asyncio import AsyncSession

from . import _hookspecs
from ._databases import VARIABLE, Databases, create_all, run_apart
from ._modes import Connects, Mode, Sessions, Stage
from ._tests import Asked, asked_by, is_sync, loop_scope, play

_MARKER = (
    "context_sqla(mode='shared', leak_check=None): run the test in one transaction with the application, which is rolled back "
    "('shared'), with real commits whose tables are emptied afterwards ('real'), or as if the plugin were not there ('off'); "
    "leak_check=False lets it leave connections open."
)
_PYTEST_ASYNCIO = (0, 25)  # the first one whose tests see the context variables of their fixtures
_databases = pytest.StashKey[Databases]()
_stage = pytest.StashKey[Stage]()
_clean_up = pytest.StashKey[ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, which are documented in docs/reference/pytest.md."""
    group = parser.getgroup("context-sqla", "context-sqla: databases for tests")
    group.addoption(
        "--context-sqla-url",
        metavar="URL",
        help=f"database for the tests, such as postgresql+asyncpg://user:password@host/test; default: ${VARIABLE}, else an "
        "embedded PostgreSQL (pip install 'context-sqla-pytest[postgres]')",
    )
    parser.addini("context_sqla_connects", "the application's DBConnects: 'package.module:name', one a line", "linelist")
    parser.addini("context_sqla_mode", "mode of tests without a marker: shared, real or off; default: off")
    parser.addini("context_sqla_url_env", "environment variable that is set to the tests' database before anything is imported")
    parser.addini("context_sqla_metadata", "'package.module:name' of the MetaData, or declarative base, whose tables are made")
    parser.addini("context_sqla_keep_tables", "tables that real commits leave as they are, one a line", "linelist")
    parser.addini("context_sqla_leak_check", "fail tests that leave connections or transactions open", "bool", True)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Let conftest files implement the hooks."""
    pluginmanager.add_hookspecs(_hookspecs)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Set the environment variable before a conftest can import the application."""
    stack = early_config.stash.setdefault(_clean_up, ExitStack())
    options = early_config.known_args_namespace
    databases = Databases(getattr(options, "context_sqla_url", None) or os.environ.get(VARIABLE))
    early_config.stash[_databases] = databases
    stack.callback(databases.end)
    variable = early_config.getini("context_sqla_url_env")
    if variable:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv(variable, databases.url().render_as_string(hide_password=False))


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and the fixtures of the event loop's plugin that is there."""
    config.addinivalue_line("markers", _MARKER)
    stack = config.stash.setdefault(_clean_up, ExitStack())
    config.add_cleanup(stack.close)
    stage = Stage(kept=config.getini("context_sqla_keep_tables"), leak_check=config.getini("context_sqla_leak_check"))
    config.stash[_stage] = stage
    _default_mode(config)  # a wrong one is told here
    if config.pluginmanager.has_plugin("asyncio"):
        found = metadata.version("pytest-asyncio")
        if tuple(map(int, found.split(".")[:2])) < _PYTEST_ASYNCIO:
            raise pytest.UsageError(f"context-sqla needs pytest-asyncio 0.25 or newer, this is {found}")
        from . import _asyncio

        config.pluginmanager.register(_asyncio, "context_sqla_asyncio")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove what was made for this process: every fixture is over, and a worker that takes longer from here on may be killed."""
    session.config.stash[_databases].end()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Remove, in the process that started the workers, what one that was killed has left."""
    Databases.sweep(node.workerinput["testrunuid"])


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say where the tests' database comes from."""
    if config.getini("context_sqla_url_env") or config.getoption("context_sqla_url"):
        return f"context-sqla: {config.stash[_databases].kind}"
    return None


@pytest.hookimpl(trylast=True)
def pytest_context_sqla_create_schema(config: pytest.Config, url: str) -> object:
    """Make the tables of `context_sqla_metadata`."""
    name = config.getini("context_sqla_metadata")
    if name:
        found = _load(name, "context_sqla_metadata")
        run_apart(lambda: create_all(url, getattr(found, "metadata", found)))
    return True


@pytest.fixture(scope="session")
def context_sqla_url(pytestconfig: pytest.Config) -> str:
    """Return the URL of the tests' database, with its tables; each worker of pytest-xdist has its own.

    It is that of `--context-sqla-url` or `$CONTEXT_SQLA_URL`, else of an embedded PostgreSQL, which is started now and gone at
    the end.
    """
    databases = pytestconfig.stash[_databases]
    databases.prepare(lambda url: pytestconfig.hook.pytest_context_sqla_create_schema(config=pytestconfig, url=url))
    return databases.url().render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def context_sqla_connects(pytestconfig: pytest.Config) -> Connects:
    """Return the application's connects: those of the ini option `context_sqla_connects`; override it to make your own."""
    names = pytestconfig.getini("context_sqla_connects")
    if not names:
        raise pytest.UsageError(
            "context-sqla: name the application's DBConnect in the ini option context_sqla_connects ('package.module:name'), or "
            "in a session fixture of this name that returns a list of them"
        )
    connects = [_load(name, "context_sqla_connects") for name in names]
    for name, connect in zip(names, connects, strict=True):
        if not isinstance(connect, DBConnect):
            raise pytest.UsageError(f"context-sqla: {name} in context_sqla_connects is no DBConnect but {type(connect).__name__}")
    return connects


@pytest.fixture
def context_sqla_session(context_sqla_sessions: Sessions) -> AsyncSession:
    """Give the test's session of the (first) connect: it sees what the application has committed, and the other way round.

    In the shared transaction it is also what `db_session` gives the test. With real commits it is one of its own: commit what
    the application is to see.
    """
    return next(iter(context_sqla_sessions.values()))


@pytest.fixture
def context_sqla_sessions(_context_sqla_played: Sessions) -> Sessions:
    """Give the test's sessions of several connects: `context_sqla_sessions[db]`."""
    return _context_sqla_played


@pytest.fixture
def _context_sqla_asked(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Asked | None:
    return asked_by(request, pytestconfig.stash[_stage], _default_mode(pytestconfig))


# Before every other fixture of the test: what those write belongs to its transaction.
@pytest.fixture(autouse=True)
def _context_sqla_played(request: pytest.FixtureRequest, _context_sqla_asked: Asked | None) -> Iterator[Any]:
    if _context_sqla_asked is None:
        yield {}
        return
    if request.config.getini("context_sqla_url_env"):
        request.getfixturevalue("context_sqla_url")
    request.getfixturevalue("_context_sqla_watching")
    connects: Sequence[DBConnect[Any]] = request.getfixturevalue("context_sqla_connects")
    if is_sync(request.node):
        _context_sqla_asked.stage.begin()
        yield {}
        run_apart(lambda: _context_sqla_asked.stage.after_sync(connects, leak_check=_context_sqla_asked.leak_check))
    else:
        yield request.getfixturevalue(_fixture_for(request))


@pytest.fixture(scope="session")
def _context_sqla_watching(pytestconfig: pytest.Config) -> Iterator[None]:
    stage = pytestconfig.stash[_stage]
    with stage.leaks.watching(), stage.writes.watching():
        yield


@pytest.fixture
async def _context_sqla_anyio(_context_sqla_asked: Asked, context_sqla_connects: Connects) -> AsyncIterator[Sessions]:
    async with play(_context_sqla_asked, context_sqla_connects) as sessions:
        yield sessions


def _fixture_for(request: pytest.FixtureRequest) -> str:
    """Return the fixture that runs in the event loop of the test."""
    if "anyio_backend" in request.fixturenames:
        return "_context_sqla_anyio"
    if request.config.pluginmanager.has_plugin("context_sqla_asyncio"):
        from ._asyncio import runs

        if runs(request.node):
            return f"_context_sqla_asyncio_{loop_scope(request.node)}"
    pytest.fail(
        "context-sqla: nothing runs this asynchronous test: mark it @pytest.mark.asyncio (pytest-asyncio) or @pytest.mark.anyio",
        pytrace=False,
    )


def _default_mode(config: pytest.Config) -> Mode | None:
    name = config.getini("context_sqla_mode")
    try:
        return Mode(name) if name else None
    except ValueError:
        raise pytest.UsageError(f"context_sqla_mode is shared, real or off, not {name!r}") from None


def _load(name: str, option: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as exc:
        raise pytest.UsageError(f"context-sqla: {name!r} in {option} is not 'package.module:name' of something: {exc}") from exc
