"""Which host a session gets, for what is known of the hosts."""

import asyncio
import itertools
from collections import Counter

import pytest
from context_sqla import DBConnect, ForeignLoopError, UnavailableError, db_context, db_session
from context_sqla_hosts import (
    Choice,
    Hosts,
    MonitorError,
    NoPrimaryError,
    NoReplicaError,
    Position,
    SplitBrainError,
    at_least,
    bind_engine,
    primary,
    replica,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine


async def many(choice, count=100):
    return Counter([await choice.choose() for _ in range(count)])


async def test_a_session_gets_the_primary(hosts):
    """And waits for nothing where it is known."""
    hosts.tell_all()

    assert await primary(hosts, wait=0).choose() == "a:5432"


async def test_a_session_waits_for_a_primary(hosts):
    """Until there is one; everybody who waits gets it."""
    hosts.tell_all()
    hosts.fails("a")
    waiting = [asyncio.ensure_future(primary(hosts, wait=60).choose()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    hosts.primary_says("b", timeline=2)

    assert await asyncio.gather(*waiting) == ["b:5432"] * 3


async def test_no_primary_is_a_503_that_names_the_hosts(hosts):
    """Every adapter answers it without knowing this package."""
    hosts.tell_all()
    hosts.fails("a")
    with pytest.raises(NoPrimaryError) as caught:
        await primary(hosts, wait=0).choose()

    assert isinstance(caught.value, UnavailableError)
    assert caught.value.retry_after
    assert "a:5432 dead refused" in str(caught.value)
    assert caught.value.snapshot.primary is None


async def test_a_split_brain_is_an_error_of_its_own(hosts):
    """Two primaries of one timeline: nobody writes to either."""
    hosts.fails("a")
    hosts.primary_says("b")
    hosts.primary_says("c")

    with pytest.raises(SplitBrainError):
        await primary(hosts, wait=0).choose()


async def test_a_doubt_makes_sessions_wait_for_the_next_answer(hosts):
    """An error of a session concludes nothing, and nobody runs into the same one while it is looked into."""
    hosts.tell_all()
    assert hosts.report("a", ConnectionResetError())
    waiting = asyncio.ensure_future(primary(hosts, wait=60).choose())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert hosts.in_doubt("a:5432")
    hosts.primary_says("a")

    assert await waiting == "a:5432"


class Refused(Exception):
    """What a driver raises."""

    def __init__(self, sqlstate):
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (Refused("57P01"), True),
        (Refused("08006"), True),
        (Refused("25006"), True),
        (DBAPIError("", {}, Refused("25006")), True),
        (DBAPIError("", {}, Exception(), connection_invalidated=True), True),
        (DBAPIError("", {}, Refused("23505")), False),
        (Refused("40001"), False),
        (ValueError(), False),
        (asyncio.CancelledError(), False),
    ],
)
async def test_only_errors_about_the_host_are_looked_into(hosts, error, counts):
    """A constraint that failed says nothing about the server."""
    hosts.tell_all()

    assert hosts.report("a:5432", error) is counts
    assert hosts.in_doubt("a:5432") is counts
    assert not hosts.report("elsewhere", ConnectionResetError())


async def test_reads_take_turns(hosts):
    """Evenly, and by weight where there are weights."""
    hosts.tell_all()

    assert await many(replica(hosts)) == {"b:5432": 50, "c:5432": 50}


async def test_weights_are_shares(told):
    """Three to one; a host of weight 0 only where there is no other."""
    async with told(["a", "b", "c", "d"], weights={"b": 3, "d": 0}) as hosts:
        hosts.tell_all()
        assert await many(replica(hosts)) == {"b:5432": 75, "c:5432": 25}
        hosts.fails("b")
        hosts.fails("c")
        assert await many(replica(hosts)) == {"d:5432": 100}


async def test_the_nearest_is_one_of_the_same_place(told):
    """And the one that answers soonest where the place does not tell."""
    async with told(["a", "b", "c"], locality="here", localities={"c": "here"}) as hosts:
        hosts.tell_all()
        assert await many(replica(hosts, balance="nearest")) == {"c:5432": 100}
        hosts.fails("c")
        assert await many(replica(hosts, balance="nearest")) == {"b:5432": 100}


async def test_a_replica_that_is_behind_gets_nothing(hosts):
    """By time, and by bytes."""
    hosts.tell_all(lsn=100)
    hosts.time += 5
    hosts.primary_says("a", lsn=300)
    hosts.replica_says("b", lsn=300)
    hosts.replica_says("c", lsn=250)

    assert await many(replica(hosts, max_lag=1)) == {"b:5432": 100}
    assert await many(replica(hosts, max_lag_bytes=49)) == {"b:5432": 100}
    assert len(await many(replica(hosts, max_lag_bytes=50))) == 2
    assert len(await many(replica(hosts, max_lag=5))) == 2


async def test_what_nobody_has_looked_at_for_long_is_not_within_any_limit(hosts):
    """An old figure is no figure."""
    hosts.tell_all()
    hosts.time += hosts.stale_after + 0.1

    assert await many(replica(hosts, max_lag=60)) == {"a:5432": 100}
    assert await many(replica(hosts, max_lag_bytes=60)) == {"a:5432": 100}
    assert len(await many(replica(hosts))) == 2


async def test_a_choice_that_was_right_ends_with_its_limit(hosts):
    """Time passes without news: what was worked out for the last news counts no longer."""
    hosts.tell_all()
    for choice in (replica(hosts, max_lag=1), at_least(hosts, lsn=Position(1, 100), max_lag=1, wait=0)):
        assert len(await many(choice)) == 2
        hosts.time += 1.1
        assert await many(choice) == {"a:5432": 100}
        hosts.tell_all()
        assert len(await many(choice)) == 2


async def test_a_replica_that_gets_stale_is_used_last(hosts):
    """One that was looked at lately comes first, from the moment on at which the other is too old."""
    hosts.tell_all()
    hosts.time += 1
    hosts.replica_says("c")
    choice = replica(hosts)
    assert len(await many(choice)) == 2
    hosts.time += hosts.stale_after - 0.9
    assert await many(choice) == {"c:5432": 100}
    hosts.time += 1
    assert len(await many(choice)) == 2


async def test_a_replica_whose_lag_is_unknown_does_not_qualify(hosts):
    """Unknown is not zero."""
    hosts.primary_says("a")
    hosts.replica_says("b", lsn=None)
    hosts.replica_says("c", lsn=50)

    assert await many(replica(hosts, max_lag=60)) == {"a:5432": 100}


async def test_suspect_replicas_and_those_in_doubt_are_used_last(hosts):
    """But they are used before the primary is."""
    hosts.tell_all()
    hosts.fails("b", "timeout", hard=False)
    assert await many(replica(hosts)) == {"c:5432": 100}
    hosts.report("c", ConnectionResetError())

    assert "a:5432" not in await many(replica(hosts))


@pytest.mark.parametrize("balance", ["round_robin", "random", "least_lag", "nearest"])
async def test_every_way_to_balance_chooses_among_those_that_qualify(hosts, balance):
    """Whatever the order."""
    hosts.tell_all()

    assert set(await many(replica(hosts, balance=balance))) <= {"b:5432", "c:5432"}


async def test_least_lag_takes_the_freshest(hosts):
    """The one whose data is youngest."""
    hosts.tell_all()
    hosts.time += 1
    hosts.primary_says("a", lsn=200)
    hosts.replica_says("c", lsn=200)

    assert await many(replica(hosts, balance="least_lag")) == {"c:5432": 100}


async def test_where_no_replica_qualifies_the_fallback_decides(hosts):
    """The primary, the least stale replica, or an error."""
    hosts.tell_all()
    hosts.time += 2
    hosts.primary_says("a", lsn=200)
    hosts.replica_says("c", lsn=150)

    assert await many(replica(hosts, max_lag=1)) == {"a:5432": 100}
    assert await many(replica(hosts, max_lag=1, fallback="stale")) in ({"b:5432": 100}, {"c:5432": 100})
    with pytest.raises(NoReplicaError):
        await replica(hosts, max_lag=1, fallback="error").choose()
    hosts.fails("a")
    with pytest.raises(NoReplicaError) as caught:
        await replica(hosts, max_lag=1, primary_wait=0).choose()
    assert isinstance(caught.value.__cause__, NoPrimaryError)
    assert hosts.metrics.get("selections_total", policy="replica", outcome="primary") == 100


@pytest.mark.parametrize(("fallback", "allowed"), [("primary", "a"), ("stale", "bc"), ("error", "")])
async def test_a_kept_connection_is_used_as_long_as_its_host_qualifies(hosts, fallback, allowed):
    """What a bound engine asks at every checkout."""
    choice = replica(hosts, max_lag=1, fallback=fallback)
    hosts.tell_all()
    assert [choice.allows(f"{host}:5432") for host in "abc"] == [False, True, True]
    hosts.time += 2
    assert "".join(host for host in "abc" if choice.allows(f"{host}:5432")) == allowed

    assert [primary(hosts).allows(f"{host}:5432") for host in "abc"] == [True, False, False]
    assert at_least(hosts).allows("c:5432")


async def test_a_position_is_looked_for_on_every_replica(hosts):
    """Who has replayed it, on this timeline."""
    hosts.tell_all(lsn=500, replayed=400)
    hosts.replica_says("c", lsn=500)

    assert await many(at_least(hosts, lsn=Position(1, 450))) == {"c:5432": 100}
    assert len(await many(at_least(hosts, lsn=Position(1, 400)))) == 2
    assert len(await many(at_least(hosts))) == 2
    assert await many(at_least(hosts, lsn="primary")) == {"a:5432": 100}


@pytest.mark.parametrize("balance", ["round_robin", "random"])
async def test_those_that_have_a_position_share_the_reads_evenly(told, balance):
    """The turns of one that is behind are spread over all others, and not left to its neighbour."""
    async with told(["a", "b", "c", "d"]) as hosts:
        hosts.tell_all(lsn=100)
        hosts.replica_says("c", lsn=50)
        found = await many(at_least(hosts, lsn=Position(1, 100), balance=balance), 1_000)

    assert set(found) == {"b:5432", "d:5432"}
    assert balance == "random" or abs(found["b:5432"] - 500) <= 20


async def test_a_position_of_another_timeline_is_the_primarys_affair(hosts):
    """What was written before a failover may be gone; what comes from a later one is not known here yet."""
    hosts.tell_all(lsn=500, timeline=2)

    assert await many(at_least(hosts, lsn=Position(1, 10))) == {"a:5432": 100}
    assert await many(at_least(hosts, lsn=Position(3, 10))) == {"a:5432": 100}


async def test_a_replica_that_follows_an_old_primary_has_no_new_position(hosts):
    """However far it is."""
    hosts.tell_all(lsn=500, timeline=2)
    hosts.replica_says("b", lsn=9_000, timeline=1)
    hosts.replica_says("c", lsn=400, timeline=2)

    assert await many(at_least(hosts, lsn=Position(2, 500), wait=0), 5) == {"a:5432": 5}


async def test_a_session_waits_a_little_for_a_position(hosts):
    """The replicas are asked again at once: a read right after a write finds one."""
    hosts.tell_all(lsn=500, replayed=400)
    choosing = asyncio.ensure_future(at_least(hosts, lsn=lambda: Position(1, 500), wait=60).choose())
    for lsn in itertools.chain(range(410, 500, 30), [500]):
        while not hosts._watch.pollers["b:5432"].asked:
            await asyncio.sleep(0)
        hosts._watch.pollers["b:5432"].asked.pop().set_result(None)
        hosts.replica_says("b", lsn=lsn)

    assert await choosing == "b:5432"
    assert hosts.metrics.get("ryow_total", outcome="replica") == 1


async def test_a_monitor_that_does_not_run_is_an_error(hosts):
    """With the remedy."""
    await hosts.aclose()

    for choice in (primary(hosts), replica(hosts), at_least(hosts, lsn="primary")):
        with pytest.raises(MonitorError, match="async with hosts"):
            await choice.choose()


async def test_a_monitor_belongs_to_its_event_loop(hosts):
    """Its tasks and sockets are there."""
    hosts.tell_all()

    async def elsewhere():
        with pytest.raises(ForeignLoopError):
            await primary(hosts).choose()
        assert hosts.report("a", ConnectionResetError())  # this may come from any thread

    await asyncio.to_thread(asyncio.run, elsewhere())
    await asyncio.sleep(0)
    assert hosts.in_doubt("a:5432")


async def test_a_connect_is_followed_from_its_first_session_on(hosts):
    """Its engines report, and a host that dies is aborted; the connect itself is not kept alive."""
    hosts.tell_all()
    made = []
    db = DBConnect.from_url("postgresql+asyncpg://app:hunter2@nowhere/x", before_create_session_handler=primary(hosts))
    db.engine_created.append(lambda engine, host: made.append((engine, host)))
    aborted = []
    db.abort_host = lambda host: aborted.append(host) or 3
    async with db_context():
        await db_session(db)
        await db_session(db)
    hosts.fails("a")
    await db.close()

    assert [host for _, host in made] == ["a:5432"]
    assert db.host == "a:5432"
    assert aborted == ["a:5432"]
    assert hosts.metrics.get("aborted_connections_total", host="a:5432") == 3


async def test_a_connection_that_is_refused_is_reported(hosts, unused_port):
    """A session met what the monitor has not seen yet: once for each attempt."""
    other, seen = Hosts([f"127.0.0.1:{unused_port}"]), []
    other.report = lambda host, exc: seen.append((host, type(exc).__name__)) or True
    fixed = Fixed(other)
    engine = bind_engine(create_async_engine("postgresql+asyncpg://app@nowhere/x"), fixed, attempts_for=0)
    db = DBConnect.from_url("postgresql+asyncpg://app@nowhere/x", before_create_session_handler=fixed)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            async with engine.connect():
                pass
        with pytest.raises(ConnectionRefusedError):
            async with db_context():
                await (await db_session(db)).connection()
    await engine.dispose()
    await db.close()

    assert seen == [(f"127.0.0.1:{unused_port}", "ConnectionRefusedError")] * 6


class Fixed(Choice):
    """Always the first host."""

    def __init__(self, hosts):
        super().__init__(hosts, writes=True)

    async def choose(self):
        return self.hosts.snapshot().hosts[0].host

    def allows(self, host):
        return True
