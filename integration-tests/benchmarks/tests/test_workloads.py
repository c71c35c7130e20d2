"""Every benchmark runs, once and for a moment, without the libraries that it compares with."""

import json

import pytest
from support.postgres import Postgres

from benchmarks.__main__ import machine, show
from benchmarks.pages import page, plot
from benchmarks.rounds import Contender, Spread, measure
from benchmarks.workloads import WORKLOADS, Effort, Report


@pytest.fixture(scope="module", name="server")
def _server():
    with Postgres() as server:
        yield server


@pytest.mark.parametrize("name", WORKLOADS)
async def test_a_workload_runs(server, name, capsys):
    """It finishes, and says something about each contender."""
    report = await WORKLOADS[name](server, Effort(rounds=3, scale=0.001))
    show(report, None)

    assert report.results or report.facts
    assert report.title in capsys.readouterr().out


async def test_contenders_take_turns():
    """In each round another one begins, and all do the same number of rounds."""
    ran = []

    async def first(count):
        ran.append("first")

    async def second(count):
        ran.append("second")

    results = await measure([Contender("first", first), Contender("second", second)], rounds=4, seconds=0)

    assert [result.name for result in results] == ["first", "second"]
    assert results[0].ratio == Spread(1, 1, 1)
    assert ran[-8:] == ["first", "second", "second", "first"] * 2


def test_the_page_says_where_others_are_faster():
    """A table and a plot of each report, with the date and the machine, and no word that is not in the figures."""
    spread = {"low": 0.9, "middle": 1.0, "high": 1.1}
    faster = {"low": 0.4, "middle": 0.5, "high": 0.6}
    results = [
        {"name": "bare", "each": spread, "ratio": spread, "added": spread},
        {"name": "context-sqla", "each": spread, "ratio": spread, "added": spread},
        {"name": "another", "each": faster, "ratio": faster, "added": faster},
    ]
    report = {"title": "a request", "goal": "at most 1.0", "results": results, "missing": [], "facts": {}, "unit": "us"}
    data = {"machine": machine(), "reports": {"one": report}, "counts": {}}

    text = page(json.loads(json.dumps(data)))

    assert "another" in text
    assert "faster here: another" in text
    assert machine()["date"] in text
    assert "<title>a request" in plot(report)
    assert "prefers-color-scheme: dark" in plot(report)


def test_a_report_is_named_by_its_workload():
    """Nobody has to guess what `nox -s bench -- NAME` runs."""
    assert isinstance(Report("a", "b").results, list)
    assert all(name == name.lower() and " " not in name for name in WORKLOADS)
