"""What a test has left open: connections out of their pools, and savepoints of units in its shared transaction."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from context_sqla.testing import unit_label
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import Pool

from ._places import Where, caller


@dataclass(frozen=True)
class Opened:
    """Who opened something, and where."""

    what: str
    label: str | None
    where: Where | None

    def __str__(self) -> str:
        by = f" by {self.label}" if self.label else ""
        if self.where is None:
            return f"{self.what}, opened{by}"
        return f"{self.what}, opened{by} at {self.where}\n      {self.where.source}"


class Leaks:
    """Follows what is opened and closed; one for the process."""

    def __init__(self) -> None:
        self._out: dict[Any, Opened] = {}
        self._savepoints: dict[tuple[int, str], Opened] = {}

    @contextmanager
    def watching(self) -> Iterator["Leaks"]:
        """Listen to every pool and engine of the process."""
        listeners: list[tuple[Any, str, Any]] = [
            (Pool, "checkout", self._checked_out),
            (Pool, "checkin", self._checked_in),
            (Pool, "detach", self._checked_in),
            (Engine, "before_cursor_execute", self._before),
            (Engine, "release_savepoint", self._ended),
            (Engine, "rollback_savepoint", self._ended),
        ]
        for listener in listeners:
            event.listen(*listener)
        try:
            yield self
        finally:
            for listener in listeners:
                event.remove(*listener)

    def begin(self) -> None:
        """Forget what is open now: it is not the test's."""
        self._out.clear()
        self._savepoints.clear()

    def found(self) -> list[Opened]:
        """Return what has been opened since and is open still."""
        return [*self._out.values(), *self._savepoints.values()]

    async def settled(self, seconds: float) -> list[Opened]:
        """Return what is left after giving clean-up that is on its way the time to end."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (found := self.found()) and loop.time() < end:  # noqa: ASYNC110  # nothing tells that all is back
            await asyncio.sleep(0.01)
        return found

    # What SQLAlchemy tells

    def _checked_out(self, dbapi: Any, record: Any, proxy: Any) -> None:
        self._out[record] = Opened("a connection is checked out", unit_label(), caller())

    def _checked_in(self, dbapi: Any, record: Any) -> None:
        self._out.pop(record, None)

    def _before(self, conn: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        # The event of the savepoint itself does not tell its name.
        if statement.startswith("SAVEPOINT ") and (label := unit_label()) is not None:  # the test's own session is its affair
            self._savepoints[id(conn), statement.removeprefix("SAVEPOINT ")] = Opened("a transaction is open", label, caller())

    def _ended(self, conn: Connection, name: str, context: Any) -> None:
        # Savepoints are a stack: those inside this one, which were opened later, end with it.
        if (id(conn), name) in self._savepoints:
            inside = False
            for key in list(self._savepoints):
                inside = inside or key == (id(conn), name)
                if inside and key[0] == id(conn):
                    del self._savepoints[key]


def report(found: Iterable[Opened]) -> str:
    """Say what was left open, by whom and where, and what to do."""
    lines = "\n".join(f"  * {each}" for each in found)
    return (
        f"this test has left something open:\n{lines}\n"
        "Close it where it was opened ('async with'), and await every task that uses it before the test ends. "
        "A test that leaves it on purpose: @pytest.mark.context_sqla(leak_check=False)"
    )
