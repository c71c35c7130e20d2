"""The proof at the end of a test finds what was left behind, and the observer sees what it should."""

import asyncio
import contextlib

import pytest
from context_sqla import init_db_session_ctx, reset_db_session_ctx
from sqlalchemy import text
from support import databases as databases_module
from support.bench import bench


@pytest.fixture(name="quick")
def _quick(monkeypatch):
    """Do not wait long for what will not happen."""
    until = databases_module.until
    monkeypatch.setattr(databases_module, "until", lambda condition, deadline: until(condition, deadline=0.1))


@pytest.fixture(name="place")
def _place(stack, tmp_path, request):
    return request.getfixturevalue("postgres") if stack.dialect == "postgresql" else tmp_path


async def test_nothing_left_behind_is_no_error(stack, place):
    """A test that gives back what it took passes."""
    async with bench(stack, place) as work:
        db = await work.connect()
        async with await db.create_session() as session:
            await session.execute(text("INSERT INTO items (name) VALUES ('a')"))
            await session.commit()
        database = await work.databases.database()

        assert await database.ledger.names() == ["a"]


async def test_connection_that_is_out_is_found(stack, place, quick):
    """A connection that nobody has given back is an error."""
    async with contextlib.AsyncExitStack() as late:
        with pytest.raises(AssertionError, match="checked out: 1"):
            async with bench(stack, place) as work:
                db = await work.connect(drain_timeout=0)
                session = await db.create_session()
                late.push_async_callback(session.invalidate)
                await session.execute(text("SELECT 1"))


@pytest.mark.postgresql
async def test_prepared_transaction_is_found_and_removed(stack, place, quick):
    """A transaction that stays prepared is an error, and the next test does not meet it."""
    with pytest.raises(AssertionError, match="prepared transactions: .'left'"):
        async with bench(stack, place) as work:
            database = await work.databases.database()
            await database.ledger.execute("BEGIN; INSERT INTO items (name) VALUES ('a'); PREPARE TRANSACTION 'left'")
    async with bench(stack, place) as work:
        database = await work.databases.database()

        assert await database.ledger.prepared() == []
        assert await database.ledger.names() == []


async def test_task_that_goes_on_is_found(stack, place, quick):
    """A task that was started and goes on is an error."""
    with pytest.raises(AssertionError, match="tasks are left over: .*straggler"):
        async with bench(stack, place):
            straggler = asyncio.create_task(asyncio.sleep(3600), name="straggler")
    straggler.cancel()


async def test_context_that_stays_open_is_found(stack, place, quick):
    """A context variable that is still set is an error."""
    with pytest.raises(AssertionError, match="context variable"):
        async with bench(stack, place):
            token = init_db_session_ctx()
    await reset_db_session_ctx(token)


@pytest.mark.postgresql
async def test_observer_sees_backends_and_locks(stack, place):
    """The observer knows backends by their connect, sees who waits for a lock, and can cut them."""
    async with bench(stack, place) as work:
        ledger = (await work.databases.database()).ledger
        db = await work.connect("seen")
        session = await db.create_session()
        await session.execute(text("SELECT 1"))
        idle = await ledger.idle_in_transaction()
        async with ledger.lock("items"):
            waiter = asyncio.create_task(session.execute(text("INSERT INTO items (name) VALUES ('a')")))
            waiting = await ledger.waiting("seen")
            await ledger.terminate(waiting[0].pid)
        outcome = await asyncio.gather(waiter, return_exceptions=True)
        await session.invalidate()

        assert [backend.application_name for backend in idle] == ["seen"]
        assert isinstance(outcome[0], Exception)
        assert await ledger.backends("seen") == []
