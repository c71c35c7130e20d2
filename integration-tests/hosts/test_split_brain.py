"""The old primary comes back beside the new one: no client may write to it."""

import asyncio
import time

import pytest
from context_sqla_hosts import NoPrimaryError, SplitBrainError, primary

from .cluster import MONITOR
from .load import bound, following, load, watch, writing

AT_LEAST = 1_000


async def test_nothing_is_acknowledged_by_a_zombie(nodes, figure):
    """Not to a client that runs, not to a fresh one, and not to one that started after the new primary had died."""
    first, second, third = nodes  # the zombie stands first in every list
    async with watch(nodes, interval=0.2) as hosts, following(primary(hosts, wait=5)) as db:
        async with load(writing(db)) as running:
            await running.until(200)
            await asyncio.to_thread(first.kill)
            await second.promote()
            await third.follow(second)
            await running.until(200)
            await asyncio.to_thread(first.start)
            zombie_at = time.monotonic()
            await running.until(AT_LEAST)
            report(figure, "running client", running.acked_after(zombie_at), first)
    async with watch(nodes, interval=0.2) as hosts, bound(primary(hosts, wait=5)) as write:
        async with load(write) as running:
            await running.until(AT_LEAST)
            report(figure, "fresh client, bound engine", running.acked, first)
    async with watch(nodes, interval=0.2) as hosts, following(primary(hosts, wait=5)) as db:
        async with load(writing(db)) as running:
            await running.until(AT_LEAST)
            report(figure, "fresh client", running.acked, first)
            await second.fetchval("SELECT pg_switch_wal()")
            await asyncio.to_thread(second.kill)
            dead_at = time.monotonic()
            await asyncio.sleep(2)
            acked = running.acked_after(dead_at + 0.5)
            figure("split brain, running client after the new primary's death: acknowledged at all", len(acked), "0")
            assert acked == []
    async with watch(nodes, interval=0.2) as hosts, following(primary(hosts, wait=2)) as db:
        started = time.monotonic()
        with pytest.raises(NoPrimaryError) as caught:
            await writing(db)(-1)
        snapshot = caught.value.snapshot
        written = await first.fetchval("SELECT count(*) FROM item WHERE id < 0")
        figure("split brain, client started after the new primary's death: written", written, "0")

        assert written == 0
        assert time.monotonic() - started > 1.9
        assert snapshot.host(first.address).fenced
        assert snapshot.fence == 2
        assert snapshot.host(second.address).state == "dead"


async def test_two_primaries_of_one_timeline_are_not_chosen_between(nodes, figure):
    """Two replicas of one primary that were both promoted are equally good: a fresh client refuses to guess."""
    first, second, third = nodes
    await asyncio.to_thread(first.kill)
    await asyncio.gather(second.promote(), third.promote())
    async with watch(nodes, interval=0.2) as hosts, following(primary(hosts, wait=1)) as db:
        with pytest.raises(SplitBrainError):
            await writing(db)(-1)
    written = sum([await node.fetchval("SELECT count(*) FROM item WHERE id < 0") for node in (second, third)])
    figure("split brain, equal timelines, fresh client: written", written, "0")

    assert written == 0


async def test_without_evidence_there_is_no_primary_if_it_is_required(nodes):
    """`require_timeline_evidence` waits for a follower that knows the timeline; until then a lone server is not trusted."""
    first, second, third = nodes
    await asyncio.gather(*(asyncio.to_thread(node.stop, "fast") for node in (second, third)))
    async with watch(nodes, interval=0.2, require_timeline_evidence=True) as hosts:
        with pytest.raises(NoPrimaryError):
            await hosts.ready(timeout=1)
        await asyncio.to_thread(second.start)
        snapshot = await hosts.ready(timeout=10)

    assert snapshot.primary == first.address


async def test_the_fence_is_lowered_by_hand_only(nodes):
    """A primary of a lower timeline is refused, loudly, until an operator says that it is meant."""
    first, second, third = nodes
    async with watch(nodes, interval=0.2, user=MONITOR) as hosts:
        await hosts.ready()
        await asyncio.to_thread(first.stop, "fast")
        await second.promote()
        await hosts.primary(wait=10)
        await asyncio.gather(*(asyncio.to_thread(node.stop, "fast") for node in (second, third)))
        await asyncio.to_thread(first.start)
        with pytest.raises(NoPrimaryError):
            await hosts.primary(wait=1)
        hosts.reset_fence()

        assert await hosts.primary(wait=10) == first.address


def report(figure, client, acked, zombie):
    there = sum(ack.port == zombie.port for ack in acked)
    figure(f"split brain, {client}: acknowledged by the zombie, of {len(acked)}", there, "0")
    assert there == 0
    assert len(acked) >= AT_LEAST
