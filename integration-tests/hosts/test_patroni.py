"""The cluster manager that people run: Patroni with etcd elects the leader, and the clients find it, with the same figures."""

import asyncio
import time

import pytest
from context_sqla_hosts import Hosts, NoPrimaryError, patroni_members, primary
from support.proxy import proxy
from support.wire import Address

from . import programs
from .cluster import DATABASE, MONITOR, PASSWORD
from .load import bound, following, load, lost, watch, writing
from .patroni import patroni

WORKERS = 20
INTERVAL, TIMEOUT, FAILS = 1.0, 0.5, 2
LIMIT = TIMEOUT * FAILS + INTERVAL + 0.5
AT_LEAST = 1_000

pytestmark = pytest.mark.needs("etcd", "patroni")


async def kill(cluster, leader):
    await asyncio.to_thread(leader.kill)
    await cluster.expire()


async def switch_over(cluster, leader):
    await cluster.switch_over(leader, next(member for member in cluster.members if member is not leader))


async def refuse(cluster, leader):
    leader.etcd.mode = "refuse"
    leader.etcd.cut()
    await step_down(leader)
    await cluster.expire()


async def silence(cluster, leader):
    leader.etcd.mode = "hang"
    await step_down(leader)
    await cluster.expire()


async def step_down(leader):
    """Wait until the leader has given up by itself; one that is cut off does that before its lock ends."""
    async with asyncio.timeout(90):
        while await leader.is_primary():
            await asyncio.sleep(0.05)


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("fault", "driver"),
    [(kill, "asyncpg"), long(kill, "psycopg"), (switch_over, "asyncpg"), long(switch_over, "psycopg"),
     long(refuse, "asyncpg"), long(silence, "asyncpg")],
)  # fmt: skip
async def test_only_work_in_flight_fails_when_the_leader_changes(figure, fault, driver):
    """Killed, switched over, or cut off from etcd: each worker loses at most what was in flight, and finds the new leader."""
    async with patroni() as cluster:
        old = await cluster.leader()
        async with watch(cluster.members, interval=INTERVAL, driver=driver) as hosts:
            async with following(primary(hosts, wait=60), driver=driver) as db, load(writing(db), WORKERS) as running:
                await running.until(300)
                at = time.monotonic()
                changing = asyncio.create_task(fault(cluster, old))
                new, visible = await cluster.promotion(other_than=old)
                await running.until_by(new, 300)
                await changing
                hanging = running.hanging(LIMIT)
            old.etcd.mode = "pass"
            if fault is not kill:  # it comes back as a replica
                await hosts.ready(replicas=2, timeout=120)
    first = min(ack.at for ack in running.acked_by(new))
    label = f"Patroni, {fault.__name__}, {driver}"
    figure(f"{label}: errors of {WORKERS} workers", len(running.failed), f"<= {WORKERS}")
    figure(f"{label}: first ack after the promotion is visible, s", max(0.0, first - visible), "<= 0.3")
    figure(f"{label}: promotion visible after s", visible - at)

    assert len(running.failed) <= WORKERS, running.kinds()
    assert first - visible <= 3
    assert hanging == 0
    assert running.acked_by(old, since=first) == []


async def test_a_zombie_that_patroni_left_behind_gets_no_write(figure):
    """Patroni died, its PostgreSQL writes on: from the moment at which the new leader is seen, not one write goes to the old."""
    async with patroni() as cluster:
        old = await cluster.leader()
        async with watch(cluster.members, interval=INTERVAL) as hosts, following(primary(hosts, wait=60)) as db:
            async with load(writing(db), WORKERS) as running:
                seen = when_another_leads(hosts, old)
                await running.until(300)
                await kill_agent(cluster, old)
                new, visible = await cluster.promotion(other_than=old)
                await running.until_by(new, AT_LEAST)
                assert await old.is_primary()  # it is alive, and would take them
        fence, *_ = seen
        late = running.acked_by(old, since=fence)
        figure(f"Patroni, zombie: acknowledged by it after the fence, of {len(running.acked_by(new))}", len(late), "0")
        figure(f"Patroni, zombie: errors of {WORKERS} workers", len(running.failed), f"<= {WORKERS}")
        figure("Patroni, zombie: fence after the promotion is visible, s", max(0.0, fence - visible), f"<= {INTERVAL + 0.3:g}")
        async with watch(cluster.members) as hosts, bound(primary(hosts, wait=30)) as write, load(write, WORKERS) as fresh:
            await fresh.until(AT_LEAST)
            assert await old.is_primary()
        there = fresh.acked_by(old)
        figure(f"Patroni, zombie, fresh client: acknowledged by it, of {len(fresh.acked)}", len(there), "0")

    assert late == []
    assert len(running.failed) <= WORKERS, running.kinds()
    assert fence - visible <= 10 * (INTERVAL + 0.3)
    assert there == []


@pytest.mark.parametrize("driver", ["asyncpg", long("psycopg")])
async def test_a_leader_that_freezes_and_thaws_is_left(figure, driver):
    """Nobody hangs on a machine that stands still, and what it does when it goes on reaches no client."""
    async with patroni() as cluster:
        old = await cluster.leader()
        async with watch(cluster.members, interval=INTERVAL, timeout=TIMEOUT, max_fails=FAILS, driver=driver) as hosts:
            async with following(primary(hosts, wait=60), driver=driver) as db, load(writing(db), WORKERS) as running:
                await running.until(300)
                old.suspend()
                await cluster.expire()
                new, visible = await cluster.promotion(other_than=old)
                await running.until_by(new, 300)
                hanging = running.hanging(LIMIT)
                thawed = time.monotonic()
                old.resume()
                await step_down(old)
                await running.until(300)
    first = min(ack.at for ack in running.acked_by(new))
    zombie = [ack for ack in running.acked_by(old) if ack.at > thawed]
    label = f"Patroni, frozen, {driver}"
    figure(f"{label}: errors of {WORKERS} workers", len(running.failed), f"<= {WORKERS}")
    figure(f"{label}: workers that hang", hanging, "0")
    figure(f"{label}: first ack after the promotion is visible, s", max(0.0, first - visible), "<= 0.3")
    figure(f"{label}: acknowledged by the old leader when it thawed", len(zombie), "0")

    assert hanging == 0
    assert len(running.failed) <= WORKERS, running.kinds()
    assert first - visible <= 3
    assert zombie == []


@pytest.mark.long
async def test_a_cluster_that_goes_back_a_timeline_is_refused_until_somebody_says_so(figure, caplog):
    """Patroni 3.0.2 on etcd v3 may let a leader that thaws rewind the one that was elected meanwhile: acknowledged rows vanish.

    That takes a race between its threads. Here the lock is given back to it, which is what follows from that race.
    """
    async with patroni(programs.OLD) as cluster:
        old = await cluster.leader()
        async with watch(cluster.members) as hosts, following(primary(hosts, wait=60)) as db:
            async with load(writing(db), WORKERS) as running:
                await running.until(300)
                old.suspend()
                await cluster.expire()
                new, _ = await cluster.promotion(other_than=old)
                await running.until_by(new, 300)
                await cluster.give_lock(old)
                old.etcd.cut()  # or it may hear first, on its way there, that another one had the lock meanwhile, and steps down
                old.resume()
                async with cluster.patience():
                    await until(lambda: hosts.snapshot().host(old.address).fenced and hosts.snapshot().primary is None)
                await cluster.leader(other_than=new)
                refused = time.monotonic()
                before = await old.fetchval("SELECT count(*) FROM item")
                with pytest.raises(NoPrimaryError) as caught:
                    await hosts.primary(wait=3)
                written = await old.fetchval("SELECT count(*) FROM item") - before
                told = caplog.text
                hosts.reset_fence()
                await running.until_by(old, len(running.acked_by(old)) + AT_LEAST)
                for _ in range(3):  # a replica that was left on the other timeline does not raise the fence again
                    await hosts.refresh()
                await running.until_by(old, len(running.acked_by(old)) + 300)
                lost_rows = await lost(running.acked_by(new), old)
    figure("Patroni 3.0.2 goes back a timeline: written there before reset_fence()", written, "0")
    figure(f"Patroni 3.0.2 goes back a timeline: acknowledged rows it lost, of {len(running.acked_by(new))}", lost_rows, "shown")

    assert caught.value.snapshot.fence == 2
    assert written == 0
    assert [ack for ack in running.acked if refused < ack.at < refused + 3] == []
    assert f"{old.address} is fenced" in told
    assert "There is no primary" in told
    assert lost_rows > 0


async def test_patroni_forbids_a_zombie_whose_successor_cannot_be_seen(figure):
    """Who can reach the old leader's PostgreSQL alone has no evidence against it; the second opinion is enough not to write there."""
    async with patroni(size=2) as cluster:
        old = await cluster.leader()
        found = await patroni_members(*(member.rest for member in cluster.members))
        assert found == {member.address: member.rest for member in cluster.members}
        await kill_agent(cluster, old)
        new, _ = await cluster.promotion(other_than=old)
        async with proxy(Address(new.host, new.port)) as way:
            way.mode = "refuse"
            members = {old.address: old.rest, way.host: new.rest}
            login = {"user": MONITOR, "password": PASSWORD, "database": DATABASE}
            async with Hosts(list(members), **login) as hosts, following(primary(hosts, wait=5)) as db:
                await writing(db)(-1)
            async with Hosts(list(members), patroni=members, **login) as hosts, following(primary(hosts, wait=2)) as db:
                await until(lambda: hosts.snapshot().host(old.address).fenced)
                with pytest.raises(NoPrimaryError):
                    await writing(db)(-2)
                way.mode = "pass"
                assert await hosts.primary(wait=30) == way.host
                await writing(db)(-3)
        zombie = await old.fetchval("SELECT array_agg(id) FROM item")
        there = await new.fetchval("SELECT array_agg(id) FROM item")
    figure("Patroni, zombie alone in sight: written there, without and with the second opinion", "1, 0", "1, 0")

    assert (zombie, there) == ([-1], [-3])


def when_another_leads(hosts, old):
    """Note the times at which the monitor has another primary than the old one."""
    seen = []
    hosts.subscribe(lambda snapshot: seen.append(time.monotonic()) if snapshot.primary not in (None, old.address) else None)
    return seen


async def until(is_so, timeout=60):
    async with asyncio.timeout(timeout):
        while not is_so():
            await asyncio.sleep(0.02)


async def kill_agent(cluster, member):
    member.agent.kill()
    await asyncio.to_thread(member.agent.wait, 30)
    await cluster.expire()
