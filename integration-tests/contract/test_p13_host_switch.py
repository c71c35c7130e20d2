"""P13: host switch under load."""

import asyncio
import contextlib
import contextvars
import itertools

import pytest
from context_sqla import DBConnect, db_context, db_session, new_non_ctx_session
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import async_sessionmaker
from support.deadline import until
from support.proxy import proxy
from support.rows import insert
from support.scenario import Answer, Feature, Route
from support.wire import Address

PORT = text("SELECT inet_server_port()")
PID = text("SELECT pg_backend_pid()")


class Hosts:
    """Two servers with the same database: the names of the hosts, and an observer of each."""

    def __init__(self, here, there):
        self.here, self.there = here.host, there.host
        self.ledgers = {here.host: here.ledger, there.host: there.ledger}
        #: The first server by another name.
        self.alias = f"localhost:{here.place.port}"

    @property
    def both(self):
        return self.here, self.there

    async def connections(self, host, name="db"):
        """Return how many connections the connect has to a host, as the server counts them."""
        return len(await self.ledgers[host].backends(name))

    async def gone(self, host, name="db"):
        """Return when the connect has no connection to a host any more."""
        await until(lambda: self._none(host, name), message=f"connections to {host} are still open")

    async def _none(self, host, name):
        return not await self.connections(host, name)


@pytest.fixture(autouse=True)
def _contract(bench):
    """What serves nothing runs once per database, not once per framework."""


@pytest.fixture(name="hosts")
async def _hosts(bench, database, postgres, spare_postgres):
    there = await bench.databases.database("first", server=spare_postgres)
    await there.ledger.execute(f"ALTER ROLE {spare_postgres.user} PASSWORD '{postgres.password}'")
    spare_postgres.password = postgres.password
    return Hosts(database, there)


@pytest.fixture(name="custom")
async def _custom(bench, database):
    """Make a connect whose engines a function of the test makes."""

    def make(creator, maker=None, **options):
        def create_engine(host):
            engine = creator(host)
            bench.databases.engines.append(engine)
            return engine

        made = DBConnect(create_engine, maker or (lambda engine: async_sessionmaker(engine)), database.host, name="db", **options)
        bench.databases.connects.append(made)
        return made

    return make


async def _port(db):
    """Return the host of the unit's session, as the server names it."""
    return f"127.0.0.1:{(await (await db_session(db)).execute(PORT)).scalar_one()}"


async def _pid(db):
    return (await (await db_session(db)).execute(PID)).scalar_one()


async def _port_of_a_unit(db):
    async with db_context():
        return await _port(db)


# One switch


@pytest.mark.postgresql
async def test_new_sessions_go_to_the_new_host(serve, db, hosts):
    """After ``change_host`` the next request works on the new host (P13)."""

    async def handler(request):
        return Answer(200, await _port(db))

    service = await serve(handler)
    before = await service.get()
    await db.change_host(hosts.there)
    after = await service.get()

    assert (before.text, after.text) == hosts.both
    assert db.host == hosts.there


@pytest.mark.postgresql
async def test_engine_and_session_maker_change_at_once(db, hosts):
    """``session_maker`` gives the new host's maker as soon as ``change_host`` has returned, and ``pool_status`` its pool (P13)."""
    old = await db.session_maker()
    await db.change_host(hosts.there)
    new = await db.session_maker()

    assert new is not old
    assert new.kw["bind"] is not old.kw["bind"]
    assert db.pool_status().host == hosts.there
    assert f"127.0.0.1:{new.kw['bind'].url.port}" == hosts.there


@pytest.mark.wire
@pytest.mark.postgresql
async def test_request_in_flight_finishes_on_the_old_host(serve, connect, hosts):
    """A request that has begun on the old host commits there, however often the host changes meanwhile (P13)."""
    db = await connect("db", idle_host_grace=0)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request):
        await insert(db, "a")
        begun.set()
        await go_on.wait()
        await insert(db, "b")
        return Answer(201)

    service = await serve(handler)
    asked = asyncio.create_task(service.post())
    await asyncio.wait_for(begun.wait(), 10)
    await db.change_host(hosts.there)
    await _port_of_a_unit(db)
    await db.change_host(hosts.alias)
    await _port_of_a_unit(db)
    await hosts.gone(hosts.there)
    go_on.set()
    answer = await asked

    assert answer.status == 201
    assert await hosts.ledgers[hosts.here].names() == ["a", "b"]
    assert await hosts.ledgers[hosts.there].names() == []


@pytest.mark.postgresql
async def test_old_host_is_left_after_the_grace(serve, connect, hosts):
    """When a host is no longer in use every connection to it is closed (P13)."""
    db = await connect("db", idle_host_grace=0.05)

    async def handler(request):
        return Answer(200, await _port(db))

    service = await serve(handler)
    await asyncio.gather(*(service.get() for _ in range(10)))
    await db.change_host(hosts.there)
    await hosts.gone(hosts.here)
    answer = await service.get()

    assert answer.text == hosts.there
    assert await hosts.connections(hosts.there) == 1


@pytest.mark.postgresql
async def test_host_whose_last_request_ends_late_is_left_too(serve, connect, hosts):
    """The connection of a request that outlives the grace is closed when it comes back; it opens no pool again (P13)."""
    db = await connect("db", idle_host_grace=0)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request):
        host = await _port(db)
        if request.path == "/late":
            begun.set()
            await go_on.wait()
        return Answer(200, host)

    service = await serve(Route("/", handler), Route("/late", handler))
    asked = asyncio.create_task(service.get("/late"))
    await asyncio.wait_for(begun.wait(), 10)
    await db.change_host(hosts.there)
    await service.get()
    go_on.set()
    late = await asked
    await hosts.gone(hosts.here)

    assert (late.status, late.text) == (200, hosts.here)
    assert await hosts.connections(hosts.there) == 1


@pytest.mark.postgresql
async def test_session_without_a_statement_yet_goes_to_its_own_host(connect, hosts):
    """A session made before the switch works on the old host, even if its first statement comes after the old pool is gone (P13)."""
    db = await connect("db", idle_host_grace=0)
    await _port_of_a_unit(db)

    async with db_context():
        await db_session(db)
        await db.change_host(hosts.there)
        await hosts.gone(hosts.here)
        host = await _port(db)
    await hosts.gone(hosts.here)

    assert host == hosts.here


@pytest.mark.postgresql
async def test_connection_of_a_foreign_session_keeps_its_host(connect, hosts):
    """In use is counted at the pool: a session outside every unit keeps the pool of its host from being closed (P13)."""
    db = await connect("db", idle_host_grace=0)
    async with db_context():
        await _port(db)
        await asyncio.gather(*(_port_of_a_unit(db) for _ in range(3)))

    async with new_non_ctx_session(db) as session:
        pid = (await session.execute(PID)).scalar_one()
        await db.change_host(hosts.there)
        await _port_of_a_unit(db)
        await db.change_host(hosts.alias)
        await hosts.gone(hosts.there)  # chosen later than the first host: had that not been in use it would be closed by now
        kept = await hosts.connections(hosts.here)
        still = (await session.execute(PID)).scalar_one()
    await hosts.gone(hosts.here)

    assert (kept, still) == (4, pid)


@pytest.mark.postgresql
async def test_host_chosen_within_the_grace_keeps_its_connections(connect, hosts):
    """Coming back to a host within the grace opens no new connection (P13)."""
    db = await connect("db", idle_host_grace=60)

    async def pid():
        async with db_context():
            return await _pid(db)

    first = await pid()
    await db.change_host(hosts.there)
    there = await pid()
    await db.change_host(hosts.here)
    second = await pid()

    assert first == second
    assert [one.pid for one in await hosts.ledgers[hosts.there].backends("db")] == [there]


@pytest.mark.postgresql
async def test_host_that_was_left_can_be_chosen_again(connect, hosts):
    """After its connections were closed a host serves again, as if for the first time (P13)."""
    db = await connect("db", idle_host_grace=0)

    seen = [await _port_of_a_unit(db)]
    for host in (hosts.there, hosts.here):
        left = db.host
        await db.change_host(host)
        await hosts.gone(left)
        seen.append(await _port_of_a_unit(db))

    assert seen == [hosts.here, hosts.there, hosts.here]


async def test_change_to_the_same_host_changes_nothing(db, bench, database):
    """``change_host`` to the host that is current keeps engine and connections (P13)."""
    maker = await db.session_maker()
    await db.change_host(database.host)

    assert await db.session_maker() is maker
    assert len(bench.databases.engines) == 1


@pytest.mark.postgresql
async def test_one_engine_per_host(connect, bench, hosts):
    """Many tasks that change the host at once make one engine of each host (P13)."""
    db = await connect("db", idle_host_grace=60)

    async def choose(number):
        await db.change_host(hosts.both[number % 2])
        return await _port_of_a_unit(db)

    await asyncio.gather(*(choose(number) for number in range(20)))

    assert len(bench.databases.engines) == 2


# connect(host)


@pytest.mark.postgresql
async def test_connect_makes_engine_and_maker_anew(db, bench, hosts):
    """``connect(host)`` makes a new engine, also for the host that is current, and closes the old connections (P13)."""
    async with db_context():
        before = await _pid(db)
    old = await db.session_maker()
    await db.connect(hosts.here)
    async with db_context():
        after = await _pid(db)
    await until(lambda: _only(hosts.ledgers[hosts.here], after))

    assert before != after
    assert await db.session_maker() is not old
    assert len(bench.databases.engines) == 2


@pytest.mark.postgresql
async def test_connect_lets_requests_in_flight_finish(serve, db, hosts):
    """A request that runs during ``connect(host)`` commits, and its connection is closed when it comes back (P13)."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request):
        await insert(db, "a")
        begun.set()
        await go_on.wait()
        await insert(db, "b")
        return Answer(201)

    service = await serve(handler)
    asked = asyncio.create_task(service.post())
    await asyncio.wait_for(begun.wait(), 10)
    await db.connect(hosts.here)
    go_on.set()
    answer = await asked
    await hosts.gone(hosts.here)

    assert answer.status == 201
    assert await hosts.ledgers[hosts.here].names() == ["a", "b"]


async def _only(ledger, pid):
    return [one.pid for one in await ledger.backends("db")] == [pid]


# A creator that raises


@pytest.mark.parametrize("method", ["change_host", "connect"])
async def test_creator_that_raises_leaves_the_old_host(serve, custom, database, method):
    """An engine that cannot be made leaves host, engine and session maker as they were (P13)."""

    def create(host):
        if host != database.host:
            raise LookupError(host)
        return database.engine(host, "db")

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    db = custom(create)
    maker = await db.session_maker()
    service = await serve(handler)
    with pytest.raises(LookupError, match="nowhere"):
        await getattr(db, method)("nowhere")
    answer = await service.post()

    assert answer.status == 201
    assert (db.host, await db.session_maker()) == (database.host, maker)


async def test_session_maker_creator_that_raises_leaves_the_old_host(custom, database):
    """A session maker that cannot be made leaves the old host in place too (P13)."""

    def maker_of(engine):
        if fails:
            raise LookupError("no maker")
        return async_sessionmaker(engine)

    fails = False
    db = custom(lambda host: database.engine(host, "db"), maker_of)
    maker = await db.session_maker()
    fails = True
    with pytest.raises(LookupError, match="no maker"):
        await db.change_host("127.0.0.1:1")

    assert (db.host, await db.session_maker()) == (database.host, maker)


async def test_creator_that_raises_for_the_current_host_is_asked_again(custom, database):
    """``connect`` with a creator that raises keeps the engine of the same host, which goes on working (P13)."""

    def create(host):
        if fails:
            raise LookupError(host)
        return database.engine(host, "db")

    fails = False
    db = custom(create)
    async with db_context():
        await insert(db, "a")
    fails = True
    with pytest.raises(LookupError):
        await db.connect(database.host)
    async with db_context():
        await insert(db, "b")

    assert await database.ledger.names() == ["a", "b"]


# A handler that returns the host


@pytest.mark.wire
@pytest.mark.postgresql
async def test_returned_host_serves_that_session(serve, connect, hosts):
    """The handler returns a host: that one session goes there, and ``connect.host`` is left alone (P13)."""

    async def choose(connect):
        return hosts.there

    async def handler(request):
        return Answer(200, await _port(db))

    db = await connect("db", handler=choose)
    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text) == (200, hosts.there)
    assert db.host == hosts.here


@pytest.mark.postgresql
async def test_handler_that_returns_none_means_the_current_host(serve, connect, hosts):
    """None means ``connect.host``, which the handler may have changed (P13)."""

    async def choose(connect):
        await connect.change_host(hosts.there)

    async def handler(request):
        return Answer(200, await _port(db))

    db = await connect("db", handler=choose)
    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text) == (200, hosts.there)
    assert db.host == hosts.there


@pytest.mark.postgresql
async def test_handler_is_heard_by_every_kind_of_session(connect, hosts):
    """Sessions outside units are made on the host that the handler returns (P13)."""

    async def choose(connect):
        return hosts.there

    db = await connect("db", handler=choose)
    async with new_non_ctx_session(db) as session:
        outside = (await session.execute(PORT)).scalar_one()
    async with await db.create_session() as session:
        made = (await session.execute(PORT)).scalar_one()

    assert {f"127.0.0.1:{port}" for port in (outside, made)} == {hosts.there}
    assert db.host == hosts.here


@pytest.mark.postgresql
async def test_alternation_of_returned_hosts_opens_no_new_connections(connect, bench, hosts):
    """Hosts returned in turn keep one engine and one connection each (P13)."""
    turn = itertools.cycle(hosts.both)

    async def choose(connect):
        return next(turn)

    async def pid(db):
        async with db_context():
            return await _port(db), await _pid(db)

    db = await connect("db", handler=choose)
    seen = [await pid(db) for _ in range(20)]

    assert [host for host, _ in seen] == list(hosts.both) * 10
    assert len(set(seen)) == 2
    assert len(bench.databases.engines) == 2


@pytest.mark.postgresql
async def test_hosts_chosen_in_turn_stay_for_longer_than_the_grace(connect, bench, hosts):
    """The grace counts from the last choice of a host, not from the first: no engine is made twice (P13)."""
    loop = asyncio.get_running_loop()
    turn = itertools.cycle(hosts.both)
    choices = []

    async def choose(connect):
        choices.append(loop.time())
        return next(turn)

    db = await connect("db", handler=choose, idle_host_grace=0.2)
    while not choices or loop.time() < choices[0] + 0.5:
        await _port_of_a_unit(db)
        await asyncio.sleep(0.02)  # the pace of the choices, no waiting for anything
    pauses = [later - earlier for earlier, later in zip(choices, choices[2:], strict=False)]

    # A machine that stood still for longer than the grace has let a host fall out of use.
    assert len(bench.databases.engines) == 2 or max(pauses) >= 0.2


@pytest.mark.postgresql
async def test_returned_host_that_is_used_no_more_is_left(connect, hosts):
    """A host that was returned once is left after the grace, like any other (P13)."""
    wanted = [hosts.there]

    async def choose(connect):
        return wanted.pop() if wanted else None

    db = await connect("db", handler=choose, idle_host_grace=0.05)
    seen = [await _port_of_a_unit(db) for _ in range(2)]
    await hosts.gone(hosts.there)

    assert seen == [hosts.there, hosts.here]
    assert await hosts.connections(hosts.here) == 1


@pytest.mark.postgresql
async def test_current_host_is_never_left(connect, hosts):
    """The current host keeps its connections, even if every session goes elsewhere for longer than the grace (P13)."""
    wanted = None

    async def choose(connect):
        return wanted

    db = await connect("db", handler=choose, idle_host_grace=0)
    async with db_context():
        first = await _pid(db)
    for wanted in (hosts.there, hosts.alias):
        await _port_of_a_unit(db)
    await hosts.gone(hosts.there)
    wanted = None
    async with db_context():
        again = await _pid(db)

    assert first == again


@pytest.mark.postgresql
async def test_committed_hook_is_told_the_host_of_the_session(connect, hosts):
    """Hooks get the host on which the session has really worked, not the current one (P13, HOSTS)."""
    told = []

    async def choose(connect):
        return hosts.there

    async def tell(session, host):
        told.append(host)

    db = await connect("db", handler=choose)
    db.committed.append(tell)
    async with db_context():
        await insert(db, "a")

    assert told == [hosts.there]


# Under load


@pytest.mark.wire
@pytest.mark.postgresql
async def test_twenty_switches_under_load(serve, connect, hosts):
    """Twenty switches under 50 concurrent requests: none fails, none is on the wrong host, and one host has connections (P13)."""
    db = await connect("db", idle_host_grace=0.05)
    served = asyncio.Event()
    seen = []

    async def handler(request):
        expected = db.host  # nothing awaits between here and the session
        session = await db_session(db)
        found = f"127.0.0.1:{(await session.execute(PORT)).scalar_one()}"
        seen.append((expected, found))
        if len(seen) % 20 == 0:
            served.set()
        return Answer(200)

    service = await serve(handler)
    async with _load(service, 50) as statuses:
        for number in range(20):
            served.clear()
            await db.change_host(hosts.both[(number + 1) % 2])
            await asyncio.wait_for(served.wait(), 10)
    await hosts.gone(hosts.there)

    assert set(statuses) == {200}
    assert len(seen) >= 400
    assert [pair for pair in seen if pair[0] != pair[1]] == []
    assert {host for _, host in seen} == set(hosts.both)
    assert 0 < await hosts.connections(hosts.here) <= 5


@pytest.mark.postgresql
async def test_alternation_at_ten_hertz_under_load(serve, connect, bench, hosts):
    """Alternation between two hosts at 10 Hz under 50 concurrent requests: none fails, and no connection is opened twice (P13)."""
    db = await connect("db", idle_host_grace=60)  # on a slow machine a host may have no request for a second
    opened = []
    db.engine_created.append(lambda engine, host: _count_connections(engine, opened))
    seen = []

    async def handler(request):
        expected = db.host
        session = await db_session(db)
        seen.append((expected, f"127.0.0.1:{(await session.execute(PORT)).scalar_one()}"))
        return Answer(200)

    service = await serve(handler)
    async with _load(service, 50) as statuses:
        for number in range(10):
            await db.change_host(hosts.both[(number + 1) % 2])
            await asyncio.sleep(0.1)  # the load itself, no waiting for anything

    assert set(statuses) == {200}
    assert [pair for pair in seen if pair[0] != pair[1]] == []
    assert len(bench.databases.engines) == 2
    assert len(opened) <= 10


@pytest.mark.postgresql
@pytest.mark.parametrize("how", ["returns", "changes"])
async def test_handler_that_alternates_under_load(serve, connect, bench, hosts, how):
    """A handler that chooses for every session under 50 concurrent requests: each is where its handler wanted it (P13)."""
    turn = itertools.cycle(hosts.both)
    number = contextvars.ContextVar[int]("number")
    wanted = {}
    seen = {}

    async def choose(connect):
        host = wanted[number.get()] = next(turn)
        await asyncio.sleep(0)  # others choose meanwhile
        if how == "returns":
            return host
        await connect.change_host(host)
        return None

    async def handler(request):
        mine = len(wanted)
        number.set(mine)
        wanted[mine] = ""
        seen[mine] = await _port(db)
        return Answer(200)

    db = await connect("db", handler=choose, idle_host_grace=60)
    service = await serve(handler)
    async with _load(service, 50) as statuses:
        await until(lambda: len(seen) >= 400, deadline=60)

    assert set(statuses) == {200}
    assert seen == wanted
    assert set(seen.values()) == set(hosts.both)
    assert len(bench.databases.engines) == 2


@contextlib.asynccontextmanager
async def _load(service, width):
    """Let so many clients ask over and over for the length of the block; gives the list of all statuses."""
    statuses = []
    running = True

    async def client():
        async with service.connect() as connection:
            while running:
                statuses.append((await connection.request("GET", "/")).status)

    clients = [asyncio.create_task(client()) for _ in range(width)]
    try:
        yield statuses
    finally:
        running = False
        await asyncio.gather(*clients)


def _count_connections(engine, opened):
    event.listen(engine.sync_engine, "connect", lambda *_: opened.append(1))


# abort_host


@pytest.mark.wire
@pytest.mark.postgresql
async def test_abort_host_cuts_a_query_that_hangs(serve, connect, database, ledger):
    """A request whose host has hung fails at once when the host is aborted, and the next ones go elsewhere (P13)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)

        async def handler(request):
            await insert(db, request.path)
            return Answer(201)

        service = await serve(Route("/lost", handler), Route("/next", handler))
        trap = network.hold_at(b"INSERT")
        asked = asyncio.create_task(service.post("/lost"))
        await asyncio.wait_for(trap.sprung.wait(), 10)
        await db.change_host(database.host)
        count = db.abort_host(network.host)
        lost = await asyncio.wait_for(asked, 10)
        after = await service.post("/next")
        await service.stop()

    assert count == 1
    assert (lost.status, after.status) == (500, 201)
    assert await ledger.names() == ["/next"]


@pytest.mark.postgresql
async def test_abort_host_leaves_other_hosts_alone(serve, connect, database, hosts):
    """Requests to other hosts do not notice an abort (P13)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def handler(request):
            await insert(db, request.path)
            if request.path == "/good":
                begun.set()
                await go_on.wait()
            return Answer(201)

        service = await serve(Route("/good", handler), Route("/lost", handler))
        trap = network.hold_at(b"INSERT")
        lost = asyncio.create_task(service.post("/lost"))
        await asyncio.wait_for(trap.sprung.wait(), 10)
        await db.change_host(hosts.there)
        good = asyncio.create_task(service.post("/good"))
        await asyncio.wait_for(begun.wait(), 10)
        db.abort_host(network.host)
        answers = [(await lost).status]
        go_on.set()
        answers.append((await good).status)
        await service.stop()

    assert answers == [500, 201]
    assert await hosts.ledgers[hosts.there].names() == ["/good"]


@pytest.mark.postgresql
async def test_abort_host_reaches_a_host_that_was_left(connect, database):
    """What is still in flight on an engine that ``connect(host)`` has replaced is cut as well (P13)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, cleanup_timeout=60)
        trap = network.hold_at(b"INSERT")

        async def work():
            async with db_context():
                await insert(db, "a")

        working = asyncio.create_task(work())
        await asyncio.wait_for(trap.sprung.wait(), 10)
        await db.connect(database.host)
        await db.connect(network.host)
        db.abort_host(network.host)
        outcome = (await asyncio.wait_for(asyncio.gather(working, return_exceptions=True), 10))[0]
        await db.close()

    assert isinstance(outcome, Exception)


@pytest.mark.postgresql
async def test_abort_host_after_the_answer_to_a_commit_undoes_nothing(connect, database, ledger):
    """A connection that is cut on its way to the pool is given up there; the commit has succeeded (P4, P13)."""
    db = await connect("db", engine_options={"pool_size": 1})
    async with db_context():
        session = (await db_session(db)).sync_session
        await insert(db, "first")
        event.listen(session, "after_commit", lambda _: db.abort_host(database.host))
    async with db_context():
        await insert(db, "second")

    assert await ledger.names() == ["first", "second"]
    assert db.pool_status().checked_out == 0


@pytest.mark.postgresql
async def test_abort_host_cuts_idle_connections_too(connect, database):
    """After an abort no connection of the pool is used again: the next unit connects anew and works (P13)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)

        async def pid():
            async with db_context():
                return await _pid(db)

        before = await pid()
        count = db.abort_host(network.host)
        after = await pid()
        await db.close()

    assert count == 1
    assert before != after


@pytest.mark.postgresql
async def test_abort_host_reaches_a_commit(serve, connect, database, ledger):
    """A COMMIT that hangs is cut by an abort; the request fails instead of waiting for ``commit_timeout`` (P13)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, commit_timeout=600)

        async def handler(request):
            await insert(db, "a")
            return Answer(201)

        service = await serve(handler)
        trap = network.hold_at(b"COMMIT")
        asked = asyncio.create_task(service.post())
        await asyncio.wait_for(trap.sprung.wait(), 10)
        db.abort_host(network.host)
        answer = await asyncio.wait_for(asked, 10)
        await service.stop()

    assert answer.status == 500
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_abort_host_reaches_requests_that_are_connecting(serve, connect, database):
    """Requests that wait for a hung host to accept them fail at once when it is aborted (P13)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        begun = asyncio.Event()
        db.engine_created.append(lambda engine, host: _on_connecting(engine, begun))

        async def handler(request):
            await insert(db, "a")
            return Answer(201)

        service = await serve(handler)
        network.mode = "hang"
        asked = asyncio.create_task(service.post())
        await asyncio.wait_for(begun.wait(), 10)
        await db.change_host(database.host)
        db.abort_host(network.host)
        done, _ = await asyncio.wait((asked,), timeout=5)
        network.cut()
        answer = await asked
        await service.stop()

    assert answer.status == 500
    assert done == {asked}


def _on_connecting(engine, begun):
    event.listen(engine.sync_engine, "do_connect", lambda *_: begun.set())


async def test_abort_of_a_host_that_was_never_used_is_nothing(db):
    """Aborting an unknown host does nothing and says 0; an empty one is a mistake (P13)."""
    assert db.abort_host("nowhere:1") == 0
    with pytest.raises(ValueError, match="empty"):
        db.abort_host("")


# Faults during a switch


@pytest.mark.postgresql
async def test_server_that_ends_a_connection_during_a_switch_harms_nobody_else(serve, connect, hosts):
    """The old host terminates the backend of a request in flight: that request fails, nothing stays, the new host serves (P13)."""
    db = await connect("db", idle_host_grace=0)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request):
        await insert(db, request.path)
        if request.path == "/late":
            begun.set()
            await go_on.wait()
            await insert(db, "never")
        return Answer(201)

    service = await serve(Route("/", handler), Route("/late", handler))
    asked = asyncio.create_task(service.post("/late"))
    await asyncio.wait_for(begun.wait(), 10)
    await db.change_host(hosts.there)
    for backend in await hosts.ledgers[hosts.here].backends("db"):
        await hosts.ledgers[hosts.here].terminate(backend.pid)
    go_on.set()
    late = await asked
    after = await service.post()

    assert (late.status, after.status) == (500, 201)
    assert await hosts.ledgers[hosts.here].names() == []
    assert await hosts.ledgers[hosts.there].names() == ["/"]


@pytest.mark.postgresql
async def test_switch_away_from_a_server_that_is_gone(serve, bench, connect, hosts, spare_postgres):
    """The current host crashes; after the switch every request is served, and nothing waits for the dead one (P13)."""
    db = await connect("db", host=hosts.there, idle_host_grace=0)

    async def handler(request):
        return Answer(200, await _port(db))

    service = await serve(handler)
    before = await service.get()
    await asyncio.to_thread(spare_postgres.stop, "immediate")
    lost = await service.get()
    await db.change_host(hosts.here)
    after = [await service.get() for _ in range(3)]

    assert before.text == hosts.there
    assert lost.status == 500
    assert [answer.text for answer in after] == [hosts.here] * 3


@pytest.mark.postgresql
async def test_request_that_waits_for_the_old_pool_is_served_by_it(serve, connect, hosts):
    """A request that waits for a connection of a full pool when the host changes gets one, and does not fail (P13)."""
    db = await connect("db", idle_host_grace=0, engine_options={"pool_size": 1})
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request):
        session = await db_session(db)
        host = f"127.0.0.1:{(await session.execute(PORT)).scalar_one()}"
        if request.path == "/first":
            begun.set()
            await go_on.wait()
        return Answer(200, host)

    service = await serve(Route("/first", handler), Route("/waits", handler), Route("/next", handler))
    first = asyncio.create_task(service.get("/first"))
    await asyncio.wait_for(begun.wait(), 10)
    waits = asyncio.create_task(service.get("/waits"))
    await until(lambda: db.pool_status().waiting == 1)
    await db.change_host(hosts.there)
    after = await service.get("/next")
    go_on.set()
    answers = [await first, await waits, after]
    await hosts.gone(hosts.here)

    assert [answer.text for answer in answers] == [hosts.here, hosts.here, hosts.there]


@pytest.mark.postgresql
async def test_unavailable_host_is_the_handlers_to_tell(serve, connect, framework):
    """A handler that takes too long is an ``UnavailableError``: 503 with Retry-After, and ``connect.host`` is unchanged (P13)."""

    async def choose(connect):
        await asyncio.Event().wait()

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    db = await connect("db", handler=choose, handler_timeout=0.02)
    host = db.host
    answer = await (await serve(handler)).post()

    if Feature.UNAVAILABLE_ANSWER in framework.lacks:
        assert answer.status == 500
    else:
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert db.host == host
