"""What watches: it keeps the pollers, turns what they find into snapshots, and tells everybody who has to know."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakSet

from ._metrics import Metrics
from ._poller import Poller
from ._snapshot import Snapshot
from ._tracker import Claim, Event, Failure, Observation, Tracker

logger = logging.getLogger("context_sqla.hosts")
running_loop = asyncio._get_running_loop  # None where none runs; every choice of a host asks


class Attachment(Protocol):
    """Connections of an application that follow the monitor."""

    writes: bool

    def abort(self, host: str) -> int:
        """Cut every connection to a host, and return how many there were."""
        ...


class Watch:
    """The moving part of a monitor; `Hosts` is what others see of it.

    Args:
        tracker: the state machine.
        interval: seconds between two probes of a host that is well.
        timeout: seconds for one probe.
        jitter: the share by which the interval varies.
        stale_after: seconds after which what was said is no longer believed.
    """

    def __init__(self, tracker: Tracker, *, interval: float, timeout: float, jitter: float, stale_after: float) -> None:
        self.interval: float = interval
        self.timeout: float = timeout
        self.jitter: float = jitter
        self.stale_after: float = stale_after
        self.clock: Callable[[], float] = time.monotonic
        self.metrics: Metrics = Metrics()
        self.snapshot: Snapshot = tracker.snapshot(self.clock())
        self.ready_primary: str | None = None  # the primary, unless there is a doubt
        self.loop: asyncio.AbstractEventLoop | None = None
        self.pollers: dict[str, Poller] = {}
        self.subscribers: list[Callable[[Snapshot], None]] = []
        self.attached: WeakSet[Any] = WeakSet()
        self._tracker = tracker
        self._tasks: list[asyncio.Task[None]] = []
        self._turn: asyncio.Future[None] | None = None
        self._hurried_since: float | None = None
        self._without_primary_since: float | None = None

    def __repr__(self) -> str:
        return f"<Hosts {', '.join(status.host for status in self.snapshot)} primary={self.snapshot.primary!r}>"

    # Its life

    def start(
        self,
        make_poller: Callable[["Watch", str], Poller],
        advise: Callable[["Watch"], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Begin to watch, in the running event loop.

        Args:
            make_poller: makes what watches one host.
            advise: asks somebody else who leads, as long as it lasts.

        Raises:
            MonitorError: it watches already.
        """
        if self.loop is not None:
            from .errors import MonitorError

            raise MonitorError(f"{self!r} is started already")
        loop = asyncio.get_running_loop()
        self._tracker.restart()
        pollers = {status.host: make_poller(self, status.host) for status in self.snapshot}
        self.loop, self.pollers = loop, pollers
        self._without_primary_since = self._hurried_since = self.clock()
        self.publish(())
        self._tasks = [loop.create_task(poller.run(), name=f"watch {poller.host}") for poller in pollers.values()]
        if advise is not None:
            self._tasks.append(loop.create_task(advise(self), name="ask Patroni"))

    async def stop(self) -> None:
        """End the watch: no task and no connection is left."""
        if self.loop is None:
            return
        self.check_loop()
        tasks, self._tasks = self._tasks, []
        self.loop, self.ready_primary = None, None
        self._count_absence()
        for task in tasks:
            task.cancel()
        self._wake_waiting()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self) -> None:
        """Let go of everything after a fork: tasks and sockets belong to the parent process."""
        _abandoned.append((self.pollers, self._tasks, self.loop, self._turn))
        self.pollers, self._tasks, self.loop, self._turn, self.ready_primary = {}, [], None, None, None

    def check_loop(self) -> None:
        """Raise unless the hosts are watched in the running event loop.

        Raises:
            MonitorError: they are not watched.
            ForeignLoopError: they are watched in another event loop.
        """
        if self.loop is not None and self.loop is running_loop():
            return
        from context_sqla.errors import ForeignLoopError  # not before: it brings SQLAlchemy along

        from .errors import MonitorError

        if self.loop is None:
            raise MonitorError(f"{self!r} is not started; write 'async with hosts:' in the lifespan of the application")
        raise ForeignLoopError(f"{self!r} watches in another event loop; each event loop needs its own")

    async def changed(self, timeout: float | None) -> bool:
        """Wait for the next snapshot, and return whether it came in time."""
        self.check_loop()
        if timeout is not None and timeout <= 0:
            return False
        if self._turn is None or self._turn.done():
            self._turn = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait((self._turn,), timeout=timeout)
        return bool(done)

    def reset_fence(self) -> None:
        """Forget the highest timeline."""
        logger.warning("The fence of timelines is reset by hand; it was %s", self.snapshot.fence)
        self.publish(self._tracker.reset_fence())

    def in_doubt(self, host: str) -> bool:
        """Return whether something went wrong on this host, and no later probe has come back yet."""
        poller = self.pollers.get(host)
        return poller is not None and poller.doubted

    # For its pollers

    def hurried_since(self) -> float | None:
        """Return since when there has been no primary that answers, None while there is one."""
        return self._hurried_since

    def doubt(self, poller: Poller, *, anew: bool = False) -> None:
        """Look into a host, and let nobody choose it meanwhile who has a choice.

        Args:
            poller: the host's.
            anew: over a new connection.
        """
        known = poller.doubted
        poller.wake(doubt=True, anew=anew)
        if not known:
            self.publish(())

    def answered(self, poller: Poller, result: Observation | Failure, sent: float) -> None:
        """Take the result of a probe.

        Args:
            poller: the host's.
            result: what it said, or why it said nothing.
            sent: when it was asked.
        """
        now = self.clock()
        if isinstance(result, Failure):
            self.metrics.add("probe_failures_total", host=poller.host, kind=result.kind)
            events = self._tracker.failed(poller.host, result)
        else:
            self.metrics.observe("probe_seconds", now - sent, host=poller.host)
            events = self._tracker.succeeded(poller.host, result, sent, now)
        self.publish(events)

    def advised(self, claims: Mapping[str, Claim]) -> None:
        """Take what Patroni says of who leads."""
        self.publish(self._tracker.advised(claims))

    # What it makes of that

    def publish(self, events: Sequence[Event]) -> None:
        """Make a new snapshot, and tell everybody."""
        old, now = self.snapshot, self.clock()
        new = self.snapshot = self._tracker.snapshot(now)
        for status in new.hosts:
            if (poller := self.pollers.get(status.host)) is not None:
                poller.state = status.state
        self.ready_primary = None if new.primary is None or self.in_doubt(new.primary) else new.primary
        self._hurry(new, now)
        for event in events:
            self._note(event)
        if _outline(old) != _outline(new):
            for callback in tuple(self.subscribers):
                _guarded(callback, new)
        self._wake_waiting()

    def _hurry(self, new: Snapshot, now: float) -> None:
        """Probe all hosts often while there is no primary that answers: none that waits for its interval may hold that up."""
        if new.primary is not None and new.host(new.primary).state == "up":
            self._hurried_since = None
        elif self._hurried_since is None:
            self._hurried_since = now
            for poller in self.pollers.values():
                poller.wake()

    def _note(self, event: Event) -> None:
        """Log and count an event, and cut the connections to a host that must not be used any more."""
        fence = self.snapshot.fence
        if event.kind == "primary":
            self._count_absence()
            self.metrics.add("primary_changes_total")
            logger.info("The primary is %s, timeline %s", event.host, fence)
        elif event.kind == "no_primary":
            self._without_primary_since = self.clock()
            logger.warning("There is no primary: %s", self.snapshot)
        elif event.kind == "split_brain":
            self.metrics.add("split_brains_total")
            logger.error("Several hosts say that they are the primary; used is %s: %s", self.snapshot.primary, self.snapshot)
        elif event.kind == "fence":
            logger.warning("%s has shown timeline %s; primaries of older ones are refused", event.host, fence)
        elif event.kind == "back":
            logger.info("%s answers again", event.host)
        else:
            logger.warning("%s is %s", event.host, event.kind)
            self._abort(event)

    def _abort(self, event: Event) -> None:
        for attachment in tuple(self.attached):
            if event.kind != "demoted" or attachment.writes:
                count = _guarded(attachment.abort, event.host)
                if count:
                    self.metrics.add("aborted_connections_total", count, host=event.host)

    def _count_absence(self) -> None:
        if self._without_primary_since is not None:
            self.metrics.add("no_primary_seconds_total", self.clock() - self._without_primary_since)
            self._without_primary_since = None

    def _wake_waiting(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and not turn.done():
            turn.set_result(None)


def _outline(snapshot: Snapshot) -> tuple[object, ...]:
    hosts = tuple((status.state, status.role, status.fenced, status.foreign, status.timeline) for status in snapshot.hosts)
    return (snapshot.primary, snapshot.fence, snapshot.split_brain, snapshot.decided, hosts)


def _guarded(function: Callable[[Any], Any], argument: object) -> Any:
    try:
        return function(argument)
    except Exception:
        logger.exception("%r failed; the watch goes on", function)
        return None


_abandoned: list[Any] = []  # never collected: a finalizer would close what the parent still uses
