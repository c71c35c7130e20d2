"""The connections of one session's open transaction: asked, cut, and remembered when they were prepared."""

import asyncio
from collections.abc import Iterator

from sqlalchemy.engine import Connection, TwoPhaseTransaction
from sqlalchemy.ext.asyncio import AsyncEngine

from . import _drivers
from ._engines import Line, line_of_new


class Prepared:
    """A transaction that was, or may have been, prepared."""

    def __init__(self, engine: AsyncEngine, gid: str, line: Line) -> None:
        self.engine: AsyncEngine = engine
        self.gid: str = gid
        self.line: Line = line
        self.pid: int = _drivers.backend_pid(line.driver)


class Lines:
    """The connections that a session has begun a transaction on."""

    def __init__(self) -> None:
        self._all: list[tuple[Connection, Line]] = []
        self.whole: bool = True  # all are noted: none was begun before, none is of an engine that is not watched

    def __bool__(self) -> bool:
        return bool(self._all)

    def __iter__(self) -> Iterator[tuple[Connection, Line]]:
        """Iterate over those that are not back in the pool."""
        return (each for each in self._all if not each[0].closed)

    def add(self, connection: Connection) -> None:
        """Note a connection; one whose engine is not watched cannot be asked."""
        if (line := line_of_new(connection)) is not None:
            self._all.append((connection, line))
        else:
            self.whole = False

    def clear(self) -> None:
        """Forget them: the transaction is over."""
        self._all.clear()
        self.whole = True

    def are_running(self) -> bool:
        """Return whether a statement is running on one of them."""
        for _, line in self._all:  # each commit asks, several times
            if (line.running and line.is_running()) or (not line.keeps_task and _drivers.is_locked(line.driver)):
                return True
        return False

    def have_cursors(self) -> bool:
        """Return whether a server-side cursor was opened on one of them."""
        for _, line in self._all:  # noqa: SIM110
            if line.cursor:
                return True
        return False

    def are_ready(self) -> bool:
        """Return whether a COMMIT may be sent at once: no statement runs or has failed, and no server-side cursor was opened."""
        if not self.keep_task():
            return False
        line = self._all[0][1]
        return not (line.failure or line.running or line.cursor)

    def keep_task(self) -> bool:
        """Return whether there is one, known, and its driver never cancels the task in which it is awaited."""
        return self.whole and len(self._all) == 1 and self._all[0][1].keeps_task  # P7: between two COMMITs listeners may wait

    def are_sending(self) -> bool:
        """Return whether a COMMIT is on its way on one of them."""
        return any(line.sending for _, line in self._all)

    async def are_fetching(self, timeout: float) -> bool:
        """Return whether rows of a server-side cursor are on their way; one that does not answer in time is cut."""
        for _, line in self:
            if line.cursor:
                limit = asyncio.get_running_loop().call_later(timeout, _drivers.cut, line.driver)
                try:
                    if await _drivers.is_fetching(line.driver):
                        return True
                finally:
                    limit.cancel()
        return False

    def are_dead(self) -> bool:
        """Return whether the driver knows that one of them is lost."""
        return any(_drivers.is_closed(line.driver) for _, line in self._all)

    def are_committing(self) -> bool:
        """Return whether a COMMIT was sent on one of them."""
        return any(line.committing for _, line in self._all)

    def failed(self, *, cancelled_only: bool) -> list[tuple[Connection, Line]]:
        """Return those on which a statement of this transaction has failed (P4a)."""
        self.are_running()
        return [(each, line) for each, line in self if line.failure and (line.cancelled or not cancelled_only)]

    def cut(self, reason: str) -> bool:
        """Cut them because their unit ends, and return whether they are dead now."""
        dead = True
        for _, line in self:
            line.ended = line.ended or reason
            dead = _drivers.cut(line.driver) and dead
        return dead

    def expire(self, reason: str) -> None:
        """Cut them because the database gives no answer."""
        for _, line in self:
            line.expired = reason
            _drivers.cut(line.driver)

    def prepared(self) -> list[Prepared]:
        """Return the two-phase transactions on them, which may be prepared from now on."""
        found = [(each, line, each.get_transaction()) for each, line in self]
        return [
            Prepared(AsyncEngine(each.engine), str(transaction.xid), line)
            for each, line, transaction in found
            if isinstance(transaction, TwoPhaseTransaction)
        ]
