"""Run every Python block of the documentation and of the packages' READMEs.

The blocks of a page run one after the other in one namespace, which begins with the names of examples/tutorial/users.py and has
its tables, in a folder of its own; `users` and `main`, the files of the tutorial, can be imported and are that namespace too.
A block may await at its top level. What readers need not see, assertions as a rule, stands in a comment that Sybil would run
too; there, `client(app)` makes requests:

<!--- invisible-code-block: python
assert True
--->

Files that a page includes must exist, and so must every file that it links to.
The pages of the frameworks have the same headings.
"""

import ast
import asyncio
import inspect
import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from httpx import ASGITransport, AsyncClient

DOCS = Path(__file__).parent
ROOT = DOCS.parent
READMES = [ROOT / "README.md", *ROOT.glob("packages/*/README.md")]  # those of the packages are what PyPI shows
PAGES = sorted(page for page in [*DOCS.rglob("*.md"), *READMES] if page.parent.name != "changelog.d")

FRAMEWORKS = sorted(path.parent.name for path in ROOT.glob("examples/*/app.py") if path.parent.name != "primary_replica")
HEADINGS = [
    "Set up",
    "Errors of the commit",
    "Streams",
    "Background work",
    "Websockets",
    "Tests",
    "What is fixed by ...",
    "Other ways to register",
    "The whole example",
]

_TABLES = """
from context_sqla import new_non_ctx_atomic_session as _session
async with _session(db) as _own:
    await (await _own.connection()).run_sync(Base.metadata.create_all)
"""
_BLOCK = re.compile(
    r"^```python\n(?P<shown>.*?)^```$|^<!--- invisible-code-block: python\n(?P<hidden>.*?)^--->$", re.MULTILINE | re.DOTALL
)
_INCLUDE = re.compile(r"^```\{literalinclude\} (?P<path>\S+)$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)(?P<path>[^)#\s]+)(?:#[^)\s]*)?\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def _client(app: Any) -> AsyncClient:
    return AsyncClient(transport=ASGITransport(app), base_url="http://test")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if _BLOCK.search(page.read_text("utf-8"))], ids=_name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the documentation shows works as it stands."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    module.__dict__["client"] = _client
    for name in ("page", "users", "main"):  # declarative classes look their module up; a page may be several files
        monkeypatch.setitem(sys.modules, name, module)
    with asyncio.Runner() as runner:
        _run((ROOT / "examples" / "tutorial" / "users.py").read_text("utf-8") + _TABLES, "users.py", module, runner)
        for line, code in _blocks(page):
            _run(code, f"{page}:{line}", module, runner)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    """No link between pages, and no included example, is broken."""
    text = page.read_text("utf-8")
    named = [match["path"] for match in [*_INCLUDE.finditer(text), *_LINK.finditer(_FENCE.sub("", text))]]

    assert [path for path in named if not (page.parent / path).exists()] == []


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=_name)
def test_every_page_can_be_reached(page: Path) -> None:
    """Every page is in the contents of docs/index.md."""
    if page == DOCS / "index.md" or page.parent.name == "changelog.d":
        return
    contents = (DOCS / "index.md").read_text("utf-8")

    assert page.relative_to(DOCS).with_suffix("").as_posix() in contents


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_pages_of_frameworks_have_the_same_headings(framework: str) -> None:
    """Who knows the page of one framework finds the way on that of another."""
    text = (DOCS / "how-to" / f"{framework}.md").read_text("utf-8")
    found = re.findall(r"^## (.*)$", _FENCE.sub("", text), re.MULTILINE)

    assert [re.sub(r"(?<=fixed by ).*", "...", heading) for heading in found] == HEADINGS


def _blocks(page: Path) -> Iterator[tuple[int, str]]:
    text = page.read_text("utf-8")
    for match in _BLOCK.finditer(text):
        yield text.count("\n", 0, match.start()) + 2, match["shown"] or match["hidden"]


def _run(code: str, filename: str, module: ModuleType, runner: asyncio.Runner) -> None:
    compiled = compile(code, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    if compiled.co_flags & inspect.CO_COROUTINE:
        runner.run(_awaited(compiled, module))
    else:
        exec(compiled, module.__dict__)  # noqa: S102  # that is the point


async def _awaited(compiled: object, module: ModuleType) -> None:
    await eval(compiled, module.__dict__)  # type: ignore[arg-type]  # noqa: S307
