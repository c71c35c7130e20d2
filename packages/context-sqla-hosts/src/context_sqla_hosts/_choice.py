"""The handlers of `DBConnect`: which host the next session gets."""

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary, ref

from context_sqla import DBConnect

from ._engine import Following, watch_engine
from ._floor import Floor, visit_of
from ._metrics import Figure
from ._monitor import Hosts
from ._position import Position
from ._snapshot import HostStatus, Snapshot
from .errors import NoPrimaryError, NoReplicaError

Balance: TypeAlias = Literal["round_robin", "random", "least_lag", "nearest"]
Fallback: TypeAlias = Literal["primary", "stale", "error"]
_FIRST_PAUSE = 0.001  # between two probes for somebody who waits for a position; it doubles
_LONGEST_PAUSE = 0.016


class Choice:
    """Choose a host for each session; `DBConnect(..., before_create_session_handler=choice)`.

    At its first call for a connect it begins to follow it: errors of its sessions reach the monitor, and connections to a
    host that is dead or fenced are cut.

    Args:
        hosts: the monitor.
        writes: what it chooses is for writing.
    """

    def __init__(self, hosts: Hosts, *, writes: bool) -> None:
        self.hosts: Hosts = hosts
        self.writes: bool = writes
        self._followed: WeakKeyDictionary[DBConnect[Any], Following] = WeakKeyDictionary()
        self._latest: Callable[[], DBConnect[Any] | None] = lambda: None

    async def __call__(self, connect: DBConnect[Any]) -> str:
        """Return the host for one session of this connect."""
        if self._latest() is not connect:
            self._follow(connect)
        return await self.choose()

    async def choose(self) -> str:
        """Return a host.

        Raises:
            NoHostError: there is none.
            NotImplementedError: this is the base class.
        """
        raise NotImplementedError

    def allows(self, host: str) -> bool:
        """Return whether a connection to this host may still be used for what is chosen here.

        Raises:
            NotImplementedError: this is the base class.
        """
        raise NotImplementedError

    def _follow(self, connect: DBConnect[Any]) -> None:
        self._latest = ref(connect)
        if connect in self._followed:
            return
        following = self._followed[connect] = Following(connect, writes=self.writes)
        self.hosts.attach(following)
        connect.engine_created.append(lambda engine, host: watch_engine(engine, self.hosts, host, writes=self.writes))


class _Primary(Choice):
    def __init__(self, hosts: Hosts, wait: float) -> None:
        super().__init__(hosts, writes=True)
        self._wait = wait

    async def __call__(self, connect: DBConnect[Any]) -> str:
        host = self.hosts.primary_now()
        if host is not None and host == connect.host and self._latest() is connect:
            return host
        host = await super().__call__(connect)
        await connect.change_host(host)  # so that its pool_status() is that of the primary; returning it chooses it
        return host

    async def choose(self) -> str:
        return await self.hosts.primary(wait=self._wait)

    def allows(self, host: str) -> bool:
        return self.hosts.snapshot().primary == host


class _Replica(Choice):
    _policy = "replica"

    def __init__(
        self,
        hosts: Hosts,
        *,
        max_lag: float | None,
        max_lag_bytes: int | None,
        balance: Balance,
        fallback: Fallback,
        wait: float,
    ) -> None:
        super().__init__(hosts, writes=False)
        self._max_lag = max_lag
        self._max_lag_bytes = max_lag_bytes
        self._balance = balance
        self._fallback = fallback
        self._wait = wait
        self._weighted = _Weighted()
        self._turn = 0
        self._spare_turn = 0
        self._clock = hosts.clock
        self._seen: Snapshot | None = None  # what the following was made of
        self._until: float = 0.0  # when it has to be made anew all the same, because time has passed
        self._found: list[HostStatus] = []
        self._good: list[HostStatus] = []
        self._in_turn: list[HostStatus] = []  # who is next, where nothing but the snapshot decides that
        self._fence: int | None = None
        self._figures = {
            outcome: hosts.metrics.figure("selections_total", policy=self._policy, outcome=outcome)
            for outcome in ("replica", "primary", "stale", "none")
        }
        self._chosen = self._figures["replica"]
        self._hit, self._miss = Figure(), Figure()

    async def __call__(self, connect: DBConnect[Any]) -> str:
        if self._latest() is not connect:
            self._follow(connect)
        floor = self._wanted()
        return self._at_once(floor) or await self._in_time(floor)

    async def choose(self) -> str:
        floor = self._wanted()
        return self._at_once(floor) or await self._in_time(floor)

    def allows(self, host: str) -> bool:
        snapshot = self.hosts.snapshot()
        status = snapshot.host(host)
        if self._qualifies(status, self.hosts.clock()):
            return True
        allowed = snapshot.primary == host if self._fallback == "primary" else status in snapshot.replicas
        return allowed and self._fallback != "error" and not self._candidates()

    def _wanted(self) -> Floor | None:
        """Return what the session has to see."""
        return None

    def _at_once(self, floor: Floor | None, *, undecided: bool = False) -> str | None:
        """Return a replica where one is known; this is nearly every session, and costs it less than a microsecond."""
        hosts = self.hosts
        snapshot = hosts.snapshot()
        if not hosts.is_watching or not (snapshot.decided or undecided):
            return None
        if snapshot is not self._seen or self._clock() >= self._until:
            self._look()
        if (found := self._next() if floor is None else self._next_at(floor)) is None:
            return None
        self._chosen.value += 1
        if floor is not None:
            self._hit.value += 1
        return found.host

    def _next(self) -> HostStatus | None:
        """Return the replica whose turn it is."""
        if not self._in_turn:
            return self._balanced(self._good) if self._good else None
        self._turn += 1
        return self._in_turn[self._turn % len(self._in_turn)]

    def _next_at(self, floor: Floor) -> HostStatus | None:
        """Return the replica whose turn it is, or else another one, of those that have replayed a position."""
        if floor == "primary" or floor[0] != self._fence:
            # After a failover, what was written before it may be gone, or be replayed elsewhere.
            return None
        if self._in_turn:
            self._turn += 1
            found = self._in_turn[self._turn % len(self._in_turn)]
            if found.timeline == floor[0] and found.lsn is not None and found.lsn >= floor[1]:
                return found
        there = floor_reached(floor)
        able = [status for status in self._good if there(status)] or [status for status in self._found if there(status)]
        return self._balanced(able) if able else None

    async def _in_time(self, floor: Floor | None) -> str:
        """Return a replica as soon as each host was tried once, or what else there is."""
        await self._first_snapshot()
        return self._at_once(floor, undecided=True) or await self._fall_back("no replica is fresh enough")

    async def _first_snapshot(self) -> None:
        self.hosts.primary_now()  # raises where nobody watches
        deadline = self.hosts.clock() + self._wait
        while not self.hosts.snapshot().decided:
            if not await self.hosts.changed(deadline - self.hosts.clock()):
                break

    def _qualifies(self, status: HostStatus, now: float) -> bool:
        """Return whether a host is a replica within the limits; every figure counts as of now (an old one is a larger one)."""
        if status.role != "replica" or status.state not in ("up", "suspect") or status.foreign:
            return False
        if self._max_lag is None and self._max_lag_bytes is None:
            return True
        if not self._is_fresh(status, now):
            return False
        if self._max_lag is not None and (status.fresh_at is None or now - status.fresh_at > self._max_lag):
            return False
        return self._max_lag_bytes is None or (status.lag_bytes is not None and status.lag_bytes <= self._max_lag_bytes)

    def _is_fresh(self, status: HostStatus, now: float) -> bool:
        return status.seen_at is not None and now - status.seen_at <= self.hosts.stale_after

    def _candidates(self) -> list[HostStatus]:
        """Return the replicas to choose from."""
        if self.hosts.snapshot() is not self._seen or self._clock() >= self._until:
            self._look()
        return self._good

    def _look(self) -> None:
        """Work out whom to choose from: once for a snapshot, until one of them is too old."""
        snapshot, now = self.hosts.snapshot(), self._clock()
        self._seen, self._fence = snapshot, snapshot.fence
        self._found = [status for status in snapshot.hosts if self._qualifies(status, now)]
        self._good = self._preferred(self._found, now) if len(self._found) > 1 else self._found
        limited = self._max_lag is not None or self._max_lag_bytes is not None
        fresh = self._found if limited else [status for status in self._good if self._is_fresh(status, now)]
        self._until = min(map(self._expiry, fresh), default=math.inf)  # what is stale stays so until the next snapshot
        if self._balance in ("least_lag", "nearest") and self._good:
            self._in_turn = [self._balanced(self._good)]
        else:
            even = self._balance == "round_robin" and len({status.weight for status in self._good}) < 2
            self._in_turn = self._good if even else []

    def _expiry(self, status: HostStatus) -> float:
        """Return when this replica has to be looked at again."""
        stale = (status.seen_at or 0.0) + self.hosts.stale_after
        return stale if self._max_lag is None else min(stale, (status.fresh_at or 0.0) + self._max_lag)

    def _preferred(self, found: list[HostStatus], now: float) -> list[HostStatus]:
        """Leave out hosts that are in doubt, suspect, stale or without weight, unless there are no others."""
        hosts = self.hosts
        good = [s for s in found if s.state == "up" and not hosts.in_doubt(s.host) and self._is_fresh(s, now)]
        return [s for s in good or found if s.weight > 0] or good or found

    def _balanced(self, found: list[HostStatus]) -> HostStatus:
        if len(found) == 1:
            return found[0]
        if self._balance == "least_lag":
            return max(found, key=lambda status: status.fresh_at or float("-inf"))
        if self._balance == "nearest":
            near = [status for status in found if status.locality == self.hosts.locality]
            return min(near or found, key=lambda status: status.probe_seconds or 0.0)
        if self._balance == "random":
            return random.choices(found, [status.weight or 1.0 for status in found])[0]  # noqa: S311  # no secret
        if len({status.weight for status in found}) > 1:
            return self._weighted.next(found)
        self._spare_turn += 1
        return found[self._spare_turn % len(found)]

    async def _fall_back(self, why: str) -> str:
        snapshot = self.hosts.snapshot()
        if self._fallback == "primary":
            try:
                return self._count(await self.hosts.primary(wait=self._wait), "primary")
            except NoPrimaryError as exc:
                self._count("", "none")
                raise NoReplicaError(f"{why}, and there is no primary", exc.snapshot) from exc
        if self._fallback == "stale" and snapshot.replicas:
            stale = max(snapshot.replicas, key=lambda status: (status.fresh_at or float("-inf"), status.lsn or 0))
            return self._count(stale.host, "stale")
        self._count("", "none")
        raise NoReplicaError(why, snapshot)

    def _count(self, host: str, outcome: str) -> str:
        self._figures[outcome].value += 1
        return host


class _AtLeast(_Replica):
    """A replica that has replayed a position, found on demand; the primary where none has in time."""

    _policy = "at_least"

    def __init__(self, hosts: Hosts, lsn: Floor | Callable[[], Floor | None] | None, delay: float, **options: Any) -> None:
        super().__init__(hosts, **options)
        self._floor = lsn
        self._delay = delay
        self._hit, self._miss = (hosts.metrics.figure("ryow_total", outcome=outcome) for outcome in ("replica", "primary"))

    def _wanted(self) -> Floor | None:
        given = self._floor
        if isinstance(given, Position):
            return given
        floor = None if given is None else "primary" if isinstance(given, str) else given()
        if floor is None and (visit := visit_of(self.hosts)) is not None:
            return visit.needs()
        return floor

    async def _in_time(self, floor: Floor | None) -> str:
        if floor is None:
            return await super()._in_time(None)
        await self._first_snapshot()
        if isinstance(floor, Position) and self._is_plausible(floor):
            found = self._at_once(floor, undecided=True) or await self._refreshed(floor)
            if found is not None:
                return found
        self._miss.value += 1
        return await self._fall_back("no replica has replayed what was written")

    def _is_plausible(self, floor: Position) -> bool:
        """Return whether waiting can help."""
        return floor.timeline == self.hosts.snapshot().fence

    async def _refreshed(self, floor: Position) -> str | None:
        """Probe the replicas until one has replayed this, for a short while; all who wait share the probes."""
        hosts, pause = self.hosts, _FIRST_PAUSE
        deadline = hosts.clock() + self._delay
        while (left := deadline - hosts.clock()) > 0:
            snapshot = hosts.snapshot()
            replicas = [s.host for s in snapshot.replicas if s.state == "up" and s.weight > 0] or [
                s.host for s in snapshot.replicas
            ]
            if not replicas:
                return None
            await hosts.refresh(*replicas, timeout=left)
            if (found := self._at_once(floor, undecided=True)) is not None:
                return found
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)
        return self._at_once(floor, undecided=True)  # somebody else's probe may have come back meanwhile

    def allows(self, host: str) -> bool:
        return bool(host)  # the position is asked for when a session begins; a pool knows no sessions


class _Weighted:
    """Turns by weight, evenly spread (the smooth weighted round robin of nginx)."""

    def __init__(self) -> None:
        self._owed: dict[str, float] = {}

    def next(self, found: list[HostStatus]) -> HostStatus:
        """Return whose turn it is."""
        owed = self._owed
        for status in found:
            owed[status.host] = owed.get(status.host, 0.0) + (status.weight or 1.0)
        chosen = max(found, key=lambda status: owed[status.host])
        owed[chosen.host] -= sum(status.weight or 1.0 for status in found)
        return chosen


def floor_reached(floor: Position) -> Callable[[HostStatus], bool]:
    """Return what tells whether a replica has replayed a position: on the same timeline, to the same place."""
    timeline, lsn = floor
    return lambda status: status.timeline == timeline and status.lsn is not None and status.lsn >= lsn


def primary(hosts: Hosts, *, wait: float = 5.0) -> Choice:
    """Choose the primary; while there is none, or it is in doubt, sessions wait for it.

    Args:
        hosts: the monitor.
        wait: seconds to wait, then `NoPrimaryError`.
    """
    return _Primary(hosts, wait)


def replica(
    hosts: Hosts,
    *,
    max_lag: float | None = None,
    max_lag_bytes: int | None = None,
    balance: Balance = "round_robin",
    fallback: Fallback = "primary",
    primary_wait: float = 5.0,
) -> Choice:
    """Choose a replica that is fresh enough.

    Args:
        hosts: the monitor.
        max_lag: seconds by which its data may be old at most; a replica about which that is not known does not qualify.
        max_lag_bytes: bytes of the log by which it may be behind.
        balance: among those that qualify: "round_robin" (by weight), "random" (by weight), "least_lag", "nearest" (of the
            monitor's locality, then by the time of a probe).
        fallback: where none qualifies: "primary"; "stale", the replica with the least lag; "error", `NoReplicaError`.
        primary_wait: seconds to wait for the primary where it is the fallback, and for the first answers after the start.
    """
    return _Replica(hosts, max_lag=max_lag, max_lag_bytes=max_lag_bytes, balance=balance, fallback=fallback, wait=primary_wait)


def at_least(
    hosts: Hosts,
    *,
    lsn: Floor | Callable[[], Floor | None] | None = None,
    wait: float = 0.05,
    max_lag: float | None = None,
    max_lag_bytes: int | None = None,
    balance: Balance = "round_robin",
    fallback: Fallback = "primary",
    primary_wait: float = 5.0,
) -> Choice:
    """Choose a replica that has replayed a position, by default what this visitor has written before (`ReadYourWrites`).

    Args:
        hosts: the monitor.
        lsn: the position, or a function that returns it; None: the visitor's. Where there is none, this is `replica`.
        wait: seconds for which a session waits for a replica to get there, before it goes to the primary.
        max_lag: as in `replica`, and so are the others.
        max_lag_bytes: the same.
        balance: the same.
        fallback: the same.
        primary_wait: the same.
    """
    options = {"max_lag": max_lag, "max_lag_bytes": max_lag_bytes, "balance": balance, "fallback": fallback}
    return _AtLeast(hosts, lsn, wait, **options, wait=primary_wait)
