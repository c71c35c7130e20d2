"""When a unit of work commits: pure rules, without input or output (P3)."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession

BeforeCommitCallback: TypeAlias = Callable[[AsyncSession], Awaitable[Any]]
"""An async function, called with each session that has an open transaction before that is committed."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Say when a unit commits, and who is asked before it does.

    Args:
        should_commit: takes the response's status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.
    """

    should_commit: Callable[[int], bool] | None = None
    before_commit: BeforeCommitCallback | None = None

    def commits(self, status: int) -> bool:
        """Return whether a response with this status commits what its request wrote (P3)."""
        if self.should_commit is not None:
            return bool(self.should_commit(status))
        return status < 400


DEFAULT_POLICY = Policy()
