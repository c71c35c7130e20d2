"""One session of one unit: what is open on it, what runs on it, and how it ends."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from ._around import Owner, Place
from ._callbacks import Callback, Callbacks, awaited
from ._connect import DBConnect
from ._drivers import leaves_doubt
from ._engines import KEY, Line
from ._lines import Lines, Prepared
from ._loops import LoopState
from ._policy import BeforeCommitCallback
from ._refusal import REAL_COMMITS, REMEDY, Refusal
from ._settle import logger, settle
from ._timed import Timed
from .errors import ContextClosedError, ContextSqlaError, SessionBusyError, _outcome_of


class Slot(Timed):
    """A session in its unit.

    Args:
        connect: whose session it is.
        session: the session.
        host: the host that was chosen for it.
        owner: the unit.
    """

    def __init__(self, connect: DBConnect[Any], session: AsyncSession, host: str, owner: Owner) -> None:
        self.connect: DBConnect[Any] = connect
        self.session: AsyncSession = session
        self.sync: Session = session.sync_session
        self.host: str = host
        self.owner: Owner = owner
        self.before_commit: BeforeCommitCallback | None = owner.policy.before_commit
        self.lines: Lines = Lines()
        self.kept: bool = False  # P5: the transaction goes on after the head
        self.ended: bool = False  # it takes nothing any more
        self.hooked: bool | None = False  # the before-commit hooks have run for this transaction; None: they are running
        self.deferring: bool = False  # a unit commits several sessions and runs what is due afterwards
        self.prepared: list[Prepared] = []
        self.callbacks: Callbacks = Callbacks()
        self._due: list[Callback] = []
        self.committed: bool = False  # and who waited for it was not told yet
        self.here: LoopState | None = None  # where it was made for a unit; None: put into one by hand
        self._limit: float | None = None
        self._held: asyncio.TimerHandle | None = None
        self.place: Place | None = None  # in the transaction of a test
        self.evicted: str | None = None  # a unit around it had to end first
        self._sending = False  # the unit itself is flushing
        self._late: str | None = None  # what the statement is told whose connection is still being opened
        self._owner: asyncio.Task[Any] | None = None
        self.sync.info[KEY] = self

    # What is going on

    @property
    def open(self) -> bool:
        """Whether the session has a transaction, begun by itself or by hand."""
        return self.sync.in_transaction()

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left to be rolled back."""
        return not (self.open or self.lines or self.prepared)

    @property
    def dirty(self) -> bool:
        """Whether the session has something to flush."""
        return not self.sync._is_clean()  # what SQLAlchemy asks itself, instead of three lists

    @property
    def busy(self) -> bool:
        """Whether a statement is running on the session, or a connection is being opened for it."""
        taken = self.place is not None and self.place.is_taken()
        return taken or self.lines.are_running() or self._is_at_work()

    def _is_at_work(self) -> bool:
        """Whether SQLAlchemy itself says that something is going on."""
        if getattr(self.sync, "_flushing", False):
            return True
        transaction = self.sync.get_nested_transaction() or self.sync.get_transaction()
        return transaction is not None and getattr(transaction, "_current_fn", None) is not None

    @property
    def patience(self) -> float:
        """How long the unit's end waits for what is still going on."""
        return self.connect.drain_timeout if self.place else self.connect.cleanup_timeout

    def is_ready(self) -> bool:
        """Whether nothing is to be done or asked before this session's COMMIT: so it is for most requests."""
        ready = not (self.kept or self.has_hooks) and self.place is None and self.lines.are_ready()
        return ready and not (self.dirty or self.sync.twophase or self._is_at_work())

    def may_commit_here(self) -> bool:
        """Whether its COMMIT may be awaited in the task of the request: it is one, on a connection whose driver allows it."""
        return self.place is None and self.lines.keep_task() and not self.sync.twophase

    def must_go_on(self) -> bool:
        """Whether its COMMIT is on its way, or its connection back to the pool, which loses it if that is cancelled."""
        return self.lines.are_sending() or (bool(self.lines) and not self.open)

    async def idle(self, timeout: float, at_each_turn: Callable[[], Any] | None = None) -> bool:
        """Wait until nothing runs on the session, and return whether that came true in time."""
        if not self.busy and not self.lines.have_cursors():
            return True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        pause = 0.0
        while self.busy or await self.lines.are_fetching(self.connect.cleanup_timeout):
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(pause)
            pause = min(0.02, pause + 0.001)
            if at_each_turn is not None:
                at_each_turn()
        return True

    # How it ends

    def seal(self) -> None:
        """Refuse statements of every task but the current one, until `unseal` (P7a)."""
        self._owner = asyncio.current_task(self.owner.loop)
        self.sync.get_bind = self._get_bind  # type: ignore[method-assign]

    def unseal(self) -> None:
        """Take statements of every task again."""
        self._owner = None
        if not self.ended and self.place is None:
            self.sync.__dict__.pop("get_bind", None)

    def share(self, place: Place) -> None:
        """Work in the transaction of a test, on a connection that other units use too."""
        self.place = place
        self.sync.get_bind = self._get_bind  # type: ignore[method-assign]

    async def evict(self) -> None:
        """Give the savepoint up, because the one around it ends; this unit's later work and its commit are refused."""
        self.evicted = f"{self.connect!r}: the unit around this one ended first; {REAL_COMMITS}"
        await self.session.rollback()

    async def flush(self) -> None:
        """Send what is pending, so that its errors surface before anything is committed (P9)."""
        if self.dirty:
            self._sending = True
            try:
                await self.session.flush()
            finally:
                self._sending = False

    async def ask_hooks(self) -> None:
        """Await everything that may refuse this commit (P14); none may end the transaction that it is asked about."""
        if self.hooked is not None:
            self.hooked, transaction = None, self.sync.get_transaction()
            for hook in (self.before_commit, *self.connect.before_commit):
                if hook is not None:
                    await awaited(hook(self.session), f"{self.connect!r}: before_commit")
            self.hooked = self.sync.get_transaction() is transaction
        if not self.hooked:
            raise ContextSqlaError(f"{self.connect!r}: before_commit must not end its transaction; it refuses by raising")

    @property
    def has_hooks(self) -> bool:
        """Whether anybody may refuse a commit."""
        return self.before_commit is not None or bool(self.connect.before_commit)

    @property
    def failed(self) -> list[tuple[Connection, Line]]:
        """The connections on which a statement of this transaction has failed, of those that count (P4a)."""
        return self.lines.failed(cancelled_only=not self.connect.check_failed_transaction)

    async def check(self) -> None:
        """Raise if a statement whose error was swallowed has aborted the transaction (P4a)."""
        for connection, line in self.failed:
            self.arm(self.connect.cleanup_timeout)
            try:
                await self.session.run_sync(lambda _, connection=connection: connection.execute(select(1)))  # type: ignore[misc]
            except Exception as exc:
                exc.add_note(
                    f"{self.connect!r}: a statement of this transaction had failed ({line.failure}) and its error was swallowed: "
                    "COMMIT would have been a silent ROLLBACK; put it into 'async with session.begin_nested():' (P4a)"
                )
                raise
            finally:
                self.disarm()

    async def commit(self) -> None:
        """Commit; at `commit_timeout` the connection is cut and the outcome is in doubt (P7)."""
        self._sending = True
        self.arm(self.connect.commit_timeout)
        try:
            await self.session.commit()
        except BaseException as exc:
            if not self.committed and self.lines.are_committing() and leaves_doubt(exc):
                _outcome_of(exc).in_doubt = True
                exc.add_note(f"{self.connect!r}: the connection died during COMMIT; nobody knows whether it was committed")
            raise
        finally:
            self._sending = False
            self.disarm()

    async def rollback(self) -> None:
        """Roll back, or cut the connection where a statement is still running on it (P7a)."""
        self.callbacks.take()
        self.kept = False
        if not self.open:
            return
        if self.place is not None:
            await self._clear_place(self.place)
        elif self.busy or self.lines.are_dead() or await self.lines.are_fetching(self.connect.cleanup_timeout):
            await self.abandon("it was rolled back while this statement was running")
            return
        self.arm(self.connect.cleanup_timeout)
        try:
            await self.session.rollback()
        except BaseException:
            await self.abandon("its rollback failed")
            raise
        finally:
            self.disarm()

    async def _clear_place(self, place: Place) -> None:
        if not await self.idle(self.patience):
            await place.clear()

    async def abandon(self, reason: str) -> None:
        """Give the connection up: cut it, let the statement that runs on it fail, and forget it."""
        told = f"{self.connect!r}: the connection was cut because its unit ended: {reason}; {REMEDY}"
        shared = self.place is not None  # with the test
        dead = shared or self.lines.cut(told)
        if self.lines:
            await self.idle(min(1.0, self.connect.cleanup_timeout), lambda: shared or self.lines.cut(told))
        self.arm(self.connect.cleanup_timeout)
        try:
            if not dead and not self.busy:
                await self.session.rollback()
            else:
                await self.session.invalidate()
        except Exception:
            if not self.busy:
                logger.exception("%r: a connection that was cut could not be given up", self.connect)
                self.sync.invalidate()
        finally:
            self.disarm()
        if self.busy and not self.lines:
            self._late = told
            self.sync.get_bind = self._get_bind  # type: ignore[method-assign]

    async def end(self) -> None:
        """Close the session; it is refused already."""
        if not self.open:
            self.end_at_rest()
            return
        try:
            await self._close()
        finally:
            self.forget()

    def end_at_rest(self) -> None:
        """Close the session, which has nothing open: no input or output."""
        try:
            self.sync.close()
        finally:
            self.forget()

    def refuse(self, reason: str) -> None:
        """Let the session take nothing any more, and forget this slot (a cycle would keep both from being freed)."""
        self.ended = True
        refusal = Refusal(self.connect, reason, self.connect.cleanup_timeout)
        self.sync.info[KEY] = refusal
        self.sync.get_bind = refusal.get_bind  # type: ignore[method-assign]

    def let_go(self) -> None:
        """Leave the session to somebody else, as it is."""
        self.sync.info.pop(KEY, None)
        self.sync.__dict__.pop("get_bind", None)
        self.forget()

    def forget(self) -> None:
        """Take the session out of what `DBConnect.close()` waits for."""
        self._release()
        if self.here is not None:
            self.here.leave(self)
        if self.place is not None:
            self.place.give_back()

    async def _close(self) -> None:
        if self.place is not None:
            await self._clear_place(self.place)
        elif self.busy:
            await self.abandon("it was closed while this statement was running")
            if self.busy:  # a connection is still being opened: `_after_begin` refuses it when it is there
                return
        self.arm(self.connect.cleanup_timeout)
        try:
            await self.session.close()
        except BaseException:
            await self.abandon("its close failed")
            raise
        finally:
            self.disarm()

    def _get_bind(self, *args: Any, **kwargs: Any) -> Any:
        self._late = None  # a statement that comes after the decision
        if self._is_stranger():
            raise self._busy_error()
        if self.evicted is not None or (self.place is not None and self.place.is_taken()):
            raise SessionBusyError(self.evicted or f"{self.connect!r}: another unit has the test's connection; {REAL_COMMITS}")
        return type(self.sync).get_bind(self.sync, *args, **kwargs)

    def check_not_committing(self) -> None:
        """Raise if another task commits this session: to end or take it now would leave nobody to wait for the COMMIT (P7a)."""
        if self._owner is not None and asyncio.current_task() is not self._owner:
            raise self._busy_error()

    def _busy_error(self) -> SessionBusyError:
        return SessionBusyError(
            f"{self.connect!r}: its unit is committing; await the task that uses the session before the response ends"
        )

    def _is_stranger(self) -> bool:
        """Whether this statement comes too late; those of a flush that was going on already belong together (P7a)."""
        late = self._sending or not getattr(self.sync, "_flushing", False)
        return late and self._owner is not None and asyncio.current_task() is not self._owner

    # After the commit (P14)

    @property
    def has_due(self) -> bool:
        """Whether anybody waited for this commit."""
        return bool(self._due or (self.committed and self.connect.committed))

    async def run_due(self) -> None:
        """Run what was waiting for this commit; errors are logged and change nothing."""
        announce, due, self.committed, self._due = self.committed, self._due, False, []
        if announce:
            for hook in tuple(self.connect.committed):
                try:
                    await hook(self.session, self.host)
                except Exception:
                    logger.exception("%r: an error in a 'committed' hook", self.connect)
            if self.connect.committed and self.open:
                self.arm(self.connect.cleanup_timeout)
                await self.session.rollback()
        for callback in due:
            await self.owner.run_callback(callback)

    # What SQLAlchemy tells

    def began(self, connection: Connection) -> None:
        """Note the connection of a transaction that begins."""
        if not self.owner.is_at_home():
            if self.owner.loop is not None:  # P15: a thread that was given the session; the connection is no loop's now
                connection.invalidate()
            self.owner.check_open(self.connect)  # a unit whose session was put where no loop ran is the first loop's
        self.lines.add(connection)
        self._warn_later()
        if self._late is not None:  # P3: what was asked for before a decision to roll back is not done after it
            raise ContextClosedError(self._late)

    def before(self) -> None:
        """Do before a commit by hand what a unit does before its own: ask the hooks, look for a silent rollback (P4a, P14)."""
        if not self.hooked:
            try:
                if self.has_hooks:
                    await_only(self.ask_hooks())
                if self.failed:
                    await_only(self.check())
            except BaseException:
                self.hooked = False
                raise

    def after(self, callbacks: Sequence[Callback] | None = None) -> None:
        """Note that a transaction was committed."""
        if self.connect.name not in self.owner.committed:
            self.owner.committed += (self.connect.name,)
        self.committed = True
        self._due.extend(self.callbacks.take() if callbacks is None else callbacks)

    def over(self) -> None:
        """Note that the transaction is over, one way or the other, and its connection is back."""
        self.hooked = self.kept = False
        self._late = None
        self._release()
        if not self.committed:
            self.callbacks.take()
        elif not self.deferring and self.has_due:
            await_only(settle(self.run_due, patience=self.connect.drain_timeout, committed=(self.connect.name,)))
        elif not self.deferring:
            self.committed = False
