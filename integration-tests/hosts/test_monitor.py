"""The monitor among hosts that fail in every way at once, and with the least rights."""

import asyncio
import contextlib
import socket
import time

import pytest
from context_sqla_hosts import Hosts, NoPrimaryError, primary
from support.postgres import LOOPBACK, Postgres, free_port
from support.proxy import Proxy
from support.wire import Address

from .cluster import DATABASE, MONITOR, PASSWORD, PLAIN, USER
from .load import following, load, promote_visibly, watch, writing

INTERVAL = 0.2


@contextlib.contextmanager
def black_hole():
    """A port where connecting neither succeeds nor fails: Linux drops a SYN for a socket whose queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((LOOPBACK, 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        yield f"{LOOPBACK}:{listener.getsockname()[1]}"


@pytest.mark.parametrize("driver", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.long)])
async def test_hosts_that_fail_delay_no_others(calm, figure, driver):
    """One hangs, one is a black hole, one refuses, one is of another cluster, one refuses the login: the rest is watched on time."""
    first, second, third = calm
    hung = Proxy(Address(first.host, first.port))
    await hung.start()
    hung.mode, silent = "hang", hung.host
    with Postgres() as foreign, Postgres() as locked, black_hole() as hole:
        await asyncio.to_thread(let_in, foreign)
        refused = f"{LOOPBACK}:{free_port()}"
        names = [node.address for node in calm] + [silent, hole, refused, foreign.address, locked.address]
        before = asyncio.all_tasks()
        hosts = Hosts(names, user=MONITOR, password=PASSWORD, database=DATABASE, driver=driver, interval=INTERVAL)
        async with hosts:
            await hosts.ready(replicas=2)
            oldest, until = 0.0, time.monotonic() + 3
            while time.monotonic() < until:
                oldest = max(oldest, *(hosts.snapshot().host(node.address).age() for node in calm))
                await asyncio.sleep(0.01)
            snapshot = hosts.snapshot()
        left = [task for task in asyncio.all_tasks() - before if "Proxy" not in repr(task)]
        async with first.session() as connection, asyncio.timeout(10):
            while await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", MONITOR):
                await asyncio.sleep(0.02)
    await hung.stop()
    figure(f"five broken hosts, {driver}: oldest observation of a good one, s", oldest, f"< {2 * INTERVAL:g}")
    figure(f"five broken hosts, {driver}: tasks left", len(left), "0")

    assert oldest < 10 * INTERVAL
    assert left == []
    assert snapshot.primary == first.address
    assert snapshot.host(foreign.address).foreign
    assert [snapshot.host(name).state for name in (silent, hole, refused, locked.address)] == ["dead"] * 4
    assert [snapshot.host(name).error for name in (silent, hole, refused)] == ["timeout", "timeout", "refused"]
    assert PASSWORD not in f"{hosts!r} {snapshot} {snapshot!r} {list(hosts.metrics)}"


def let_in(server):
    """Give another cluster the monitor's role."""
    import psycopg

    login = {"user": USER, "password": PASSWORD, "dbname": DATABASE}
    with psycopg.connect(host=server.host, port=server.port, autocommit=True, **login) as connection:
        connection.execute(f"CREATE ROLE {MONITOR} LOGIN PASSWORD '{PASSWORD}'")


@pytest.mark.long
async def test_a_role_without_rights_is_enough_for_a_failover(nodes, figure):
    """Without `pg_monitor` the timelines of replicas are not seen, and all else is."""
    first, second, third = nodes
    async with watch(nodes, user=PLAIN, interval=INTERVAL) as hosts, following(primary(hosts, wait=20)) as db:
        await hosts.ready(replicas=2)
        while any(status.lag() is None for status in hosts.snapshot()):
            await hosts.changed(1)
        async with load(writing(db)) as running:
            await running.until(200)
            await asyncio.to_thread(first.kill)
            await promote_visibly(second)
            await third.follow(second)
            await running.until(200)
            await asyncio.to_thread(first.start)
            again = time.monotonic()
            await running.until(500)
    zombie = sum(ack.port == first.port for ack in running.acked_after(again))
    figure("role without rights: errors of 20 workers", len(running.failed), "<= 20")
    figure("role without rights: acknowledged by the zombie", zombie, "0")

    assert len(running.failed) <= 20, running.kinds()
    assert zombie == 0


async def test_an_administrator_may_end_the_connections(calm):
    """A session that is terminated, the monitor's own too, costs nobody else anything: the host is looked at, and kept."""
    first = calm[0]
    async with watch(calm, interval=5) as hosts, following(primary(hosts, wait=20)) as db:
        deaths = []
        await hosts.ready(replicas=2)
        hosts.subscribe(lambda snapshot: deaths.append(snapshot.host(first.address).state))
        async with load(writing(db), 4) as running:
            await running.until(50)
            await first.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            await running.until(50)

    assert "dead" not in deaths
    assert len(running.failed) <= 4, running.kinds()


async def test_an_event_loop_that_is_blocked_is_no_server_that_hangs(calm):
    """A handler that computes for longer than the limit of a probe makes no host suspect."""
    async with watch(calm, interval=0.001, timeout=1.0, max_fails=1) as hosts:
        await hosts.ready(replicas=2)
        for _ in range(4):
            await asyncio.sleep(0.01)
            time.sleep(1.2)
        failures = [sample for sample in hosts.metrics if sample.name == "probe_failures_total"]

    assert failures == []


async def test_a_session_waits_for_the_primary_as_long_as_it_was_told(nodes):
    """With nobody to promote, sessions get an error that names the hosts, and the watch goes on."""
    first, second, third = nodes
    async with watch(nodes, interval=INTERVAL) as hosts, following(primary(hosts, wait=1)) as db:
        await writing(db)(-1)
        await asyncio.to_thread(first.stop, "fast")
        with pytest.raises(NoPrimaryError) as caught:
            await writing(db)(-2)
        await asyncio.to_thread(first.start)
        async with asyncio.timeout(20):
            while hosts.primary_now() is None:
                await hosts.changed(1)
        await writing(db)(-2)

    assert caught.value.retry_after
    assert first.address in str(caught.value)
    assert PASSWORD not in str(caught.value)
