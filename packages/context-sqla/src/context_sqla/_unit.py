"""The unit of work: one request, one block, one call; its phases, its sessions and its end.

A unit goes through the phases handler, stream, background, closed. What is written in the handler phase is decided before the
head of the response leaves, what the body writes before its last byte, and background work when it has run.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Mapping
from contextvars import Token
from typing import Any

from . import _commit, _context
from ._callbacks import Callback
from ._connect import DBConnect
from ._container import BACKGROUND, CLOSED, HANDLER, STREAM, Container, Phase, RunsAhead
from ._context import current as _current
from ._context import test_unit, test_units
from ._policy import DEFAULT_POLICY, Policy
from ._settle import NOTHING, hold, logger, running_loop, settle
from ._slot import Slot
from .errors import ContextSqlaError, ForeignLoopError, _outcome_of


class Unit(Container):
    """One unit of work: the sessions of one request, and the decision what becomes of them.

    An adapter makes five calls: `Unit.enter`, `head`, `end_of_body`, `disconnected`, `close` (or `close_with`).

    Args:
        policy: when to commit.
        request: what the unit is opened for; the policy's `label` names it.
        runs_ahead: as for `enter`.
    """

    request: Any
    phase: Phase
    slots: dict[str, Slot]
    thread: int | None
    runs_ahead: RunsAhead | None
    parent: Container | None
    _left: bool
    _token: Token[Any] | None
    _commits: bool
    _ends_with: "asyncio.Task[Any] | None"
    _ending: bool = False  # the final commit of the body has begun
    _broken: BaseException | None = None
    _on_commit: list[Callback] | None = None
    _later: list[Callback] | None = None  # the same of a body that runs ahead of its head

    @classmethod
    def enter(cls, policy: Policy = DEFAULT_POLICY, request: Any = None, runs_ahead: RunsAhead | None = None) -> "Unit":
        """Open a unit and make it the current one; nothing else happens until a session is asked for (P1).

        A marked context of a test is joined: the same calls then act on savepoints in the test's transaction (P12). Any other
        context in which this code happens to run is left alone.

        Args:
            policy: when to commit, and what is asked before.
            request: what the unit is opened for, in the framework's words; the policy's `label` names it.
            runs_ahead: for frameworks that begin a body before the head is out: takes the unit and returns whether the code that
                asks for a session is such a body (P5).

        Raises:
            ForeignLoopError: the test's context, which is to be joined, belongs to another event loop.
        """
        unit = cls(policy, request, runs_ahead)
        if test_units:
            unit._join()
        unit._token = _current.set(unit)
        return unit

    def head(self, status: int) -> Awaitable[None]:
        """Commit or roll back before the head of a response leaves (P3, P4).

        Only the first decision counts. If the commit fails its error is raised, everything is rolled back, and the unit is
        ready for the answer of an error handler, whose own head decides again.

        Returns:
            what is to be awaited; `NOTHING` if there was nothing to wait for.
        """
        if self.phase is not HANDLER:
            return NOTHING
        if not self.used and self.policy.should_commit is None:
            self._commits = status < 400
            self.phase = STREAM
            return NOTHING
        return self._head(status)

    async def _head(self, status: int) -> None:
        commits = self.policy.commits(status)
        if self.slots or self._on_commit or self._opening or self._waiting or self.borrowed:
            await self._decide(commits, keep=commits)
        self._commits = commits
        self.phase = STREAM
        if self._ahead is not None:
            self._merge_ahead()
            self._on_commit, self._later = [*(self._on_commit or ()), *(self._later or ())], None
        if self._past_head is not None:
            self._past_head.set()

    def end_of_body(self) -> Awaitable[None]:
        """Commit what the body has written, before its last byte leaves (P5).

        Returns:
            what is to be awaited; `NOTHING` if there was nothing to wait for.

        Raises:
            Exception: that of the commit, when awaited; the last byte must then not leave.
        """
        if self.used or self._left:
            if self.phase is not STREAM or self._left or self._broken is not None or self._is_at_work():
                return self._end_of_body()
            self._waiting = None
            if self.slots:
                slots, self.slots = self._own(), {}
                _commit.end_at_rest(slots)
        if self.phase is STREAM:
            self.phase = BACKGROUND
        return NOTHING

    async def _end_of_body(self) -> None:
        if self._broken is not None:
            raise self._broken  # whoever swallowed it the first time must not complete the response
        if self._left:
            self._left, self.runs_ahead = False, None
            self._merge_ahead()
            await self._decide(False)  # the body went on after its client had left
            await self._end_slots()
        if self.phase is not STREAM:
            return
        if self.slots or self._on_commit or self._opening or self.borrowed:
            await self._finish_body()
        self._waiting = None
        self.phase = BACKGROUND

    def disconnected(self) -> None:
        """Note that the client left: a body that was not finished is rolled back (P5).

        Before the head it means nothing, the handler may run to its end and commit; after the last byte it is no failure.
        """
        if self.phase is not STREAM or self._ending:
            return
        self.phase = BACKGROUND
        self._on_commit = self._waiting = self._producers = None
        self._give_up(self.slots)
        # A body that goes on for a while has sessions of its own: background work may follow, and is committed (P6).
        self._left, self.runs_ahead, self._ahead = True, Container.is_given_up, {}

    def close(self, exc: BaseException | None = None) -> Awaitable[None]:
        """End the unit: commit background work that succeeded, roll everything else back, close all sessions (P6, P8).

        Args:
            exc: the exception that ended the request, which the caller goes on raising; errors in clean-up become its notes.

        Returns:
            what is to be awaited; `NOTHING` if there was nothing to wait for.

        Raises:
            Exception: that of a commit of background work, when awaited, unless `exc` was given.
        """
        if self.phase is not CLOSED:
            if exc is not None or (self.used and self._has_work()):
                return self._end(exc)
            self._leave()
        return NOTHING

    async def _end(self, exc: BaseException | None) -> None:
        if self.phase is CLOSED:
            return
        if exc is not None:
            _commit.explain(exc)
        try:
            if self._has_work():
                await self._close(self.phase is BACKGROUND and exc is None, exc)
        finally:
            self._leave()

    async def finish(self) -> None:
        """Commit everything and end the unit: the good end of a unit that answers no request (P11).

        Raises:
            Exception: that of the commit; everything is then rolled back.
        """
        try:
            if self.used:
                await self._close(True, None)
        finally:
            self._leave()

    def close_with(self, task: "asyncio.Task[Any]") -> None:
        """Close the unit when this task is done, for frameworks that offer no place to await it.

        `DBConnect.close()` waits for the clean-up. The task may serve many requests: a unit that has ended leaves nothing on it.
        """
        self._ends_with = task
        task.add_done_callback(self._close_after)

    # For the rest of the core

    @property
    def outer(self) -> "Unit | None":
        """The unit inside which this one was opened."""
        outer = self._token.old_value if self._token is not None else None
        return outer if isinstance(outer, Unit) else None

    def make_current(self) -> Token[Any]:
        """Let code from here on work in this unit."""
        self.thread = self.thread if running_loop() else None  # None: the loop that comes first is its own, in any thread
        self._token = token = _current.set(self)
        return token

    def leave(self) -> None:
        """End the unit and leave its sessions to the caller, as they are."""
        slots, self.slots = self._own(), {}
        for slot in slots:
            slot.let_go()
        self._leave()

    def on_commit(self, callback: Callback) -> None:
        """Run this when the unit has committed everything (P14)."""
        if self.here() is self._ahead:
            self._later = [*(self._later or ()), callback]
        else:
            self._on_commit = [*(self._on_commit or ()), callback]

    async def run_callback(self, callback: Callback) -> None:
        """Run a callback in a unit of its own; its error is logged and changes nothing else (P14)."""
        if _context.is_captured(callback):
            return
        try:
            async with new_unit():
                result = callback()
                if inspect.isawaitable(result):
                    await result
        except (Exception, asyncio.CancelledError) as exc:
            logger.exception("An error in an on_commit callback")
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                raise

    async def take_place(self, connect: DBConnect[Any]) -> Any:
        """Return a place in the transaction of a test for a session that is no unit's, None where there is none (P12)."""
        if test_units:
            self._join()
        turn = (self._test().turns or {}).get(connect.context_key) if self.joined else None
        return None if turn is None else await turn.take(self)

    # Opening

    def _join(self) -> None:
        test = test_unit()
        if test.phase is CLOSED:
            return
        if test.loop is not asyncio.get_running_loop():
            raise ForeignLoopError(
                "a test context is open, and this application runs in another event loop, where the test's connection cannot be "
                "used: call it through httpx.ASGITransport(app) in the test's own loop, or test with real commits"
            )
        here = _current.get()
        self.joined = True
        self.parent = here if here is not None and here.phase is not CLOSED and (here.joined or here.joinable) else test

    # Ending

    async def _finish_body(self) -> None:
        self._ending = True
        try:
            if self._producers:
                await self._produced()
            if self._is_at_work():
                await self._decide(self._commits, final=True)
        except asyncio.CancelledError:
            self._broken = ContextSqlaError("the request was cancelled before its body was complete")
            self.phase = BACKGROUND
            await self._end_slots()
            raise
        except BaseException as exc:
            self._broken = exc
            raise
        await self._end_slots()

    async def _decide(self, commits: bool, *, keep: bool = False, final: bool = False) -> None:
        await self._opened(self._patience)
        slots = self._own()
        callbacks = None
        # P14: not everything is committed here if a session keeps its transaction.
        if self._on_commit and not (keep and any(slot.kept and slot.open for slot in slots)):
            callbacks, self._on_commit = self._on_commit, None
        if not commits:
            self._drop_callbacks(slots)
            await _commit.roll_back(slots)
            return
        done: list[Slot] = []
        self._last_task = asyncio.current_task(self.loop) if final else None
        try:
            await self._commit(slots, done, keep=keep)
        except BaseException as exc:
            # Cancelled, when all was committed; what a hook has opened meanwhile is not.
            if _outcome_of(exc).complete and callbacks and not any(slot.open for slot in self._own()):
                await self._run_callbacks(callbacks, slots)
            self._drop_callbacks(slots)
            raise
        finally:
            self._last_task = None
        if final:
            _commit.refuse(slots)  # P10: what a child task writes from here on would be lost
        for slot in (self.borrowed or {}).values():
            await slot.flush()  # P12: a session of the test is flushed, and left to the test
        if callbacks:
            await self._run_callbacks(callbacks, slots)

    async def _commit(self, slots: list[Slot], done: list[Slot], *, keep: bool) -> None:
        await _commit.commit(slots, done, keep=keep)
        while len(self.slots) > len(slots) and (late := [slot for slot in self._own() if slot.open and slot not in slots]):
            slots += late  # a hook has asked for the session of another connect
            await _commit.commit(late, done, keep=keep)

    def _drop_callbacks(self, slots: list[Slot]) -> None:
        """Drop what waits for a commit that is not to come (P14)."""
        self._on_commit = self._waiting = None
        for slot in slots:
            slot.callbacks.take()

    async def _run_callbacks(self, callbacks: list[Callback], slots: list[Slot]) -> None:
        async def run() -> None:
            for callback in callbacks:
                await self.run_callback(callback)

        await settle(run, patience=max((slot.connect.drain_timeout for slot in slots), default=30), committed=self.committed)

    async def _end_slots(self, cause: BaseException | None = None) -> None:
        slots, self.slots = self._own(), {}
        await _commit.end(slots, cause)

    async def _close(self, commits: bool, exc: BaseException | None) -> None:
        error: BaseException | None = None
        try:
            if commits:
                await self._decide(True, final=True)
        except BaseException as failed:
            error = failed
        self.phase = CLOSED
        _commit.refuse(self._own())
        try:
            if self._ahead or self._opening or self._cleaning or not all(slot.at_rest for slot in self.slots.values()):
                await settle(lambda: self._clean_up(exc or error), again=True, committed=self.committed if commits else ())
            else:
                slots, self.slots = self._own(), {}
                _commit.end_at_rest(slots, exc or error)
        except asyncio.CancelledError:
            if error is None:
                raise
        if error is not None:
            try:
                raise error
            finally:
                del error, exc  # or the traceback is a cycle: error, frame, error

    async def _clean_up(self, cause: BaseException | None) -> None:
        if self._ahead:
            for key, slot in self._ahead.items():
                self.slots[f"{key} ahead"] = slot
            self._ahead = None
        await self._opened(0)
        slots = self._own()
        await _commit.roll_back(slots, cause)
        self.slots = {}
        await _commit.end(slots, cause)
        if self._cleaning is not None:
            await asyncio.wait((self._cleaning,))

    def _leave(self) -> None:
        self.phase = CLOSED
        # A transport keeps the context in which it was opened, and so the unit, for the life of a pooled connection; and a mark
        # keeps its context, which would be a cycle.
        self.request = self.runs_ahead = self._mark = None
        if self.used:
            if self._past_head is not None:
                self._past_head.set()
            self._broken = self._cleaning = self._on_commit = self._later = self._waiting = self._producers = None
        if self._ends_with is not None:
            self._ends_with.remove_done_callback(self._close_after)
            self._ends_with = None
        if self._token is not None:
            token, self._token = self._token, None
            try:  # noqa: SIM105  # every request comes by, and `suppress` is three calls
                _current.reset(token)
            except ValueError:  # closed from another context, whose variable was never this unit
                pass

    def _close_after(self, task: "asyncio.Task[Any]") -> None:
        exc: BaseException | None = asyncio.CancelledError() if task.cancelled() else task.exception()
        if self._has_work():
            hold(self._end(exc))
        else:
            self._leave()

    def _is_at_work(self) -> bool:
        """Whether the end of the body has anything to wait for."""
        if self._on_commit or self._opening or self.borrowed or self._producers:
            return True
        for slot in self.slots.values():  # noqa: SIM110  # every request with a session comes by
            if slot.open or slot.evicted:
                return True
        return False

    def _has_work(self) -> bool:
        return bool(self.slots or self._on_commit or self._opening or self._ahead or self._cleaning or self.borrowed)


class new_unit:  # noqa: N801  # a function, but for the calls that contextlib would make for each
    """Open a unit for a block: committed at its end, rolled back on an error (P11)."""

    __slots__ = ("_options", "_policy", "_unit")

    def __init__(self, policy: Policy = DEFAULT_POLICY, options: Mapping[str, Any] | None = None) -> None:
        self._policy = policy
        self._options = options

    async def __aenter__(self) -> Unit:
        self._unit = unit = Unit.enter(self._policy)
        unit.options = self._options
        return unit

    async def __aexit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        await (self._unit.finish() if exc is None else self._unit.close(exc))
