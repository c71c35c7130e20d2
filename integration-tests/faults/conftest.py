"""The rounds of the test command: on which frameworks, and the table at the end."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from contract.drivers import FRAMEWORKS

from .report import Result, table

_PROPERTY = "faults"
_results: list[Result] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather what the tests have reported, wherever they ran: properties of a test travel from a worker of xdist."""
    if report.when == "call":
        sent = [str(value) for name, value in report.user_properties if name == _PROPERTY]
        _results.extend(pickle.loads(bytes.fromhex(one)) for one in sent)  # noqa: S301  # by ourselves


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "adapter" in metafunc.fixturenames:
        metafunc.parametrize("adapter", metafunc.config.getoption("framework") or list(FRAMEWORKS))


@pytest.fixture(name="report")
def _report(request: pytest.FixtureRequest) -> Callable[[Result], None]:
    """Put a run into the table."""
    return lambda result: request.node.user_properties.append((_PROPERTY, pickle.dumps(result).hex()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _results:
        terminalreporter.section("what clients saw, held against the rows")
        for line in table(_results).splitlines():
            terminalreporter.write_line(line)
