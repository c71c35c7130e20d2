"""A second opinion from Patroni: it may forbid a primary, and never names one; and it is bounded."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from context_sqla_hosts import Hosts, MonitorError, patroni_members
from context_sqla_hosts._patroni import Hint
from context_sqla_hosts._tracker import Claim

CLUSTER = 7_000_000_000  # as in conftest.py


class Rest:
    """Patroni's REST interface, as far as it is asked."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        self.answers = {}
        self.silent = False
        self.requests = []

    def leads(self, timeline=1, identifier=CLUSTER):
        body = {"role": "primary", "timeline": timeline, "database_system_identifier": str(identifier)}
        self.answers["/primary"] = (200, body)

    def follows(self):
        self.answers["/primary"] = (503, {"role": "replica"})


@asynccontextmanager
async def rest():
    """Serve it on a real port."""

    async def answer(reader, writer):
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        served.requests.append(path)
        if served.silent:
            await reader.read()
        else:
            status, body = served.answers[path]
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            writer.write(f"HTTP/1.0 {status} -\r\nContent-Type: application/json\r\n\r\n".encode() + text)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    served = Rest(server.sockets[0].getsockname()[1])
    yield served
    server.close()
    await server.wait_closed()


class Listening:
    """What is told, with a clock that stands still."""

    interval, timeout, stale_after, jitter = 0.001, 0.2, 5.0, 0.1

    def __init__(self):
        self.time = 100.0
        self.said = asyncio.Queue()

    def clock(self):
        return self.time

    def advised(self, claims):
        self.said.put_nowait(dict(claims))


@asynccontextmanager
async def asking(members):
    """Give what a hint says of these members."""
    told = Listening()
    task = asyncio.ensure_future(Hint(members).run(told))
    yield told
    task.cancel()
    await asyncio.wait((task,))


async def until(told, wanted):
    async with asyncio.timeout(10):
        while await told.said.get() != wanted:
            pass


@pytest.mark.parametrize("rival", [1, 2])
async def test_a_host_is_no_primary_where_another_leads(hosts, rival):
    """Though its own server says that it is one, and no newer timeline was seen: it is fenced, and there is none."""
    hosts.tell_all()
    assert hosts.primary_now() == "a:5432"
    hosts._watch.advised({"b:5432": Claim(rival, CLUSTER)})
    snapshot = hosts.snapshot()

    assert snapshot.primary is None
    assert snapshot.host("a:5432").fenced
    hosts._watch.advised({})
    assert hosts.primary_now() == "a:5432"


async def test_it_makes_no_primary(hosts):
    """What Patroni calls the leader is none until its server says so."""
    hosts.replica_says("a")
    hosts.replica_says("b")
    hosts.replica_says("c")
    hosts._watch.advised({"b:5432": Claim(1, CLUSTER)})
    assert hosts.snapshot().primary is None
    hosts.fails("b")

    assert hosts.snapshot().primary is None


async def test_who_was_demoted_may_say_for_a_while_that_it_leads(hosts):
    """Its word does not count against a newer timeline; and where both say it on one timeline, it is no opinion."""
    hosts.tell_all()
    hosts._watch.advised({"a:5432": Claim(1, CLUSTER), "b:5432": Claim(1, CLUSTER)})
    assert hosts.snapshot().primary == "a:5432"
    hosts.primary_says("b", 120, timeline=2)
    hosts._watch.advised({"a:5432": Claim(1, CLUSTER)})

    assert hosts.snapshot().primary == "b:5432"


async def test_it_decides_between_two_of_one_timeline(hosts):
    """Without it, nothing would be guessed."""
    hosts.primary_says("a")
    hosts.primary_says("b")
    hosts.fails("c")
    assert hosts.snapshot().primary is None
    hosts._watch.advised({"b:5432": Claim(1, CLUSTER)})

    assert hosts.snapshot().primary == "b:5432"


async def test_another_cluster_has_no_say(hosts):
    """As where the URL of a wrong one was given."""
    hosts.tell_all()
    hosts._watch.advised({"b:5432": Claim(9, CLUSTER + 1)})

    assert hosts.snapshot().primary == "a:5432"


async def test_the_members_are_asked_who_leads():
    """200 on `/primary` is a claim; 503 ends it at once, silence after a while."""
    async with rest() as one, rest() as two:
        one.leads(timeline=3)
        two.follows()
        async with asking({"a:5432": one.url, "b:5432": two.url}) as told:
            await until(told, {"a:5432": Claim(3, CLUSTER)})
            one.silent = True
            await asyncio.wait_for(told.said.get(), 10)
            assert await asyncio.wait_for(told.said.get(), 10) == {"a:5432": Claim(3, CLUSTER)}
            told.time += 6
            await until(told, {})
            one.silent = False
            await until(told, {"a:5432": Claim(3, CLUSTER)})
            one.follows()
            two.leads(timeline=4)
            await until(told, {"b:5432": Claim(4, CLUSTER)})

    assert set(one.requests) == {"/primary"}


async def test_a_member_that_is_silent_is_logged_once(caplog):
    """And once more when it answers again: not at every question, and not as if it followed."""
    async with rest() as one, rest() as two:
        one.leads()
        two.silent = True
        with caplog.at_level("WARNING", logger="context_sqla.hosts"):
            async with asking({"a:5432": one.url, "b:5432": two.url}) as told:
                for _ in range(3):
                    await asyncio.wait_for(told.said.get(), 10)
                assert caplog.messages == ["Patroni does not answer for these: b:5432"]
                two.silent = False
                two.follows()
                async with asyncio.timeout(10):
                    while len(caplog.messages) < 2:
                        await told.said.get()

    assert caplog.messages[1:] == ["Patroni does not answer for these: none any more"]


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"no JSON"),
        (200, b"[]"),
        (200, {"timeline": "2", "database_system_identifier": "1"}),
        (200, {"timeline": 2}),
        (200, {"timeline": 2, "database_system_identifier": "²"}),
        (200, {"timeline": 2, "database_system_identifier": "7" * 5000}),
        (200, b"[" * 100_000),
        (200, b" " * 1_000_000),
        ("two hundred", {}),
    ],
    ids=["no JSON", "a list", "text", "no cluster", "no digits", "endless", "deep", "long", "no status"],
)
async def test_what_makes_no_sense_is_no_opinion(answer):
    """And it does not end the watch."""
    async with rest() as one:
        one.answers["/primary"] = answer
        async with asking({"a:5432": one.url}) as told:
            assert await asyncio.wait_for(told.said.get(), 10) == {}
            one.leads()
            await until(told, {"a:5432": Claim(1, CLUSTER)})


async def test_a_monitor_asks_while_it_runs(unused_port):
    """With its own interval and limit; no task is left."""
    before = asyncio.all_tasks()
    async with rest() as one:
        one.leads()
        name = f"127.0.0.1:{unused_port}"
        async with Hosts([name], patroni={name: one.url}, driver="asyncpg", interval=0.01) as hosts:
            await hosts.ready(primary=False, timeout=10)
            async with asyncio.timeout(10):
                while len(one.requests) < 2:
                    await asyncio.sleep(0.01)
            assert hosts.snapshot().primary is None

    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


async def test_the_members_of_a_cluster_are_found():
    """As Patroni names them, from the first that answers; one that is only starting has no address."""
    members = [
        {"name": "m1", "host": "10.0.0.1", "port": 5432, "api_url": "http://10.0.0.1:8008/patroni"},
        {"name": "m2", "host": "10.0.0.2", "port": 5433, "api_url": "https://10.0.0.2:8008/patroni"},
        {"name": "m3", "role": "uninitialized"},
    ]
    async with rest() as one, rest() as two:
        one.answers["/cluster"] = (503, {})
        two.answers["/cluster"] = (200, {"members": members})
        found = await patroni_members(one.url, two.url)

    assert found == {"10.0.0.1:5432": "http://10.0.0.1:8008", "10.0.0.2:5433": "https://10.0.0.2:8008"}
    assert Hosts(list(found), patroni=found).snapshot().primary is None


@pytest.mark.parametrize("members", [None, 3, {"name": "m1"}, ["m1"]])
async def test_members_that_make_no_sense_are_none(members):
    """Whoever is asked next may know."""
    async with rest() as one:
        one.answers["/cluster"] = (200, {"members": members})
        with pytest.raises(MonitorError, match="name the hosts yourself"):
            await patroni_members(one.url)


async def test_members_that_nobody_tells_are_an_error(unused_port):
    """What to do is in it."""
    with pytest.raises(MonitorError, match="name the hosts yourself"):
        await patroni_members(f"http://127.0.0.1:{unused_port}", timeout=1)


@pytest.mark.parametrize(
    "url", ["db1:8008", "http://", "ftp://db1", "http://db1:80080", "http://me:hunter2@db1:8008", "http://me:hunter2@db\u2100"]
)
def test_what_is_no_url_is_refused(url):
    """And not repeated, for it may have a password (P20)."""
    with pytest.raises(ValueError, match="http://host:8008") as caught:
        Hosts(["db1"], patroni={"db1": url})

    assert "hunter2" not in str(caught.value)


def test_a_host_that_is_not_watched_has_no_member():
    """A typing error is told."""
    with pytest.raises(ValueError, match="db2:5432"):
        Hosts(["db1"], patroni={"db2": "http://db2:8008"})
