"""The diagrams of the documentation, as text: `draw(name, description)` returns one as SVG, whose colours are the page's.

`python docs/diagrams.py FOLDER` writes them as files, to look at; the colours are those of `_static/site.css`.
"""

import itertools
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

WIDTH = 440
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
    sheet.box(130, 8, 180, 48, "box strong")
    sheet.words(220, 28, "DBConnect", "code")
    sheet.words(220, 46, "one per database and role", "note")
    for left, host, state in ((6, "db1", "the current host"), (226, "db2", "the host before")):
        sheet.arrow(220, 56, left + 104, 91)
        sheet.box(left, 94, 208, 116)
        sheet.words(left + 104, 116, f"engine for {host}")
        sheet.words(left + 104, 134, "one per host and event loop", "note")
        sheet.words(left + 104, 152, state, "note")
        for number in range(4):
            used = host == "db1" and number == 1
            sheet.box(left + 14 + number * 46, 166, 40, 28, "connection used" if used else "connection")
    units = (
        (6, "POST /users", "has sent\na statement"),
        (154, "GET /users", "has asked\nfor a session"),
        (302, "GET /health", "asked for nothing,\nopened nothing"),
    )
    for left, label, state in units:
        sheet.box(left, 246, 132, 120, "box unit")
        sheet.words(left + (58 if label.startswith("POST") else 66), 266, label, "code")  # beside the arrow
        if "nothing" not in state:
            sheet.box(left + 10, 278, 112, 30, "box session")
            sheet.words(left + 66, 298, "AsyncSession", "code")
        sheet.words(left + 66, 332, state, "note")
    sheet.arrow(118, 278, 92, 197, "strong")
    sheet.words(220, 392, "three units of work; a connection is held from\nthe first statement to the commit", "note")


def life_of_a_request(sheet: Drawing) -> None:
    """Draw who says what to whom, from the request to the end of background work."""
    client, adapter, code, database = 40, 146, 280, 396
    steps: list[tuple[int, int, str, str]] = [
        (client, adapter, "POST /users", ""),
        (adapter, adapter, "Unit.enter()", ""),
        (adapter, code, "the endpoint runs", ""),
        (code, code, "db_session(db)", ""),
        (code, database, "BEGIN, INSERT", ""),
        (code, adapter, "response 201", ""),
        (adapter, database, "head(201): flush, look, COMMIT", "strong"),
        (adapter, adapter, "on_commit", ""),
        (adapter, client, "201, the head", "strong"),
        (adapter, code, "the body runs", ""),
        (code, database, "BEGIN, SELECT", ""),
        (adapter, database, "end_of_body(): COMMIT", "strong"),
        (adapter, client, "the last byte", "strong"),
        (adapter, code, "background tasks", ""),
        (code, database, "BEGIN, UPDATE", ""),
        (adapter, database, "close(): COMMIT", "strong"),
    ]
    y = 62
    for x, name in ((client, "client"), (adapter, "adapter"), (code, "your code"), (database, "database")):
        sheet.line(x, 36, x, y + 32 * len(steps) - 12)
        sheet.box(x - 38, 8, 76, 28)
        sheet.words(x, 27, name)
    for one, other, text, kind in steps:
        if one == other:
            sheet.words(one + 6, y, text, "code small", "start")
        else:
            sheet.words((one + other) // 2, y, text, "small")
            sheet.arrow(one, y + 7, other, y + 7, kind)
        y += 32
    sheet.words(220, y + 12, "If the commit at head() fails, your exception handler\nanswers, and its status decides.", "note")


def phases_of_a_unit(sheet: Drawing) -> None:
    """Draw the phases of a unit and what leads from one to the next."""
    phases = (
        ("handler", "the endpoint runs", "box strong"),
        ("stream", "the head is out, the body goes on", "box"),
        ("background", "the last byte is out, tasks run", "box"),
        ("closed", "nothing begins here any more", "box"),
    )
    calls = (
        ("head(status)", "commits below 400,\nrolls back otherwise"),
        ("end_of_body()", "commits what the body wrote,\nbefore the last byte"),
        ("close()", "commits what the tasks wrote,\ncloses the sessions"),
    )
    for number, (name, what, kind) in enumerate(phases):
        y = 8 + number * 124
        sheet.box(60, y, 120, 44, kind)
        sheet.words(120, y + 27, name, "code")
        sheet.words(194, y + 27, what, "", "start")
    for number, (call, effect) in enumerate(calls):
        y = 52 + number * 124
        sheet.arrow(120, y, 120, y + 78, "strong")
        sheet.words(194, y + 24, call, "code", "start")
        sheet.words(194, y + 42, effect, "note", "start")
    sheet.path("M60,20 H28 V42 H56", "dashed")
    sheet.words(6, 74, "commit failed:\nrolled back,\nonce more", "note", "start")
    sheet.path("M60,154 H28 V278 H56", "dashed")
    sheet.words(6, 320, "disconnected():\nrolled back", "note", "start")
    sheet.words(6, 452, "An exception leads from any phase to closed, and rolls back.", "note", "start")


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
