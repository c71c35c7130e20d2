"""What a run has shown is counted by promise, and several runs make one table."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import results
from support.results import Recorder, Result, by_server, complaints, promise_of, table

ASKED = ("P3", "quart", "hypercorn", "asyncpg")


def run(framework="quart", version="0.23.1", *, full=False, **counted):
    """One run, of one stack."""
    numbers = {"passed": 0, "skipped": 0, "failed": 0, **counted}
    count = {"promise": "P3", "framework": framework, "server": "uvicorn", "database": "asyncpg", **numbers}
    return Result(full, {"python": "3.12.1", "sqlalchemy": "2.1.9", framework: version, "uvicorn": "0.54.0"}, [count])


@pytest.mark.parametrize(
    ("name", "docstring", "promise"),
    [
        ("test_p03_policy.py", "A redirect commits (P3).", "P3"),
        ("test_p04_commit_before_head.py", "The application's handler answers (P4b).", "P4b"),
        ("test_p04_commit_before_head.py", "As P7 has it, nothing is swallowed (P4a, P4).", "P4a"),
        ("test_p20_secrets.py", None, "P20"),
        ("test_p00_driver.py", "A body arrives.", "suite"),
        ("test_bench.py", "Nothing is left (P10).", None),
    ],
)
def test_a_test_counts_for_its_files_promise_or_a_part_of_it(name, docstring, promise):
    """The docstring chooses among the parts of the file's promise, nothing else."""
    assert promise_of(Path(name), docstring) == promise


@pytest.mark.parametrize(
    ("phases", "outcome"),
    [
        (["passed", "passed", "passed"], "passed"),
        (["passed", "failed", "passed"], "failed"),
        (["passed", "passed", "failed"], "failed"),
        (["skipped", "passed"], "skipped"),
    ],
)
def test_a_test_is_as_good_as_its_worst_phase(phases, outcome):
    """What is left behind is found in the teardown: it fails the test."""
    recorder = Recorder(full=False)
    for phase in phases:
        recorder.record("test_p03_policy.py::test", [("support", list(ASKED))], phase)
    (count,) = recorder.result().counts

    assert (*(count[key] for key in ("promise", "framework", "server", "database")),) == ASKED
    assert {one: count[one] for one in results.OUTCOMES} == {one: int(one == outcome) for one in results.OUTCOMES}


def test_reports_of_other_tests_are_not_counted():
    """A test without a stack is no proof of a promise."""
    recorder = Recorder(full=False)
    recorder.record("test_bench.py::test", [], "passed")

    assert recorder.result().counts == []


def test_the_table_has_the_versions_and_what_did_not_pass():
    """A row for each stack, a column for each promise."""
    header, _, newest, lowest = table([run(passed=7), run(version="0.18.4", passed=5, failed=2)]).splitlines()

    assert [one.strip() for one in header.split("|")[-2:-1]] == ["P3"]
    assert "quart 0.23.1" in newest
    assert "uvicorn 0.54.0" in newest
    assert [one.strip() for one in newest.split("|")[6:9]] == ["7", "0", "7"]
    assert [one.strip() for one in lowest.split("|")[6:9]] == ["5", "2", "5/7"]


def test_drivers_can_be_put_together():
    """Of a server there is one row, with all that ran on it."""
    counts = [{**run(passed=7).counts[0], "database": driver} for driver in ("asyncpg", "psycopg")]
    other = {**counts[0], "server": "hypercorn", "failed": 1}
    together = by_server(replace(run(), counts=[*counts, other]))

    assert [(count["server"], count["database"], count["passed"], count["failed"]) for count in together.counts] == [
        ("uvicorn", "all", 14, 0),
        ("hypercorn", "all", 7, 1),
    ]


def test_a_server_that_its_framework_brings_has_the_frameworks_version():
    """aiohttp-test is aiohttp."""
    result = Result(full=False, versions={"python": "3.12.1", "aiohttp": "3.14.5"})

    assert result.version("aiohttp-test") == "aiohttp-test 3.14.5"
    assert result.version("asgi") == "asgi"


def test_runs_of_the_same_kind_have_the_same_number_of_tests():
    """A framework on which fewer tests ran is no proof; a full run has more than others, of all frameworks."""
    assert complaints([run(passed=7), run("sanic", passed=7), run("", passed=3), run(full=True, passed=20)]) == []
    assert complaints([run(passed=7), run("sanic", passed=6)]) == [
        "the frameworks did not run the same number of tests: quart 0.23.1 (Python 3.12.1) 7, sanic 0.23.1 (Python 3.12.1) 6"
    ]


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_what_did_not_pass_is_complained_about(outcome):
    """Nothing of the contract is skipped."""
    assert complaints([run(passed=7, **{outcome: 1})]) == ["quart 0.23.1 (Python 3.12.1): 1 tests did not pass"]


def test_files_are_joined_where_nothing_is_installed(tmp_path):
    """The summary of a run elsewhere needs a Python and the files."""
    for number, result in enumerate([run(passed=7), run("sanic", passed=7)]):
        result.write(tmp_path / f"{number}.json")
    files = sorted(map(str, tmp_path.glob("*.json")))
    printed = subprocess.run([sys.executable, "-I", "-S", results.__file__, *files], check=True, capture_output=True, text=True)

    assert printed.stdout.rstrip() == table(list(map(Result.read, map(Path, files))))


def test_a_run_writes_what_its_workers_saw(tmp_path):
    """Also with xdist, whose workers send only reports."""
    root = Path(__file__).parents[3]
    file = tmp_path / "new" / "seen.json"
    chosen = ["integration-tests/contract/test_p03_policy.py", "--numprocesses=1", f"--support-results={file}", "--support-table"]
    chosen += ["--framework=asgi", "--database=aiosqlite", "-k", "test_returned_redirect_commits"]
    ended = subprocess.run([sys.executable, "-m", "pytest", *chosen], cwd=root, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (count,) = json.loads(file.read_text(encoding="utf-8"))["counts"]

    assert table([Result.read(file)]).splitlines()[-1] in ended.stdout
    assert (count["framework"], count["server"], count["database"]) == ("asgi", "uvicorn", "aiosqlite")
    assert (count["promise"], count["passed"]) == ("P3", 1)
