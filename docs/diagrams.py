"""The diagrams of the documentation, as text: `draw(name, description)` returns one as SVG, whose colours are the page's.

`python docs/diagrams.py FOLDER` writes them as files, to look at; the colours are those of `_static/site.css`.
"""

import itertools
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

WIDTH = 372  # what a phone shows without making words smaller
LINE = 18


class Drawing:
    """Boxes, arrows and words on a sheet of fixed width and growing height."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.height = 0
        self._parts: list[str] = []

    def box(self, x: int, y: int, width: int, height: int, kind: str = "box") -> None:
        """Draw a box; its kind is a class of the style sheet."""
        self._add(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>', y + height)

    def words(self, x: int, y: int, text: str, kind: str = "", anchor: str = "middle") -> None:
        """Write lines of text, the first of them at y."""
        for number, line in enumerate(text.split("\n")):
            at = y + number * LINE
            self._add(f'<text class="{kind}" x="{x}" y="{at}" text-anchor="{anchor}">{escape(line)}</text>', at)

    def arrow(self, x1: int, y1: int, x2: int, y2: int, kind: str = "") -> None:
        """Draw an arrow from one point to another."""
        head = f'marker-end="url(#{self.name}-head{kind})"'
        self._add(f'<line class="arrow {kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {head}/>', max(y1, y2))

    def line(self, x1: int, y1: int, x2: int, y2: int, kind: str = "lane") -> None:
        """Draw a line."""
        self._add(f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>', max(y1, y2))

    def path(self, way: str, kind: str = "") -> None:
        """Draw a bent arrow."""
        self._add(f'<path class="arrow {kind}" d="{way}" marker-end="url(#{self.name}-head)"/>', 0)

    def svg(self, description: str) -> str:
        """Return the drawing."""
        markers = "".join(
            f'<marker id="{self.name}-head{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path class="head {kind}" d="M0,0 L8,4 L0,8 z"/></marker>'
            for kind in ("", "strong")
        )
        title = f'<title id="{self.name}-title">{escape(description)}</title>'
        size = f'viewBox="0 0 {WIDTH} {self.height + 14}"'
        start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="{self.name}-title">'
        return "".join([start, title, f"<defs>{markers}</defs>", *self._parts, "</svg>"])

    def _add(self, part: str, bottom: int) -> None:
        self._parts.append(part)
        self.height = max(self.height, bottom)


def engine_and_sessions(sheet: Drawing) -> None:
    """Draw a connect, its engines and pools, and the units that use them."""
    sheet.box(86, 8, 200, 48, "box strong")
    sheet.words(186, 28, "DBConnect", "code")
    sheet.words(186, 46, "one per database and role", "note")
    for left, host, state in ((3, "db1", "the current host"), (191, "db2", "the host before")):
        sheet.arrow(186, 56, left + 89, 91)
        sheet.box(left, 94, 178, 134)
        sheet.words(left + 89, 116, f"engine for {host}")
        sheet.words(left + 89, 134, f"one per host\nand event loop\n{state}", "note")
        for number in range(4):
            used = host == "db1" and number == 1
            sheet.box(left + 13 + number * 39, 186, 34, 28, "connection used" if used else "connection")
    units = (
        (3, "POST /users", "has sent\na statement"),
        (127, "GET /users", "has asked\nfor a session"),
        (251, "GET /health", "has asked for\nnothing"),
    )
    for left, label, state in units:
        sheet.box(left, 264, 118, 120, "box unit")
        sheet.words(left + (51 if label.startswith("POST") else 59), 284, label, "code")  # beside the arrow
        if "nothing" not in state:
            sheet.box(left + 7, 296, 104, 30, "box session")
            sheet.words(left + 59, 316, "AsyncSession", "code")
        sheet.words(left + 59, 350, state, "note")
    sheet.arrow(113, 296, 73, 217, "strong")
    sheet.words(186, 410, "three units of work; a connection is held\nfrom the first statement to the commit", "note")


def life_of_a_request(sheet: Drawing) -> None:
    """Draw who says what to whom, from the request to the end of background work."""
    client, adapter, code, database = 38, 132, 232, 333
    steps: list[tuple[int, int, str, str]] = [
        (client, adapter, "POST /users", ""),
        (adapter, adapter, "Unit.enter()", ""),
        (adapter, code, "endpoint runs", ""),
        (code, code, "db_session()", ""),
        (code, database, "BEGIN, INSERT", ""),
        (code, adapter, "response 201", ""),
        (adapter, database, "head(201): flush, COMMIT", "strong"),
        (adapter, adapter, "on_commit", ""),
        (adapter, client, "201, the head", "strong"),
        (adapter, code, "the body runs", ""),
        (code, database, "BEGIN, SELECT", ""),
        (adapter, database, "end_of_body(): COMMIT", "strong"),
        (adapter, client, "the last byte", "strong"),
        (adapter, code, "tasks run", ""),
        (code, database, "BEGIN, UPDATE", ""),
        (adapter, database, "close(): COMMIT", "strong"),
    ]
    y = 62
    for x, name in ((client, "client"), (adapter, "adapter"), (code, "your code"), (database, "database")):
        sheet.line(x, 36, x, y + 32 * len(steps) - 12)
        sheet.box(x - 37, 8, 74, 28)
        sheet.words(x, 27, name)
    for one, other, text, kind in steps:
        if one == other:
            sheet.words(one + 6, y, text, "code small", "start")
        else:
            sheet.words((one + other) // 2, y, text, "small")
            sheet.arrow(one, y + 7, other, y + 7, kind)
        y += 32
    sheet.words(186, y + 12, "If the commit at head() fails, your exception\nhandler answers, and its status decides.", "note")


def phases_of_a_unit(sheet: Drawing) -> None:
    """Draw the phases of a unit and what leads from one to the next."""
    phases = (
        ("handler", "the endpoint runs", "box strong"),
        ("stream", "the head is out,\nthe body goes on", "box"),
        ("background", "the last byte is out,\ntasks run", "box"),
        ("closed", "nothing begins\nhere any more", "box"),
    )
    calls = (
        ("head(status)", "commits below 400,\nrolls back otherwise"),
        ("end_of_body()", "commits the body's writes\nbefore the last byte"),
        ("close()", "commits the tasks' writes,\ncloses the sessions"),
    )
    for number, (name, what, kind) in enumerate(phases):
        y = 8 + number * 124
        sheet.box(64, y, 106, 44, kind)
        sheet.words(117, y + 27, name, "code")
        sheet.words(182, y + (18 if "\n" in what else 27), what, "", "start")
    for number, (call, effect) in enumerate(calls):
        y = 52 + number * 124
        sheet.arrow(117, y, 117, y + 78, "strong")
        sheet.words(182, y + 28, call, "code", "start")
        sheet.words(182, y + 46, effect, "note", "start")
    sheet.path("M64,20 H34 V42 H60", "dashed")
    sheet.words(3, 74, "commit failed:\nrolled back,\nonce more", "note", "start")
    sheet.path("M64,154 H34 V278 H60", "dashed")
    sheet.words(3, 322, "disconnected():\nrolled back", "note", "start")
    sheet.words(3, 450, "An exception leads from any phase\nto closed, and rolls back.", "note", "start")


DIAGRAMS: dict[str, Callable[[Drawing], None]] = {
    "engine-and-sessions": engine_and_sessions,
    "life-of-a-request": life_of_a_request,
    "phases-of-a-unit": phases_of_a_unit,
}


def draw(name: str, description: str) -> str:
    """Return a diagram as SVG.

    Args:
        name: of the diagram.
        description: for readers who cannot see it.

    Raises:
        KeyError: there is no such diagram.
    """
    sheet = Drawing(name)
    DIAGRAMS[name](sheet)
    return sheet.svg(description)


if __name__ == "__main__":
    folder = Path(*itertools.islice(sys.argv, 1, 2))
    for diagram in DIAGRAMS:
        (folder / f"{diagram}.svg").write_text(draw(diagram, diagram), "utf-8")
