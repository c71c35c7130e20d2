"""The tables of the documentation that the suite's own data say: who is supported, in which versions, and what is lacking.

``python -m support.pages`` says what is out of date, ``python -m support.pages --write`` writes it. A generated table stands
between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import difflib
import functools
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from contract.drivers import FRAMEWORKS, SERVERS, Framework

from .databases import DRIVERS
from .scenario import Feature

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/reference/support.md")

_DIALECTS = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
_PROMISE = re.compile(r"^\*\*(P\d+[ab]?) (.+)\.\*\*$", re.MULTILINE)
_BOUND = re.compile(r"(>=|<)([\d.]+)")
_GENERATED = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """Return the text of a page with its generated tables up to date.

    Raises:
        KeyError: it has a table that nothing here makes.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    return _GENERATED.sub(lambda found: f"{found[1]}{_SECTIONS[found[2]]()}\n{found[4]}", text)


def promises() -> dict[str, str]:
    """Return the names of the promises, by number, in the order of the contract."""
    contract = (ROOT / "docs" / "explanation" / "contract.md").read_text(encoding="utf-8")
    return dict(_PROMISE.findall(contract))


def _frameworks() -> str:
    """The frameworks, for who looks for theirs."""
    rows = [
        [_title(name), f"`{_distribution(name)}`", _range(name), f"[docs](docs/how-to/{name}.md)"]
        for name in sorted(FRAMEWORKS, key=_by_popularity)
    ]
    rows.append(["none: scripts, workers, CLIs", "`context-sqla`", "", "[docs](docs/how-to/scripts-and-workers.md)"])
    return _table(["framework", "distribution", "versions tested", "how to"], rows)


def _versions() -> str:
    """What is declared, and what is tested of it."""
    pythons = [text.rpartition(" ")[2] for text in _project("context-sqla")["classifiers"] if re.search(r":: 3\.\d+$", text)]
    rows = [["Python", *_declared(_project("context-sqla")["requires-python"]), ", ".join(pythons)]]
    for title, distribution, requirement in _requirements():
        declared, lowest = _declared(requirement)
        rows.append([title, declared, lowest, ", ".join(_locked(distribution))])
    return _table(["", "declared", "lowest tested", "newest tested"], rows)


def _servers() -> str:
    """Where the frameworks run, in tests."""
    rows = [[_title(name), ", ".join(SERVERS.get(one, one) for one in row.servers)] for name, row in FRAMEWORKS.items()]
    return _table(["framework", "servers"], rows)


def _databases() -> str:
    """What the connects of the tests lead to."""
    dialects: dict[str, list[str]] = {}
    for driver, dialect in DRIVERS.items():
        dialects.setdefault(_DIALECTS[dialect], []).append(driver)
    return _table(["database", "drivers"], [[dialect, ", ".join(drivers)] for dialect, drivers in dialects.items()])


def _promise_table() -> str:
    """The promises and the frameworks; a number is one of the notes."""
    notes = _notes()
    rows = [
        [f"{promise} {meaning}", *(_cell(promise, name, notes) for name in FRAMEWORKS)] for promise, meaning in promises().items()
    ]
    return _table(["promise", *FRAMEWORKS], rows)


def _note_table() -> str:
    """What a framework cannot do, with its reason."""
    rows = [
        [str(number), where, feature.promise, feature.meaning, reason] for (feature, reason), (number, where) in _notes().items()
    ]
    return _table(["", "framework", "promise", "lacks", "because"], rows)


def _tools() -> str:
    """What tests use where it is, and where it is not."""
    rows = [[_where(*place), feature.meaning, reason] for *place, feature, reason in _lacks() if feature.is_a_tool]
    return _table(["framework", "has no", "because"], rows)


_SECTIONS = {
    "databases": _databases,
    "frameworks": _frameworks,
    "notes": _note_table,
    "promises": _promise_table,
    "servers": _servers,
    "tools": _tools,
    "versions": _versions,
}


def _lacks() -> Iterator[tuple[str, str | None, Feature, str]]:
    """All that is lacking: framework, one of its servers or None for all, feature, reason."""
    for name, row in FRAMEWORKS.items():
        yield from ((name, None, feature, reason) for feature, reason in row.lacks.items())
        for server in row.servers:
            yield from ((name, server, feature, reason) for feature, reason in row.lacks_on.get(server, {}).items())


def _notes() -> dict[tuple[Feature, str], tuple[int, str]]:
    """Number what is lacking, in the order of the promises; one reason of several frameworks is one note."""
    order = list(promises())
    places: dict[tuple[Feature, str], list[str]] = {}
    for name, server, feature, reason in sorted(_lacks(), key=lambda lack: order.index(lack[2].promise)):
        if not feature.is_a_tool:
            places.setdefault((feature, reason), []).append(_where(name, server))
    return {note: (number, ", ".join(where)) for number, (note, where) in enumerate(places.items(), 1)}


def _cell(promise: str, name: str, notes: Mapping[tuple[Feature, str], tuple[int, str]]) -> str:
    numbers = {notes[feature, reason][0] for feature, reason in _everywhere(FRAMEWORKS[name]) if _touches(feature, promise)}
    return ", ".join(map(str, sorted(numbers))) or "yes"


def _touches(feature: Feature, promise: str) -> bool:
    return feature.promise == promise and not feature.is_a_tool


def _everywhere(row: Framework) -> Iterator[tuple[Feature, str]]:
    yield from row.lacks.items()
    for lacks in row.lacks_on.values():
        yield from lacks.items()


def _where(name: str, server: str | None) -> str:
    return name if server is None else f"{name} on {SERVERS.get(server, server)}"


def _title(name: str) -> str:
    """The framework's own spelling of its name: the title of its page."""
    page = (ROOT / "docs" / "how-to" / f"{name}.md").read_text(encoding="utf-8")
    return page.partition("\n")[0].removeprefix("# ")


def _distribution(name: str) -> str:
    return f"context-sqla-{name}"


def _project(distribution: str) -> Mapping[str, Sequence[str]]:
    file = ROOT / "packages" / distribution / "pyproject.toml"
    project: Mapping[str, Sequence[str]] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return project


def _requirements() -> Iterator[tuple[str, str, str]]:
    """What the packages need that is not ours: title, distribution, range."""
    for title, package in [("SQLAlchemy", "context-sqla"), *((_title(name), _distribution(name)) for name in FRAMEWORKS)]:
        for requirement in _project(package)["dependencies"]:
            distribution, ranges = re.split(r"(?:\[\w+\])?(?=[><=])", requirement, maxsplit=1)
            if not distribution.startswith("context-sqla"):
                yield title, distribution, ranges


def _declared(ranges: str) -> tuple[str, str]:
    """Return a range in words, and its lower end."""
    bounds = dict(_BOUND.findall(ranges))
    below = f", below {bounds['<']}" if "<" in bounds else ""
    return f"{bounds['>=']} and newer{below}", bounds[">="]


def _locked(distribution: str) -> list[str]:
    """The versions in uv.lock, which are those that each run tests: several, where the newest needs a newer Python."""
    found = [version for name, version in _lock((ROOT / "uv.lock").read_text(encoding="utf-8")) if name == distribution]
    return sorted(found, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])


@functools.lru_cache(maxsize=1)
def _lock(text: str) -> list[tuple[str, str]]:
    return [(package["name"], package["version"]) for package in tomllib.loads(text)["package"]]


def _range(name: str) -> str:
    """Return "0.100 to 0.165.0": the lowest and the newest version that are tested."""
    for title, distribution, ranges in _requirements():
        if title == _title(name):
            return f"{_declared(ranges)[1]} to {_locked(distribution)[-1]}"
    return "ASGI 3"


def _by_popularity(name: str) -> int:
    """FastAPI first, since most who come use it, and the way out last."""
    first = ["fastapi", "starlette"]
    return first.index(name) if name in first else len(FRAMEWORKS) + 1 if name == "asgi" else len(first)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Say which tables of the documentation are out of date, or write them."""
    parser = argparse.ArgumentParser(prog="python -m support.pages", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="bring them up to date")
    write = parser.parse_args(arguments).write
    differences: list[str] = []
    for page in PAGES:
        old, new = (ROOT / page).read_text(encoding="utf-8"), filled(page)
        differences += difflib.unified_diff(old.splitlines(), new.splitlines(), page, page, lineterm="")
        if write:
            (ROOT / page).write_text(new, encoding="utf-8")
    print("\n".join(differences) or "up to date")
    return 1 if differences and not write else 0


if __name__ == "__main__":
    sys.exit(main())
