"""What the monitor says about lag, beside what a reader really sees."""

import asyncio
import bisect
import time

import pytest
from context_sqla_hosts import NoReplicaError, replica

from .load import watch

INTERVAL = 0.2


class Heartbeat:
    """Rows that are committed every few milliseconds, and when each was acknowledged."""

    def __init__(self):
        self.at = []

    async def run(self, node, pause=0.005):
        async with node.session() as connection:
            while True:
                await connection.execute(f"INSERT INTO item (id) VALUES ({len(self.at)})")
                self.at.append(time.monotonic())
                await asyncio.sleep(pause)

    def truth(self, seen, now):
        """How old the data of a reader is that saw so many rows: the age of the first that it did not see."""
        missing = self.at[seen : bisect.bisect(self.at, now)]
        return now - missing[0] if missing else 0.0


@pytest.mark.parametrize(
    "delay", [pytest.param("0", marks=pytest.mark.long), "100ms", pytest.param("500ms", marks=pytest.mark.long)]
)
async def test_lag_is_never_less_than_it_is(calm, figure, delay):
    """The estimate is an upper bound, without clocks that agree, and not far above the truth."""
    first, second, _ = calm
    await second.configure(recovery_min_apply_delay=delay)
    heartbeat, errors = Heartbeat(), []
    beating = asyncio.create_task(heartbeat.run(first))
    async with watch(calm, interval=INTERVAL) as hosts, second.session() as reader:
        until = time.monotonic() + 4
        while time.monotonic() < until:
            now = time.monotonic()
            estimate = hosts.snapshot().host(second.address).lag(now)
            seen = await reader.fetchval("SELECT count(*) FROM item")
            if estimate is not None:
                errors.append(estimate - heartbeat.truth(seen, now))
            await asyncio.sleep(0.007)
    beating.cancel()
    errors.sort()
    high = errors[int(len(errors) * 0.99)]
    figure(f"lag, apply delay {delay}: estimate - truth, least, s", errors[0], ">= -0.01")
    figure(f"lag, apply delay {delay}: estimate - truth, 99 % of {len(errors)}, s", high, f"<= {2 * INTERVAL + 0.1:g}")

    assert errors[0] >= -0.01
    assert high <= 5 * (2 * INTERVAL + 0.1)


async def test_a_replica_of_an_idle_primary_is_not_behind(calm, figure):
    """Nothing written for five seconds is no lag; a log that was just switched to a new file neither."""
    first, second, third = calm
    await first.execute("SELECT pg_switch_wal()")
    async with watch(calm, interval=INTERVAL) as hosts:
        await hosts.ready(replicas=2)
        await asyncio.sleep(5)
        worst = max(hosts.snapshot().host(node.address).lag() for node in (second, third))
    figure("lag, idle for 5 s", worst, f"< {2 * INTERVAL:g}")

    assert worst < 10 * INTERVAL


@pytest.mark.long
async def test_a_replica_that_is_cut_off_drops_out(nodes, figure):
    """Its lag grows with the clock from the moment at which it was cut off."""
    first, second, third = nodes
    heartbeat, limit = Heartbeat(), 1.0
    beating = asyncio.create_task(heartbeat.run(first))
    async with watch(nodes, interval=INTERVAL) as hosts:
        await hosts.ready(replicas=2)
        while any(status.lag() is None for status in hosts.snapshot()):
            await hosts.changed(1)
        choice = replica(hosts, max_lag=limit, fallback="error")
        await third.cut_off()
        await second.cut_off()
        cut = time.monotonic()
        while True:
            try:
                await choice.choose()
            except NoReplicaError:
                break
            await asyncio.sleep(0.005)
        gone = time.monotonic() - cut
        await asyncio.sleep(1)
        seen = await second.fetchval("SELECT count(*) FROM item")
        now = time.monotonic()
        estimate = hosts.snapshot().host(second.address).lag(now)
        truth = heartbeat.truth(seen, now)
    beating.cancel()
    figure(f"cut off, max_lag {limit:g}: excluded after s", gone, f"<= {limit + INTERVAL:g}")
    figure("cut off: estimate - truth, s", estimate - truth, ">= -0.01")

    assert gone <= 5 * (limit + INTERVAL)
    assert estimate >= truth - 0.01
