"""A COMMIT that is awaited in the task of its request: who is cancelled when, and what goes on elsewhere (P7)."""

import asyncio
import contextlib

import anyio
import pytest
from context_sqla import (
    ContextClosedError,
    DBConnect,
    SessionBusyError,
    close_all_sessions,
    close_db_session,
    committed_connects,
    db_context,
    db_session,
    is_in_doubt,
    on_commit,
    pop_db_session_from_context,
    rollback_all_sessions,
    rollback_db_session,
)
from context_sqla._handover import BEGIN, Left, drive, go_on
from context_sqla._limits import Limits
from sqlalchemy import event, text
from sqlalchemy.util import await_only
from support.deadline import until


@pytest.fixture(name="db")
async def _db(tmp_path):
    db = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}", name="db", cleanup_timeout=2)
    async with db_context():
        await (await db_session(db)).execute(text("CREATE TABLE items (name TEXT)"))
    yield db
    await db.close()


async def insert(db, name):
    session = await db_session(db)
    await session.execute(text("INSERT INTO items VALUES (:name)"), {"name": name})
    return session


async def names(db):
    async with db_context():
        return list((await (await db_session(db)).execute(text("SELECT name FROM items"))).scalars())


class Work:
    """A coroutine that waits for two futures, and notes in which task."""

    def __init__(self):
        loop = asyncio.get_running_loop()
        self.futures = [loop.create_future(), loop.create_future()]
        self.protected = True
        self.seen = []

    async def run(self):
        for future in self.futures:
            self.seen.append(asyncio.current_task())
            self.seen.append(await future)
        return "done"

    async def ask(self):
        left = await drive(self.run(), BEGIN, lambda: self.protected)
        if isinstance(left, Left):
            await go_on(left, first=lambda: self.seen.append("moved"), patience=10)
        return left


async def test_what_nobody_cancels_stays_in_its_task():
    """No task is made, and the result comes back."""
    work = Work()
    task = asyncio.create_task(work.ask())
    await asyncio.sleep(0)
    before = asyncio.all_tasks()
    work.futures[0].set_result(1)
    await asyncio.sleep(0)
    work.futures[1].set_result(2)

    assert await task == "done"
    assert asyncio.all_tasks() <= before
    assert work.seen == [task, 1, task, 2]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("when", ["waiting", "woken"])
async def test_protected_work_goes_on_elsewhere(when, times):
    """Cancelled while it waits, or at the very moment when its answer has come: the work ends, then the task is cancelled."""
    work = Work()
    task = asyncio.create_task(work.ask())
    await asyncio.sleep(0)
    if when == "woken":
        work.futures[0].set_result(1)
    for _ in range(times):
        task.cancel("enough")
    for _ in range(5):
        await asyncio.sleep(0)
        task.cancel()
    assert not task.done()
    if when == "waiting":
        work.futures[0].set_result(1)
    work.futures[1].set_result(2)
    with pytest.raises(asyncio.CancelledError):
        await task

    own, moved, first, other, second = work.seen
    assert (own, moved, first, second) == (task, "moved", 1, 2)
    assert other is not task


async def test_work_that_is_not_protected_is_cancelled():
    """The cancellation reaches what the work waits for."""
    work = Work()
    work.protected = False
    task = asyncio.create_task(work.ask())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert work.futures[0].cancelled()
    assert work.seen == [task]


async def test_error_of_protected_work_is_a_note_of_the_cancellation(caplog):
    """It is logged too: the caller learns of the cancellation (P4)."""
    work = Work()
    task = asyncio.create_task(work.ask())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    work.futures[0].set_exception(ZeroDivisionError("broken"))
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert caught.value.__notes__ == ["while it was cancelled: ZeroDivisionError: broken"]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "overtaken by a cancellation" in caplog.text


async def test_scope_of_anyio_does_not_spin_while_protected_work_goes_on():
    """A scope of anyio cancels again at every turn of the loop; it is held off, as it is by anyio's own shield."""
    work = Work()
    cancels = []

    async def in_scope():
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await work.ask()

    task = asyncio.create_task(in_scope())
    original = task.cancelling
    await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
        cancels.append(original())
    work.futures[0].set_result(1)
    work.futures[1].set_result(2)
    await task

    assert len(set(cancels[5:])) == 1


@pytest.mark.parametrize("name", ["before_commit", "after_commit"])
async def test_timeout_of_a_listener_is_its_own(db, name):
    """A listener of SQLAlchemy's may give itself a limit: it is not taken for a cancellation of the request."""
    seen = []

    async def look():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        seen.append("limit")

    async with db_context():
        session = await insert(db, "a")
        event.listen(session.sync_session, name, lambda _: await_only(look()))

    assert seen == ["limit"]
    assert await names(db) == ["a"]


async def test_listener_that_is_cancelled_after_the_commit_undoes_nothing(db):
    """The answer to COMMIT is there: callbacks run, the cancellation says what is committed, and nothing is in doubt (P7, P14)."""
    telling = asyncio.Event()
    ran = []

    async def tell():
        telling.set()
        await asyncio.Event().wait()

    async def request():
        async with db_context():
            session = await insert(db, "a")
            event.listen(session.sync_session, "after_commit", lambda _: await_only(tell()))
            on_commit(lambda: ran.append("unit"))
            on_commit(lambda: ran.append("session"), connect=db)

    task = asyncio.create_task(request())
    await asyncio.wait_for(telling.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert sorted(ran) == ["session", "unit"]
    assert committed_connects(caught.value) == ("db",)
    assert not is_in_doubt(caught.value)
    assert await names(db) == ["a"]
    assert db.pool_status().checked_out == 0


async def test_listener_that_fails_after_the_commit_leaves_no_doubt(db):
    """Its error is raised, and tells what is committed all the same."""

    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        async with db_context():
            session = await insert(db, "a")
            event.listen(session.sync_session, "after_commit", fail)

    assert committed_connects(caught.value) == ("db",)
    assert not is_in_doubt(caught.value)
    assert await names(db) == ["a"]
    assert db.pool_status().checked_out == 0


async def test_connection_that_is_on_its_way_to_the_pool_stays_alive(db):
    """A cancellation then waits, as during the COMMIT: a pool resets what comes back, and loses what is cancelled there (P7)."""
    resetting, go_on = asyncio.Event(), asyncio.Event()
    closed = []

    async def request():
        async with db_context():
            await insert(db, "a")
            engine = (await db_session(db)).sync_session.get_bind()
            event.listen(engine, "close", lambda *_: closed.append(1))
            event.listen(engine, "reset", lambda *_: (resetting.set(), await_only(go_on.wait())))

    task = asyncio.create_task(request())
    await asyncio.wait_for(resetting.wait(), 10)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert committed_connects(caught.value) == ("db",)
    assert await names(db) == ["a"]
    assert closed == []


@pytest.mark.parametrize("name", ["before_commit", "after_commit"])
async def test_listener_of_the_last_commit_opens_no_other_session(db, tmp_path, name):
    """Nobody would commit it: it is told, and what it writes is not lost in silence (P10)."""
    other = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}", name="other")
    with pytest.raises(ContextClosedError, match="other"):
        async with db_context():
            session = await insert(db, "a")
            event.listen(session.sync_session, name, lambda _: await_only(db_session(other)))

    assert await names(db) == (["a"] if name == "after_commit" else [])
    await other.close()


async def pop(connect):
    return pop_db_session_from_context(connect)


async def roll_all_back(connect):
    await rollback_all_sessions()


async def close_all(connect):
    await close_all_sessions()


@pytest.mark.parametrize("end", [rollback_db_session, close_db_session, pop, roll_all_back, close_all])
async def test_nobody_ends_a_session_under_its_commit(db, end):
    """A task that was left behind is told; the commit goes on, and its connection comes back (P7a)."""
    telling, go_on = asyncio.Event(), asyncio.Event()
    told = []

    async def left_behind():
        await telling.wait()
        try:
            await end(db)
        except SessionBusyError as exc:
            told.append(str(exc))
        finally:
            go_on.set()

    async with db_context():
        session = await insert(db, "a")
        task = asyncio.create_task(left_behind())
        event.listen(session.sync_session, "before_commit", lambda _: (telling.set(), await_only(go_on.wait())))
        on_commit(lambda: told.append("committed"), connect=db)
    await task

    assert ["its unit is committing" in each for each in told] == [True, False]
    assert told[1:] == ["committed"]
    assert await names(db) == ["a"]
    assert db.pool_status().checked_out == 0


async def test_limits_share_one_timer():
    """The next one may come earlier than the one that the timer waits for; those that were taken back never come."""
    loop = asyncio.get_running_loop()
    limits = Limits(loop)
    over = []
    limits.set("late", 60, lambda: over.append("late"))
    limits.set("soon", 0.02, lambda: over.append("soon"))
    limits.set("taken back", 0.01, lambda: over.append("taken back"))
    limits.set("anew", 0.01, lambda: over.append("first"))
    limits.set("anew", 0.03, lambda: over.append("second"))
    limits.take_back("taken back")
    limits.take_back("never set")
    await until(lambda: len(over) == 2)

    assert over == ["soon", "second"]
    assert list(limits._all) == ["late"]
