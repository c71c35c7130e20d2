"""The monitor: a task and a kept connection per host, and what is known of all of them as one snapshot."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from ssl import SSLContext
from types import TracebackType
from typing import Any, Final, Self, TypedDict, Unpack
from weakref import WeakSet

from ._address import Address, Driver, Login, parse_host, parse_url
from ._environment import read_environment
from ._failures import is_host_failure, is_read_only
from ._metrics import Metrics
from ._patroni import Hint
from ._poller import Poller
from ._snapshot import Snapshot
from ._tracker import Rules, SplitBrain, Tracker
from ._watch import Attachment, Watch, running_loop


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
    patroni: Mapping[str, str] | None


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
        patroni: the URLs of the hosts' Patroni REST interfaces, `{"db1": "http://db1:8008"}`: a host is no primary where
            another's Patroni says that it leads. A second opinion; what makes a primary is what the server itself says.

    Raises:
        ValueError: a number that cannot be, or a host that is named twice or not at all.
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
        patroni: Mapping[str, str] | None = None,
    ) -> None:
        seconds = (interval, timeout, 1 if stale_after is None else stale_after)
        if not (min(seconds) > 0 and sum(seconds) > 0 and max_fails >= 1 and 0 <= jitter < 1):  # a sum with NaN is NaN
            raise ValueError(
                "interval, timeout and stale_after must be above 0, max_fails at least 1, jitter at least 0 and below 1"
            )
        self.interval: Final[float] = interval
        self.timeout: Final[float] = timeout
        self.jitter: Final[float] = jitter
        self.stale_after: Final[float] = 3 * interval + timeout if stale_after is None else stale_after
        self.locality: str | None = locality
        self._port = port
        self._addresses = _addresses(hosts, port)
        self._login = Login(user, password, database, ssl, driver, dict(driver_options or {}))
        rules = Rules(max_fails, split_brain, require_timeline_evidence, self._keyed(localities), self._keyed(weights))
        self._hint = Hint(self._keyed(patroni)) if patroni else None
        tracker = Tracker(list(self._addresses), rules)
        pace = {"interval": interval, "timeout": timeout, "jitter": jitter, "stale_after": self.stale_after}
        self._watch = Watch(tracker, **pace)
        self.metrics: Metrics = self._watch.metrics
        _all.add(self._watch)

    def __repr__(self) -> str:
        return repr(self._watch)

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
        self._watch.start(self._poller, None if self._hint is None else self._hint.run)

    async def aclose(self) -> None:
        """End the watch: no task and no connection is left; it may be started again."""
        await self._watch.stop()

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
        return self._watch.snapshot

    def subscribe(self, callback: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call a function with each snapshot in which a state, a role or the primary differs; return what ends that.

        Args:
            callback: a plain function that returns at once; its errors are logged.
        """
        subscribers = self._watch.subscribers
        subscribers.append(callback)
        return lambda: subscribers.remove(callback) if callback in subscribers else None

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
        while not _is_ready(self._watch.snapshot, primary, replicas):
            if not await self.changed(deadline - self.clock()):
                break
        snapshot = self._watch.snapshot
        if primary and snapshot.primary is None:
            raise self._no_primary(timeout)
        if not _is_ready(snapshot, primary, replicas):
            from .errors import NoReplicaError  # not before: it brings SQLAlchemy along

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
        while (host := self._watch.ready_primary) is None:
            if not await self.changed(deadline - self.clock()):
                raise self._no_primary(wait)
        return host

    def primary_now(self) -> str | None:
        """Return the primary, None where there is none or something went wrong there that is being looked into.

        Raises:
            MonitorError: the hosts are not watched.
            ForeignLoopError: they are watched in another event loop.
        """
        watch = self._watch
        if watch.loop is None or watch.loop is not running_loop():
            watch.check_loop()
        return watch.ready_primary

    async def changed(self, timeout: float | None = None) -> bool:
        """Wait for the next snapshot, and return whether it came in time.

        Raises:
            MonitorError: the hosts are not watched, or no longer.
        """
        return await self._watch.changed(timeout)

    async def refresh(self, *hosts: str, timeout: float | None = None) -> Snapshot:
        """Probe some hosts now, and return the snapshot after that; all who ask at the same time share the probes.

        Args:
            hosts: which; all, if none is named.
            timeout: seconds to wait for the first of them; None: until all have been probed.
        """
        self._watch.check_loop()
        probes = [self._watch.pollers[self.key(host)].probed() for host in hosts or self._addresses]
        when = asyncio.ALL_COMPLETED if timeout is None else asyncio.FIRST_COMPLETED
        await asyncio.wait(probes, timeout=timeout, return_when=when)
        return self._watch.snapshot

    @property
    def is_watching(self) -> bool:
        """Whether it was started in the running event loop, and has not ended."""
        loop = self._watch.loop
        return loop is not None and loop is running_loop()

    def in_doubt(self, host: str) -> bool:
        """Return whether something went wrong on this host, and no later probe has come back yet."""
        return self._watch.in_doubt(host)

    # What others know

    def report(self, host: str, exc: BaseException) -> bool:
        """Take an error that a session or connection to a host met; return whether the monitor looks into it.

        A lost or refused connection, a server that shuts down and a write that a replica refused make it probe the host at once;
        until the answer, `primary()` waits. Nothing is concluded from the error itself. Other errors are passed over, and so are
        hosts that it does not watch.

        Args:
            host: as `Hosts` was given it, or as a snapshot names it.
            exc: the error, as SQLAlchemy or the driver raised it.
        """
        key, watch = self.key(host), self._watch
        poller, loop = watch.pollers.get(key), watch.loop
        if loop is None or poller is None or not is_host_failure(exc):
            return False
        self.metrics.add("reports_total", host=key)
        anew = is_read_only(exc)
        if loop is running_loop():
            watch.doubt(poller, anew=anew)
        elif not loop.is_closed():
            loop.call_soon_threadsafe(lambda: watch.doubt(poller, anew=anew))
        return True

    def attach(self, attachment: Attachment) -> None:
        """Cut the connections of an application to hosts that die or are fenced; it is kept by a weak reference."""
        self._watch.attached.add(attachment)

    def reset_fence(self) -> None:
        """Forget the highest timeline: for operators, after a deliberate restore to an older one."""
        self._watch.reset_fence()

    def key(self, host: str) -> str:
        """Return the name under which snapshots have a host: "name:port"."""
        return host if host in self._addresses else str(parse_host(host, self._port))

    def address(self, host: str) -> Address:
        """Return name and port of a host.

        Raises:
            KeyError: it is not among those that are watched.
        """
        return self._addresses[self.key(host)]

    def clock(self) -> float:
        """Return the time as snapshots have it: `time.monotonic`."""
        return self._watch.clock()

    # Its own

    def _keyed(self, values: Mapping[str, Any] | None) -> dict[str, Any]:
        keyed = {self.key(host): value for host, value in (values or {}).items()}
        if unknown := keyed.keys() - self._addresses.keys():
            raise ValueError(f"not among the hosts: {', '.join(sorted(unknown))}")
        return keyed

    def _no_primary(self, wait: float) -> Exception:
        from .errors import NoPrimaryError, SplitBrainError

        snapshot = self._watch.snapshot
        if snapshot.split_brain:
            message = f"several hosts say that they are the primary and none can be preferred, waited {wait:g} s"
            return SplitBrainError(message, snapshot)
        return NoPrimaryError(f"there is no primary, waited {wait:g} s", snapshot)

    def _poller(self, watch: Watch, host: str) -> Poller:
        return Poller(host, self._addresses[host], self._login, watch)


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


_all: WeakSet[Watch] = WeakSet()  # what the tasks keep, though nobody may keep `Hosts`


def _forget_all() -> None:
    for watch in list(_all):
        watch.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
