"""How many statements a piece of code sends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from ._places import Where, caller

# What a transaction costs is not counted: it differs between a shared transaction and real commits.
_UNCOUNTED = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SET CONSTRAINTS")


@dataclass(frozen=True)
class Query:
    """A statement that was sent.

    Args:
        statement: its text, as the driver got it.
        parameters: what was bound to it; empty where the engine hides parameters.
        where: the line of the user's code that sent it.
    """

    statement: str
    parameters: str
    where: str


@contextmanager
def assert_query_count(expected: int) -> Iterator[list[Query]]:
    """Fail unless the block sends exactly this many statements, and list them where it does not.

    Every engine of the process counts; begin, commit, rollback and savepoints do not. An error in the block is raised as it is.

    Args:
        expected: the number of statements.

    Raises:
        AssertionError: there were more or fewer; the message has them all, with the lines that sent them.
    """
    sent: list[Query] = []

    def note(conn: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if not statement.lstrip().upper().startswith(_UNCOUNTED):
            shown = "" if conn.engine.hide_parameters or not parameters else _cut(repr(parameters))
            sent.append(Query(statement, shown, _where(caller())))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    if len(sent) != expected:
        raise AssertionError(_report(expected, sent))


def _report(expected: int, sent: list[Query]) -> str:
    lines = [f"expected {expected} {'query' if expected == 1 else 'queries'}, sent {len(sent)}"]
    for number, query in enumerate(sent, 1):
        lines.append(f"{number:3}. {query.where}")
        lines += [f"     {line}" for line in query.statement.splitlines()]
        if query.parameters:
            lines.append(f"     {query.parameters}")
    return "\n".join(lines)


def _where(where: Where | None) -> str:
    return "somewhere" if where is None else str(where)


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
