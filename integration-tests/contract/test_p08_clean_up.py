"""P8: clean-up is complete, and never hides the error that it follows."""

import asyncio
import contextlib
import logging

import pytest
from context_sqla import (
    ContextClosedError,
    db_context,
    db_session,
    init_db_session_ctx,
    is_context_initiated,
    reset_db_session_ctx,
    run_in_new_ctx,
    unit_of_work,
)
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support.deadline import DEADLINE, until
from support.proxy import proxy
from support.rows import insert, insert_orphan
from support.scenario import Answer
from support.wire import Address


class Boom(Exception):
    """An error of the application."""


class Bang(BaseException):
    """An error that ``except Exception`` lets pass."""


class RollbackError(Exception):
    """An error of a rollback."""


class CloseError(Exception):
    """An error of a close."""


async def _break_rollback(db):
    """Let the rollback of the unit's session of this connect fail, once."""
    connection = await (await db_session(db)).connection()

    def fail(conn):
        event.remove(connection.sync_connection, "rollback", fail)
        raise RollbackError("the rollback failed")

    event.listen(connection.sync_connection, "rollback", fail)


class _Session(Session):
    def close(self):
        super().close()
        if self.info.get("break close"):
            raise CloseError("the close failed")


class BrittleSession(AsyncSession):
    """A session of the application's own, whose close may fail."""

    sync_session_class = _Session


async def _break_close(db):
    (await db_session(db)).sync_session.info["break close"] = True


async def _warm(db):
    """Open a connection: SQLAlchemy rolls back its very first one by itself."""
    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))


def _notes(exc):
    return "\n".join(getattr(exc, "__notes__", ()))


def _logged(caplog, kind):
    """The records of the suite's own loggers that show the traceback of an exception of this class."""
    return [
        record
        for record in caplog.records
        if record.name.split(".")[0] == "context_sqla" and record.exc_info and isinstance(record.exc_info[1], kind)
    ]


# ---------------------------------------------------------------------------------------------- the original error is not masked


@pytest.mark.wire
async def test_error_of_a_rollback_is_a_note(db, bench, ledger):
    """The error of the block is raised, the very object; that of the rollback is attached to it as a note (P8)."""
    boom = Boom()

    with pytest.raises(Boom) as caught:
        async with db_context():
            await insert(db, "lost")
            await _break_rollback(db)
            raise boom

    assert caught.value is boom
    assert "'db'" in _notes(boom)
    assert "RollbackError: the rollback failed" in _notes(boom)
    assert bench.databases.checked_out() == 0
    assert await ledger.names() == []


async def test_error_of_a_close_is_a_note(connect, bench, ledger):
    """The error of the block is raised, the very object; that of the close is attached to it as a note (P8)."""
    db = await connect("db", session_class=BrittleSession)
    boom = Boom()

    with pytest.raises(Boom) as caught:
        async with db_context():
            await insert(db, "lost")
            await _break_close(db)
            raise boom

    assert caught.value is boom
    assert "CloseError: the close failed" in _notes(boom)
    assert bench.databases.checked_out() == 0
    assert await ledger.names() == []


async def test_error_of_a_close_without_a_transaction_is_a_note(connect, bench):
    """The same where the session has no transaction open at its close (P8)."""
    db = await connect("db", session_class=BrittleSession)

    with pytest.raises(Boom) as caught:
        async with db_context():
            await _break_close(db)
            raise Boom

    assert "CloseError: the close failed" in _notes(caught.value)
    assert bench.databases.checked_out() == 0


async def test_error_of_a_close_after_a_commit_is_logged(connect, ledger, caplog):
    """A close that fails after the commit does not turn a success into an error: it is logged with its traceback (P8)."""
    db = await connect("db", session_class=BrittleSession)

    async with db_context():
        await insert(db, "a")
        await _break_close(db)

    assert len(_logged(caplog, CloseError)) == 1
    assert await ledger.names() == ["a"]


async def test_error_of_a_commit_is_not_masked(db, ledger):
    """A commit that fails is what is raised; the rollback after it that fails as well is a note (P8)."""

    async def refuse(session):
        await _break_rollback(db)
        raise Boom

    with pytest.raises(Boom) as caught:
        async with db_context(before_commit=refuse):
            await insert(db, "lost")

    assert "RollbackError" in _notes(caught.value)
    assert await ledger.names() == []


async def test_cancellation_is_not_masked(db, ledger, bench):
    """A cancelled unit whose rollback fails is cancelled all the same (P8)."""

    async def work():
        async with db_context():
            await insert(db, "lost")
            await _break_rollback(db)
            ready.set()
            await asyncio.Event().wait()

    ready = asyncio.Event()
    task = asyncio.create_task(work())
    await asyncio.wait_for(ready.wait(), DEADLINE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert "RollbackError" in _notes(caught.value)
    assert bench.databases.checked_out() == 0
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_connection_lost_during_the_rollback_is_a_note(connect, database, ledger, bench):
    """A connection that is reset during ROLLBACK does not hide why there was a rollback (P8)."""
    boom = Boom()
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        await _warm(db)
        network.cut_at(b"ROLLBACK")
        with pytest.raises(Boom) as caught:
            async with db_context():
                await insert(db, "lost")
                raise boom
        out = bench.databases.checked_out()
        await db.close()

    assert caught.value is boom
    assert "rolling back" in _notes(boom)
    assert out == 0
    assert await ledger.names() == []


async def test_error_handler_gets_the_error_of_the_handler(serve, db, ledger):
    """The application's error handler answers the handler's own error, although the rollback fails (P8)."""
    boom = Boom()
    seen = []

    async def handler(request):
        await insert(db, "lost")
        await _break_rollback(db)
        raise boom

    async def answer_boom(exc):
        seen.append(exc)
        return Answer(418, "boom")

    service = await serve(handler, error_handlers={Boom: answer_boom})
    answer = await service.post()

    assert (answer.status, answer.text) == (418, "boom")
    assert len(seen) == 1
    assert seen[0] is boom
    assert await ledger.names() == []


async def test_unhandled_error_whose_rollback_fails_is_a_500(serve, db, ledger, bench):
    """An error that nobody handles, and a rollback that fails after it: 500, nothing is written, the next request is fine (P8)."""

    async def handler(request):
        await insert(db, request.query["name"])
        if request.query["name"] == "good":
            return Answer(201)
        await _break_rollback(db)
        raise Boom

    service = await serve(handler)
    answer = await service.post("/?name=lost")
    await until(lambda: bench.databases.checked_out() == 0)
    good = await service.post("/?name=good")

    assert (answer.status, good.status) == (500, 201)
    assert await ledger.names() == ["good"]


# ----------------------------------------------------------------------------------------------- an answer that was returned stays


@pytest.mark.wire
async def test_rollback_that_fails_leaves_a_returned_404(serve, db, ledger, bench, caplog):
    """A rollback that fails on a returned 404 leaves that answer as it is, and is logged with its traceback (P8)."""

    async def handler(request):
        await insert(db, request.query["name"])
        if request.query["name"] == "good":
            return Answer(201)
        await _break_rollback(db)
        return Answer(404, "not here", {"x-kind": "mine"})

    service = await serve(handler)
    answer = await service.get("/?name=lost")
    await until(lambda: bench.databases.checked_out() == 0)
    good = await service.post("/?name=good")

    assert (answer.status, answer.text, answer.headers["x-kind"]) == (404, "not here", "mine")
    (record,) = _logged(caplog, RollbackError)
    assert record.levelno == logging.ERROR
    assert "'db'" in record.getMessage()
    assert good.status == 201
    assert await ledger.names() == ["good"]


@pytest.mark.postgresql
async def test_connection_lost_in_the_rollback_leaves_a_returned_404(serve, connect, database, ledger, caplog):
    """The same where the network breaks during ROLLBACK (P8)."""

    async def handler(request):
        await insert(db, "lost")
        return Answer(404, "not here")

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        service = await serve(handler)
        await _warm(db)
        network.cut_at(b"ROLLBACK")
        answers = [await service.get() for _ in range(2)]
        await service.stop()

    assert [(answer.status, answer.text) for answer in answers] == [(404, "not here")] * 2
    assert len(_logged(caplog, Exception)) == 1
    assert await ledger.names() == []


async def test_rollback_that_fails_leaves_an_error_handlers_answer(serve, db, other, ledger, other_ledger, caplog):
    """An error handler's 409 stays as well, and the session of the other connect is rolled back (P8)."""

    async def handler(request):
        await insert(db, "lost")
        await insert(other, "lost")
        await _break_rollback(db)
        raise Boom

    async def answer_boom(exc):
        return Answer(409, "conflict")

    service = await serve(handler, error_handlers={Boom: answer_boom})
    answer = await service.post()

    assert (answer.status, answer.text) == (409, "conflict")
    assert len(_logged(caplog, RollbackError)) == 1
    assert await ledger.names() == []
    assert await other_ledger.names() == []


# ------------------------------------------------------------------------------------------------- the other sessions are cleaned


@pytest.mark.parametrize("broken", [{"db"}, {"other"}, {"db", "other"}], ids=["first", "second", "both"])
async def test_rollback_that_fails_does_not_stop_the_others(db, other, bench, ledger, other_ledger, broken):
    """Whichever rollback fails, the other session is rolled back, and both pools are whole (P8)."""
    with pytest.raises(Boom) as caught:
        async with db_context():
            await insert(db, "lost")
            await insert(other, "lost")
            for connect in (db, other):
                if connect.name in broken:
                    await _break_rollback(connect)
            raise Boom

    assert _notes(caught.value).count("RollbackError") == len(broken)
    assert all(repr(name) in _notes(caught.value) for name in broken)
    assert bench.databases.checked_out() == 0
    assert await ledger.idle_in_transaction() == []
    assert await ledger.names() == []
    assert await other_ledger.names() == []


@pytest.mark.parametrize("started", [True, False], ids=["in-a-transaction", "without-a-transaction"])
@pytest.mark.parametrize("broken", ["first", "second"])
async def test_close_that_fails_does_not_stop_the_others(connect, bench, broken, started):
    """Whichever close fails, the other session is closed too (P8)."""
    first = await connect("first", session_class=BrittleSession)
    second = await connect("second", session_class=BrittleSession)
    sessions = []

    with pytest.raises(Boom) as caught:
        async with db_context():
            for one in (first, second):
                session = await db_session(one)
                sessions.append(session)
                if started:
                    await session.execute(text("SELECT 1"))
                if one.name == broken:
                    await _break_close(one)
            raise Boom

    assert "CloseError" in _notes(caught.value)
    assert bench.databases.checked_out() == 0
    for session in sessions:
        with pytest.raises(ContextClosedError):
            await session.execute(text("SELECT 1"))


async def test_close_that_fails_does_not_hold_up_the_connect(connect, bench):
    """After a close that failed nobody waits for that session: the connect closes at once (P8)."""
    db = await connect("db", session_class=BrittleSession, drain_timeout=10 * DEADLINE)

    with contextlib.suppress(CloseError):
        async with db_context():
            await (await db_session(db)).execute(text("SELECT 1"))
            await _break_close(db)
    async with asyncio.timeout(DEADLINE):
        await db.close()

    assert bench.databases.checked_out() == 0


async def test_commit_that_fails_cleans_up_every_session(db, other, bench, ledger, other_ledger):
    """A commit that fails rolls the others back; if one of those fails too, the rest still goes on (P8)."""

    async def fail(session):
        if session is await db_session(db):
            raise Boom

    with pytest.raises(Boom) as caught:
        async with db_context(before_commit=fail):
            await insert(other, "lost")
            await insert(db, "lost")
            await _break_rollback(other)

    assert "RollbackError" in _notes(caught.value)
    assert bench.databases.checked_out() == 0
    assert await ledger.names() == []
    assert await other_ledger.names() == []


# ------------------------------------------------------------------------------------ the container is closed, the variable restored


async def _raise(db, other):
    raise Boom


async def _raise_base(db, other):
    raise Bang


async def _fail_to_commit(db, other):
    await insert_orphan(db)


async def _fail_to_roll_back(db, other):
    await insert(db, "lost")
    await _break_rollback(db)
    raise Boom


async def _fail_to_roll_back_both(db, other):
    for connect in (db, other):
        await insert(connect, "lost")
        await _break_rollback(connect)
    raise Boom


async def _fail_to_close(db, other):
    await insert(db, "lost")
    await _break_close(db)
    raise Boom


async def _fail_to_close_after_the_commit(db, other):
    await insert(db, "kept")
    await _break_close(db)


async def _be_cancelled(db, other):
    await insert(db, "lost")
    asyncio.current_task().cancel()
    await asyncio.Event().wait()


async def _be_cancelled_and_fail(db, other):
    await insert(db, "lost")
    await _break_rollback(db)
    asyncio.current_task().cancel()
    await asyncio.Event().wait()


_FAILURES = [
    _raise,
    _raise_base,
    _fail_to_commit,
    _fail_to_roll_back,
    _fail_to_roll_back_both,
    _fail_to_close,
    _fail_to_close_after_the_commit,
    _be_cancelled,
    _be_cancelled_and_fail,
]
_names = [failure.__name__.lstrip("_") for failure in _FAILURES]


def _expected(failure):
    if failure is _fail_to_close_after_the_commit:
        return contextlib.nullcontext()
    special = {
        _raise_base: Bang,
        _fail_to_commit: IntegrityError,
        _be_cancelled: asyncio.CancelledError,
        _be_cancelled_and_fail: asyncio.CancelledError,
    }
    return pytest.raises(special.get(failure, Boom))


@pytest.mark.parametrize("failure", _FAILURES, ids=_names)
async def test_variable_is_restored(connect, other, bench, failure):
    """However a unit ends, the variable shows what it showed before: nothing, or the unit around it, which works on (P8)."""
    db = await connect("db", session_class=BrittleSession)

    async def work():
        with _expected(failure):
            async with db_context():
                await failure(db, other)
        outside = is_context_initiated()
        async with db_context():
            mine = await db_session(db)
            with _expected(failure):
                async with db_context():
                    await failure(db, other)
            same = await db_session(db) is mine
            await mine.execute(text("SELECT 1"))
        return outside, same, is_context_initiated()

    seen = await asyncio.create_task(work()) if failure is not _fail_to_close_after_the_commit else await _once(db, other)

    assert seen == (False, True, False)
    assert bench.databases.checked_out() == 0


async def _once(db, other):
    """``_fail_to_close_after_the_commit`` writes for good, and the name is unique."""
    async with db_context():
        mine = await db_session(db)
        async with db_context():
            await _fail_to_close_after_the_commit(db, other)
        same = await db_session(db) is mine
        await mine.execute(text("SELECT 1"))
    return is_context_initiated(), same, is_context_initiated()


@pytest.mark.parametrize("failure", _FAILURES, ids=_names)
async def test_container_is_closed(connect, other, bench, failure):
    """However a unit ends, it is closed: its sessions and a task that it left behind get ``ContextClosedError`` (P8)."""
    db = await connect("db", session_class=BrittleSession)
    sessions, late, go_on = [], [], asyncio.Event()

    async def ask_late():
        await go_on.wait()
        await db_session(db)

    async def work():
        with _expected(failure):
            async with db_context():
                sessions.append(await db_session(db))
                late.append(asyncio.create_task(ask_late()))
                await failure(db, other)

    try:
        await asyncio.create_task(work())
    finally:
        go_on.set()
        (answer,) = await asyncio.gather(*late, return_exceptions=True)

    assert isinstance(answer, ContextClosedError)
    with pytest.raises(ContextClosedError):
        await sessions[0].execute(text("SELECT 1"))
    assert bench.databases.checked_out() == 0


@pytest.mark.parametrize("failure", [_raise, _fail_to_roll_back, _be_cancelled_and_fail], ids=["raise", "rollback", "cancelled"])
@pytest.mark.parametrize("way", ["run_in_new_ctx", "unit_of_work"])
async def test_variable_is_restored_by_calls_too(db, other, bench, way, failure):
    """``run_in_new_ctx`` and ``unit_of_work`` restore the variable as a block does (P8)."""

    async def work():
        call = run_in_new_ctx if way == "run_in_new_ctx" else unit_of_work()
        with _expected(failure):
            await call(failure, db, other)
        return is_context_initiated()

    assert not await asyncio.create_task(work())
    assert bench.databases.checked_out() == 0


@pytest.mark.parametrize("breakage", [_break_rollback, _break_close], ids=["rollback", "close"])
async def test_variable_is_restored_by_hand_too(connect, bench, breakage):
    """A unit that was opened by hand is ended by its reset, also where its rollback or close fails (P8)."""
    db = await connect("db", session_class=BrittleSession)

    token = init_db_session_ctx()
    session = await db_session(db)
    await insert(db, "lost")
    await breakage(db)
    with contextlib.suppress(RollbackError, CloseError):
        await reset_db_session_ctx(token)

    assert not is_context_initiated()
    assert bench.databases.checked_out() == 0
    with pytest.raises(ContextClosedError):
        await session.execute(text("SELECT 1"))


@pytest.mark.wire
@pytest.mark.parametrize("ending", ["raised", "refused", "commit-fails"])
async def test_unit_of_a_request_is_closed_whatever_fails(serve, connect, bench, ending):
    """After a request that failed, and whose clean-up failed, its session is refused, and the connection serves the next one (P8)."""
    db = await connect("db", engine_options={"pool_size": 1})
    sessions = []

    async def handler(request):
        if request.query.get("good"):
            await insert(db, "good")
            return Answer(201)
        sessions.append(await db_session(db))
        await insert(db, "lost")
        if ending == "commit-fails":
            await insert_orphan(db)
            return Answer(201)
        await _break_rollback(db)
        if ending == "raised":
            raise Boom
        return Answer(404)

    service = await serve(handler)
    await service.post("/")
    good = await service.post("/?good=1")
    await until(lambda: bench.databases.checked_out() == 0)

    assert good.status == 201
    with pytest.raises(ContextClosedError):
        await sessions[0].execute(text("SELECT 1"))
