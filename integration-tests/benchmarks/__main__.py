"""Run benchmarks: ``python -m benchmarks [workload ...] [--json FILE] [--against FILE]``, ``counts``, ``page FILE...``."""

import argparse
import asyncio
import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from support.postgres import Postgres

from . import counts, pages
from .workloads import WORKLOADS, Effort, Report

_LIBRARIES = (
    "sqlalchemy", "asyncpg", "starlette", "fastapi", "litestar", "quart", "falcon", "aiohttp", "sanic",
    "context-async-sqlalchemy", "advanced-alchemy", "fastapi-async-sqlalchemy", "fastapi-sqla", "aiohttp-sqlalchemy",
)  # fmt: skip


def main() -> None:
    """Do what was asked for."""
    options = _options()
    if options.workloads[:1] == ["counts"]:
        count(options.workloads[1:], write=options.write)
    elif options.workloads[:1] == ["page"]:
        pages.write([Path(name) for name in options.workloads[1:]])
    else:
        measure(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What the suite costs, as ratios of one process.")
    parser.add_argument(
        "workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}, or how they begin; all, if none is named"
    )
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--against", type=Path, help="results of another run, to be shown beside these")
    parser.add_argument("--only", help="of the other libraries, measure this one alone: it has an environment of its own")
    parser.add_argument("--write", action="store_true", help="with 'counts': write this Python's numbers")
    options = parser.parse_args()
    asked = [] if options.workloads[:1] in (["counts"], ["page"]) else options.workloads
    for one in asked:
        if not any(name.startswith(one) for name in WORKLOADS):
            parser.error(f"{one!r} is no workload; there are {', '.join(WORKLOADS)}, 'counts' and 'page'")
    return options


def measure(options: argparse.Namespace) -> None:
    """Run workloads, and print a table for each."""
    names = [name for name in WORKLOADS if not options.workloads or any(name.startswith(one) for one in options.workloads)]
    before = json.loads(options.against.read_text())["reports"] if options.against else {}
    reports: dict[str, Any] = {}
    effort = Effort(options.rounds, only=options.only)
    with Postgres() as server:
        for name in names:
            report = asyncio.run(WORKLOADS[name](server, effort))
            reports[name] = asdict(report)
            show(report, before.get(name))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": machine(), "only": options.only, "reports": reports}
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def count(names: list[str], *, write: bool) -> None:
    """Write the committed numbers, or show what the requests of a framework call beside the bare ones."""
    if write:
        counts.write()
        return
    for framework in names or counts.NO_DB:
        for path in counts.PATHS:
            now = asyncio.run(counts.count(framework, path))
            say(f"{framework}, {path}: {now}; committed: {counts.committed().get(framework, {}).get(path)}")
        if names:
            for name, number in asyncio.run(counts.added(framework)).items():
                say(f"  {number:+6} {name}")


def machine() -> dict[str, Any]:
    """Say what these figures were taken on."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def show(report: Report, before: dict[str, Any] | None) -> None:
    """Print one table: median, ratio with quartiles, what is added; and the ratio of another run."""
    earlier = {one["name"]: one["ratio"]["middle"] for one in (before or {}).get("results", ())}
    say(f"\n{report.title}   (goal: {report.goal})")
    for one in report.results:
        line = (
            f"  {one.name:42} {one.each.middle:10.2f} us   x {one.ratio.middle:5.3f} ({one.ratio.low:.3f} .. {one.ratio.high:.3f})"
            f"   {one.added.middle:+9.2f} us ({one.added.low:+.2f} .. {one.added.high:+.2f})"
        )
        say(line + (f"   before: x {earlier[one.name]:.3f}" if one.name in earlier else ""))
    for name, value in report.facts.items():
        say(f"  {name:42} {value:10.2f}")
    for name in report.missing:
        say(f"  {name:42} is not installed")


def say(line: str) -> None:
    """Write a line of the report."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
