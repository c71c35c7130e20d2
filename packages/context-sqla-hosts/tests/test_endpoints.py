"""Every endpoint, byte by byte, in every state that a cluster can be in; the answers are in golden/, one file for each state.

`UPDATE_GOLDEN=1 pytest packages/context-sqla-hosts/tests/test_endpoints.py` writes them anew; read what has changed.
"""

import asyncio
import os
import re
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from context_sqla_hosts import StatusApp
from context_sqla_hosts._server import Server
from context_sqla_hosts._table import Table

GOLDEN = Path(__file__).parent / "golden"
HOSTS = ["a", "b", "c"]
JSON = "Accept: application/json"

SELECTIONS = [
    "/master",
    "/primary",
    "/replica",
    "/sync_by_time",
    "/sync_by_bytes",
    "/sync_by_time_or_bytes",
    "/sync_by_time_and_bytes",
    "/most_sync_by_bytes",
]
DOCUMENTS = [
    "/hosts",
    "/status?host=b",
    "/status?host=b:5432",
    "/status",
    "/status?host=nowhere",
    "/replicas_info",
    "/ready",
    "/live",
]
LIMITS = [
    "/replica?lag_ms=100",
    "/replica?lag_ms=5000",
    "/replica?lag_bytes=10",
    "/replica?lag_bytes=50",
    "/replica?lag_ms=100&lag_bytes=50",
    "/replica?lag_ms=5000&lag_bytes=10",
    "/replica?min_lsn=0/12C",
    "/replica?min_lsn=0/12D",
    "/replica?min_lsn=1:0/12C",
    "/replica?min_lsn=2:0/12C",
    "/replica?min_lsn=0/FA&lag_bytes=50",
    "/sync_by_time?lag_ms=5000",
    "/sync_by_time?lag_bytes=0",
    "/sync_by_time?min_lsn=0/12D",
    "/sync_by_bytes?lag_bytes=10",
    "/sync_by_bytes?lag_ms=0",
    "/sync_by_time_or_bytes?lag_ms=100&lag_bytes=50",
    "/sync_by_time_or_bytes?lag_ms=100&lag_bytes=10",
    "/sync_by_time_and_bytes?lag_ms=5000&lag_bytes=50",
    "/sync_by_time_and_bytes?lag_ms=5000&lag_bytes=10",
    "/most_sync_by_bytes?lag_bytes=10",
    "/most_sync_by_bytes?lag_bytes=100&lag_ms=0",
    "/most_sync_by_bytes?min_lsn=0/FB",
]
WRONG = [
    "/replica?lag_ms=-1",
    "/replica?lag_ms=",
    "/replica?lag_ms=1.5",
    "/replica?lag_bytes=many",
    "/replica?min_lsn=3000060",
    "/replica?min_lsn=0/3000060x",
    "/sync_by_time?lag_ms=x",
    "/sync_by_bytes?lag_bytes=x",
    "/sync_by_time_or_bytes?lag_ms=x",
    "/sync_by_time_and_bytes?min_lsn=x",
    "/most_sync_by_bytes?lag_bytes=%31x",
    "/master?wait_ms=x",
    "/replica?" + "&".join(f"p{number}=1" for number in range(40)),
    "/elsewhere",
    "/master/",
]
OURS = [
    "/master?port=1",
    "/replica?port=1",
    "/hosts?detail=1",
    "/status?host=a&detail=1",
    "/health/primary?host=a",
    "/health/primary?host=b",
    "/health/primary",
    "/health/primary?host=nowhere",
    "/health/replica?host=b",
    "/health/replica?host=a",
    "/health/replica?host=c&lag_bytes=10",
    "/health/replica?host=b&lag_ms=x",
    "/version",
    "/metrics",
]


def healthy(hosts):
    hosts.tell_all(lsn=0x12C)


def lagging(hosts):
    """Let b be behind by 50 bytes and by two seconds at least, and c by 100 bytes."""
    hosts.primary_says("a", lsn=0xC8)
    hosts.replica_says("b", lsn=0xC8)
    hosts.replica_says("c", lsn=0xC8)
    hosts.time += 2
    hosts.primary_says("a", lsn=0x12C)
    hosts.replica_says("b", lsn=0xFA)
    hosts.replica_says("c", lsn=0xC8)


def failed_over(hosts):
    """Let the old primary come back beside the new one."""
    hosts.tell_all(lsn=0x12C)
    hosts.fails("a")
    hosts.primary_says("b", lsn=0x130, timeline=2)
    hosts.replica_says("c", lsn=0x130, timeline=2)
    hosts.time += 0.25
    hosts.primary_says("b", lsn=0x130, timeline=2)
    hosts.primary_says("a", lsn=0x190, timeline=1)


def without_primary(hosts):
    hosts.tell_all(lsn=0x12C)
    hosts.fails("a")
    hosts.fails("c", "timeout", hard=False)


def alone(hosts):
    """Let the primary be all that is left."""
    hosts.tell_all(lsn=0x12C)
    hosts.fails("b")
    hosts.fails("c", "login")


def down(hosts):
    for host in HOSTS:
        hosts.fails(host)


def starting(hosts):
    hosts.primary_says("a")


STATES = {
    "healthy": (healthy, [*SELECTIONS, *DOCUMENTS, *WRONG, *OURS]),
    "lagging": (lagging, [*SELECTIONS, *DOCUMENTS, *LIMITS]),
    "failed_over": (failed_over, [*SELECTIONS, *DOCUMENTS, *OURS]),
    "without_primary": (without_primary, [*SELECTIONS, *DOCUMENTS]),
    "alone": (alone, [*SELECTIONS, *DOCUMENTS]),
    "down": (down, [*SELECTIONS, *DOCUMENTS, "/metrics"]),
    "starting": (starting, [*SELECTIONS, *DOCUMENTS, *WRONG, *OURS]),
}
CASES = [(state, path) for state, (_, paths) in STATES.items() for path in paths]


@asynccontextmanager
async def serving(hosts, **options):
    """Serve a table, and give what sends bytes to it and reads until the connection ends."""
    table_options = {name: options.pop(name) for name in ("geo", "geos", "max_lag_ms") if name in options}
    server = Server(Table(hosts, **table_options), **options)
    host, _, port = (await server.start(port=0))[0].rpartition(":")

    async def exchange(sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()

    exchange.server, exchange.port = server, int(port)
    try:
        yield exchange
    finally:
        await server.aclose()


def request(path, *headers, method="GET"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", ""]).encode()


def shown(answer):
    """Make an answer a text without what differs from run to run."""
    text = re.sub("Date: .* GMT\r\n", "", answer.decode())
    text = re.sub(r"(\r\n\r\n)\d+\.\d+\.\d+\S*$", r"\1VERSION", text)
    return text.replace("\r\n", "\n").replace("Connection: close\n", "").rstrip("\n")


def golden(state):
    parts = (GOLDEN / f"{state}.txt").read_text(encoding="utf-8").split("\n>>> ") if (GOLDEN / f"{state}.txt").exists() else []
    return dict(part.removeprefix(">>> ").rstrip("\n").split("\n", 1) for part in parts)


async def answers(told, state, paths):
    """Ask for each path as text and as JSON, each in a world of its own."""
    found = {}
    for path in paths:
        for headers in [(), (JSON,)] if path.split("?")[0] in SELECTIONS else [()]:
            async with told(HOSTS) as hosts:
                STATES[state][0](hosts)
                async with serving(hosts) as exchange:
                    found[" ".join([path, *headers])] = shown(await exchange(request(path, *headers)))
    return found


@pytest.mark.parametrize(("state", "path"), CASES)
async def test_an_endpoint_answers_as_it_did(told, state, path):
    """Clients of pg-status 2.2.0, and of 1.0.0, find the bytes that they expect; a change here is a change for them."""
    found = await answers(told, state, [path])
    if os.environ.get("UPDATE_GOLDEN"):
        order = [" ".join([one, *more]) for one in STATES[state][1] for more in ((), (JSON,))]
        every = {**golden(state), **found}
        text = "\n\n".join(f">>> {name}\n{every[name]}" for name in order if name in every)
        (GOLDEN / f"{state}.txt").write_text(text + "\n", encoding="utf-8")

    assert found == {name: golden(state)[name] for name in found}


async def test_there_is_nothing_in_the_files_that_nobody_asks_for():
    """A file without a test shows nothing."""
    assert {path.stem for path in GOLDEN.iterdir()} == set(STATES)
    for state, (_, paths) in STATES.items():
        assert {name.split(" ")[0] for name in golden(state)} == set(paths)


async def test_places_are_told_where_they_were_given(told):
    """As pg-status 2.3 has it; without them, the answers are those of 2.2.0."""
    async with told(HOSTS, locality="here", localities={"a": "here", "b": "there", "c": "here"}) as hosts:
        hosts.tell_all()
        async with serving(hosts, geo="north", geos={"a": "north", "b": "north", "c": "south"}) as exchange:
            answer = await exchange(request("/status?host=b"))

    assert answer.split(b"\r\n\r\n")[1].startswith(b'{"dc":"there","geo":"north","master":false,')


async def many(exchange, path, count=6):
    return [(await exchange(request(path))).split(b"\r\n\r\n")[1].decode() for _ in range(count)]


async def test_replicas_take_turns(hosts):
    """For each endpoint on its own, whatever the others were asked, and across snapshots."""
    hosts.tell_all()
    async with serving(hosts) as exchange:
        first = await many(exchange, "/replica", 3)
        assert await many(exchange, "/sync_by_time") == ["b", "c"] * 3
        hosts.tell_all()
        assert first + await many(exchange, "/replica", 3) == ["b", "c"] * 3
        assert await many(exchange, "/most_sync_by_bytes") == ["b"] * 6
        assert hosts.metrics.get("selections_total", policy="replica", outcome="replica") == 6


async def test_replicas_take_turns_by_weight(told):
    """Three to one, evenly spread; none for weight 0 while there is another."""
    async with told(["a", "b", "c", "d"], weights={"b": 3, "d": 0}) as hosts:
        hosts.tell_all()
        async with serving(hosts) as exchange:
            turns = await many(exchange, "/replica", 8)

    assert turns == ["b", "b", "c", "b"] * 2


async def test_replicas_of_the_same_place_come_first(told):
    """Then those of the same region, then all; among those that qualify."""
    async with told(["a", "b", "c", "d"], locality="here", localities={"c": "here"}) as hosts:
        hosts.tell_all()
        async with serving(hosts, geo="north", geos={"d": "north"}) as exchange:
            assert set(await many(exchange, "/replica")) == {"c"}
            hosts.fails("c")
            assert set(await many(exchange, "/replica")) == {"d"}
            hosts.fails("d")
            assert set(await many(exchange, "/replica")) == {"b"}


async def test_replicas_that_are_not_well_come_last(hosts):
    """Suspect ones and those that are being looked into; better than none."""
    hosts.tell_all()
    async with serving(hosts) as exchange:
        hosts.fails("b", "timeout", hard=False)
        assert set(await many(exchange, "/replica")) == {"c"}
        hosts.report("c", ConnectionResetError())
        assert set(await many(exchange, "/replica")) == {"b", "c"}


async def test_a_replica_ages_between_two_looks(hosts):
    """An answer that was right a moment ago is worked out anew when its time is over."""
    hosts.tell_all()
    async with serving(hosts) as exchange:
        assert set(await many(exchange, "/sync_by_time")) == {"b", "c"}
        hosts.time += 1.1
        assert set(await many(exchange, "/sync_by_time")) == {"a"}
        assert set(await many(exchange, "/replica")) == {"b", "c"}


async def test_an_unknown_lag_is_within_no_limit(hosts):
    """Unknown is not zero: neither for the choice, nor in what is shown."""
    hosts.replica_says("b", lsn=None)
    hosts.replica_says("c", lsn=50)
    hosts.primary_says("a")
    async with serving(hosts) as exchange:
        assert set(await many(exchange, "/replica?lag_ms=99999999")) == {"a"}
        (status,) = await many(exchange, "/status?host=b", 1)

    assert '"lag_ms":null,"sync_by_time":false,"lag_bytes":null,"sync_by_bytes":false' in status


async def test_hosts_of_one_name_are_told_apart_by_their_port(told):
    """Otherwise the name is what was written."""
    async with told(["db:5432", "db:5433", "other:5434"]) as hosts:
        hosts.tell_all()
        async with serving(hosts) as exchange:
            assert await many(exchange, "/master", 1) == ["db:5432"]
            assert await many(exchange, "/replica", 2) == ["db:5433", "other"]


async def asked(hosts, host):
    """Wait until somebody waits for a probe of this host."""
    while not any(not future.done() for future in hosts._watch.pollers[host].asked):
        await asyncio.sleep(0)


async def test_a_request_waits_for_a_position(hosts):
    """With wait_ms: the replicas are asked at once, and the answer comes as soon as one of them is there."""
    hosts.tell_all(lsn=500, replayed=400)
    async with serving(hosts) as exchange:
        answer = asyncio.ensure_future(exchange(request("/replica?min_lsn=0/1F4&wait_ms=9000")))
        for lsn in (450, 500):
            await asked(hosts, "b:5432")
            hosts.replica_says("b", lsn=lsn)
        assert (await answer).endswith(b"\r\n\r\nb")


async def test_a_request_waits_for_a_primary(hosts):
    """With wait_ms: it gets the new one."""
    hosts.tell_all()
    hosts.fails("a")
    async with serving(hosts) as exchange:
        answer = asyncio.ensure_future(exchange(request("/master?wait_ms=9000")))
        while not exchange.server.connections or not any(one.task for one in exchange.server.connections):
            await asyncio.sleep(0)
        hosts.primary_says("b", timeline=2)
        assert (await answer).endswith(b"\r\n\r\nb")


async def test_a_request_waits_no_longer_than_it_was_told(hosts):
    """Then it gets what there is."""
    hosts.tell_all()
    hosts.fails("a")
    async with serving(hosts) as exchange:
        hosts.changed = lambda timeout: asyncio.sleep(0, setattr(hosts, "time", hosts.time + timeout))
        assert (await exchange(request("/master?wait_ms=50"))).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    ("accept", "json"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/html", False),
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/*", True),
        ("application/json, text/plain, */*", True),
        ("text/plain, application/json;q=0.5", False),
        ("text/plain;q=0.2, application/json;q=0.5", True),
        ("application/json;q=0", False),
        ("application/json;q=nonsense, */*", False),
    ],
)
async def test_the_form_is_the_one_that_is_accepted(hosts, accept, json):
    """Read as HTTP has it, and never echoed."""
    hosts.tell_all()
    async with serving(hosts) as exchange:
        answer = await exchange(request("/master", *([f"Accept: {accept}"] if accept else [])))

    assert answer.split(b"\r\n\r\n")[1] == (b'{"host":"a"}' if json else b"a")
    assert (b"Content-Type: application/json\r\n" in answer) is json
    assert b"Vary: Accept\r\n" in answer


async def test_metrics_are_escaped(told):
    """A name of a host is the operator's text."""
    from context_sqla_hosts import HostStatus, Sample, Snapshot
    from context_sqla_hosts._exposition import expose

    text = expose(Snapshot(1, 0.0, (HostStatus('a"\\\nb'),)), [Sample("reports_total", (("host", '"\n'),), 2)], 0.0)

    assert 'context_sqla_hosts_up{host="a\\"\\\\\\nb"} 0\n' in text
    assert 'context_sqla_hosts_reports_total{host="\\"\\n"} 2\n' in text
    assert all(re.fullmatch(r"# (HELP|TYPE) .*|[a-z_]+(\{.*\})? \S+", line) for line in text.splitlines())


async def test_metrics_have_a_histogram(hosts):
    """Of the probes: cumulative, with its sum and its count."""
    hosts.tell_all()
    async with serving(hosts) as exchange:
        text = (await exchange(request("/metrics"))).decode()

    assert text.count("# TYPE context_sqla_hosts_probe_seconds histogram\n") == 1
    assert 'context_sqla_hosts_probe_seconds_bucket{host="a:5432",le="+Inf"} 2\n' in text
    assert 'context_sqla_hosts_probe_seconds_count{host="a:5432"} 2\n' in text


# The same in an application


class Client:
    """Calls an ASGI application."""

    def __init__(self, app, root=""):
        self.app, self.root = app, root

    async def __call__(self, path, query=b"", method="GET", headers=()):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "root_path": self.root,
            "query_string": query,
            "headers": headers,
        }
        await self.app(scope, None, send)
        head, body = sent
        return head["status"], dict(head["headers"]), body["body"]


async def test_an_application_can_mount_it(hosts):
    """The same answers, at any place, from the monitor that the application has started."""
    hosts.tell_all()
    client = Client(StatusApp(hosts), "/db")

    status, headers, body = await client("/db/replica", b"port=1", headers=[(b"accept", b"application/json")])
    assert (status, body) == (200, b'{"host":"b:5432"}')
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == b"17"
    assert (await client("/replica"))[2] == b"c"  # a server that has cut off the place
    assert (await client("/db"))[1][b"content-type"] == b"text/html; charset=utf-8"
    assert (await client("/db/master", method="HEAD"))[2] == b""
    assert (await client("/db/master", method="POST"))[0] == 405
    assert (await client("/db/elsewhere"))[0] == 404
    assert (await client("/dbx/master"))[0] == 404


async def test_an_application_that_waits(hosts):
    """Requests with wait_ms work there too."""
    hosts.tell_all()
    hosts.fails("a")
    answer = asyncio.ensure_future(Client(StatusApp(hosts))("/master", b"wait_ms=9000"))
    await asyncio.sleep(0)
    hosts.primary_says("b", timeline=2)

    assert (await answer)[2] == b"b"


@pytest.mark.parametrize("before", [False, True])
async def test_served_alone_it_starts_the_monitor(told, before):
    """And ends what it has started."""
    hosts = told(HOSTS)
    if before:
        hosts.start()
    messages, seen = asyncio.Queue(), []
    for kind in ("startup", "shutdown"):
        messages.put_nowait({"type": f"lifespan.{kind}"})

    async def send(message):
        seen.append((message["type"], hosts.is_watching))

    await StatusApp(hosts)({"type": "lifespan"}, messages.get, send)

    assert seen == [("lifespan.startup.complete", True), ("lifespan.shutdown.complete", before)]


async def test_a_monitor_that_cannot_start_fails_the_server(told, monkeypatch):
    """With its reason: a server would take an error alone for an application that has no lifespan."""
    hosts, sent = told(HOSTS), []
    monkeypatch.setattr(hosts, "start", lambda: 1 / 0)

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        sent.append(message)

    await StatusApp(hosts)({"type": "lifespan"}, receive, send)

    assert sent == [{"type": "lifespan.startup.failed", "message": "division by zero"}]


async def test_a_websocket_is_turned_away(hosts):
    """There is nothing for it."""
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message["type"])

    await StatusApp(hosts)({"type": "websocket"}, receive, send)

    assert sent == ["websocket.close"]
