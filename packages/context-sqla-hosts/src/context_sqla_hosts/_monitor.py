"""The monitor: a task and a kept connection per host, and what is known of all of them as one snapshot."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from ssl import SSLContext
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict, Unpack
from weakref import WeakSet

from context_sqla.errors import ForeignLoopError

from ._address import Address, Driver, Login, parse_host, parse_url
from ._environment import read_environment
from ._failures import is_about_the_host, is_read_only
from ._metrics import Metrics
from ._poller import Poller
from ._snapshot import Snapshot
from ._tracker import Event, Failure, Observation, Rules, SplitBrain, Tracker
from .errors import MonitorError, NoPrimaryError, NoReplicaError, SplitBrainError

logger = logging.getLogger("context_sqla.hosts")


class HostsOptions(TypedDict, total=False):
    """The keyword options of `Hosts` that a URL does not have."""

    driver_options: Mapping[str, Any]
    interval: float
    timeout: float
    max_fails: int
    stale_after: float | None
    split_brain: SplitBrain
    require_timeline_evidence: bool
    jitter: float
    locality: str | None
    localities: Mapping[str, str] | None
    weights: Mapping[str, float] | None


class Attachment(Protocol):
    """Connections of an application that follow the monitor."""

    writes: bool

    def abort(self, host: str) -> int:
        """Cut every connection to a host, and return how many there were."""
        ...


class Hosts:
    """Watch PostgreSQL hosts: which is the primary, how far behind the replicas are.

    `async with hosts:` in the lifespan of the application, or `start()` and `aclose()`. It belongs to that event loop.

    Args:
        hosts: "name" or "name:port"; host and port together are a host's identity.
        user: of the monitor's own connections. With the role `pg_monitor` it also sees the timelines of replicas.
        password: or a function that returns it, for passwords that change.
        database: any database of the cluster.
        ssl: as the driver takes it.
        port: of hosts that name none.
        driver: "asyncpg" or "psycopg"; None: what is installed, asyncpg first.
        driver_options: more arguments for the driver's `connect`.
        interval: seconds between two probes of a host that is well. Events make it look at once.
        timeout: seconds for one probe, connecting included.
        max_fails: probes in a row that may time out until the host counts as dead.
        stale_after: seconds after which an observation no longer counts; None: 3 * interval + timeout.
        split_brain: "fence": the primary of the highest timeline that was ever seen, and none that is older; "refuse": none while
            several hosts claim to be it; "first": the first in the list that claims to be it, as pg-status does.
        require_timeline_evidence: no primary until a replica has confirmed its timeline.
        jitter: the share by which the interval varies, so that many processes do not probe at the same moment.
        locality: where this process is.
        localities: where the hosts are, for `replica(balance="nearest")`.
        weights: the hosts' shares of the reads, 1 where none is given; 0: only if there is no other.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        user: str | None = None,
        password: str | Callable[[], str] | None = None,
        database: str | None = None,
        ssl: SSLContext | str | bool | None = None,
        port: int = 5432,
        driver: Driver | None = None,
        driver_options: Mapping[str, Any] | None = None,
        interval: float = 1.0,
        timeout: float = 0.5,
        max_fails: int = 2,
        stale_after: float | None = None,
        split_brain: SplitBrain = "fence",
        require_timeline_evidence: bool = False,
        jitter: float = 0.1,
        locality: str | None = None,
        localities: Mapping[str, str] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        seconds = (interval, timeout, 1 if stale_after is None else stale_after)
        if not (min(seconds) > 0 and sum(seconds) > 0 and max_fails >= 1 and 0 <= jitter < 1):  # a sum with NaN is NaN
            raise ValueError(
                "interval, timeout and stale_after must be above 0, max_fails at least 1, jitter at least 0 and below 1"
            )
        self.interval: float = interval
        self.timeout: float = timeout
        self.jitter: float = jitter
        self.stale_after: float = 3 * interval + timeout if stale_after is None else stale_after
        self.locality: str | None = locality
        self.metrics: Metrics = Metrics()
        self._port = port
        self._addresses = _addresses(hosts, port)
        self._login = Login(user, password, database, ssl, driver, dict(driver_options or {}))
        rules = Rules(max_fails, split_brain, require_timeline_evidence, self._keyed(localities), self._keyed(weights))
        self._tracker = Tracker(list(self._addresses), rules)
        self._snapshot = self._tracker.snapshot(self.clock())
        self._pollers: dict[str, Poller] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn: asyncio.Future[None] | None = None
        self._ready_primary: str | None = None  # the primary, unless there is a doubt
        self._hurried_since: float | None = None
        self._without_primary_since: float | None = None
        self._subscribers: list[Callable[[Snapshot], None]] = []
        self._attached: WeakSet[Any] = WeakSet()
        _all.add(self)

    def __repr__(self) -> str:
        return f"<Hosts {', '.join(self._addresses)} primary={self._snapshot.primary!r}>"

    @classmethod
    def from_url(cls, url: str, **options: Unpack[HostsOptions]) -> "Hosts":
        """Make a monitor from a URL with several hosts.

        Args:
            url: such as "postgresql+asyncpg://user:password@db1,db2:5433/app?sslmode=require".
            options: the keyword options of `Hosts`.

        Raises:
            ValueError: it is no such URL.
        """
        hosts, login, port = parse_url(url)
        who = {"user": login.user, "password": login.password, "database": login.database, "ssl": login.ssl}
        return cls(hosts, **who, driver=login.driver, port=port, **options)  # type: ignore[arg-type]

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **options: Unpack[HostsOptions]) -> "Hosts":
        """Make a monitor from environment variables: `CONTEXT_SQLA_HOSTS_*`, and those of pg-status, `pg_status__*`.

        Args:
            environ: the variables; None: those of the process.
            options: keyword options of `Hosts` that win over them.

        Raises:
            ValueError: no hosts are given, or a variable cannot be used.
        """
        settings = read_environment(os.environ if environ is None else environ)
        return cls(settings.hosts, **{**settings.options, **options})

    # Its life

    def start(self) -> None:
        """Begin to watch, in the running event loop.

        Raises:
            MonitorError: it watches already.
            DriverError: no driver is installed.
        """
        if self._loop is not None:
            raise MonitorError(f"{self!r} is started already")
        loop = asyncio.get_running_loop()
        self._tracker.restart()
        pollers = {host: Poller(host, address, self._login, self) for host, address in self._addresses.items()}
        self._loop, self._pollers = loop, pollers
        self._without_primary_since = self._hurried_since = self.clock()
        self._publish(())
        self._tasks = [loop.create_task(poller.run(), name=f"watch {poller.host}") for poller in pollers.values()]

    async def aclose(self) -> None:
        """End the watch: no task and no connection is left; it may be started again."""
        if self._loop is None:
            return
        self._check_loop()
        tasks, self._tasks = self._tasks, []
        self._loop, self._ready_primary = None, None
        self._count_absence()
        for task in tasks:
            task.cancel()
        self._wake_waiting()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @asynccontextmanager
    async def lifespan(self, _app: object = None) -> AsyncIterator[None]:
        """Watch as long as the application lives: `FastAPI(lifespan=hosts.lifespan)`."""
        async with self:
            yield

    # What is known

    def snapshot(self) -> Snapshot:
        """Return what is known of the hosts now; costs one attribute."""
        return self._snapshot

    def subscribe(self, callback: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call a function with each snapshot in which a state, a role or the primary differs; return what ends that.

        Args:
            callback: a plain function that returns at once; its errors are logged.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    async def ready(self, *, primary: bool = True, replicas: int = 0, timeout: float = 10.0) -> Snapshot:
        """Wait until the hosts that the application needs are there, and return the snapshot.

        Args:
            primary: wait for a primary.
            replicas: how many replicas there must be.
            timeout: seconds to wait.

        Raises:
            NoPrimaryError: there was no primary in time.
            NoReplicaError: there were not enough replicas in time.
        """
        deadline = self.clock() + timeout
        while not _is_ready(self._snapshot, primary, replicas):
            if not await self.changed(deadline - self.clock()):
                break
        snapshot = self._snapshot
        if primary and snapshot.primary is None:
            raise self._no_primary(timeout)
        if not _is_ready(snapshot, primary, replicas):
            raise NoReplicaError(f"{replicas} replicas were wanted, waited {timeout:g} s", snapshot)
        return snapshot

    async def primary(self, *, wait: float = 5.0) -> str:
        """Return the primary; while there is none, or it is in doubt, wait for it.

        Args:
            wait: seconds to wait.

        Raises:
            NoPrimaryError: there was none in time.
            MonitorError: the hosts are not watched.
            ForeignLoopError: they are watched in another event loop.
        """
        host = self.primary_now()
        if host is not None:
            return host
        deadline = self.clock() + wait
        while (host := self._ready_primary) is None:
            if not await self.changed(deadline - self.clock()):
                raise self._no_primary(wait)
        return host

    def primary_now(self) -> str | None:
        """Return the primary, None where there is none or something went wrong there that is being looked into.

        Raises:
            MonitorError: the hosts are not watched.
            ForeignLoopError: they are watched in another event loop.
        """
        self._check_loop()
        return self._ready_primary

    async def changed(self, timeout: float | None = None) -> bool:
        """Wait for the next snapshot, and return whether it came in time.

        Raises:
            MonitorError: the hosts are not watched, or no longer.
        """
        self._check_loop()
        if timeout is not None and timeout <= 0:
            return False
        if self._turn is None or self._turn.done():
            self._turn = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait((self._turn,), timeout=timeout)
        return bool(done)

    async def refresh(self, *hosts: str, timeout: float | None = None) -> Snapshot:
        """Probe some hosts now, and return the snapshot after that; all who ask at the same time share the probes.

        Args:
            hosts: which; all, if none is named.
            timeout: seconds to wait for the first of them; None: until all have been probed.
        """
        self._check_loop()
        probes = [self._pollers[self.key(host)].probed() for host in hosts or self._addresses]
        when = asyncio.ALL_COMPLETED if timeout is None else asyncio.FIRST_COMPLETED
        await asyncio.wait(probes, timeout=timeout, return_when=when)
        return self._snapshot

    @property
    def is_watching(self) -> bool:
        """Whether it was started in the running event loop, and has not ended."""
        return self._loop is not None and self._loop is _running()

    def in_doubt(self, host: str) -> bool:
        """Return whether something went wrong on this host, and no later probe has come back yet."""
        poller = self._pollers.get(host)
        return poller is not None and poller.doubted

    # What others know

    def report(self, host: str, exc: BaseException) -> bool:
        """Take an error that a session or connection to a host met; return whether the monitor looks into it.

        A lost or refused connection, a server that shuts down and a write that a replica refused make it probe the host at once;
        until the answer, `primary()` waits. Nothing is concluded from the error itself. Other errors are passed over, and so are
        hosts that it does not watch.
        """
        key = self.key(host)
        poller = self._pollers.get(key)
        if self._loop is None or poller is None or not is_about_the_host(exc):
            return False
        self.metrics.add("reports_total", host=key)
        anew = is_read_only(exc)
        if self._loop is _running():
            self.doubt(poller, anew=anew)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.doubt(poller, anew=anew))
        return True

    def attach(self, attachment: Attachment) -> None:
        """Cut the connections of an application to hosts that die or are fenced; it is kept by a weak reference."""
        self._attached.add(attachment)

    def reset_fence(self) -> None:
        """Forget the highest timeline: for operators, after a deliberate restore to an older one."""
        logger.warning("The fence of timelines is reset by hand; it was %s", self._snapshot.fence)
        self._publish(self._tracker.reset_fence())

    def key(self, host: str) -> str:
        """Return the name under which snapshots have a host: "name:port"."""
        return host if host in self._addresses else str(parse_host(host, self._port))

    def address(self, host: str) -> Address:
        """Return name and port of a host.

        Raises:
            KeyError: it is not among those that are watched.
        """
        return self._addresses[self.key(host)]

    # For its pollers

    def clock(self) -> float:
        """Return the time as snapshots have it: `time.monotonic`."""
        return time.monotonic()

    def hurried_since(self) -> float | None:
        """Return since when there has been no primary that answers, None while there is one."""
        return self._hurried_since

    def doubt(self, poller: Poller, *, anew: bool = False) -> None:
        """Look into a host, and let nobody choose it meanwhile who has a choice."""
        known = poller.doubted
        poller.wake(doubt=True, anew=anew)
        if not known:
            self._publish(())

    def answered(self, poller: Poller, result: Observation | Failure, sent: float) -> None:
        """Take the result of a probe."""
        now = self.clock()
        if isinstance(result, Failure):
            self.metrics.add("probe_failures_total", host=poller.host, kind=result.kind)
            events = self._tracker.failed(poller.host, result)
        else:
            self.metrics.observe("probe_seconds", now - sent, host=poller.host)
            events = self._tracker.succeeded(poller.host, result, sent, now)
        self._publish(events)

    # Its own

    def _keyed(self, values: Mapping[str, Any] | None) -> dict[str, Any]:
        keyed = {self.key(host): value for host, value in (values or {}).items()}
        if unknown := keyed.keys() - self._addresses.keys():
            raise ValueError(f"not among the hosts: {', '.join(sorted(unknown))}")
        return keyed

    def _check_loop(self) -> None:
        if self._loop is None:
            raise MonitorError(f"{self!r} is not started; write 'async with hosts:' in the lifespan of the application")
        if self._loop is not _running():
            raise ForeignLoopError(f"{self!r} watches in another event loop; each event loop needs its own")

    def _publish(self, events: Sequence[Event]) -> None:
        old, now = self._snapshot, self.clock()
        new = self._snapshot = self._tracker.snapshot(now)
        for status in new.hosts:
            if (poller := self._pollers.get(status.host)) is not None:
                poller.state = status.state
        self._ready_primary = None if new.primary is None or self.in_doubt(new.primary) else new.primary
        self._hurry(new, now)
        for event in events:
            self._note(event)
        if _outline(old) != _outline(new):
            for callback in tuple(self._subscribers):
                _guarded(callback, new)
        self._wake_waiting()

    def _hurry(self, new: Snapshot, now: float) -> None:
        """Probe all hosts often while there is no primary that answers: none that waits for its interval may hold that up."""
        if new.primary is not None and new.host(new.primary).state == "up":
            self._hurried_since = None
        elif self._hurried_since is None:
            self._hurried_since = now
            for poller in self._pollers.values():
                poller.wake()

    def _note(self, event: Event) -> None:
        """Log and count an event, and cut the connections to a host that must not be used any more."""
        fence = self._snapshot.fence
        if event.kind == "primary":
            self._count_absence()
            self.metrics.add("primary_changes_total")
            logger.info("The primary is %s, timeline %s", event.host, fence)
        elif event.kind == "no_primary":
            self._without_primary_since = self.clock()
            logger.warning("There is no primary: %s", self._snapshot)
        elif event.kind == "split_brain":
            self.metrics.add("split_brains_total")
            logger.error("Several hosts say that they are the primary; used is %s: %s", self._snapshot.primary, self._snapshot)
        elif event.kind == "fence":
            logger.warning("%s has shown timeline %s; primaries of older ones are refused", event.host, fence)
        elif event.kind == "back":
            logger.info("%s answers again", event.host)
        else:
            logger.warning("%s is %s", event.host, event.kind)
            self._abort(event)

    def _abort(self, event: Event) -> None:
        for attachment in tuple(self._attached):
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

    def _no_primary(self, wait: float) -> NoPrimaryError:
        snapshot = self._snapshot
        if snapshot.split_brain:
            message = f"several hosts say that they are the primary and none can be preferred, waited {wait:g} s"
            return SplitBrainError(message, snapshot)
        return NoPrimaryError(f"there is no primary, waited {wait:g} s", snapshot)

    def _forget(self) -> None:
        """Let go of everything after a fork: tasks and sockets belong to the parent process."""
        _abandoned.append((self._pollers, self._tasks, self._loop, self._turn))
        self._pollers, self._tasks, self._loop, self._turn, self._ready_primary = {}, [], None, None, None


def _addresses(hosts: Sequence[str], port: int) -> dict[str, Address]:
    if isinstance(hosts, str):
        raise TypeError("hosts is a list: ['db1', 'db2:5433']; for a URL there is Hosts.from_url")
    addresses = [parse_host(host, port) for host in hosts]
    if not addresses or len(set(addresses)) != len(addresses):
        raise ValueError("hosts needs at least one host, and each only once (name and port)")
    return {str(address): address for address in addresses}


def _is_ready(snapshot: Snapshot, primary: bool, replicas: int) -> bool:
    there = sum(status.state == "up" for status in snapshot.replicas)
    return snapshot.decided and there >= replicas and (snapshot.primary is not None or not primary)


def _outline(snapshot: Snapshot) -> tuple[object, ...]:
    hosts = tuple((status.state, status.role, status.fenced, status.foreign, status.timeline) for status in snapshot.hosts)
    return (snapshot.primary, snapshot.fence, snapshot.split_brain, snapshot.decided, hosts)


def _guarded(function: Callable[[Any], Any], argument: object) -> Any:
    try:
        return function(argument)
    except Exception:
        logger.exception("%r failed; the watch goes on", function)
        return None


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_all: WeakSet[Hosts] = WeakSet()
_abandoned: list[Any] = []  # never collected: a finalizer would close what the parent still uses


def _forget_all() -> None:
    for hosts in list(_all):
        hosts._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
