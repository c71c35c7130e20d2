"""Which errors of an application's sessions say something about the host."""

import asyncio
from typing import Any

from ._probe import sqlstate_of

_READ_ONLY = "25006"


def is_read_only(exc: BaseException) -> bool:
    """Return whether a write was refused because the server is a replica, or the transaction read-only."""
    return any(sqlstate_of(error) == _READ_ONLY for error in _chain(exc))


def is_host_failure(exc: BaseException) -> bool:
    """Return whether an error tells that the server may be dead, shutting down, or no primary any more: asking again may help.

    It is true of lost and refused connections and of writes that a replica refused, also where SQLAlchemy or a driver has wrapped
    them, and false of all that the statement itself is to blame for. Whether a commit was done is not known after such an error.

    Args:
        exc: what a session, an engine or a driver raised.
    """
    return any(_is_loss(error) for error in _chain(exc))


def _is_loss(exc: BaseException) -> bool:
    state = sqlstate_of(exc)
    if state:
        return state.startswith(("08", "57P")) or state == _READ_ONLY
    if isinstance(exc, asyncio.CancelledError):
        return False
    wrapped: Any = exc
    if getattr(wrapped, "orig", None) is not None:  # SQLAlchemy's error around the driver's
        return wrapped.connection_invalidated is True if hasattr(exc, "connection_invalidated") else False
    return isinstance(exc, OSError) or type(exc).__name__ == "OperationalError"


def _chain(exc: BaseException) -> list[BaseException]:
    """Return the error, and what SQLAlchemy and the drivers have wrapped in it."""
    found: list[BaseException] = []
    current: BaseException | None = exc
    while current is not None and current not in found and len(found) < 5:
        found.append(current)
        original = getattr(current, "orig", None)
        current = original if isinstance(original, BaseException) else current.__cause__
    return found
