"""`db_session` and its family: by request, by hand, and for those who write a middleware of their own."""

import asyncio

import pytest
from context_sqla import (
    ContextAlreadyInitiatedError,
    ContextClosedError,
    UnsupportedOptionError,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    db_context,
    db_session,
    get_db_session_from_context,
    init_db_session_ctx,
    is_context_initiated,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
)
from sqlalchemy import select, text
from sqlalchemy.exc import ArgumentError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from support.databases import Databases, no_tasks_left
from support.rows import add, insert, insert_orphan
from support.tables import Item


class Boom(Exception):
    """An error of the application."""


class OwnSession(AsyncSession):
    """A user's own session class."""


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


@pytest.fixture(name="again")
async def _again(databases):
    """A second connect to the first database."""
    return databases.connect(await databases.database("first"), "again")


# db_session


async def test_session_is_the_same_everywhere_in_a_unit(db):
    """Coroutines and child tasks of a unit get one session (P2)."""

    async def child():
        return await db_session(db)

    async with db_context():
        mine = await db_session(db)
        others = [await child(), *await asyncio.gather(child(), asyncio.create_task(child()))]

    assert all(session is mine for session in others)


async def test_session_is_sqlalchemys_own(db):
    """What comes back is no wrapper: it is exactly an ``AsyncSession``."""
    async with db_context():
        assert type(await db_session(db)) is AsyncSession


async def test_session_is_of_the_users_class(databases):
    """A connect whose maker has a class of the user's gives sessions of it."""
    db = databases.connect(await databases.database("first"), "own", session_class=OwnSession)

    async with db_context():
        session = await db_session(db)

    assert type(session) is OwnSession


async def test_two_databases_have_two_sessions(db, other, ledger, other_ledger):
    """One unit writes to two databases (P9)."""
    async with db_context():
        await insert(db, "a")
        await insert(other, "b")

    assert (await ledger.names(), await other_ledger.names()) == (["a"], ["b"])


async def test_two_connects_to_one_database_are_independent(db, again, ledger):
    """Two connects to one database give two sessions with transactions of their own."""
    async with db_context():
        await insert(db, "a")
        await commit_db_session(db)
        session = await db_session(again)
        seen = list(await session.scalars(select(Item.name)))
        assert session is not await db_session(db)
        await rollback_db_session(again)

    assert seen == ["a"]
    assert await ledger.names() == ["a"]


# commit, rollback and close by hand


async def test_commit_by_hand_commits_what_is_open(db, ledger):
    """The row is there at once, and the unit goes on with the same session (P17)."""
    async with db_context():
        await insert(db, "a")
        await commit_db_session(db)
        seen = await ledger.names()
        session = await db_session(db)
        await insert(db, "b")
        assert await db_session(db) is session

    assert seen == ["a"]
    assert await ledger.names() == ["a", "b"]


async def test_commit_by_hand_writes_what_is_pending(db, ledger):
    """What was added and not flushed is written by the commit (P17)."""
    async with db_context():
        await add(db, "a")
        await commit_db_session(db)
        assert await ledger.names() == ["a"]


async def test_commit_by_hand_stays_when_the_unit_fails(db, ledger):
    """A later error takes nothing back (P3)."""
    with pytest.raises(Boom):
        async with db_context():
            await insert(db, "a")
            await commit_db_session(db)
            await insert(db, "b")
            raise Boom

    assert await ledger.names() == ["a"]


async def test_commit_by_hand_gives_the_connection_back(db, databases):
    """After a commit the unit holds no connection (P17)."""
    async with db_context():
        await insert(db, "a")
        await commit_db_session(db)
        assert databases.checked_out() == 0


async def test_failed_commit_by_hand_raises_and_rolls_back(db, ledger):
    """A commit by hand that fails raises, and the session can be used on (P17)."""
    async with db_context():
        await insert(db, "a")
        await insert_orphan(db)
        with pytest.raises(IntegrityError):
            await commit_db_session(db)
        await insert(db, "b")

    assert await ledger.names() == ["b"]


@pytest.mark.parametrize("finish", [commit_db_session, rollback_db_session, close_db_session])
async def test_nothing_happens_where_there_is_no_session(db, databases, finish):
    """Commit, rollback and close make no session (SEED)."""
    async with db_context():
        await finish(db)
        assert get_db_session_from_context(db) is None

    assert databases.engines == []


@pytest.mark.parametrize("finish", [commit_db_session, rollback_db_session])
async def test_nothing_happens_where_nothing_is_open(db, databases, finish):
    """Commit and rollback of a session without a transaction take no connection (SEED)."""
    async with db_context():
        session = await db_session(db)
        await finish(db)
        assert not session.in_transaction()
        assert await db_session(db) is session

    assert databases.engines[0].pool.checkedin() == 0


async def test_rollback_by_hand_rolls_back_what_is_open(db, ledger):
    """The row is gone, and what comes afterwards commits (P17)."""
    async with db_context():
        await insert(db, "a")
        await rollback_db_session(db)
        await insert(db, "b")

    assert await ledger.names() == ["b"]


async def test_rollback_by_hand_drops_what_is_pending(db, ledger):
    """What was added and not flushed is forgotten too (P17)."""
    async with db_context():
        await add(db, "a")
        await rollback_db_session(db)

    assert await ledger.names() == []


async def test_rollback_by_hand_ends_savepoints_too(db, ledger):
    """An open savepoint and the transaction around it are rolled back together (P17)."""
    async with db_context():
        await insert(db, "a")
        session = await db_session(db)
        await session.begin_nested()
        await insert(db, "b")
        await rollback_db_session(db)
        assert not session.in_transaction()

    assert await ledger.names() == []


async def test_close_by_hand_forgets_the_session(db, ledger):
    """The next ``db_session`` gives a new one; what was not committed is rolled back (P17)."""
    async with db_context():
        first = await db_session(db)
        await insert(db, "a")
        await close_db_session(db)
        assert get_db_session_from_context(db) is None
        second = await db_session(db)
        await insert(db, "b")

    assert second is not first
    assert await ledger.names() == ["b"]


async def test_commit_and_close_free_everything(db, databases, ledger):
    """Commit and close before slow work: the connection is back, the row is there (SEED)."""
    async with db_context():
        await insert(db, "a")
        await commit_db_session(db)
        await close_db_session(db)
        assert databases.checked_out() == 0

    assert await ledger.names() == ["a"]


async def test_session_closed_by_hand_does_not_come_back_to_life(db, databases):
    """Who kept the session that was closed with ``close_db_session`` cannot write with it behind the unit's back (P10)."""
    async with db_context():
        kept = await db_session(db)
        await insert(db, "a")
        await close_db_session(db)
        with pytest.raises(ContextClosedError, match=r"'db'.*db_session\(\)"):
            await kept.execute(text("SELECT 1"))
        assert databases.checked_out() == 0


async def test_plain_close_resets_the_session(db, ledger):
    """``session.close()`` does what SQLAlchemy says: it rolls back, and the same session may be used again (P17)."""
    async with db_context():
        session = await db_session(db)
        await insert(db, "a")
        await session.close()
        assert await db_session(db) is session
        await insert(db, "b")

    assert await ledger.names() == ["b"]


@pytest.mark.parametrize("times", [1, 2])
async def test_commit_by_the_sessions_own_method(db, ledger, times):
    """``session.commit()`` is a commit by hand like any other, also twice (P17)."""
    async with db_context():
        await insert(db, "a")
        for _ in range(times):
            await (await db_session(db)).commit()
        await insert(db, "b")
        await (await db_session(db)).rollback()

    assert await ledger.names() == ["a"]


async def test_begin_block_of_the_session_commits(db, ledger):
    """``async with session.begin():`` works as everywhere, and the unit goes on after it (P17)."""
    async with db_context():
        session = await db_session(db)
        async with session.begin():
            session.add(Item(name="a"))
        seen = await ledger.names()
        await insert(db, "b")

    assert seen == ["a"]
    assert await ledger.names() == ["a", "b"]


# atomic_db_session

MODES = ["commit", "rollback", "append", "raise"]


@pytest.mark.parametrize("mode", MODES)
async def test_atomic_block_commits_at_its_end(db, ledger, mode):
    """Nothing open: in each mode the block has a transaction of its own, committed when it ends (P17)."""
    async with db_context():
        async with atomic_db_session(db, mode) as session:
            assert session.in_transaction()
            await insert(db, "a")
            assert await ledger.names() == []
        assert not session.in_transaction()
        assert await ledger.names() == ["a"]


@pytest.mark.parametrize("mode", MODES)
async def test_atomic_block_rolls_back_on_an_error(db, ledger, mode):
    """Nothing open: an error rolls the block back and propagates as it is; the unit goes on (P17)."""
    boom = Boom()
    async with db_context():
        with pytest.raises(Boom) as caught:
            async with atomic_db_session(db, mode):
                await insert(db, "a")
                raise boom
        await insert(db, "b")

    assert caught.value is boom
    assert await ledger.names() == ["b"]


@pytest.mark.parametrize("mode", MODES)
async def test_atomic_block_gives_the_units_session(db, mode):
    """The block's session is what ``db_session`` returns in it, before it and after it (P17)."""
    async with db_context():
        before = await db_session(db)
        async with atomic_db_session(db, mode) as session:
            inside = await db_session(db)
        after = await db_session(db)

    assert before is session is inside is after


async def test_atomic_block_commits_by_default(db, ledger):
    """Without a mode a transaction that is open already is committed (P17)."""
    async with db_context():
        await insert(db, "before")
        async with atomic_db_session(db):
            assert await ledger.names() == ["before"]


async def test_mode_commit_commits_what_was_open(db, ledger):
    """What was written before the block is committed at its begin, and an error in the block cannot take it back (P17)."""
    async with db_context():
        await insert(db, "before")
        with pytest.raises(Boom):
            async with atomic_db_session(db, "commit"):
                seen = await ledger.names()
                await insert(db, "inside")
                raise Boom

    assert seen == ["before"]
    assert await ledger.names() == ["before"]


async def test_mode_commit_commits_what_was_only_added(db, ledger):
    """An object that was added and not flushed belongs to what is open (P17)."""
    async with db_context():
        await add(db, "before")
        async with atomic_db_session(db, "commit"):
            assert await ledger.names() == ["before"]


async def test_mode_rollback_rolls_back_what_was_open(db, ledger):
    """What was written before the block is gone, the block commits (P17)."""
    async with db_context():
        await insert(db, "before")
        async with atomic_db_session(db, "rollback"):
            await insert(db, "inside")
        assert await ledger.names() == ["inside"]


async def test_mode_append_goes_on_in_what_was_open(db, ledger):
    """One transaction for both: nothing is committed at the begin of the block, everything at its end (P17)."""
    async with db_context():
        await insert(db, "before")
        async with atomic_db_session(db, "append"):
            await insert(db, "inside")
            assert await ledger.names() == []
        assert await ledger.names() == ["before", "inside"]


async def test_mode_append_rolls_everything_back_on_an_error(db, ledger):
    """One transaction for both: an error in the block takes what came before it as well (P17)."""
    async with db_context():
        await insert(db, "before")
        with pytest.raises(Boom):
            async with atomic_db_session(db, "append"):
                await insert(db, "inside")
                raise Boom

    assert await ledger.names() == []


async def test_mode_raise_raises_sqlalchemys_own_error(db, ledger):
    """A transaction that is open already is ``InvalidRequestError``; the block does not run and the transaction goes on (P17)."""
    async with db_context():
        await insert(db, "before")
        with pytest.raises(InvalidRequestError, match="already begun"):
            async with atomic_db_session(db, "raise"):
                await insert(db, "inside")
        await insert(db, "after")

    assert await ledger.names() == ["after", "before"]


async def test_unknown_mode_is_refused(db, ledger):
    """Another word is a ``ValueError`` that names the four, and nothing was done to what is open (P17)."""
    async with db_context():
        await insert(db, "before")
        with pytest.raises(ValueError, match=r"commit.*rollback.*append.*raise.*'comit'"):
            async with atomic_db_session(db, "comit"):
                pass
        assert (await db_session(db)).in_transaction()

    assert await ledger.names() == ["before"]


async def test_atomic_block_that_commits_by_hand(db, ledger):
    """A commit inside the block is allowed, and the end of the block commits the rest (P17)."""
    async with db_context():
        async with atomic_db_session(db):
            await insert(db, "a")
            await commit_db_session(db)
            await insert(db, "b")
        assert await ledger.names() == ["a", "b"]


async def test_atomic_block_whose_commit_fails(db, ledger):
    """An error of the commit at the end is raised out of the block, and the unit can go on (P17)."""
    async with db_context():
        with pytest.raises(IntegrityError):
            async with atomic_db_session(db):
                await insert(db, "a")
                await insert_orphan(db)
        assert not (await db_session(db)).in_transaction()
        await insert(db, "b")

    assert await ledger.names() == ["b"]


async def test_cancelled_atomic_block_rolls_back(db, ledger):
    """A cancellation inside the block is an error like any other (P7)."""
    reached = asyncio.Event()

    async def work():
        async with db_context():
            await insert(db, "before")
            async with atomic_db_session(db, "append"):
                await insert(db, "inside")
                reached.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.wait_for(reached.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await ledger.names() == []


@pytest.mark.parametrize("inner", ["commit", "append"])
async def test_atomic_blocks_one_in_the_other(db, ledger, inner):
    """An inner block ends the transaction that both are in; the outer one ends well after it (P17)."""
    async with db_context():
        async with atomic_db_session(db):
            await insert(db, "outer")
            async with atomic_db_session(db, inner):
                await insert(db, "inner")
            assert await ledger.names() == ["inner", "outer"]

    assert await ledger.names() == ["inner", "outer"]


async def test_atomic_block_leaves_other_connects_alone(db, other, other_ledger):
    """What is open on another connect is neither committed nor rolled back (P17)."""
    async with db_context():
        await insert(other, "other")
        async with atomic_db_session(db):
            await insert(db, "a")
        assert await other_ledger.names() == []
        assert (await db_session(other)).in_transaction()


async def test_read_only_is_refused_where_the_dialect_has_it_not(db, ledger):
    """SQLite has no read-only transactions: an error that says so, never a transaction that writes (P17)."""
    async with db_context():
        with pytest.raises(UnsupportedOptionError, match=r"'db'.*read_only.*sqlite"):
            async with atomic_db_session(db, read_only=True):
                await insert(db, "a")
        await insert(db, "b")

    assert await ledger.names() == ["b"]


async def test_isolation_level_is_refused_where_the_dialect_has_it_not(db, ledger):
    """An isolation level that the database does not know is an error, never ignored (P17)."""
    async with db_context():
        with pytest.raises((UnsupportedOptionError, ArgumentError), match="REPEATABLE READ"):
            async with atomic_db_session(db, isolation_level="REPEATABLE READ"):
                await insert(db, "a")
        await insert(db, "b")

    assert await ledger.names() == ["b"]


async def test_option_with_an_open_transaction_to_append_to_is_refused(db, ledger):
    """A transaction that is open already cannot get another isolation level: an error, and it goes on as it was (P17)."""
    async with db_context():
        await insert(db, "before")
        with pytest.raises(UnsupportedOptionError, match=r"'db'.*isolation_level.*open already"):
            async with atomic_db_session(db, "append", isolation_level="SERIALIZABLE"):
                await insert(db, "inside")
        await insert(db, "after")

    assert await ledger.names() == ["after", "before"]


# Sessions outside every unit


async def test_non_ctx_session_is_not_committed(db, ledger):
    """A session of its own, closed at the end and not committed, outside every unit (SEED)."""
    async with new_non_ctx_session(db) as session:
        session.add(Item(name="a"))
        await session.flush()
        assert not is_context_initiated()

    assert not session.in_transaction()
    assert await ledger.names() == []


async def test_non_ctx_session_commits_by_hand(db, ledger):
    """Its user may commit it (SEED)."""
    async with new_non_ctx_session(db) as session:
        session.add(Item(name="a"))
        await session.commit()

    assert await ledger.names() == ["a"]


async def test_non_ctx_session_is_not_the_units(db, ledger):
    """Inside a unit it is a session beside the unit's, which never learns of it (SEED)."""
    async with db_context():
        async with new_non_ctx_session(db) as session:
            assert get_db_session_from_context(db) is None
            assert session is not await db_session(db)
            session.add(Item(name="a"))
            await session.commit()
        await insert(db, "b")
        await rollback_db_session(db)

    assert await ledger.names() == ["a"]


async def test_non_ctx_session_is_closed_on_an_error(db, databases, ledger):
    """An error propagates, the connection is back and nothing is written (SEED)."""
    with pytest.raises(Boom):
        async with new_non_ctx_session(db) as session:
            session.add(Item(name="a"))
            await session.flush()
            raise Boom

    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_non_ctx_atomic_session_commits(db, ledger):
    """The same, begun at the start and committed at the end (SEED)."""
    async with new_non_ctx_atomic_session(db) as session:
        assert session.in_transaction()
        session.add(Item(name="a"))

    assert await ledger.names() == ["a"]


async def test_non_ctx_atomic_session_rolls_back_on_an_error(db, ledger):
    """An error rolls it back and propagates (SEED)."""
    with pytest.raises(Boom):
        async with new_non_ctx_atomic_session(db) as session:
            session.add(Item(name="a"))
            await session.flush()
            raise Boom

    assert await ledger.names() == []


async def test_non_ctx_atomic_session_raises_the_error_of_its_commit(db, databases, ledger):
    """A commit that fails raises, and the connection is back (SEED)."""
    with pytest.raises(IntegrityError):
        async with new_non_ctx_atomic_session(db) as session:
            session.add(Item(name="a"))
            await session.execute(text("INSERT INTO children (name, parent_id) VALUES ('orphan', 4711)"))

    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_cancelled_non_ctx_atomic_session_rolls_back(db, databases, ledger):
    """A cancellation rolls it back, and the connection is back (P7)."""
    reached = asyncio.Event()

    async def work():
        async with new_non_ctx_atomic_session(db) as session:
            session.add(Item(name="a"))
            await session.flush()
            reached.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.wait_for(reached.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert databases.checked_out() == 0
    assert await ledger.names() == []


@pytest.mark.parametrize("make", [new_non_ctx_session, new_non_ctx_atomic_session])
async def test_non_ctx_session_asks_the_handler(databases, make):
    """The handler is called before every session that is made, these included (SEED)."""
    asked = []

    async def handler(connect):
        asked.append(connect)

    db = databases.connect(await databases.database("first"), "db", handler=handler)
    async with make(db):
        pass

    assert asked == [db]


# The life cycle by hand


async def test_context_by_hand_begins_and_ends():
    """``init_db_session_ctx`` opens a unit and ``reset_db_session_ctx`` ends it (SEED)."""
    seen = [is_context_initiated()]
    token = init_db_session_ctx()
    seen.append(is_context_initiated())
    await reset_db_session_ctx(token)
    seen.append(is_context_initiated())

    assert seen == [False, True, False]


async def test_second_context_by_hand_is_refused(db):
    """A second one without ``force`` is an error that names it, and the first one stays (SEED)."""
    token = init_db_session_ctx()
    session = await db_session(db)
    with pytest.raises(ContextAlreadyInitiatedError, match="force=True"):
        init_db_session_ctx()
    same = await db_session(db)
    await reset_db_session_ctx(token)

    assert same is session


async def test_second_context_by_force_is_a_unit_of_its_own(db, ledger):
    """With ``force`` there is a unit inside the other, with a session of its own; then the outer one is back (SEED)."""
    outer_token = init_db_session_ctx()
    outer = await db_session(db)
    inner_token = init_db_session_ctx(force=True)
    inner = await db_session(db)
    await insert(db, "inner")
    await commit_db_session(db)
    await reset_db_session_ctx(inner_token)
    back = await db_session(db)
    await reset_db_session_ctx(outer_token)

    assert inner is not outer
    assert back is outer
    assert await ledger.names() == ["inner"]


async def test_context_inside_db_context_needs_force():
    """Any unit counts as open, whoever opened it (SEED)."""
    async with db_context():
        with pytest.raises(ContextAlreadyInitiatedError):
            init_db_session_ctx()


async def test_reset_closes_the_sessions(db, databases, ledger):
    """The end of a unit by hand commits nothing and gives the connections back (SEED)."""
    token = init_db_session_ctx()
    await insert(db, "a")
    await reset_db_session_ctx(token)

    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_reset_without_close_leaves_the_sessions(db, databases, ledger):
    """``with_close=False`` leaves the sessions to the caller, who can go on with them (SEED)."""
    token = init_db_session_ctx()
    session = await db_session(db)
    await insert(db, "a")
    await reset_db_session_ctx(token, with_close=False)
    out = databases.checked_out()
    await session.commit()
    await session.close()

    assert not is_context_initiated()
    assert out == 1
    assert await ledger.names() == ["a"]


async def test_session_left_to_the_caller_is_nobodys_unit(databases, caplog):
    """``DBConnect.close()`` does not wait for a unit whose sessions were left to the caller (P15)."""
    db = databases.connect(await databases.database("first"), "db", drain_timeout=0)
    token = init_db_session_ctx()
    session = await db_session(db)
    await insert(db, "a")
    await reset_db_session_ctx(token, with_close=False)
    await session.close()
    await db.close()

    assert "still running" not in caplog.text


async def test_popped_session_is_nobodys_unit(databases, caplog):
    """``DBConnect.close()`` does not wait for a session that was taken out of its unit (P15)."""
    db = databases.connect(await databases.database("first"), "db", drain_timeout=0)
    async with db_context():
        await insert(db, "a")
        session = pop_db_session_from_context(db)
        await session.close()
    await db.close()

    assert "still running" not in caplog.text


async def test_reset_with_its_token_where_another_unit_is_open(db, databases):
    """A token ends its own unit, also when another one was opened inside it and is still there."""
    outer_token = init_db_session_ctx()
    session = await db_session(db)
    await insert(db, "a")
    init_db_session_ctx(force=True)
    await reset_db_session_ctx(outer_token)

    initiated, out = is_context_initiated(), databases.checked_out()
    await session.close()
    assert not initiated
    assert out == 0


async def test_get_session_from_context_makes_none(db, databases):
    """None if there is none yet, then the unit's (SEED)."""
    async with db_context():
        before = get_db_session_from_context(db)
        engines = list(databases.engines)
        session = await db_session(db)
        after = get_db_session_from_context(db)

    assert before is None
    assert engines == []
    assert after is session


async def test_put_session_becomes_the_units(db, ledger):
    """A session that was put is what ``db_session`` returns, and the unit commits and closes it (SEED)."""
    session = await db.create_session()
    async with db_context():
        put_db_session_to_context(db, session)
        assert await db_session(db) is session
        assert get_db_session_from_context(db) is session
        await insert(db, "a")

    assert not session.in_transaction()
    assert await ledger.names() == ["a"]


async def test_put_session_that_has_begun_already(db, ledger):
    """A transaction that was open before the session was put is the unit's from there on (SEED)."""
    session = await db.create_session()
    session.add(Item(name="a"))
    await session.flush()
    async with db_context():
        put_db_session_to_context(db, session)

    assert await ledger.names() == ["a"]


async def test_put_session_rolls_back_with_the_unit(db, databases, ledger):
    """A put session follows the unit on an error as well (SEED)."""
    session = await db.create_session()
    with pytest.raises(Boom):
        async with db_context():
            put_db_session_to_context(db, session)
            await insert(db, "a")
            raise Boom

    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_popped_session_belongs_to_the_caller(db, databases, ledger):
    """A popped session is neither committed nor closed by the unit, and works after it (SEED)."""
    async with db_context():
        mine = await db_session(db)
        await insert(db, "a")
        popped = pop_db_session_from_context(db)
        assert get_db_session_from_context(db) is None
        assert pop_db_session_from_context(db) is None
        assert await db_session(db) is not mine
    held = databases.checked_out()
    seen = await ledger.names()
    await mine.commit()
    await mine.close()

    assert popped is mine
    assert (held, seen) == (1, [])
    assert await ledger.names() == ["a"]


async def test_commit_all_commits_every_connect(db, other, ledger, other_ledger):
    """Every session with an open transaction commits, and the unit goes on (SEED)."""
    async with db_context():
        await insert(db, "a")
        await add(other, "b")
        await commit_all_sessions()
        seen = (await ledger.names(), await other_ledger.names())
        await insert(db, "c")
        await rollback_all_sessions()

    assert seen == (["a"], ["b"])
    assert await ledger.names() == ["a"]


async def test_commit_all_asks_before_each_commit(db, other, again, ledger):
    """``before_commit`` is awaited with each session that has an open transaction, before anything is committed (SEED)."""
    asked = []

    async def ask(session):
        asked.append((session, await ledger.names()))

    async with db_context():
        await insert(db, "a")
        await insert(other, "b")
        await db_session(again)
        await commit_all_sessions(ask)
        sessions = [await db_session(db), await db_session(other)]

    assert [session for session, _ in asked] == sessions
    assert [names for _, names in asked] == [[], []]


async def test_commit_all_can_be_refused(db, other, ledger, other_ledger):
    """When ``before_commit`` raises for the second session, the first is not committed either (P9)."""

    async def refuse(session):
        if session is await db_session(other):
            raise Boom

    async with db_context():
        await insert(db, "a")
        await insert(other, "b")
        with pytest.raises(Boom):
            await commit_all_sessions(refuse)
        assert not (await db_session(db)).in_transaction()

    assert (await ledger.names(), await other_ledger.names()) == ([], [])


async def test_rollback_all_rolls_every_connect_back(db, other, ledger, other_ledger):
    """Every session is rolled back, and none is forgotten (SEED)."""
    async with db_context():
        session = await db_session(db)
        await insert(db, "a")
        await insert(other, "b")
        await rollback_all_sessions()
        assert await db_session(db) is session

    assert (await ledger.names(), await other_ledger.names()) == ([], [])


async def test_close_all_forgets_every_session(db, other, databases, ledger):
    """Every session is closed without a commit, and the next ``db_session`` gives a new one (SEED)."""
    async with db_context():
        session = await db_session(db)
        await insert(db, "a")
        await insert(other, "b")
        await close_all_sessions()
        assert databases.checked_out() == 0
        assert get_db_session_from_context(other) is None
        assert await db_session(db) is not session

    assert await ledger.names() == []


@pytest.mark.parametrize(
    ("status", "names"), [(200, ["a"]), (204, ["a"]), (302, ["a"]), (399, ["a"]), (400, []), (404, []), (500, [])]
)
async def test_auto_commit_follows_the_status(db, ledger, status, names):
    """Below 400 commits, from 400 on rolls back (SEED)."""
    async with db_context():
        await insert(db, "a")
        await auto_commit_by_status_code(status)
        assert await ledger.names() == names

    assert await ledger.names() == names


@pytest.mark.parametrize(("status", "calls"), [(200, 1), (400, 0)])
async def test_auto_commit_asks_only_before_a_commit(db, status, calls):
    """``before_commit`` is passed on, and not asked before a rollback (SEED)."""
    asked = []

    async def ask(session):
        asked.append(session)

    async with db_context():
        await insert(db, "a")
        await auto_commit_by_status_code(status, ask)

    assert len(asked) == calls


async def test_before_commit_by_hand_is_asked_once_per_commit(db):
    """A callback that was given to one commit is not asked again by the commit at the unit's end (SEED)."""
    asked = []

    async def ask(session):
        asked.append(session)

    async with db_context():
        await insert(db, "a")
        await commit_all_sessions(ask)
        await insert(db, "b")

    assert len(asked) == 1


@pytest.mark.parametrize(("status", "names"), [(201, ["a"]), (500, [])])
async def test_middleware_by_hand(db, ledger, status, names):
    """A middleware that is written with these functions alone works (SEED)."""

    async def middleware(handler):
        token = init_db_session_ctx()
        try:
            answer = await handler()
            await auto_commit_by_status_code(answer)
        except BaseException:
            await rollback_all_sessions()
            raise
        finally:
            await close_all_sessions()
            await reset_db_session_ctx(token)
        return answer

    async def handler():
        await insert(db, "a")
        return status

    assert await middleware(handler) == status
    assert await ledger.names() == names
