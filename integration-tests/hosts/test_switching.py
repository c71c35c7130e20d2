"""Roles that move while requests are out: ten times a second, and in a planned switchover."""

import asyncio
import time

import pytest
from context_sqla import db_context, db_session
from context_sqla_hosts import Choice, Hosts, NoPrimaryError, bind_engine, primary, replica
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from support.proxy import Proxy
from support.wire import Address

from .cluster import DATABASE, MONITOR, PASSWORD, USER
from .load import following, load, watch, writing

PORT = text("SELECT inet_server_port()")


class Flip(Choice):
    """Two hosts that take turns ten times a second."""

    def __init__(self, hosts, *between):
        super().__init__(hosts, writes=True)
        self.between = between
        self.first = hosts.clock()

    def turn(self):
        return int((self.hosts.clock() - self.first) * 10)

    async def choose(self):
        return self.between[self.turn() % 2]

    def allows(self, host):
        return host == self.between[self.turn() % 2]


@pytest.mark.parametrize("client", ["DBConnect", pytest.param("bound engine", marks=pytest.mark.long)])
async def test_switching_ten_times_a_second_harms_nobody(calm, figure, client):
    """No session fails, none is on the wrong host, and no connection is left."""
    _, second, third = calm
    async with watch(calm) as hosts:
        flip = Flip(hosts, second.address, third.address)
        async with following(flip, idle_host_grace=0.3) as db:
            engine = create_async_engine(f"postgresql+asyncpg://{USER}:{PASSWORD}@nowhere/{DATABASE}", pool_size=10)
            maker = async_sessionmaker(bind_engine(engine, flip))

            async def with_connect():
                async with db_context():
                    before = flip.turn()
                    session = await db_session(db)
                    after = flip.turn()
                    return before, after, (await session.execute(PORT)).scalar_one()

            async def with_engine():
                async with maker() as session:
                    before = flip.turn()
                    await session.connection()
                    after = flip.turn()
                    return before, after, (await session.execute(PORT)).scalar_one()

            requests = await switch(with_connect if client == "DBConnect" else with_engine)
            await engine.dispose()
    ports = (second.port, third.port)
    wrong = sum(before == after and port != ports[before % 2] for before, after, port in requests.done)
    left = await left_over(second) + await left_over(third)
    figure(f"10 Hz for 4 s, {client}: failed of {len(requests.done)}", len(requests.errors), "0")
    figure(f"10 Hz for 4 s, {client}: on the wrong host", wrong, "0")
    figure(f"10 Hz for 4 s, {client}: connections left", left, "0")

    assert requests.errors == []
    assert (wrong, left) == (0, 0)
    assert {port for *_, port in requests.done} == set(ports)


class Fickle(Choice):
    """Regrets each connection as soon as it is made."""

    def __init__(self, hosts, host):
        super().__init__(hosts, writes=False)
        self.host = host
        self.asked = 0

    async def choose(self):
        return self.host

    def allows(self, host):
        self.asked += 1
        return self.asked % 2 == 1


async def test_a_role_that_changes_while_a_session_connects_does_not_fail_it(calm):
    """SQLAlchemy tries a checkout twice: a connection that was right when it was made is used, and cut if its host has died."""
    async with watch(calm) as hosts:
        engine = create_async_engine(f"postgresql+asyncpg://{USER}:{PASSWORD}@nowhere/{DATABASE}", pool_size=1)
        bind_engine(engine, Fickle(hosts, calm[1].address))
        for _ in range(5):
            async with engine.connect() as connection:
                assert (await connection.execute(PORT)).scalar_one() == calm[1].port
        await engine.dispose()


class Requests:
    def __init__(self):
        self.done, self.errors = [], []


async def switch(request, seconds=4.0, workers=8):
    requests, until = Requests(), time.monotonic() + seconds

    async def work():
        while time.monotonic() < until:
            try:
                requests.done.append(await request())
            except Exception as exc:
                requests.errors.append(exc)

    await asyncio.gather(*(work() for _ in range(workers)))
    return requests


async def left_over(node):
    sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    async with node.session() as connection:
        until = time.monotonic() + 5  # a server needs a moment to see that its client has gone
        while (left := await connection.fetchval(sql)) and time.monotonic() < until:
            await asyncio.sleep(0.02)
    return left


@pytest.mark.long
async def test_a_planned_switchover_leaves_no_session_on_the_old_primary(nodes, figure):
    """The old primary stops, comes back as a replica, and no write goes there."""
    first, second, third = nodes
    interval = 0.2
    async with watch(nodes, interval=interval) as hosts, following(primary(hosts, wait=20)) as db:
        async with following(replica(hosts, max_lag=5), idle_host_grace=30) as reads, load(writing(db)) as running:
            await running.until(200)
            await asyncio.to_thread(first.stop, "fast")
            await second.promote()
            await third.follow(second)
            await first.rejoin(second)
            back = time.monotonic()
            await running.until(500)
            await hosts.ready(replicas=2)
            settled = back + 2 * interval
            refused = [failed for failed in running.failed if failed.at > settled and "25006" in repr(failed.error.orig.sqlstate)]
            async with asyncio.timeout(20):  # the old primary serves reads again
                while await port(reads) != first.port:
                    await asyncio.sleep(0.02)
    figure("switchover: errors of 20 workers", len(running.failed), "<= 20")
    figure("switchover: 25006 after the rejoin", len(refused), "0")

    assert refused == []
    assert len(running.failed) <= 20, running.kinds()


async def test_a_role_that_changes_behind_a_proxy_is_noticed_by_the_first_write(nodes, figure):
    """As with pgbouncer or HAProxy: connections live on, and lead to a replica. No session is stuck with such a connection."""
    first, second, third = nodes
    front = Proxy(Address(first.host, first.port))
    await front.start()
    names = [front.host, third.address]
    hosts = Hosts(names, user=MONITOR, password=PASSWORD, database=DATABASE, interval=5)
    async with hosts, following(primary(hosts, wait=0.2)) as db:
        write, errors = writing(db), []
        await write(-1)
        front.target = Address(second.host, second.port)
        for number in range(1, 20):
            done = await asyncio.gather(write(-2 * number), write(-2 * number - 1), return_exceptions=True)
            errors += [error for error in done if isinstance(error, Exception)]
        refused = [error for error in errors if not isinstance(error, NoPrimaryError)]
        seen = hosts.snapshot()
        await asyncio.to_thread(first.kill)
        await second.promote()
        await hosts.primary(wait=20)
        await asyncio.gather(write(-100), write(-101))
    await front.stop()
    figure("demoted behind a proxy: writes that met the replica", len(refused), "<= 2")

    assert seen.primary is None
    assert len(refused) <= 2, refused
    assert await second.fetchval("SELECT count(*) FROM item WHERE id IN (-100, -101)") == 2


async def port(db):
    async with db_context():
        return (await (await db_session(db)).execute(PORT)).scalar_one()
