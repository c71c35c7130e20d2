"""P7 and P7a: what is left when a task is cancelled, and when a statement is still running as its unit ends."""

import asyncio
import contextlib
import gc
import itertools

import anyio
import pytest
from context_sqla import (
    ContextClosedError,
    ContextSqlaError,
    DBConnect,
    SessionBusyError,
    close_db_session,
    commit_db_session,
    committed_connects,
    db_context,
    db_session,
    is_context_initiated,
    is_in_doubt,
    on_commit,
    pop_db_session_from_context,
    put_db_session_to_context,
    rollback_db_session,
)
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.util import await_only
from support.deadline import DEADLINE, until
from support.postgres import Postgres
from support.proxy import proxy
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Feature, Route
from support.tables import Child, Item, Parent
from support.wire import Address

#: More suspensions than any request of this file has.
_EVERY = range(1, 10_000)


class Boom(Exception):
    """An error of the application."""


# -------------------------------------------------------------------------------------- cancelled at every suspension of a unit


class Suspensions:
    """Watches a task, and does something when it is suspended for the nth time from now, for each n of ``positions``."""

    def __init__(self, task, positions, act):
        self.seen = 0
        self._task = task
        self._positions = positions
        self._act = act
        self._last = None
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._look)

    def _look(self):
        if self._task.done():
            return
        waiter = self._task._fut_waiter
        if waiter is not None and waiter is not self._last:
            self._last = waiter
            self.seen += 1
            if self.seen in self._positions:
                self._act()
        self._loop.call_soon(self._look)


async def _by_task(work):
    await work(asyncio.current_task().cancel)


async def _by_timeout(work):
    async with asyncio.timeout(None) as limit:
        await work(lambda: limit.reschedule(asyncio.get_running_loop().time()))


async def _by_task_group(work):
    failed = asyncio.Event()

    async def fail():
        await failed.wait()
        raise Boom

    async def run():
        try:
            await work(failed.set)
        finally:
            failed.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
        group.create_task(run())


async def _by_anyio_scope(work):
    with anyio.CancelScope() as scope:
        await work(scope.cancel)


#: How the cancellation comes, and at which suspensions when it comes first at the nth.
_WAYS = {
    "once": (_by_task, lambda n: {n}),
    "twice": (_by_task, lambda n: {n, n + 1}),
    "twice-later": (_by_task, lambda n: {n, n + 2}),
    "storm": (_by_task, lambda n: _EVERY[n - 1 :]),
    "timeout": (_by_timeout, lambda n: {n}),
    "task-group": (_by_task_group, lambda n: {n}),
    "anyio-scope": (_by_anyio_scope, lambda n: {n}),
}


async def _commit(db, n):
    async with db_context():
        await insert(db, f"{n} a")
        await add(db, f"{n} b")


async def _roll_back(db, n):
    async with db_context():
        await insert(db, f"{n} lost")
        raise Boom


async def _by_hand(db, n):
    async with db_context():
        await insert(db, f"{n} lost")
        await rollback_db_session(db)
        await insert(db, f"{n} lost")
        await close_db_session(db)
        await insert(db, f"{n} a")
        await add(db, f"{n} b")
        await commit_db_session(db)


def _forget_upstream_tasks():
    """End what SQLAlchemy 2.1 and aiosqlite 0.22 leave when a second cancellation meets their closing of a connection.

    Without context-sqla it is the same: ``_terminate_graceful_close`` waits for a thread that its own stop() has ended.
    """
    for task in asyncio.all_tasks():
        if "aiosqlite_connection._terminate_graceful_close" in repr(task.get_coro()):
            task.cancel()


async def _sweep(db, ledger, bench, unit, way, positions):
    """Run the unit over and over, cancelled at the 1st, 2nd, ... suspension, until it is not cancelled any more."""
    for n in itertools.count(1):
        ends = []

        async def work(act, n=n, ends=ends):
            watch = Suspensions(asyncio.current_task(), positions(n), act)
            try:
                await unit(db, n)
            except BaseException as exc:
                ends.append(type(exc))
                raise
            finally:
                ends.append((is_context_initiated(), watch.seen))

        task = asyncio.create_task(way(work))
        await asyncio.wait({task}, timeout=DEADLINE)
        task.cancelled() or task.exception()
        *raised, (still_set, seen) = ends

        assert task.done(), n
        assert bench.databases.checked_out() == 0, n
        assert not still_set, n
        await until(lambda: _none(ledger.idle_in_transaction()), message=f"idle in transaction at {n}")
        names = [name.partition(" ")[2] for name in await ledger.names() if name.startswith(f"{n} ")]
        assert names in ([], ["a", "b"]), n
        _forget_upstream_tasks()
        if seen < n:
            return n, raised, names
        # A group cancels two turns of the loop after its other task has failed: by then the work may have ended, whole.
        too_late = way is _by_task_group and (raised, names) == ([], ["a", "b"])
        assert raised == [asyncio.CancelledError] or too_late, n
    raise AssertionError


@pytest.mark.wire
@pytest.mark.parametrize("way", _WAYS)
async def test_cancellation_at_every_suspension_leaves_nothing(db, ledger, bench, way):
    """Wherever a task is cancelled: pool whole, nothing idle in transaction, variable restored, both rows or none (P7)."""
    await _commit(db, "warm")

    tried, raised, names = await _sweep(db, ledger, bench, _commit, *_WAYS[way])

    assert tried > 3
    assert (raised, names) == ([], ["a", "b"])


@pytest.mark.parametrize("way", ["once", "twice", "storm", "anyio-scope"])
@pytest.mark.parametrize("unit", [_roll_back, _by_hand], ids=["rolled-back", "by-hand"])
async def test_cancellation_at_every_suspension_of_other_units(db, ledger, bench, unit, way):
    """The same where the unit rolls back by itself, and where it commits, rolls back and closes by hand (P7)."""
    await _commit(db, "warm")

    tried, raised, names = await _sweep(db, ledger, bench, unit, *_WAYS[way])

    assert tried > 3
    assert (raised, names) == (([Boom], []) if unit is _roll_back else ([], ["a", "b"]))
    assert not [name for name in await ledger.names() if name.endswith("lost")]


@pytest.mark.wire
@pytest.mark.parametrize("way", ["once", "storm"])
async def test_cancellation_while_the_connection_is_opened(db, ledger, bench, way):
    """The same where the unit has to open its connection first (P7)."""

    async def cold(db, n):
        await _commit(db, n)

    async def afresh(work):
        await db.close()
        await _WAYS[way][0](work)

    tried, raised, names = await _sweep(db, ledger, bench, cold, afresh, _WAYS[way][1])
    await db.close()

    assert tried > 3
    assert (raised, names) == ([], ["a", "b"])
    await until(lambda: _none(ledger.backends("db")))


async def _none(found):
    return not await found


# SQLAlchemy and aiosqlite alone have this race too, about once in thirty sweeps: a thread that closes as its loop does.
@pytest.mark.filterwarnings("ignore:<aiosqlite.core.Connection:ResourceWarning")
@pytest.mark.filterwarnings("ignore:unclosed database in <sqlite3.Connection:ResourceWarning")  # Python 3.13; aiosqlite's own
@pytest.mark.wire
async def test_loop_that_shuts_down_leaves_nothing(db, ledger, bench):
    """``asyncio.run`` cancels every task at its end, the clean-up's own too: nothing is left, in any position (P7)."""

    def run(n):
        async def main():
            work = asyncio.create_task(_commit(db, n))
            reached = asyncio.Event()
            watch = Suspensions(work, {n}, reached.set)
            waiting = asyncio.create_task(reached.wait())
            await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
            return watch.seen

        return asyncio.run(main())

    for n in itertools.count(1):
        seen = await asyncio.to_thread(run, n)
        gc.collect()

        assert bench.databases.checked_out() == 0, n
        await until(lambda: _none(ledger.idle_in_transaction()), message=f"idle in transaction at {n}")
        names = [name for name in await ledger.names() if name.startswith(f"{n} ")]
        assert names in ([], [f"{n} a", f"{n} b"]), n
        if seen < n:
            assert names
            break


@pytest.mark.wire
@pytest.mark.parametrize(
    "positions", [lambda n: {n}, lambda n: {n, n + 1}, lambda n: _EVERY[n - 1 :]], ids=["once", "twice", "storm"]
)
@pytest.mark.parametrize("kind", ["answer", "refusal", "stream"])
async def test_cancellation_at_every_suspension_of_a_request(serve, db, ledger, bench, kind, positions):
    """A request whose task is cancelled at any await, whatever its answer, leaves the pool whole and whole rows (P7)."""
    watches = []

    async def body(n):
        yield b"one"
        await insert(db, f"{n} c")
        await add(db, f"{n} d")
        yield b"two"

    async def handler(request):
        n = int(request.query["n"])
        task = asyncio.current_task()
        watches.append((task, Suspensions(task, positions(n), task.cancel)))
        await insert(db, f"{n} a")
        await add(db, f"{n} b")
        return Answer(404 if kind == "refusal" else 200, stream=body(n) if kind == "stream" else None)

    service = await serve(handler)
    for n in itertools.count(1):
        async with service.connect() as connection:
            await connection.send("POST", f"/?n={n}", headers={"connection": "close"})  # Sanic's task is that of the connection
            await until(lambda n=n: len(watches) == n)
            task, watch = watches[-1]
            await asyncio.wait({task}, timeout=DEADLINE)
            connection.abort()

        assert task.done(), n
        await until(lambda: bench.databases.checked_out() == 0, message=f"checked out at {n}")
        await until(lambda: _none(ledger.idle_in_transaction()), message=f"idle in transaction at {n}")
        names = [name.partition(" ")[2] for name in await ledger.names() if name.startswith(f"{n} ")]
        assert (
            names
            in {
                "answer": ([], ["a", "b"]),
                "refusal": ([],),
                "stream": ([], ["a", "b"], ["a", "b", "c", "d"]),
            }[kind]
        ), n
        _forget_upstream_tasks()
        if watch.seen < n:
            break

    assert n > 3
    assert names == {"answer": ["a", "b"], "refusal": [], "stream": ["a", "b", "c", "d"]}[kind]
    assert (await service.get("/elsewhere")).status == 404


# --------------------------------------------------------------------------------- cancelled at one known point, on PostgreSQL


async def _insert_child(db, name="child"):
    """Write a child whose parent is there: COMMIT, and nothing before it, looks the parent up, and waits for a lock on it."""
    session = await db_session(db)
    session.add(Child(name=name, parent_id=1))
    await session.flush()


async def _give_birth(ledger):
    await ledger.execute("INSERT INTO parents (id, name) VALUES (1, 'parent')")


async def _execute(db, name):
    """Write an item by a single statement: a flush that fails would refuse the commit by itself."""
    await (await db_session(db)).execute(text(f"INSERT INTO items (name) VALUES ('{name}')"))


async def _pids(ledger, name="db"):
    return {backend.pid for backend in await ledger.backends(name)}


async def _cancelled(task):
    """Wait for a task and say whether it was cancelled."""
    await asyncio.wait({task}, timeout=DEADLINE)
    return task.done() and task.cancelled()


@pytest.mark.postgresql
async def test_cancelled_statement_ends_the_transaction(db, ledger, bench):
    """A unit that is cancelled in a statement is rolled back, and its connection returns alive (P7)."""
    await _commit(db, "warm")
    before = await _pids(ledger)

    async def work():
        async with db_context():
            (await db_session(db)).add(Parent(name="lost"))
            await insert(db, "lost")

    async with ledger.lock():
        task = asyncio.create_task(work())
        await ledger.waiting("db")
        task.cancel()
        cancelled = await _cancelled(task)
        out = bench.databases.checked_out()

    assert cancelled
    assert out == 0
    assert await _pids(ledger) == before
    assert await ledger.names("parents") == []


@pytest.mark.postgresql
async def test_cancelled_flush_ends_the_transaction(db, ledger, bench):
    """A unit that is cancelled in the flush before its commit is rolled back, and its connection returns alive (P7)."""
    await _commit(db, "warm")
    before = await _pids(ledger)

    async def work():
        async with db_context():
            session = await db_session(db)
            session.add(Parent(name="lost"))
            await session.flush()
            session.add(Item(name="lost"))

    async with ledger.lock():
        task = asyncio.create_task(work())
        await ledger.waiting("db")
        task.cancel()
        cancelled = await _cancelled(task)
        out = bench.databases.checked_out()

    assert cancelled
    assert out == 0
    assert await _pids(ledger) == before
    assert await ledger.names("parents") == []


@pytest.mark.postgresql
@pytest.mark.parametrize("times", [1, 3], ids=["once", "thrice"])
async def test_commit_that_was_sent_is_awaited_to_its_end(db, ledger, bench, times):
    """Cancelled while the server works on COMMIT: the task ends after the commit has, its row is there, nothing is in doubt (P7)."""
    await _give_birth(ledger)
    seen = []

    async def work():
        async with db_context():
            await _insert_child(db)

    async with ledger.lock("parents"):
        task = asyncio.create_task(work())
        await ledger.waiting("db")
        pids = await _pids(ledger)
        for _ in range(times):
            task.cancel()
            await ledger.waiting("db")
            seen.append(task.done())
    cancelled = await _cancelled(task)

    assert seen == [False] * times
    assert cancelled
    assert bench.databases.checked_out() == 0
    assert await ledger.names("children") == ["child"]
    assert await _pids(ledger) == pids


@pytest.mark.postgresql
async def test_session_is_not_taken_out_of_its_unit_under_the_commit(db, ledger, bench):
    """A sibling is refused: the COMMIT keeps who awaits it, its limit in time and its callbacks, also when it is cancelled (P7, P7a)."""
    await _give_birth(ledger)
    committing = asyncio.Event()
    ran, siblings = [], []

    async def take_out():
        await committing.wait()
        with pytest.raises(SessionBusyError):
            pop_db_session_from_context(db)
        with pytest.raises(ContextSqlaError, match="has one already"):
            put_db_session_to_context(db, await db.create_session())

    async def work():
        async with db_context():
            await _insert_child(db)
            on_commit(lambda: ran.append("callback"), connect=db)
            siblings.append(asyncio.create_task(take_out()))

    async with ledger.lock("parents"):
        task = asyncio.create_task(work())
        await ledger.waiting("db")
        committing.set()
        await asyncio.wait_for(siblings[0], DEADLINE)
        pids = await _pids(ledger)
        task.cancel()
        await ledger.waiting("db")
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.wait_for(task, DEADLINE)

    assert ran == ["callback"]
    assert await ledger.names("children") == ["child"]
    assert committed_connects(caught.value) == ("db",)
    assert bench.databases.checked_out() == 0
    assert await _pids(ledger) == pids


@pytest.fixture(name="both")
async def _both(request, bench, database, other_database):
    """A connect whose sessions have items in one database and parents in another, and its engines."""
    second = other_database.engine(other_database.host, "second")
    bench.databases.engines.append(second)
    engines = [second]
    if request.param == "watched":
        watcher = DBConnect(lambda _: second, async_sessionmaker, other_database.host, name="watcher")
        await watcher.session_maker()

    def create(host):
        engines.append(database.engine(host, "both"))
        bench.databases.engines.append(engines[-1])
        return engines[-1]

    def make(engine):
        return async_sessionmaker(engine, binds={Parent: second}, expire_on_commit=False)

    both = DBConnect(create, make, database.host, name="both")
    await both.session_maker()
    yield both, engines
    await both.close()
    if request.param == "watched":
        await watcher.close()
    await second.dispose()


@pytest.mark.postgresql
@pytest.mark.parametrize("both", ["watched", "not watched"], indirect=True)
@pytest.mark.parametrize("put", [False, True], ids=["opened", "put"])
@pytest.mark.parametrize("when", ["between", "in a listener", "in the second"])
async def test_session_with_two_engines_is_committed_as_a_whole(both, ledger, other_ledger, bench, when, put):
    """Cancelled after the first COMMIT was sent: SQLAlchemy sends the second one too, whatever it awaits on the way (P7)."""
    both, engines = both
    commits, waiting, go_on = [], asyncio.Event(), asyncio.Event()

    async def wait():
        waiting.set()
        await asyncio.wait_for(go_on.wait(), DEADLINE)

    def committing(_connection):
        commits.append(1)
        if len(commits) == 2 and when == "between":
            task.cancel()
        elif len(commits) == 2 and when == "in a listener":
            await_only(wait())
        elif len(commits) == 2:
            asyncio.get_running_loop().call_soon(task.cancel)

    async def work():
        async with db_context():
            session = await (both.create_session() if put else db_session(both))
            session.add(Parent(name="b"))
            await session.flush()
            if put:  # on one connection, which nobody has seen, its transaction has begun
                put_db_session_to_context(both, session)
            session.add(Item(name="a"))
            await session.flush()

    for engine in engines:
        event.listen(engine.sync_engine, "commit", committing)
    task = asyncio.create_task(work())
    if when == "in a listener":
        await asyncio.wait_for(waiting.wait(), DEADLINE)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.wait_for(task, DEADLINE)

    assert len(commits) == 2
    assert (await ledger.names(), await other_ledger.names("parents")) == (["a"], ["b"])
    assert committed_connects(caught.value) == ("both",)
    assert not is_in_doubt(caught.value)
    assert bench.databases.checked_out() == 0


@pytest.mark.postgresql
@pytest.mark.parametrize("times", [1, 3], ids=["once", "thrice"])
async def test_rollback_that_was_sent_is_awaited_to_its_end(connect, database, ledger, bench, times):
    """Cancelled during ROLLBACK, also again and again: the pool is whole when the task ends, the connection alive (P7)."""
    seen = []

    async def work():
        async with db_context():
            await insert(db, "lost")
            raise Boom

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        await _commit(db, "warm")
        before = await _pids(ledger)
        rollback = network.hold_at(b"ROLLBACK")
        task = asyncio.create_task(work())
        await asyncio.wait_for(rollback.sprung.wait(), DEADLINE)
        for _ in range(times):
            task.cancel()
            await ledger.backends("db")
            seen.append(task.done())
        rollback.release()
        cancelled = await _cancelled(task)
        out = bench.databases.checked_out()
        after = await _pids(ledger)
        await db.close()

    assert seen == [False] * times
    assert cancelled
    assert out == 0
    assert after == before
    assert await ledger.names() == ["warm a", "warm b"]


@pytest.mark.postgresql
async def test_error_of_a_commit_is_not_lost_in_a_cancellation(db, ledger, caplog):
    """Cancelled while COMMIT is on its way and then fails: the cancellation is raised and tells of the error (P7)."""

    async def work():
        async with db_context():
            await _insert_child(db)  # its parent is not there

    async with ledger.lock("parents"):
        task = asyncio.create_task(work())
        await ledger.waiting("db")
        task.cancel()
        await ledger.waiting("db")
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.wait_for(task, DEADLINE)

    assert "IntegrityError" in "\n".join(caught.value.__notes__)
    assert [record.name for record in caplog.records if record.exc_info and record.exc_info[0] is IntegrityError] == [
        "context_sqla"
    ]


@pytest.mark.wire
@pytest.mark.postgresql
async def test_storm_of_cancelled_statements_keeps_the_connections(serve, db, ledger, bench):
    """Twenty requests that are cancelled in a statement cost no connection: the backends are the same before and after (P7)."""
    tasks = []

    async def handler(request):
        tasks.append(asyncio.current_task())
        await insert(db, request.query["name"])
        return Answer(201)

    service = await serve(handler)
    async with contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(service.connect()) for _ in range(5)]
        async with ledger.lock():
            for connection in connections:
                await connection.send("POST", "/?name=" + str(id(connection)))
            await ledger.waiting("db", count=5)
        await asyncio.wait(tasks, timeout=DEADLINE)
    before = await _pids(ledger)
    for _ in range(4):
        tasks.clear()
        async with contextlib.AsyncExitStack() as stack:
            connections = [await stack.enter_async_context(service.connect()) for _ in range(5)]
            async with ledger.lock():
                for number, connection in enumerate(connections):
                    await connection.send("POST", f"/?name=lost{number}")
                await ledger.waiting("db", count=5)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=DEADLINE)
                await until(lambda: bench.databases.checked_out() == 0)
            for connection in connections:
                connection.abort()
    after = await _pids(ledger)
    good = await service.post("/?name=last")

    assert len(before) == 5
    assert after == before
    assert good.status == 201
    assert [name for name in await ledger.names() if name.startswith("lost")] == []


# ------------------------------------------------------------------------------------------------------- swallowed cancellations


@pytest.mark.postgresql
@pytest.mark.parametrize("check", [True, False], ids=["checked", "check-off"])
async def test_swallowed_cancellation_is_a_5xx(serve, connect, ledger, check):
    """A handler that swallows the timeout of a statement gets no 2xx without its rows, whatever the connect says (P4a, P7)."""
    db = await connect("db", check_failed_transaction=check)
    limits = []

    async def handler(request):
        session = await db_session(db)
        session.add(Parent(name="lost"))
        await session.flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as limit:
                limits.append(limit)
                await _execute(db, "lost")
        return Answer(201, "done")

    async def good(request):
        await insert(db, "good")
        return Answer(201)

    service = await serve(Route("/", handler), Route("/good", good))
    async with ledger.lock():
        posting = asyncio.create_task(service.post("/"))
        await ledger.waiting("db")
        limits[0].reschedule(0)
        answer = await posting
    following = await service.post("/good")

    assert answer.status == 500
    assert "done" not in answer.text
    assert following.status == 201
    assert await ledger.names("parents") == []
    assert await ledger.names() == ["good"]


@pytest.mark.postgresql
@pytest.mark.parametrize("check", [True, False], ids=["checked", "check-off"])
async def test_swallowed_cancellation_in_a_savepoint_commits_the_rest(serve, connect, ledger, check):
    """With a savepoint around the statement that timed out, the rest of the transaction is committed (P4a, P7)."""
    db = await connect("db", check_failed_transaction=check)
    limits = []

    async def handler(request):
        session = await db_session(db)
        session.add(Parent(name="kept"))
        await session.flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as limit:
                async with session.begin_nested():
                    limits.append(limit)
                    await _execute(db, "lost")
        return Answer(201)

    service = await serve(handler)
    async with ledger.lock():
        posting = asyncio.create_task(service.post("/"))
        await ledger.waiting("db")
        limits[0].reschedule(0)
        answer = await posting

    assert answer.status == 201
    assert await ledger.names("parents") == ["kept"]
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_swallowed_cancellation_fails_the_block(db, ledger):
    """``db_context()`` raises at its end where a cancelled statement was swallowed, with a note that says so (P4a, P7)."""
    limits = []

    async def work():
        async with db_context():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None) as limit:
                    limits.append(limit)
                    await _execute(db, "lost")

    async with ledger.lock():
        task = asyncio.create_task(work())
        await ledger.waiting("db")
        limits[0].reschedule(0)
        with pytest.raises(DBAPIError) as caught:
            await task

    assert "CancelledError" in "\n".join(caught.value.__notes__)
    assert await ledger.names() == []


# --------------------------------------------------------------------------------------------------------------- limits in time


def test_limits_have_their_defaults(db):
    """Five seconds for clean-up, thirty for a COMMIT (P7)."""
    assert (db.cleanup_timeout, db.commit_timeout) == (5, 30)


@pytest.mark.postgresql
@pytest.mark.parametrize("forward", [False, True], ids=["request-lost", "answer-lost"])
async def test_hanging_commit_is_cut_and_in_doubt(connect, database, ledger, bench, forward):
    """A COMMIT without an answer is cut after ``commit_timeout``; the error says that its outcome is in doubt (P7)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, commit_timeout=0.2, cleanup_timeout=60)
        network.hold_at(b"COMMIT", forward=forward)
        with pytest.raises(Exception) as caught:
            async with asyncio.timeout(DEADLINE), db_context():
                await insert(db, "a")
        out = bench.databases.checked_out()
        await db.close()

    assert not isinstance(caught.value, TimeoutError)
    assert is_in_doubt(caught.value)
    assert repr(db) in "\n".join(caught.value.__notes__)
    assert out == 0
    assert await ledger.names() == (["a"] if forward else [])


@pytest.mark.postgresql
async def test_hanging_commit_of_a_request_is_a_5xx(serve, connect, database, ledger):
    """The client of a request whose COMMIT is not answered gets a 5xx after ``commit_timeout``, and the next one is served (P7)."""

    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(201, "done")

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, commit_timeout=0.2, engine_options={"pool_size": 1})
        service = await serve(handler)
        network.hold_at(b"COMMIT")
        hung = await service.post("/?name=lost")
        good = await service.post("/?name=good")
        await service.stop()

    assert hung.status == 500
    assert "done" not in hung.text
    assert good.status == 201
    assert await ledger.names() == ["good"]


@pytest.mark.postgresql
async def test_cancelled_commit_that_hangs_is_cut_too(connect, database, ledger, bench):
    """Awaiting a COMMIT to its end has its limit, and the cancellation that is raised then is in doubt as well (P7)."""

    async def work():
        async with db_context():
            await insert(db, "a")

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, commit_timeout=0.5)
        commit = network.hold_at(b"COMMIT")
        task = asyncio.create_task(work())
        await asyncio.wait_for(commit.sprung.wait(), DEADLINE)
        task.cancel()
        await asyncio.wait({task}, timeout=DEADLINE)
        out = bench.databases.checked_out()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        await db.close()

    assert out == 0
    assert is_in_doubt(caught.value)
    assert await ledger.names() == []


async def test_commit_that_the_database_refuses_is_not_in_doubt(db, ledger):
    """A COMMIT that was answered by an error has a known outcome (P7)."""
    with pytest.raises(IntegrityError) as caught:
        async with db_context():
            await insert_orphan(db)

    assert not is_in_doubt(caught.value)
    assert await ledger.names("children") == []


@pytest.mark.postgresql
async def test_error_before_the_commit_is_not_in_doubt(connect, database, ledger, bench):
    """A connection that dies before COMMIT was sent leaves no doubt (P7)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        with pytest.raises(DBAPIError) as caught:
            async with db_context():
                await insert(db, "a")
                await add(db, "b")
                network.cut()
        await db.close()

    assert not is_in_doubt(caught.value)
    assert await ledger.names() == []


@pytest.fixture(name="lonely_postgres")
async def _lonely_postgres():
    """A server whose commits can be made to wait for a replica that is not there."""
    server = Postgres(settings={"wal_level": "replica", "max_wal_senders": "2"})
    await asyncio.to_thread(server.__enter__)
    yield server
    await asyncio.to_thread(server.__exit__, None, None, None)


@pytest.mark.postgresql
async def test_cut_sends_no_cancel_request(lonely_postgres, connect, bench):
    """A COMMIT that waits for its synchronous replica is cut, and not acknowledged by a cancel request: its row stays unseen (P7)."""
    database = await bench.databases.database("first", server=lonely_postgres)
    ledger = database.ledger
    db = await connect("db", database=database, commit_timeout=0.5)
    await ledger.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    await ledger.execute("SELECT pg_reload_conf()")
    await until(lambda: _shows(ledger, "nobody"))
    with pytest.raises(Exception) as caught:
        async with asyncio.timeout(DEADLINE), db_context():
            await insert(db, "a")
    out = bench.databases.checked_out()
    waiting = [(backend.waits_for, backend.query) for backend in await ledger.backends("db")]
    names = await ledger.names()
    await ledger.execute("ALTER SYSTEM RESET synchronous_standby_names")
    await ledger.execute("SELECT pg_reload_conf()")

    assert is_in_doubt(caught.value)
    assert out == 0
    assert [(what, query.rstrip(";")) for what, query in waiting] == [("IPC", "COMMIT")]
    assert names == []


async def _shows(ledger, standby):
    return await ledger.value("SHOW synchronous_standby_names") == standby


@pytest.mark.postgresql
@pytest.mark.parametrize("mode", ["rollback-held", "network-hangs"])
async def test_hanging_rollback_is_cut(serve, connect, database, ledger, bench, mode):
    """A ROLLBACK without an answer is cut after ``cleanup_timeout``; the answer of the handler stands, the pool is whole (P7)."""

    async def handler(request):
        await insert(db, request.query["name"])
        if request.query["name"] != "lost":
            return Answer(201)
        if mode == "network-hangs":
            network.mode = "hang"
        return Answer(404, "not here")

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, cleanup_timeout=0.2, commit_timeout=60, engine_options={"pool_size": 1})
        service = await serve(handler)
        await service.post("/?name=good")
        network.hold_at(b"ROLLBACK")
        refused = await service.post("/?name=lost")
        await until(lambda: bench.databases.checked_out() == 0)
        network.mode = "pass"
        good = await service.post("/?name=better")
        await service.stop()

    assert (refused.status, refused.text) == (404, "not here")
    assert good.status == 201
    assert await ledger.names() == ["better", "good"]


@pytest.mark.postgresql
async def test_hanging_close_is_cut(connect, database, ledger, bench):
    """A close by hand that has to roll back, and gets no answer, is cut after ``cleanup_timeout`` (P7)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, cleanup_timeout=0.2, commit_timeout=60)
        await _commit(db, "warm")
        network.hold_at(b"ROLLBACK")
        async with asyncio.timeout(DEADLINE), db_context():
            await insert(db, "lost")
            await close_db_session(db)
            out = bench.databases.checked_out()
            await insert(db, "good")
        await db.close()

    assert out == 0
    assert await ledger.names() == ["good", "warm a", "warm b"]


@pytest.mark.postgresql
async def test_cancelled_rollback_that_hangs_is_cut(connect, database, ledger, bench):
    """The clean-up of a cancelled unit has its limit as well (P7)."""

    async def work():
        async with db_context():
            await insert(db, "lost")
            inserted.set()
            await asyncio.Event().wait()

    inserted = asyncio.Event()
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, cleanup_timeout=0.2, commit_timeout=60)
        await _commit(db, "warm")
        rollback = network.hold_at(b"ROLLBACK")
        task = asyncio.create_task(work())
        await inserted.wait()
        task.cancel()
        await asyncio.wait_for(rollback.sprung.wait(), DEADLINE)
        task.cancel()
        cancelled = await _cancelled(task)
        out = bench.databases.checked_out()
        await db.close()

    assert cancelled
    assert out == 0
    assert await ledger.names() == ["warm a", "warm b"]


# ------------------------------------------------------------------------------------------------------------ a client that leaves


@pytest.mark.wire
async def test_client_that_leaves_before_the_answer(serve, db, ledger, framework):
    """The handler of a client that has left commits where the server lets it run to its end, or is rolled back (P7)."""
    arrived, go_on, ended = asyncio.Event(), asyncio.Event(), []

    async def handler(request):
        await insert(db, "a")
        ended.append(asyncio.current_task())
        arrived.set()
        await go_on.wait()
        return Answer(201)

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("POST", "/")
        await asyncio.wait_for(arrived.wait(), DEADLINE)
        connection.abort()
    await service.get("/elsewhere")
    cancelled = Feature.HANDLER_RUNS_ON in framework.lacks
    if not cancelled:
        go_on.set()
    await asyncio.wait(ended, timeout=DEADLINE)

    assert await ledger.names() == ([] if cancelled else ["a"])


@pytest.mark.wire
async def test_client_that_leaves_during_a_stream(serve, db, ledger, bench):
    """What an open stream has written is rolled back when its client leaves; what came before its head stays (P7)."""
    ended = asyncio.Event()

    async def body():
        try:
            await insert(db, "body")
            while True:
                yield b"more"
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body())

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("POST", "/")
        await connection.head()
        await connection.chunk()
        connection.abort()
    await asyncio.wait_for(ended.wait(), DEADLINE)
    await until(lambda: bench.databases.checked_out() == 0)

    assert await ledger.names() == ["handler"]


# ------------------------------------------------------------------------------------------------- P7a: a statement is in flight


async def _twenty(service):
    return [(await service.post(f"/good?name=good{number}")).status for number in range(20)]


def _good(db):
    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(201)

    return Route("/good", handler)


@pytest.mark.wire
@pytest.mark.postgresql
async def test_failed_gather_leaves_the_pool_whole(serve, connect, ledger, bench):
    """One of two that share the session fails while the other's statement runs: an error at once, and no other request feels it (P7a)."""
    db = await connect("db", cleanup_timeout=60, engine_options={"pool_size": 1})
    left_behind = []

    async def a():
        try:
            await insert(db, "lost")
        except BaseException as exc:
            left_behind.append(exc)
            raise

    async def b():
        await ledger.waiting("db")
        raise Boom

    async def handler(request):
        await asyncio.gather(a(), b())
        return Answer(201)

    service = await serve(Route("/", handler), _good(db))
    async with ledger.lock():
        answer = await service.post("/")
        out = bench.databases.checked_out()
    statuses = await _twenty(service)

    assert answer.status == 500
    assert out == 0
    assert [type(exc) for exc in left_behind] == [ContextClosedError]
    assert statuses == [201] * 20
    assert await ledger.count() == 20


@pytest.mark.postgresql
async def test_failed_gather_that_is_answered_by_a_4xx(serve, connect, ledger, bench):
    """The same where the error is swallowed and the handler answers 404 while the statement runs (P7a)."""
    db = await connect("db", cleanup_timeout=60, engine_options={"pool_size": 1})
    tasks = []

    async def handler(request):
        tasks.append(asyncio.create_task(insert(db, "lost")))
        await ledger.waiting("db")
        return Answer(404, "not here")

    service = await serve(Route("/", handler), _good(db))
    async with ledger.lock():
        answer = await service.post("/")
        await until(lambda: bench.databases.checked_out() == 0)
        pids = await _pids(ledger)
    statuses = await _twenty(service)
    (error,) = await asyncio.gather(*tasks, return_exceptions=True)

    assert (answer.status, answer.text) == (404, "not here")
    assert statuses == [201] * 20
    assert not pids & await _pids(ledger)
    assert isinstance(error, ContextClosedError)
    assert await ledger.count() == 20


#: From the 600th row on it waits for an advisory lock, long after the statement itself has been answered.
_ROWS = text(
    "SELECT CASE WHEN i < 600 THEN i ELSE i + length(pg_advisory_xact_lock(7)::text) END FROM generate_series(1, 2000) i"
)


async def _fetch(db):
    result = await (await db_session(db)).stream(_ROWS)
    try:
        async for _ in result:
            pass
    finally:
        with contextlib.suppress(Exception):
            await result.close()


@contextlib.asynccontextmanager
async def _rows_held(ledger):
    await ledger.execute("SELECT pg_advisory_lock(7)")
    try:
        yield
    finally:
        await ledger.execute("SELECT pg_advisory_unlock(7)")


@pytest.mark.postgresql
@pytest.mark.parametrize("ending", ["raised", "refused"])
async def test_cursor_in_flight_is_cut_on_the_way_back(serve, connect, ledger, bench, ending):
    """A server-side cursor that another task is fetching from counts as a running statement: cut at once, pool whole (P7a)."""
    db = await connect("db", cleanup_timeout=60, engine_options={"pool_size": 1})
    tasks = []

    async def fetch():
        await _fetch(db)

    async def handler(request):
        tasks.append(asyncio.create_task(fetch()))
        await ledger.waiting("db")
        if ending == "raised":
            raise Boom
        return Answer(404)

    service = await serve(Route("/", handler), _good(db))
    async with _rows_held(ledger):
        answer = await service.post("/")
        await until(lambda: bench.databases.checked_out() == 0)
        statuses = await _twenty(service)
    (error,) = await asyncio.gather(*tasks, return_exceptions=True)

    assert answer.status == (500 if ending == "raised" else 404)
    assert statuses == [201] * 20
    assert isinstance(error, ContextSqlaError)


@pytest.mark.postgresql
async def test_commit_waits_for_a_cursor_in_flight(serve, db, ledger):
    """On the commit path a fetch that is running is awaited, then the commit comes (P7a)."""
    tasks, ready = [], asyncio.Event()

    async def fetch():
        await _fetch(db)

    async def handler(request):
        await insert(db, "a")
        tasks.append(asyncio.create_task(fetch()))
        await ledger.waiting("db")
        ready.set()
        return Answer(201)

    service = await serve(Route("/", handler), _good(db))
    async with service.connect() as connection:
        async with _rows_held(ledger):
            await connection.send("POST", "/")
            head = asyncio.create_task(connection.head())
            await asyncio.wait_for(ready.wait(), DEADLINE)
            beside = await service.post("/good?name=beside")
            early = head.done()
        status = (await head).status
        await connection.rest()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert not early
    assert (status, beside.status) == (201, 201)
    assert await ledger.names() == ["a", "beside"]
    assert await _twenty(service) == [201] * 20


@pytest.mark.postgresql
async def test_cursor_in_flight_beyond_the_limit_is_busy(connect, ledger, bench):
    """A fetch that is still running at the limit: ``SessionBusyError``, and its connection serves nobody else (P7a)."""
    db = await connect("db", cleanup_timeout=0.2, engine_options={"pool_size": 1})

    async def fetch():
        await _fetch(db)

    async with _rows_held(ledger):
        with pytest.raises(SessionBusyError):
            async with db_context():
                await insert(db, "lost")
                task = asyncio.create_task(fetch())
                (backend,) = await ledger.waiting("db")
        out = bench.databases.checked_out()
        async with db_context():
            mine = await (await db_session(db)).scalar(text("SELECT pg_backend_pid()"))
    (error,) = await asyncio.gather(task, return_exceptions=True)

    assert out == 0
    assert mine != backend.pid
    assert isinstance(error, ContextClosedError)
    assert await ledger.names() == []


@pytest.mark.wire
@pytest.mark.postgresql
async def test_commit_waits_for_a_statement_in_flight(serve, db, ledger):
    """A task that nobody awaits has a statement running when a good answer is due: the commit waits for it, and has its row (P7a)."""
    tasks, ready = [], asyncio.Event()

    async def stray():
        await (await db_session(db)).execute(text("INSERT INTO parents (name) VALUES ('stray')"))

    async def handler(request):
        await insert(db, "a")
        tasks.append(asyncio.create_task(stray()))
        await ledger.waiting("db")
        ready.set()
        return Answer(201)

    service = await serve(Route("/", handler), _good(db))
    async with service.connect() as connection:
        async with ledger.lock("parents"):
            await connection.send("POST", "/")
            head = asyncio.create_task(connection.head())
            await asyncio.wait_for(ready.wait(), DEADLINE)
            # The server is alive and the kernel quick: a byte that was sent would be here by now.
            beside = await service.post("/good?name=beside")
            early, names = head.done(), await ledger.names()
        status = (await head).status
        await connection.rest()
    await asyncio.gather(*tasks)

    assert not early
    assert names == ["beside"]
    assert (status, beside.status) == (201, 201)
    assert await ledger.names() == ["a", "beside"]
    assert await ledger.names("parents") == ["stray"]


@pytest.mark.postgresql
async def test_commit_waits_for_a_flush_in_flight(serve, db, ledger):
    """A flush is several statements, and is awaited as a whole: all that was pending in it is committed (P7a)."""
    tasks, ready = [], asyncio.Event()

    async def stray():
        session = await db_session(db)
        session.add_all([Parent(id=1, name="stray"), Child(name="stray", parent_id=1), Item(name="stray")])
        await session.flush()

    async def handler(request):
        await insert(db, "a")
        tasks.append(asyncio.create_task(stray()))
        await ledger.waiting("db")
        ready.set()
        return Answer(201)

    service = await serve(handler)
    async with service.connect() as connection:
        async with ledger.lock("parents"):
            await connection.send("POST", "/")
            await asyncio.wait_for(ready.wait(), DEADLINE)
            await service.get("/elsewhere")
        answer = await connection.response()
    outcome = await asyncio.gather(*tasks, return_exceptions=True)

    assert outcome == [None]
    assert answer.status == 201
    assert await ledger.names() == ["a", "stray"]
    assert await ledger.names("parents") == ["stray"]
    assert await ledger.names("children") == ["stray"]


@pytest.mark.postgresql
async def test_session_takes_no_new_statement_while_it_commits(db, ledger):
    """Once the unit wants to commit, the running statement is awaited and the next one of that task refused (P7a)."""

    async def stray():
        session = await db_session(db)
        await session.execute(text("INSERT INTO parents (name) VALUES ('first')"))
        await session.execute(text("INSERT INTO parents (name) VALUES ('second')"))

    async def work():
        async with db_context():
            await insert(db, "a")
            tasks.append(asyncio.create_task(stray()))
            await ledger.waiting("db")
            ready.set()

    tasks, ready = [], asyncio.Event()
    async with ledger.lock("parents"):
        working = asyncio.create_task(work())
        await asyncio.wait_for(ready.wait(), DEADLINE)
        await ledger.backends()
    await asyncio.wait_for(working, DEADLINE)
    (error,) = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(error, SessionBusyError | ContextClosedError)
    assert await ledger.names() == ["a"]
    assert await ledger.names("parents") == ["first"]


@pytest.mark.wire
@pytest.mark.postgresql
async def test_statement_in_flight_beyond_the_limit_is_a_5xx(serve, connect, ledger, bench):
    """A statement that outlasts ``cleanup_timeout`` costs the answer: 5xx, no row, and its connection serves nobody else (P7a)."""
    db = await connect("db", cleanup_timeout=0.2, engine_options={"pool_size": 1})
    tasks = []

    async def stray():
        await (await db_session(db)).execute(text("INSERT INTO parents (name) VALUES ('lost')"))

    async def handler(request):
        await insert(db, "lost")
        tasks.append(asyncio.create_task(stray()))
        await ledger.waiting("db")
        return Answer(201, "done")

    service = await serve(Route("/", handler), _good(db))
    async with ledger.lock("parents"):
        answer = await service.post("/")
        statuses = await _twenty(service)
    (error,) = await asyncio.gather(*tasks, return_exceptions=True)

    assert answer.status == 500
    assert "done" not in answer.text
    assert statuses == [201] * 20
    assert isinstance(error, ContextClosedError)
    assert await ledger.count() == 20
    assert await ledger.names("parents") == []


@pytest.mark.postgresql
async def test_busy_session_is_named(connect, ledger, bench):
    """The error of a session that is still busy names the connect and ``run_in_new_ctx`` (P7a)."""
    db = await connect("db", cleanup_timeout=0.2)

    async with ledger.lock():
        with pytest.raises(SessionBusyError, match=r"'db'.*run_in_new_ctx"):
            async with db_context():
                task = asyncio.create_task(insert(db, "lost"))
                await ledger.waiting("db")
        out = bench.databases.checked_out()
    (error,) = await asyncio.gather(task, return_exceptions=True)

    assert out == 0
    assert isinstance(error, ContextClosedError)
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_cancelled_unit_does_not_wait_for_a_statement_in_flight(connect, ledger, bench):
    """A unit that is cancelled while another task's statement runs on its session cuts the connection at once (P7, P7a)."""
    db = await connect("db", cleanup_timeout=60)

    async def work():
        async with db_context():
            tasks.append(asyncio.create_task(insert(db, "lost")))
            await asyncio.Event().wait()

    tasks = []
    async with ledger.lock():
        task = asyncio.create_task(work())
        (backend,) = await ledger.waiting("db")
        task.cancel()
        cancelled = await _cancelled(task)
        out = bench.databases.checked_out()
    (error,) = await asyncio.gather(*tasks, return_exceptions=True)

    assert cancelled
    assert out == 0
    assert isinstance(error, ContextClosedError)
    assert await ledger.names() == []


# ------------------------------------------------------------------------- P7a: a connection is still being opened by another task


@pytest.mark.postgresql
@pytest.mark.parametrize("ending", ["raised", "refused"])
async def test_connection_that_is_being_opened_on_the_way_back(serve, connect, database, ledger, bench, ending):
    """A cold session whose connection is still being opened when the unit rolls back: the answer at once, nothing is leaked (P7a)."""
    tasks = []

    async def handler(request):
        tasks.append(asyncio.create_task(_execute(db, "lost")))
        await until(lambda: bench.databases.checked_out() == 1)
        if ending == "raised":
            raise Boom
        return Answer(404)

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, cleanup_timeout=60, engine_options={"pool_size": 1})
        service = await serve(Route("/", handler), _good(db))
        network.mode = "hang"
        answer = await service.post("/")
        network.mode = "pass"
        await asyncio.wait(tasks, timeout=DEADLINE)
        (error,) = await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: bench.databases.checked_out() == 0)
        statuses = await _twenty(service)
        await service.stop()

    assert answer.status == (500 if ending == "raised" else 404)
    assert isinstance(error, ContextClosedError)
    assert statuses == [201] * 20
    assert await ledger.count() == 20


@pytest.mark.postgresql
async def test_connection_that_is_being_opened_is_awaited_by_the_commit(serve, connect, database, ledger, bench):
    """A cold session whose connection is still being opened when a good answer is due: the commit waits, and has the row (P7a)."""
    tasks = []

    async def handler(request):
        tasks.append(asyncio.create_task(insert(db, "stray")))
        await until(lambda: bench.databases.checked_out() == 1)
        return Answer(201)

    async def ping(request):
        return Answer(200)

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        service = await serve(Route("/", handler), Route("/ping", ping))
        network.mode = "hang"
        async with service.connect() as connection:
            await connection.send("POST", "/")
            head = asyncio.create_task(connection.head())
            await until(lambda: bench.databases.checked_out() == 1)
            await service.get("/ping")
            early = head.done()
            network.mode = "pass"
            status = (await head).status
            await connection.rest()
        outcome = await asyncio.gather(*tasks, return_exceptions=True)
        await service.stop()

    assert not early
    assert status == 201
    assert outcome == [None]
    assert await ledger.names() == ["stray"]


@pytest.mark.postgresql
async def test_connection_that_is_being_opened_beyond_the_limit(connect, database, ledger, bench):
    """A connection that is not open at the limit: ``SessionBusyError``; when it opens after all, nobody gets it (P7a)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, cleanup_timeout=0.2, engine_options={"pool_size": 1})
        network.mode = "hang"
        with pytest.raises(SessionBusyError):
            async with asyncio.timeout(DEADLINE), db_context():
                task = asyncio.create_task(_execute(db, "lost"))
                await until(lambda: bench.databases.checked_out() == 1)
        network.mode = "pass"
        await asyncio.wait({task}, timeout=DEADLINE)
        (error,) = await asyncio.gather(task, return_exceptions=True)
        await until(lambda: bench.databases.checked_out() == 0)
        async with db_context():
            await insert(db, "good")
        await db.close()

    assert isinstance(error, ContextClosedError)
    assert await ledger.names() == ["good"]


# ------------------------------------------------------------------------------------------- the backend is terminated by somebody


async def _pid(db):
    return await (await db_session(db)).scalar(text("SELECT pg_backend_pid()"))


def _killing(db, other, ledger, when):
    """A handler that writes to ``db`` and then to ``other``, and whose backend at ``db`` is terminated at some point."""

    async def handler(request):
        if when == "before":
            await insert(other, "lost")
            (pid,) = await _pids(ledger)
            await ledger.terminate(pid)
            await insert(db, "lost")
        elif when == "between":
            await insert(db, "lost")
            await insert(other, "lost")
            await ledger.terminate(await _pid(db))
            await insert(db, "lost too")
        elif when == "after":
            await insert(db, "lost")
            await insert(other, "lost")
            await ledger.terminate(await _pid(db))
        elif when == "swallowed":
            await insert(db, "lost")
            await insert(other, "lost")
            await ledger.terminate(await _pid(db))
            with contextlib.suppress(DBAPIError):
                await insert(db, "lost too")
        return Answer(201, "done")

    return handler


@pytest.mark.postgresql
@pytest.mark.parametrize("when", ["before", "between", "after", "swallowed"])
async def test_terminated_backend_costs_one_request(serve, connect, other, ledger, other_ledger, bench, when):
    """A backend that dies before, between or after the statements: 5xx, nothing is written anywhere, the next request is fine (P7, P8)."""
    db = await connect("db", engine_options={"pool_size": 1})
    service = await serve(Route("/", _killing(db, other, ledger, when)), _good(db))
    await service.post("/good?name=warm")
    answer = await service.post("/")
    out = bench.databases.checked_out()
    good = await service.post("/good?name=good")

    assert answer.status == 500
    assert "done" not in answer.text
    assert out == 0
    assert good.status == 201
    assert await ledger.names() == ["good", "warm"]
    assert await other_ledger.names() == []


@pytest.mark.postgresql
async def test_backend_terminated_after_the_statements_of_a_refused_request(serve, connect, other, ledger, other_ledger, bench):
    """A backend that dies before the roll-back of a 404: the 404 stands, the other connect is rolled back, the next is fine (P7, P8)."""
    db = await connect("db", engine_options={"pool_size": 1})

    async def handler(request):
        await insert(db, "lost")
        await insert(other, "lost")
        await ledger.terminate(await _pid(db))
        return Answer(404, "not here")

    service = await serve(Route("/", handler), _good(db))
    answer = await service.post("/")
    await until(lambda: bench.databases.checked_out() == 0)
    good = await service.post("/good?name=good")

    assert (answer.status, answer.text) == (404, "not here")
    assert good.status == 201
    assert await ledger.names() == ["good"]
    assert await other_ledger.names() == []


@pytest.mark.wire
@pytest.mark.postgresql
@pytest.mark.parametrize("during", ["statement", "flush", "commit"])
async def test_backend_terminated_while_it_works(serve, connect, other, ledger, other_ledger, bench, during):
    """A backend that dies in a statement, in the last flush or in COMMIT itself: 5xx, nothing anywhere, the next is fine (P7, P8)."""
    db = await connect("db", engine_options={"pool_size": 1})
    await _give_birth(ledger)

    async def handler(request):
        await insert(db, "lost")
        await insert(other, "lost")
        session = await db_session(db)
        if during == "commit":
            await _insert_child(db)
        else:
            session.add(Parent(id=2, name="lost"))
        if during == "statement":
            await session.flush()
        return Answer(201, "done")

    service = await serve(Route("/", handler), _good(db))
    async with ledger.lock("parents"):
        posting = asyncio.create_task(service.post("/"))
        (backend,) = await ledger.waiting("db")
        await ledger.terminate(backend.pid)
        answer = await posting
        out = bench.databases.checked_out()
    good = await service.post("/good?name=good")

    assert answer.status == 500
    assert "done" not in answer.text
    assert out == 0
    assert good.status == 201
    assert await ledger.names() == ["good"]
    assert await ledger.names("children") == []
    assert await other_ledger.names() == []


@pytest.mark.postgresql
@pytest.mark.parametrize("forward", [False, True], ids=["before-the-server-has-it", "before-the-client-knows"])
async def test_connection_lost_during_the_commit_is_in_doubt(connect, database, ledger, bench, forward):
    """A connection that is reset while COMMIT is on its way, or its answer: the error says that nobody knows (P7)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        network.cut_at(b"COMMIT", forward=forward)
        with pytest.raises(DBAPIError) as caught:
            async with db_context():
                await insert(db, "a")
        out = bench.databases.checked_out()
        await db.close()

    assert is_in_doubt(caught.value)
    assert out == 0
    assert await ledger.names() == (["a"] if forward else [])
