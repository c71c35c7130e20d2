"""P18: units side by side in one request, and units that are repeated when the database asks for it."""

import asyncio
from contextvars import ContextVar

import pytest
from context_sqla import (
    commit_db_session,
    db_session,
    is_context_initiated,
    is_in_doubt,
    on_commit,
    run_in_new_ctx,
    unit_of_work,
)
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from support.proxy import proxy
from support.rows import insert
from support.scenario import Answer, Feature
from support.wire import Address

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Boom(Exception):
    """An error of the application."""


def _state(exc):
    return getattr(exc.orig, "sqlstate", None) or getattr(exc.orig, "pgcode", None)


# run_in_new_ctx


@pytest.mark.wire
async def test_calls_commit_by_themselves(serve, db, ledger):
    """Each call is a unit that commits or rolls back by itself, whatever becomes of the request (P18)."""

    async def work(name):
        await insert(db, name)
        if name.startswith("bad"):
            raise Boom(name)
        return name.upper()

    async def handler(request):
        results = await asyncio.gather(*(run_in_new_ctx(work, name) for name in ("a", "bad", "b")), return_exceptions=True)
        await insert(db, "request")
        return Answer(409, " ".join(map(str, results)))

    answer = await (await serve(handler)).post()

    assert (answer.status, answer.text) == (409, "A bad B")
    assert await ledger.names() == ["a", "b"]


async def test_calls_have_connections_of_their_own(serve, db, bench):
    """Four calls side by side beside the request: five sessions, five connections at the same moment (P18)."""
    barrier = asyncio.Barrier(4)
    sessions = []
    out = []

    async def work():
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        sessions.append(session)
        async with asyncio.timeout(10):
            await barrier.wait()
        out.append(bench.databases.checked_out())
        async with asyncio.timeout(10):
            await barrier.wait()

    async def handler(request):
        sessions.append(await db_session(db))
        await sessions[0].execute(text("SELECT 1"))
        await asyncio.gather(*(run_in_new_ctx(work) for _ in range(4)))
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert out == [5] * 4
    assert len({id(session) for session in sessions}) == 5


async def test_task_group_of_calls(serve, db, ledger):
    """In a ``TaskGroup`` a failure cancels the others, whose work is rolled back; the request's own error is a 500 (P18)."""
    written = asyncio.Event()

    async def wait():
        await insert(db, "waits")
        written.set()
        await asyncio.Event().wait()

    async def fail():
        await asyncio.wait_for(written.wait(), 10)
        raise Boom

    async def handler(request):
        async with asyncio.TaskGroup() as group:
            group.create_task(run_in_new_ctx(wait))
            group.create_task(run_in_new_ctx(fail))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


async def test_call_in_a_task_outlives_its_request(serve, db, ledger):
    """``create_task(run_in_new_ctx(...))`` goes on after the answer, and commits (P10, P18)."""
    answered = asyncio.Event()
    tasks = []

    async def work():
        await asyncio.wait_for(answered.wait(), 10)
        await insert(db, "task")

    async def handler(request):
        await insert(db, "request")
        tasks.append(asyncio.create_task(run_in_new_ctx(work)))
        return Answer(201)

    answer = await (await serve(handler)).post()
    before = await ledger.names()
    answered.set()
    await tasks[0]

    assert answer.status == 201
    assert before == ["request"]
    assert await ledger.names() == ["request", "task"]


async def test_every_argument_goes_to_the_function(serve, db):
    """Positions and keywords arrive as they are, whatever they are called (P18)."""
    seen = []
    keywords = {"fn": 1, "retry": 2, "isolation_level": 3, "read_only": 4, "policy": 5, "args": 6, "kwargs": 7}

    async def work(*args, **kwargs):
        seen.append((args, kwargs))

    async def handler(request):
        await run_in_new_ctx(work, 1, 2, **keywords)
        await unit_of_work(retry=1)(work, 1, 2, **keywords)
        await unit_of_work(retry=1)(work)(1, 2, **keywords)
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert seen == [((1, 2), keywords)] * 3


async def test_context_variables_are_visible(serve, db):
    """What the request has set is visible in calls, in tasks of calls and in units of work (P18)."""
    seen = []

    async def work():
        seen.append((tenant.get(), is_context_initiated()))

    async def handler(request):
        tenant.set("mine")
        await run_in_new_ctx(work)
        await asyncio.create_task(run_in_new_ctx(work))
        await asyncio.gather(run_in_new_ctx(work), unit_of_work()(work)())
        return Answer(200)

    await (await serve(handler)).get()

    assert seen == [("mine", True)] * 4
    assert tenant.get() == "nobody"


async def test_sync_handler_reaches_its_unit(serve, db, ledger, framework):
    """A sync handler sees the request's unit; from its thread it can call into the loop, in that unit or a new one (P18)."""
    seen = []

    def handler(request):
        seen.append(is_context_initiated())
        if Feature.SYNC_HANDLERS not in framework.lacks:
            call_into_the_loop(run_in_new_ctx, insert, db, "call")  # first: SQLite has room for one transaction that writes
            call_into_the_loop(insert, db, "unit")
        return Answer(400)

    loop = asyncio.get_running_loop()

    def call_into_the_loop(fn, *args):
        if framework.module in ("starlette", "fastapi"):
            import anyio.from_thread

            return anyio.from_thread.run(fn, *args)
        return asyncio.run_coroutine_threadsafe(fn(*args), loop).result(10)

    answer = await (await serve(handler)).post()

    assert answer.status == 400
    assert seen == [True]
    assert await ledger.names() == ([] if Feature.SYNC_HANDLERS in framework.lacks else ["call"])


# unit_of_work: real conflicts of real transactions


@pytest.mark.postgresql
@pytest.mark.parametrize("form", ["decorator", "call"])
async def test_serialization_failure_at_the_commit_is_repeated(serve, db, ledger, form):
    """Two serializable transactions that cannot both commit: one is run again as a whole, and both succeed (P18)."""
    both_written = asyncio.Barrier(2)
    attempts = []
    failed_in_the_function = []

    async def work(name):
        attempts.append(name)
        session = await db_session(db)
        try:
            count = await session.scalar(text("SELECT count(*) FROM items"))
            await insert(db, f"{name} {count}")
        except DBAPIError as exc:
            failed_in_the_function.append(exc)
            raise
        if attempts.count(name) == 1:
            async with asyncio.timeout(10):
                await both_written.wait()
        return name

    how = unit_of_work(retry=3, isolation_level="SERIALIZABLE")
    decorated = how(work)

    async def handler(request):
        calls = [decorated(name) if form == "decorator" else how(work, name) for name in "ab"]
        return Answer(201, "".join(await asyncio.gather(*calls)))

    answer = await (await serve(handler)).post()

    assert (answer.status, answer.text) == (201, "ab")
    assert len(attempts) == 3
    assert failed_in_the_function == []
    assert sorted(name[-1] for name in await ledger.names()) == ["0", "1"]


@pytest.mark.postgresql
async def test_serialization_failure_without_retry_is_raised(serve, db, ledger):
    """Without ``retry`` the function runs once, and the database's error is raised (P18)."""
    both_written = asyncio.Barrier(2)

    @unit_of_work(isolation_level="SERIALIZABLE")
    async def work(name):
        session = await db_session(db)
        count = await session.scalar(text("SELECT count(*) FROM items"))
        await insert(db, f"{name} {count}")
        async with asyncio.timeout(10):
            await both_written.wait()

    async def handler(request):
        results = await asyncio.gather(*(work(name) for name in "ab"), return_exceptions=True)
        return Answer(201, " ".join(_state(result) for result in results if result is not None))

    answer = await (await serve(handler)).post()

    assert answer.text == "40001"
    assert await ledger.count() == 1


@pytest.mark.postgresql
async def test_serialization_failure_of_a_statement_is_repeated(serve, db, ledger):
    """A row that changed under a repeatable-read transaction: the function is run again and sees the new row (P18)."""
    await ledger.execute("INSERT INTO parents (name) VALUES ('0')")
    seen = []

    @unit_of_work(retry=1, isolation_level="REPEATABLE READ")
    async def work():
        session = await db_session(db)
        seen.append(await session.scalar(text("SELECT name FROM parents")))
        if len(seen) == 1:
            await ledger.execute("UPDATE parents SET name = '1'")
        await session.execute(text("UPDATE parents SET name = name || '!'"))

    async def handler(request):
        await work()
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert seen == ["0", "1"]
    assert await ledger.names("parents") == ["1!"]


@pytest.mark.postgresql
async def test_deadlock_is_repeated(serve, db, ledger):
    """Two transactions that lock each other out: the one that the database ends is run again, and both succeed (P18)."""
    await ledger.execute("INSERT INTO parents (name) VALUES ('a'), ('b')")
    both_locked = asyncio.Barrier(2)
    attempts = []

    @unit_of_work(retry=3)
    async def work(mine, yours):
        attempts.append(mine)
        session = await db_session(db)
        await session.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
        lock = text("SELECT 1 FROM parents WHERE name = :name FOR UPDATE")
        await session.execute(lock, {"name": mine})
        if attempts.count(mine) == 1:
            async with asyncio.timeout(10):
                await both_locked.wait()
        await session.execute(lock, {"name": yours})
        await insert(db, mine)

    async def handler(request):
        await asyncio.gather(work("a", "b"), work("b", "a"))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert len(attempts) == 3
    assert await ledger.names() == ["a", "b"]


async def _conflict(db, ledger, attempts):
    """Make the next statement of this transaction fail with 40001."""
    session = await db_session(db)
    attempts.append(await session.scalar(text("SELECT name FROM parents")))
    await ledger.execute("UPDATE parents SET name = name || '+'")
    await session.execute(text("UPDATE parents SET name = name || '!'"))


@pytest.mark.postgresql
@pytest.mark.parametrize(("retry", "calls"), [(1, 2), (3, 4)])
async def test_repetitions_have_a_bound(serve, db, ledger, retry, calls):
    """A conflict at every attempt: after ``retry`` repetitions the database's own error is raised (P18)."""
    await ledger.execute("INSERT INTO parents (name) VALUES ('0')")
    attempts = []
    raised = []

    async def handler(request):
        try:
            await unit_of_work(retry=retry, isolation_level="REPEATABLE READ")(_conflict, db, ledger, attempts)
        except DBAPIError as exc:
            raised.append(_state(exc))
        return Answer(200)

    answer = await (await serve(handler)).post()

    assert answer.status == 200
    assert raised == ["40001"]
    assert len(attempts) == calls
    assert len(set(attempts)) == calls


@pytest.mark.postgresql
@pytest.mark.parametrize("how", ["commit_db_session", "session.commit"])
async def test_nothing_is_repeated_after_a_commit_by_hand(serve, db, ledger, how):
    """What the function has committed by hand would be written twice: its error is raised at once (P18)."""
    await ledger.execute("INSERT INTO parents (name) VALUES ('0')")
    attempts = []

    @unit_of_work(retry=3, isolation_level="REPEATABLE READ")
    async def work():
        await insert(db, f"committed {len(attempts)}")
        if how == "commit_db_session":
            await commit_db_session(db)
        else:
            await (await db_session(db)).commit()
        await _conflict(db, ledger, attempts)

    async def handler(request):
        with pytest.raises(DBAPIError):
            await work()
        return Answer(200)

    answer = await (await serve(handler)).post()

    assert answer.status == 200
    assert len(attempts) == 1
    assert await ledger.names() == ["committed 0"]


@pytest.mark.postgresql
async def test_commit_in_doubt_is_not_repeated(serve, connect, database, ledger):
    """The connection dies under COMMIT: nobody knows, so nothing is repeated, and the error says that it is in doubt (P7, P18)."""
    attempts = []
    raised = []

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)

        @unit_of_work(retry=3)
        async def work():
            attempts.append(1)
            await insert(db, "a")
            network.cut_at(b"COMMIT", forward=True)

        async def handler(request):
            try:
                await work()
            except Exception as exc:
                raised.append(is_in_doubt(exc))
            return Answer(200)

        service = await serve(handler)
        answer = await service.post()
        await service.stop()

    assert answer.status == 200
    assert raised == [True]
    assert len(attempts) == 1
    assert await ledger.names() == ["a"]


@pytest.mark.postgresql
async def test_callbacks_of_a_failed_attempt_are_dropped(serve, db, ledger):
    """``on_commit`` of an attempt that failed never runs, that of the good one runs once (P14, P18)."""
    await ledger.execute("INSERT INTO parents (name) VALUES ('0')")
    attempts = []
    ran = []

    @unit_of_work(retry=2, isolation_level="REPEATABLE READ")
    async def work():
        number = len(attempts)
        on_commit(lambda: ran.append(number))
        on_commit(lambda: ran.append(f"connect {number}"), connect=db)
        if number == 0:
            await _conflict(db, ledger, attempts)
        await insert(db, "a")

    async def handler(request):
        await work()
        return Answer(201)

    await (await serve(handler)).post()

    assert sorted(map(str, ran)) == ["1", "connect 1"]


async def test_other_errors_are_not_repeated(serve, db, ledger):
    """An error that the database does not ask to be repeated ends the function at once (P18)."""
    attempts = []

    @unit_of_work(retry=3)
    async def work():
        attempts.append(1)
        await insert(db, "a")
        await insert(db, "a")

    async def handler(request):
        await work()
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert len(attempts) == 1
    assert await ledger.names() == []


# unit_of_work: options


@pytest.mark.postgresql
async def test_options_hold_for_every_transaction_of_the_unit(serve, db):
    """Isolation level and read-only are the server's, also after a commit by hand; the request around has its own (P18)."""
    seen = []

    async def look():
        session = await db_session(db)
        seen.append([await session.scalar(text(f"SHOW transaction_{what}")) for what in ("isolation", "read_only")])

    @unit_of_work(isolation_level="REPEATABLE READ", read_only=True)
    async def work():
        await look()
        await commit_db_session(db)
        await look()

    async def handler(request):
        await look()
        await work()
        await commit_db_session(db)
        await look()
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert seen == [["read committed", "off"], *[["repeatable read", "on"]] * 2, ["read committed", "off"]]


@pytest.mark.postgresql
async def test_options_do_not_stay_with_the_connection(serve, connect):
    """The next user of the same connection has the default again (P18)."""
    db = await connect("one", engine_options={"pool_size": 1})
    seen = []

    async def look():
        session = await db_session(db)
        seen.append([await session.scalar(text(f"SHOW transaction_{what}")) for what in ("isolation", "read_only")])

    async def handler(request):
        await unit_of_work(isolation_level="SERIALIZABLE", read_only=True)(look)()
        await look()
        return Answer(200)

    await (await serve(handler)).get()

    assert seen == [["serializable", "on"], ["read committed", "off"]]


@pytest.mark.postgresql
async def test_read_only_unit_writes_nothing(serve, db, ledger):
    """The database itself refuses a write in a read-only unit (P18)."""

    async def handler(request):
        with pytest.raises(DBAPIError, match="read-only"):
            await unit_of_work(read_only=True)(insert, db, "a")
        return Answer(200)

    answer = await (await serve(handler)).post()

    assert answer.status == 200
    assert await ledger.names() == []
