"""Tests of applications on context-sqla: pytest finds the plugin by itself; here is what tests import."""

from context_sqla.testing import capture_on_commit

from ._modes import ExpireOnCommitWarning, Mode
from ._queries import Query, assert_query_count

__all__ = ["ExpireOnCommitWarning", "Mode", "Query", "assert_query_count", "capture_on_commit"]
