"""The door for adapters: everything that an adapter of a framework needs, and nothing else.

An adapter translates the life of a request into the calls of one object. For a framework that lets it wrap the sending of the
response::

    unit = Unit.enter(policy, request)
    error = None
    try:
        ...                         # run the application; on the way out:
        await unit.head(status)     #   just before the head leaves
        await unit.end_of_body()    #   just before the last byte leaves
        unit.disconnected()         #   when the client has left
    except BaseException as exc:
        error = exc
        raise
    finally:
        await unit.close(error)

Where the framework's end of a request is synchronous, `unit.close_with(task)` once after `enter` takes the place of `close`.
What commits, what rolls back and how it is cleaned up is the unit's affair. Where the framework answers errors inside, so that
`close` never sees them, `explain(error)` adds what the unit would have noted on them.
Where the calls have nothing to wait for they return `NOTHING`, and an adapter need not await it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from ._commit import explain
from ._connect import DBConnect
from ._container import Phase
from ._context import current
from ._policy import BeforeCommitCallback, Policy
from ._settle import NOTHING
from ._unit import Unit
from .errors import UnavailableError

__all__ = [
    "NOTHING",
    "AsyncSession",
    "BeforeCommitCallback",
    "Phase",
    "Policy",
    "Unit",
    "check_connects",
    "close_connects",
    "explain",
    "hidden_unit",
    "retry_after_header",
]


def check_connects(*connects: DBConnect[Any]) -> tuple[DBConnect[Any], ...]:
    """Return the connects that a `setup` was given, or say what was given instead.

    Args:
        connects: all that the application uses.

    Raises:
        TypeError: one of them is no `DBConnect`.
    """
    for connect in connects:
        if not isinstance(connect, DBConnect):
            raise TypeError(f"setup(app, *connects) takes DBConnect objects, not {type(connect).__name__}: setup(app, db, other)")
    return connects


async def close_connects(*connects: DBConnect[Any]) -> None:
    """Close every connect, then raise the first error.

    Args:
        connects: all that the application uses.
    """
    errors: list[Exception] = []
    for connect in connects:
        try:
            await connect.close()
        except Exception as exc:
            errors.append(exc)
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"closing another connect failed as well: {type(other).__name__}: {other}")
        raise errors[0]


def retry_after_header(exc: UnavailableError) -> str:
    """Return the value of the Retry-After header for a 503: whole seconds, at least one.

    Args:
        exc: the error that the answer is for.
    """
    return str(max(1, math.ceil(exc.retry_after or 1)))


@contextmanager
def hidden_unit() -> Iterator[None]:
    """Return a context manager inside which no unit is current: for websocket and lifespan scopes (P11)."""
    token = current.set(None)
    try:
        yield
    finally:
        current.reset(token)
