"""`db_session` and its family, and the life cycle by hand for those who write a middleware of their own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import Token
from threading import get_ident
from typing import Any, Literal, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from . import _commit
from ._connect import DBConnect
from ._container import ASKS_SYSTEM, Phase
from ._context import current
from ._engines import KEY
from ._lines import Lines
from ._options import check_options, transaction_options
from ._policy import BeforeCommitCallback, Policy
from ._settle import settle
from ._slot import Slot
from ._unit import Unit
from .errors import ContextAlreadyInitiatedError, ContextNotInitiatedError, UnsupportedOptionError

S = TypeVar("S", bound=AsyncSession)
CurrentTransaction = Literal["commit", "rollback", "append", "raise"]


async def db_session(connect: DBConnect[S]) -> S:
    """Return the unit's session of this connect: lazy, and the same for every coroutine of the unit (P1, P2).

    Args:
        connect: the database.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        ContextClosedError: called by a task that outlived its unit.
        ForeignLoopError: called in another event loop than the unit's.
    """
    unit = current.get()
    if unit is None:
        raise _outside(connect)
    if unit.runs_ahead is None and (loop := unit.loop) is not None:
        slot = unit.slots.get(connect.context_key)
        if slot is not None and (
            unit.thread == get_ident() and loop.is_running() if ASKS_SYSTEM else loop is asyncio.get_running_loop()
        ):
            session: S = slot.session
            return session
    slot = unit.slot_at_once(connect) or await unit.slot(connect)
    made: S = slot.session
    return made


async def commit_db_session(connect: DBConnect[Any]) -> None:
    """Commit what is open on the unit's session; the next statement begins a new transaction.

    Nothing open, or no session yet: nothing happens.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
    """
    if (slot := _find(connect)) is not None:
        await _commit.commit([slot])
    elif (slot := (_unit(connect).borrowed or {}).get(connect.context_key)) is not None:
        await slot.flush()


async def rollback_db_session(connect: DBConnect[Any]) -> None:
    """Roll back what is open on the unit's session; the next statement begins a new transaction.

    Nothing open, or no session yet: nothing happens.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        SessionBusyError: another task commits it at this moment.
    """
    if (slot := _find(connect)) is not None and slot.open:
        slot.check_not_committing()
        await settle(slot.rollback, again=True)


async def close_db_session(connect: DBConnect[Any]) -> None:
    """Close the unit's session and forget it; the next `db_session` gives a new one.

    What is not committed is rolled back. After `commit_db_session` this frees everything before slow work.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        SessionBusyError: another task commits it at this moment.
    """
    if (slot := _find(connect)) is not None:
        slot.check_not_committing()
        del _unit(connect).here()[connect.context_key]
        await _commit.end([slot])


@asynccontextmanager
async def atomic_db_session(
    connect: DBConnect[S],
    current_transaction: CurrentTransaction = "commit",
    *,
    isolation_level: str | None = None,
    read_only: bool = False,
) -> AsyncIterator[S]:
    """Run a block in a transaction of its own on the unit's session: committed at its end, rolled back on an error (P17).

    Args:
        connect: the database.
        current_transaction: what becomes of a transaction that is open already: `commit` and `rollback` end it so and begin
            anew, `append` goes on in it, `raise` raises SQLAlchemy's `InvalidRequestError`.
        isolation_level: for this transaction alone.
        read_only: let the database refuse writes in this transaction.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        UnsupportedOptionError: an option cannot be kept, here or in a transaction that is open already.
        ValueError: `current_transaction` is something else.
    """
    if current_transaction not in ("commit", "rollback", "append", "raise"):
        raise ValueError(f"current_transaction is 'commit', 'rollback', 'append' or 'raise', not {current_transaction!r}")
    slot = await _unit(connect).slot(connect)
    session: S = slot.session  # type: ignore[assignment]
    end = Slot.flush if connect.context_key in (_unit(connect).borrowed or {}) else lambda slot: _commit.commit([slot])
    options = transaction_options(isolation_level=isolation_level, read_only=read_only)
    if slot.open and current_transaction == "commit":
        await end(slot)
    elif slot.open and current_transaction == "rollback":
        slot.check_not_committing()
        await settle(slot.rollback, again=True)
    if options and (slot.open or slot.place is not None):
        raise UnsupportedOptionError(f"{connect!r}: {', '.join(options)} cannot be set in a transaction that is open already")
    if not slot.open or current_transaction == "raise":
        await session.begin()  # SQLAlchemy's own error if one is open
    try:
        if options:
            check_options(connect, session, options)
            await session.connection(execution_options=options)
        yield session
    except BaseException as exc:
        await _commit.roll_back([slot], exc)
        raise
    await end(slot)


@asynccontextmanager
async def new_non_ctx_session(connect: DBConnect[S]) -> AsyncIterator[S]:
    """Give a session of its own, outside every unit: closed at the end, not committed.

    In a test that shares one transaction it works in that one too, inside the unit that is open here (P12).
    """
    place = await Unit().take_place(connect)
    session: S = await connect.create_session() if place is None else place.new_session()
    session.sync_session.info[KEY] = Lines()
    try:
        yield session
    finally:
        try:
            await _settle_within(connect.cleanup_timeout, session, session.close, again=True)
        finally:
            if place is not None:
                place.give_back()


@asynccontextmanager
async def new_non_ctx_atomic_session(connect: DBConnect[S]) -> AsyncIterator[S]:
    """Give a session of its own, outside every unit: committed at the end, rolled back on an error."""
    async with new_non_ctx_session(connect) as session:
        try:
            await session.begin()
            yield session
        except BaseException:
            await _settle_within(connect.cleanup_timeout, session, session.rollback, again=True)
            raise
        await _settle_within(connect.commit_timeout, session, session.commit)


def on_commit(callback: Callable[[], Awaitable[Any] | Any], *, connect: DBConnect[Any] | None = None) -> None:
    """Run a callback once what is written now is committed; a rollback drops it (P14).

    An error in it is logged and changes nothing. A `db_session` inside it is a unit of its own.

    Args:
        callback: takes nothing, plain or async; never run at once.
        connect: run it after the next commit of this connect's session, and drop it with the innermost savepoint that is open
            now. Without it: when the unit has committed everything.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        TypeError: the callback is no function.
    """
    if not callable(callback):
        raise TypeError("on_commit takes a function, not what it returns: write on_commit(lambda: send_mail(user))")
    unit = _unit(connect)
    slot = unit.here().get(connect.context_key) if connect is not None else None
    if slot is not None:
        slot.callbacks.add(callback, slot.sync)
    elif unit.is_given_up():
        return  # P14: what it waits for is rolled back
    elif connect is None:
        unit.on_commit(callback)
    else:
        unit.on_first_commit(connect, callback)


async def keep_transaction(connect: DBConnect[Any]) -> None:
    """Keep this session's transaction from the handler to the last byte of the body (P5).

    It is flushed before the head and committed before the last byte: an exception to the commit before the answer, for bodies
    that read from a server-side cursor which the handler has opened.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
    """
    slot = await _unit(connect).slot(connect)
    slot.kept = True


def init_db_session_ctx(force: bool = False) -> Token[Any]:
    """Open a unit by hand and return the token for `reset_db_session_ctx`.

    Args:
        force: open it inside another one too.

    Raises:
        ContextAlreadyInitiatedError: a unit is open already, and `force` is not set.
    """
    if not force and is_context_initiated():
        raise ContextAlreadyInitiatedError("a unit of work is open here already; pass force=True for one inside it")
    return Unit().make_current()


def is_context_initiated() -> bool:
    """Return whether a unit of work is open here."""
    unit = current.get()
    return unit is not None and unit.phase is not Phase.CLOSED


async def reset_db_session_ctx(token: Token[Any], with_close: bool = True) -> None:
    """End a unit that was opened by hand, and those that were opened inside it and not ended.

    Args:
        token: what `init_db_session_ctx` returned.
        with_close: close its sessions, rolling back what is not committed; otherwise they are left to the caller.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
    """
    opened: Unit | None = _unit(None)
    while opened is not None and opened._token is not token:
        opened = opened.outer
    if opened is None:
        raise ContextNotInitiatedError("this token opened no unit that is open here; reset_db_session_ctx() takes each once")
    outer = opened.outer
    while (unit := current.get()) is not None and unit is not outer:
        if with_close:
            await unit.close()
        else:
            unit.leave()
        if current.get() is unit:  # it was opened in another context
            current.set(outer)


def get_db_session_from_context(connect: DBConnect[S]) -> S | None:
    """Return the unit's session of this connect, None if there is none yet.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
    """
    slot = _find(connect)
    session: S | None = slot.session if slot is not None else None  # type: ignore[assignment]
    return session


def put_db_session_to_context(connect: DBConnect[S], session: S) -> None:
    """Make an existing session the unit's session of this connect.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        ContextSqlaError: the unit has one already.
        TypeError: it is no `AsyncSession`.
    """
    _unit(connect).put(connect, session)


def pop_db_session_from_context(connect: DBConnect[S]) -> S | None:
    """Take the session of this connect out of the unit, without closing it; it belongs to the caller then.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        SessionBusyError: another task commits it at this moment.
    """
    if (slot := _find(connect)) is None:
        return None
    slot.check_not_committing()
    del _unit(connect).here()[connect.context_key]
    slot.let_go()
    session: S = slot.session  # type: ignore[assignment]
    return session


async def commit_all_sessions(before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit every session of the unit, or none that was not yet committed (P9).

    Args:
        before_commit: awaited before the commit of each session with an open transaction.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
    """
    unit = _unit(None)
    mine = unit.here()
    before = [(slot, slot.before_commit) for slot in mine.values()]
    for slot, own in before:
        slot.before_commit = before_commit or own
    try:
        await (unit._decide(True) if mine is unit.slots else _commit.commit(list(mine.values())))
    finally:
        for slot, own in before:
            slot.before_commit = own


async def rollback_all_sessions() -> None:
    """Roll every session of the unit back.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        SessionBusyError: another task commits one of them at this moment.
    """
    for slot in (mine := (unit := _unit(None)).here()).values():
        slot.check_not_committing()
    unit._later = unit._later if mine is unit.slots else None  # P14
    await (unit._decide(False) if mine is unit.slots else _commit.roll_back(list(mine.values())))


async def close_all_sessions() -> None:
    """Close every session of the unit and forget it; what is not committed is rolled back.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
        SessionBusyError: another task commits one of them at this moment.
    """
    for slot in (slots := list((mine := _unit(None).here()).values())):
        slot.check_not_committing()
    mine.clear()
    await _commit.end(slots)


async def auto_commit_by_status_code(status_code: int, before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit every session of the unit if the status is below 400, roll them back otherwise (P3).

    Args:
        status_code: of the response.
        before_commit: awaited before the commit of each session with an open transaction.

    Raises:
        ContextNotInitiatedError: called outside every unit of work.
    """
    if Policy().commits(status_code):
        await commit_all_sessions(before_commit)
    else:
        await rollback_all_sessions()


async def _settle_within(
    seconds: float, session: AsyncSession, end: Callable[[], Coroutine[Any, Any, None]], *, again: bool = False
) -> None:
    """End a transaction outside of units; past the limit its connections are cut (P7)."""
    lines: Lines = session.sync_session.info[KEY]
    limit = asyncio.get_running_loop().call_later(
        seconds, lines.expire, f"no answer within {seconds:g} s: the connection was cut"
    )
    try:
        await settle(end, again=again)
    finally:
        limit.cancel()


def _outside(connect: DBConnect[Any] | None) -> ContextNotInitiatedError:
    what = "this" if connect is None else f"{connect!r}: a session"
    return ContextNotInitiatedError(
        f"{what} was asked for outside a unit of work; in a request: is the adapter set up? In a websocket, script, worker or "
        "test: wrap the work in 'async with db_context():'"
    )


def _unit(connect: DBConnect[Any] | None) -> Unit:
    unit: Unit | None = current.get()
    if unit is None:
        raise _outside(connect)
    unit.check_open(connect)
    return unit


def _find(connect: DBConnect[Any]) -> Slot | None:
    return _unit(connect).here().get(connect.context_key)
