"""What a test has left open: connections out of their pools, and savepoints of units in its shared transaction."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from context_sqla.testing import unit_label
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction
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
        self._begun: dict[Session, Opened] = {}
        self._shared: tuple[Connection, ...] = ()
        self._own: frozenset[Session] = frozenset()

    @contextmanager
    def watching(self) -> Iterator["Leaks"]:
        """Listen to every pool and session of the process."""
        listeners: list[tuple[Any, str, Any]] = [
            (Pool, "checkout", self._checked_out),
            (Pool, "checkin", self._checked_in),
            (Pool, "detach", self._checked_in),
            (Session, "after_transaction_create", self._after_transaction_create),
            (Session, "after_transaction_end", self._after_transaction_end),
        ]
        for listener in listeners:
            event.listen(*listener)
        try:
            yield self
        finally:
            for listener in listeners:
                event.remove(*listener)

    def begin(self, shared: Iterable[Connection] = (), own: Iterable[Session] = ()) -> None:
        """Forget what is open now: it is not the test's.

        Args:
            shared: connections in whose transaction the application works.
            own: sessions of the test on them.
        """
        self._out.clear()
        self._begun.clear()
        self._shared = tuple(shared)
        self._own = frozenset(own)

    def found(self) -> list[Opened]:
        """Return what has been opened since and is open still."""
        return [*self._out.values(), *self._begun.values()]

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

    def _after_transaction_create(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None and session.bind in self._shared and session not in self._own:
            self._begun[session] = Opened("a transaction is open", unit_label(), caller())

    def _after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            self._begun.pop(session, None)


def report(found: Iterable[Opened]) -> str:
    """Say what was left open, by whom and where, and what to do."""
    lines = "\n".join(f"  * {each}" for each in found)
    return (
        f"this test has left something open:\n{lines}\n"
        "Close it where it was opened ('async with'), and await every task that uses it before the test ends. "
        "A test that leaves it on purpose: @pytest.mark.context_sqla(leak_check=False)"
    )
