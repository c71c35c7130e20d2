"""The limits in time of one session: what it waits for, and how long it holds a connection (P7, P16)."""

import asyncio
from typing import Any

from ._around import Owner, Place
from ._connect import DBConnect
from ._lines import Lines
from ._loops import LoopState
from ._settle import TIMERS, logger


class Timed:
    """A session that has limits in time."""

    connect: DBConnect[Any]
    owner: Owner
    lines: Lines
    here: LoopState | None
    place: Place | None
    _limit: float | None
    _held: asyncio.TimerHandle | None

    def arm(self, seconds: float) -> None:
        """Cut the connection if what follows takes longer than this."""
        self._limit = seconds
        (self.here or self.connect._here()).limits.set(self, seconds, self._expired)

    def disarm(self) -> None:
        """Forget the limit."""
        if self._limit is not None:
            self._limit = None
            (self.here or self.connect._here()).limits.take_back(self)

    def _expired(self) -> None:
        if self.place is None:
            self.lines.expire(f"{self.connect!r}: no answer within {self._limit:g} s, so the connection was cut")

    def _warn_later(self) -> None:
        seconds = self.connect.warn_held_after
        if seconds is not None and self._held is None:
            self._held = asyncio.get_running_loop().call_later(seconds, self._warn, seconds, context=TIMERS)

    def _warn(self, seconds: float) -> None:
        logger.warning("%r: %s holds a connection for more than %g s", self.connect, self.owner.label(), seconds)

    def _release(self) -> None:
        self.disarm()
        self.lines.clear()
        if self._held is not None:
            self._held.cancel()
            self._held = None
