"""The rounds of the test command: on which frameworks, and the table at the end."""

from collections.abc import Callable
from typing import Any

import pytest
from contract.drivers import FRAMEWORKS

from .report import Result, table

_results = pytest.StashKey[list[Result]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "adapter" in metafunc.fixturenames:
        metafunc.parametrize("adapter", metafunc.config.getoption("framework") or list(FRAMEWORKS))


@pytest.fixture(name="report")
def _report(request: pytest.FixtureRequest) -> Callable[[Result], None]:
    """Put a run into the table."""
    return request.config.stash[_results].append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if results := config.stash[_results]:
        terminalreporter.section("what clients saw, held against the rows")
        for line in table(results).splitlines():
            terminalreporter.write_line(line)
