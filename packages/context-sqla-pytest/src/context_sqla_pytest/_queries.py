"""How many statements a piece of code sends."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any

from context_sqla.testing import unit_label
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
        where: the line of the user's code that sent it, and the request or other unit for which it did.
    """

    statement: str
    parameters: str
    where: str


class assert_query_count:  # noqa: N801  # it reads as the function that it would be, if its frames could be hidden
    """Fail unless the block sends exactly this many statements, and list them where it does not.

    `with assert_query_count(2) as queries:` gives the list that grows. Every engine of the process counts; begin, commit,
    rollback and savepoints do not. An error in the block is raised as it is.

    Args:
        expected: the number of statements.

    Raises:
        AssertionError: there were more or fewer; the message has them all, with the lines that sent them.
    """

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._sent: list[Query] = []

    def __enter__(self) -> list[Query]:
        event.listen(Engine, "before_cursor_execute", self._note)
        return self._sent

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        __tracebackhide__ = True
        event.remove(Engine, "before_cursor_execute", self._note)
        if exc is None and len(self._sent) != self._expected:
            raise AssertionError(_report(self._expected, self._sent))

    def _note(self, conn: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if not statement.lstrip().upper().startswith(_UNCOUNTED):
            shown = "" if conn.engine.hide_parameters or not parameters else _cut(repr(parameters))
            self._sent.append(Query(statement, shown, _where(caller(), unit_label())))


def _report(expected: int, sent: list[Query]) -> str:
    lines = [f"expected {expected} {'query' if expected == 1 else 'queries'}, sent {len(sent)}"]
    for number, query in enumerate(sent, 1):
        lines.append(f"{number:3}. {query.where}")
        lines += [f"     {line}" for line in query.statement.splitlines()]
        if query.parameters:
            lines.append(f"     {query.parameters}")
    return "\n".join(lines)


def _where(where: Where | None, label: str | None) -> str:
    place = "somewhere" if where is None else str(where)
    return f"{place}, for {label}" if label else place


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
