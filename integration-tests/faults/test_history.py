"""The checker itself: histories made by hand, a clean one and one for every violation."""

import pytest

from .history import Evidence, Outcome, Row, check


def rows(request, group, parts, xid, *, database="first"):
    return [Row(database, request, group, part, xid) for part in range(parts)]


def outcome(request="r", shape="small", status=200, complete=True, **known):
    return Outcome(request, shape, status, complete, **known)


def verdict(outcomes, rows=(), **known):
    return check(Evidence({one.request: one for one in outcomes}, rows, **known))


def kinds(*args, **known):
    return [one.kind for one in verdict(*args, **known).violations]


def test_clean_history_has_no_violation():
    """What was acknowledged is there, what was refused is not, and what was broken off is counted."""
    outcomes = [
        outcome("a"),
        outcome("b", status=500),
        outcome("c", status=None, complete=False),
        outcome("d", "stream"),
        outcome("e", "stream", complete=False),
        outcome("f", "boom", status=500),
        outcome("g", unsent=True, status=None, complete=False),
    ]
    there = [*rows("a", "h", 3, 1), *rows("c", "h", 3, 2), *rows("d", "h", 2, 3), *rows("d", "b", 4, 4), *rows("e", "h", 2, 5)]

    found = verdict(outcomes, there)

    assert found.violations == []
    assert found.counts == {
        "requests": 7,
        "acknowledged": 2,
        "refused": 2,
        "broken off": 2,
        "unsent": 1,
        "in doubt": 2,
        "in doubt, and there": 1,
    }


@pytest.mark.parametrize("status", [200, 201, 303])
def test_acknowledged_and_missing_is_lost(status):
    """A status below 400 is a promise."""
    assert kinds([outcome(status=status)]) == ["lost"]


def test_head_alone_is_a_promise():
    """The commit comes before the head, whatever becomes of the body (P4)."""
    assert kinds([outcome(complete=False)]) == ["lost"]


@pytest.mark.parametrize("status", [404, 422, 500, 503])
def test_refused_and_present_is_a_ghost(status):
    """A client that was refused will try again."""
    assert kinds([outcome(status=status)], rows("r", "h", 3, 1)) == ["ghost"]


def test_failed_commit_may_be_there_only_if_the_answer_says_so():
    """In doubt is what ``is_in_doubt`` says, no excuse for every 500."""
    found = verdict([outcome(status=500, in_doubt=True)], rows("r", "h", 3, 1))

    assert found.violations == []
    assert found.counts["in doubt, and there"] == 1


def test_other_connect_may_be_there_only_if_the_answer_names_it():
    """What had committed when a second database failed stands in ``committed_connects`` (P9)."""
    there = rows("r", "h", 2, 1)

    assert kinds([outcome(shape="two", status=500, committed=frozenset({"first"}))], there) == []
    assert kinds([outcome(shape="two", status=500, committed=frozenset({"second"}))], there) == ["ghost"]


def test_request_that_was_never_sent_and_is_there_is_a_ghost():
    """Somebody else's request has its number, or the log is wrong."""
    assert kinds([outcome(status=None, complete=False, unsent=True)], rows("r", "h", 3, 1)) == ["ghost"]


def test_rolled_back_row_is_a_ghost_whatever_the_client_saw():
    """What is rolled back by the application itself is never there."""
    assert kinds([outcome(shape="boom", status=None, complete=False)], rows("r", "v", 2, 1)) == ["ghost"]


def test_part_of_a_transaction_is_torn():
    """All of it or nothing."""
    assert kinds([outcome()], rows("r", "h", 2, 1)) == ["torn"]


def test_group_in_two_transactions_is_torn():
    """A transaction that ended in the middle of a handler has not been one."""
    assert kinds([outcome()], [*rows("r", "h", 2, 1), Row("first", "r", "h", 2, 9)]) == ["torn"]


def test_one_of_two_prepared_databases_is_torn():
    """Two phases are all or nothing, also in doubt (P9)."""
    assert kinds([outcome(shape="twophase", status=None, complete=False)], rows("r", "t", 2, 1)) == ["torn"]


def test_row_that_is_there_twice_is_found():
    """A unit that was repeated after it had committed."""
    assert kinds([outcome()], [*rows("r", "h", 3, 1), *rows("r", "h", 3, 1)]) == ["twice"]


def test_rows_of_two_requests_in_one_transaction_are_bleeding():
    """Nobody writes in another's transaction (P12)."""
    assert kinds([outcome("a"), outcome("b")], [*rows("a", "h", 3, 1), *rows("b", "h", 3, 1)]) == ["bleeding"]


def test_rows_of_two_units_of_a_request_in_one_transaction_are_bleeding():
    """``run_in_new_ctx`` is a transaction of its own (P18)."""
    there = [*rows("r", "h", 1, 1), *rows("r", "n0", 2, 1), *rows("r", "n1", 2, 2)]

    assert kinds([outcome(shape="gather")], there) == ["bleeding"]


def test_child_task_shares_the_transaction_of_its_own_request_only():
    """It is in the same unit while that lives (P2)."""
    mine = [*rows("a", "h", 2, 1), *rows("a", "c", 1, 1)]

    assert kinds([outcome("a", "left-behind")], mine) == []
    assert kinds([outcome("a", "left-behind"), outcome("b")], [*mine, *rows("b", "h", 3, 1)]) == ["bleeding"]


def test_complete_stream_without_its_last_commit_is_lost():
    """A body that came to its end has been committed (P5)."""
    assert kinds([outcome(shape="stream")], rows("r", "h", 2, 1)) == ["lost"]


def test_message_is_held_to_its_answer():
    """Each message of a websocket is acknowledged or refused by itself."""
    socket = outcome(shape="socket", status=101, complete=False, messages={0}, refused_messages={1})

    assert kinds([socket]) == ["lost"]
    assert kinds([socket], [*rows("r", "m0", 2, 1), *rows("r", "m1", 2, 2), *rows("r", "m2", 2, 3)]) == ["ghost"]


def test_callback_of_a_commit_that_is_not_there_is_lost():
    """``on_commit`` ran: the unit has believed that it committed (P14)."""
    background = outcome(shape="background")

    assert kinds([background], rows("r", "h", 2, 1), called=frozenset({"r/g"})) == ["lost"]


def test_callback_that_a_success_has_not_run_is_found():
    """``on_commit`` runs before the head leaves (P14); only a process that was killed cannot tell."""
    assert kinds([outcome()], rows("r", "h", 3, 1), knows_calls=True) == ["uncalled"]
    assert kinds([outcome()], rows("r", "h", 3, 1), knows_calls=True, called=frozenset({"r/h"})) == []
    assert kinds([outcome()], rows("r", "h", 3, 1)) == []


def test_counter_that_disagrees_with_its_transactions_is_a_lost_update():
    """Read, modify, write: each committed transaction counts once."""
    assert kinds([], counters={0: 1, 1: 2}, bumps={0: 1, 1: 3}) == ["lost update"]


def test_row_that_nobody_asked_for_is_found():
    """A row without a request that could have written it."""
    assert kinds([], rows("r", "h", 3, 1)) == ["stray"]
    assert kinds([outcome()], [*rows("r", "h", 3, 1), *rows("r", "x", 2, 2)]) == ["stray"]


def test_answer_that_never_came_is_found():
    """Nobody is left waiting, unless the test itself has cancelled the task."""
    waiting = outcome(status=None, complete=False, hung=True)

    assert kinds([waiting]) == ["hung"]
    waiting.cancelled = True
    assert kinds([waiting]) == []
