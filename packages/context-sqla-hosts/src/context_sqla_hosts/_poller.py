"""One task that watches one host: when to probe it, with which limits, and what a probe said."""

import asyncio
import contextlib
import logging
import random
from typing import Protocol

from ._address import Address, Login
from ._probe import Probe, classify, make_probe, observe
from ._tracker import Failure, Observation

logger = logging.getLogger("context_sqla.hosts")

_GAP = 0.05  # between two probes of a host that does not answer, whoever asks for them
_HURRY = 0.05  # between two probes while there is no primary
_PATIENCE = 5.0  # seconds until the hurry gets slower
_FIRST_BACKOFF = 0.1
_DEAD_CAP = 2.0
_DEAD_CAP_IN_A_HURRY = 0.25
_GOODBYE = 1.0
_LOOK_AGAIN = 60.0  # between two looks at the files of a replica's log: it lists a directory
_LOOK_SOON = 0.5  # the same where nothing else tells its timeline
_BLOCKED = 0.02  # by which a timer is late where the event loop was blocked
_CHANCES = 3
_TURNS = 5  # of the event loop, from a packet that is there to the end of the probe


class Keeper(Protocol):
    """What a poller asks of its monitor."""

    interval: float
    timeout: float
    jitter: float

    def clock(self) -> float:
        """Return the time."""
        ...

    def hurried_since(self) -> float | None:
        """Return since when there has been no primary that answers."""
        ...

    def doubt(self, poller: "Poller", *, anew: bool = False) -> None:
        """Take it that something went wrong on the host."""
        ...

    def answered(self, poller: "Poller", result: Observation | Failure, sent: float) -> None:
        """Take the result of a probe."""
        ...


class Poller:
    """Watch one host with one connection; a probe that hangs delays nobody else.

    Args:
        host: its name.
        address: where it is.
        login: how to reach it.
        keeper: the monitor.
    """

    def __init__(self, host: str, address: Address, login: Login, keeper: Keeper) -> None:
        self.host: str = host
        self.doubted: bool = False  # something went wrong there, and no probe that was sent later has come back
        self.state: str = "unknown"
        self._address = address
        self._login = login
        self._keeper = keeper
        self._probe: Probe = self._new_probe()
        self._doubts = 0
        self._anew = False
        self._wake = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._stragglers: set[asyncio.Task[Observation]] = set()
        self._backoff = _FIRST_BACKOFF
        self._failed_at: float | None = None
        self._looked_at: float = float("-inf")
        self._streaming = False

    def wake(self, *, doubt: bool = False, anew: bool = False) -> None:
        """Probe as soon as possible, even if a probe is on its way.

        Args:
            doubt: something went wrong there.
            anew: over a new connection: behind a proxy, the one that is kept may lead to another server than new ones do.
        """
        self.doubted = self.doubted or doubt
        self._doubts += doubt
        self._anew = self._anew or anew
        self._wake.set()

    def probed(self) -> "asyncio.Future[None]":
        """Return what is done when a probe that has not begun yet has ended; all who ask meanwhile share one probe."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._wake.set()
        return future

    async def run(self) -> None:
        """Probe for ever."""
        try:
            while True:
                try:
                    await self._once()
                except Exception:
                    logger.exception("An error in the watch of %s; it goes on", self.host)
                await self._pause()
        finally:
            self._probe.lost = None
            self._probe.cut()
            for future in self._waiting:
                future.cancel()
            await self._say_goodbye()

    async def _once(self) -> None:
        self._wake.clear()
        waiting, self._waiting = self._waiting, []
        try:
            await self._look()
        finally:
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def _look(self) -> None:
        """Probe, and tell the monitor."""
        doubts = self._doubts
        if self._anew:
            self._anew = False
            self._replace(self._probe)
        kept, sent = self._probe.is_open(), self._keeper.clock()
        result = await self._ask()
        if kept and isinstance(result, Failure) and result.hard:
            # Its connection was ended, which an administrator may do: the server is dead if it takes no new one.
            sent = self._keeper.clock()
            result = await self._ask()
        failed = isinstance(result, Failure)
        if self._doubts == doubts and not (isinstance(result, Failure) and result.kind == "timeout"):  # which is no answer
            self.doubted = False
        self._failed_at = self._keeper.clock() if failed else None
        self._backoff = min(self._backoff * 2, max(_DEAD_CAP, self._keeper.interval)) if failed else _FIRST_BACKOFF
        self._keeper.answered(self, result, sent)

    async def _ask(self) -> Observation | Failure:
        """Probe once, within the limit."""
        probe, now = self._probe, self._keeper.clock()
        look = not probe.is_open() or now - self._looked_at > (_LOOK_AGAIN if self._streaming else _LOOK_SOON)
        connecting = not probe.is_open()
        task = asyncio.get_running_loop().create_task(observe(probe, look_for_evidence=look))
        self._stragglers.add(task)
        try:
            await self._within_the_limit(task)
        finally:
            if not task.done():
                self._give_up(task, probe, connecting=connecting and not probe.is_open())
        if not task.done():
            return Failure("timeout", hard=False)
        self._stragglers.discard(task)
        try:
            observation = task.result()
        except Exception as exc:  # whatever a driver raises is an answer
            self._replace(probe)
            return classify(exc)
        self._looked_at = now if look else self._looked_at
        self._streaming = observation.timeline is not None
        return observation

    async def _within_the_limit(self, task: "asyncio.Task[Observation]") -> None:
        """Wait for a probe; time in which the event loop was blocked is not the server's and does not count."""
        clock, limit = self._keeper.clock, self._keeper.timeout
        for _ in range(_CHANCES):
            due = clock() + limit
            await asyncio.wait((task,), timeout=limit)
            if task.done() or clock() - due < _BLOCKED:
                break
        for _ in range(_TURNS):
            if not task.done():  # the answer may have come together with the end of the wait
                await asyncio.sleep(0)

    def _give_up(self, task: "asyncio.Task[Observation]", probe: Probe, *, connecting: bool) -> None:
        # Cancelling a query makes psycopg ask the server, which hangs, to cancel it: the socket is cut instead.
        self._replace(probe)
        if connecting:
            task.cancel()
        task.add_done_callback(lambda done: self._over(done, probe))

    def _over(self, task: "asyncio.Task[Observation]", probe: Probe) -> None:
        self._stragglers.discard(task)
        if not task.cancelled():
            task.exception()
        probe.cut()  # a driver may have swallowed the cancellation, and connected

    def _replace(self, probe: Probe) -> None:
        probe.lost = None
        probe.cut()
        self._probe = self._new_probe()

    def _new_probe(self) -> Probe:
        probe = make_probe(self._address, self._login)
        probe.lost = self._lost
        return probe

    def _lost(self) -> None:
        self._keeper.doubt(self)

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._delay()):
                await self._wake.wait()
        if self._failed_at is not None:
            await asyncio.sleep(self._failed_at + _GAP - self._keeper.clock())

    def _delay(self) -> float:
        keeper = self._keeper
        since = keeper.hurried_since()
        if self.state == "dead":
            delay = self._backoff if since is None else min(self._backoff, _DEAD_CAP_IN_A_HURRY)
        elif since is not None:
            late = max(0.0, keeper.clock() - since - _PATIENCE)
            delay = min(keeper.interval, _HURRY * 1.5 ** min(late, 20))
        elif self.state == "suspect":
            delay = min(_GAP, keeper.interval)
        else:
            delay = keeper.interval
        return delay * random.uniform(1 - keeper.jitter, 1 + keeper.jitter)  # noqa: S311  # no secret

    async def _say_goodbye(self) -> None:
        if self._stragglers:  # their sockets are cut: they end by themselves
            await asyncio.wait(tuple(self._stragglers), timeout=_GOODBYE)
        for task in tuple(self._stragglers):
            task.cancel()
        if self._stragglers:
            await asyncio.wait(tuple(self._stragglers), timeout=_GOODBYE)
