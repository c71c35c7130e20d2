"""From probes to a snapshot: a state machine without input, output or clock."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from ._snapshot import HostStatus, Role, Snapshot, State

SplitBrain: TypeAlias = Literal["fence", "refuse", "first"]
EventKind: TypeAlias = Literal["dead", "fenced", "demoted", "back", "primary", "no_primary", "split_brain", "fence"]
_SAMPLES = 4096


class Observation(NamedTuple):
    """What a server said of itself in one probe.

    Args:
        in_recovery: it is a replica.
        lsn: of a primary, the end of its last record; of a replica, what it has replayed.
        timeline: of a primary, its own; of a replica, what it receives, None while it receives nothing or nobody may see it.
        system_identifier: of its cluster.
        read_only: sessions are read-only by default.
        control: the timeline of its last checkpoint: never too high, often too low.
        evidence: the highest timeline of the files in its log, None where nobody looked.
    """

    in_recovery: bool
    lsn: int | None
    timeline: int | None
    system_identifier: int
    read_only: bool = False
    control: int | None = None
    evidence: int | None = None


class Failure(NamedTuple):
    """How a probe failed.

    Args:
        kind: one word, for people and metrics; never the driver's text (P20).
        hard: the server is certainly not there: no second probe is needed.
    """

    kind: str
    hard: bool


class Claim(NamedTuple):
    """What a member of a Patroni cluster that holds the leader's lock says of itself.

    Args:
        timeline: of its server.
        system_identifier: of its cluster.
    """

    timeline: int
    system_identifier: int


class Event(NamedTuple):
    """What changed, and for which host."""

    kind: EventKind
    host: str


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of the state machine; those of `Hosts`."""

    max_fails: int = 2
    split_brain: SplitBrain = "fence"
    require_evidence: bool = False
    localities: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


class _Samples:
    """When the primary's log was how long: (LSN, time) for each timeline, both growing."""

    def __init__(self) -> None:
        self._timelines: dict[int, tuple[list[int], list[float]]] = {}

    def add(self, timeline: int, lsn: int, sent: float) -> None:
        lsns, times = self._timelines.setdefault(timeline, ([], []))
        if lsns and lsn <= lsns[-1]:
            if lsn == lsns[-1]:
                times[-1] = max(times[-1], sent)
            return
        lsns.append(lsn)
        times.append(sent)
        if len(lsns) > _SAMPLES:
            del lsns[: _SAMPLES // 2], times[: _SAMPLES // 2]

    def newest(self, timeline: int, lsn: int) -> float | None:
        """Return the newest time whose commits are all visible on a replica that has replayed this much."""
        for known in sorted(self._timelines, reverse=True):
            if known <= timeline:
                lsns, times = self._timelines[known]
                if index := bisect_right(lsns, lsn):
                    return times[index - 1]
        return None


class _Host:
    """The mutable side of a `HostStatus`."""

    __slots__ = (
        "control", "error", "evidence", "failures", "fenced", "foreign", "fresh_at", "good", "host", "lsn", "probe_seconds",
        "read_only", "role", "seen_at", "sent_at", "state", "streaming", "system_identifier", "timeline", "tried",
    )  # fmt: skip

    def __init__(self, host: str) -> None:
        self.host: str = host
        self.state: State = "unknown"
        self.role: Role = "unknown"
        self.tried: bool = False
        self.good: int = 0  # good probes since it was dead
        self.failures: int = 0
        self.error: str | None = None
        self.system_identifier: int | None = None
        self.foreign: bool = False
        self.fenced: bool = False
        self.sent_at: float = 0.0
        self.seen_at: float | None = None
        self.probe_seconds: float | None = None
        self.forget()

    def forget(self) -> None:
        """Unlearn what a server that was away may have lost: it may come back rewound."""
        self.timeline: int | None = None
        self.control: int | None = None
        self.evidence: int | None = None
        self.lsn: int | None = None
        self.fresh_at: float | None = None
        self.read_only: bool = False
        self.streaming: bool = False

    def is_live(self) -> bool:
        return self.state in ("up", "suspect")


class Tracker:
    """Turn the results of probes into snapshots and events; every time is the caller's.

    Args:
        hosts: all of them.
        rules: how to decide.
    """

    def __init__(self, hosts: Sequence[str], rules: Rules) -> None:
        if rules.split_brain not in ("fence", "refuse", "first"):
            raise ValueError("split_brain is 'fence', 'refuse' or 'first'")
        self._rules = rules
        self._hosts = {host: _Host(host) for host in hosts}
        self._samples = _Samples()
        self._events: list[Event] = []
        self._identity: int | None = None
        self._settled = False  # more than half of the hosts agreed on the identity
        self._fences: dict[int, int] = {}  # of each cluster, for which of them is ours may not be known yet
        self._forgiven: dict[int, int] = {}  # the fences that were reset by hand: only a primary may raise them again
        self._confirmed: dict[int, int] = {}  # the highest timeline that a follower has shown
        self._claims: Mapping[str, Claim] = {}
        self._raised = False  # the fence has risen while we watched: there was a failover
        self._split_brain = False
        self._primary: str | None = None
        self._primary_lsn: tuple[int, int] | None = None
        self._version = 0

    def succeeded(self, host: str, seen: Observation, sent: float, now: float) -> tuple[Event, ...]:
        """Take the answer to a probe that was sent at `sent`, and return what it changes."""
        found = self._hosts[host]
        was = found.role if found.is_live() else "unknown"
        found.tried, found.failures, found.error = True, 0, None
        found.sent_at, found.seen_at, found.probe_seconds = sent, now, now - sent
        found.role, found.read_only = ("replica" if seen.in_recovery else "primary"), seen.read_only
        if was != found.role:
            found.timeline = found.fresh_at = None
        found.lsn, found.control = seen.lsn, seen.control
        found.streaming = seen.in_recovery and seen.timeline is not None
        if seen.timeline is not None:
            found.timeline = seen.timeline
        if seen.evidence is not None:
            found.evidence = seen.evidence
        found.system_identifier = seen.system_identifier
        self._revive(found)
        self._identify()
        self._raise_fence(found, seen)
        if was == "primary" and found.role == "replica":
            self._tell("demoted", host)
        return self._decide()

    def failed(self, host: str, failure: Failure) -> tuple[Event, ...]:
        """Take the failure of a probe, and return what it changes."""
        found = self._hosts[host]
        found.tried, found.error = True, failure.kind
        found.failures += 1
        if failure.hard or found.failures >= self._rules.max_fails:
            self._bury(found)
        elif found.state == "up":
            found.state = "suspect"
        return self._decide()

    def advised(self, claims: Mapping[str, Claim]) -> tuple[Event, ...]:
        """Take what Patroni says of who leads, and return what it changes; it can forbid a primary, and never make one."""
        self._claims = claims
        return self._decide()

    def restart(self) -> None:
        """Forget the hosts, who were not watched for a while; the fence and the cluster's identity stay."""
        self._claims = {}
        self._hosts = {host: _Host(host) for host in self._hosts}
        self._primary = self._primary_lsn = None

    def reset_fence(self) -> tuple[Event, ...]:
        """Forget the highest timeline, after a restore to an older one; the hosts that answer now set it anew."""
        self._raised, self._primary_lsn = True, None
        self._samples = _Samples()
        for cluster, timeline in self._fences.items():
            _raise(self._forgiven, cluster, timeline)
        self._fences.clear()
        self._confirmed.clear()
        for found in self._hosts.values():
            found.fresh_at = None
            if found.is_live() and found.role == "primary" and found.timeline is not None:
                _raise(self._fences, found.system_identifier or 0, found.timeline)
        return self._decide()

    def snapshot(self, now: float) -> Snapshot:
        """Return the picture as it is now."""
        self._version += 1
        return Snapshot(
            self._version, now, tuple(map(self._status, self._hosts.values())), self._primary, self._fence, self._split_brain,
            self._is_decided(), self._identity,
        )  # fmt: skip

    # Hosts

    def _revive(self, found: _Host) -> None:
        """Count a good probe: one is enough for a primary and at the first contact, a replica that was dead needs two."""
        found.good += 1
        if found.state == "dead":
            self._tell("back", found.host)
            found.state = "suspect"
        if found.state != "suspect" or found.role == "primary" or found.good > 1:
            found.state = "up"

    def _bury(self, found: _Host) -> None:
        if found.state != "dead":
            found.state, found.good, found.fenced = "dead", 0, False
            found.forget()
            self._tell("dead", found.host)

    def _tell(self, kind: EventKind, host: str) -> None:
        self._events.append(Event(kind, host))

    # The cluster

    def _identify(self) -> None:
        """Find out which cluster this is: that of the first majority of the hosts, until then that of most of those seen."""
        known = Counter(h.system_identifier for h in self._hosts.values() if h.system_identifier is not None)
        (first, votes), *others = known.most_common()
        if not self._settled:
            self._identity = None if others and others[0][1] == votes else first
            self._settled = votes * 2 > len(self._hosts)
        for found in self._hosts.values():
            identifier = found.system_identifier
            found.foreign = identifier is not None and identifier != self._identity and self._rules.split_brain != "first"

    @property
    def _fence(self) -> int | None:
        return None if self._identity is None else self._fences.get(self._identity)

    def _raise_fence(self, found: _Host, seen: Observation) -> None:
        known, old = self._fences.get(seen.system_identifier), self._fence
        highest = max(seen.timeline or 0, (seen.evidence or 0) if seen.in_recovery else 0)
        if seen.in_recovery and highest <= self._forgiven.get(seen.system_identifier, 0):
            return  # a replica of the timeline that was given up
        if seen.in_recovery:
            _raise(self._confirmed, seen.system_identifier, highest)
        _raise(self._fences, seen.system_identifier, highest)
        if known is not None and not found.foreign and self._fence != old:
            self._raised = True
            self._tell("fence", found.host)

    def _is_decided(self) -> bool:
        return all(found.tried for found in self._hosts.values())

    def _decide(self) -> tuple[Event, ...]:
        """Elect the primary, sample its log, and return what has changed since the last call."""
        claiming = [h for h in self._hosts.values() if h.is_live() and h.role == "primary" and not h.foreign]
        elected = self._elect(claiming)
        for found in claiming:
            fenced = elected is not None and found is not elected and self._rules.split_brain != "first"
            fenced = fenced or (self._rules.split_brain == "fence" and (found.timeline or 0) < (self._fence or 0))
            fenced = fenced or self._is_forbidden(found)
            if fenced and not found.fenced:
                self._tell("fenced", found.host)
            found.fenced = fenced
        for found in self._hosts.values():
            if found not in claiming:
                found.fenced = False
        several = sum(found.state == "up" for found in claiming) > 1
        if several and not self._split_brain:
            self._tell("split_brain", claiming[0].host)
        self._split_brain = several
        self._install(elected)
        events, self._events = tuple(self._events), []
        return events

    def _is_forbidden(self, found: _Host) -> bool:
        """Return whether another host leads, as far as Patroni knows.

        A member may say so for seconds after it was demoted: its word counts against timelines that are not newer than its own.
        """
        others = [c.timeline for host, c in self._claims.items() if host != found.host and c.system_identifier == self._identity]
        highest, own = max(others, default=0), found.timeline or 0
        return highest > own or (highest == own and bool(others) and found.host not in self._claims)

    def _elect(self, claiming: list[_Host]) -> _Host | None:
        if not self._is_decided():
            return None
        claiming = [h for h in claiming if not self._is_forbidden(h)]
        if self._rules.split_brain == "first":
            return claiming[0] if claiming else None
        if self._rules.split_brain == "refuse" and len(claiming) > 1:
            return None
        able = [h for h in claiming if not h.read_only and h.timeline is not None and h.timeline >= (self._fence or 0)]
        highest = max((h.timeline or 0 for h in able), default=0)
        if self._rules.require_evidence and self._confirmed.get(self._identity or 0, 0) < highest:
            return None
        newest = [h for h in able if h.timeline == highest]
        if len(newest) > 1:  # the same timeline twice: only a known one is kept, nothing is guessed
            return next((h for h in newest if h.host == self._primary), None)
        return newest[0] if newest else None

    def _install(self, elected: _Host | None) -> None:
        host = None if elected is None else elected.host
        if host != self._primary:
            if host is None:
                self._tell("no_primary", self._primary or "")
            else:
                self._tell("primary", host)
            self._primary = host
        if elected is not None and elected.timeline is not None and elected.lsn is not None:
            self._samples.add(elected.timeline, elected.lsn, elected.sent_at)
            self._primary_lsn = (elected.timeline, elected.lsn)
            elected.fresh_at = elected.sent_at

    # The snapshot

    def _branch(self, found: _Host) -> int | None:
        """Return the timeline whose log a replica has replayed: never a newer one than it has."""
        if found.timeline is not None:
            return found.timeline
        if found.evidence is not None and found.evidence > (self._fence or 0):
            return found.evidence  # one that was given up
        # Without the right to see what it receives: the current one, as long as no failover was seen, else what it has written
        # down at its last checkpoint.
        return found.control if self._raised else self._fence

    def _status(self, found: _Host) -> HostStatus:
        timeline, lag_bytes = found.timeline, 0 if found.host == self._primary else None
        if found.role == "replica" and found.lsn is not None and not found.foreign and found.is_live():
            timeline = self._branch(found)
            if timeline is not None and timeline <= (self._fence or 0):
                fresh_at = self._samples.newest(timeline, found.lsn)
                if fresh_at is not None:
                    found.fresh_at = max(fresh_at, found.fresh_at or fresh_at)
                if self._primary_lsn is not None and self._primary_lsn[0] == timeline:
                    lag_bytes = max(0, self._primary_lsn[1] - found.lsn)
        return HostStatus(
            found.host, found.state, found.role, timeline, found.lsn, lag_bytes, found.fresh_at, found.seen_at,
            found.probe_seconds, found.failures, found.error, found.fenced, found.foreign, found.read_only, found.streaming,
            self._rules.localities.get(found.host), self._rules.weights.get(found.host, 1.0),
        )  # fmt: skip


def _raise(timelines: dict[int, int], cluster: int, timeline: int) -> None:
    if timeline > timelines.get(cluster, 0):
        timelines[cluster] = timeline
