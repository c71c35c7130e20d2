"""What has to come to its end in time, in one event loop: one timer for all, for most of it ends long before."""

import asyncio
from collections.abc import Callable

from ._settle import TIMERS


class Limits:
    """The limits in time of one event loop.

    Args:
        loop: the loop.
    """

    __slots__ = ("_all", "_loop", "_next", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._all: dict[object, tuple[float, Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next: float = 0.0

    def set(self, whose: object, seconds: float, expired: Callable[[], None]) -> None:
        """Call a function after so many seconds, unless the limit is taken back; whoever has a limit gets a new one."""
        at = self._loop.time() + seconds
        self._all[whose] = (at, expired)
        if self._timer is None or at < self._next:
            self._look_at(at)

    def take_back(self, whose: object) -> None:
        """Forget a limit. The timer stays: the next one will need it."""
        self._all.pop(whose, None)

    def _look_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = at
        self._timer = self._loop.call_at(at, self._look, context=TIMERS)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        over = {whose: expired for whose, (at, expired) in self._all.items() if at <= now}
        self._all = {whose: limit for whose, limit in self._all.items() if whose not in over}
        if self._all:
            self._look_at(min(at for at, _ in self._all.values()))
        for expired in over.values():
            expired()
