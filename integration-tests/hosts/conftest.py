"""The acceptance table: every test puts its figures into it, beside the limit that they are held against."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.postgres import find

from . import programs
from .cluster import Node, cluster
from .load import TABLE

_rows = pytest.StashKey[list[tuple[str, str, str]]]()
_missing = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.stash[_missing] = programs.missing()
    config.addinivalue_line("markers", "needs(*programs): runs where these are; where they are not, with CI=true, it fails")
    config.addinivalue_line(
        "markers", "long: takes many seconds, and a shorter test shows most of it; `-m 'not long'` leaves it out"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = {name for mark in item.iter_markers("needs") for name in mark.args}
    lacking = [f"{name} is missing: {how}" for name, how in item.config.stash[_missing].items() if name in wanted]
    if lacking:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("; ".join(lacking))


@pytest.fixture(name="figure")
def _figure(request: pytest.FixtureRequest) -> Callable[[str, Any, Any], None]:
    """Note a measured figure: what, how much, and the limit."""
    rows = request.config.stash[_rows]

    def figure(what: str, measured: Any, limit: Any = "") -> None:
        rows.append((what, f"{measured:.3g}" if isinstance(measured, float) else str(measured), str(limit)))

    return figure


@pytest.fixture(name="nodes")
async def _nodes() -> AsyncIterator[list[Node]]:
    """A primary and two streaming replicas, with the table for the load: for tests that change their roles."""
    async with _with_table() as nodes:
        yield nodes


@pytest.fixture(name="shared", scope="session")
def _shared() -> Iterator[list[Node]]:
    with asyncio.Runner() as runner:
        whole = _with_table()
        nodes = runner.run(whole.__aenter__())
        yield nodes
        runner.run(whole.__aexit__(None, None, None))


@pytest.fixture(name="calm")
async def _calm(shared: list[Node]) -> AsyncIterator[list[Node]]:
    """The same, shared by all tests that change settings at most."""
    yield shared
    primary, *replicas = shared
    for node in replicas:
        await node.execute(
            "ALTER SYSTEM RESET recovery_min_apply_delay", "SELECT pg_reload_conf()", "SELECT pg_wal_replay_resume()"
        )
    await primary.execute("ALTER SYSTEM RESET synchronous_commit", "SELECT pg_reload_conf()", "TRUNCATE item")
    await primary.caught_up(*replicas)


@asynccontextmanager
async def _with_table() -> AsyncIterator[list[Node]]:
    async with cluster(replicas=2) as nodes:
        await nodes[0].execute(TABLE)
        await nodes[0].caught_up(*nodes[1:])
        yield nodes


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    if missing := config.stash[_missing]:
        terminalreporter.section("some parts cannot run here")
        for name, how in missing.items():
            terminalreporter.write_line(f"{name} is missing: {how}")
    if rows:
        width, figures = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
        terminalreporter.section(f"acceptance on PostgreSQL {find().version}")
        for what, measured, limit in rows:
            terminalreporter.write_line(f"{what:<{width}}  {measured:>{figures}}  {limit}")
