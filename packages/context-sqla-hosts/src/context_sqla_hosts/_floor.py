"""What the visitor of this request has written before, and so has to see: for one request, in a context variable."""

from contextvars import ContextVar
from typing import Literal, TypeAlias

from ._position import Position

Floor: TypeAlias = Position | Literal["primary"]
"""A position that a replica must have replayed, or "primary" where only the primary will do."""


class Visit:
    """One request, or one message of a worker: what its visitor brought along, and what it wrote itself.

    Args:
        cluster: whose positions these are; any object.
        floor: what was brought along.
        outer: the visit around this one, of another cluster.
    """

    __slots__ = ("cluster", "floor", "outer", "wrote")

    def __init__(self, cluster: object, floor: Floor | None = None, outer: "Visit | None" = None) -> None:
        self.cluster: object = cluster
        self.floor: Floor | None = floor
        self.outer: Visit | None = outer
        self.wrote: Floor | None = None

    def raise_to(self, floor: Floor) -> None:
        """Note what was written in this visit; the later of two positions counts, and "primary" more than any."""
        self.wrote = later(self.wrote, floor)

    def needs(self) -> Floor | None:
        """Return what a read has to see: a position that was taken now covers all that was written before."""
        if self.wrote is None:
            return self.floor
        return later(self.floor, self.wrote) if isinstance(self.floor, Position) else self.wrote


current: ContextVar[Visit | None] = ContextVar("context_sqla_hosts.visit", default=None)


def visit_of(cluster: object) -> Visit | None:
    """Return the visit of this cluster in the running context."""
    visit = current.get()
    while visit is not None and visit.cluster is not cluster:
        visit = visit.outer
    return visit


def later(one: Floor | None, other: Floor) -> Floor:
    """Return the stricter of two floors."""
    if one == "primary" or other == "primary":
        return "primary"
    return other if one is None else max(one, other)
