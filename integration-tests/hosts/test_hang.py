"""The primary hangs (SIGSTOP): its kernel still accepts connections, and nothing is ever answered."""

import asyncio
import time

import pytest
from context_sqla_hosts import primary

from .load import bound, following, load, promote_visibly, watch, writing

WORKERS = 20
INTERVAL, TIMEOUT, FAILS = 1.0, 0.5, 2
LIMIT = TIMEOUT * FAILS + INTERVAL + 0.5


@pytest.mark.parametrize(
    "client", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.long), pytest.param("bound engine", marks=pytest.mark.long)]
)
async def test_a_hung_primary_is_left_and_nobody_hangs(nodes, figure, client):
    """Writes flow again after the detection, what was in flight is cut, and the other hosts are watched on time meanwhile."""
    first, second, third = nodes
    driver = "psycopg" if client == "psycopg" else "asyncpg"
    async with watch(nodes, interval=INTERVAL, timeout=TIMEOUT, max_fails=FAILS, driver=driver) as hosts:
        chosen = primary(hosts, wait=20)
        async with following(chosen, driver=driver) as db, bound(chosen) as write:
            async with load(write if client == "bound engine" else writing(db), WORKERS) as running:
                await running.until(300)
                hung = time.monotonic()
                first.suspend()
                promotion = asyncio.create_task(promote_later(second, third))
                oldest = await ages(hosts, (second.address, third.address), hung + LIMIT)
                await promotion
                await running.until(100)
                gap = min(ack.at for ack in running.acked if ack.port == second.port) - hung
                await running.until(200)
                hanging = running.hanging(LIMIT)
                first.resume()
                await running.until(200)
    figure(f"SIGSTOP, {client}: writes flow again after s", gap, f"<= {LIMIT:g}")
    figure(f"SIGSTOP, {client}: workers that hang", hanging, "0")
    figure(f"SIGSTOP, {client}: errors of {WORKERS} workers", len(running.failed), f"<= {WORKERS}")
    figure(f"SIGSTOP, {client}: oldest observation of another host, s", oldest, f"< {2 * INTERVAL:g}")

    assert hanging == 0
    assert gap < 3 * LIMIT
    assert len(running.failed) <= WORKERS, running.kinds()
    assert oldest < 3 * INTERVAL
    assert not [ack for ack in running.acked if ack.port == first.port and ack.at > hung + LIMIT]


async def promote_later(second, third):
    await asyncio.sleep(0.5)
    await promote_visibly(second)
    await third.follow(second)


async def ages(hosts, watched, until):
    """The oldest observation of these hosts while one hangs."""
    oldest = 0.0
    while time.monotonic() < until:
        oldest = max(oldest, *(hosts.snapshot().host(host).age() for host in watched))
        await asyncio.sleep(0.02)
    return oldest
