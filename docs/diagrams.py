"""The diagrams of the documentation, as text: `draw(name, description)` returns one as SVG, whose colours are the page's.

`python docs/diagrams.py FOLDER` writes them as files, to look at; the colours are those of `_static/site.css`.
"""

import itertools
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

WIDTH = 560
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
        head = f'marker-end="url(#{self.name}-head)"'
        self._add(f'<line class="arrow {kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {head}/>', max(y1, y2))

    def line(self, x1: int, y1: int, x2: int, y2: int, kind: str = "lane") -> None:
        """Draw a line."""
        self._add(f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>', max(y1, y2))

    def path(self, way: str, kind: str = "") -> None:
        """Draw a bent arrow."""
        self._add(f'<path class="arrow {kind}" d="{way}" marker-end="url(#{self.name}-head)"/>', 0)

    def svg(self, description: str) -> str:
        """Return the drawing."""
        marker = (
            f'<defs><marker id="{self.name}-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
        )
        title = f'<title id="{self.name}-title">{escape(description)}</title>'
        size = f'viewBox="0 0 {WIDTH} {self.height + 14}"'
        start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="{self.name}-title">'
        return "".join([start, title, marker, *self._parts, "</svg>"])

    def _add(self, part: str, bottom: int) -> None:
        self._parts.append(part)
        self.height = max(self.height, bottom)


def engine_and_sessions(sheet: Drawing) -> None:
    """Draw a connect, its engines and pools, and the units that use them."""
    sheet.box(180, 8, 200, 48, "box strong")
    sheet.words(280, 28, "DBConnect", "code")
    sheet.words(280, 46, "one per database and role", "note")
    for left, host, state in ((8, "db1", "the current host"), (288, "db2", "the host before, until it is idle")):
        sheet.arrow(280, 56, left + 132, 92)
        sheet.box(left, 94, 264, 116)
        sheet.words(left + 132, 116, f"engine for {host}")
        sheet.words(left + 132, 134, "one per host and event loop", "note")
        sheet.words(left + 132, 152, state, "note")
        for number in range(4):
            used = host == "db1" and number == 1
            sheet.box(left + 24 + number * 56, 166, 48, 30, "connection used" if used else "connection")
    sheet.words(280, 236, "a connection is held from a session's first statement to its commit", "note")
    units = ((8, "POST /users", "has sent a statement"), (196, "GET /users", "has asked for a session"), (384, "GET /health", ""))
    for left, label, state in units:
        sheet.box(left, 262, 168, 104, "box unit")
        sheet.words(left + 84, 282, label, "code")
        if state:
            sheet.box(left + 14, 292, 140, 32, "box session")
            sheet.words(left + 84, 313, "AsyncSession", "code")
        sheet.words(left + 84, 346, state or "asked for nothing,\nopened nothing", "note")
    sheet.arrow(92, 292, 110, 198, "strong")
    sheet.words(280, 390, "three units of work, in one event loop", "note")


def life_of_a_request(sheet: Drawing) -> None:
    """Draw who says what to whom, from the request to the end of background work."""
    client, adapter, code, database = 44, 190, 350, 510
    for x, name in ((client, "client"), (adapter, "adapter"), (code, "your code"), (database, "database")):
        sheet.box(x - 42, 8, 84, 28)
        sheet.words(x, 27, name)
    steps: list[tuple[int, int, str, str]] = [
        (client, adapter, "POST /users", ""),
        (adapter, adapter, "Unit.enter(): opens nothing", ""),
        (adapter, code, "the endpoint runs", ""),
        (code, code, "db_session(db): a session", ""),
        (code, database, "BEGIN, INSERT", ""),
        (code, adapter, "response 201", ""),
        (adapter, database, "head(201): flush, look, COMMIT", "strong"),
        (adapter, adapter, "on_commit callbacks", ""),
        (adapter, client, "201, the head", "strong"),
        (adapter, code, "the body runs", ""),
        (code, database, "BEGIN, SELECT: only if asked for", ""),
        (adapter, database, "end_of_body(): COMMIT", "strong"),
        (adapter, client, "the last byte", "strong"),
        (adapter, code, "background tasks", ""),
        (adapter, database, "close(): COMMIT, and all is given back", ""),
    ]
    y = 64
    for x in (client, adapter, code, database):
        sheet.line(x, 36, x, y + 34 * len(steps) - 14)
    for one, other, text, kind in steps:
        if one == other:
            sheet.words(one + 8, y, text, "code small", "start")
        else:
            sheet.words((one + other) // 2, y, text, "small")
            sheet.arrow(one, y + 7, other, y + 7, kind)
        y += 34
    sheet.words(280, y + 12, "If the commit at head() fails, your exception handler answers, and its status decides.", "note")


def phases_of_a_unit(sheet: Drawing) -> None:
    """Draw the phases of a unit and what leads from one to the next."""
    phases = (
        ("handler", "the endpoint runs; the status will decide", "box strong"),
        ("stream", "the head is out; the body may write again", "box"),
        ("background", "the last byte is out; background tasks run", "box"),
        ("closed", "every session is closed; nothing begins here any more", "box"),
    )
    calls = (
        ("head(status)", "commits below 400, rolls back otherwise"),
        ("end_of_body()", "commits what the body wrote, before the last byte"),
        ("close()", "commits what the tasks wrote, closes the sessions"),
    )
    for number, (name, what, kind) in enumerate(phases):
        y = 8 + number * 112
        sheet.box(70, y, 120, 44, kind)
        sheet.words(130, y + 27, name, "code")
        sheet.words(204, y + 27, what, "", "start")
    for number, (call, effect) in enumerate(calls):
        y = 52 + number * 112
        sheet.arrow(130, y, 130, y + 66, "strong")
        sheet.words(204, y + 26, call, "code", "start")
        sheet.words(204, y + 44, effect, "note", "start")
    sheet.path("M70,22 H36 V44 H66", "dashed")
    sheet.words(8, 66, "a commit\nthat failed:\nrolled back,\nonce more", "note", "start")
    sheet.path("M70,142 H36 V254 H66", "dashed")
    sheet.words(8, 276, "disconnected():\nrolled back", "note", "start")
    sheet.words(8, 410, "An exception leads from any phase to closed, and rolls back.", "note", "start")


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
