"""What Prometheus reads: the counters of a monitor and what is known of its hosts, in the text format 0.0.4."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from ._history import shown_lag
from ._metrics import Sample
from ._snapshot import HostStatus, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "context_sqla_hosts_"
_HELP = {
    "aborted_connections_total": "Connections of the application that were cut because their host died or was fenced.",
    "fence_timeline": "The highest timeline that was ever seen.",
    "fenced": "Whether a host says that it is the primary and must not be used as one.",
    "lag_bytes": "How far a replica is behind the last known end of the log.",
    "lag_seconds": "How old the data of a replica is at most.",
    "no_primary_seconds_total": "Seconds without a primary, counted when there is one again.",
    "observation_age_seconds": "Seconds since a host last answered.",
    "positions_total": "Positions that were taken after commits.",
    "primary": "Whether a host is the primary that is used.",
    "primary_changes_total": "How often there was another primary.",
    "probe_failures_total": "Probes that failed, by kind.",
    "probe_seconds": "Duration of the probes that were answered.",
    "reports_total": "Errors of sessions that were reported to the monitor.",
    "role": "What a host last said of itself.",
    "ryow_total": "Reads that had to be at a position, and where they went.",
    "selections_total": "Choices of a host, by their outcome.",
    "split_brain": "Whether several hosts say that they are the primary.",
    "split_brains_total": "How often several hosts said that they are the primary.",
    "timeline": "The timeline of a host.",
    "tokens_total": "Positions that visitors brought, by verdict.",
    "up": "Whether a host answers.",
}


def expose(snapshot: Snapshot, counted: Iterable[Sample], now: float) -> str:
    """Write everything, sorted by name; a figure that is unknown is left out, for 0 would be a lie."""
    samples = sorted([*_gauges(snapshot, now), *counted], key=lambda sample: _family(sample.name))
    lines: list[str] = []
    for family, members in groupby(samples, key=lambda sample: _family(sample.name)):
        name = _PREFIX + family
        lines += [f"# HELP {name} {_HELP.get(family, family)}", f"# TYPE {name} {_kind(family)}"]
        lines += [f"{_PREFIX}{sample.name}{_labels(sample.labels)} {_number(sample.value)}" for sample in members]
    return "\n".join(lines) + "\n"


def _gauges(snapshot: Snapshot, now: float) -> Iterator[Sample]:
    yield Sample("split_brain", (), float(snapshot.split_brain))
    if snapshot.fence is not None:
        yield Sample("fence_timeline", (), float(snapshot.fence))
    for status in snapshot:
        host = ("host", status.host)
        yield Sample("up", (host,), float(status.state in ("up", "suspect")))
        yield Sample("primary", (host,), float(status.host == snapshot.primary))
        yield Sample("fenced", (host,), float(status.fenced))
        for role in ("primary", "replica", "unknown"):
            yield Sample("role", (host, ("role", role)), float(status.role == role))
        for name, value in _figures(status, snapshot, now):
            if value is not None:
                yield Sample(name, (host,), float(value))


def _figures(status: HostStatus, snapshot: Snapshot, now: float) -> Iterator[tuple[str, float | None]]:
    yield "timeline", status.timeline
    yield "observation_age_seconds", status.age(now)
    yield "lag_seconds", shown_lag(status, snapshot, now)
    yield "lag_bytes", status.lag_bytes


def _family(name: str) -> str:
    for suffix in ("_bucket", "_sum", "_count"):
        if (family := name.removesuffix(suffix)) in _HELP and family != name:
            return family
    return name


def _kind(family: str) -> str:
    return "histogram" if family == "probe_seconds" else "counter" if family.endswith("_total") else "gauge"


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else repr(round(value, 6))
