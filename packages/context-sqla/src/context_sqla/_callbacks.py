"""What waits for the next commit of a session, and what is dropped with a rollback (P14)."""

import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeAlias

from sqlalchemy.orm import Session, SessionTransaction

Callback: TypeAlias = Callable[[], Awaitable[Any] | Any]


def awaited(result: Any, what: str) -> Awaitable[Any]:
    """Return what a function gave that has to be asynchronous, or say that it is not."""
    if not inspect.isawaitable(result):
        raise TypeError(f"{what} must be an async function; it returned {type(result).__name__}")
    return result


class Callbacks:
    """The callbacks of one session's transaction, each with the savepoints that were open when it was registered."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callback, tuple[SessionTransaction, ...]]] = []

    def add(self, callback: Callback, session: Session) -> None:
        """Let a callback wait for the session's next commit; it is dropped with the savepoint that is open now."""
        self._waiting.append((callback, tuple(_savepoints(session))))

    def take(self) -> list[Callback]:
        """Return what waits, and let it wait no longer."""
        if not self._waiting:
            return []
        taken, self._waiting = self._waiting, []
        return [callback for callback, _ in taken]

    def drop(self, transaction: SessionTransaction) -> None:
        """Drop what was registered inside a transaction or savepoint that was rolled back."""
        while not transaction.nested and transaction.parent is not None:
            transaction = transaction.parent  # a flush that fails takes its savepoint with it
        self._waiting = [entry for entry in self._waiting if transaction.nested and transaction not in entry[1]]


def _savepoints(session: Session) -> Iterator[SessionTransaction]:
    transaction = session.get_nested_transaction()
    while transaction is not None:
        if transaction.nested:
            yield transaction
        transaction = transaction.parent
