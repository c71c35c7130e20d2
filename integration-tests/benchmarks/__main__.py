"""Run benchmarks: ``python -m benchmarks [workload ...] [--json FILE] [--against FILE] [--rounds N]``."""

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

from .workloads import WORKLOADS, Report

_LIBRARIES = (
    "sqlalchemy", "asyncpg", "starlette", "fastapi", "litestar", "quart", "aiohttp", "sanic",
    "context-async-sqlalchemy", "advanced-alchemy", "fastapi-async-sqlalchemy", "fastapi-sqla", "aiohttp-sqlalchemy",
)  # fmt: skip


def main() -> None:
    """Run what was asked for, and print a table for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What the suite costs, as ratios of one process.")
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}; all, if none is named")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--against", type=Path, help="results of another run, to be shown beside these")
    options = parser.parse_args()
    names = [name for name in WORKLOADS if not options.workloads or any(name.startswith(one) for one in options.workloads)]
    if not names:
        parser.error(f"no such workload; there are {', '.join(WORKLOADS)}")
    before = json.loads(options.against.read_text())["reports"] if options.against else {}
    reports: dict[str, Any] = {}
    with Postgres() as server:
        for name in names:
            report = asyncio.run(WORKLOADS[name](server, options.rounds))
            reports[name] = asdict(report)
            show(report, before.get(name))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "reports": reports}, indent=1) + "\n")


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
        "versions": versions,
    }


def show(report: Report, before: dict[str, Any] | None) -> None:
    """Print one table: median, ratio with quartiles, what is added; and the ratio of another run."""
    earlier = {one["name"]: one["ratio"]["middle"] for one in (before or {}).get("results", ())}
    write(f"\n{report.title}   (goal: {report.goal})")
    for one in report.results:
        line = (
            f"  {one.name:42} {one.each.middle:10.2f} us   x {one.ratio.middle:5.3f} ({one.ratio.low:.3f} .. {one.ratio.high:.3f})"
            f"   {one.added.middle:+9.2f} us ({one.added.low:+.2f} .. {one.added.high:+.2f})"
        )
        write(line + (f"   before: x {earlier[one.name]:.3f}" if one.name in earlier else ""))
    for name, value in report.facts.items():
        write(f"  {name:42} {value:10.2f}")
    for name in report.missing:
        write(f"  {name:42} is not installed")


def write(line: str) -> None:
    """Write a line of the report."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
