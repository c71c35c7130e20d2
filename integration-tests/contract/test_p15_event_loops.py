"""P15: one connect in several event loops, after a fork, and its end."""

import asyncio
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from typing import Any

import pytest
from context_sqla import ContextSqlaError, db_context, db_session, new_non_ctx_session, run_in_new_ctx
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from sqlalchemy import text
from support.deadline import until
from support.rows import add, insert
from support.scenario import Answer, Route

no_uvloop_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="uvloop is not made for Windows")
no_fork_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")


@pytest.fixture(autouse=True)
def _contract(bench):
    """What serves nothing runs once per database, not once per framework."""


async def _identity(db):
    """Return what tells the connection of the unit's session from others: the server's process, or the connection itself."""
    session = await db_session(db)
    if session.get_bind().dialect.name == "postgresql":
        return (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    raw = await (await session.connection()).get_raw_connection()
    return id(raw.driver_connection)


async def _unit(db, name):
    """Write a row in a unit of its own."""
    async with db_context():
        await insert(db, name)
        return await _identity(db)


async def _none_left(ledger, name="db"):
    async def none():
        return not await ledger.backends(name)

    await until(none, message="connections are still open")


# In another process

_PRELUDE = """
import asyncio, gc, json, os, sys, threading
from context_sqla import DBConnect, db_context, db_session
from sqlalchemy import text

db = DBConnect.from_url(sys.argv[1], name="db", engine_options={"connect_args": json.loads(sys.argv[2])})
SQL = text("INSERT INTO items (name) VALUES (:name)")

async def work(name):
    async with db_context():
        await (await db_session(db)).execute(SQL, {"name": name})

def alone():
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert not threads, threads

def pause():
    gc.collect()
    print("done", flush=True)
    sys.stdin.readline()
"""
_ARGUMENTS = {"asyncpg": {"server_settings": {"application_name": "db"}}, "psycopg": {"application_name": "db"}, "aiosqlite": {}}


@dataclass
class Ended:
    """What became of a script: what it had connected when it said that it was done, and how it ended."""

    connections: int | None
    status: int | None
    errors: str


async def _script(database, body: str, *, strict: bool = True) -> Ended:
    """Run a script with a module-level connect; ``strict``: every ResourceWarning in it is an error."""
    url = database.url().render_as_string(hide_password=False)
    arguments = (url, json.dumps(_ARGUMENTS[database.driver]))
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-W",
            f"{'error' if strict else 'ignore'}::ResourceWarning",
            "-W",
            "ignore:This process:DeprecationWarning",  # from Python 3.12 on fork() warns where there are threads
            "-c",
            _PRELUDE + textwrap.dedent(body),
            *arguments,
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    connections = None
    assert process.stdout is not None
    if await asyncio.wait_for(process.stdout.readline(), 30) == b"done\n":
        # A server needs a moment to see that a client has closed.
        seen: list[Any] = []

        async def none():
            seen[:] = await database.ledger.backends("db")
            return not seen

        try:
            await until(none, deadline=2)
        except TimeoutError:
            pass
        connections = len(seen)
    _, errors = await asyncio.wait_for(process.communicate(b"\n"), 30)
    return Ended(connections, process.returncode, errors.decode())


async def test_two_runs_one_after_the_other(database, ledger):
    """Two ``asyncio.run`` with one module-level connect work, leave no connection, and warn of no resource (P15)."""
    ended = await _script(
        database,
        """
        asyncio.run(work("a"))
        asyncio.run(work("b"))
        alone()
        pause()
        """,
    )

    assert ended == Ended(0, 0, "")
    assert await ledger.names() == ["a", "b"]


_CLOSED = """
for name in "abc":
    loop = {}()
    loop.run_until_complete(work(name))
    loop.close()
del loop
gc.collect()
asyncio.run(work("d"))
alone()
pause()
"""


async def test_loops_that_are_just_closed(database, ledger):
    """What loops leave that were closed without a proper end is dropped at the next use in another one (P15)."""
    ended = await _script(database, _CLOSED.format("asyncio.new_event_loop"))

    assert ended == Ended(0, 0, "")
    assert await ledger.names() == ["a", "b", "c", "d"]


@no_uvloop_on_windows
async def test_uvloops_that_are_just_closed(database, ledger):
    """The same for uvloop, which closes the sockets itself and warns of each, long before anybody else is asked (P15)."""
    ended = await _script(database, _CLOSED.format("__import__('uvloop').new_event_loop"), strict=False)

    assert ended == Ended(0, 0, "")
    assert await ledger.names() == ["a", "b", "c", "d"]


async def test_loop_that_died_in_the_middle_of_a_unit(database, ledger):
    """A connection that was in use when its loop was closed is dropped too, and its transaction ends (P15)."""
    ended = await _script(
        database,
        """
        async def hold(begun):
            async with db_context():
                await (await db_session(db)).execute(text("SELECT 1"))
                begun.set()
                await asyncio.Event().wait()

        async def begin():
            begun = asyncio.Event()
            task = asyncio.get_running_loop().create_task(hold(begun))
            await begun.wait()
            return task

        loop = asyncio.new_event_loop()
        task = loop.run_until_complete(begin())
        loop.close()
        asyncio.run(work("a"))
        pause()
        os._exit(0)  # the unit that will never end is no part of the test
        """,
    )

    assert (ended.connections, ended.status) == (0, 0)
    assert await ledger.names() == ["a"]


async def test_run_that_ends_with_a_unit_open(database, ledger):
    """``asyncio.run`` cancels what is still running: it is rolled back, and nothing is left (P15)."""
    ended = await _script(
        database,
        """
        async def hold(begun):
            async with db_context():
                await (await db_session(db)).execute(SQL, {"name": "never"})
                begun.set()
                await asyncio.Event().wait()

        async def main():
            begun = asyncio.Event()
            task = asyncio.create_task(hold(begun))
            await begun.wait()

        asyncio.run(main())
        asyncio.run(work("a"))
        alone()
        pause()
        """,
    )

    assert ended == Ended(0, 0, "")
    assert await ledger.names() == ["a"]


@no_fork_on_windows
async def test_fork_leaves_the_parents_connections_alone(database, ledger):
    """After a fork the child connects anew, and the parent goes on with its own connection, in its transaction (P15)."""
    ended = await _script(
        database,
        """
        async def begin():
            idle = await db.create_session()
            session = await db.create_session()
            for one in (idle, session):
                await one.execute(text("SELECT 1"))
            await idle.close()
            await session.execute(SQL, {"name": "parent"})
            return session

        async def end(session):
            await session.execute(SQL, {"name": "parent again"})
            await session.commit()
            await session.close()

        async def child():
            async with db_context():
                return await (await db_session(db)).execute(text("SELECT count(*) FROM items"))

        loop = asyncio.new_event_loop()
        session = loop.run_until_complete(begin())
        pid = os.fork()
        if pid == 0:
            assert db.pool_status().checked_out == 0
            asyncio.run(child())
            gc.collect()
            sys.exit(0)  # an orderly end: everything that the child has inherited is finalized
        assert os.waitpid(pid, 0)[1] == 0
        loop.run_until_complete(end(session))
        for name in "ab":
            loop.run_until_complete(work(name))
        loop.run_until_complete(db.close())
        loop.close()
        pause()
        """,
    )

    # What the child says of the session that this script has let it inherit is no concern of ours.
    assert (ended.connections, ended.status) == (0, 0)
    assert await ledger.names() == ["a", "b", "parent", "parent again"]


@pytest.mark.postgresql
async def test_parent_keeps_its_very_connection_over_a_fork(database):
    """The parent's pooled connection is the same server process before the fork and after the child has ended (P15)."""
    ended = await _script(
        database,
        """
        async def pid():
            async with db_context():
                return (await (await db_session(db)).execute(text("SELECT pg_backend_pid()"))).scalar_one()

        loop = asyncio.new_event_loop()
        before = loop.run_until_complete(pid())
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(asyncio.run(pid())).encode())
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert int(os.read(reading, 20)) != before
        assert loop.run_until_complete(pid()) == before
        loop.run_until_complete(db.close())
        loop.close()
        pause()
        """,
    )

    assert ended == Ended(0, 0, "")


@no_fork_on_windows
async def test_child_that_goes_on_with_the_inherited_loop_connects_anew(database):
    """A child that runs the parent's loop object does not take the parent's connection out of the pool (P15)."""
    ended = await _script(
        database,
        """
        import selectors

        async def connection():
            async with db_context():
                session = await db_session(db)
                raw = await (await session.connection()).get_raw_connection()
                return id(raw.driver_connection)

        async def child(parents):
            assert db.pool_status().size == 0
            assert await connection() != parents
            await db.close()

        # `select`: with `epoll` parent and child would share what they wait for
        loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        before = loop.run_until_complete(connection())
        pid = os.fork()
        if pid == 0:
            try:
                loop.run_until_complete(child(before))
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert loop.run_until_complete(connection()) == before
        loop.run_until_complete(db.close())
        loop.close()
        pause()
        """,
    )

    assert ended == Ended(0, 0, "")


async def test_tests_with_a_loop_of_their_own(database, ledger, tmp_path):
    """Tests under pytest-asyncio, each with its own loop, share a module-level connect and close nothing (P15)."""
    url = database.url().render_as_string(hide_password=False)
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent(f"""
        import asyncio
        import pytest
        from context_sqla import DBConnect, db_context, db_session
        from sqlalchemy import text

        db = DBConnect.from_url({url!r}, engine_options={{"connect_args": {_ARGUMENTS[database.driver]!r}}})
        loops = set()

        @pytest.mark.parametrize("name", "abc")
        async def test_write(name):
            assert asyncio.get_running_loop() not in loops
            loops.add(asyncio.get_running_loop())
            async with db_context():
                await (await db_session(db)).execute(text("INSERT INTO items (name) VALUES (:name)"), {{"name": name}})

        async def test_nothing_is_left():
            if {database.dialect == "postgresql"!r}:
                async with asyncio.timeout(10), db_context():
                    sql = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'db'")
                    while (await (await db_session(db)).execute(sql)).scalar_one() > 1:
                        await (await db_session(db)).rollback()
        """)
    )
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
            "-p",
            "pytest_asyncio.plugin",
            "-o",
            "asyncio_mode=auto",
        ),
        *("-o", "asyncio_default_fixture_loop_scope=function", "-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)

    assert process.returncode == 0, output.decode()
    assert b"4 passed" in output
    assert await ledger.names() == ["a", "b", "c"]


# In threads of this process


def _thread(run, coroutine):
    """Run a coroutine in a loop of another thread, which inherits no unit (``asyncio.to_thread`` would copy the context)."""
    return asyncio.get_running_loop().run_in_executor(None, run, coroutine)


async def test_loops_side_by_side(db, bench, ledger):
    """Units of the same connect in loops of three threads at one moment have engines and connections of their own (P15)."""
    together = threading.Barrier(2, timeout=10)

    async def work():
        async with db_context():
            seen = await _identity(db)
            together.wait()
            assert await _identity(db) == seen
            return seen

    async with db_context():
        mine = await _identity(db)
        theirs = await asyncio.gather(*(_thread(asyncio.run, work()) for _ in range(2)))
        again = await _identity(db)
    gc.collect()

    assert mine == again
    assert len({mine, *theirs}) == 3
    assert len(bench.databases.engines) == 3
    assert len(await ledger.backends("db")) in (0, 1, 2, 3)


async def test_loops_that_have_ended_leave_nothing(db, ledger):
    """When the loops of other threads have ended, only the connection of this loop is open (P15)."""
    mine = await _unit(db, "mine")
    for name in "ab":
        await _thread(asyncio.run, _unit(db, name))

    async def only_mine():
        return [one.pid for one in await ledger.backends("db")] in ([], [mine])

    await until(only_mine, message="connections of ended loops are still open")

    assert await _unit(db, "mine again") == mine
    assert await ledger.names() == ["a", "b", "mine", "mine again"]


async def test_many_loops_at_once(db, bench, ledger):
    """Threads that begin and end loops all the time do not disturb one another (P15)."""

    async def work():
        async with db_context():
            return await _identity(db)

    def loops():
        for _ in range(8):
            asyncio.run(work())

    await asyncio.gather(*(asyncio.to_thread(loops) for _ in range(4)))
    await _none_left(ledger)

    assert len(bench.databases.engines) == 32


@no_uvloop_on_windows
async def test_uvloop_runs_one_after_the_other(db, ledger):
    """Two ``uvloop.run`` beside a loop of another kind work and leave nothing (P15)."""
    import uvloop

    mine = await _unit(db, "mine")
    for name in "ab":
        await _thread(uvloop.run, _unit(db, name))

    async def only_mine():
        return [one.pid for one in await ledger.backends("db")] in ([], [mine])

    await until(only_mine, message="connections of ended loops are still open")

    assert await ledger.names() == ["a", "b", "mine"]


@pytest.mark.loops("asyncio", "uvloop")
async def test_requests_on_both_kinds_of_loop(serve, db, ledger):
    """A connect serves requests in a loop of either kind (P15)."""

    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(201)

    service = await serve(handler)
    answers = await asyncio.gather(*(service.post(f"/?name={name}") for name in "abcdefgh"))

    assert {answer.status for answer in answers} == {201}
    assert await ledger.names() == list("abcdefgh")


async def test_client_with_a_loop_per_call(serve, build, db, ledger, framework):
    """The framework's own test client, which makes a loop for every call, works beside a real server (P15)."""

    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(201)

    service = await serve(handler)
    statuses = [(await service.post("/?name=a")).status]
    # An application of aiohttp belongs to one loop: each loop has one, and all of them the connect.
    apps = [build(handler, connects=()) if framework.module == "aiohttp" else service.app for _ in "bc"]
    for app, name in zip(apps, "bc", strict=True):
        statuses.append(await asyncio.to_thread(framework.driver().post, app, f"/?name={name}"))
    statuses.append((await service.post("/?name=d")).status)
    gc.collect()

    async def only_one():
        return len(await ledger.backends("db")) <= 1

    await until(only_one, message="connections of the client's loops are still open")

    assert statuses == [201] * 4
    assert await ledger.names() == ["a", "b", "c", "d"]


async def test_first_use_by_many_tasks_makes_one_engine(db, bench):
    """Tasks that are the first to use a connect in a loop, all at once, share one engine (P15)."""
    await asyncio.gather(*(run_in_new_ctx(_identity, db) for _ in range(5)))

    assert len(bench.databases.engines) == 1


async def test_first_use_by_many_requests_makes_one_engine(serve, db, bench, ledger):
    """Requests that arrive all at once at a fresh application share one engine (P15)."""

    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(201)

    service = await serve(handler)
    answers = await asyncio.gather(*(service.post(f"/?name={number}") for number in range(10)))

    assert {answer.status for answer in answers} == {201}
    assert len(bench.databases.engines) == 1
    assert await ledger.count() == 10


# close()


@pytest.mark.wire
async def test_shutdown_waits_for_a_request(serve, db, bench, ledger):
    """A server that shuts down while a request is out: the connects are closed after that request's unit has ended (P15)."""
    begun = asyncio.Event()

    async def handler(request):
        await insert(db, "a")
        begun.set()
        await asyncio.Event().wait()
        return Answer(201)

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("POST", "/")
        await asyncio.wait_for(begun.wait(), 10)
        stopping = asyncio.create_task(service.stop(grace=0.05))
        await asyncio.wait((stopping,), timeout=10)
        if not stopping.done():  # this server waits for its requests for ever
            connection.abort()
    await stopping

    assert bench.databases.checked_out() == 0
    await _none_left(ledger)
    assert await ledger.names() == []


async def test_close_waits_for_units_that_are_running(db, ledger):
    """``close`` returns when the last unit has ended; that unit commits (P15)."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work():
        async with db_context():
            await insert(db, "a")
            begun.set()
            await go_on.wait()
            await insert(db, "b")

    working = asyncio.create_task(work())
    await begun.wait()
    closing = asyncio.create_task(db.close())
    await ledger.names()  # a round trip to the server, for `close` to do something too early
    early = closing.done()
    go_on.set()
    await asyncio.wait_for(asyncio.gather(working, closing), 10)
    await _none_left(ledger)

    assert not early
    assert await ledger.names() == ["a", "b"]


async def test_close_waits_for_every_unit(db, ledger):
    """One of two units ends: ``close`` still waits for the other (P15)."""
    events = [asyncio.Event() for _ in range(2)]
    begun = asyncio.Barrier(3)

    async def work(number):
        async with db_context():
            await _identity(db)
            await begun.wait()
            await events[number].wait()
            await _identity(db)

    workers = [asyncio.create_task(work(number)) for number in range(2)]
    await begun.wait()
    closing = asyncio.create_task(db.close())
    events[0].set()
    await workers[0]
    await ledger.names()
    early = closing.done()
    events[1].set()
    await asyncio.wait_for(asyncio.gather(workers[1], closing), 10)

    assert not early


async def test_two_closes_wait_for_the_same_unit(connect, ledger):
    """Two that close at once, such as two applications with one connect, both return when the unit has ended (P15)."""
    db = await connect("db", drain_timeout=600)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work():
        async with db_context():
            await insert(db, "a")
            begun.set()
            await go_on.wait()

    working = asyncio.create_task(work())
    await begun.wait()
    closings = [asyncio.create_task(db.close()) for _ in range(2)]
    await ledger.names()
    go_on.set()
    await working
    done, late = await asyncio.wait(closings, timeout=10)
    for task in late:
        task.cancel()
    await asyncio.gather(*closings, return_exceptions=True)

    assert done == set(closings)
    assert await ledger.names() == ["a"]


async def test_close_gives_up_after_the_drain_timeout(connect, ledger, caplog):
    """A unit that takes longer than ``drain_timeout`` is not cut: it commits, and its connection is closed afterwards (P15)."""
    db = await connect("db", drain_timeout=0.02)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work():
        async with db_context():
            await insert(db, "a")
            begun.set()
            await go_on.wait()
            await insert(db, "b")

    working = asyncio.create_task(work())
    await begun.wait()
    await asyncio.wait_for(db.close(), 10)
    ended = working.done()
    go_on.set()
    await working
    await _none_left(ledger)

    assert not ended
    assert [record.levelname for record in caplog.records if "still running" in record.getMessage()] == ["WARNING"]
    assert await ledger.names() == ["a", "b"]


async def test_close_inside_a_unit_of_its_own_is_an_error(db, ledger):
    """``close`` where it would wait for itself raises, names the connect, and harms nothing (P15)."""
    async with db_context():
        await insert(db, "a")
        with pytest.raises(ContextSqlaError, match="'db'.*close"):
            await db.close()
        await insert(db, "b")

    assert await ledger.names() == ["a", "b"]


async def test_close_in_a_handler_is_an_error(serve, db, ledger):
    """A handler that closes the connect it uses gets the error, and the next request is served (P15)."""

    async def handler(request):
        await insert(db, request.query["name"])
        if request.path == "/close":
            await db.close()
        return Answer(201)

    service = await serve(Route("/", handler), Route("/close", handler))
    answers = [await service.post(path) for path in ("/close?name=a", "/?name=b")]

    assert [answer.status for answer in answers] == [500, 201]
    assert await ledger.names() == ["b"]


async def test_close_in_a_unit_inside_its_unit_is_an_error(connect, ledger):
    """A unit inside one that uses the connect would wait for its own outer unit: that is an error too (P15)."""
    db = await connect("db", drain_timeout=600)

    async with db_context():
        await insert(db, "a")
        with pytest.raises(ContextSqlaError, match="'db'.*close"):
            await asyncio.wait_for(run_in_new_ctx(db.close), 5)

    assert await ledger.names() == ["a"]


async def test_close_inside_a_unit_of_another_connect_is_fine(connect, db, ledger):
    """A unit that does not use the connect may close it (P15)."""
    again = await connect("again")
    await _unit(again, "a")

    async with db_context():
        await insert(db, "b")
        await asyncio.wait_for(again.close(), 10)
    await _none_left(ledger, "again")

    assert await ledger.names() == ["a", "b"]


async def test_connect_can_be_used_after_close(db, bench, ledger):
    """After ``close`` the connect connects anew, as often as one likes (P15)."""
    for name in "abc":
        await _unit(db, name)
        await db.close()
        await _none_left(ledger)

    assert len(bench.databases.engines) == 3
    assert await ledger.names() == ["a", "b", "c"]


async def test_close_of_what_was_never_used_is_nothing(db, bench):
    """``close`` twice, or of a connect that nobody has used, does nothing and makes no engine (P15)."""
    await db.close()
    await db.close()

    assert bench.databases.engines == []


async def test_close_in_one_loop_leaves_the_others_alone(db, ledger):
    """``close`` concerns the running loop: a unit in another one goes on with its connection (P15)."""

    async def elsewhere():
        await _unit(db, "a")
        await asyncio.wait_for(db.close(), 10)

    async with db_context():
        before = await _identity(db)
        await _thread(asyncio.run, elsewhere())
        after = await _identity(db)
    pooled = await _unit(db, "b")

    assert before == after == pooled
    assert await ledger.names() == ["a", "b"]


async def test_session_outside_units_is_not_cut_by_close(db, ledger):
    """A session of the caller's own goes on after ``close``; its connection is closed when it comes back (P15)."""
    async with new_non_ctx_session(db) as session:
        await session.execute(text("INSERT INTO items (name) VALUES ('a')"))
        await asyncio.wait_for(db.close(), 10)
        await session.execute(text("INSERT INTO items (name) VALUES ('b')"))
        await session.commit()
    await _none_left(ledger)

    assert await ledger.names() == ["a", "b"]


async def test_close_ignores_the_context_of_a_test(connect, ledger):
    """A test's shared transaction neither holds ``close`` up nor is cut by it; it is rolled back at its end (P15)."""
    db = await connect("db", drain_timeout=600)

    async with rollback_session(db) as session:
        async with set_test_context(), put_savepoint_session_in_ctx(db, session):
            await insert(db, "a")
            await asyncio.wait_for(db.close(), 10)
            await insert(db, "b")
            async with db_context():
                await insert(db, "c")
            count = (await session.execute(text("SELECT count(*) FROM items"))).scalar_one()
    await _none_left(ledger)

    assert count == 3
    assert await ledger.names() == []


async def test_close_ignores_a_session_of_the_test(connect, ledger):
    """A test context with a session of its own, not shared, does not make ``close`` raise or wait (P15)."""
    db = await connect("db", drain_timeout=600)

    async with set_test_context(auto_close=True):
        await insert(db, "a")
        await asyncio.wait_for(db.close(), 10)
        await add(db, "b")
    await _none_left(ledger)

    assert await ledger.names() == ["a", "b"]


async def test_application_shuts_down_inside_the_context_of_a_test(serve, connect, ledger):
    """An application that is started and stopped inside a test's transaction leaves that transaction usable (P15)."""
    db = await connect("db", drain_timeout=600)

    async def handler(request):
        await insert(db, "from the request")
        return Answer(201)

    async with rollback_session(db) as session:
        async with set_test_context(), put_savepoint_session_in_ctx(db, session):
            service = await serve(handler)
            answer = await service.post()
            await asyncio.wait_for(service.stop(), 10)
            names = (await session.execute(text("SELECT name FROM items"))).scalars().all()

    assert answer.status == 201
    assert names == ["from the request"]
    assert await ledger.names() == []
