"""Units of work outside requests: `db_context`, `run_in_new_ctx`, `unit_of_work`."""

import asyncio
import contextlib
import functools
import inspect
import sqlite3
from contextvars import ContextVar

import pytest
from context_sqla import (
    UnsupportedOptionError,
    atomic_db_session,
    commit_db_session,
    db_context,
    db_session,
    is_context_initiated,
    on_commit,
    rollback_db_session,
    run_in_new_ctx,
    unit_of_work,
)
from context_sqla.errors import _outcome_of
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from support.databases import Databases, no_tasks_left
from support.rows import add, insert, insert_orphan

colour: ContextVar[str] = ContextVar("colour", default="none")


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


@pytest.fixture(name="impatient")
async def _impatient(databases):
    """A connect to the first database that waits for no lock: SQLITE_BUSY at once."""
    database = await databases.database("first")
    return databases.connect(database, "impatient", engine_options={"connect_args": {"timeout": 0}})


@pytest.fixture(name="rival")
async def _rival(databases):
    """Somebody else's connection to the first database."""
    database = await databases.database("first")
    with contextlib.closing(sqlite3.connect(database.place, timeout=0, isolation_level=None)) as connection:
        yield connection


# db_context


async def test_block_commits_at_its_end(db, ledger):
    """A good end commits (P11)."""
    async with db_context():
        await insert(db, "a")
        assert await ledger.names() == []

    assert await ledger.names() == ["a"]


async def test_block_rolls_back_on_an_error(db, ledger):
    """An error rolls back and propagates as the object that was raised (P11)."""
    boom = Boom()
    with pytest.raises(Boom) as caught:
        async with db_context():
            await insert(db, "a")
            raise boom

    assert caught.value is boom
    assert await ledger.names() == []


async def test_block_raises_the_error_of_its_commit(db, databases, ledger):
    """A commit that fails is raised at the end of the block (P4)."""
    with pytest.raises(IntegrityError):
        async with db_context():
            await insert(db, "a")
            await insert_orphan(db)

    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_block_inside_a_unit_is_a_new_one(db, ledger):
    """A block inside another has a session of its own, commits by itself, and the outer unit is back after it (P11)."""
    with pytest.raises(Boom):
        async with db_context():
            outer = await db_session(db)
            async with db_context():
                inner = await db_session(db)
                await insert(db, "inner")
            assert await ledger.names() == ["inner"]
            assert await db_session(db) is outer
            await insert(db, "outer")
            raise Boom

    assert inner is not outer
    assert await ledger.names() == ["inner"]


async def test_block_leaves_no_context():
    """Before, inside, after: none, one, none (P11)."""
    seen = [is_context_initiated()]
    async with db_context():
        seen.append(is_context_initiated())
    seen.append(is_context_initiated())

    assert seen == [False, True, False]


async def test_block_leaves_no_context_after_a_failed_commit(db):
    """The variable is restored when the commit fails too (P8)."""
    with pytest.raises(IntegrityError):
        async with db_context():
            await insert_orphan(db)

    assert not is_context_initiated()


async def test_block_can_be_refused(db, ledger):
    """``before_commit`` is awaited with each session before its commit and refuses it by raising (P14)."""
    asked = []

    async def refuse(session):
        asked.append((session, session.in_transaction()))
        raise Boom

    with pytest.raises(Boom):
        async with db_context(before_commit=refuse):
            await insert(db, "a")
            session = await db_session(db)

    assert asked == [(session, True)]
    assert await ledger.names() == []


async def test_block_that_returns_early_commits(db, ledger):
    """A ``return`` inside the block is a good end (P11)."""

    async def work():
        async with db_context():
            await insert(db, "a")
            return "done"

    assert await work() == "done"
    assert await ledger.names() == ["a"]


# run_in_new_ctx


async def test_call_commits_and_returns(db, ledger):
    """The function's unit commits, and its result comes back (P18)."""

    async def work():
        await add(db, "a")
        return 42

    assert await run_in_new_ctx(work) == 42
    assert await ledger.names() == ["a"]


async def test_call_rolls_back_and_raises(db, ledger):
    """An error rolls back and propagates as the object that was raised (P18)."""
    boom = Boom()

    async def work():
        await insert(db, "a")
        raise boom

    with pytest.raises(Boom) as caught:
        await run_in_new_ctx(work)

    assert caught.value is boom
    assert await ledger.names() == []


async def test_call_has_a_session_of_its_own(db, databases, ledger):
    """Inside a unit it has its own session and connection, and takes nothing of the caller's with it (P18)."""

    async def work():
        await (await db_session(db)).execute(text("SELECT 1"))
        return await db_session(db), databases.checked_out()

    async with db_context():
        mine = await db_session(db)
        await mine.execute(text("SELECT 1"))
        inner, out = await run_in_new_ctx(work)
        assert mine.in_transaction()

    assert inner is not mine
    assert out == 2


async def test_call_survives_the_callers_rollback(db, ledger):
    """What the call committed stays when the caller fails (P18)."""
    with pytest.raises(Boom):
        async with db_context():
            await run_in_new_ctx(insert, db, "a")
            raise Boom

    assert await ledger.names() == ["a"]


async def test_every_argument_goes_to_the_function():
    """Positions and keywords arrive as they are, whatever they are called (P18)."""

    async def work(*args, **kwargs):
        return args, kwargs

    keywords = {"retry": 1, "isolation_level": "x", "read_only": True, "policy": 2, "context": 3, "kwargs": {}, "args": ()}

    assert await run_in_new_ctx(work, 1, "two", **keywords) == ((1, "two"), keywords)


async def test_keyword_named_fn_goes_to_the_function():
    """A keyword may even have the name of our own parameter (P18)."""

    async def work(*, fn):
        return fn

    assert await run_in_new_ctx(work, fn="mine") == "mine"


async def test_bound_methods_and_partials_run(db, ledger):
    """Whatever can be awaited when it is called is good enough (P18)."""

    class Service:
        async def write(self, name):
            await insert(db, name)

        async def __call__(self):
            await insert(db, "called")

    await run_in_new_ctx(Service().write, "method")
    await run_in_new_ctx(functools.partial(insert, db), "partial")
    await run_in_new_ctx(Service())
    await run_in_new_ctx(lambda: insert(db, "lambda"))

    assert await ledger.names() == ["called", "lambda", "method", "partial"]


async def test_gather_runs_side_by_side(databases):
    """Calls under ``gather`` have a connection each, all at the same time (P18)."""
    db = databases.connect(await databases.database("first"), "db")
    barrier = asyncio.Barrier(5)

    async def work(number):
        session = await db_session(db)
        value = await session.scalar(text(f"SELECT {number}"))
        async with asyncio.timeout(10):
            await barrier.wait()
        return value, session

    results = await asyncio.gather(*(run_in_new_ctx(work, number) for number in range(5)))

    assert [value for value, _ in results] == [0, 1, 2, 3, 4]
    assert len({id(session) for _, session in results}) == 5


async def test_gather_where_some_fail(db, ledger):
    """Ten calls of which some fail: the others' rows are there, theirs are not, each has its own error (P18)."""

    async def work(number):
        await insert(db, str(number))
        if number % 3 == 0:
            raise Boom(number)

    results = await asyncio.gather(*(run_in_new_ctx(work, number) for number in range(10)), return_exceptions=True)

    assert [result.args[0] for result in results if result is not None] == [0, 3, 6, 9]
    assert await ledger.names() == ["1", "2", "4", "5", "7", "8"]


async def test_gather_inside_a_unit(db, ledger):
    """The calls commit by themselves, the unit around them by itself (P18)."""
    with pytest.raises(Boom):
        async with db_context():
            await asyncio.gather(*(run_in_new_ctx(insert, db, name) for name in "abc"))
            await insert(db, "d")
            raise Boom

    assert await ledger.names() == ["a", "b", "c"]


async def test_task_group_runs_calls(db, databases, ledger):
    """In a ``TaskGroup`` the failure of one cancels the others, which roll back (P18)."""
    written = asyncio.Event()

    async def wait():
        await insert(db, "waits")
        written.set()
        await asyncio.Event().wait()

    async def fail():
        await asyncio.wait_for(written.wait(), 10)
        raise Boom

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(run_in_new_ctx(wait))
            group.create_task(run_in_new_ctx(fail))

    assert caught.group_contains(Boom)
    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_task_outlives_the_unit_that_started_it(db, ledger):
    """A call in a task of its own may go on when the unit that started it has ended, and commits (P10, P18)."""
    ended = asyncio.Event()

    async def work():
        await asyncio.wait_for(ended.wait(), 10)
        await insert(db, "a")

    async with db_context():
        await insert(db, "b")
        task = asyncio.create_task(run_in_new_ctx(work))
    ended.set()
    await task

    assert await ledger.names() == ["a", "b"]


async def test_context_variables_of_the_caller_are_visible():
    """The function sees the caller's context variables: a new unit, not a new context (P18)."""
    token = colour.set("red")

    async def work():
        return colour.get()

    seen = [await run_in_new_ctx(work), await asyncio.create_task(run_in_new_ctx(work))]
    colour.reset(token)

    assert seen == ["red", "red"]


async def test_context_variables_of_the_function_reach_the_caller():
    """A plain call leaves what the function set, as any awaited function does; only our own variable is restored (P18)."""

    async def work():
        colour.set("blue")

    token = colour.set("red")
    await run_in_new_ctx(work)
    seen = colour.get(), is_context_initiated()
    colour.reset(token)

    assert seen == ("blue", False)


async def test_cancelled_call_rolls_back(db, databases, ledger):
    """A cancellation rolls the call back, and the connection is back (P7)."""
    reached = asyncio.Event()

    async def work():
        await insert(db, "a")
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(run_in_new_ctx(work))
    await asyncio.wait_for(reached.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert databases.checked_out() == 0
    assert await ledger.names() == []


async def test_call_may_finish_by_hand(db, ledger):
    """Commit and rollback by hand work inside a call (P17)."""

    async def work():
        await insert(db, "a")
        await commit_db_session(db)
        await insert(db, "b")
        await rollback_db_session(db)
        await insert(db, "c")

    await run_in_new_ctx(work)

    assert await ledger.names() == ["a", "c"]


# unit_of_work


async def test_decorated_function_is_a_unit(db, ledger):
    """Each call of the decorated function is a unit that commits (P18)."""

    @unit_of_work()
    async def write(name):
        await insert(db, name)
        return name

    assert await write("a") == "a"
    assert await ledger.names() == ["a"]


async def test_decorated_function_rolls_back(db, ledger):
    """An error rolls the call back and propagates (P18)."""

    @unit_of_work()
    async def write(name):
        await insert(db, name)
        raise Boom

    with pytest.raises(Boom):
        await write("a")

    assert await ledger.names() == []


async def test_decorated_function_is_a_unit_inside_a_unit(db, ledger):
    """Called inside a unit it is a new one with a connection of its own (P18)."""

    @unit_of_work()
    async def write(name):
        await insert(db, name)

    with pytest.raises(Boom):
        async with db_context():
            await write("a")
            raise Boom

    assert await ledger.names() == ["a"]


async def test_decorated_method_gets_its_instance(db, ledger):
    """Decorated methods are methods (P18)."""

    class Service:
        def __init__(self, name):
            self.name = name

        @unit_of_work()
        async def write(self, suffix="", *, prefix=""):
            await insert(db, prefix + self.name + suffix)

    await Service("a").write()
    await Service("b").write("!", prefix="?")

    assert await ledger.names() == ["?b!", "a"]


async def test_decorated_static_and_class_methods(db, ledger):
    """The other kinds of methods can be decorated too (P18)."""

    class Service:
        name = "class"

        @classmethod
        @unit_of_work()
        async def write_class(cls):
            await insert(db, cls.name)

        @staticmethod
        @unit_of_work()
        async def write_static(name):
            await insert(db, name)

    await Service.write_class()
    await Service.write_static("static")

    assert await ledger.names() == ["class", "static"]


async def test_decorated_function_keeps_its_name_and_signature():
    """A framework or a reader that looks at the function sees the original (P18)."""

    @unit_of_work(retry=2)
    async def write(name: str, *, times: int = 1) -> None:
        """Write a name."""

    assert (write.__name__, write.__doc__) == ("write", "Write a name.")
    assert list(inspect.signature(write).parameters) == ["name", "times"]


async def test_call_form_runs_the_function(db, ledger):
    """``await unit_of_work(...)(fn, *args)`` runs the function once, with its arguments (P18)."""

    async def write(name, *, suffix):
        await insert(db, name + suffix)
        return name + suffix

    assert await unit_of_work(retry=3)(write, "a", suffix="!") == "a!"
    assert await ledger.names() == ["a!"]


async def test_call_form_without_arguments(db, ledger):
    """A function without arguments runs by ``await unit_of_work()(fn)`` (P18)."""

    async def write():
        await insert(db, "a")
        return 42

    assert await unit_of_work()(write) == 42
    assert await ledger.names() == ["a"]


@pytest.mark.parametrize("keyword", ["fn", "self", "retry", "isolation_level", "read_only", "how", "args", "kwargs"])
async def test_every_keyword_of_a_decorated_function_is_its_own(keyword):
    """A keyword of the call goes to the function, whatever it is called (P18)."""

    @unit_of_work()
    async def work(**kwargs):
        return kwargs

    assert await work(**{keyword: 1}) == {keyword: 1}


@pytest.mark.parametrize("keyword", ["fn", "self", "retry", "isolation_level", "read_only"])
async def test_every_keyword_of_the_call_form_goes_to_the_function(keyword):
    """A keyword of the call goes to the function, whatever it is called (P18)."""

    async def work(*args, **kwargs):
        return args, kwargs

    assert await unit_of_work()(work, 1, **{keyword: 2}) == ((1,), {keyword: 2})


async def test_one_unit_of_work_serves_many_calls(db, ledger):
    """The same decorated function runs side by side, each call a unit of its own (P18)."""

    @unit_of_work()
    async def write(name):
        await insert(db, name)
        if name == "b":
            raise Boom

    results = await asyncio.gather(*(write(name) for name in "abc"), return_exceptions=True)

    assert [type(result) for result in results] == [type(None), Boom, type(None)]
    assert await ledger.names() == ["a", "c"]


async def test_busy_database_is_tried_again(impatient, rival, ledger):
    """``SQLITE_BUSY`` runs the whole function again, in a new unit with a new session (P18)."""
    sessions = []

    @unit_of_work(retry=3)
    async def write():
        sessions.append(await db_session(impatient))
        if len(sessions) == 3:
            rival.execute("ROLLBACK")
        await insert(impatient, "a")
        return "done"

    rival.execute("BEGIN IMMEDIATE")

    assert await write() == "done"
    assert len({id(session) for session in sessions}) == 3
    assert await ledger.names() == ["a"]


async def test_call_form_tries_again(impatient, rival, ledger):
    """The call form repeats as the decorator does, with the same arguments (P18)."""
    calls = []

    async def write(*args, **kwargs):
        calls.append((args, kwargs))
        if len(calls) == 2:
            rival.execute("ROLLBACK")
        await insert(impatient, "a")

    rival.execute("BEGIN IMMEDIATE")
    await unit_of_work(retry=1)(write, 1, two=2)

    assert calls == [((1,), {"two": 2})] * 2
    assert await ledger.names() == ["a"]


async def test_database_that_is_busy_at_the_commit_is_tried_again(impatient, ledger, rival):
    """A COMMIT that the database refuses because of its neighbours runs the whole function again (P18)."""
    await ledger.execute("INSERT INTO parents (name) VALUES ('p')")
    rival.execute("PRAGMA journal_mode = DELETE")  # there a reader keeps a writer from its commit, and from nothing else
    calls = []

    @unit_of_work(retry=2)
    async def write():
        calls.append(len(calls))
        await insert(impatient, "a")
        if len(calls) == 1:
            rival.execute("BEGIN")
            rival.execute("SELECT * FROM parents").fetchall()
        else:
            rival.execute("ROLLBACK")

    await write()

    assert calls == [0, 1]
    assert await ledger.names() == ["a"]


@pytest.mark.parametrize(("retry", "calls"), [(None, 1), (0, 1), (1, 2), (4, 5)])
async def test_repetitions_have_a_bound(impatient, rival, ledger, retry, calls):
    """``retry`` is how often it is repeated, no more; then the last error is raised (P18)."""
    seen = []

    @unit_of_work(retry=retry)
    async def write():
        seen.append(1)
        await insert(impatient, "a")

    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(OperationalError, match="locked"):
        await write()
    rival.execute("ROLLBACK")

    assert len(seen) == calls
    assert await ledger.names() == []


async def test_negative_number_of_repetitions_is_refused():
    """``retry`` below zero is a ``ValueError`` where the unit of work is made (P18)."""
    with pytest.raises(ValueError, match="-1"):
        unit_of_work(retry=-1)


@pytest.mark.parametrize("error", [Boom(), TimeoutError(), OSError()], ids=repr)
async def test_other_errors_are_not_tried_again(db, ledger, error):
    """Only what the database asks to be repeated is repeated (P18)."""
    calls = []

    @unit_of_work(retry=3)
    async def write():
        calls.append(1)
        await insert(db, "a")
        raise error

    with pytest.raises(type(error)) as caught:
        await write()

    assert caught.value is error
    assert len(calls) == 1
    assert await ledger.names() == []


async def test_constraint_that_fails_is_not_tried_again(db):
    """An ``IntegrityError`` would only come again (P18)."""
    calls = []

    @unit_of_work(retry=3)
    async def write():
        calls.append(1)
        await insert(db, "a")
        await insert(db, "a")

    with pytest.raises(IntegrityError):
        await write()

    assert len(calls) == 1


async def test_cancellation_is_not_tried_again(db):
    """A call that was cancelled ends (P7)."""
    calls = []
    reached = asyncio.Event()

    @unit_of_work(retry=3)
    async def write():
        calls.append(1)
        await insert(db, "a")
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(write())
    await asyncio.wait_for(reached.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert len(calls) == 1


async def test_nothing_is_repeated_after_a_commit_by_hand(impatient, rival, ledger):
    """What was committed by hand would be written twice: the error is raised at once (P18)."""
    calls = []

    @unit_of_work(retry=3)
    async def write():
        calls.append(1)
        await insert(impatient, f"a{len(calls)}")
        await commit_db_session(impatient)
        rival.execute("BEGIN IMMEDIATE")
        await insert(impatient, "b")

    with pytest.raises(OperationalError, match="locked"):
        await write()
    rival.execute("ROLLBACK")

    assert len(calls) == 1
    assert await ledger.names() == ["a1"]


async def test_nothing_is_repeated_after_a_commit_by_the_sessions_own_method(impatient, rival, ledger):
    """``session.commit()`` counts as a commit by hand (P18)."""
    calls = []

    @unit_of_work(retry=3)
    async def write():
        calls.append(1)
        await insert(impatient, f"a{len(calls)}")
        await (await db_session(impatient)).commit()
        rival.execute("BEGIN IMMEDIATE")
        await insert(impatient, "b")

    with pytest.raises(OperationalError, match="locked"):
        await write()
    rival.execute("ROLLBACK")

    assert len(calls) == 1
    assert await ledger.names() == ["a1"]


async def test_nothing_is_repeated_after_an_atomic_block(impatient, rival, ledger):
    """The commit of an ``atomic_db_session`` block counts as one by hand (P18)."""
    calls = []

    @unit_of_work(retry=3)
    async def write():
        calls.append(1)
        async with atomic_db_session(impatient):
            await insert(impatient, f"a{len(calls)}")
        rival.execute("BEGIN IMMEDIATE")
        await insert(impatient, "b")

    with pytest.raises(OperationalError, match="locked"):
        await write()
    rival.execute("ROLLBACK")

    assert len(calls) == 1
    assert await ledger.names() == ["a1"]


async def test_nothing_is_repeated_when_another_connect_has_committed(other, impatient, rival):
    """Two connects, the second fails at the end: the first has committed, and must not commit again (P9, P18)."""
    calls = []
    rival.execute("PRAGMA journal_mode = DELETE")
    rival.execute("INSERT INTO parents (name) VALUES ('p')")

    @unit_of_work(retry=3)
    async def write():
        calls.append(1)
        await insert(other, f"other{len(calls)}")
        await insert(impatient, "a")
        if len(calls) == 1:
            rival.execute("BEGIN")
            rival.execute("SELECT * FROM parents").fetchall()

    with pytest.raises(OperationalError, match="locked"):
        await write()
    rival.execute("ROLLBACK")

    assert len(calls) == 1


async def test_commit_in_doubt_is_not_repeated(impatient, rival):
    """An error that leaves open whether it was committed ends the function, whatever its code says (P18)."""
    calls = []

    @unit_of_work(retry=3)
    async def write():
        calls.append(1)
        try:
            await insert(impatient, "a")
        except OperationalError as exc:
            _outcome_of(exc).in_doubt = True
            raise

    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(OperationalError):
        await write()
    rival.execute("ROLLBACK")

    assert len(calls) == 1


async def test_callbacks_of_a_failed_attempt_are_dropped(impatient, rival, ledger):
    """``on_commit`` of an attempt that was rolled back never runs; that of the last one runs once (P14, P18)."""
    calls = []
    ran = []

    @unit_of_work(retry=2)
    async def write():
        calls.append(1)
        number = len(calls)
        on_commit(lambda: ran.append(number))
        if number == 2:
            rival.execute("ROLLBACK")
        await insert(impatient, "a")

    rival.execute("BEGIN IMMEDIATE")
    await write()

    assert ran == [2]


async def test_read_only_is_refused_where_the_dialect_has_it_not(db, ledger):
    """SQLite has no read-only transactions: an error, never a unit that writes (P17)."""

    @unit_of_work(read_only=True)
    async def write():
        await insert(db, "a")

    with pytest.raises(UnsupportedOptionError, match=r"'db'.*read_only"):
        await write()

    assert await ledger.names() == []
