"""The two ways of testing: one transaction that is rolled back, and real commits that are cleaned up."""

import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from enum import StrEnum
from typing import Any, TypeAlias

import pytest
from context_sqla import DBConnect, new_non_ctx_session
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from sqlalchemy.ext.asyncio import AsyncSession

from ._cleaning import Writes
from ._leaks import Leaks, Opened, report

Connects: TypeAlias = Sequence[DBConnect[Any]]
Sessions: TypeAlias = Mapping[DBConnect[Any], AsyncSession]

_LEAK_GRACE = 1.0


class ExpireOnCommitWarning(pytest.PytestWarning):
    """Tell that sessions expire their objects at the commit, which ends in MissingGreenlet."""


class Mode(StrEnum):
    """How a test works with the database."""

    SHARED = "shared"
    REAL = "real"
    OFF = "off"


class Stage:
    """What the tests of one process share.

    Args:
        kept: tables that real commits leave as they are.
        leak_check: whether a test that leaves something open fails.
    """

    def __init__(self, *, kept: Sequence[str], leak_check: bool) -> None:
        self.leaks = Leaks()
        self.writes = Writes()
        self._kept = kept
        self._leak_check = leak_check
        self._warned: set[DBConnect[Any]] = set()

    @asynccontextmanager
    async def play(self, mode: Mode, connects: Connects, *, leak_check: bool | None) -> AsyncIterator[Sessions]:
        """Run one test in a mode, in the event loop of the test; gives its sessions."""
        checks = self._leak_check if leak_check is None else leak_check
        playing = self._shared(connects, checks) if mode is Mode.SHARED else self._real(connects, checks)
        async with playing as sessions:
            yield sessions

    async def after_sync(self, connects: Connects, *, leak_check: bool | None) -> None:
        """End a test that had no event loop of its own, and whose application committed for real."""
        found = self.leaks.found() if self._leak_check and leak_check is not False else []
        await self._clean(connects)
        _complain(found)

    def begin(self) -> None:
        """Forget what was there before the test."""
        self.leaks.begin()
        self.writes.begin()

    @asynccontextmanager
    async def _shared(self, connects: Connects, leak_check: bool) -> AsyncIterator[Sessions]:
        found: list[Opened] = []
        async with _told(found), AsyncExitStack() as stack:
            stack.enter_context(_patience(connects))
            outer = [(connect, await stack.enter_async_context(rollback_session(connect))) for connect in connects]
            await stack.enter_async_context(set_test_context())
            sessions: dict[DBConnect[Any], AsyncSession] = {}
            for connect, session in outer:
                sessions[connect] = await stack.enter_async_context(put_savepoint_session_in_ctx(connect, session))
                self._check_expiry(connect, sessions[connect])
            shared = [(await session.connection()).sync_connection for _, session in outer]
            self.leaks.begin(filter(None, shared), (session.sync_session for session in sessions.values()))
            self.writes.begin()
            yield sessions
            found += await self.leaks.settled(_LEAK_GRACE) if leak_check else []
            for connect in connects if found else ():
                connect.drain_timeout = 0  # it would be waited for in vain
        self._give_up(connects, found)

    @asynccontextmanager
    async def _real(self, connects: Connects, leak_check: bool) -> AsyncIterator[Sessions]:
        self.begin()
        async with AsyncExitStack() as stack:
            sessions = {connect: await stack.enter_async_context(new_non_ctx_session(connect)) for connect in connects}
            for connect, session in sessions.items():
                self._check_expiry(connect, session)
            yield sessions
        found = await self.leaks.settled(_LEAK_GRACE) if leak_check else []
        try:
            self._give_up(connects, found)
        finally:
            await self._clean(connects)

    async def _clean(self, connects: Connects) -> None:
        for connect in connects:
            await self.writes.clean(connect, self._kept)

    def _give_up(self, connects: Connects, found: Sequence[Opened]) -> None:
        if found:
            for connect in connects:
                if connect.host is not None:
                    connect.abort_host(connect.host)  # or the next test waits for the locks of what was left
        _complain(found)

    def _check_expiry(self, connect: DBConnect[Any], session: AsyncSession) -> None:
        if session.sync_session.expire_on_commit and connect not in self._warned:
            warnings.warn(
                f"{connect!r}: its sessions have expire_on_commit=True. The commit, which comes before the answer, then expires "
                "every object that was loaded: reading an attribute of it sends a query where nothing can be awaited, and raises "
                "MissingGreenlet. Pass expire_on_commit=False to async_sessionmaker",
                ExpireOnCommitWarning,
                stacklevel=2,
            )
            self._warned.add(connect)


@contextmanager
def _patience(connects: Connects) -> Iterator[None]:
    """Give back to connects, at the end, the patience that they have now."""
    before = [(connect, connect.drain_timeout) for connect in connects]
    try:
        yield
    finally:
        for connect, seconds in before:
            connect.drain_timeout = seconds


@asynccontextmanager
async def _told(found: Sequence[Opened]) -> AsyncIterator[None]:
    """Let what was left open explain an error of the rollback, which it stands in the way of."""
    try:
        yield
    except Exception as exc:
        if found:
            exc.add_note(report(found))
        raise


def _complain(found: Sequence[Opened]) -> None:
    if found:
        pytest.fail(report(found), pytrace=False)
