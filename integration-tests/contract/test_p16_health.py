"""P16: readiness, the state of the pool, and who holds a connection for long."""

import asyncio

import pytest
from context_sqla import (
    DBConnect,
    PoolStatus,
    UnavailableError,
    commit_db_session,
    db_context,
    db_session,
    get_db_session_from_context,
    new_non_ctx_session,
)
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import async_sessionmaker
from support.deadline import until
from support.proxy import proxy
from support.rows import insert
from support.scenario import Answer, Feature, Route
from support.wire import Address


@pytest.fixture(autouse=True)
def _contract(bench):
    """What serves nothing runs once per database, not once per framework."""


def _network(database):
    return proxy(Address(database.place.host, database.place.port))


async def _use(db):
    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))


def _warnings(caplog):
    return [one.getMessage() for one in caplog.records if one.name == "context_sqla" and "holds a connection" in one.getMessage()]


# ping


async def test_ping_of_a_database_that_answers(db, bench):
    """``ping`` returns nothing when the database answers, and gives its connection back (P16)."""
    answer = await db.ping(timeout=10)

    assert answer is None
    assert bench.databases.checked_out() == 0


async def test_readiness_probe(serve, db):
    """A handler that pings needs no session, and answers by what the ping says (P16)."""

    async def ready(request):
        await db.ping(timeout=10)
        return Answer(200, "ready")

    answer = await (await serve(Route("/ready", ready))).get("/ready")

    assert (answer.status, answer.text) == (200, "ready")


@pytest.mark.wire
@pytest.mark.postgresql
async def test_readiness_probe_of_a_database_that_is_away(serve, connect, database, framework):
    """A probe whose database refuses is answered with 503 and Retry-After by default, and with 200 once it is back (P16)."""
    async with _network(database) as network:
        db = await connect("db", host=network.host)

        async def ready(request):
            await db.ping(timeout=10)
            return Answer(200)

        service = await serve(ready)
        network.mode = "refuse"
        away = await service.get()
        network.mode = "pass"
        back = await service.get()
        await service.stop()

    if Feature.UNAVAILABLE_ANSWER in framework.lacks:
        assert away.status == 500
    else:
        assert (away.status, away.headers["retry-after"]) == (503, "1")
    assert back.status == 200


@pytest.mark.postgresql
async def test_ping_of_a_database_that_refuses(connect, database):
    """A refused connection is an ``UnavailableError`` with the driver's error as its cause (P16)."""
    async with _network(database) as network:
        db = await connect("db", host=network.host)
        network.mode = "refuse"
        with pytest.raises(UnavailableError, match="'db'") as caught:
            await db.ping(timeout=10)
        await db.close()

    assert isinstance(caught.value.__cause__, Exception)
    assert caught.value.retry_after is not None


@pytest.mark.postgresql
async def test_ping_of_a_host_where_nobody_listens(connect, database):
    """A port on which nobody listens is an ``UnavailableError`` too (P16)."""
    async with _network(database) as network:
        host = network.host
    db = await connect("db", host=host)

    with pytest.raises(UnavailableError, match="'db'"):
        await db.ping(timeout=10)


@pytest.mark.postgresql
async def test_ping_of_a_database_that_hangs_while_connecting(connect, database, bench):
    """A database that accepts and says nothing is given up after ``timeout``; nothing stays behind (P16)."""
    async with _network(database) as network:
        db = await connect("db", host=network.host)
        network.mode = "hang"
        with pytest.raises(UnavailableError, match=r"'db'.*0\.05 s"):
            await asyncio.wait_for(db.ping(timeout=0.05), 10)
        await until(lambda: bench.databases.checked_out() == 0)
        network.cut()
        await db.close()


@pytest.mark.postgresql
async def test_ping_of_a_database_that_hangs_while_answering(connect, database, bench):
    """A pooled connection on which no answer comes is cut after ``timeout``, and the next ping opens a new one (P16)."""
    async with _network(database) as network:
        db = await connect("db", host=network.host, engine_options={"pool_size": 1})
        await _use(db)
        network.mode = "hang"
        with pytest.raises(UnavailableError, match="'db'"):
            await asyncio.wait_for(db.ping(timeout=0.05), 10)
        await until(lambda: bench.databases.checked_out() == 0)
        network.mode = "pass"
        await db.ping(timeout=10)
        await db.close()


async def test_ping_is_bounded_when_the_pool_is_exhausted(connect, bench):
    """When all connections are in use, ``ping`` gives up after ``timeout`` and has not taken one afterwards (P16)."""
    db = await connect("db", engine_options={"pool_size": 1})

    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))
        with pytest.raises(UnavailableError, match="'db'"):
            await asyncio.wait_for(db.ping(timeout=0.02), 10)
        await until(lambda: not db.pool_status().waiting)
    await _use(db)

    assert bench.databases.checked_out() == 0


async def test_ping_is_bounded_when_the_handler_hangs(connect):
    """A handler that never chooses a host is part of what ``timeout`` bounds (P16)."""

    async def choose(connect):
        await asyncio.Event().wait()

    db = await connect("db", handler=choose)
    with pytest.raises(UnavailableError, match="'db'"):
        await asyncio.wait_for(db.ping(timeout=0.02), 2)


async def test_ping_that_is_cancelled_leaves_nothing(connect, bench):
    """A probe whose client leaves, and which is cancelled, takes no connection with it (P16)."""
    db = await connect("db", engine_options={"pool_size": 1})

    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))
        asked = asyncio.create_task(db.ping(timeout=600))
        await until(lambda: db.pool_status().waiting == 1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    await _use(db)
    await until(lambda: bench.databases.checked_out() == 0)


@pytest.mark.postgresql
async def test_ping_that_is_cancelled_while_the_database_hangs_leaves_nothing(connect, database, bench):
    """A probe that is cancelled before its ``timeout`` does not go on waiting for a database that has hung (P16)."""
    async with _network(database) as network:
        db = await connect("db", host=network.host)
        trap = network.hold_at(b"SELECT 1")
        asked = asyncio.create_task(db.ping(timeout=600))
        await asyncio.wait_for(trap.sprung.wait(), 10)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await until(lambda: bench.databases.checked_out() == 0, deadline=3)
        await db.close()


async def test_ping_asks_the_host_that_the_handler_chooses(connect, database):
    """``ping`` asks the host on which the next session would be made, and leaves ``connect.host`` alone (P16)."""

    async def choose(connect):
        return database.host

    db = await connect("db", host="127.0.0.1:1", handler=choose)
    asked = []
    db.engine_created.append(lambda engine, host: asked.append(host))
    await db.ping(timeout=10)

    assert (asked, db.host) == ([database.host], "127.0.0.1:1")


async def test_ping_is_part_of_no_unit(db):
    """``ping`` inside a unit makes no session for it and begins no transaction in it (P16)."""
    async with db_context():
        await db.ping(timeout=10)

        assert get_db_session_from_context(db) is None


async def test_ping_without_a_host_is_a_mistake(bench, database):
    """A connect without a host cannot be asked: ``ValueError``, as for a session (P16)."""
    db = DBConnect(lambda host: database.engine(host, "db"), lambda engine: None, name="db")

    with pytest.raises(ValueError, match="'db'.* no host"):
        await db.ping(timeout=10)


# pool_status


async def test_status_of_a_connect_that_was_never_used(db, bench, database):
    """Before the first use the status is empty, and asking for it opens nothing (P16)."""
    status = db.pool_status()

    assert status == PoolStatus(database.host, size=0, checked_out=0, overflow=0, waiting=None)
    assert bench.databases.engines == []


async def test_status_counts_connections_in_use(serve, db):
    """``pool_status`` has the size of the pool and the connections that are out, whoever has them (P16)."""
    seen = []

    async def handler(request):
        await (await db_session(db)).execute(text("SELECT 1"))
        seen.append(db.pool_status())
        async with new_non_ctx_session(db) as session:
            await session.execute(text("SELECT 1"))
            seen.append(db.pool_status())
        return Answer(200)

    await (await serve(handler)).get()
    seen.append(db.pool_status())

    assert [(one.size, one.checked_out, one.overflow, one.waiting) for one in seen] == [(5, 1, 0, 0), (5, 2, 0, 0), (5, 0, 0, 0)]


async def test_status_counts_the_overflow(connect):
    """Connections beyond the size of the pool are its overflow (P16)."""
    db = await connect("db", engine_options={"pool_size": 1, "max_overflow": 2})

    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))
        alone = db.pool_status()
        async with db_context():
            await (await db_session(db)).execute(text("SELECT 1"))
            both = db.pool_status()

    assert (alone.size, alone.checked_out, alone.overflow) == (1, 1, 0)
    assert (both.size, both.checked_out, both.overflow) == (1, 2, 1)


async def test_status_counts_those_who_wait(serve, connect):
    """Requests that wait for a connection are counted, and no more when they have it (P16)."""
    db = await connect("db", engine_options={"pool_size": 1})
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request):
        await (await db_session(db)).execute(text("SELECT 1"))
        begun.set()
        await go_on.wait()
        return Answer(200)

    service = await serve(handler)
    asked = [asyncio.create_task(service.get()) for _ in range(3)]
    await asyncio.wait_for(begun.wait(), 10)
    await until(lambda: db.pool_status().waiting == 2)
    go_on.set()
    answers = await asyncio.gather(*asked)

    assert {answer.status for answer in answers} == {200}
    assert db.pool_status().waiting == 0


async def test_status_where_the_pool_does_not_tell(bench, database):
    """A pool that keeps nothing has no size and nobody who waits; what is out is counted all the same (P16)."""
    db = DBConnect(lambda host: database.engine(host, "db", poolclass=NullPool), async_sessionmaker, database.host, name="db")
    bench.databases.connects.append(db)

    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))
        status = db.pool_status()

    assert (status.size, status.checked_out, status.overflow, status.waiting) == (0, 1, 0, None)
    assert db.pool_status().checked_out == 0


# warn_held_after


async def test_request_that_holds_a_connection_is_named(serve, connect, caplog):
    """A request that holds a connection longer than the threshold is logged once, with method, route and connect (P16)."""
    db = await connect("db", warn_held_after=0.02)

    async def handler(request):
        await (await db_session(db)).execute(text("SELECT 1"))
        await until(lambda: _warnings(caplog))
        await (await db_session(db)).execute(text("SELECT 1"))
        return Answer(200)

    answer = await (await serve(Route("/reports", handler))).post("/reports?secret=1")
    lines = _warnings(caplog)

    assert answer.status == 200
    assert len(lines) == 1
    assert "'db'" in lines[0]
    assert "POST /reports" in lines[0]
    assert "secret" not in lines[0]


async def test_request_is_named_by_its_route(serve, connect, caplog, framework, stack):
    """The route's template is what the warning names where the framework has one, so that lines can be counted (P16)."""
    db = await connect("db", warn_held_after=0.02)

    async def handler(request):
        await (await db_session(db)).execute(text("SELECT 1"))
        await until(lambda: _warnings(caplog))
        return Answer(200)

    bare = stack.framework == "asgi"
    service = await serve(Route("/users/7" if bare else "/users/{number}", handler))
    answer = await service.get("/users/7")

    assert answer.status == 200
    assert ("GET /users/7" if bare else "GET /users/{number}") in _warnings(caplog)[0]


async def test_quick_request_is_not_named(serve, connect, caplog):
    """A request that gives its connection back in time is not logged, also if it goes on for long without it (P16)."""
    db = await connect("db", warn_held_after=0.3)
    committed = asyncio.Event()

    async def quick(request):
        await insert(db, "a")
        return Answer(200)

    async def commits(request):
        await insert(db, "b")
        await commit_db_session(db)
        committed.set()
        await until(lambda: _warnings(caplog))
        return Answer(200)

    async def slow(request):
        await insert(db, "c")
        await until(lambda: _warnings(caplog))
        return Answer(200)

    service = await serve(Route("/quick", quick), Route("/commits", commits), Route("/slow", slow))
    answers = [await service.post("/quick")]
    committing = asyncio.create_task(service.post("/commits"))
    await asyncio.wait_for(committed.wait(), 10)
    answers += [await service.post("/slow"), await committing]
    lines = _warnings(caplog)

    assert {answer.status for answer in answers} == {200}
    assert len(lines) == 1
    assert "POST /slow" in lines[0]


async def test_stream_that_holds_a_connection_is_named(serve, connect, caplog):
    """A body that keeps a transaction open for long is named like a handler (P16)."""
    db = await connect("db", warn_held_after=0.02)

    async def body():
        yield b"first"
        await (await db_session(db)).execute(text("SELECT 1"))
        await until(lambda: _warnings(caplog))
        yield b"last"

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(Route("/export", handler))).get("/export")

    assert answer.text == "firstlast"
    assert "GET /export" in _warnings(caplog)[0]


async def test_unit_outside_requests_is_named_too(connect, caplog):
    """A ``db_context`` that holds a connection is logged as a unit of work (P16)."""
    db = await connect("db", warn_held_after=0.02)

    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))
        await until(lambda: _warnings(caplog))

    assert "unit of work" in _warnings(caplog)[0]


async def test_second_transaction_is_watched_like_the_first(connect, caplog):
    """After a commit by hand the time begins anew, with the next transaction (P16)."""
    db = await connect("db", warn_held_after=0.02)

    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))
        await until(lambda: len(_warnings(caplog)) == 1)
        await commit_db_session(db)
        await (await db_session(db)).execute(text("SELECT 1"))
        await until(lambda: len(_warnings(caplog)) == 2)


async def test_warning_is_opt_in(serve, db, connect, caplog):
    """Without ``warn_held_after`` nothing is logged, however long a request holds its connection (P16)."""
    watched = await connect("watched", warn_held_after=0.02)

    async def handler(request):
        await (await db_session(db)).execute(text("SELECT 1"))
        async with db_context():
            await (await db_session(watched)).execute(text("SELECT 1"))
            await until(lambda: _warnings(caplog))
        return Answer(200)

    await (await serve(handler)).get()

    assert ["'watched'" in line for line in _warnings(caplog)] == [True]
