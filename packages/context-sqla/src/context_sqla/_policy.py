"""When a unit of work commits: pure rules, without input or output (P3)."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession

BeforeCommitCallback: TypeAlias = Callable[[AsyncSession], Awaitable[Any]]
"""An async function, called with each session that has an open transaction before that is committed."""


class Policy(NamedTuple):
    """Say when a unit commits, and who is asked before it does.

    Args:
        should_commit: takes the response's status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.
        label: takes the unit's request and returns what log lines call it, such as "POST /users". It is called late, when the
            route is known.
    """

    should_commit: Callable[[int], bool] | None = None
    before_commit: BeforeCommitCallback | None = None
    label: Callable[[Any], str] | None = None

    def commits(self, status: int) -> bool:
        """Return whether a response with this status commits what its request wrote (P3).

        Raises:
            TypeError: `should_commit` returned None, or is asynchronous.
        """
        if self.should_commit is not None:
            commits: Any = self.should_commit(status)
            if commits is None or inspect.isawaitable(commits):  # the one would lose all writes, the other keep those of errors
                getattr(commits, "close", bool)()  # a coroutine that nobody awaits would be complained of later, anywhere
                raise TypeError(f"should_commit({status}) must return True or False, not {type(commits).__name__}")
            return bool(commits)
        return status < 400


DEFAULT_POLICY = Policy()
