"""P10: nothing outlives its unit of work: late tasks and captured sessions get a clear error, and nobody else's connection."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from context_sqla import (
    ContextClosedError,
    ContextSqlaError,
    SessionBusyError,
    atomic_db_session,
    commit_db_session,
    db_context,
    db_session,
    is_context_initiated,
    keep_transaction,
    put_db_session_to_context,
    run_in_new_ctx,
)
from sqlalchemy import event, select, text
from sqlalchemy import insert as insert_into
from sqlalchemy.exc import SQLAlchemyError
from support.deadline import until
from support.rows import insert
from support.scenario import Answer, Route
from support.tables import Item

Work = Callable[[], Awaitable[Any]]


class Broken(Exception):
    """An error of the application."""


async def _after_its_unit(work: Work) -> Any:
    """Run ``work`` as soon as the unit in which this task was started has ended."""
    await until(lambda: not is_context_initiated(), message="the unit never ended")
    return await work()


async def _outcomes(tasks: "list[asyncio.Task[Any]]") -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


# Units of every kind, and how they end

KINDS = pytest.mark.parametrize(
    "kind", ["2xx", "4xx", "exception", "body", "background", "db_context", "failing db_context", "new ctx"]
)


async def _run(kind: str, serve: Any, start: Work) -> None:
    """Run ``start`` in a unit of this kind, and return when that has ended or is about to."""
    if kind == "new ctx":
        await run_in_new_ctx(start)
    elif kind == "db_context":
        async with db_context():
            await start()
    elif kind == "failing db_context":
        with pytest.raises(Broken):
            async with db_context():
                await start()
                raise Broken
    else:
        await _run_in_a_request(kind, serve, start)


async def _run_in_a_request(kind: str, serve: Any, start: Work) -> None:
    started = asyncio.Event()

    async def begin() -> None:
        await start()
        started.set()

    async def body():
        await begin()
        yield b"first"

    async def handler(request):
        if kind == "body":
            return Answer(200, stream=body())
        if kind == "background":
            return Answer(202, background=[begin])
        await begin()
        if kind == "exception":
            raise Broken
        return Answer(200 if kind == "2xx" else 409)

    await (await serve(handler)).get()
    await asyncio.wait_for(started.wait(), 10)


@KINDS
async def test_late_task_that_asks_is_told_what_to_do(serve, db, kind):
    """A task that asks when its unit has ended gets an error that names the connect, db_context() and run_in_new_ctx() (P10)."""
    late = []

    async def start():
        late.append(asyncio.create_task(_after_its_unit(lambda: db_session(db))))

    await _run(kind, serve, start)
    [outcome] = await _outcomes(late)

    assert type(outcome) is ContextClosedError
    assert all(word in str(outcome) for word in (repr(db), "db_context()", "run_in_new_ctx()"))


@KINDS
async def test_late_task_with_a_captured_session_is_refused(serve, db, ledger, kind):
    """A session that a task captured is refused when its unit, which used it, has ended (P10)."""
    late = []

    async def start():
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        late.append(asyncio.create_task(_after_its_unit(lambda: session.execute(insert_into(Item).values(name="late")))))

    await _run(kind, serve, start)
    [outcome] = await _outcomes(late)

    assert type(outcome) is ContextClosedError
    assert "db_context()" in str(outcome)
    assert await ledger.names() == []


@KINDS
async def test_late_task_with_an_unused_session_is_refused(serve, db, ledger, kind):
    """A session that its unit never used is refused as well (P10)."""
    late = []

    async def start():
        session = await db_session(db)
        late.append(asyncio.create_task(_after_its_unit(lambda: session.execute(insert_into(Item).values(name="late")))))

    await _run(kind, serve, start)
    [outcome] = await _outcomes(late)

    assert type(outcome) is ContextClosedError
    assert await ledger.names() == []


@KINDS
async def test_db_context_is_the_remedy(serve, db, ledger, kind):
    """A task that outlived its unit works in a db_context() of its own (P10, P11)."""
    late = []

    async def write():
        async with db_context():
            await insert(db, "late")

    async def start():
        await db_session(db)
        late.append(asyncio.create_task(_after_its_unit(write)))

    await _run(kind, serve, start)
    await asyncio.gather(*late)

    assert await ledger.names() == ["late"]


# What a captured session refuses


async def _add(session):
    session.add(Item(name="late"))


async def _add_all(session):
    session.add_all([Item(name="late")])


async def _merge(session):
    await session.merge(Item(name="late"))


async def _execute(session):
    await session.execute(text("SELECT 1"))


async def _scalars(session):
    await session.scalars(select(Item))


async def _get(session):
    await session.get(Item, 1)


async def _stream(session):
    await session.stream(select(Item))


async def _connection(session):
    await session.connection()


async def _savepoint(session):
    async with session.begin_nested():
        await session.connection()


async def _transaction(session):
    async with session.begin():
        session.add(Item(name="late"))


async def _after_a_close(session):
    await session.close()
    await session.execute(text("SELECT 1"))


async def _after_a_reset(session):
    await session.rollback()
    session.add(Item(name="late"))


async def _in_sync_code(session):
    await session.run_sync(lambda sync: sync.execute(text("SELECT 1")))


async def _bulk(session):
    await session.run_sync(lambda sync: sync.bulk_save_objects([Item(name="late")]))


@pytest.mark.parametrize(
    "use",
    [
        _add,
        _add_all,
        _merge,
        _execute,
        _scalars,
        _get,
        _stream,
        _connection,
        _savepoint,
        _transaction,
        _after_a_close,
        _after_a_reset,
        _in_sync_code,
        _bulk,
    ],
    ids=lambda use: use.__name__.strip("_"),
)
async def test_captured_session_refuses(serve, db, ledger, bench, use):
    """A captured session refuses everything that would bring it back to life, after a commit and after a rollback (P10)."""
    late = []

    async def handler(request):
        session = await db_session(db)
        await insert(db, request.query["status"])
        late.append(asyncio.create_task(_after_its_unit(lambda: use(session))))
        return Answer(int(request.query["status"]))

    service = await serve(handler)
    for status in (200, 500):
        await service.post(f"/?status={status}")
    outcomes = await _outcomes(late)

    assert [type(one) for one in outcomes] == [ContextClosedError] * 2
    assert bench.databases.checked_out() == 0
    assert await ledger.names() == ["200"]


@pytest.mark.parametrize("status", [200, 500])
async def test_captured_session_does_not_pretend_to_commit(serve, db, ledger, status):
    """A late commit on a captured session is an error: what the task wrote may be rolled back, and it must not think it is there (P10)."""
    late = []

    async def handler(request):
        session = await db_session(db)
        session.add(Item(name="a"))
        late.append(asyncio.create_task(_after_its_unit(session.commit)))
        return Answer(status)

    await (await serve(handler)).post()
    [outcome] = await _outcomes(late)

    assert type(outcome) is ContextClosedError
    assert await ledger.names() == (["a"] if status < 400 else [])


async def test_captured_session_may_be_closed(serve, db, bench):
    """A late task may close the session that it captured, and roll it back: there is nothing left to do (P10)."""
    late = []

    async def end(session):
        await session.rollback()
        await session.close()

    async def handler(request):
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        late.append(asyncio.create_task(_after_its_unit(lambda: end(session))))
        return Answer(200)

    await (await serve(handler)).get()
    [outcome] = await _outcomes(late)

    assert outcome is None
    assert bench.databases.checked_out() == 0


async def test_captured_connection_is_refused(serve, connect, ledger):
    """A connection that a task took from the session does not work on when somebody else has it (P10)."""
    db = await connect("db", engine_options={"pool_size": 1})
    late = []
    used = asyncio.Event()
    go_on = asyncio.Event()

    async def write(connection):
        await used.wait()
        await connection.execute(insert_into(Item).values(name="late"))

    async def capture(request):
        connection = await (await db_session(db)).connection()
        late.append(asyncio.create_task(write(connection)))
        return Answer(200)

    async def use(request):
        await insert(db, "other")
        used.set()
        await go_on.wait()
        return Answer(201)

    service = await serve(Route("/", capture), Route("/use", use))
    await service.get("/")
    other = asyncio.create_task(service.post("/use"))
    [outcome] = await _outcomes(late)
    go_on.set()
    answer = await other

    assert isinstance(outcome, SQLAlchemyError | ContextSqlaError)
    assert answer.status == 201
    assert await ledger.names() == ["other"]


async def test_objects_of_an_ended_unit_are_detached(serve, db, ledger):
    """An object that a task changes late belongs to no session any more, and moves to the one of a db_context() (P10)."""
    late = []

    async def change(item):
        async with db_context():
            (await db_session(db)).add(item)
            item.name = "late"

    async def handler(request):
        item = Item(name="early")
        (await db_session(db)).add(item)
        late.append(asyncio.create_task(_after_its_unit(lambda: change(item))))
        return Answer(201)

    await (await serve(handler)).post()
    await asyncio.gather(*late)

    assert await ledger.names() == ["late"]


async def test_twenty_late_tasks_leave_the_pool_whole(serve, connect, bench, ledger):
    """Late tasks take no connection: a pool of one serves twenty requests that each leave one behind (P10)."""
    db = await connect("db", engine_options={"pool_size": 1})
    late = []

    async def handler(request):
        session = await db_session(db)
        await insert(db, request.query["name"])
        late.append(asyncio.create_task(_after_its_unit(lambda: session.execute(text("SELECT 1")))))
        late.append(asyncio.create_task(_after_its_unit(lambda: insert(db, "late"))))
        return Answer(201)

    service = await serve(handler)
    statuses = [(await service.post(f"/?name={number}")).status for number in range(20)]
    outcomes = await _outcomes(late)

    assert statuses == [201] * 20
    assert [type(one) for one in outcomes] == [ContextClosedError] * 40
    assert await ledger.count() == 20


# The other functions that ask


async def _atomic(db):
    async with atomic_db_session(db):
        pass


async def _put(db):
    session = await db.create_session()
    try:
        put_db_session_to_context(db, session)
    finally:
        await session.close()


@pytest.mark.parametrize("ask", [_atomic, keep_transaction, _put], ids=["atomic_db_session", "keep_transaction", "put"])
async def test_every_way_to_a_session_is_closed(serve, db, ask):
    """Nothing that would open a session in an ended unit, or put one there, works (P10)."""
    late = []

    async def start():
        late.append(asyncio.create_task(_after_its_unit(lambda: ask(db))))

    await _run("2xx", serve, start)
    [outcome] = await _outcomes(late)

    assert type(outcome) is ContextClosedError


@pytest.mark.parametrize("status", [200, 500])
async def test_late_commit_by_hand_is_an_error(serve, db, ledger, status):
    """commit_db_session in a task whose unit has ended is an error: what the task wrote may be rolled back (P10)."""
    late = []

    async def handler(request):
        await insert(db, "a")
        late.append(asyncio.create_task(_after_its_unit(lambda: commit_db_session(db))))
        return Answer(status)

    await (await serve(handler)).post()
    [outcome] = await _outcomes(late)

    assert isinstance(outcome, ContextSqlaError)
    assert await ledger.names() == (["a"] if status < 400 else [])


# In the middle of a statement


@pytest.mark.parametrize("how", ["4xx", "exception"])
@pytest.mark.postgresql
async def test_statement_in_flight_at_a_rollback_gets_a_clear_error(serve, connect, ledger, how):
    """A task whose statement runs when its request is rolled back is told why, and its connection goes to nobody else (P10)."""
    db = await connect("db", engine_options={"pool_size": 1})
    late, pids = [], []

    async def handler(request):
        session = await db_session(db)
        pids.append(await session.scalar(text("SELECT pg_backend_pid()")))
        if request.path == "/next":
            return Answer(200)
        late.append(asyncio.create_task(session.execute(insert_into(Item).values(name="late"))))
        await ledger.waiting("db")
        if how == "exception":
            raise Broken
        return Answer(409)

    service = await serve(Route("/", handler), Route("/next", handler))
    async with ledger.lock("items"):
        answer = await service.post()
        [outcome] = await _outcomes(late)
        following = await service.get("/next")

    assert (answer.status, following.status) == (409 if how == "4xx" else 500, 200)
    assert type(outcome) is ContextClosedError
    assert all(word in str(outcome) for word in (repr(db), "db_context()", "run_in_new_ctx()"))
    assert pids[0] != pids[1]
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_statement_in_flight_at_a_commit_is_awaited(serve, connect, ledger):
    """A task whose statement runs when its request commits has it done and committed, then the session is refused (P10, P7a)."""
    db = await connect("db", engine_options={"pool_size": 1})
    late = []
    at_the_end = asyncio.Event()

    def should_commit(status):
        at_the_end.set()
        return True

    async def write(session):
        await session.execute(insert_into(Item).values(name="in time"))
        await _after_its_unit(lambda: session.execute(insert_into(Item).values(name="late")))

    async def handler(request):
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        late.append(asyncio.create_task(write(session)))
        await ledger.waiting("db")
        return Answer(201)

    service = await serve(handler, should_commit=should_commit)
    async with ledger.lock("items"):
        request = asyncio.create_task(service.post())
        await asyncio.wait_for(at_the_end.wait(), 10)
    answer = await request
    [outcome] = await _outcomes(late)

    assert answer.status == 201
    assert type(outcome) is ContextClosedError
    assert await ledger.names() == ["in time"]


@pytest.mark.postgresql
async def test_statement_that_outlasts_the_commit_gets_a_clear_error(serve, connect, ledger):
    """A task whose statement does not end in time fails the commit, is told why, and its connection goes to nobody else (P10, P7a)."""
    db = await connect("db", engine_options={"pool_size": 1}, cleanup_timeout=0.1)
    late, pids, errors = [], [], []

    async def handler(request):
        session = await db_session(db)
        pids.append(await session.scalar(text("SELECT pg_backend_pid()")))
        if request.path == "/next":
            return Answer(200)
        late.append(asyncio.create_task(session.execute(insert_into(Item).values(name="late"))))
        await ledger.waiting("db")
        return Answer(201)

    async def answer_busy(exc):
        errors.append(exc)
        return Answer(503)

    service = await serve(Route("/", handler), Route("/next", handler), error_handlers={SessionBusyError: answer_busy})
    async with ledger.lock("items"):
        answer = await service.post()
        [outcome] = await _outcomes(late)
        following = await service.get("/next")

    assert answer.status in (500, 503)
    assert following.status == 200
    assert type(outcome) is ContextClosedError
    assert pids[0] != pids[1]
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_statement_in_flight_at_the_end_of_a_body_gets_a_clear_error(serve, connect, ledger):
    """A task whose statement runs when a body fails is told why, and its connection goes to nobody else (P10)."""
    db = await connect("db", engine_options={"pool_size": 1})
    late, pids = [], []

    async def body():
        session = await db_session(db)
        pids.append(await session.scalar(text("SELECT pg_backend_pid()")))
        yield b"first"
        late.append(asyncio.create_task(session.execute(insert_into(Item).values(name="late"))))
        await ledger.waiting("db")
        raise Broken

    async def handler(request):
        if request.path == "/next":
            pids.append(await (await db_session(db)).scalar(text("SELECT pg_backend_pid()")))
            return Answer(200)
        return Answer(200, stream=body())

    service = await serve(Route("/", handler), Route("/next", handler))
    async with ledger.lock("items"):
        answer = await service.get()
        [outcome] = await _outcomes(late)
        following = await service.get("/next")

    assert (answer.text, answer.complete, following.status) == ("first", False, 200)
    assert type(outcome) is ContextClosedError
    assert pids[0] != pids[1]
    assert await ledger.names() == []


@pytest.mark.sqlite
async def test_statement_in_flight_at_a_rollback_gets_a_clear_error_on_sqlite(serve, connect, bench, ledger):
    """On SQLite too a task whose statement runs when its request is rolled back is told why, and the next request works (P10)."""
    db = await connect("db", engine_options={"pool_size": 1})
    late = []
    running = asyncio.Event()
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n WHERE x < 0"

    async def handler(request):
        session = await db_session(db)
        await insert(db, request.path)
        if request.path == "/next":
            return Answer(200)
        event.listen(bench.databases.engines[0].sync_engine, "before_cursor_execute", lambda *_: running.set())
        late.append(asyncio.create_task(session.execute(text(endless))))
        await asyncio.wait_for(running.wait(), 10)
        return Answer(409)

    service = await serve(Route("/", handler), Route("/next", handler))
    answer = await service.post()
    [outcome] = await _outcomes(late)
    following = await service.post("/next")

    assert (answer.status, following.status) == (409, 200)
    assert type(outcome) is ContextClosedError
    assert await ledger.names() == ["/next"]


@pytest.mark.parametrize("status", [200, 409])
async def test_task_that_waits_for_a_connection_gets_a_clear_error(serve, connect, bench, ledger, status):
    """A task that waits in the pool when its unit ends is refused when its turn comes, and the connection is the next one's (P10)."""
    db = await connect("db", engine_options={"pool_size": 1}, cleanup_timeout=0.1)
    late = []

    async def handler(request):
        session = await db_session(db)
        late.append(asyncio.create_task(session.execute(insert_into(Item).values(name="late"))))
        await until(lambda: db.pool_status().waiting == 1)
        return Answer(status, "sent when the unit is over")

    async def other(request):
        await insert(db, "other")
        return Answer(201)

    service = await serve(Route("/", handler), Route("/other", other))
    async with db_context():
        await insert(db, "holder")
        answer = await service.post()
    [outcome] = await _outcomes(late)
    following = await service.post("/other")

    assert (answer.status, following.status) == (500 if status == 200 else 409, 201)
    assert type(outcome) is ContextClosedError
    assert await ledger.names() == ["holder", "other"]


async def test_task_that_waits_for_its_session_gets_a_clear_error(connect, bench):
    """A task that waits for the handler of its session when the unit is rolled back gets the error, not a cancellation (P10)."""
    asked = asyncio.Event()
    late = []

    async def choose_host(connect):
        asked.set()
        await asyncio.Event().wait()

    db = await connect("db", handler=choose_host)
    with pytest.raises(Broken):
        async with db_context():
            late.append(asyncio.create_task(db_session(db)))
            await asked.wait()
            raise Broken
    [outcome] = await _outcomes(late)

    assert type(outcome) is ContextClosedError
    assert not late[0].cancelled()
