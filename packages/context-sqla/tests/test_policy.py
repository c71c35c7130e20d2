"""When a unit commits: the pure rule."""

import pytest
from context_sqla.adapters import Policy


@pytest.mark.parametrize(
    ("status", "commits"),
    [(100, True), (200, True), (204, True), (303, True), (399, True), (400, False), (404, False), (500, False), (599, False)],
)
def test_status_below_400_commits(status, commits):
    """The rule without a policy: below 400 commits, from 400 on rolls back (P3)."""
    assert Policy().commits(status) is commits


def test_should_commit_replaces_the_rule():
    """``should_commit`` is asked with the status, and nothing else decides (P3)."""
    asked = []

    def only_teapots(status):
        asked.append(status)
        return status == 418

    policy = Policy(should_commit=only_teapots)

    assert [policy.commits(status) for status in (200, 418, 500)] == [False, True, False]
    assert asked == [200, 418, 500]


def test_answer_of_should_commit_is_a_bool():
    """What ``should_commit`` returns counts by its truth (P3)."""
    assert Policy(should_commit=lambda status: status - 200).commits(200) is False  # type: ignore[arg-type,return-value]
    assert Policy(should_commit=lambda status: status).commits(500) is True  # type: ignore[arg-type,return-value]


def test_error_in_should_commit_is_raised():
    """A rule that fails is an error and no decision (P3)."""

    def fail(status):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Policy(should_commit=fail).commits(200)


def test_policy_cannot_be_changed():
    """One policy serves many requests at once: nobody can change it under them."""
    with pytest.raises(AttributeError):
        Policy().should_commit = lambda status: True  # type: ignore[misc]


def test_policies_are_equal_by_value():
    """Two policies that say the same are the same."""
    assert Policy() == Policy(None, None)
