"""What runs of the contract have shown: how many tests of each promise passed, on which framework, server and driver.

``pytest integration-tests/contract --support-table`` prints it, ``--support-results=FILE`` writes it, and
``nox -s results`` joins the files of several runs into one table.

Nothing but the standard library is imported: the table of runs elsewhere is made where nothing is installed.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

_FILE = re.compile(r"test_p(\d\d)_")
_PROMISE = re.compile(r"\bP\d+[ab]?\b")
SUITE = "suite"  # test_p00: about the suite's own drivers, no promise

#: From best to worst; a test has the worst of its three phases.
OUTCOMES = ("passed", "skipped", "failed")


def promise_of(path: Path, docstring: str | None) -> str | None:
    """Return the promise of a test: its file's, or the part of it (P4a, P4b, P7a) that the docstring names first."""
    match = _FILE.match(path.name)
    if match is None:
        return None
    number = int(match[1])
    if number == 0:
        return SUITE
    named = (one for one in _PROMISE.findall(docstring or "") if one.rstrip("ab") == f"P{number}")
    return next(named, f"P{number}")


@dataclass(frozen=True)
class Result:
    """One run, with the versions that it ran on."""

    full: bool
    versions: Mapping[str, str]
    counts: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read the file of a run."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the file of a run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def version(self, name: str) -> str:
        """Return a name with its version: "quart 0.23.1"; the servers that a framework brings have the framework's."""
        if not name:
            return "none"  # a test that serves nothing
        known = self.versions.get(name) or self.versions.get(name.partition("-")[0])
        return f"{name} {known}" if known else name


class Recorder:
    """Counts the outcomes; with xdist, in the process that the workers report to."""

    def __init__(self, *, full: bool) -> None:
        self._full = full
        self._outcomes: dict[str, tuple[tuple[str, ...], str]] = {}

    def record(self, nodeid: str, properties: Iterable[tuple[str, object]], outcome: str) -> None:
        """Take one phase of one test."""
        known = dict(properties)
        if not isinstance(about := known.get("support"), list | tuple):
            return
        before = self._outcomes.get(nodeid, ((), OUTCOMES[0]))[1]
        self._outcomes[nodeid] = (tuple(map(str, about)), max(before, outcome, key=OUTCOMES.index))

    def result(self) -> Result:
        """Return what there is."""
        counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for about, outcome in self._outcomes.values():
            counts[about][outcome] += 1
        names = {name.partition("-")[0] for _, *stack in counts for name in stack if name}
        return Result(
            self._full,
            {"python": platform.python_version(), **installed_versions(sorted(names | {"sqlalchemy"}))},
            [
                dict(zip(("promise", "framework", "server", "database"), about, strict=True))
                | {outcome: number[outcome] for outcome in OUTCOMES}
                for about, number in sorted(counts.items())
            ],
        )


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # asgi is no distribution
    return versions


def by_server(result: Result) -> Result:
    """Return the run with all drivers of a server together."""
    together: dict[tuple[str, str, str], Counter[str]] = {}
    for count in result.counts:
        place = together.setdefault((count["promise"], count["framework"], count["server"]), Counter())
        place.update({outcome: count[outcome] for outcome in OUTCOMES})
    counts = [
        {"promise": promise, "framework": framework, "server": server, "database": "all"}
        | {outcome: number[outcome] for outcome in OUTCOMES}
        for (promise, framework, server), number in together.items()
    ]
    return replace(result, counts=counts)


def table(results: Sequence[Result]) -> str:
    """Return one Markdown table: a row for each framework, server and driver of each run, a column for each promise."""
    promises = sorted({count["promise"] for result in results for count in result.counts}, key=_in_order)
    header = ["framework", "server", "driver", "Python", "SQLAlchemy", "passed", "failed", *promises]
    rows = [row for result in results for row in _rows(result, promises)]
    lines = [header, ["---"] * len(header), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _rows(result: Result, promises: Sequence[str]) -> Iterable[list[str]]:
    stacks: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for count in result.counts:
        stacks.setdefault((count["framework"], count["server"], count["database"]), {})[count["promise"]] = count
    for stack, by_promise in sorted(stacks.items()):
        total = {outcome: sum(count[outcome] for count in by_promise.values()) for outcome in OUTCOMES}
        yield [
            *map(result.version, stack),
            result.versions["python"],
            result.versions.get("sqlalchemy", ""),
            str(total["passed"]),
            str(total["failed"] + total["skipped"]),
            *(_cell(by_promise.get(promise)) for promise in promises),
        ]


def _cell(count: Mapping[str, Any] | None) -> str:
    if count is None:
        return ""
    all_of_them = sum(count[outcome] for outcome in OUTCOMES)
    return str(all_of_them) if count["passed"] == all_of_them else f"{count['passed']}/{all_of_them}"


def _in_order(promise: str) -> tuple[int, str]:
    return (0, "") if promise == SUITE else (int(promise.strip("Pab")), promise)


def complaints(results: Sequence[Result]) -> list[str]:
    """Return what keeps the runs from being a proof: tests that failed, and frameworks with fewer tests than others."""
    found = []
    totals: defaultdict[bool, dict[str, int]] = defaultdict(dict)
    for result in results:
        numbers: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        for count in result.counts:
            framework = f"{result.version(count['framework'])} (Python {result.versions['python']})"
            if count["framework"]:
                numbers[framework] += sum(count[outcome] for outcome in OUTCOMES)
            bad[framework] += count["failed"] + count["skipped"]
        totals[result.full].update(numbers)
        found += [f"{framework}: {number} tests did not pass" for framework, number in bad.items() if number]
    for numbers_of_one_kind in totals.values():
        if len(set(numbers_of_one_kind.values())) > 1:
            listed = ", ".join(f"{framework} {number}" for framework, number in sorted(numbers_of_one_kind.items()))
            found.append(f"the frameworks did not run the same number of tests: {listed}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the runs, and what is wrong with them; the exit status says whether anything is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="what --support-results has written")
    parser.add_argument("--by-server", action="store_true", help="one row for all drivers of a server")
    options = parser.parse_args(arguments)
    results = [Result.read(path) for path in options.files]
    print(table(list(map(by_server, results)) if options.by_server else results))
    found = complaints(results)
    for complaint in found:
        print(complaint, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
