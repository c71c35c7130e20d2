"""Every framework has the same tests."""

import re
import subprocess
import sys
from pathlib import Path

from contract.drivers import FRAMEWORKS
from contract.processes import WITHIN_THE_TEST, WORKERS
from support.databases import DRIVERS
from support.stacks import Stack

ROOT = Path(__file__).parents[3]
# The name of each stack, with its framework and with what is the same in all: the place of the server, and the driver.
STACKS = {
    str(Stack(name, server, driver)): (name, f"server {place}, {driver}")
    for name, row in FRAMEWORKS.items()
    for place, server in enumerate(row.servers)
    for driver in DRIVERS
}
IN_AN_ID = re.compile(rf"(?<=[\[-])({'|'.join(sorted(map(re.escape, STACKS), key=len, reverse=True))})(?=[\]-])")


def _collected(*options):
    command = [sys.executable, "-m", "pytest", "integration-tests/contract", "--collect-only", "-q", "--no-header", *options]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [line for line in output.splitlines() if "::" in line]


def test_the_same_tests_are_collected_for_every_framework():
    """Only the names of framework and server differ. Nothing is imported of a framework, so that none has to be there."""
    tests = {name: set() for name in FRAMEWORKS}
    for line in _collected():
        if stack := IN_AN_ID.search(line):  # a test without a framework is in every framework's run
            name, place = STACKS[stack[1]]
            tests[name].add(f"{line[: stack.start()]}{place}{line[stack.end() :]}")
    first, *others = tests

    assert len(tests[first]) > 1000
    assert {name: tests[first] ^ tests[name] for name in others} == {name: set() for name in others}


def test_all_that_is_collected_for_one_process_is_for_several():
    """The run on a server with several processes leaves out no test; those of one process are named as they are."""
    runs = {server: _collected("--framework=sanic", f"--server={server}") for server in ("sanic", "sanic-workers")}
    tests = {server: {re.sub(r"sanic-sanic(-workers)?", "", line) for line in lines} for server, lines in runs.items()}
    names = {(Path(line.partition("::")[0]).stem, line.partition("::")[2].partition("[")[0]) for line in runs["sanic"]}
    inside = [line for line in runs["sanic-workers"] if "sanic-sanic-workers" not in line]

    assert tests["sanic"] == tests["sanic-workers"]
    assert {tuple(test.split("::")) for test in WITHIN_THE_TEST | set(WORKERS)} <= names
    assert 0 < len(inside) < len(tests["sanic"]) / 10
