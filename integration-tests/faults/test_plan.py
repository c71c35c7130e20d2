"""One number makes a round: the same load and the same faults again."""

import itertools

from .application import HANDLERS
from .injector import _FAULTS
from .plan import FREQUENT, LANES, PROCESS_ROUNDS, RARE, plan
from .shapes import KEYS, SHAPES, keys_of


def test_number_reproduces_a_round():
    """Faults and visits are the same for the same number, and others for another."""
    one, again, other = plan(7, 5), plan(7, 5), plan(8, 5)

    assert one == again
    assert one.faults != other.faults
    for lane in range(LANES):
        assert first(one.visits(lane)) == first(again.visits(lane))
    assert first(one.visits(0)) != first(one.visits(1))


def test_rounds_cover_every_fault_and_every_shape():
    """No kind of fault and no shape is forgotten in a run of some length."""
    rounds = [plan(number, 5) for number in range(30)]
    kinds = set().union(*(one.kinds for one in rounds))
    shapes = {asked.shape for one in rounds for visit in first(one.visits(0), 60) for asked in visit.requests}

    assert kinds == {*FREQUENT, *RARE, "sigterm", "sigkill"} == set(_FAULTS)
    assert shapes == set(SHAPES) == {*HANDLERS, "socket"}
    assert [one.number for one in rounds if one.ends_the_process][:2] == [PROCESS_ROUNDS - 1, 2 * PROCESS_ROUNDS - 1]


def test_requests_are_unique():
    """Rows are told apart by the number of their request."""
    asked = [asked.request for lane in range(LANES) for visit in first(plan(3, 5).visits(lane)) for asked in visit.requests]

    assert len(asked) == len(set(asked))


def test_request_bumps_two_different_counters():
    """Two of few, in both orders, so that requests lock each other out."""
    pairs = {tuple(keys_of(str(number))) for number in range(500)}

    assert pairs == set(itertools.permutations(range(KEYS), 2))


def first(visits, count=20):
    return list(itertools.islice(visits, count))
