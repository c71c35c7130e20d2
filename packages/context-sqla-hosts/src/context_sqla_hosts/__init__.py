"""The right PostgreSQL host before every session: roles, lag and failover of a primary with replicas."""

from ._address import Address, Driver
from ._app import StatusApp
from ._choice import Balance, Choice, Fallback, at_least, primary, replica
from ._engine import bind_engine
from ._failures import is_host_failure
from ._floor import Floor, Visit
from ._metrics import BUCKETS, Metrics, Sample
from ._monitor import Hosts, HostsOptions
from ._position import Position, format_lsn, parse_lsn
from ._snapshot import HostStatus, Role, Snapshot, State
from ._tracker import SplitBrain
from ._watch import Attachment
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
    "primary",
    "replica",
]
