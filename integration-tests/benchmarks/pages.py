"""The page of results in the documentation: tables and plots, made from the JSON of a run and from the committed counts."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import counts

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "reference" / "benchmarks.md"
PLOTS = DOCS / "_static" / "benchmarks"
OURS = "context-sqla"
_BAR, _LEFT, _WIDTH, _RIGHT = 22, 300, 420, 120
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #222 }
.bar { fill: #b4bcc8 } .ours { fill: #2a6fdb } .line { stroke: #555; stroke-width: 1.5 } .unit { stroke: #999; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .bar { fill: #58616e } .ours { fill: #5b9bff } .line { stroke: #bbb } .unit { stroke: #777 }
}
"""
_HEAD = """# Benchmarks

<!-- Made by `nox -s bench-page` from the results of `nox -s bench`; changed there, not here. -->

{begin}

Run it yourself: `nox -s bench`; [the folder of the benchmarks]({source}) tells how.
"""
_TIMES = """{machine}

All contenders of a table run in one process and take turns, in many short rounds, and each round begins with another one.
A ratio is that of the same round, to the first line of the table; the figures are medians, with the quartiles in brackets.
The absolute times are those of this machine; the ratios are what carries over.
No sockets are involved: a request is given to the application as its server would, so that the servers' own time hides nothing."""
_NOTHING = "What a request costs, counted: calls and memory, which do not vary with the machine as times do."
_COUNTS = """What the suite's own functions do in one request, on each framework.
Calls: how often one of them is entered or resumed, and calls something.
Pieces of memory: what they have allocated and still hold while the endpoint runs.
The normal test command holds these numbers, so that a change of them is a decision.
"""
_SOURCE = "https://github.com/context-sqla/context-sqla/tree/main/integration-tests/benchmarks"


def write(files: Sequence[Path]) -> None:
    """Write the page and its plots from the results of one or several environments."""
    data = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    PLOTS.mkdir(parents=True, exist_ok=True)
    for old in PLOTS.glob("*.svg"):
        old.unlink()
    for key, report in _reports(data):
        if report["results"]:
            (PLOTS / f"{key}.svg").write_text(plot(report), encoding="utf-8")
    PAGE.write_text(page(*data), encoding="utf-8")


def page(*data: dict[str, Any]) -> str:
    """Return the page."""
    begin = _TIMES.format(machine="\n".join(map(_machine, data))) if data else _NOTHING
    parts = [_HEAD.format(begin=begin, source=_SOURCE)]
    for key, report in _reports(data):
        parts.append(f"## {report['title'][0].upper()}{report['title'][1:]}\n\nGoal: {report['goal']}.\n")
        parts += [_figure(key, report), _table(report), _honest(report)] if report["results"] else []
        parts += [f"* {name}: {value:.2f}\n" for name, value in report["facts"].items()]
    parts.append(_counts())
    return "\n".join(part for part in parts if part)


def _reports(data: Iterable[dict[str, Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
    for one in data:
        for key, report in one["reports"].items():
            only = one.get("only")
            if only is None:
                yield key, report
            else:
                yield f"{key}-{only}", {**report, "title": f"{report['title']}, in the environment of {only}"}


def _machine(data: dict[str, Any]) -> str:
    it = data["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in it["versions"].items())
    where = f", in the environment of {data['only']}" if data.get("only") else ""
    load = f", load {it['load']} at the end" if it.get("load") is not None else ""
    return f"Measured on {it['date']}{where}: Python {it['python']}, {it['system']}, {it['cores']} cores{load}; {versions}."


def _spread(one: dict[str, float], form: str) -> str:
    return f"{one['middle']:{form}} ({one['low']:{form}} .. {one['high']:{form}})"


def _table(report: dict[str, Any]) -> str:
    lines = ["| contender | time, µs | ratio | added, µs |", "| --- | --- | --- | --- |"]
    for one in report["results"]:
        name = f"**{one['name']}**" if one["name"].startswith(OURS) else one["name"]
        cells = (name, f"{one['each']['middle']:.2f}", _spread(one["ratio"], ".3f"), _spread(one["added"], "+.2f"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _honest(report: dict[str, Any]) -> str:
    """Name the libraries that take less time, of those that do the same."""
    ours = [one["ratio"]["middle"] for one in report["results"] if one["name"] == OURS]
    faster = [one["name"] for one in report["results"][1:] if ours and one["ratio"]["middle"] < ours[0]]
    absent = report["missing"]
    text = f"What is faster here: {', '.join(faster)}.\n" if faster else ""
    return text + (f"Not installed in this run: {', '.join(absent)}.\n" if absent else "")


def _figure(key: str, report: dict[str, Any]) -> str:
    return f"```{{image}} ../_static/benchmarks/{key}.svg\n:alt: {report['title']}\n```\n"


def plot(report: dict[str, Any]) -> str:
    """Return the ratios as bars with their quartiles, in a drawing for light and dark pages."""
    results = report["results"]
    top = max(one["ratio"]["high"] for one in results) or 1.0
    height = _BAR * len(results) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} {height}" role="img">',
        f"<title>{escape(report['title'])}: ratio to {escape(results[0]['name'])}</title>",
        f"<style>{_STYLE}</style>",
    ]
    for place, one in enumerate(results):
        y, ratio = 5 + place * _BAR, one["ratio"]
        low, middle, high = (_LEFT + ratio[name] / top * _WIDTH for name in ("low", "middle", "high"))
        kind = "ours" if one["name"].startswith(OURS) and "async" not in one["name"] else "bar"
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(one["name"])}</text>',
            f'<rect class="{kind}" x="{_LEFT}" y="{y + 2}" width="{middle - _LEFT:.1f}" height="{_BAR - 6}"/>',
            f'<path class="line" d="M{low:.1f} {y + 10}H{high:.1f}"/>',
            f'<text x="{high + 6:.1f}" y="{y + 14}">{ratio["middle"]:.2f}</text>',
        ]
    one = _LEFT + _WIDTH / top
    parts += [f'<path class="unit" d="M{one:.1f} 2V{height - 2}"/>', "</svg>"]
    return "\n".join(parts) + "\n"


def _counts() -> str:
    """Return the table of what does not vary."""
    known = json.loads(counts.FILE.read_text(encoding="utf-8")) if counts.FILE.exists() else {}
    lines = ["## What does not vary\n", _COUNTS]
    for python, frameworks in known.items():
        lines += [
            f"Python {python}:\n",
            "| framework | path | calls | pieces of memory | bytes |",
            "| --- | --- | --- | --- | --- |",
        ]
        for framework, numbers in frameworks.items():
            for path in counts.PATHS:
                it = numbers[path]
                lines.append(f"| {framework} | {path} | {it['calls']} | {it['blocks']} | {it['bytes']} |")
        lines.append("")
    return "\n".join(lines)
