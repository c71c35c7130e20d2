"""One request for a host: answered from what was worked out for the snapshot, as often as the same request comes."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ._metrics import Figure
from ._monitor import Hosts
from ._query import Limits
from ._reply import NOT_READY, Later, Reply
from ._snapshot import HostStatus, Snapshot

_CYCLE = 64  # the longest order in which replicas of different weights take turns
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.016


class Picked(NamedTuple):
    """Who may be answered.

    Args:
        hosts: they take turns.
        outcome: "replica", "primary" or "none", for the metrics.
        until: when this has to be worked out anew, whatever the snapshot.
    """

    hosts: Sequence[str]
    outcome: str
    until: float = math.inf


Pick = Callable[[Snapshot, float], Picked]


class Picker:
    """Works out who may be answered.

    Args:
        hosts: the monitor.
        geo: the region of this process.
        geos: the regions of the hosts, by their keys.
    """

    def __init__(self, hosts: Hosts, geo: str | None, geos: Mapping[str, str]) -> None:
        self._hosts = hosts
        self._geo = geo
        self._geos = geos

    def replica(self, limits: Limits) -> Pick:
        """Pick the replicas within limits: those that are well, of the same place; the primary, where there is none."""

        def pick(snapshot: Snapshot, now: float) -> Picked:
            found = self._near(self._well([s for s in snapshot if self.qualifies(s, limits, snapshot, now)], now))
            until = min((self._expiry(status, limits) for status in found), default=math.inf)
            return Picked(_turns(found), "replica", until) if found else _primary(snapshot)

        return pick

    def closest(self, limits: Limits) -> Pick:
        """Pick the replica that is behind by the fewest bytes."""

        def pick(snapshot: Snapshot, now: float) -> Picked:
            found = self._well([s for s in snapshot if self.qualifies(s, limits, snapshot, now)], now)
            if not found:
                return _primary(snapshot)
            first = min(found, key=lambda status: math.inf if status.lag_bytes is None else status.lag_bytes)
            return Picked([first.host], "replica", self._expiry(first, limits))

        return pick

    def qualifies(self, status: HostStatus, limits: Limits, snapshot: Snapshot, now: float) -> bool:
        """Return whether a host is a replica within limits; what is unknown is never within one."""
        if status.role != "replica" or status.state not in ("up", "suspect") or status.foreign:
            return False
        if not _has_replayed(status, limits, snapshot):
            return False
        checks = []
        if limits.lag is not None:
            checks.append(self.is_within_time(status, limits.lag, now))
        if limits.lag_bytes is not None:
            checks.append(self.is_within_bytes(status, limits.lag_bytes, now))
        return not checks or (any(checks) if limits.combine == "or" else all(checks))

    def is_within_time(self, status: HostStatus, limit: float, now: float) -> bool:
        """Return whether the data of a host is no older than so many seconds."""
        return not self._is_stale(status, now) and status.fresh_at is not None and now - status.fresh_at <= limit

    def is_within_bytes(self, status: HostStatus, limit: int, now: float) -> bool:
        """Return whether a host is behind by no more than so many bytes."""
        return not self._is_stale(status, now) and status.lag_bytes is not None and status.lag_bytes <= limit

    def _is_stale(self, status: HostStatus, now: float) -> bool:
        return status.seen_at is None or now - status.seen_at > self._hosts.stale_after

    def _well(self, found: list[HostStatus], now: float) -> list[HostStatus]:
        well = [s for s in found if s.state == "up" and not self._hosts.in_doubt(s.host) and not self._is_stale(s, now)]
        return [s for s in well or found if s.weight > 0] or well or found

    def _near(self, found: list[HostStatus]) -> list[HostStatus]:
        here = self._hosts.locality
        near = [s for s in found if here is not None and s.locality == here]
        return near or [s for s in found if self._geo is not None and self._geos.get(s.host) == self._geo] or found

    def _expiry(self, status: HostStatus, limits: Limits) -> float:
        stale = (status.seen_at or 0.0) + self._hosts.stale_after
        return stale if limits.lag is None else min(stale, (status.fresh_at or 0.0) + limits.lag)


class Selection:
    """Answers one form of a request, again and again.

    Args:
        hosts: the monitor.
        pick: who may be answered.
        replies: the answer for a host, and for None.
        wanted: the outcome that was asked for; another one is waited for, if the request says so.
        wait: seconds.
        policy: the name of the endpoint, for the metrics and for whose turn it is.
        turns: the turns of each endpoint.
    """

    def __init__(
        self,
        hosts: Hosts,
        pick: Pick,
        replies: Callable[[str | None], Reply],
        *,
        wanted: str,
        wait: float,
        policy: str,
        turns: dict[str, int],
    ) -> None:
        self._hosts = hosts
        self._pick = pick
        self._reply = replies
        self._wanted = wanted
        self._wait = wait
        self._policy = policy
        self._turns = turns
        self._seen: Snapshot | None = None
        self._until = 0.0
        self._outcome = ""
        self._replies: list[Reply] = [NOT_READY]
        self._counted = Figure()

    def __call__(self) -> Reply | Later:
        hosts = self._hosts
        if hosts.snapshot() is not self._seen or hosts.clock() > self._until:
            self._work_out()
        if self._wait and self._outcome not in (self._wanted, "not ready"):
            return self._waited
        return self._next()

    def _work_out(self) -> None:
        snapshot = self._seen = self._hosts.snapshot()
        picked = self._pick(snapshot, self._hosts.clock()) if snapshot.decided else Picked([], "not ready")
        self._until, self._outcome = picked.until, picked.outcome
        self._counted = self._hosts.metrics.figure("selections_total", policy=self._policy, outcome=picked.outcome)
        if picked.outcome == "not ready":
            self._replies = [NOT_READY]
        else:
            self._replies = [self._reply(host) for host in picked.hosts] or [self._reply(None)]

    def _next(self) -> Reply:
        replies = self._replies
        self._counted.value += 1
        if len(replies) == 1:
            return replies[0]
        turn = self._turns[self._policy] = self._turns.get(self._policy, -1) + 1
        return replies[turn % len(replies)]

    async def _waited(self) -> Reply:
        """Look again until there is what was asked for; all who wait share the probes."""
        hosts, pause = self._hosts, _FIRST_PAUSE
        deadline = hosts.clock() + self._wait
        while self._outcome != self._wanted and hosts.is_watching and (left := deadline - hosts.clock()) > 0:
            replicas = [status.host for status in hosts.snapshot().replicas]
            if self._wanted == "replica" and replicas:
                await hosts.refresh(*replicas, timeout=left)
                await asyncio.sleep(min(pause, left))
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                await hosts.changed(left)
            self._work_out()
        return self._next()


def pick_primary(snapshot: Snapshot, _now: float) -> Picked:
    """Pick the primary."""
    return _primary(snapshot)


def _primary(snapshot: Snapshot) -> Picked:
    return Picked([], "none") if snapshot.primary is None else Picked([snapshot.primary], "primary")


def _has_replayed(status: HostStatus, limits: Limits, snapshot: Snapshot) -> bool:
    """Return whether a replica has a position; one that is known to follow an older timeline has none."""
    if limits.lsn is None:
        return True
    if status.lsn is None or status.lsn < limits.lsn:
        return False
    if limits.timeline is not None:
        return limits.timeline == snapshot.fence == status.timeline
    return status.timeline in (None, snapshot.fence)


def _turns(found: Sequence[HostStatus]) -> list[str]:
    """Return the order in which replicas take turns: evenly spread by weight."""
    weights = [status.weight or 1.0 for status in found]
    if len(set(weights)) < 2:
        return [status.host for status in found]
    rounds = min(_CYCLE, round(sum(weights) / min(weights)))
    owed, order = [0.0] * len(found), []
    for _ in range(rounds):
        owed = [due + weight for due, weight in zip(owed, weights, strict=True)]
        chosen = owed.index(max(owed))
        owed[chosen] -= sum(weights)
        order.append(found[chosen].host)
    return order
