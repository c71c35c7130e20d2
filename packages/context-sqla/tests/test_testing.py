"""Support for users' own tests: one transaction for a test and all that it calls, rolled back at the end."""

import asyncio
import contextlib
import sqlite3
from contextvars import Context, copy_context

import pytest
from context_sqla import (
    ContextNotInitiatedError,
    ForeignLoopError,
    SessionBusyError,
    UnsupportedOptionError,
    atomic_db_session,
    commit_db_session,
    db_context,
    db_session,
    is_context_initiated,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    rollback_db_session,
    run_in_new_ctx,
    unit_of_work,
)
from context_sqla.adapters import Policy, Unit
from context_sqla.testing import (
    capture_on_commit,
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
    unit_label,
)
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from support.databases import Databases, no_tasks_left
from support.rows import add, insert
from support.tables import Item


class Boom(Exception):
    """An error of the application."""


@pytest.fixture(name="databases")
async def _databases(tmp_path):
    """Databases in files; at the end everything is given back, closed and over."""
    async with no_tasks_left() as problems:
        databases = Databases("aiosqlite", tmp_path)
        yield databases
        await databases.whole(problems)
        await databases.gone(problems)
    assert problems == []


@pytest.fixture(name="db")
async def _db(databases):
    return databases.connect(await databases.database("first"), "db")


@pytest.fixture(name="other")
async def _other(databases):
    return databases.connect(await databases.database("second"), "other")


@pytest.fixture(name="ledger")
async def _ledger(databases):
    return (await databases.database("first")).ledger


@pytest.fixture(name="other_ledger")
async def _other_ledger(databases):
    return (await databases.database("second")).ledger


@contextlib.asynccontextmanager
async def shared(*connects):
    """Let everything work in one transaction per connect; gives the tests' own sessions."""
    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(rollback_session(connect)) for connect in connects]
        await stack.enter_async_context(set_test_context())
        for connect, session in zip(connects, sessions, strict=True):
            await stack.enter_async_context(put_savepoint_session_in_ctx(connect, session))
        yield sessions[0] if len(sessions) == 1 else sessions


async def names(connect) -> list[str]:
    """What the current unit sees."""
    return list(await (await db_session(connect)).scalars(select(Item.name).order_by(Item.name)))


async def seen_by(session) -> list[str]:
    """What a session sees."""
    return list(await session.scalars(select(Item.name).order_by(Item.name)))


def on_disk(database) -> list[str]:
    """What is in the file when nobody has it open."""
    with contextlib.closing(sqlite3.connect(database.place)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM items ORDER BY name")]


# rollback_session


async def test_rollback_session_is_always_rolled_back(db, ledger):
    """What the session wrote is gone at the end, committed or not (SEED)."""
    async with rollback_session(db) as session:
        session.add(Item(name="a"))
        await session.commit()
        session.add(Item(name="b"))
        await session.flush()
        assert await seen_by(session) == ["a", "b"]
        assert await ledger.names() == []

    assert await ledger.names() == []


async def test_rollback_session_commits_savepoints(db):
    """A rollback after a commit takes back what came after the commit, no more (SEED)."""
    async with rollback_session(db) as session:
        session.add(Item(name="a"))
        await session.commit()
        session.add(Item(name="b"))
        await session.flush()
        await session.rollback()
        assert await seen_by(session) == ["a"]


async def test_rollback_session_is_rolled_back_on_an_error(db, databases, ledger):
    """An error propagates, and the connection is back (SEED)."""
    with pytest.raises(Boom):
        async with rollback_session(db) as session:
            session.add(Item(name="a"))
            await session.commit()
            raise Boom

    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_rollback_session_leaves_nothing_in_the_file(db, databases):
    """SQLite's driver sends no BEGIN by itself; the file is empty after the rollback all the same (P12)."""
    database = await databases.database("first")
    async with rollback_session(db) as session:
        for name in "abc":
            session.add(Item(name=name))
            await session.commit()
        session.add(Item(name="d"))
        await session.flush()
        await session.rollback()
    await db.close()

    assert on_disk(database) == []


async def test_rollback_session_is_no_context(db):
    """It opens no unit (SEED)."""
    async with rollback_session(db) as session:
        assert isinstance(session, AsyncSession)
        assert not is_context_initiated()


async def test_rollback_session_asks_the_handler(databases):
    """The handler is asked as it is before every session (SEED)."""
    asked = []

    async def handler(connect):
        asked.append(connect)

    db = databases.connect(await databases.database("first"), "db", handler=handler)
    async with rollback_session(db):
        pass

    assert asked == [db]


async def test_rollback_session_is_of_the_users_class(databases):
    """It comes from the connect's own session maker (SEED)."""

    class OwnSession(AsyncSession):
        pass

    db = databases.connect(await databases.database("first"), "db", session_class=OwnSession)
    async with rollback_session(db) as session, set_test_context(), put_savepoint_session_in_ctx(db, session) as mine:
        kinds = {type(session), type(mine), await run_in_new_ctx(_kind, db)}

    assert kinds == {OwnSession}


async def _kind(connect):
    return type(await db_session(connect))


# set_test_context


async def test_test_context_is_a_unit():
    """Inside it a context is open, after it none (SEED)."""
    seen = []
    async with set_test_context():
        seen.append(is_context_initiated())
    seen.append(is_context_initiated())

    assert seen == [True, False]


async def test_test_context_commits_nothing_by_itself(db, databases, ledger):
    """Without ``auto_close`` its sessions are rolled back at the end (SEED)."""
    async with set_test_context():
        await insert(db, "a")

    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_auto_close_commits(db, databases, ledger):
    """With ``auto_close`` it commits at its end and closes: for calling a function without a server (SEED)."""
    async with set_test_context(auto_close=True):
        await add(db, "a")

    assert databases.checked_out() == 0
    assert await ledger.names() == ["a"]


async def test_auto_close_rolls_back_on_an_error(db, databases, ledger):
    """With ``auto_close`` an error rolls back and propagates (SEED)."""
    with pytest.raises(Boom):
        async with set_test_context(auto_close=True):
            await insert(db, "a")
            raise Boom

    assert databases.checked_out() == 0
    assert await ledger.names() == []
    assert not is_context_initiated()


async def test_auto_close_inside_the_shared_transaction(db, ledger):
    """With ``auto_close`` around savepoints the commit releases a savepoint: nothing is in the database (SEED, P12)."""
    async with rollback_session(db) as session:
        async with set_test_context(auto_close=True), put_savepoint_session_in_ctx(db, session):
            await insert(db, "a")
            await commit_db_session(db)
        seen = await seen_by(session)

    assert seen == ["a"]
    assert await ledger.names() == []


async def test_function_inside_a_test_context_borrows_its_session(db, ledger):
    """A connect without savepoints: what the application calls gets the session of the test's container (P12)."""
    async with set_test_context():
        mine = await db_session(db)
        theirs = await run_in_new_ctx(db_session, db)

    assert theirs is mine


async def test_borrowed_session_is_flushed_and_not_committed(db, databases, ledger):
    """Other sessions of the test's container are flushed, never committed or closed (P12)."""
    async with set_test_context():
        async with db_context():
            await add(db, "a")
        mine = await db_session(db)
        assert not mine.new
        assert mine.in_transaction()
        assert await seen_by(mine) == ["a"]
        assert databases.checked_out() == 1
        assert await ledger.names() == []

    assert await ledger.names() == []


@pytest.mark.parametrize("finish", ["commit_db_session", "atomic"])
async def test_borrowed_session_is_not_committed_by_hand_either(db, ledger, finish):
    """A commit by hand of the application is a flush of the session that it borrowed (P12)."""
    async with set_test_context():
        async with db_context():
            if finish == "atomic":
                async with atomic_db_session(db):
                    await add(db, "a")
            else:
                await add(db, "a")
                await commit_db_session(db)
            assert not (await db_session(db)).new
        assert await ledger.names() == []


async def test_borrowed_session_commits_with_auto_close(db, ledger):
    """The test's container decides at its own end (P12)."""
    async with set_test_context(auto_close=True):
        await run_in_new_ctx(add, db, "a")

    assert await ledger.names() == ["a"]


async def test_after_the_test_context_units_are_real_again(db, ledger):
    """Nothing is joined once the context has ended, also after an error in it (P12)."""
    with pytest.raises(Boom):
        async with set_test_context():
            raise Boom
    await run_in_new_ctx(insert, db, "a")

    assert await ledger.names() == ["a"]


async def test_without_a_test_context_nothing_is_joined(db, ledger):
    """Being inside some context is no reason to join it (P12)."""
    with pytest.raises(Boom):
        async with db_context():
            session = await db_session(db)
            unit = Unit.enter()
            assert not unit.joined
            assert await db_session(db) is not session
            await insert(db, "a")
            await unit.head(200)
            await unit.end_of_body()
            await unit.close()
            raise Boom

    assert await ledger.names() == ["a"]


# put_savepoint_session_in_ctx


async def test_savepoint_session_needs_a_marked_context(db):
    """A ``db_context()`` is no context of a test (P12)."""
    async with rollback_session(db) as session:
        async with db_context():
            with pytest.raises(ContextNotInitiatedError, match="set_test_context"):
                async with put_savepoint_session_in_ctx(db, session):
                    pass


async def test_savepoint_session_is_the_contexts(db):
    """It is what ``db_session`` returns in the test, and no longer after the block (SEED)."""
    async with rollback_session(db) as session, set_test_context():
        async with put_savepoint_session_in_ctx(db, session) as mine:
            assert await db_session(db) is mine
        assert await db_session(db) is not mine


async def test_savepoint_session_shares_the_connection(db, databases):
    """The given session, the test's and the application's have one connection (SEED)."""
    async with shared(db) as session:
        await insert(db, "a")
        await run_in_new_ctx(insert, db, "b")
        await seen_by(session)
        assert databases.checked_out() == 1


async def test_commits_are_savepoints(db, ledger):
    """The test's own commits and rollbacks are those of savepoints (SEED)."""
    async with shared(db) as session:
        await insert(db, "a")
        await commit_db_session(db)
        await insert(db, "b")
        await rollback_db_session(db)
        assert await seen_by(session) == ["a"]
        assert await ledger.names() == []

    assert await ledger.names() == []


async def test_application_and_test_see_each_others_rows(db, ledger):
    """What the test wrote the application sees, and the other way round (SEED)."""

    async def work():
        seen = await names(db)
        await insert(db, "application")
        return seen

    async with shared(db) as session:
        session.add(Item(name="outer"))
        await session.flush()
        await add(db, "test")
        assert await run_in_new_ctx(work) == ["outer", "test"]
        assert await names(db) == await seen_by(session) == ["application", "outer", "test"]

    assert await ledger.names() == []


async def test_error_takes_back_what_its_unit_wrote(db):
    """A unit that fails returns to its savepoint: its rows are gone, everybody else's stay (P12)."""

    async def fail():
        await insert(db, "fails")
        raise Boom

    async with shared(db):
        await insert(db, "test")
        await run_in_new_ctx(insert, db, "works")
        with pytest.raises(Boom):
            await run_in_new_ctx(fail)
        assert await names(db) == ["test", "works"]


async def test_statement_that_fails_leaves_the_shared_transaction_usable(db):
    """A unit that ends with a database error is rolled back to its savepoint, and the test goes on (P12)."""
    async with shared(db):
        await insert(db, "a")
        with pytest.raises(IntegrityError):
            await run_in_new_ctx(insert, db, "a")
        await run_in_new_ctx(insert, db, "b")
        assert await names(db) == ["a", "b"]


async def test_units_may_stand_one_in_the_other(db):
    """A unit inside a unit has a savepoint inside the other's; the outer one's rollback takes both (P12)."""
    async with shared(db):
        with pytest.raises(Boom):
            async with db_context():
                await insert(db, "outer")
                async with db_context():
                    await insert(db, "inner")
                assert await names(db) == ["inner", "outer"]
                raise Boom
        assert await names(db) == []


async def test_inner_unit_sees_what_the_outer_one_has_pending(db):
    """What was added and not flushed outside is sent before the savepoint inside, and survives its rollback (P12)."""

    async def fail():
        seen.extend(await names(db))
        raise Boom

    seen = []
    async with shared(db):
        async with db_context():
            await add(db, "outer")
            with pytest.raises(Boom):
                await run_in_new_ctx(fail)
        assert await names(db) == ["outer"]

    assert seen == ["outer"]


async def test_ten_units_side_by_side(db):
    """Ten units under ``gather`` of which some fail: each is all or nothing, none takes a neighbour's rows with it (P12)."""

    async def work(number):
        await insert(db, f"{number} a")
        await asyncio.sleep(0)
        await insert(db, f"{number} b")
        if number % 3 == 0:
            raise Boom(number)

    async with shared(db):
        await insert(db, "test")
        results = await asyncio.gather(*(run_in_new_ctx(work, number) for number in range(10)), return_exceptions=True)
        assert [result.args[0] for result in results if result is not None] == [0, 3, 6, 9]
        assert await names(db) == sorted(["test", *(f"{number} {half}" for number in (1, 2, 4, 5, 7, 8) for half in "ab")])


async def test_ten_units_side_by_side_inside_a_unit(db):
    """The same below a request that has written itself: it goes on when they have ended (P12)."""

    async def work(number):
        await insert(db, str(number))
        if number % 2:
            raise Boom

    async with shared(db):
        async with db_context():
            await insert(db, "request")
            await asyncio.gather(*(run_in_new_ctx(work, number) for number in range(10)), return_exceptions=True)
            await insert(db, "request goes on")
        assert await names(db) == ["0", "2", "4", "6", "8", "request", "request goes on"]


async def test_cancelled_unit_takes_back_what_it_wrote(db):
    """A cancellation returns to the savepoint, and the next unit gets the connection (P7, P12)."""
    reached = asyncio.Event()

    async def work():
        await insert(db, "cancelled")
        reached.set()
        await asyncio.Event().wait()

    async with shared(db):
        task = asyncio.create_task(run_in_new_ctx(work))
        await asyncio.wait_for(reached.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await run_in_new_ctx(insert, db, "next")
        assert await names(db) == ["next"]


async def test_unit_that_waits_for_its_turn_can_be_cancelled(db):
    """A unit that never had the connection leaves nothing that others would wait for (P12)."""
    reached = asyncio.Event()
    go_on = asyncio.Event()

    async def hold():
        await insert(db, "holds")
        reached.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async with shared(db):
        holder = asyncio.create_task(run_in_new_ctx(hold))
        await asyncio.wait_for(reached.wait(), 10)
        waiter = asyncio.create_task(run_in_new_ctx(insert, db, "waits"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        go_on.set()
        await holder
        await run_in_new_ctx(insert, db, "next")
        assert await names(db) == ["holds", "next"]


class Child:
    """A unit that has the test's connection until it is told to go on."""

    def __init__(self, db):
        self.db = db
        self.go_on = asyncio.Event()
        self.reached = asyncio.Event()

    async def start(self):
        self.task = asyncio.create_task(run_in_new_ctx(self._work))
        await asyncio.wait_for(self.reached.wait(), 10)

    async def end(self):
        self.go_on.set()
        await asyncio.wait((self.task,))
        return self.task.exception()

    async def _work(self):
        await insert(self.db, "child")
        self.reached.set()
        await asyncio.wait_for(self.go_on.wait(), 10)


async def test_parent_cannot_use_the_connection_of_its_child(db):
    """A statement of the outer unit while the inner one has the connection would go into its savepoint: refused (P12)."""
    child = Child(db)
    async with shared(db):
        async with db_context():
            await insert(db, "before")
            session = await db_session(db)
            await child.start()
            with pytest.raises(SessionBusyError, match=r"'db'.*needs real commits"):
                await session.execute(text("SELECT 1"))
            error = await child.end()
            await insert(db, "after")
        assert error is None
        assert await names(db) == ["after", "before", "child"]


async def test_test_cannot_use_the_connection_of_a_unit(db):
    """The same for the test's session while a unit of the application is open (P12)."""
    child = Child(db)
    async with shared(db):
        await insert(db, "before")
        await child.start()
        with pytest.raises(SessionBusyError, match=r"'db'.*needs real commits"):
            await names(db)
        error = await child.end()
        assert error is None
        assert await names(db) == ["before", "child"]


async def _end(db, how):
    if how == "commit":
        await commit_db_session(db)
    elif how == "rollback":
        await rollback_db_session(db)
    elif how == "error":
        raise Boom


@pytest.mark.parametrize("how", ["commit", "rollback", "error", "end"])
async def test_parent_waits_for_its_child(db, how):
    """A unit that was started and not awaited ends by itself: its parent's savepoint ends after it, and both rows are there (P12)."""
    child = Child(db)
    async with shared(db):
        with contextlib.suppress(Boom):
            async with db_context():
                await insert(db, "parent")
                await child.start()
                asyncio.get_running_loop().call_soon(child.go_on.set)
                await _end(db, how)
        error = await child.end()
        assert error is None
        assert await names(db) == (["child", "parent"] if how in ("commit", "end") else [])


@pytest.mark.parametrize("how", ["commit", "rollback", "error", "end"])
async def test_parent_whose_child_does_not_end(databases, how):
    """Savepoints are a stack: past ``drain_timeout`` one of the two is refused, and nobody's rows are lost in silence (P12)."""
    db = databases.connect(await databases.database("first"), "db", drain_timeout=0.05)
    child = Child(db)
    async with shared(db):
        with contextlib.suppress(Boom, SessionBusyError):
            async with db_context():
                await insert(db, "parent")
                await child.start()
                await _end(db, how)
        error = await child.end()
        assert error is None or isinstance(error, SessionBusyError)
        assert ("child" in await names(db)) == (error is None)
        await run_in_new_ctx(insert, db, "next")
        assert "next" in await names(db)


@pytest.mark.parametrize("ends", [True, False])
async def test_end_of_the_test_waits_for_units(databases, ends):
    """The shared transaction ends after the units in it, also where the test itself has not used it; late ones are refused (P12)."""
    db = databases.connect(await databases.database("first"), "db", drain_timeout=10 if ends else 0.05)
    child = Child(db)
    async with shared(db):
        await child.start()
        if ends:
            asyncio.get_running_loop().call_soon(child.go_on.set)
    error = await child.end()

    assert (error is None) if ends else isinstance(error, SessionBusyError)


async def test_unit_whose_turn_never_comes(databases):
    """Units that wait for each other end with an error that names real commits, after ``drain_timeout`` (P12)."""
    db = databases.connect(await databases.database("first"), "db", drain_timeout=0.05)

    async def outer():
        await insert(db, "outer")
        await asyncio.create_task(run_in_new_ctx(insert, db, "inner"), context=beside)

    async with shared(db):
        beside = copy_context()
        with pytest.raises(SessionBusyError, match=r"'db'.*real commits"):
            await run_in_new_ctx(outer)
        assert await names(db) == []


async def test_sessions_outside_of_units_share_too(db, ledger):
    """``new_non_ctx_session`` sees the test's rows, and what it commits is gone with them (P12)."""
    async with shared(db) as session:
        await insert(db, "test")
        async with db_context():
            await insert(db, "unit")
            async with new_non_ctx_session(db) as own:
                assert await seen_by(own) == ["test", "unit"]
                own.add(Item(name="kept"))
                await own.commit()
                own.add(Item(name="dropped"))
                await own.flush()
            async with new_non_ctx_atomic_session(db) as own:
                own.add(Item(name="atomic"))
            await insert(db, "goes on")
        assert await seen_by(session) == ["atomic", "goes on", "kept", "test", "unit"]

    assert await ledger.names() == []


async def test_session_outside_of_units_has_the_connection(db):
    """While it is open, a statement of the unit around it is refused, as below a unit of its own (P12)."""
    async with shared(db):
        async with db_context():
            session = await db_session(db)
            async with new_non_ctx_session(db):
                with pytest.raises(SessionBusyError, match=r"'db'.*needs real commits"):
                    await session.execute(text("SELECT 1"))
            await session.execute(text("SELECT 1"))


async def test_atomic_session_outside_of_units_rolls_back(db):
    """An error takes back what it wrote, and no more (P12)."""
    async with shared(db):
        await insert(db, "test")
        with pytest.raises(Boom):
            async with new_non_ctx_atomic_session(db) as own:
                own.add(Item(name="dropped"))
                await own.flush()
                raise Boom
        assert await names(db) == ["test"]


async def test_session_outside_of_units_of_a_connect_that_does_not_share(db, other, other_ledger):
    """A connect without savepoints is as it is outside of tests (P12)."""
    async with shared(db):
        async with new_non_ctx_atomic_session(other) as own:
            own.add(Item(name="a"))

    assert await other_ledger.names() == ["a"]


async def test_hook_can_refuse_in_the_shared_transaction(db):
    """``before_commit`` is asked before the savepoint is released, and refuses it (P12, P14)."""
    asked = []

    async def refuse(session):
        asked.append(session)
        raise Boom

    async with shared(db):
        with pytest.raises(Boom):
            async with db_context(before_commit=refuse):
                await insert(db, "a")
        assert await names(db) == []

    assert len(asked) == 1


async def test_hooks_of_the_connect_run_in_the_shared_transaction(db):
    """The connect's own ``before_commit`` and ``committed`` run when the application believes it has committed (P12, P14)."""
    log = []

    async def before(session):
        log.append("before")

    async def committed(session, host):
        log.append(f"committed on {host}")

    db.before_commit.append(before)
    db.committed.append(committed)
    async with shared(db):
        await run_in_new_ctx(insert, db, "a")
        assert log == ["before", f"committed on {db.host}"]


@pytest.mark.parametrize("with_connect", [False, True])
async def test_callbacks_run_when_the_application_has_committed(db, with_connect):
    """``on_commit`` runs at the release of the savepoint, and a rollback to it drops it (P12, P14)."""
    ran = []

    async def work(name, error=None):
        await insert(db, name)
        on_commit(lambda: ran.append(name), connect=db if with_connect else None)
        if error is not None:
            raise error

    async with shared(db):
        await run_in_new_ctx(work, "a")
        with pytest.raises(Boom):
            await run_in_new_ctx(work, "b", Boom())
        assert ran == ["a"]

    assert ran == ["a"]


async def test_callback_may_use_the_shared_transaction(db):
    """A ``db_session`` in a callback is a unit of its own, inside the test's transaction like any other (P12, P14)."""

    async def work():
        await insert(db, "a")
        on_commit(lambda: insert(db, "callback"))

    async with shared(db):
        await run_in_new_ctx(work)
        assert await names(db) == ["a", "callback"]


async def test_callback_of_a_commit_by_hand_may_use_the_shared_transaction(db):
    """With ``connect=`` it runs after a commit in the middle of its unit, which still has the connection (P12, P14)."""

    async def work():
        await insert(db, "a")
        on_commit(lambda: insert(db, "callback"), connect=db)
        await commit_db_session(db)
        await insert(db, "b")

    async with shared(db):
        await asyncio.wait_for(run_in_new_ctx(work), 10)
        assert await names(db) == ["a", "b", "callback"]


# capture_on_commit, unit_label


@pytest.mark.parametrize("way", ["shared", "real"])
@pytest.mark.parametrize("execute", [False, True])
async def test_captured_callbacks_run_only_when_told_so(db, way, execute):
    """Those that come due are collected; what a rollback drops never is (P14)."""
    ran = []

    async def work(name, error=None):
        await insert(db, name)
        on_commit(lambda: ran.append(name))
        on_commit(lambda: ran.append(name), connect=db)
        if error is not None:
            raise error

    async with shared(db) if way == "shared" else contextlib.nullcontext():
        with capture_on_commit(execute=execute) as outer:
            with capture_on_commit(execute=True) as inner:
                await run_in_new_ctx(work, "a")
                with pytest.raises(Boom):
                    await run_in_new_ctx(work, "b", Boom())
            await run_in_new_ctx(work, "c")
        await run_in_new_ctx(work, "d")

    assert ran == (["a", "a", "c", "c", "d", "d"] if execute else ["d", "d"])
    assert (len(inner), len(outer)) == (2, 4)
    assert all(map(callable, outer))


async def test_label_of_the_unit_that_is_open():
    """Reports name the application's unit; outside, and in the test's own, there is none (P12)."""
    labels = [unit_label()]
    async with set_test_context():
        labels.append(unit_label())
        async with db_context():
            labels.append(unit_label())
        unit = Unit.enter(Policy(label=lambda request: f"POST {request}"), "/users")
        labels.append(unit_label())
        await unit.close()

    assert labels == [None, None, "a unit of work", "POST /users"]


# Transactions by hand


async def test_body_that_goes_on_is_rolled_back_in_the_shared_transaction(db):
    """What a body writes when its client has left takes its savepoint back, but for what it commits; work after it stays (P5)."""
    async with shared(db) as session:
        unit = Unit.enter()
        await insert(db, "handler")
        await unit.head(200)

        async def body():
            unit.in_body()
            await insert(db, "body")
            unit.disconnected()
            await insert(db, "late")
            await commit_db_session(db)
            await insert(db, "lost")

        await asyncio.create_task(body())
        await insert(db, "work")
        await unit.close()

        assert await seen_by(session) == ["handler", "late", "work"]


async def test_body_whose_session_is_being_opened_goes_on_in_the_shared_transaction(db):
    """A body that waits for its first session as its client leaves has the place there, and gives it back for work (P5, P6)."""
    async with shared(db) as session:
        unit = Unit.enter()
        await unit.head(200)

        async def body():
            unit.in_body()
            await insert(db, "late")

        task = asyncio.create_task(body())
        await asyncio.sleep(0)  # it waits for its session
        unit.disconnected()
        await asyncio.wait_for(task, 10)  # and not for its own place, until drain_timeout
        await insert(db, "work")
        await unit.close()

        assert await seen_by(session) == ["work"]


@pytest.mark.parametrize("handler", [True, False])
async def test_body_that_runs_ahead_waits_in_the_shared_transaction(db, handler):
    """A body that begins before its head gets its session there once the head is decided, in the place of its unit (P5)."""
    own = asyncio.current_task()
    began = asyncio.Event()

    async def body():
        began.set()
        await insert(db, "first")
        await insert(db, "second")

    async with shared(db) as session:
        unit = Unit.enter(runs_ahead=lambda unit: asyncio.current_task() is not own)
        if handler:
            await insert(db, "handler")
        task = asyncio.create_task(body())
        await began.wait()
        await unit.head(200)
        await asyncio.wait_for(task, 10)  # it waits for the head, and not until drain_timeout
        await unit.end_of_body()
        await unit.close()

        assert await seen_by(session) == ["first", *["handler"] * handler, "second"]


async def test_atomic_block_in_the_shared_transaction(db):
    """``atomic_db_session`` commits and rolls back savepoints (P12, P17)."""

    async def work():
        await insert(db, "before")
        async with atomic_db_session(db):
            await insert(db, "kept")
        with pytest.raises(Boom):
            async with atomic_db_session(db):
                await insert(db, "dropped")
                raise Boom

    async with shared(db):
        await run_in_new_ctx(work)
        assert await names(db) == ["before", "kept"]


async def test_commit_and_rollback_by_hand_in_the_shared_transaction(db):
    """Commits by hand stay when the unit fails later; a rollback takes back what came after the last commit (P12, P17)."""

    async def work():
        await insert(db, "a")
        await commit_db_session(db)
        await insert(db, "b")
        await rollback_db_session(db)
        await insert(db, "c")
        raise Boom

    async with shared(db):
        with pytest.raises(Boom):
            await run_in_new_ctx(work)
        assert await names(db) == ["a"]


async def test_options_are_refused_in_the_shared_transaction(db):
    """Isolation level and read-only cannot be had in a transaction of the test: an error, never ignored (P17)."""

    async def atomic():
        async with atomic_db_session(db, isolation_level="SERIALIZABLE"):
            pass

    async def ask():
        await db_session(db)

    async with shared(db):
        for work in (
            lambda: run_in_new_ctx(atomic),
            lambda: unit_of_work(isolation_level="SERIALIZABLE")(ask)(),
            lambda: unit_of_work(read_only=True)(ask)(),
        ):
            with pytest.raises(UnsupportedOptionError, match="'db'"):
                await work()
        await run_in_new_ctx(insert, db, "a")
        assert await names(db) == ["a"]


async def test_several_connects_share(db, other, ledger, other_ledger):
    """Each connect has its own shared transaction; a unit commits or rolls back in both (P9, P12)."""

    async def work(name, error=None):
        await insert(db, name)
        await insert(other, name)
        if error is not None:
            raise error

    async with shared(db, other):
        await run_in_new_ctx(work, "a")
        with pytest.raises(Boom):
            await run_in_new_ctx(work, "b", Boom())
        assert (await names(db), await names(other)) == (["a"], ["a"])

    assert (await ledger.names(), await other_ledger.names()) == ([], [])


async def test_connect_beside_the_shared_one_is_borrowed(db, other, other_ledger):
    """One connect shares, the other has no savepoints: its session is the test's and is not committed (P12)."""

    async def work():
        await insert(db, "a")
        await add(other, "b")

    async with shared(db):
        await run_in_new_ctx(work)
        assert await names(other) == ["b"]
        assert await other_ledger.names() == []

    assert await other_ledger.names() == []


async def test_closing_a_connect_leaves_the_tests_connection(db):
    """``DBConnect.close()`` at the application's shutdown neither waits for the test nor takes its connection away (P15)."""
    async with shared(db) as session:
        await run_in_new_ctx(insert, db, "a")
        await asyncio.wait_for(db.close(), 10)
        await run_in_new_ctx(insert, db, "b")
        assert await names(db) == await seen_by(session) == ["a", "b"]


async def test_closing_a_connect_inside_a_request_of_the_test(db):
    """The same while the connect was never used by the application (P15)."""
    async with shared(db):
        async with db_context():
            await asyncio.wait_for(db.close(), 10)
        await insert(db, "a")
        assert await names(db) == ["a"]


async def test_code_that_sees_another_context_joins_too(db, ledger):
    """A server's task has the context of its start, which knows nothing of the test; its requests join all the same (P12)."""
    elsewhere = Context()
    async with shared(db):
        await asyncio.create_task(run_in_new_ctx(insert, db, "a"), context=elsewhere)
        assert await names(db) == ["a"]

    assert await ledger.names() == []


async def test_request_in_another_context_joins_too(db, ledger):
    """The same for an adapter's own calls, whatever the status (P12)."""

    async def request(name, status):
        unit = Unit.enter()
        await insert(db, name)
        await unit.head(status)
        await unit.end_of_body()
        await unit.close()
        return unit.joined

    async with shared(db):
        joined = [await asyncio.create_task(request(str(status), status), context=Context()) for status in (200, 404, 303)]
        assert joined == [True, True, True]
        assert await names(db) == ["200", "303"]

    assert await ledger.names() == []


async def test_policy_holds_in_the_shared_transaction(db):
    """``should_commit`` decides about the savepoint (P12)."""
    async with shared(db):
        unit = Unit.enter(Policy(should_commit=lambda status: status == 404))
        await insert(db, "a")
        await unit.head(404)
        await unit.end_of_body()
        await unit.close()
        assert await names(db) == ["a"]


async def test_body_and_background_join_too(db):
    """What a body and background work write are savepoints as well; a failure takes back its own part (P12)."""
    async with shared(db):
        unit = Unit.enter()
        await insert(db, "handler")
        await unit.head(200)
        await insert(db, "body")
        await unit.end_of_body()
        await insert(db, "background")
        await unit.close(Boom())
        assert await names(db) == ["body", "handler"]


async def test_inner_test_context_is_the_one_that_is_joined(db, ledger):
    """Of two test contexts the inner one is joined, then the outer one again (P12)."""
    async with set_test_context(auto_close=True):
        outer = await db_session(db)
        async with set_test_context():
            inner = await db_session(db)
            seen = [await run_in_new_ctx(db_session, db)]
        seen.append(await run_in_new_ctx(db_session, db))

    assert outer is not inner
    assert seen[0] is inner
    assert seen[1] is outer


async def test_other_loop_cannot_join(db):
    """An application in another loop is told what to do instead, and opens nothing (P12)."""

    async def work():
        async with db_context():
            await insert(db, "a")

    async with shared(db):
        with pytest.raises(ForeignLoopError, match=r"httpx\.ASGITransport"):
            await asyncio.to_thread(asyncio.run, work())
        await run_in_new_ctx(insert, db, "b")
        assert await names(db) == ["b"]


async def test_other_loop_works_without_a_test_context(db, ledger):
    """Before and after a test context another loop has units of its own (P15)."""

    async def work(name):
        async with db_context():
            await insert(db, name)

    await asyncio.to_thread(asyncio.run, work("a"))
    async with set_test_context():
        pass
    await asyncio.to_thread(asyncio.run, work("b"))

    assert await ledger.names() == ["a", "b"]


async def test_nothing_is_in_the_file_afterwards(db, databases):
    """After commits, rollbacks, failures and calls side by side the file is as it was (P12)."""
    database = await databases.database("first")

    async def work(number):
        await insert(db, str(number))
        await commit_db_session(db)
        await insert(db, f"{number} again")
        if number % 2:
            raise Boom

    async with shared(db) as session:
        session.add(Item(name="test"))
        await session.commit()
        await asyncio.gather(*(run_in_new_ctx(work, number) for number in range(6)), return_exceptions=True)
        with pytest.raises(IntegrityError):
            await run_in_new_ctx(insert, db, "test")
        await insert(db, "mine")
        await commit_db_session(db)
        assert len(await names(db)) == 2 + 6 + 3
    await db.close()

    assert on_disk(database) == []


async def test_failed_test_leaves_nothing(db, databases):
    """A test that fails in the middle of a request's unit leaves no row, no connection and no context (P12)."""
    with pytest.raises(Boom):
        async with shared(db):
            await insert(db, "a")
            async with db_context():
                await insert(db, "b")
                raise Boom

    assert databases.checked_out() == 0
    assert not is_context_initiated()
    assert on_disk(await databases.database("first")) == []


async def test_expired_objects_of_the_test_can_be_read_again(db):
    """The test reads with ``session.get`` what a request has changed (SEED)."""

    async def rename():
        item = await (await db_session(db)).scalar(select(Item))
        item.name = "new"

    async with shared(db) as session:
        session.add(Item(name="old"))
        await session.flush()
        await run_in_new_ctx(rename)
        session.expire_all()
        assert (await session.scalar(select(Item))).name == "new"


async def test_raw_statements_share_as_well(db):
    """Not only the unit of work pattern: ``execute`` of plain SQL is in the shared transaction too (P12)."""
    async with shared(db) as session:
        await session.execute(text("INSERT INTO items (name) VALUES ('raw')"))
        assert await run_in_new_ctx(names, db) == ["raw"]
