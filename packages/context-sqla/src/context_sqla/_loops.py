"""The engines of a connect, kept per event loop and host, and closed with what they belong to (P13, P15)."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any, Protocol
from weakref import WeakSet, finalize

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ._engines import Watch, watch
from ._limits import Limits
from ._settle import TIMERS, hold, logger, running_loop


class Grace(Protocol):
    """What the sweep asks of a connect."""

    host: str | None
    idle_host_grace: float
    cleanup_timeout: float


class Member:
    """One engine with its session maker: of one host, in one event loop."""

    __slots__ = ("adopted", "chosen", "engine", "host", "maker", "watch")

    def __init__(self, host: str, engine: AsyncEngine, maker: async_sessionmaker[Any], *, adopted: bool) -> None:
        self.host: str = host
        self.engine: AsyncEngine = engine
        self.maker: async_sessionmaker[Any] = maker
        self.adopted: bool = adopted
        self.watch: Watch = watch(engine)
        self.chosen: float = 0.0

    async def dispose(self, timeout: float) -> None:
        """Close the idle connections; those in use are closed when they come back; nothing waits longer than the limit."""
        self.watch.retired = not self.adopted
        limit = asyncio.get_running_loop().call_later(timeout, self.watch.cut_all)
        try:
            await self.engine.dispose()
            if self.watch.late:  # a thread cannot be cancelled: what it opens would stay open if the loop ended now
                await asyncio.wait(tuple(self.watch.late), timeout=timeout)
        finally:
            limit.cancel()


class LoopState:
    """What a connect has in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cleanup_timeout: float) -> None:
        self.loop: asyncio.AbstractEventLoop = loop
        self.members: dict[str, Member] = {}
        self.active: set[Any] = set()  # the sessions of running units
        self.limits: Limits = Limits(loop)
        self.retiring: set[Member] = set()  # out of use, but a connection is out or a thread not at its end
        self._sweep: asyncio.TimerHandle | None = None
        self._drained: asyncio.Event | None = None
        self._keeper: Any = None
        self._dropping: asyncio.Task[None] | None = None
        self._cleanup_timeout: float = cleanup_timeout

    def keep(self) -> None:
        """Close everything when the loop shuts down its asynchronous generators, as `asyncio.run` and its like do."""
        _kept.difference_update([state for state in _kept if state.loop.is_closed()])
        _kept.add(self)
        self._keeper = self._until_the_loop_ends()
        with contextlib.suppress(StopIteration):
            self._keeper.__anext__().send(None)

    def add(self, member: Member) -> None:
        """Make this the engine of its host, also if it was out of use."""
        self.retiring = {each for each in self.retiring if each.watch is not member.watch}
        member.watch.retired = False
        self.members[member.host] = member

    def leave(self, slot: Any) -> None:
        """Forget a session whose unit has ended."""
        self.active.discard(slot)
        if not self.active and self._drained is not None:
            self._drained.set()
            self._drained = None

    async def drained(self, timeout: float) -> bool:
        """Wait until no unit is running, and return whether that came true in time."""
        if not self.active:
            return True
        if self._drained is None:
            self._drained = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._drained.wait()
        return not self.active

    def retire(self, member: Member, timeout: float) -> None:
        """Take an engine out of use; its idle connections are closed in a task that is held."""
        if self.members.get(member.host) is member:
            del self.members[member.host]
        self.retiring.add(member)

        async def dispose() -> None:
            try:
                await member.dispose(timeout)
            finally:
                self._forget_finished()

        hold(dispose())

    def sweep_later(self, connect: Grace) -> None:
        """Look, after the grace, for hosts that are no longer in use."""
        if self._sweep is None and len(self.members) > 1:
            self._sweep = self.loop.call_later(max(connect.idle_host_grace, 0.02), self._swept, connect, context=TIMERS)

    def _swept(self, connect: Grace) -> None:
        self._sweep = None
        oldest = self.loop.time() - connect.idle_host_grace
        for member in tuple(self.members.values()):
            if member.host != connect.host and not member.watch.out and member.chosen <= oldest:
                self.retire(member, connect.cleanup_timeout)
        self.sweep_later(connect)

    async def shut(self, cleanup_timeout: float, *, for_good: bool = False) -> None:
        """Close every engine of this loop; for good means that the loop ends, and takes what is adopted or in use along."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self.retiring.update(member for member in self.members.values() if for_good or not member.adopted)
        self.members.clear()
        for member in tuple(self.retiring):
            await member.dispose(cleanup_timeout)
            if for_good:
                member.watch.end()
        self._forget_finished()

    def drop(self) -> None:
        """Close every engine of this loop, whose connect is gone."""
        self._dropping = hold(self.shut(self._cleanup_timeout))

    def _forget_finished(self) -> None:
        self.retiring = {member for member in self.retiring if member.watch.is_alive()}

    async def _until_the_loop_ends(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            _kept.discard(self)
            if self._dropping is not None:
                await asyncio.wait((self._dropping,))
            await self.shut(self._cleanup_timeout, for_good=True)


class Loops:
    """A connect's states, one per event loop that is alive."""

    def __init__(self) -> None:
        self._states: dict[asyncio.AbstractEventLoop, LoopState] = {}
        _all.add(self)
        finalize(self, _dropped, self._states).atexit = False

    def find(self) -> LoopState | None:
        """Return the state of the running loop, None if nothing was used in it."""
        loop = running_loop()
        return None if loop is None else self._states.get(loop)

    def here(self, cleanup_timeout: float, loop: asyncio.AbstractEventLoop | None = None) -> LoopState:
        """Return the state of the running loop, if need be found; the first call in a loop drops what dead loops have left."""
        loop = loop or asyncio.get_running_loop()
        state = self._states.get(loop)
        if state is None:
            self._bury()
            state = self._states[loop] = LoopState(loop, cleanup_timeout)
            state.keep()
        return state

    def elsewhere(self) -> bool:
        """Return whether another event loop that is alive has an engine with open connections."""
        running = self.find()
        states = [state for state in self._states.values() if state is not running and not state.loop.is_closed()]
        return any(member.watch.open for state in states for member in state.members.values())

    def abort(self, host: str) -> int:
        """Cut all connections to a host, in every loop."""
        count = 0
        running = self.find()
        for state in list(self._states.values()):
            for member in [*state.members.values(), *state.retiring]:
                if member.host != host or state.loop.is_closed():
                    continue
                if state is running:
                    count += _abort(member)
                else:
                    count += member.watch.open
                    state.loop.call_soon_threadsafe(_abort, member)
        return count

    def _bury(self) -> None:
        for loop in [loop for loop in self._states if loop.is_closed()]:
            state = self._states.pop(loop, None)
            for member in [*state.members.values(), *state.retiring] if state is not None else ():
                member.watch.drop_all()
                member.watch.forget()
                member.engine.sync_engine.dispose(close=False)

    def forget(self) -> None:
        """Let go of everything without touching a socket: they belong to the parent process."""
        for state in self._states.values():
            for member in [*state.members.values(), *state.retiring]:
                _abandoned.append(member.engine.sync_engine.pool)
                member.engine.sync_engine.dispose(close=False)
                member.watch.forget()
        _abandoned.append(dict(self._states))
        self._states.clear()


_all: WeakSet[Loops] = WeakSet()
_kept: set[LoopState] = set()  # not to be collected: nobody waits for what a collected generator still has to close
_abandoned: list[Any] = []  # never collected: a finalizer would close what the parent still uses


def _abort(member: Member) -> int:
    count = member.watch.abort()
    member.engine.sync_engine.dispose(close=False)  # the next session connects anew
    return count


def _dropped(states: dict[asyncio.AbstractEventLoop, LoopState]) -> None:
    """Close what a connect has open that is collected without `close()`."""
    for loop, state in states.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(state.drop)


def _forget_all() -> None:
    for loops in list(_all):
        try:
            loops.forget()
        except Exception:
            logger.exception("A connect could not forget the connections of its parent process")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
