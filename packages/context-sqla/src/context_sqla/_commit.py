"""Commit the sessions of one unit, or roll them back: all errors collected, every session attended to (P8, P9)."""

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from . import _drivers
from ._handover import BEGIN, Left, drive, go_on
from ._lines import Prepared
from ._refusal import REAL_COMMITS, REMEDY
from ._settle import logger, settle
from ._slot import Slot
from .errors import ContextSqlaError, SessionBusyError, _outcome_of

_ENDED = f"this session's unit of work has ended; {REMEDY}"
_BACKEND = text("SELECT 1 FROM pg_stat_activity WHERE pid = :pid")


async def commit(slots: Sequence[Slot], done: list[Slot] | None = None, *, keep: bool = False) -> None:
    """Commit every session, or none that was not yet committed (P9).

    Until the first COMMIT is sent a cancellation rolls back; from then on everything runs to its end (P7).

    Args:
        slots: the sessions of the unit, in the order of their first use.
        done: those that the same decision has committed before; what is committed is added.
        keep: leave the transactions that asked for it open after their flush (P5).
    """
    done = [] if done is None else done
    if len(slots) == 1 and not done and slots[0].is_ready():  # as in most requests
        await _attempt(slots, (), slots, done)
        return
    for slot in slots:
        if slot.evicted is not None:
            raise SessionBusyError(slot.evicted)
    if working := [slot for slot in slots if slot.open]:
        await _attempt(slots, working, [slot for slot in working if not (keep and slot.kept)], done)


async def _attempt(slots: Sequence[Slot], working: Sequence[Slot], committing: Sequence[Slot], done: list[Slot]) -> None:
    for slot in slots:
        slot.seal()
    try:
        if not working:  # it is ready
            await _commit_here(committing[0], done)
            return
        await _prepare(working, committing)
        if len(committing) == 1 and not done and committing[0].may_commit_here():
            await _free(committing[0])  # a child may have begun a commit by hand meanwhile
            await _commit_here(committing[0], done)
        elif committing:
            await settle(lambda: _commit_all(committing, done), patience=sum(map(_patience, committing)))
    except BaseException as exc:
        _tell_outcome(exc, committing, done)
        await roll_back(working or slots, exc)
        raise
    finally:
        for slot in slots:
            slot.unseal()


async def roll_back(slots: Sequence[Slot], cause: BaseException | None = None) -> None:
    """Roll every session back; errors become notes of the cause, or are logged where there is none (P8)."""
    working = [slot for slot in slots if not slot.at_rest]
    if working:
        _report(await settle(lambda: _each(working, _roll_back_one), again=True), cause, "rolling back")


async def end(slots: Sequence[Slot], cause: BaseException | None = None) -> None:
    """Close every session for good; what is still open on it is rolled back (P8, P10)."""
    if not any(slot.open for slot in slots):
        end_at_rest(slots, cause)
        return
    refuse(slots)
    _report(await settle(lambda: _each(slots, Slot.end), again=True), cause, "closing")


def end_at_rest(slots: Sequence[Slot], cause: BaseException | None = None) -> None:
    """Close sessions for good that have nothing open."""
    refuse(slots)
    for slot in slots:
        try:
            slot.end_at_rest()
        except Exception as exc:
            _report([(slot, exc)], cause, "closing")


def refuse(slots: Sequence[Slot]) -> None:
    """Let these sessions take nothing any more: their unit has ended (P10)."""
    for slot in slots:
        if not slot.ended:
            slot.refuse(_ENDED)


async def _prepare(slots: Sequence[Slot], committing: Sequence[Slot]) -> None:
    """Do all that can still fail harmlessly: wait for statements, flush, ask the hooks, look for a silent rollback."""
    for slot in slots:
        await _free(slot)
    for slot in slots:
        await slot.flush()
    for slot in committing:
        if slot.has_hooks and not slot.hooked:
            await slot.ask_hooks()
        slot.hooked = True
        await slot.flush()  # what the hooks, or listeners of the first one, have added
    for slot in slots:
        await slot.check()


async def _free(slot: Slot) -> None:
    """Wait until nobody uses the session, or give its connection up (P7a)."""
    if await slot.idle(slot.patience):
        return
    if slot.place is not None:
        raise SessionBusyError(f"{slot.connect!r}: a unit inside this one still has the connection; {REAL_COMMITS}")
    await settle(lambda: slot.abandon("a statement was still running at its commit"))
    raise SessionBusyError(
        f"{slot.connect!r}: a statement was still running {slot.connect.cleanup_timeout:g} s after its unit wanted to "
        "commit; await every task that uses the session, or give it 'async with db_context():' or run_in_new_ctx()"
    )


def _patience(slot: Slot) -> float:
    """Return how long a commit may take that was cancelled: each step bounds itself, but no callback that waits for it."""
    return 3 * slot.connect.commit_timeout + slot.connect.drain_timeout


async def _commit_here(slot: Slot, done: list[Slot]) -> None:
    """Commit one session in this task, which is cancelled before its COMMIT is sent or after its answer has come (P7)."""
    slot.hooked = slot.deferring = True
    try:
        left = await drive(slot.commit(), BEGIN, slot.must_go_on)
        if isinstance(left, Left):
            await go_on(left, first=slot.seal, patience=_patience(slot))
    finally:
        slot.deferring = False
        if slot.committed:
            done.append(slot)
            if slot.has_due:
                await settle(lambda: _run_due(slot), patience=_patience(slot))
            slot.committed = False


async def _run_due(slot: Slot) -> None:
    slot.seal()  # for this task, which is another
    await slot.run_due()


async def _commit_all(slots: Sequence[Slot], done: list[Slot]) -> None:
    two_phase = [slot for slot in slots if slot.sync.twophase]
    for slot in slots:
        slot.seal()
        slot.deferring = True
    try:
        for slot in two_phase:
            await _prepare_two_phase(slot)
        for slot in (slot for slot in slots if slot not in two_phase):
            await _free(slot)  # a child may have begun a commit by hand meanwhile
            await slot.commit()
            done.append(slot)
        await _commit_prepared(two_phase, done)
    except BaseException as exc:
        _tell(exc, slots, done)
        raise
    finally:
        for slot in slots:
            slot.deferring = False
        for slot in done:
            await slot.run_due()


def _tell_outcome(exc: BaseException, committing: Sequence[Slot], done: Sequence[Slot]) -> None:
    """Say on an error which connects have committed (P9), and on a cancellation that came too late that all have (P7)."""
    outcome = _outcome_of(exc)
    outcome.complete = bool(committing) and all(slot in done for slot in committing)
    outcome.committed.extend(slot.connect.name for slot in done)


def _tell(exc: BaseException, slots: Sequence[Slot], done: Sequence[Slot]) -> None:
    """Note on the error of a commit, which a cancellation may overtake, which connects had committed (P9)."""
    if len({*slots, *done}) > 1:
        names = [slot.connect.name for slot in done]
        rest = [slot.connect.name for slot in slots if slot not in done]
        exc.add_note(f"already committed: {', '.join(names) or 'nothing'}; not committed: {', '.join(rest)} (P9)")


async def _roll_back_one(slot: Slot) -> None:
    prepared = slot.prepared
    slot.prepared = []
    try:
        await slot.rollback()
    finally:
        # P9: a prepared transaction outlives its connection, and SQLAlchemy passes over one that is dead.
        if any(_drivers.is_closed(each.line.driver) for each in prepared):
            await _finish(slot, prepared, "ROLLBACK")


async def _each(slots: Sequence[Slot], step: Any) -> list[tuple[Slot, Exception]]:
    errors = []
    for slot in slots:
        try:
            await step(slot)
        except Exception as exc:
            errors.append((slot, exc))
    return errors


def _report(errors: Sequence[tuple[Slot, Exception]], cause: BaseException | None, doing: str) -> None:
    for slot, error in errors:
        if cause is not None:
            cause.add_note(f"{slot.connect!r}: {doing} failed as well: {type(error).__name__}: {error}")
        logger.error("%r: %s failed", slot.connect, doing, exc_info=error)


# Two phases: prepare all, commit the one-phase sessions, then COMMIT PREPARED, repeated until the database has it (P9).


async def _prepare_two_phase(slot: Slot) -> None:
    slot.prepared = slot.lines.prepared()
    slot.arm(slot.connect.commit_timeout)
    try:
        await slot.session.run_sync(lambda session: session.prepare())
    finally:
        slot.disarm()


async def _commit_prepared(slots: Sequence[Slot], done: list[Slot]) -> None:
    """Carry the decision out everywhere, whatever one database does; the first error is raised at the end."""
    errors: list[Exception] = []
    for slot in slots:
        prepared, slot.prepared = slot.prepared, []
        try:
            await slot.commit()
        except Exception as exc:
            waiting = slot.callbacks.take()
            await slot.abandon("its COMMIT PREPARED failed")  # a rollback would undo what is decided
            try:
                await _finish(slot, prepared, "COMMIT")
            except ContextSqlaError as left:
                exc.add_note(str(left))
                _outcome_of(exc).in_doubt = True  # it is decided, and will be carried out, or was already
                errors.append(exc)
                continue
            logger.warning("%r: COMMIT PREPARED was repeated on a fresh connection: %s", slot.connect, type(exc).__name__)
            slot.after(waiting)
        done.append(slot)
    if errors:
        raise errors[0]


async def _finish(slot: Slot, prepared: Sequence[Prepared], decision: Literal["COMMIT", "ROLLBACK"]) -> None:
    """Finish prepared transactions on fresh connections within `commit_timeout`, or raise what names those left behind."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + slot.connect.commit_timeout
    left: list[str] = []
    for each in prepared:
        pause = 0.05
        while not await _finish_once(each, decision, deadline - loop.time()):
            if loop.time() + pause >= deadline:
                left.append(each.gid)
                break
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 2)
    if left:
        gids = ", ".join(map(repr, left))
        error = ContextSqlaError(f"{slot.connect!r}: prepared transaction {gids} is left behind; decision: {decision} (P9)")
        logger.error("%s", error)
        raise error


async def _finish_once(prepared: Prepared, decision: str, timeout: float) -> bool:
    working = False
    try:
        async with asyncio.timeout(max(0.1, timeout)), prepared.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            if decision == "ROLLBACK":
                # A PREPARE whose answer was lost may be carried out still, until its backend is gone.
                found = await connection.execute(_BACKEND, {"pid": prepared.pid})
                working = found.first() is not None
            await connection.execute(text(f"{decision} PREPARED '{prepared.gid}'"))
    except DBAPIError as exc:
        # 42704: no such prepared transaction. An earlier attempt was carried out and only its answer was lost.
        return getattr(exc.orig, "sqlstate", None) == "42704" and not working
    except Exception:  # whatever the driver has to say while it connects: SQLAlchemy passes asyncpg's own errors on
        return False
    return True


_REMEDY = (
    "two tasks used one session at the same moment; every coroutine of a unit shares its session: await them one after the "
    "other, or give each its own with 'await run_in_new_ctx(fn, ...)'"
)


def explain(exc: BaseException) -> None:
    """Add the remedy to SQLAlchemy's complaints about two statements at once on one session (P2).

    `Unit.close` does it for the exception that it is given; an adapter does it where the framework's handlers answer further in.

    Args:
        exc: what the request raised; it is explained once.
    """
    if not isinstance(exc, InvalidRequestError) or _REMEDY in getattr(exc, "__notes__", ()):
        return  # and is not asked for its text: that of an application's own error may fail
    if exc.code == "isce" or "concurrent operations" in str(exc) or "already flushing" in str(exc):
        exc.add_note(_REMEDY)
