"""Counters of what the monitor saw and what was chosen; a server of metrics reads them."""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper limits of the histogram of probes, in seconds."""

Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]


class Sample(NamedTuple):
    """One figure.

    Args:
        name: without a prefix, such as "probe_failures_total".
        labels: names and values.
        value: the figure.
    """

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


class Figure:
    """A figure that is counted often: `figure.value += 1` costs less than to look it up.

    Args:
        shown: also while it is 0.
    """

    __slots__ = ("shown", "value")

    def __init__(self, *, shown: bool = False) -> None:
        self.value: float = 0
        self.shown: bool = shown


class Metrics:
    """Figures that only grow; no label has a password or a driver's text (P20)."""

    def __init__(self) -> None:
        self._figures: dict[Key, Figure] = {}

    def figure(self, name: str, /, **labels: str) -> Figure:
        """Return a figure, for those who count it often; it appears among the others when it was counted once."""
        return self._figures.setdefault((name, tuple(labels.items())), Figure())

    def add(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Let a figure grow.

        Args:
            name: without a prefix, such as "probe_failures_total".
            amount: by how much.
            labels: what sets it apart from others of this name.
        """
        figure = self.figure(name, **labels)
        figure.value += amount
        figure.shown = True

    def get(self, name: str, /, **labels: str) -> float:
        """Return a figure, 0 where nothing was counted."""
        figure = self._figures.get((name, tuple(labels.items())))
        return 0 if figure is None else figure.value

    def observe(self, name: str, seconds: float, /, **labels: str) -> None:
        """Add to a histogram: cumulative buckets `name_bucket{le=}`, `name_sum` and `name_count`.

        Args:
            name: of the histogram, without a prefix.
            seconds: what was measured.
            labels: what sets it apart from others of this name.
        """
        for limit in BUCKETS:
            self.add(f"{name}_bucket", float(seconds <= limit), **labels, le=f"{limit:g}")
        self.add(f"{name}_bucket", 1, **labels, le="+Inf")
        self.add(f"{name}_sum", seconds, **labels)
        self.add(f"{name}_count", 1, **labels)

    def __iter__(self) -> Iterator[Sample]:
        for (name, labels), figure in self._figures.items():
            if figure.shown or figure.value:
                yield Sample(name, labels, figure.value)
