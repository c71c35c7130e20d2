"""The status page: what is in it, that it is whole, and that it needs nothing from elsewhere."""

import asyncio
import re
from html.parser import HTMLParser

from context_sqla_hosts import HostStatus, Snapshot
from context_sqla_hosts._history import EVERY, SPAN, History, Moment
from context_sqla_hosts._page import render

VOID = {"meta", "line"}
HOSTS = (
    HostStatus("a:1", state="up", role="primary", timeline=2, lag_bytes=0, fresh_at=1000.0, seen_at=999.9),
    HostStatus(
        "b:1", state="suspect", role="replica", timeline=2, lag_bytes=3_000, fresh_at=998.5, seen_at=999.0, error="timeout"
    ),
    HostStatus("c:1", state="up", role="primary", timeline=1, fenced=True, seen_at=990.0),
    HostStatus("d:1", state="dead", error="refused"),
    HostStatus("<e>&:1", state="up", role="replica", foreign=True),
)


class Page(HTMLParser):
    """Checks that elements are closed in their order, and keeps what a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.seen = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag
        elif tag == "line":
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.seen += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def moments(*lags, host="b:1", end=1000.0, primary="a:1"):
    first = end - EVERY * (len(lags) - 1)
    return [Moment(first + EVERY * number, primary, {host: lag}) for number, lag in enumerate(lags)]


def page(hosts=HOSTS, history=(), **options):
    options = {"primary": "a:1", "fence": 2, "decided": True, **options}
    return render(Snapshot(1, 1000.0, hosts, **options), history, 1000.0)


def test_every_host_has_a_row():
    """Role, state, timeline, lag; what is not known is a dash, and a fenced primary is called what it is."""
    assert Page(page()).rows == [
        ["Host", "Role", "State", "Timeline", "Lag", "Behind", "Seen"],
        ["a:1", "primary", "up", "2", "0 ms", "0 B", "100 ms ago"],
        ["b:1", "replica", "suspect (timeout)", "2", "1.5 s", "2.93 kB", "1 s ago"],
        ["c:1", "old primary, fenced", "up", "1", "–", "–", "10 s ago"],
        ["d:1", "–", "dead (refused)", "–", "–", "–", "never"],
        ["<e>&:1", "of another cluster", "up", "–", "–", "–", "never"],
    ]


def test_what_matters_is_said_first():
    """The primary, or that there is none; a split brain; that it is too early to tell."""
    assert "The primary is a:1." in Page(page()).seen
    assert "There is no primary." in Page(page(primary=None)).seen
    assert "Several hosts say that they are the primary." in Page(page(split_brain=True)).seen
    assert "Not every host has been asked yet." in Page(page(decided=False, primary=None)).seen
    assert "says primary, not used" in Page(page(hosts=(HostStatus("a:1", state="up", role="primary"),), primary=None)).seen


def test_it_needs_nothing_from_elsewhere():
    """No script, no link, no image, no font: one document, for light and dark, and for small screens."""
    text = page(history=moments(0.5, 0.7))

    assert {tag for tag, _ in Page(text).tags}.isdisjoint({"script", "link", "img", "iframe", "a", "form"})
    assert not re.search(r"https?:|url\(|@import|src=|\bon[a-z]+=", text)
    assert "prefers-color-scheme: dark" in text
    assert "max-width: 40rem" in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(text).all("meta")


def lines(text):
    return [attrs["points"].split() for attrs in Page(text).all("polyline")]


def test_the_lag_is_a_line():
    """In the middle of the scale, at the right end now."""
    ((*_, last),) = lines(page(history=moments(0.5, 1.0, 0.5)))

    assert last == "628.0,106.0"
    assert "1 s" in Page(page(history=moments(0.5, 1.0, 0.5))).seen


def test_an_unknown_lag_is_a_gap():
    """And so is a time without samples, and what is older than the plot."""
    assert [len(line) for line in lines(page(history=moments(0.1, 0.1, None, 0.1, 0.1, 0.1)))] == [2, 3]
    early, late = moments(0.1, 0.1, end=900.0), moments(0.1, 0.1)
    assert [len(line) for line in lines(page(history=early + late))] == [2, 2]
    assert [len(line) for line in lines(page(history=moments(0.1, 0.1, end=1000.0 - SPAN - 10) + late))] == [2]


def test_another_primary_is_marked():
    """Where the roles changed, on the axis of time."""
    history = moments(0.1, 0.1, end=900.0, primary="b:1") + moments(0.1, 0.1)

    assert "the primary was b:1, is a:1" in Page(page(history=history)).seen


def test_many_hosts_have_lines_of_their_own():
    """Colours, then dashes."""
    hosts = tuple(HostStatus(f"h{number}:1") for number in range(8))
    classes = [attrs["class"] for attrs in Page(page(hosts=hosts, primary=None)).all("line") if "line" in attrs["class"]]

    assert classes == [f"line s{number}" for number in range(6)] + ["line s0 dashed", "line s1 dashed"]


def test_any_lag_fits():
    """A day, and more than the largest scale."""
    for lag in (0.0, 0.05, 7.0, 4_000.0, 86_400.0, 1_000_000.0):
        ((point, *_),) = lines(page(history=moments(lag, lag)))
        assert 20 <= float(point.split(",")[1]) <= 192


async def test_samples_are_taken_while_the_hosts_are_watched(told, monkeypatch):
    """By a timer: no task is left, and the end of the watch is the end of it."""
    monkeypatch.setattr("context_sqla_hosts._history.EVERY", 0.001)
    hosts = told(["a", "b"])
    history = History(hosts)
    history.start()
    assert history.moments() == ()
    async with hosts:
        history.sample()
        assert history.moments() == ()
        hosts.tell_all()
        history.start()
        history.start()
        before = asyncio.all_tasks()
        while len(history.moments()) < 3:
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
    while history._timer is not None:
        await asyncio.sleep(0)
    first = history.moments()[0]
    assert (first.primary, dict(first.lags)) == ("a:5432", {"a:5432": 0.0, "b:5432": 0.0})
    async with hosts:
        history.start()
        history.stop()
        assert history._timer is None
