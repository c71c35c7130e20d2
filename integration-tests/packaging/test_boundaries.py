"""How large a package may be, and that every package is known to every gate. The imports themselves are import-linter's."""

import ast
import io
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml"))
CORE = "context-sqla"
NO_ADAPTERS = {CORE, "context-sqla-hosts", "context-sqla-pytest"}

# Raised from 1,500: statements in flight (P7a), two phases (P9), savepoints of tests as a stack (P12), hosts (P13) and event loops
# (P15) take about 180 lines each, and none of them can be left to an adapter. Then by 60 for what tests of applications need of it:
# deferred constraints, sessions outside of units, captured callbacks. Then by 40, so that a request without session costs nothing:
# each of the three calls of its end has an answer at once beside the coroutine. Then by 10 for the checks of what hostile callers
# hand over. Then by 90, so that a request with a session makes 230 calls less: its statements are noted at the dialect, its commit
# is waited for by hand, and what has nothing to do is asked before it is awaited. Then by 230, so that a commit needs neither a task
# nor a timer: a cancellation hands it over, one timer serves all limits, and a session with nothing else to do goes straight to it.
# Then by 30: a cancellation tells of what was committed before it, and a request knows its own task without a closure. Then by 45: a
# body that goes on when its client has left is told from background work, and has, as one that runs ahead, its own ends by hand, in
# the transaction of a test too.
CORE_BUDGET = 3_125
CORE_MODULE_BUDGET = 300
# It watches, chooses, follows engines, carries positions, and answers over HTTP: a sidecar is a third of it. Raised from 3,200 by the
# second opinion from Patroni, what keeps SQLAlchemy out of the sidecar, and the choice of a replica below a microsecond.
HOSTS = "context-sqla-hosts"
HOSTS_BUDGET = 3_400
HOSTS_MODULE_BUDGET = 330
ADAPTER_BUDGET = 150
# In asgi each request passes through what was one function, and is written out; and it knows of bodies that begin before their head.
# In starlette a unit has two parts or one, and requests that are too large.
LARGER_ADAPTER_BUDGETS = {
    "context-sqla-aiohttp": 200,
    "context-sqla-asgi": 235,
    "context-sqla-sanic": 200,
    "context-sqla-starlette": 165,
}

PLACES_OF_AN_ADAPTER = (
    "docs/how-to/{}.md",
    "examples/{}/app.py",
    "examples/{}/test_app.py",
    "integration-tests/contract/drivers/{}.py",
)

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def test_code_lines_are_what_is_left_without_prose_and_overloads():
    """A code line is not blank, comment, docstring or overload."""
    source = '''"""Docstring
of two lines."""

from typing import overload
# a comment

LIMIT = 3  # counts
"""An attribute's docstring."""

@overload
def twice(x: int) -> int: ...
@overload
def twice(x: str) -> str: ...
def twice(x):
    """Docstring."""
    return (
        x
        + x
    )
'''

    assert code_lines(source) == 7


@pytest.mark.parametrize("package", sorted(set(PACKAGES) - NO_ADAPTERS))
def test_an_adapter_stays_thin(package):
    """An adapter that grows has taken over a decision of the core."""
    lines = sum(map(lines_of, modules(package)))

    assert lines <= LARGER_ADAPTER_BUDGETS.get(package, ADAPTER_BUDGET)


@pytest.mark.parametrize(
    "module", [pytest.param(path, id=path.name) for path in (ROOT / "packages" / CORE / "src").rglob("*.py")]
)
def test_a_module_of_the_core_stays_readable(module):
    """A module of the core is read in one sitting."""
    assert lines_of(module) <= CORE_MODULE_BUDGET


def test_the_core_stays_small():
    """The whole core is read in a day."""
    assert sum(map(lines_of, modules(CORE))) < CORE_BUDGET


@pytest.mark.parametrize(
    "module", [pytest.param(path, id=path.name) for path in (ROOT / "packages" / HOSTS / "src").rglob("*.py")]
)
def test_a_module_of_hosts_stays_readable(module):
    """A module of context-sqla-hosts is read in one sitting."""
    assert lines_of(module) <= HOSTS_MODULE_BUDGET


def test_hosts_stays_small():
    """What decides where writes go is read as a whole."""
    assert sum(map(lines_of, modules(HOSTS))) < HOSTS_BUDGET


def test_every_folder_of_packages_is_a_distribution_of_the_workspace():
    """A folder without a pyproject would be checked by nothing."""
    folders = sorted(path.name for path in (ROOT / "packages").glob("context-sqla*"))

    assert folders == PACKAGES
    assert sorted(settings()["uv"]["sources"]) == PACKAGES


@pytest.mark.parametrize("place", PLACES_OF_AN_ADAPTER)
@pytest.mark.parametrize("package", sorted(set(PACKAGES) - NO_ADAPTERS))
def test_every_adapter_has_its_driver_its_page_and_its_example(package, place):
    """An adapter without a driver keeps no promise that anybody has seen, and nox does not know it."""
    assert (ROOT / place.format(package.removeprefix("context-sqla-"))).exists()


def test_every_package_is_known_to_import_linter_and_coverage():
    """A package that import-linter does not know may import anything."""
    contracts = {contract["id"]: contract for contract in settings()["importlinter"]["contracts"]}
    every = sorted(map(import_name, PACKAGES))
    adapters = sorted(import_name(package) for package in set(PACKAGES) - NO_ADAPTERS)

    assert sorted(settings()["importlinter"]["root_packages"]) == every
    assert sorted(settings()["coverage"]["run"]["source_pkgs"]) == every
    assert set(every) - {"context_sqla"} <= set(contracts["core-alone"]["forbidden_modules"])
    assert sorted(contracts["adapters-thin"]["source_modules"]) == adapters
    assert sorted(contracts["adapters-independent"]["modules"]) == adapters


def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


def import_name(package):
    return package.replace("-", "_")


def modules(package):
    return (ROOT / "packages" / package / "src").rglob("*.py")


def lines_of(module):
    return code_lines(module.read_text(encoding="utf-8"))


def code_lines(source):
    """Count the lines that hold code: not blank, comment, docstring or overload."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if is_prose(node) or is_overload(node):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            lines.difference_update(range(first, node.end_lineno + 1))
    return len(lines)


def is_prose(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_overload(node):
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and any(
        ast.unparse(decorator).split(".")[-1] == "overload" for decorator in node.decorator_list
    )
