"""The status page: one HTML document with nothing from elsewhere, for light and dark, for desks and telephones."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from ._history import EVERY, SPAN, Moment, shown_lag
from ._snapshot import HostStatus, Snapshot

_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 88, 12, 20, 28
_LINES = 6  # colours; further hosts begin anew with dashes
_NONE = "&ndash;"
_SCALES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --soft: #59636e; --edge: #d1d9e0; --good: #1a7f37;
  --warn: #9a6700; --bad: #cf222e; --s0: #0969da; --s1: #bc4c00; --s2: #1a7f37; --s3: #8250df; --s4: #bf3989; --s5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --soft: #9198a1; --edge: #3d444d;
  --good: #3fb950; --warn: #d29922; --bad: #f85149; --s0: #58a6ff; --s1: #f0883e; --s2: #3fb950; --s3: #bc8cff;
  --s4: #f778ba; --s5: #9198a1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .5rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.note { border-left: .25rem solid; padding-left: .75rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--edge); padding: .4rem .6rem .4rem 0; text-align: left; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--edge); } .change { stroke: var(--warn); stroke-dasharray: 2 3; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dashed { stroke-dasharray: 6 4; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); }
.s3 { stroke: var(--s3); } .s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0 0; padding: 0; }
.key svg { display: inline-block; width: 1.5rem; height: .75rem; vertical-align: baseline; }
@media (max-width: 40rem) { thead { position: absolute; clip-path: inset(50%); }
  table, tbody, tr, th, td { display: block; } tr { border-bottom: 1px solid var(--edge); padding: .5rem 0; }
  th, td { border: 0; padding: .1rem 0; } td { display: flex; justify-content: space-between; gap: 1rem; }
  svg text { font-size: 20px; } td::before { content: attr(data-label); color: var(--soft); } }
"""


def render(snapshot: Snapshot, moments: Sequence[Moment], now: float) -> str:
    """Write the page.

    Args:
        snapshot: what is known.
        moments: the lag over the last minutes, the oldest first.
        now: by the monitor's clock.
    """
    title = f"{snapshot.primary or 'no primary'} · PostgreSQL hosts"
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="refresh" content="5">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            "<h1>PostgreSQL hosts</h1>",
            *_notes(snapshot),
            *_table(snapshot, now),
            *_plot(snapshot, moments, now),
            "</main>\n</body>\n</html>\n",
        )
    )


def _notes(snapshot: Snapshot) -> Iterator[str]:
    if not snapshot.decided:
        yield '<p class="note warn" role="status">Not every host has been asked yet.</p>'
    elif snapshot.primary is None:
        yield '<p class="note bad" role="alert">There is no primary.</p>'
    else:
        yield f'<p class="note good" role="status">The primary is {escape(snapshot.primary)}.</p>'
    if snapshot.split_brain:
        yield '<p class="note bad" role="alert">Several hosts say that they are the primary.</p>'
    if snapshot.fence is not None:
        yield f'<p class="soft">Highest timeline seen: {snapshot.fence}</p>'


def _table(snapshot: Snapshot, now: float) -> Iterator[str]:
    labels = ("Role", "State", "Timeline", "Lag", "Behind", "Seen")
    yield (
        "<table>\n<thead><tr>"
        + "".join(f'<th scope="col">{label}</th>' for label in ("Host", *labels))
        + "</tr></thead>\n<tbody>"
    )
    for status in snapshot:
        primary = status.host == snapshot.primary
        cells = _cells(status, shown_lag(status, snapshot, now), now, primary=primary)
        row = "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in zip(labels, cells, strict=True))
        yield f'<tr><th scope="row">{escape(status.host)}</th>{row}</tr>'
    yield "</tbody>\n</table>"


def _cells(status: HostStatus, lag: float | None, now: float, *, primary: bool) -> tuple[str, ...]:
    age = status.age(now)
    return (
        _role(status, primary=primary),
        _state(status),
        str(status.timeline) if status.timeline is not None else _NONE,
        _seconds(lag) if lag is not None else _NONE,
        _bytes(status.lag_bytes) if status.lag_bytes is not None else _NONE,
        f"{_seconds(age)} ago" if age is not None else "never",
    )


def _role(status: HostStatus, *, primary: bool) -> str:
    if primary:
        return '<strong class="good">primary</strong>'
    if status.foreign:
        return '<span class="bad">of another cluster</span>'
    if status.role == "primary":
        return f'<span class="bad">{"old primary, fenced" if status.fenced else "says primary, not used"}</span>'
    return status.role if status.role != "unknown" else _NONE


def _state(status: HostStatus) -> str:
    kind = {"up": "good", "suspect": "warn", "dead": "bad"}.get(status.state, "soft")
    error = f" ({escape(status.error)})" if status.error else ""
    return f'<span class="{kind}">{status.state}{error}</span>'


# The plot


def _plot(snapshot: Snapshot, moments: Sequence[Moment], now: float) -> Iterator[str]:
    hosts = [status.host for status in snapshot]
    scale = _scale(moments)
    yield f"<h2>Lag over the last {SPAN / 60:g} minutes</h2>"
    yield f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="plot">'
    yield f'<title id="plot">Lag in seconds of {escape(", ".join(hosts))}</title>'
    yield from _axes(scale)
    for before, after in pairwise(moments):
        if before.primary != after.primary and now - after.at <= SPAN:
            x, text = _x(after.at, now), f"the primary was {before.primary or 'none'}, is {after.primary or 'none'}"
            place = f'x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"'
            yield f'<line class="change" {place}><title>{escape(text)}</title></line>'
    for number, host in enumerate(hosts):
        for points in _runs(host, moments, now, scale):
            yield f'<polyline class="{_class(number)}" points="{points}"/>'
    yield '</svg>\n<ul class="key">'
    for number, host in enumerate(hosts):
        mark = f'<svg viewBox="0 0 24 12" aria-hidden="true"><line class="{_class(number)}" x1="0" x2="24" y1="6" y2="6"/></svg>'
        yield f"<li>{mark} {escape(host)}</li>"
    yield '</ul>\n<p class="soft">An upper bound: the age of the last probe is in it. A gap: the lag was unknown.</p>'


def _axes(scale: float) -> Iterator[str]:
    for share in (0.0, 0.5, 1.0):
        y = _y(share * scale, scale)
        yield f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{_seconds(share * scale)}</text>'
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        ago = SPAN * (1 - share) / 60
        text = f"-{ago:g} min" if ago else "now"
        yield f'<text x="{x:g}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{text}</text>'


def _runs(host: str, moments: Sequence[Moment], now: float, scale: float) -> Iterator[str]:
    """Give the lines of a host: one for each stretch in which its lag was known."""
    run: list[str] = []
    last = 0.0
    for moment in moments:
        lag = moment.lags.get(host)
        if lag is None or moment.at - last > 3 * EVERY:
            if run:
                yield " ".join(run)
            run = []
        if lag is not None and now - moment.at <= SPAN:
            run.append(f"{_x(moment.at, now)},{_y(lag, scale)}")
            last = moment.at
    if run:
        yield " ".join(run)


def _scale(moments: Sequence[Moment]) -> float:
    highest = max((lag for moment in moments for lag in _known(moment.lags)), default=0.0)
    return next((scale for scale in _SCALES if highest <= scale), highest)


def _known(lags: Mapping[str, float | None]) -> Iterator[float]:
    return (lag for lag in lags.values() if lag is not None)


def _x(at: float, now: float) -> float:
    return round(_LEFT + (1 - (now - at) / SPAN) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(lag: float, scale: float) -> float:
    return round(_HEIGHT - _BOTTOM - min(lag / scale, 1.0) * (_HEIGHT - _TOP - _BOTTOM), 1)


def _class(number: int) -> str:
    return f"line s{number % _LINES}" + (" dashed" if number >= _LINES else "")


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.3g} s" if value < 100 else f"{value / 60:.0f} min"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{value:.3g} GB"
