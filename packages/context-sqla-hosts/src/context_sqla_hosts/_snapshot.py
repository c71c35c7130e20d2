"""What is known of the hosts at one moment: immutable, so that every reader sees one consistent picture."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ._position import Position

State: TypeAlias = Literal["unknown", "up", "suspect", "dead"]
"""unknown: not reached yet; suspect: the last probe timed out, or the first good one after being dead; dead: do not use."""
Role: TypeAlias = Literal["unknown", "primary", "replica"]
"""What the server last said of itself. A fenced or foreign primary says "primary" as well."""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """What is known of one host. Times are those of the monitor's clock, `time.monotonic` unless told otherwise.

    Args:
        host: "name:port", as the engine gets it.
        state: whether it answers.
        role: what it last said of itself.
        timeline: of a primary, its own; of a replica, the one that it streams or last streamed; None where nobody may see it.
        lsn: of a primary, the end of its log; of a replica, what it has replayed.
        lag_bytes: how far a replica is behind the last known end of the primary's log; None where that is unknown.
        fresh_at: everything that was committed at this time is visible here; None where that is unknown.
        seen_at: when its last good answer came.
        probe_seconds: how long that took.
        failures: failed probes in a row.
        error: the kind of the last failure, while there are any: "refused", "timeout", "closed", "login", "password", ...
        fenced: it says it is a primary, and must not be used as one: another one is newer.
        foreign: it is of another cluster (another system identifier).
        read_only: its sessions are read-only by default.
        streaming: a replica that receives the log at the moment, as far as one may see that.
        locality: where it is, as the application named it.
        weight: its share of the reads.
    """

    host: str
    state: State = "unknown"
    role: Role = "unknown"
    timeline: int | None = None
    lsn: int | None = None
    lag_bytes: int | None = None
    fresh_at: float | None = None
    seen_at: float | None = None
    probe_seconds: float | None = None
    failures: int = 0
    error: str | None = None
    fenced: bool = False
    foreign: bool = False
    read_only: bool = False
    streaming: bool = False
    locality: str | None = None
    weight: float = 1.0

    @property
    def position(self) -> Position | None:
        """How far this host is in the history of the cluster, None where its timeline or LSN is unknown."""
        return Position(self.timeline, self.lsn) if self.timeline is not None and self.lsn is not None else None

    def lag(self, now: float | None = None) -> float | None:
        """Return an upper bound of how old its data is, in seconds, None where there is none.

        It counts from the last observation on: what was not observed for a second is a second older.
        """
        return None if self.fresh_at is None else max(0.0, (time.monotonic() if now is None else now) - self.fresh_at)

    def age(self, now: float | None = None) -> float | None:
        """Return how long ago the host last answered, in seconds."""
        return None if self.seen_at is None else max(0.0, (time.monotonic() if now is None else now) - self.seen_at)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All hosts at one moment.

    Args:
        version: grows with every snapshot of a monitor.
        at: when it was taken, by the monitor's clock.
        hosts: in the order in which they were given.
        primary: the host that takes writes, None while there is none that may.
        fence: the highest timeline that was ever seen; no primary of a lower one is used.
        split_brain: more than one host of this cluster says that it is the primary.
        decided: every host was tried at least once; before that there is no primary.
        system_identifier: of the cluster.
    """

    version: int
    at: float
    hosts: tuple[HostStatus, ...]
    primary: str | None = None
    fence: int | None = None
    split_brain: bool = False
    decided: bool = False
    system_identifier: int | None = None

    def __iter__(self) -> Iterator[HostStatus]:
        return iter(self.hosts)

    def host(self, host: str) -> HostStatus:
        """Return the status of one host.

        Raises:
            KeyError: it is not among them.
        """
        for status in self.hosts:
            if status.host == host:
                return status
        raise KeyError(host)

    @property
    def replicas(self) -> tuple[HostStatus, ...]:
        """The replicas that answer, those first whose last probe was good."""
        found = [s for s in self.hosts if s.role == "replica" and s.state in ("up", "suspect") and not s.foreign]
        return tuple(sorted(found, key=lambda status: status.state != "up"))

    def __str__(self) -> str:
        return ", ".join(_describe(status, primary=status.host == self.primary) for status in self.hosts)


def _describe(status: HostStatus, *, primary: bool) -> str:
    said = "the primary" if primary else status.role if status.role != "unknown" else ""
    marks = [name for name in ("fenced", "foreign", "read_only") if getattr(status, name)]
    timeline = f"timeline {status.timeline}" if status.timeline is not None else ""
    return " ".join(filter(None, (status.host, status.state, status.error, said, timeline, *marks)))
