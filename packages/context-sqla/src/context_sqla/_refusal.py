"""What is said to whoever comes too late, or at the wrong moment, and what a session carries whose unit has ended (P10)."""

import asyncio
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_session
from sqlalchemy.orm import Session

from ._settle import hold
from .errors import ContextClosedError

REMEDY = "ask db_session() where the work is done, inside 'async with db_context():' or run_in_new_ctx()"
REAL_COMMITS = (
    "in a test that shares one transaction, units end in the reverse order of their begin: a test of units that overlap needs "
    "real commits"
)


class Refusal:
    """What a session carries whose unit has ended (P10).

    Args:
        connect: whose session it is.
        reason: what everybody is told who uses the session.
        limit: seconds for closing it once more.
    """

    __slots__ = ("_connect", "_limit", "_reason")

    def __init__(self, connect: object, reason: str, limit: float) -> None:
        self._connect = connect
        self._reason = reason
        self._limit = limit

    @property
    def message(self) -> str:
        """What is said; few sessions are used too late, and each of them ends."""
        return f"{self._connect!r}: {self._reason}"

    def get_bind(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse every statement."""
        raise ContextClosedError(self.message)

    def close_late(self, sync_session: Session) -> None:
        """Close the session again, whose connection was still being opened when the unit ended."""
        if (session := async_session(sync_session)) is not None:
            hold(self._close(session))

    async def _close(self, session: AsyncSession) -> None:
        await asyncio.sleep(0)  # the error of the statement is on its way out of the session
        async with asyncio.timeout(self._limit):
            await session.close()
