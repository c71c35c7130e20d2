"""The sessions of one unit of work: found, opened once however many ask at once, or borrowed from a test (P2, P12)."""

import asyncio
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Token
from enum import StrEnum
from threading import get_ident
from typing import Any, TypeAlias, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from . import _commit, _events  # noqa: F401  # from here on sessions are listened to
from ._callbacks import Callback
from ._connect import DBConnect
from ._context import body, current
from ._options import check_options
from ._policy import DEFAULT_POLICY, Policy
from ._settle import hold, running_loop
from ._slot import Slot
from .errors import ContextClosedError, ContextSqlaError, ForeignLoopError, UnsupportedOptionError

S = TypeVar("S", bound=AsyncSession)
RunsAhead: TypeAlias = Callable[[Any], bool]


class Phase(StrEnum):
    """Where a unit of work is in its life."""

    HANDLER = "handler"
    STREAM = "stream"
    BACKGROUND = "background"
    CLOSED = "closed"


# Members of an enumeration are slow to reach on Python 3.11.
HANDLER, STREAM, BACKGROUND, CLOSED = Phase.HANDLER, Phase.STREAM, Phase.BACKGROUND, Phase.CLOSED


# Until Python 3.12 get_running_loop() asks the system for the process, each time. A thread runs one loop: two cheap questions.
ASKS_SYSTEM = sys.version_info < (3, 12)


class Container:
    """The sessions of one unit, and what they need to know of it.

    Args:
        policy: when to commit.
        request: what the unit is opened for.
        runs_ahead: takes the unit and returns whether the body asks although the head is not out.
    """

    # Defaults of the class: a request that asks for no session shall pay for none of them (P1).
    options: Mapping[str, Any] | None = None  # of every transaction of this unit
    committed: tuple[str, ...] = ()  # the connects of which something can no longer be rolled back
    _ahead: dict[str, Slot] | None = None
    _opening: dict[str, "asyncio.Task[Slot]"] | None = None
    _producers: set["asyncio.Task[Any] | None"] | None = None  # tasks that make the body beside the request's own
    _waiting: dict[str, list[Callback]] | None = None
    _past_head: asyncio.Event | None = None  # in tests, for a body that runs ahead (P12)
    _patience: float = 0.0  # how long a session that is being opened is waited for
    _cleaning: "asyncio.Task[None] | None" = None  # rolls back what a body had when its client left
    _body: object | None = None  # the mark of what makes the body
    _mark: Token[Any] | None = None  # the context in which the request's own task was seen last
    _last_task: "asyncio.Task[Any] | None" = None  # makes the last commit of this phase: others come too late
    # In tests (P12)
    joinable: bool = False  # opened by a test, for others to join
    joined: bool = False
    parent: "Container | None" = None
    turns: dict[str, Any] | None = None  # the shared transactions of a test, by connect
    borrowed: dict[str, Slot] | None = None  # sessions of the test's own unit

    def __init__(self, policy: Policy = DEFAULT_POLICY, request: Any = None, runs_ahead: RunsAhead | None = None) -> None:
        # What every request reads: CPython finds it at once only where the class has no default of the same name.
        self.policy: Policy = policy
        self.request: Any = request
        self.phase: Phase = HANDLER
        self.used: bool = False  # a session or a callback was asked for
        self.slots: dict[str, Slot] = {}
        self.loop: asyncio.AbstractEventLoop | None = None  # that of the first session
        self.thread: int | None = get_ident()  # in which that loop runs: a loop of another thread is foreign
        self.runs_ahead: RunsAhead | None = runs_ahead  # None also where nobody needs to ask any more
        self._token: Token[Any] | None = None  # of the context variable
        self._commits: bool = True  # the decision about the head holds for the body
        self._left: bool = False  # the client has left, the body may still go on
        self._ends_with: asyncio.Task[Any] | None = None

    def label(self) -> str:
        """Return what log lines call the unit."""
        return self.policy.label(self.request) if self.policy.label and self.request is not None else "a unit of work"

    def mark(self, request: Any, runs_ahead: RunsAhead | None) -> None:
        """Note that the task that handles the request is this one, where middleware may have started it (P5).

        Args:
            request: what the unit is opened for, as it is known here.
            runs_ahead: as for `Unit.enter`.
        """
        self.request, self.runs_ahead = request, runs_ahead
        # P11: where middleware has opened a unit around the rest of the application, that one stays the current one.
        self._mark = current.set(self) if current.get() is self else self._mark

    def is_at_mark(self) -> bool:
        """Return whether this runs in the task that handles the request, and in none that it has started: by the context."""
        mark = self._mark or self._token
        try:
            current.reset(mark)  # type: ignore[arg-type]  # only where it was set, which is in this very context
        except ValueError:
            return False
        here = current.set(self)
        if self._mark is None:
            self._token = here
        else:
            self._mark = here
        return True

    def in_body(self, *, beside: bool = False) -> None:
        """Note that what runs here, with what it starts from now on, makes the body (P5).

        Where a client leaves before its body is complete, background work may follow in the same unit: this tells them apart.

        Args:
            beside: only in a task beside the request's own, in which background work follows.
        """
        if body.get() is self._body is not None:
            return
        if beside and (self.phase is not STREAM or current.get() is not self or self.is_at_mark()):
            return
        self._body = self._body or object()  # not the unit: servers keep contexts for as long as a connection lives
        body.set(self._body)

    def is_given_up(self) -> bool:
        """Return whether what runs here makes a body whose client has left."""
        return self._left and body.get() is self._body is not None

    def holds(self, context_key: str) -> bool:
        """Return whether a session of this connect is open in the unit."""
        return context_key in self.slots or context_key in (self._ahead or ())

    def slot_at_once(self, connect: DBConnect[Any]) -> Slot | None:
        """Return what the unit has of a connect, None where it takes a wait: `slot` then knows what for.

        Raises:
            ContextClosedError: the unit has ended.
        """
        self.check_open(connect)
        if self.runs_ahead is not None and self.runs_ahead(self):
            return None
        slot = self.slots.get(connect.context_key)
        if slot is None and connect.before_create_session_handler is None and not self.joined:
            slot = self._make(connect, self.slots)
        return slot

    async def slot(self, connect: DBConnect[Any]) -> Slot:
        """Return what the unit has of a connect; several tasks that ask at once get the same (P2)."""
        if self.joined and self.phase is HANDLER and connect.context_key in self.slots and self.here() is self._ahead:
            # P12: the place in the test's transaction is that of what came before the head.
            self._past_head = self._past_head or asyncio.Event()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._past_head.wait(), connect.drain_timeout)
        if (found := self.slot_at_once(connect)) is not None:
            return found
        if self.runs_ahead is not None and self.runs_ahead(self):
            self.in_body()
            self._producers = {*(self._producers or ()), asyncio.current_task()}
        slots = self.here()
        slot = slots.get(connect.context_key) or (self.borrowed or {}).get(connect.context_key)
        if slot is None:
            if connect.before_create_session_handler is None and not self.joined:
                slot = self._make(connect, slots)
            else:
                slot = await self._open_once(connect, slots is self._ahead)
                if slot.owner is self and self.here().get(connect.context_key) is not slot:
                    return await self.slot(connect)  # a body that was given up had asked for it, or background work
        if self._left and self.is_given_up() and (task := asyncio.current_task()) is not None:
            task.add_done_callback(self._body_over)
        return slot

    def _make(self, connect: DBConnect[Any], slots: dict[str, Slot]) -> Slot:
        if self.phase is STREAM:
            self.in_body(beside=True)
        if self._last_task is not None:
            self._check_in_time(connect)
        slot = slots[connect.context_key] = self._new_slot(connect, None)
        return slot

    def _check_in_time(self, connect: DBConnect[Any]) -> None:
        if self._last_task is not asyncio.current_task() or any(slot.deferring for slot in self.slots.values()):
            raise _outlived(connect)  # the last commit has begun without it

    def here(self) -> dict[str, Slot]:
        """Return the sessions of what runs here: a body that runs ahead of its head, or on without its client, has its own."""
        if self.runs_ahead is not None and (self.phase is HANDLER or self._left) and self.runs_ahead(self):
            self._ahead = {} if self._ahead is None else self._ahead
            return self._ahead
        return self.slots

    def _slots(self, ahead: bool) -> dict[str, Slot]:
        return self._ahead if (ahead or self.is_given_up()) and self._ahead is not None else self.slots

    def _give_up(self, slots: dict[str, Slot] | None) -> None:
        if slots:
            self._cleaning = hold(_clean_up(list(slots.values()), self._cleaning))
            slots.clear()

    def _body_over(self, _: "asyncio.Task[Any]") -> None:
        if all(task is None or task.done() for task in self._producers or ()):
            self._give_up(self._ahead)  # or background work would wait for it, and for its locks

    def is_at_home(self) -> bool:
        """Return whether the loop that runs here is the unit's: a cheap question."""
        loop = self.loop
        if ASKS_SYSTEM:
            return loop is not None and self.thread == get_ident() and loop.is_running()
        return loop is running_loop()

    def check_open(self, connect: DBConnect[Any] | None) -> None:
        """Raise if the unit has ended (P10), or belongs to another event loop (P15)."""
        if self.phase is CLOSED:
            raise _outlived(connect)
        self.used = True
        running = running_loop()
        if self.loop is None and running is not None and self.thread in (None, get_ident()):
            self.loop, self.thread = running, get_ident()
        elif running is not None and running is not self.loop:
            what = "" if connect is None else f"{connect!r}: "
            raise ForeignLoopError(
                f"{what}this unit of work and its sessions belong to another event loop (does a thread call asyncio.run?); "
                "from a thread use anyio.from_thread.run(), or wrap the work in 'async with db_context():'"
            )

    def put(self, connect: DBConnect[Any], session: AsyncSession, *, host: str | None = None) -> Slot:
        """Make a session that exists the unit's own.

        Raises:
            TypeError: it is no `AsyncSession`.
            ContextSqlaError: the unit has one already, which nobody would close any more.
        """
        self.check_open(connect)
        if not isinstance(session, AsyncSession):
            raise TypeError(f"{connect!r}: a session of a unit is an AsyncSession, not {type(session).__name__}")
        if connect.context_key in (slots := self.here()):
            raise ContextSqlaError(f"{connect!r}: its unit has one already; pop_db_session_from_context() or close it first")
        slot = self._slot_for(connect, session, host or connect.host or "")
        slot.lines.whole = not slot.open
        slots[connect.context_key] = slot
        return slot

    def on_first_commit(self, connect: DBConnect[Any], callback: Callback) -> None:
        """Run this after the first commit of a session that is not open yet."""
        self._waiting = self._waiting or {}
        self._waiting.setdefault(connect.context_key, []).append(callback)

    async def run_callback(self, callback: Callback) -> None:
        """Run one on-commit callback; the unit says how."""
        raise NotImplementedError

    def _own(self) -> list[Slot]:
        return list(self.slots.values())

    async def _open_once(self, connect: DBConnect[Any], ahead: bool) -> Slot:
        """Open a session in a task that all askers share: the first may be cancelled, the others still get it."""
        if self.phase is STREAM:
            self.in_body(beside=True)
        if self._last_task is not None:
            self._check_in_time(connect)
        opening = self._opening = self._opening or {}
        key = connect.context_key
        self._patience = max(self._patience, connect.cleanup_timeout)
        task = opening.get(key)
        if task is None:
            task = opening[key] = hold_quietly(self._open(connect, ahead))
        else:
            connect._refuse_own_handler()
        await asyncio.wait((task,))
        if task.cancelled():
            raise ContextClosedError(f"{connect!r}: its before_create_session_handler was cancelled, or what it awaited")
        return task.result()

    async def _open(self, connect: DBConnect[Any], ahead: bool) -> Slot:
        try:
            if self.joined:
                return await self._open_joined(connect, ahead)
            host = await connect._choose_host()
            self.check_open(connect)
            # Which sessions are whose may have changed meanwhile.
            slot = self._slots(ahead)[connect.context_key] = self._new_slot(connect, host)
            return slot
        finally:
            if self._opening is not None:
                self._opening.pop(connect.context_key, None)

    async def _open_joined(self, connect: DBConnect[Any], ahead: bool) -> Slot:
        """Open a savepoint session in the test's transaction, or borrow the session that the test's unit has."""
        test = self._test()
        turn = (test.turns or {}).get(connect.context_key)
        if turn is None:
            slot = await test.slot(connect)
            self.borrowed = {**(self.borrowed or {}), connect.context_key: slot}
            await slot.flush()
            return slot
        if self.options:
            raise UnsupportedOptionError(f"{connect!r}: {', '.join(self.options)} cannot be set inside the transaction of a test")
        place = await turn.take(self)
        self.check_open(connect)
        slot = self._slots(ahead)[connect.context_key] = self._slot_for(connect, turn.new_session(), turn.host)
        slot.share(place)
        return slot

    def _test(self) -> "Container":
        unit = self
        while not unit.joinable and unit.parent is not None:
            unit = unit.parent
        return unit

    def _new_slot(self, connect: DBConnect[Any], host: str | None) -> Slot:
        here = connect._here(self.loop)
        member = connect._member(host, here)
        if self.options and not self.joinable:
            session = member.maker(bind=member.engine.execution_options(**self.options))
            check_options(connect, session, self.options)
        else:
            session = member.maker()
        slot = self._slot_for(connect, session, member.host)
        slot.here = here
        if not self.joinable:
            here.active.add(slot)  # `close()` waits for it
        return slot

    def _slot_for(self, connect: DBConnect[Any], session: AsyncSession, host: str) -> Slot:
        slot = Slot(connect, session, host, self)
        if self._waiting is not None:
            for callback in self._waiting.pop(connect.context_key, ()):
                slot.callbacks.add(callback, slot.sync)
        return slot

    async def _opened(self, timeout: float) -> None:
        """Wait for sessions that are being opened; those that take longer are given up (P7a)."""
        if self._opening:
            _, late = await asyncio.wait(tuple(self._opening.values()), timeout=timeout)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=self._patience)

    async def _produced(self) -> None:
        """Wait for the tasks that made the body, and raise the error of one that failed: then so did the body (P5)."""
        tasks = [task for task in self._producers or () if task is not None and task is not asyncio.current_task()]
        self._producers = None
        if tasks:
            await asyncio.wait(tasks, timeout=max((slot.connect.cleanup_timeout for slot in self._own()), default=0))
        for task in tasks:
            if task.cancelled():
                raise ContextSqlaError("the task that made the body of this response was cancelled")
            if task.done() and (error := task.exception()) is not None:
                raise error

    def _merge_ahead(self) -> None:
        """Let the body go on with the sessions that it opened before the head; the handler's are done."""
        for key, slot in (self._ahead or {}).items():
            if (mine := self.slots.get(key)) is not None:
                self.slots[f"{key} handler"] = mine
            self.slots[key] = slot
        self._ahead = None


def _outlived(connect: DBConnect[Any] | None) -> ContextClosedError:
    what = "" if connect is None else f"{connect!r}: "
    return ContextClosedError(
        f"{what}this task outlived its unit of work; wrap what it does in 'async with db_context():', or start it with "
        "run_in_new_ctx()"
    )


async def _clean_up(slots: list[Slot], earlier: "asyncio.Task[None] | None") -> None:
    """Roll back what a body left unfinished; a statement that is being cancelled gets the time to end well (P7)."""
    for slot in slots:
        slot.refuse("the client has left, the body of this response was given up")
        await slot.idle(slot.connect.cleanup_timeout)
    await _commit.roll_back(slots)
    await _commit.end(slots)
    if earlier is not None:
        await asyncio.wait((earlier,))


def hold_quietly(coroutine: Any) -> "asyncio.Task[Slot]":
    """Run a coroutine in a task whose error is the affair of those who wait for it."""
    task: asyncio.Task[Slot] = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task
