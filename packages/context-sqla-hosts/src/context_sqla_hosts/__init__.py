"""The right PostgreSQL host before every session: roles, lag and failover of a primary with replicas."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._address import Address, Driver
from ._app import StatusApp
from ._failures import is_host_failure
from ._floor import Floor, Visit
from ._metrics import BUCKETS, Metrics, Sample
from ._monitor import Hosts, HostsOptions
from ._patroni import patroni_members
from ._position import Position, format_lsn, parse_lsn
from ._snapshot import HostStatus, Role, Snapshot, State
from ._tracker import SplitBrain
from ._watch import Attachment

if TYPE_CHECKING:
    from ._choice import Balance, Choice, Fallback, at_least, primary, replica
    from ._engine import bind_engine
    from ._writes import ReadYourWrites, ReadYourWritesMiddleware
    from .errors import MonitorError, NoHostError, NoPrimaryError, NoReplicaError, SplitBrainError

__all__ = [
    "BUCKETS",
    "Address",
    "Attachment",
    "Balance",
    "Choice",
    "Driver",
    "Fallback",
    "Floor",
    "HostStatus",
    "Hosts",
    "HostsOptions",
    "Metrics",
    "MonitorError",
    "NoHostError",
    "NoPrimaryError",
    "NoReplicaError",
    "Position",
    "ReadYourWrites",
    "ReadYourWritesMiddleware",
    "Role",
    "Sample",
    "Snapshot",
    "SplitBrain",
    "SplitBrainError",
    "State",
    "StatusApp",
    "Visit",
    "at_least",
    "bind_engine",
    "format_lsn",
    "is_host_failure",
    "parse_lsn",
    "patroni_members",
    "primary",
    "replica",
]

# What needs SQLAlchemy is imported when it is asked for: the sidecar does not, and is half as large.
_LATER = {
    "_choice": ("Balance", "Choice", "Fallback", "at_least", "primary", "replica"),
    "_engine": ("bind_engine",),
    "_writes": ("ReadYourWrites", "ReadYourWritesMiddleware"),
    "errors": ("MonitorError", "NoHostError", "NoPrimaryError", "NoReplicaError", "SplitBrainError"),
}

if not TYPE_CHECKING:  # or a type checker would believe in any name

    def __getattr__(name: str) -> object:
        for module, names in _LATER.items():
            if name in names:
                found = globals()[name] = getattr(import_module(f".{module}", __name__), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
