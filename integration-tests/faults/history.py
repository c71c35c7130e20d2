"""What the clients saw, what the database holds, and whether the two agree."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .shapes import SHAPES, Group


class Row(NamedTuple):
    """A committed row; ``xid`` is the transaction that wrote it."""

    database: str
    request: str
    group: str
    part: int
    xid: int


@dataclass
class Outcome:
    """A request as its client saw it end.

    ``status`` is None when no head came. ``in_doubt`` and ``committed`` are what the answer of a failed request says about the
    transaction (``is_in_doubt``, ``committed_connects``). ``unsent``: there was no connection to send it on.
    """

    request: str
    shape: str
    status: int | None = None
    complete: bool = False
    in_doubt: bool = False
    committed: frozenset[str] = frozenset()
    unsent: bool = False
    #: The injector has cancelled its task: to the client that is a server which broke off.
    cancelled: bool = False
    #: No answer came within the deadline, and the connection stayed open.
    hung: bool = False
    #: Messages or events that were acknowledged, and messages that were refused for certain.
    messages: set[int] = field(default_factory=set)
    refused_messages: set[int] = field(default_factory=set)

    @property
    def accepted(self) -> bool:
        """Whether a status < 400 came."""
        return self.status is not None and self.status < 400

    @property
    def refused(self) -> bool:
        """Whether a status >= 400 came."""
        return self.status is not None and self.status >= 400


class Violation(NamedTuple):
    """Something that must not be."""

    kind: str
    request: str
    text: str


@dataclass
class Verdict:
    """What the checker found; ``counts`` are for the report."""

    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, request: str, text: str) -> None:
        """Note a violation."""
        self.violations.append(Violation(kind, request, text))

    def of(self, kind: str) -> list[Violation]:
        """Return the violations of a kind."""
        return [one for one in self.violations if one.kind == kind]


@dataclass(frozen=True)
class Evidence:
    """All that is known after a round."""

    outcomes: Mapping[str, Outcome]
    rows: Sequence[Row]
    #: "request/group" whose ``on_commit`` callback has run.
    called: frozenset[str] = frozenset()
    #: Whether ``called`` is complete; a process that was killed has taken what it knew with it.
    knows_calls: bool = False
    #: Counters as the database holds them, and how often a committed transaction says that it has bumped them.
    counters: Mapping[int, int] = field(default_factory=dict)
    bumps: Mapping[int, int] = field(default_factory=dict)


def check(evidence: Evidence) -> Verdict:
    """Hold what the clients saw against the rows."""
    verdict = Verdict()
    found: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in evidence.rows:
        found[row.request, row.group].append(row)
    _bleeding(evidence.rows, verdict)
    _counters(evidence, verdict)
    expected: set[tuple[str, str]] = set()
    for outcome in evidence.outcomes.values():
        verdict.counts.update(_tally(outcome))
        if outcome.hung and not outcome.cancelled:
            verdict.add("hung", outcome.request, f"{outcome.shape}: no answer within the deadline")
        groups = groups_of(outcome)
        expected |= {(outcome.request, group.name) for group in groups}
        present = {group.name: _state(outcome, group, found[outcome.request, group.name], verdict) for group in groups}
        for group in groups:
            _judge(outcome, group, present[group.name], verdict)
        _all_or_none(outcome, present, verdict)
        for group in groups:
            _callback(outcome, group, present[group.name], evidence, verdict)
    for request, name in found.keys() - expected:
        if found[request, name]:
            verdict.add("stray", request, f"rows of {name!r}, which no client has asked for")
    return verdict


def groups_of(outcome: Outcome) -> list[Group]:
    """Return what a request may have written."""
    shape = SHAPES[outcome.shape]
    return [*shape.groups, *(Group(f"m{number}", 2, "message") for number in range(shape.messages))]


def _tally(outcome: Outcome) -> Iterable[str]:
    yield "requests"
    if outcome.unsent:
        yield "unsent"
    elif outcome.refused:
        yield "refused"
    elif not outcome.accepted or not outcome.complete:
        yield "broken off"
    else:
        yield "acknowledged"


def _state(outcome: Outcome, group: Group, rows: Sequence[Row], verdict: Verdict) -> bool:
    """Return whether a group is there, and complain if only a part of it is."""
    parts = Counter((row.database, row.part) for row in rows)
    if any(number > 1 for number in parts.values()):
        verdict.add("twice", outcome.request, f"{outcome.shape}: rows of {group.name!r} are there more than once")
    if any(row.database != group.database for row in rows):
        verdict.add("stray", outcome.request, f"{outcome.shape}: {group.name!r} is in the wrong database")
    if group.when == "loose":
        return bool(rows)
    if rows and (len(parts) != group.parts or len({row.xid for row in rows}) > 1):
        verdict.add(
            "torn",
            outcome.request,
            f"{outcome.shape}: {len(parts)} of {group.parts} rows of {group.name!r}, in {len({row.xid for row in rows})} transactions",
        )
    return bool(rows)


def _judge(outcome: Outcome, group: Group, present: bool, verdict: Verdict) -> None:
    if outcome.unsent or group.when == "never":
        if present:
            verdict.add("ghost", outcome.request, f"{outcome.shape}: {group.name!r} is there, after {_said(outcome)}")
        return
    promised, excluded = _word(outcome, group)
    if promised and not present:
        verdict.add("lost", outcome.request, f"{outcome.shape}: {group.name!r} is not there, after {_said(outcome)}")
    elif excluded and present and not _excused(outcome, group):
        verdict.add("ghost", outcome.request, f"{outcome.shape}: {group.name!r} is there, after {_said(outcome)}")
    elif not promised and group.when in ("head", "body") and (not excluded or outcome.in_doubt or outcome.cancelled):
        verdict.counts["in doubt"] += 1
        verdict.counts["in doubt, and there"] += present


def _callback(outcome: Outcome, group: Group, present: bool, evidence: Evidence, verdict: Verdict) -> None:
    called = f"{outcome.request}/{group.name}" in evidence.called
    if called and not present:
        verdict.add("lost", outcome.request, f"{outcome.shape}: on_commit has run for {group.name!r}, which is not there")
    elif group.calls and evidence.knows_calls and not called and present and _word(outcome, group)[0]:
        verdict.add("uncalled", outcome.request, f"{outcome.shape}: on_commit has not run for {group.name!r}")


def _word(outcome: Outcome, group: Group) -> tuple[bool, bool]:
    """Return whether the client was told that the group is there, and whether that it is not."""
    if group.when == "head":
        return outcome.accepted, outcome.refused
    if group.when == "body":
        return outcome.accepted and outcome.complete, outcome.refused
    if group.when == "own":
        return outcome.accepted, False
    if group.when == "message":
        return int(group.name[1:]) in outcome.messages, int(group.name[1:]) in outcome.refused_messages
    return False, False


def _excused(outcome: Outcome, group: Group) -> bool:
    """Return whether a refused group may be there, because the answer says so, or because the server broke off."""
    return outcome.in_doubt or outcome.cancelled or (group.connect or group.database) in outcome.committed


def _all_or_none(outcome: Outcome, present: Mapping[str, bool], verdict: Verdict) -> None:
    if outcome.shape == "twophase" and present["t"] != present["u"]:
        verdict.add("torn", outcome.request, f"twophase: only one of the databases has it, after {_said(outcome)}")


def _said(outcome: Outcome) -> str:
    said = "no answer" if outcome.status is None else f"{outcome.status}{'' if outcome.complete else ', broken off'}"
    notes = [name for name in ("in_doubt", "cancelled", "unsent", "hung") if getattr(outcome, name)]
    return " ".join([said, *notes, *sorted(outcome.committed)])


def _bleeding(rows: Iterable[Row], verdict: Verdict) -> None:
    writers: defaultdict[tuple[str, int], set[tuple[str, str]]] = defaultdict(set)
    for row in rows:
        writers[row.database, row.xid].add((row.request, _SHARED.get(row.group, row.group)))
    for (database, xid), who in writers.items():
        named = sorted(map("/".join, who))
        if len(named) > 1:
            verdict.add(
                "bleeding", named[0].split("/")[0], f"one transaction ({xid} in {database}) has rows of {', '.join(named)}"
            )


#: A child task that writes while its request lives shares the transaction (P2).
_SHARED = {"c": "h"}


def _counters(evidence: Evidence, verdict: Verdict) -> None:
    for key, value in evidence.counters.items():
        if value != evidence.bumps.get(key, 0):
            text = f"counter {key} is {value}, and {evidence.bumps.get(key, 0)} committed transactions have bumped it"
            verdict.add("lost update", "", text)
