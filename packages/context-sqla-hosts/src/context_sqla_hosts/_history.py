"""The lag of the hosts over the last minutes, for people who look at the page."""

from asyncio import TimerHandle, get_running_loop
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from ._monitor import Hosts
from ._snapshot import HostStatus, Snapshot

EVERY = 2.0
"""Seconds between two samples."""
SPAN = 300.0
"""Seconds that are kept."""


def shown_lag(status: HostStatus, snapshot: Snapshot, now: float) -> float | None:
    """Return the lag in seconds as it is shown: of the primary 0, of what is neither that nor a replica of ours None."""
    if status.state not in ("up", "suspect") or status.foreign:
        return None
    if status.host == snapshot.primary:
        return 0.0
    return status.lag(now) if status.role == "replica" else None


class Moment(NamedTuple):
    """The lag of each host at one time.

    Args:
        at: by the monitor's clock.
        primary: the host that it was.
        lags: seconds for each host, None where its lag was unknown.
    """

    at: float
    primary: str | None
    lags: Mapping[str, float | None]


class History:
    """Samples of a monitor. It keeps itself going by a timer while the hosts are watched, and leaves no task behind."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._moments: deque[Moment] = deque(maxlen=int(SPAN / EVERY))
        self._timer: TimerHandle | None = None

    def moments(self) -> tuple[Moment, ...]:
        """Return the samples, the oldest first."""
        return tuple(self._moments)

    def start(self) -> None:
        """Begin to take samples, unless that is so already."""
        if self._timer is None and self._hosts.is_watching:
            self._take()

    def stop(self) -> None:
        """Take no more samples."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def sample(self) -> None:
        """Take one, unless it is too early to know anything."""
        snapshot, now = self._hosts.snapshot(), self._hosts.clock()
        if not snapshot.decided:
            return
        self._moments.append(Moment(now, snapshot.primary, {s.host: shown_lag(s, snapshot, now) for s in snapshot}))

    def _take(self) -> None:
        self._timer = None
        if self._hosts.is_watching:
            self.sample()
            self._timer = get_running_loop().call_later(EVERY, self._take)
