"""The fixtures that run in the loops of pytest-asyncio: one per scope of a loop, for tests of that scope."""

from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import pytest
import pytest_asyncio

from ._modes import Connects, Sessions
from ._tests import Asked, play

ScopeName = Literal["session", "package", "module", "class", "function"]


def _fixture(scope: ScopeName) -> Callable[..., Any]:
    @pytest_asyncio.fixture(name=f"_context_sqla_asyncio_{scope}", loop_scope=scope)
    async def played(_context_sqla_asked: Asked, context_sqla_connects: Connects) -> AsyncIterator[Sessions]:
        async with play(_context_sqla_asked, context_sqla_connects) as sessions:
            yield sessions

    return played


in_function = _fixture("function")
in_class = _fixture("class")
in_module = _fixture("module")
in_package = _fixture("package")
in_session = _fixture("session")


def runs(item: pytest.Item) -> bool:
    """Return whether pytest-asyncio runs this test."""
    return pytest_asyncio.is_async_test(item)
