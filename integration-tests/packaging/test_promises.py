"""The contract and its tests name each other: no promise without a file, no test without a promise."""

import ast
import re
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parents[1] / "contract"
PROMISES = range(1, 21)
BEFORE_THE_PROMISES = "test_p00_driver.py"  # tests the drivers, so that the other files test the adapters
FILES = sorted(path for path in CONTRACT.rglob("test_*.py") if path.name != BEFORE_THE_PROMISES)


@pytest.mark.parametrize("number", PROMISES)
def test_every_promise_has_exactly_one_file(number):
    """Who asks how a promise is kept finds one file."""
    assert len(list(CONTRACT.glob(f"test_p{number:02}_*.py"))) == 1


def test_every_file_of_the_contract_is_a_promise():
    """A test file for no promise belongs elsewhere."""
    assert [path.name for path in FILES if not re.match(r"test_p(0[1-9]|1[0-9]|20)_", path.name)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_test_names_its_promise(path):
    """Each test's docstring is a sentence of the promise, with its number."""
    tests = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]

    assert tests
    assert [test.name for test in tests if not re.search(r"\bP(20|1[0-9]|[1-9])[ab]?\b", ast.get_docstring(test) or "")] == []
