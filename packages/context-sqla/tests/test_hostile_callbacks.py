"""What the application gives the core to call, and that misbehaves: it raises, returns nonsense, never returns, calls back."""

import asyncio
import contextvars
import logging

import pytest
from anyio import from_thread, to_thread
from context_sqla import (
    ContextClosedError,
    ContextSqlaError,
    DBConnect,
    ForeignLoopError,
    UnavailableError,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_context,
    db_session,
    init_db_session_ctx,
    is_context_initiated,
    new_non_ctx_session,
    on_commit,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_db_session,
    run_in_new_ctx,
)
from context_sqla.adapters import Policy, Unit
from context_sqla.testing import rollback_session
from sqlalchemy import text
from support.databases import Databases, no_tasks_left
from support.rows import insert

LIMIT = 30  # seconds after which a test hangs


class Odd(BaseException):
    """What no handler of exceptions expects."""


KINDS = [ZeroDivisionError, asyncio.CancelledError, GeneratorExit, Odd]


@pytest.fixture(name="databases")
async def _databases(tmp_path):
    """Databases in files; at the end everything is given back, closed and over, whatever the test did."""
    async with no_tasks_left() as problems:
        databases = Databases("aiosqlite", tmp_path)
        async with asyncio.timeout(LIMIT):
            yield databases
        await databases.whole(problems)
        await databases.gone(problems)
    assert problems == []


@pytest.fixture(name="base")
async def _base(databases):
    return await databases.database("first")


@pytest.fixture(name="db")
async def _db(databases, base):
    return databases.connect(base)


async def write(db, name="a"):
    async with db_context():
        await insert(db, name)


# before_create_session_handler


async def _waits_for(connect):
    await asyncio.wait_for(db_session(connect), LIMIT)


async def _gathers(connect):
    await asyncio.gather(db_session(connect))


async def _opens_a_unit(connect):
    async with db_context():
        await db_session(connect)


async def _creates(connect):
    await connect.create_session()


async def _opens_its_own(connect):
    async with new_non_ctx_session(connect):
        pass


async def _opens_one_for_tests(connect):
    async with rollback_session(connect):
        pass


ROUNDABOUT = [db_session, _waits_for, _gathers, _opens_a_unit, _creates, _opens_its_own, _opens_one_for_tests]


@pytest.mark.parametrize("ask", [*ROUNDABOUT, lambda connect: connect.ping()])
async def test_handler_that_asks_for_its_own_connect_is_told(databases, base, ask):
    """On whichever way it asks: it would wait for itself, or ask for the next session without end (P13, P19)."""

    async def choose(connect):
        await ask(connect)

    db = databases.connect(base, handler=choose)
    with pytest.raises(ContextSqlaError, match="'db'.*its before_create_session_handler asked for a session of the connect"):
        await write(db)

    assert databases.engines == []


async def test_handlers_that_ask_each_other_are_told(databases, base):
    """Two handlers in a circle are one that asks itself (P13, P19)."""
    connects = {}

    async def ask_right(connect):
        await db_session(connects["right"])

    async def ask_left(connect):
        await db_session(connects["left"])

    connects["left"] = databases.connect(base, "left", handler=ask_right)
    connects["right"] = databases.connect(base, "right", handler=ask_left)
    with pytest.raises(ContextSqlaError, match="'left'.*asked for a session of the connect itself"):
        await write(connects["left"])


async def test_task_that_a_handler_starts_may_ask_afterwards(databases, base):
    """A monitor that the handler starts is none of its calls once it has returned (P13)."""
    returned = asyncio.Event()
    tasks = []

    async def later(connect):
        await returned.wait()
        await run_in_new_ctx(insert, connect, "later")

    async def choose(connect):
        if not tasks:
            tasks.append(asyncio.create_task(later(connect)))

    db = databases.connect(base, handler=choose)
    await write(db)
    returned.set()
    await tasks[0]

    assert await base.ledger.names() == ["a", "later"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda connect: "local", "before_create_session_handler must be an async function; it returned str"),
        (lambda connect: None, "before_create_session_handler must be an async function; it returned NoneType"),
        (lambda connect: _answer(5), "its before_create_session_handler: a host is a string, not int"),
        (lambda connect: _answer(["local"]), "a host is a string, not list"),
        (lambda connect: _answer(True), "a host is a string, not bool"),
        (lambda connect: _answer(""), "a host must not be empty"),
        (lambda connect: _answer(" "), "a host must not be empty"),
    ],
)
async def test_handler_that_returns_nonsense_is_told(databases, base, answer, says):
    """With the connect, and where it came from (P13, P19)."""
    db = databases.connect(base, handler=answer)
    with pytest.raises((TypeError, ValueError), match=f"'db'.*{says}"):
        await write(db)

    assert databases.engines == []
    assert db.host == "local"


async def _answer(value):
    return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("askers", [1, 3])
async def test_handler_that_raises_is_seen_by_everybody_who_asked(databases, base, kind, askers):
    """The error as it is, also for those that asked while it was running; the next one asks anew (P2, P13)."""
    error = kind("from the handler")
    fail = True

    async def choose(connect):
        await asyncio.sleep(0)
        if fail:
            raise error

    db = databases.connect(base, handler=choose)
    async with db_context():
        seen = await asyncio.gather(*(_outcome(db) for _ in range(askers)))
        # A task that only ends with a cancellation cannot be told from one that was cancelled.
        expected = ContextClosedError if kind is asyncio.CancelledError else kind
        assert [type(each) for each in seen] == [expected] * askers
        fail = False
        await insert(db, "a")

    assert await base.ledger.names() == ["a"]


async def _outcome(db):
    try:
        return await db_session(db)
    except BaseException as exc:
        return exc


async def test_handler_that_was_cancelled_from_inside_says_so(databases, base):
    """What it awaited was cancelled, and not who asked (P19)."""

    async def choose(connect):
        raise asyncio.CancelledError

    with pytest.raises(ContextClosedError, match="'db'.*handler was cancelled, or what it awaited"):
        await write(databases.connect(base, handler=choose))


async def test_handler_that_never_returns_ends_at_its_limit(databases, base):
    """With a limit it is an ``UnavailableError``, for all who wait (P13)."""
    db = databases.connect(base, handler=lambda connect: asyncio.Event().wait(), handler_timeout=0.01)
    async with db_context():
        seen = await asyncio.gather(*(_outcome(db) for _ in range(3)))

    assert [type(each) for each in seen] == [UnavailableError] * 3


async def test_handler_that_never_returns_ends_with_who_asked(databases, base):
    """Without a limit it ends when the unit does: cancelled, it leaves no task and no connection (P7, P13)."""
    asked = asyncio.Event()

    async def choose(connect):
        asked.set()
        await asyncio.Event().wait()

    db = databases.connect(base, handler=choose)
    task = asyncio.create_task(write(db))
    await asked.wait()
    task.cancel()
    await asyncio.wait((task,))

    assert task.cancelled()


async def test_handler_that_will_not_be_cancelled_does_not_hold_the_unit(databases, base):
    """The unit ends within ``cleanup_timeout``, and what the handler chooses afterwards opens nothing (P7, P10)."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def choose(connect):
        asked.set()
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue

    db = databases.connect(base, handler=choose, cleanup_timeout=0.01)
    task = asyncio.create_task(write(db))
    await asked.wait()
    task.cancel()
    await asyncio.wait((task,))
    go_on.set()

    assert task.cancelled()
    assert databases.engines == []


# before_commit


async def _commits(session):
    await session.commit()


async def _rolls_back(session):
    await session.rollback()


async def _closes(session):
    await session.close()


def _of_the_unit(call, db):
    async def hook(session):
        await call(db)

    return hook


@pytest.fixture(name="hooks")
def _hooks(db):
    """Hooks that end the transaction that they are asked about, by the session's means and by the unit's."""
    own = {call.__name__: call for call in (_commits, _rolls_back, _closes)}
    return own | {call.__name__: _of_the_unit(call, db) for call in (commit_db_session, rollback_db_session, close_db_session)}


NAMES = ["_commits", "_rolls_back", "_closes", "commit_db_session", "rollback_db_session", "close_db_session"]


@pytest.mark.parametrize("where", ["unit", "connect"])
@pytest.mark.parametrize("name", NAMES)
async def test_hook_that_ends_the_transaction_is_told(db, base, hooks, name, where):
    """It was asked whether to commit: an error that names the connect, and nothing is committed (P14, P19)."""
    if where == "connect":
        db.before_commit.append(hooks[name])
    with pytest.raises(ContextSqlaError, match="'db'.*before_commit must not end its transaction"):
        async with db_context(before_commit=hooks[name] if where == "unit" else None):
            await insert(db, "a")

    assert await base.ledger.names() == []
    assert not is_context_initiated()


@pytest.mark.parametrize("how", ["commit_db_session", "session.commit", "atomic_db_session"])
async def test_hook_that_commits_in_a_commit_by_hand_is_told(db, base, how):
    """The same where the application commits by itself; it may roll back and go on (P14, P17)."""
    db.before_commit.append(_commits)
    async with db_context():
        with pytest.raises(
            Exception, match="before_commit must not end its transaction|Method 'commit\\(\\)' can't be called here"
        ):
            if how == "atomic_db_session":
                async with atomic_db_session(db):
                    await insert(db, "a")
            else:
                await insert(db, "a")
                session = await db_session(db)
                await (session.commit() if how == "session.commit" else commit_db_session(db))
        await rollback_db_session(db)
        db.before_commit.clear()
        await insert(db, "b")

    assert await base.ledger.names() == ["b"]


@pytest.mark.parametrize("hook", [lambda session: None, lambda session: True])
@pytest.mark.parametrize("where", ["unit", "connect"])
async def test_hook_that_is_not_asynchronous_is_told(db, base, hook, where):
    """With the connect; nothing is committed (P14, P19)."""
    if where == "connect":
        db.before_commit.append(hook)
    with pytest.raises(TypeError, match="'db'.*before_commit must be an async function; it returned"):
        async with db_context(before_commit=hook if where == "unit" else None):
            await insert(db, "a")

    assert await base.ledger.names() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_hook_that_raises_refuses_the_commit(db, base, kind):
    """With whatever it raises, which is what is raised (P14)."""
    error = kind("from the hook")

    async def refuse(session):
        raise error

    with pytest.raises(kind) as caught:
        async with db_context(before_commit=refuse):
            await insert(db, "a")

    assert caught.value is error or kind is asyncio.CancelledError
    assert await base.ledger.names() == []


async def test_hook_that_never_returns_ends_with_its_unit(db, base):
    """Cancelled, it refuses (P7, P14)."""
    asked = asyncio.Event()

    async def wait(session):
        asked.set()
        await asyncio.Event().wait()

    async def work():
        async with db_context(before_commit=wait):
            await insert(db, "a")

    task = asyncio.create_task(work())
    await asked.wait()
    task.cancel()
    await asyncio.wait((task,))

    assert task.cancelled()
    assert await base.ledger.names() == []


async def test_hook_may_write_in_a_savepoint_and_elsewhere(db, base, databases):
    """What it may do: write, in savepoints too, and commit on sessions of its own (P14)."""
    elsewhere = await databases.database("second")
    other = databases.connect(elsewhere, "other")

    async def audit(session):
        async with session.begin_nested():
            await session.execute(text("INSERT INTO items (name) VALUES ('audit')"))
        await run_in_new_ctx(insert, other, "audit")

    async with db_context(before_commit=audit):
        await insert(db, "a")

    assert await base.ledger.names() == ["a", "audit"]
    assert await elsewhere.ledger.names() == ["audit"]


# on_commit


def _raises(kind):
    def callback():
        raise kind("from the callback")

    return callback


def _takes_an_argument(argument):
    """Be called without it."""


async def _awaits_nonsense():
    await 5  # type: ignore[misc]


@pytest.mark.parametrize("bound", [False, True], ids=["unit", "connect"])
@pytest.mark.parametrize(
    "callback",
    [_raises(ZeroDivisionError), _raises(asyncio.CancelledError), _takes_an_argument, _awaits_nonsense, lambda: object()],
)
async def test_callback_that_fails_changes_nothing(db, base, callback, bound, caplog):
    """It is logged; the rows are there, and the other callbacks run (P14)."""
    ran = []
    async with db_context():
        await insert(db, "a")
        on_commit(lambda: ran.append(1), connect=db if bound else None)
        on_commit(callback, connect=db if bound else None)
        on_commit(lambda: ran.append(2), connect=db if bound else None)

    assert await base.ledger.names() == ["a"]
    assert ran == [1, 2]
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) <= 1


@pytest.mark.parametrize("bound", [False, True], ids=["unit", "connect"])
@pytest.mark.parametrize("kind", [GeneratorExit, Odd])
async def test_callback_that_ends_the_program_goes_through(db, base, kind, bound):
    """What is no ``Exception`` is for those who know it: it is raised, after the commit and a whole clean-up (P8, P14)."""
    with pytest.raises(kind):
        async with db_context():
            await insert(db, "a")
            on_commit(_raises(kind), connect=db if bound else None)

    assert await base.ledger.names() == ["a"]
    assert not is_context_initiated()


@pytest.mark.parametrize("bound", [False, True], ids=["unit", "connect"])
@pytest.mark.parametrize("by_hand", [False, True])
async def test_callback_that_never_returns_does_not_hold_who_was_cancelled(databases, base, bound, by_hand, caplog):
    """Once its unit was cancelled it has ``drain_timeout``; then it is given up, and that is logged (P7, P14)."""
    db = databases.connect(base, commit_timeout=0.05, drain_timeout=0.05)
    waiting = asyncio.Event()

    async def wait():
        waiting.set()
        await asyncio.Event().wait()

    async def work():
        async with db_context():
            await insert(db, "a")
            on_commit(wait, connect=db if bound else None)
            if by_hand:
                await (await db_session(db)).commit()

    task = asyncio.create_task(work())
    await waiting.wait()
    task.cancel()
    await asyncio.wait((task,), timeout=LIMIT / 2)

    assert task.cancelled()
    assert await base.ledger.names() == ["a"]
    assert "An error in an on_commit callback" in caplog.text


async def test_callback_may_do_what_it_likes_in_its_own_unit(db, base, caplog):
    """Commit, fail, register more, close: it is a unit of its own (P14)."""
    ran = []

    async def busy():
        on_commit(lambda: ran.append("inner"))
        await insert(db, "b")
        await commit_db_session(db)
        await close_db_session(db)
        await insert(db, "c")
        await rollback_db_session(db)
        with pytest.raises(ContextSqlaError, match="'db'.*shutdown"):
            await insert(db, "d")
            await db.close()
        raise ZeroDivisionError

    async with db_context():
        await insert(db, "a")
        on_commit(busy)

    assert await base.ledger.names() == ["a", "b"]
    assert ran == []
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("kind", [ZeroDivisionError, TypeError])
async def test_committed_hook_that_fails_changes_nothing(db, base, kind, caplog):
    """Hooks of extensions are logged as callbacks are, and what they leave open is rolled back (P14)."""

    async def fail(session, host):
        await session.execute(text("INSERT INTO items (name) VALUES ('by the hook')"))
        raise kind

    db.committed.append(fail)
    await write(db)

    assert await base.ledger.names() == ["a"]
    assert kind.__name__ in caplog.text


# should_commit, labels and errors


@pytest.mark.parametrize("kind", [ZeroDivisionError, Odd])
async def test_rule_that_raises_decides_nothing(db, base, kind):
    """Its error is that of the head, and everything is rolled back (P3, P8)."""
    unit = Unit.enter(Policy(should_commit=_rule(kind)))
    await insert(db, "a")
    with pytest.raises(kind):
        await unit.head(200)
    await unit.close()

    assert await base.ledger.names() == []


def _rule(kind):
    def rule(status):
        raise kind

    return rule


class Unprintable(Exception):
    """An error that cannot say what it is."""

    def __str__(self):
        raise ZeroDivisionError

    __repr__ = __str__


@pytest.mark.parametrize("name", ["a request", None])
async def test_error_without_a_text_is_cleaned_up_after_as_well(db, base, name):
    """The application's error may be broken itself: it is raised unchanged, everything is rolled back (P3, P8)."""
    error = Unprintable()
    with pytest.raises(Unprintable) as caught:
        async with db_context():
            await insert(db, "a")
            raise error

    assert caught.value is error
    assert await base.ledger.names() == []


async def test_label_that_raises_does_no_harm(db, base):
    """It is only asked for a line in the log (P16)."""
    unit = Unit.enter(Policy(label=_raises(ZeroDivisionError)), object())
    await insert(db, "a")
    await unit.head(200)
    await unit.end_of_body()
    await unit.close()

    assert await base.ledger.names() == ["a"]


# Sessions in the wrong hands


async def test_session_that_is_closed_twice_is_closed(db, base):
    """By hand, by the unit, and again (P17)."""
    async with db_context():
        await insert(db, "a")
        session = await db_session(db)
        await session.close()
        await session.close()
        await insert(db, "b")
        await close_db_session(db)
        await close_db_session(db)
        await session.close()
        await insert(db, "c")

    await session.close()
    assert await base.ledger.names() == ["c"]


@pytest.mark.parametrize("end", [_closes, _commits, _rolls_back])
async def test_session_that_is_ended_inside_a_savepoint(db, base, end):
    """SQLAlchemy says so or takes it; what the savepoint held is not there unless it was committed, and the unit ends well (P17)."""
    try:
        async with db_context():
            await insert(db, "a")
            session = await db_session(db)
            async with session.begin_nested():
                await insert(db, "b")
                await end(session)
    except Exception as exc:
        assert "closed transaction" in str(exc)

    assert await base.ledger.names() == (["a", "b"] if end is _commits else [])
    assert not is_context_initiated()


async def test_second_session_is_not_put_over_the_first(db, base):
    """Nobody would close the first one any more: an error that names the connect and what to do (P8, P19)."""
    async with db_context():
        await insert(db, "a")
        second = await db.create_session()
        for session in (second, await db_session(db)):
            with pytest.raises(ContextSqlaError, match="'db'.*pop_db_session_from_context"):
                put_db_session_to_context(db, session)
    await second.close()

    assert await base.ledger.names() == ["a"]


async def _in_a_thread(fn, *args):
    await asyncio.to_thread(lambda: asyncio.run(fn(*args)))


@pytest.mark.parametrize("opened", ["request", "by hand"])
async def test_thread_that_asks_first_gets_no_session(db, base, opened):
    """The unit belongs to the loop in which it began, whoever asks first: nothing is written that nobody would commit (P15)."""
    if opened == "request":
        unit = Unit.enter()
    else:
        init_db_session_ctx()
        unit = None
    with pytest.raises(ForeignLoopError, match="'db'.*another event loop"):
        await _in_a_thread(insert, db, "a")
    await insert(db, "b")
    if unit is not None:
        await unit.head(200)
        await unit.close()
    else:
        await commit_db_session(db)
        await close_db_session(db)

    assert await base.ledger.names() == ["b"]


async def test_thread_that_was_given_a_session_cannot_use_it(db, base):
    """A session is no more another loop's than its unit: its transaction does not begin there (P15)."""

    async def use(session):
        await session.execute(text("INSERT INTO items (name) VALUES ('a')"))

    async with db_context():
        session = await db_session(db)
        with pytest.raises(ForeignLoopError, match="'db'.*another event loop"):
            await _in_a_thread(use, session)
        await session.rollback()
        await insert(db, "b")

    assert await base.ledger.names() == ["b"]


@pytest.mark.parametrize("asks", [True, False])
def test_session_that_was_put_where_no_loop_ran_belongs_to_the_first_loop(tmp_path, asks):
    """A unit that was opened in synchronous code has no loop yet; asking for its session, or only using it, decides (P15)."""
    db = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}", name="db")

    async def use(token, session):
        if asks:
            assert await db_session(db) is session
        found = await session.scalar(text("SELECT 1"))
        await reset_db_session_ctx(token)
        await db.close()
        return found

    def script():
        with asyncio.Runner() as runner:
            session = runner.run(db.create_session())
            token = init_db_session_ctx()
            put_db_session_to_context(db, session)
            return runner.run(use(token, session), context=contextvars.copy_context())

    assert contextvars.copy_context().run(script) == 1


async def test_unit_that_a_thread_opened_by_hand_runs_in_the_loop_that_the_thread_calls(db, base):
    """A synchronous handler has no loop of its own: what it sends back to the server's loop is that one's (P15)."""

    async def work():
        await insert(db, "a")
        await commit_db_session(db)

    def handler():
        token = init_db_session_ctx()
        from_thread.run(work)
        with pytest.raises(ForeignLoopError, match="'db'.*another event loop"):
            asyncio.run(insert(db, "b"))
        from_thread.run(reset_db_session_ctx, token)

    await to_thread.run_sync(handler)

    assert await base.ledger.names() == ["a"]


# Connects in odd states


async def test_connect_that_is_closed_can_be_used_and_closed_again(db, base):
    """As often as anybody likes (P15)."""
    for name in "abc":
        await write(db, name)
        await db.close()
        await db.close()

    assert await base.ledger.names() == ["a", "b", "c"]


async def test_connect_that_never_was_used_can_be_closed(db):
    """And asked for its pool (P15, P16)."""
    await db.close()

    assert db.pool_status().checked_out == 0
    assert db.abort_host("nowhere") == 0


@pytest.mark.parametrize("kind", [ZeroDivisionError, Odd])
async def test_engine_created_hook_that_raises_leaves_nothing(db, base, kind):
    """Its error is the first session's; the next one tries again (P13)."""

    def fail(engine, host):
        raise kind

    db.engine_created.append(fail)
    with pytest.raises(kind):
        await write(db)
    db.engine_created.clear()
    await write(db)

    assert await base.ledger.names() == ["a"]
