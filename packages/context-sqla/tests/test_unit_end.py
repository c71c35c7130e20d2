"""What happens at the very end of a unit: cancelled commits, children that write meanwhile, bodies whose client has left."""

import asyncio
import contextlib
import contextvars
import gc
import itertools
import sys
import weakref

import aiosqlite
import pytest
from context_sqla import (
    DBConnect,
    close_all_sessions,
    commit_all_sessions,
    commit_db_session,
    committed_connects,
    db_context,
    db_session,
    get_db_session_from_context,
    on_commit,
    pop_db_session_from_context,
    put_db_session_to_context,
    rollback_all_sessions,
    rollback_db_session,
    run_in_new_ctx,
)
from context_sqla._settle import settle
from context_sqla.adapters import Phase, Policy, Unit
from context_sqla.errors import ContextClosedError, ContextSqlaError
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import await_only
from support.deadline import until


@pytest.fixture(name="db")
async def _db(tmp_path):
    db = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}", name="db", cleanup_timeout=2)
    async with db_context():
        await (await db_session(db)).execute(text("CREATE TABLE items (name TEXT UNIQUE)"))
    yield db
    await db.close()


async def insert(db, name):
    await (await db_session(db)).execute(text("INSERT INTO items VALUES (:name)"), {"name": name})


async def names(db):
    async with db_context():
        return list(await (await db_session(db)).scalars(text("SELECT name FROM items ORDER BY name")))


async def test_cancelled_commit_that_succeeds_runs_its_callbacks(db):
    """A COMMIT is awaited to its end although its task is cancelled, and so are the callbacks that wait for it (P7, P14)."""
    committing = asyncio.Event()
    go_on = asyncio.Event()
    ran = []

    async def hold(session, host):
        committing.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async def work():
        async with db_context():
            await insert(db, "a")
            on_commit(lambda: ran.append("callback"))

    db.committed.append(hold)
    task = asyncio.create_task(work())
    await asyncio.wait_for(committing.wait(), 10)
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    db.committed.clear()

    assert ran == ["callback"]
    assert committed_connects(caught.value) == ("db",)
    assert await names(db) == ["a"]


async def _block(write):
    async with db_context():
        await write()


@contextlib.asynccontextmanager
async def request():
    unit = Unit.enter()
    try:
        yield unit
    except BaseException as exc:
        await unit.close(exc)
        raise


async def _head(write):
    async with request() as unit:
        await write()
        await unit.head(200)


async def _end_of_body(write):
    async with request() as unit:
        await unit.head(200)
        await write()
        await unit.end_of_body()


async def _background(write):
    async with request() as unit:
        await unit.head(200)
        await unit.end_of_body()
        await write()
        await unit.close()


async def _all_by_hand(write):
    async with db_context():
        await write()
        await commit_all_sessions()


async def _one_by_hand(write):
    async with db_context():
        for connect in await write():
            await commit_db_session(connect)


async def _by_session(write):
    async with db_context():
        for connect in await write():
            await (await db_session(connect)).commit()


@pytest.fixture(name="other")
async def _other(tmp_path):
    other = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}", name="other")
    async with db_context():
        await (await db_session(other)).execute(text("CREATE TABLE items (name TEXT UNIQUE)"))
    yield other
    await other.close()


_OF_ALL = {"block": _block, "head": _head, "end of body": _end_of_body, "background": _background, "commit_all": _all_by_hand}
_OF_ONE = {"commit_db_session": _one_by_hand, "session.commit": _by_session}


async def cancelled_once(work, waiting, go_on):
    """Run work, cancel it when it waits, let it go on, and return what it was cancelled with."""
    task = asyncio.create_task(work)
    await asyncio.wait_for(waiting.wait(), 10)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    return caught.value


@pytest.mark.parametrize(
    ("unit", "waits", "several"),
    [
        *itertools.product(_OF_ALL, ["unit", "connect", "hook"], [False, True]),
        *itertools.product(_OF_ONE, ["connect", "hook"], [False]),
    ],
)
async def test_cancellation_after_the_commit_names_what_is_committed(db, other, unit, waits, several):
    """Whatever waited for the commit when the cancellation came, and whoever made the commit (P7, P9)."""
    connects = [db, other] if several else [db]
    waiting, go_on = asyncio.Event(), asyncio.Event()

    async def wait(*_):
        waiting.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async def write():
        for connect in connects:
            await insert(connect, "a")
        if waits != "hook":
            on_commit(wait, connect=connects[-1] if waits == "connect" else None)
        return connects

    if waits == "hook":
        connects[-1].committed.append(wait)
    cancelled = await cancelled_once((_OF_ALL | _OF_ONE)[unit](write), waiting, go_on)
    connects[-1].committed.clear()

    assert committed_connects(cancelled) == tuple(connect.name for connect in connects)
    assert [await names(connect) for connect in connects] == [["a"]] * len(connects)
    assert [connect.pool_status().checked_out for connect in connects] == [0] * len(connects)


@pytest.mark.parametrize("by", ["commit_db_session", "session.commit"])
async def test_cancellation_of_a_callback_names_what_was_committed_by_hand(db, by):
    """What waits for the whole unit runs at its end, when nothing is left to be committed (P9, P14)."""
    waiting = asyncio.Event()

    async def wait():
        waiting.set()
        await asyncio.Event().wait()

    async def work():
        async with db_context():
            await insert(db, "a")
            on_commit(wait)
            await (commit_db_session(db) if by == "commit_db_session" else (await db_session(db)).commit())

    db.drain_timeout = 0.05
    task = asyncio.create_task(work())
    await asyncio.wait_for(waiting.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert committed_connects(caught.value) == ("db",)
    assert await names(db) == ["a"]


async def test_cancellation_in_the_clean_up_names_what_is_committed(db, other):
    """Background work is committed, while the body that its client did not read to the end is still being rolled back (P8, P9)."""
    rolling_back, go_on = asyncio.Event(), asyncio.Event()

    async def hold():
        rolling_back.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async def work():
        async with request() as unit:
            units.append(unit)
            await unit.head(200)
            await insert(db, "body")
            unit.disconnected()
            await asyncio.wait_for(rolling_back.wait(), 10)
            await insert(other, "background")
            await unit.close()

    units = []
    engine = (await db.session_maker()).kw["bind"].sync_engine
    event.listen(engine, "rollback", lambda _: await_only(hold()))
    task = asyncio.create_task(work())
    await until(lambda: units and units[0].phase is Phase.CLOSED)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert committed_connects(caught.value) == ("other",)
    assert (await names(db), await names(other)) == ([], ["background"])


async def test_commit_that_was_cancelled_is_not_kept_until_its_limit(db):
    """A storm of disconnects is no store of units: the limit of what goes on behind a cancelled task ends with it (P7)."""
    committing = asyncio.Event()
    go_on = asyncio.Event()
    units = []

    async def hold(session, host):
        committing.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async def request():
        unit = Unit.enter()
        units.append(weakref.ref(unit))
        try:
            await insert(db, "a")
            await unit.head(200)
        except asyncio.CancelledError as exc:
            await unit.close(exc)
            raise

    db.committed.append(hold)
    task = asyncio.create_task(request(), context=contextvars.Context())
    await asyncio.wait_for(committing.wait(), 10)
    task.cancel()
    go_on.set()
    await asyncio.wait((task,))
    db.committed.clear()
    assert task.cancelled()
    del task
    gc.collect()

    assert [unit() for unit in units] == [None]


async def test_child_that_writes_during_the_callbacks_is_refused(db):
    """What a child writes after the last commit would be lost: it is told so (P10)."""
    errors = []

    async def child():
        try:
            await insert(db, "late")
        except ContextClosedError as exc:
            errors.append(exc)

    async with db_context():
        await insert(db, "a")
        inside = asyncio.Event()
        late = asyncio.create_task(_after(inside, child))

        async def callback():
            inside.set()
            await late

        on_commit(callback)

    assert [type(error) for error in errors] == [ContextClosedError]
    assert await names(db) == ["a"]


async def test_callback_that_is_cancelled_by_itself_stops_nothing(db):
    """A callback whose own task was cancelled is an error in a callback, like any other (P14)."""
    ran = []

    async def cancelled():
        raise asyncio.CancelledError

    async with db_context():
        await insert(db, "a")
        on_commit(cancelled)
        on_commit(lambda: ran.append("next"))

    assert ran == ["next"]
    assert await names(db) == ["a"]


async def test_body_that_goes_on_after_its_client_left_is_rolled_back(db):
    """The last message of a body whose client has left commits nothing; background work after it does (P5, P6)."""
    unit = Unit.enter()
    await unit.head(200)
    await insert(db, "before")
    unit.disconnected()
    await insert(db, "after")
    await unit.end_of_body()
    await insert(db, "background")
    await unit.close()

    assert await names(db) == ["background"]


@pytest.mark.parametrize("seen", ["before", "after"])
async def test_body_that_is_cancelled_late_writes_nothing(db, other, seen):
    """What a body writes between its client's leaving and its own end is rolled back; background work is not (P5, P6)."""
    ran = []
    began, left, wrote = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def body():
        if seen == "before":
            unit.in_body()
            await insert(db, "body")
        began.set()
        await left.wait()
        unit.in_body()
        await insert(db, "late")
        await asyncio.gather(insert(other, "late"))
        on_commit(lambda: ran.append("late"))
        on_commit(lambda: ran.append("late"), connect=db)
        wrote.set()
        await asyncio.Event().wait()

    unit = Unit.enter()
    await insert(db, "handler")
    await unit.head(200)
    task = asyncio.create_task(body())
    await began.wait()
    unit.disconnected()
    left.set()
    await asyncio.wait_for(wrote.wait(), 10)
    task.cancel()
    await asyncio.wait((task,))
    on_commit(lambda: ran.append("work"))
    await asyncio.gather(insert(db, "work"), insert(other, "work"))
    await unit.close()

    assert (await names(db), await names(other)) == (["handler", "work"], ["work"])
    assert ran == ["work"]


async def test_body_that_goes_on_commits_and_rolls_back_by_hand(db, other):
    """By hand, a body whose client has left ends its own sessions, and nothing is committed but what it commits (P5, P17)."""
    ran = []
    unit = Unit.enter()
    await unit.head(200)
    unit.in_body()
    unit.disconnected()
    await insert(db, "one")
    on_commit(lambda: ran.append("one"), connect=db)
    await commit_db_session(db)
    await insert(db, "two")
    await insert(other, "two")
    await commit_all_sessions()
    await insert(db, "three")
    await rollback_all_sessions()
    await insert(db, "four")
    await close_all_sessions()
    await insert(db, "five")
    taken = pop_db_session_from_context(db)
    await unit.close()
    await taken.close()

    assert (await names(db), await names(other)) == (["one", "two"], ["two"])
    assert ran == ["one"]


async def test_body_that_runs_ahead_commits_by_hand(db, other):
    """A body that has begun before its head commits its own session by hand, and its callbacks wait for its end (P14, P17)."""
    ran = []
    unit = Unit.enter(runs_ahead=lambda unit: ahead)
    ahead = False
    await insert(other, "handler")
    ahead = True
    await insert(db, "body")
    on_commit(lambda: ran.append("body"))
    await commit_db_session(db)
    committed = await names(db)
    await insert(db, "end")
    ahead = False
    on_commit(lambda: ran.append("handler"))
    await unit.head(200)
    before = list(ran)
    await unit.end_of_body()
    await unit.close()

    assert committed == ["body"]
    assert (before, ran) == (["handler"], ["handler", "body"])
    assert (await names(db), await names(other)) == (["body", "end"], ["handler"])


async def test_body_that_goes_on_cannot_close_its_connect(db):
    """`DBConnect.close()` would wait for the unit that calls it, also where the session is that of such a body (P15)."""
    unit = Unit.enter()
    await unit.head(200)
    unit.in_body()
    unit.disconnected()
    await db_session(db)
    with pytest.raises(ContextSqlaError, match="close"):
        await db.close()
    await unit.close()


async def test_body_that_runs_ahead_drops_its_callbacks_with_what_it_rolls_back(db, other):
    """A rollback by hand drops the callbacks of a body that has begun before its head, and none of the handler's (P14, P17)."""
    ran = []
    unit = Unit.enter(runs_ahead=lambda unit: ahead)
    ahead = False
    await insert(other, "handler")
    on_commit(lambda: ran.append("handler"))
    ahead = True
    await insert(db, "lost")
    on_commit(lambda: ran.append("lost"))
    await rollback_all_sessions()
    await insert(db, "body")
    on_commit(lambda: ran.append("body"))
    ahead = False
    await unit.head(200)
    await unit.end_of_body()
    await unit.close()

    assert (await names(db), await names(other)) == (["body"], ["handler"])
    assert ran == ["handler", "body"]


@pytest.mark.parametrize("when", ["ahead", "late"])
async def test_session_that_a_body_puts_into_its_unit_is_its_own(db, when):
    """A session that is put into the unit by a body goes with those of the body, and is found by it (P3, P5)."""
    unit = Unit.enter(runs_ahead=lambda unit: ahead)
    ahead = when == "ahead"
    if when == "late":
        await unit.head(200)
        unit.in_body()
        unit.disconnected()
    session = await db.create_session()
    put_db_session_to_context(db, session)
    found = get_db_session_from_context(db), await db_session(db)
    await insert(db, "body")
    ahead = False
    await unit.head(200)
    before = await names(db)
    if when == "ahead":
        await unit.end_of_body()
    await unit.close()

    assert found == (session, session)
    assert (before, await names(db)) == ([], ["body"] if when == "ahead" else [])


async def test_child_of_a_body_that_goes_on_leaves_it_its_session(db):
    """When a child task of such a body is done, the body keeps the session that both use, and what it commits by hand (P2, P17)."""

    async def body():
        unit.in_body()
        unit.disconnected()
        session = await db_session(db)
        await asyncio.gather(insert(db, "child"))
        await session.execute(text("INSERT INTO items VALUES ('body')"))
        await commit_db_session(db)
        await insert(db, "late")

    unit = Unit.enter()
    await unit.head(200)
    await asyncio.create_task(body())
    await insert(db, "work")
    await unit.close()

    assert await names(db) == ["body", "child", "work"]


async def test_body_that_goes_on_alone_after_its_client_left_commits_nothing(db):
    """A body that is told of it by its own writing and goes on in spite of it is rolled back, however it ends (P5)."""
    unit = Unit.enter()
    await unit.head(200)
    await insert(db, "before")
    unit.in_body()
    unit.disconnected()
    await insert(db, "after")
    await unit.close()

    assert await names(db) == []


async def test_body_whose_last_byte_comes_after_its_client_left_keeps_nothing_open(db):
    """A body that ends all the same, after its client has left, frees its connection for background work (P5, P6)."""
    unit = Unit.enter()
    await unit.head(200)
    unit.in_body()
    unit.disconnected()
    await insert(db, "after")
    await unit.end_of_body()
    open_then = db.pool_status().checked_out
    await insert(db, "background")
    await unit.close()

    assert open_then == 0
    assert await names(db) == ["background"]


@pytest.mark.parametrize("asked", ["before", "after"])
async def test_background_work_gets_no_session_that_a_body_was_opening(tmp_path, asked):
    """What asks while a session is being opened for a body that was given up gets one of its own, and keeps its writes (P2, P6)."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def choose(connect):
        entered.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async def body():
        unit.in_body()
        await insert(db, "body")

    db = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}", name="db", before_create_session_handler=choose)
    go_on.set()
    async with db_context():
        await (await db_session(db)).execute(text("CREATE TABLE items (name TEXT UNIQUE)"))
    entered.clear()
    go_on.clear()
    unit = Unit.enter()
    await unit.head(200)
    if asked == "after":
        unit.disconnected()
    task = asyncio.create_task(body())
    await asyncio.wait_for(entered.wait(), 10)
    if asked == "before":
        unit.disconnected()
    task.cancel()
    await asyncio.wait((task,))
    work = asyncio.create_task(insert(db, "work"))
    await asyncio.sleep(0)
    go_on.set()
    await work
    await unit.close()

    assert await names(db) == ["work"]
    await db.close()


async def test_task_that_serves_many_requests_keeps_none_of_their_units(db):
    """What `close_with` leaves on a task is gone when its unit has ended, or a long connection would keep every request."""

    async def connection():
        units = []
        for name in ("a", "b"):
            unit = Unit.enter()
            unit.close_with(asyncio.current_task())
            await insert(db, name)
            await unit.head(200)
            await unit.end_of_body()
            await unit.close()
            units.append(weakref.ref(unit))
        del unit
        await asyncio.sleep(0)  # the loop calls back for the task of the last commit, which is done
        gc.collect()
        return [ref() for ref in units]

    assert await asyncio.create_task(connection()) == [None, None]
    assert await names(db) == ["a", "b"]


async def test_mark_leaves_a_unit_inside_alone(db):
    """Middleware may have opened one around the rest of the application: code inside stays in it (P11)."""
    unit = Unit.enter()
    async with db_context():
        own = await db_session(db)
        unit.mark(None, Unit.is_at_mark)
        inside = await db_session(db)
    outside = unit.is_at_mark()
    await unit.close()

    assert inside is own
    assert outside


async def test_context_that_outlives_its_request_keeps_nothing_of_it(db):
    """A pooled connection keeps the context in which it was opened, as every transport does: not the request with it."""

    class Request:
        """What a label reads."""

        path = "/users"

    async def respond():
        request = Request()
        unit = Unit.enter(Policy(label=lambda request: request.path), request)
        unit.mark(request, lambda unit: request is None)
        kept = contextvars.copy_context()
        await insert(db, "a")
        await unit.head(200)
        await unit.end_of_body()
        await unit.close()
        return kept, weakref.ref(request)

    kept, request = await respond()
    gc.collect()

    assert request() is None
    assert kept


@pytest.mark.parametrize("ends", ["failed", "given up"])
async def test_context_that_outlives_its_request_keeps_no_callback(db, ends):
    """What a callback that never ran knows of the request is let go as well, and what cleaned up is no cycle."""

    class Request:
        """What a callback reads."""

    async def respond():
        request = Request()
        unit = Unit.enter()
        await insert(db, "a")
        if ends == "given up":
            await unit.head(200)
            await insert(db, "b")
        on_commit(lambda: request)
        on_commit(lambda: request, connect=second)
        if ends == "given up":
            unit.disconnected()
        kept = contextvars.copy_context()
        await unit.close(ZeroDivisionError())
        return kept, weakref.ref(request), weakref.ref(unit)

    second = DBConnect.from_url("sqlite+aiosqlite://", name="second")
    gc.disable()
    try:
        kept, request, unit = await asyncio.create_task(respond())
        assert request() is None
        await asyncio.sleep(0)
        del kept
        assert unit() is None
    finally:
        gc.enable()


class Request:
    """What a framework keeps in a context variable of its own, for as long as the context lives."""


request_of: contextvars.ContextVar[Request] = contextvars.ContextVar("request_of")


def request_in_context():
    request = Request()
    request_of.set(request)
    return weakref.ref(request)


async def test_cancelled_request_is_not_kept_by_the_limit_of_its_end(db):
    """Commit and callbacks of a cancelled request are bounded in time: what bounds them ends with them, and holds nothing (P7)."""
    at_work = asyncio.Event()
    go_on = asyncio.Event()
    kept = []

    async def hold():
        at_work.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async def work():
        kept.append(request_in_context())
        async with db_context():
            await insert(db, "a")
            on_commit(hold)

    task = asyncio.create_task(work())
    await asyncio.wait_for(at_work.wait(), 10)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.wait((task,))
    assert task.cancelled()
    del task
    await asyncio.sleep(0)  # what woke this task up holds the other
    gc.collect()

    assert [request() for request in kept] == [None]
    assert await names(db) == ["a"]


async def test_search_for_unused_hosts_keeps_no_request(tmp_path):
    """A request that changes the host begins the search, which comes again and again: not with that request (P13)."""
    db = DBConnect(
        lambda host: create_async_engine(f"sqlite+aiosqlite:///{tmp_path / host}"), async_sessionmaker, "one", name="db"
    )
    kept = []

    async def work():
        kept.append(request_in_context())
        for host in ("one", "two", "one"):
            await db.change_host(host)
            async with db_context():
                await (await db_session(db)).execute(text("SELECT 1"))

    await asyncio.create_task(work())
    await asyncio.sleep(0)  # what woke this task up holds the other
    gc.collect()
    still_there = [request() for request in kept]
    await db.close()

    assert still_there == [None]


async def test_unit_that_nobody_has_closed_ends_with_its_task(db):
    """`close_with` takes the place of `close`; the end of the connect waits for it."""

    async def connection():
        unit = Unit.enter()
        unit.close_with(asyncio.current_task())
        await insert(db, "a")
        return unit

    unit = await asyncio.create_task(connection())
    await db.close()

    assert unit.phase is Phase.CLOSED
    assert await names(db) == []


async def test_listener_that_replaces_errors_leaves_no_statement_running(db):
    """An application's handle_error listener that raises does not make its unit wait for a statement that has ended (P4a, P7a)."""

    class Taken(Exception):
        """The application's own error."""

    def translate(context):
        if isinstance(context.sqlalchemy_exception, IntegrityError):
            raise Taken

    url = (await db.session_maker()).kw["bind"].url

    def create(host):
        engine = create_async_engine(url)
        event.listen(engine.sync_engine, "handle_error", translate)  # before the core's own
        return engine

    own = DBConnect(create, async_sessionmaker, "local", name="own", cleanup_timeout=2)
    async with db_context():
        await insert(own, "a")
        session = await db_session(own)
        with pytest.raises(Taken):
            async with session.begin_nested():
                await insert(own, "a")
    await own.close()

    assert await names(db) == ["a"]


@pytest.mark.parametrize("by", ["session.commit", "commit_db_session", "session.rollback"])
async def test_child_that_ends_the_transaction_at_the_very_moment_of_the_commit(db, tmp_path, by):
    """A commit or rollback by hand that began just before the unit's own commit is awaited, and is no error (P7a)."""
    due = asyncio.Event()
    other = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path}/other.db")  # of two sessions a task of its own makes the commits

    async def tell(session):
        due.set()  # whoever waits for it goes on before the task that commits

    async def child(session):
        await due.wait()
        by_hand = {
            "session.commit": session.commit,
            "commit_db_session": lambda: commit_db_session(db),
            "session.rollback": session.rollback,
        }
        with contextlib.suppress(ContextClosedError):  # of two commits the second may come when the unit has ended
            await by_hand[by]()

    async with db_context(before_commit=tell):
        await insert(db, "a")
        task = asyncio.create_task(child(await db_session(db)))
        await (await db_session(other)).execute(text("SELECT 1"))
    await task
    await other.close()

    assert await names(db) == ([] if by == "session.rollback" else ["a"])


@pytest.mark.parametrize("phase", ["block", "head", "body"])
async def test_hook_that_asks_for_another_connect_is_committed_with_it(db, tmp_path, phase):
    """What a before_commit hook writes elsewhere is committed before the answer, and is not lost with the unit (P4, P10)."""
    other = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path}/other.db", name="other")
    async with db_context():
        await (await db_session(other)).execute(text("CREATE TABLE items (name TEXT UNIQUE)"))
    ran = []

    async def audit(session):
        if not other_is_open():
            await insert(other, "audit")

    def other_is_open():
        return get_db_session_from_context(other) is not None

    policy = Policy(before_commit=audit)
    if phase == "block":
        async with db_context(before_commit=audit):
            await insert(db, "a")
            on_commit(lambda: ran.append("callback"))
    else:
        unit = Unit.enter(policy)
        if phase == "body":
            await unit.head(200)
        await insert(db, "a")
        on_commit(lambda: ran.append("callback"))
        await (unit.head(200) if phase == "head" else unit.end_of_body())
        assert await names_elsewhere(other) == ["audit"]
        await unit.end_of_body()
        await unit.close()

    assert await names(db) == ["a"]
    assert await names(other) == ["audit"]
    assert ran == ["callback"]
    await other.close()


async def work_that_a_hook_adds_to(db, other, ran):
    async def audit(session):
        if get_db_session_from_context(other) is None:
            await insert(other, "audit")

    async with db_context(before_commit=audit):
        await insert(db, "a")
        on_commit(lambda: ran.append("unit"))


async def test_commit_of_what_a_hook_has_opened_names_those_before(db, other):
    """A hook asks for another connect, which is committed after the first: if that fails, its error says so (P9)."""

    def fail(_connection):
        raise ZeroDivisionError

    ran = []
    engine = (await other.session_maker()).kw["bind"].sync_engine
    event.listen(engine, "commit", fail)
    with pytest.raises(ZeroDivisionError) as caught:
        await work_that_a_hook_adds_to(db, other, ran)
    event.remove(engine, "commit", fail)

    assert committed_connects(caught.value) == ("db",)
    assert "already committed: db; not committed: other (P9)" in caught.value.__notes__
    assert (await names(db), await names(other), ran) == (["a"], [], [])


async def test_cancellation_before_the_commit_of_what_a_hook_has_opened(db, other):
    """What is committed is not all: the callbacks of the unit wait for it in vain (P9, P14)."""
    ran, waiting, go_on = [], asyncio.Event(), asyncio.Event()

    async def wait(session, host):
        waiting.set()
        await asyncio.wait_for(go_on.wait(), 10)

    db.committed.append(wait)
    cancelled = await cancelled_once(work_that_a_hook_adds_to(db, other, ran), waiting, go_on)
    db.committed.clear()

    assert committed_connects(cancelled) == ("db",)
    assert (await names(db), await names(other), ran) == (["a"], [], [])


async def names_elsewhere(connect):
    return await run_in_new_ctx(names, connect)


async def test_late_connection_whose_reset_hangs_is_given_up(tmp_path):
    """A connection that opens after its unit has ended is closed, and that is bounded by cleanup_timeout as well (P7, P10)."""
    opening, go_on = asyncio.Event(), asyncio.Event()
    resets = []

    async def open_late():
        opening.set()
        await go_on.wait()
        return await aiosqlite.connect(tmp_path / "late.db")

    async def hang(driver):
        resets.append(driver)
        await asyncio.Event().wait()

    def create(host):
        engine = create_async_engine("sqlite+aiosqlite://", async_creator=open_late, pool_size=1, poolclass=AsyncAdaptedQueuePool)
        event.listen(engine.sync_engine, "reset", lambda dbapi, record, state: dbapi.run_async(hang))
        return engine

    own = DBConnect(create, async_sessionmaker, "local", name="own", cleanup_timeout=0.1)
    with pytest.raises(ZeroDivisionError):
        async with db_context():
            task = asyncio.create_task(insert(own, "late"))
            await opening.wait()
            raise ZeroDivisionError
    go_on.set()
    with pytest.raises(ContextClosedError):
        await task
    await until(lambda: own.pool_status().checked_out == 0)
    await own.close()

    assert len(resets) == 1


@pytest.mark.parametrize("opens", [True, False], ids=["opens", "fails"])
async def test_statement_whose_connection_opens_after_the_rollback_is_refused(db, tmp_path, opens):
    """What was asked for before a decision to roll back is not done after it; the session itself goes on (P3, P7a)."""
    opening, go_on = asyncio.Event(), asyncio.Event()

    async def open_late():
        opening.set()
        await go_on.wait()
        if not opens and child in asyncio.all_tasks():
            raise OSError("unable to open database file")
        return await aiosqlite.connect(tmp_path / "app.db")

    def create(host):
        return create_async_engine("sqlite+aiosqlite://", async_creator=open_late, poolclass=AsyncAdaptedQueuePool)

    own = DBConnect(create, async_sessionmaker, "local", name="own", cleanup_timeout=0.5)
    async with db_context():
        child = asyncio.create_task(insert(own, "early"))
        await opening.wait()
        await rollback_db_session(own)
        go_on.set()
        with pytest.raises(ContextClosedError if opens else OSError):
            await child
        await insert(own, "late")
    await own.close()

    assert await names(db) == ["late"]


async def _after(event, work):
    await asyncio.wait_for(event.wait(), 10)
    await work()


async def test_what_a_flush_adds_is_flushed_before_anything_is_committed(db, tmp_path):
    """A listener that adds to its session at the end of a flush cannot let one database commit and another fail (P9)."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "items"
        name: Mapped[str] = mapped_column(primary_key=True)

    other = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}", name="other")
    async with db_context():
        await (await db_session(other)).execute(text("CREATE TABLE items (name TEXT UNIQUE)"))
        await insert(other, "taken")
    with pytest.raises(IntegrityError):
        async with db_context():
            await insert(db, "a")
            session = await db_session(other)
            session.add(Item(name="b"))
            event.listen(
                session.sync_session, "after_flush_postexec", lambda flushed, _: flushed.add(Item(name="taken")), once=True
            )
    await other.close()

    assert await names(db) == []


def test_loop_that_is_closed_in_a_commit_is_not_called(monkeypatch):
    """Nobody awaits what was left in it; asyncio complains of the task, and nothing else is to be said."""
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)

    async def endless():
        await asyncio.get_running_loop().create_future()

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    task = loop.create_task(settle(endless))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    del task
    gc.collect()

    assert raised == []
