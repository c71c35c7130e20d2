"""The errors of choosing a host: each has the snapshot that led to it, and every adapter answers it with 503 (P19)."""

from context_sqla.errors import ContextSqlaError, UnavailableError

from ._snapshot import Snapshot

__all__ = ["MonitorError", "NoHostError", "NoPrimaryError", "NoReplicaError", "SplitBrainError"]


class MonitorError(ContextSqlaError):
    """Tell that the hosts are not monitored: the monitor was not started, or has ended."""


class NoHostError(UnavailableError):
    """Tell that no host can serve a session now.

    Args:
        message: what was wanted; what is known of the hosts is added.
        snapshot: what was known of the hosts.
        retry_after: seconds after which it may be different.
    """

    def __init__(self, message: str, snapshot: Snapshot, *, retry_after: float | None = 1.0) -> None:
        super().__init__(f"{message} ({snapshot})", retry_after=retry_after)
        self.snapshot: Snapshot = snapshot


class NoPrimaryError(NoHostError):
    """Tell that there is no primary, or none that may be used."""


class SplitBrainError(NoPrimaryError):
    """Tell that several hosts say they are the primary, and that nothing shows which of them is."""


class NoReplicaError(NoHostError):
    """Tell that no replica is fresh enough, where a fallback was not wanted or not there either."""
