"""pgbouncer with transaction pooling between the clients and the cluster: what holds, and what has to be set."""

import asyncio
import contextlib
import time

import asyncpg
import pytest
from context_sqla import db_context, db_session
from context_sqla_hosts import NoPrimaryError, primary
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from .cluster import DATABASE, PASSWORD, USER
from .load import following, load, promote_visibly, watch, writing
from .pgbouncer import pgbouncer

WORKERS = 20
INTERVAL, TIMEOUT, FAILS = 1.0, 0.5, 2
LIMIT = TIMEOUT * FAILS + INTERVAL + 0.5

pytestmark = pytest.mark.needs("pgbouncer")
each_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])

INSERT = text("INSERT INTO item (id, number) VALUES (:id, :number)")
IDLE_IN_TRANSACTION = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"


async def rows(node):
    """What is committed, seen past pgbouncer."""
    return await node.fetchval("SELECT coalesce(array_agg(id ORDER BY id), '{}') FROM item")


@each_driver
async def test_a_unit_of_work_commits_and_rolls_back(calm, driver):
    """Though every transaction may run on another connection of the server; with more clients than servers."""
    first, *_ = calm

    async def work(number):
        with contextlib.suppress(ZeroDivisionError):
            async with db_context():
                session = await db_session(db)
                await session.execute(INSERT, {"id": number, "number": number})
                await session.execute(text("SELECT :x"), {"x": str(number)})
                if number % 2:
                    raise ZeroDivisionError

    async with pgbouncer(first) as front, following(None, host=front.address, driver=driver, pool=15, pooled=True) as db:
        await asyncio.gather(*map(work, range(200)))

        assert await rows(first) == list(range(0, 200, 2))
        assert await first.fetchval(IDLE_IN_TRANSACTION) == 0


@each_driver
async def test_a_silent_rollback_is_noticed(calm, driver):
    """`COMMIT` of a transaction that has failed is answered with `ROLLBACK` here too, and is an error (P4a)."""
    first, *_ = calm
    async with pgbouncer(first) as front, following(None, host=front.address, driver=driver, pooled=True) as db:
        with pytest.raises(DBAPIError) as caught:
            async with db_context():
                session = await db_session(db)
                await session.execute(INSERT, {"id": 1, "number": 1})
                with contextlib.suppress(DBAPIError):
                    await session.execute(text("SELECT 1 / 0"))
        async with db_context():
            await (await db_session(db)).execute(INSERT, {"id": 2, "number": 2})

    assert any("(P4a)" in note for note in caught.value.__notes__)
    assert await rows(first) == [2]


@each_driver
async def test_two_phases(calm, driver):
    """What is prepared belongs to the database and not to a connection: it is committed from whichever comes."""
    first, *_ = calm
    async with pgbouncer(first) as front:
        options = {"host": front.address, "driver": driver, "pooled": True, "session_options": {"twophase": True}}
        async with following(None, **options) as one, following(None, **options) as other:
            for number in range(10):
                async with db_context():
                    for db, offset in ((one, 0), (other, 100)):
                        await (await db_session(db)).execute(INSERT, {"id": offset + number, "number": number})
            with pytest.raises(ZeroDivisionError):
                async with db_context():
                    await (await db_session(one)).execute(INSERT, {"id": 1_000, "number": 1})
                    raise ZeroDivisionError

    assert await rows(first) == [*range(10), *range(100, 110)]
    assert await first.fetchval("SELECT count(*) FROM pg_prepared_xacts") == 0


@each_driver
async def test_cancelled_work_is_rolled_back_and_its_connection_goes_on(calm, driver):
    """pgbouncer passes the request to cancel on; no transaction stays open on the server."""
    first, *_ = calm
    async with pgbouncer(first) as front:
        async with following(None, host=front.address, driver=driver, pool=1, pooled=True) as db:
            for number in range(3):
                running = asyncio.ensure_future(sleep(db, number))
                await until_sleeping(first)
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
                async with db_context():
                    await (await db_session(db)).execute(INSERT, {"id": 100 + number, "number": number})

            assert await rows(first) == [100, 101, 102]
            assert await first.fetchval(IDLE_IN_TRANSACTION) == 0


async def sleep(db, number):
    async with db_context():
        session = await db_session(db)
        await session.execute(INSERT, {"id": number, "number": number})
        await session.execute(text("SELECT pg_sleep(60)"))


async def until_sleeping(node):
    async with node.session() as connection, asyncio.timeout(30):
        while not await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(60)'"):
            await asyncio.sleep(0.01)


async def test_what_pgbouncer_remembers_of_a_role_is_not_believed(nodes, figure):
    """After a switch behind its address a connection is told that the server takes writes; the monitor asks the server."""
    first, second, third = nodes
    async with pgbouncer(first) as front:
        login = {"host": front.host, "port": front.port, "user": USER, "password": PASSWORD, "database": DATABASE}
        await (await asyncpg.connect(**login, statement_cache_size=0)).close()
        await front.console("PAUSE")
        await asyncio.to_thread(first.stop, "fast")
        await second.promote()
        await first.rejoin(second)  # the same address is a replica now
        await front.console("RESUME")
        believed = await asyncpg.connect(**login, target_session_attrs="primary", statement_cache_size=0)
        in_recovery = await believed.fetchval("SELECT pg_is_in_recovery()")
        await believed.close()
        async with watch([front]) as hosts:
            snapshot = await hosts.ready(primary=False)
            with pytest.raises(NoPrimaryError):
                await hosts.primary(wait=0.5)
    figure("pgbouncer: asyncpg's target_session_attrs='primary' leads to a replica", in_recovery, "shown")

    assert snapshot.host(front.address).role == "replica"


@pytest.mark.parametrize("driver", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.long)])
async def test_a_switchover_between_pause_and_resume_costs_no_error(nodes, figure, driver):
    """`PAUSE`, promote, `RELOAD`, `RESUME`, under load: every client waits, and none fails."""
    first, second, third = nodes
    async with pgbouncer(first) as front, watch([front], interval=INTERVAL, driver=driver) as hosts:
        async with following(primary(hosts, wait=20), driver=driver, pooled=True) as db, load(writing(db), WORKERS) as running:
            await running.until(300)
            started = time.monotonic()
            await front.console("PAUSE")
            await first.caught_up(second)
            await asyncio.to_thread(first.stop, "fast")
            await promote_visibly(second)
            await third.follow(second)
            await front.lead_to(second)
            await front.console("RESUME")
            took = time.monotonic() - started
            await running.until_by(second, 300)
            known = await hosts.refresh()  # the pause may have been shorter than the interval
    figure(f"pgbouncer, PAUSE to RESUME, {driver}: errors of {WORKERS} workers", len(running.failed), "0")
    figure(f"pgbouncer, PAUSE to RESUME, {driver}: longest wait, s", running.gap(), f"paused for {took:.2f}")

    assert running.failed == [], running.kinds()
    assert known.fence == 2


@pytest.mark.parametrize("driver", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.long)])
async def test_a_server_that_dies_behind_pgbouncer_is_left(nodes, figure, driver):
    """One pgbouncer for each server: connecting to it goes on to succeed, yet the monitor sees that nothing answers behind it."""
    first, second, third = nodes
    async with contextlib.AsyncExitStack() as stack:
        fronts = [await stack.enter_async_context(pgbouncer(node)) for node in nodes]
        hosts = await stack.enter_async_context(watch(fronts, interval=INTERVAL, timeout=TIMEOUT, max_fails=FAILS, driver=driver))
        db = await stack.enter_async_context(following(primary(hosts, wait=20), driver=driver, pooled=True))
        running = await stack.enter_async_context(load(writing(db), WORKERS))
        await running.until(300)
        killed = time.monotonic()
        await asyncio.to_thread(first.kill)
        visible = await promote_visibly(second)
        await third.follow(second)
        await running.until_by(second, 300)
        hanging = running.hanging(LIMIT)
    again = min(ack.at for ack in running.acked_by(second))
    figure(f"pgbouncer, server killed, {driver}: errors of {WORKERS} workers", len(running.failed), f"<= {WORKERS}")
    figure(f"pgbouncer, server killed, {driver}: writes flow again after s", again - killed, f"<= {LIMIT:g}")
    figure(f"pgbouncer, server killed, {driver}: workers that hang", hanging, "0")

    assert len(running.failed) <= WORKERS, running.kinds()
    assert again - max(killed, visible) < 3 * LIMIT
    assert hanging == 0
