"""Every framework has the same tests."""

import re
import subprocess
import sys
from pathlib import Path

from contract.drivers import FRAMEWORKS
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


def test_the_same_tests_are_collected_for_every_framework():
    """Only the names of framework and server differ. Nothing is imported of a framework, so that none has to be there."""
    command = [sys.executable, "-m", "pytest", "integration-tests/contract", "--collect-only", "-q", "--no-header"]
    collected = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tests = {name: set() for name in FRAMEWORKS}
    for line in collected.splitlines():
        if stack := IN_AN_ID.search(line):  # a test without a framework is in every framework's run
            name, place = STACKS[stack[1]]
            tests[name].add(f"{line[: stack.start()]}{place}{line[stack.end() :]}")
    first, *others = tests

    assert len(tests[first]) > 1000
    assert {name: tests[first] ^ tests[name] for name in others} == {name: set() for name in others}
