"""The sidecar's HTTP: what it reads, what it refuses, and how long it waits."""

import asyncio
import re
import socket
import struct
from contextlib import asynccontextmanager

import pytest
from context_sqla_hosts._server import Server
from context_sqla_hosts._table import Table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GET = b"GET /master HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving(hosts, **options):
    server = Server(Table(hosts), **options)
    host, _, port = (await server.start(port=0))[0].rpartition(":")
    server.place = (host, int(port))
    try:
        yield server
    finally:
        await server.aclose()


@asynccontextmanager
async def connected(server):
    reader, writer = await asyncio.open_connection(*server.place)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader):
    """Read one answer: status, headers, body."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode()
    first, *lines = head.rstrip("\r\n").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split(" ")[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def ended(reader):
    return await asyncio.wait_for(reader.read(), 10) == b""


@pytest.fixture(name="server")
async def _server(hosts):
    hosts.tell_all()
    async with serving(hosts) as server:
        yield server


async def test_a_connection_is_kept(server):
    """A request costs no new one."""
    async with connected(server) as (reader, writer):
        for _ in range(3):
            writer.write(GET)
            status, headers, body = await answer(reader)
            assert (status, body) == (200, b"a")
            assert "connection" not in headers
        assert len(server.connections) == 1


async def test_requests_may_come_in_one_piece(server):
    """Pipelined, with the beginning of the next; the answers keep their order."""
    async with connected(server) as (reader, writer):
        writer.write(GET + GET.replace(b"/master", b"/replica") + GET[:10])
        assert [(await answer(reader))[2] for _ in range(2)] == [b"a", b"b"]
        writer.write(GET[10:])
        assert (await answer(reader))[2] == b"a"


async def test_requests_may_come_byte_by_byte(server):
    """A network cuts where it likes."""
    async with connected(server) as (reader, writer):
        for byte in GET + GET:
            writer.write(bytes([byte]))
            await writer.drain()
        assert [(await answer(reader))[2] for _ in range(2)] == [b"a", b"a"]


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: Close\r\n\r\n", False),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\n\r\n", False),
        (b"GET /live HTTP/1.0\r\n\r\n", False),
        (b"GET /live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
async def test_the_client_says_whether_it_stays(server, head, kept):
    """As each version of HTTP has it."""
    async with connected(server) as (reader, writer):
        writer.write(head + head)
        status, headers, body = await answer(reader)

        assert (status, body) == (200, b"OK")
        if kept:
            assert (await answer(reader))[0] == 200
        else:
            assert headers["connection"] == "close"
            assert await ended(reader)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"HEAD /master HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"OPTIONS /master HTTP/1.1\r\nHost: x\r\n\r\n", 204),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 204),
        (b"POST /master HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405),
        (b"DELETE /master HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    ],
)
async def test_methods_are_those_that_read(server, head, status):
    """HEAD is GET without the body; the connection stays in step."""
    async with connected(server) as (reader, writer):
        writer.write(head)
        text = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode()
        assert text.startswith(f"HTTP/1.1 {status} ")
        assert ("Allow: GET, HEAD, OPTIONS\r\n" in text) is (status != 200)
        assert ("Content-Length" in text) is (status != 204)
        writer.write(GET)
        assert (await answer(reader))[2] == b"a"


async def test_a_target_may_be_a_whole_url(server):
    """Proxies write it so."""
    async with connected(server) as (reader, writer):
        for target in (b"http://localhost:8000/master", b"HTTP://x/master?port=0", b"/master?x#y"):
            writer.write(GET.replace(b"/master", target))
            assert (await answer(reader))[::2] == (200, b"a")
        writer.write(GET.replace(b"/master", b"http://localhost"))
        assert (await answer(reader))[1]["content-type"] == "text/html; charset=utf-8"
        writer.write(GET.replace(b"/master", b"http://localhost?x"))
        assert (await answer(reader))[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET /master\r\n\r\n", 400),
        (b"get /master HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET  /master HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET master HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /m\xc3\xa4ster HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\nHost: x\nEvil: y\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 413),
        (b"GET /master HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", 400),
        (b"GET /master HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 413),
        (b"GET /" + b"m" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /master HTTP/1.1\r\nHost: x\r\nA: " + b"m" * 9000, 431),
        (b"GET /master HTTP/1.1\r\nHost: x\r\nA: " + b"m" * 9000 + b"\r\n\r\n", 431),
        (b"m" * 9000, 431),
        (b"GET /master HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    ],
)
async def test_what_is_not_plainly_right_is_refused(server, head, status):
    """And the connection ends: somebody else may have read it differently."""
    async with connected(server) as (reader, writer):
        writer.write(head)
        found, headers, body = await answer(reader)
        assert found == status
        if status != 404:
            assert body.startswith(b'{"error_text": "')
            assert headers["connection"] == "close"
            assert await ended(reader)


async def test_answers_before_a_refusal_are_sent(server):
    """What was right is answered."""
    async with connected(server) as (reader, writer):
        writer.write(GET + b"nonsense\r\n\r\n" + GET)
        assert (await answer(reader))[2] == b"a"
        assert (await answer(reader))[0] == 400
        assert await ended(reader)


async def test_a_head_that_does_not_come_is_not_waited_for(hosts):
    """However steadily its bytes drip."""
    async with serving(hosts, head_timeout=0.2) as server, connected(server) as (reader, writer):
        writer.write(GET[:10])
        assert (await answer(reader))[0] == 408
        assert await ended(reader)
        assert not server.connections


async def test_an_idle_connection_is_closed(hosts):
    """Without a word: there is no request to answer."""
    hosts.tell_all()
    async with serving(hosts, idle_timeout=0.2) as server, connected(server) as (reader, writer):
        writer.write(GET)
        assert (await answer(reader))[2] == b"a"
        assert await ended(reader)


async def test_a_client_that_takes_no_answers_is_cut(hosts):
    """Its answers do not pile up."""
    hosts.tell_all()
    async with serving(hosts, head_timeout=0.2) as server, connected(server) as (reader, writer):
        many = GET.replace(b"/master", b"/metrics") * 2000
        writer.write(many)
        while not server.connections:
            await asyncio.sleep(0)
        (connection,) = server.connections
        writer.transport.pause_reading()
        while server.connections:
            await asyncio.sleep(0)
        assert connection._buffer == b""


async def test_a_client_that_is_slow_gets_everything(hosts):
    """Once it takes its answers again, the rest of its requests is looked at; it may have said everything before."""
    hosts.tell_all()
    async with serving(hosts) as server, connected(server) as (reader, writer):
        writer.transport.pause_reading()
        writer.write(GET.replace(b"/master", b"/metrics") * 2000)
        writer.write_eof()
        while not any(connection._held for connection in server.connections):
            await asyncio.sleep(0)
        (connection,) = server.connections
        assert connection._transport.get_write_buffer_size() < 1_000_000
        writer.transport.resume_reading()
        for _ in range(2000):
            assert (await answer(reader))[0] == 200
        assert await ended(reader)


async def test_there_is_a_limit_of_connections(hosts):
    """Those beyond it are closed, those below are served."""
    hosts.tell_all()
    async with serving(hosts, max_connections=1) as server, connected(server) as (reader, writer):
        writer.write(GET)
        await answer(reader)
        async with connected(server) as (other, _):
            try:
                assert await ended(other)
            except ConnectionResetError:
                pass
        writer.write(GET)
        assert (await answer(reader))[2] == b"a"


async def waiting(server):
    while not any(connection.task for connection in server.connections):
        await asyncio.sleep(0)


async def test_others_are_served_while_one_waits(hosts):
    """And what that one has sent meanwhile is answered after."""
    hosts.tell_all()
    hosts.fails("a")
    async with serving(hosts) as server, connected(server) as (reader, writer), connected(server) as (other, request):
        writer.write(GET + GET.replace(b"/master", b"/master?wait_ms=9000") + GET)
        assert (await answer(reader))[0] == 404
        await waiting(server)
        writer.write(GET * 500)
        request.write(GET)
        assert (await answer(other))[0] == 404
        hosts.primary_says("b", timeline=2)
        for _ in range(502):
            assert (await answer(reader))[2] == b"b"


async def test_a_client_that_has_said_everything_gets_its_answer(hosts):
    """Half of a connection may be closed."""
    hosts.tell_all()
    hosts.fails("a")
    async with serving(hosts) as server, connected(server) as (reader, writer):
        writer.write(GET.replace(b"/master", b"/master?wait_ms=9000"))
        writer.write_eof()
        await waiting(server)
        hosts.primary_says("b", timeline=2)
        assert (await answer(reader))[2] == b"b"
        assert await ended(reader)


async def test_a_client_that_leaves_is_not_waited_for(hosts):
    """Nothing of it is left, neither here nor at the end."""
    hosts.tell_all()
    hosts.fails("a")
    async with serving(hosts) as server:
        async with connected(server) as (_, writer):
            writer.write(GET.replace(b"/master", b"/master?wait_ms=9000"))
            await waiting(server)
            (connection,) = server.connections
            reset = struct.pack("ii", 1, 0)  # without it, it would only have said everything
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        while server.connections:
            await asyncio.sleep(0)
        await asyncio.wait([connection.task])
        async with connected(server) as (_, writer):
            writer.write(GET.replace(b"/master", b"/master?wait_ms=9000"))
            await waiting(server)
            before = asyncio.all_tasks()
            await server.aclose()

    assert asyncio.all_tasks() == {asyncio.current_task()} < before


async def test_an_endpoint_that_fails_is_a_500(server, monkeypatch, caplog):
    """Its error is logged and not shown."""

    def fail():
        raise RuntimeError("hunter2")

    async def fail_later():
        fail()

    for broken in (fail, lambda: fail_later):
        server._heads.clear()
        monkeypatch.setattr(server.table, "find", lambda *request, broken=broken: broken)
        async with connected(server) as (reader, writer):
            writer.write(GET)
            status, _, body = await answer(reader)
            assert (status, body) == (500, b'{"error_text": "Internal error"}')
            assert await ended(reader)
    assert caplog.text.count("An endpoint failed") == 2


async def test_what_is_remembered_of_requests_is_bounded(hosts):
    """Whatever clients make up."""
    hosts.tell_all()
    async with serving(hosts) as server, connected(server) as (reader, writer):
        for number in range(2500):
            writer.write(GET.replace(b"/master", f"/replica?min_lsn=0/{number:X}".encode()))
            await answer(reader)

        assert 0 < len(server._heads) <= 1024
        assert 0 < len(server.table._known) <= 1024


async def test_the_date_is_that_of_the_answer(server, monkeypatch):
    """Made once a second."""
    now = 1_700_000_000.9
    monkeypatch.setattr("context_sqla_hosts._server.time.time", lambda: now)
    async with connected(server) as (reader, writer):
        writer.write(GET)
        assert (await answer(reader))[1]["date"] == "tue, 14 nov 2023 22:13:20 gmt"


async def test_it_listens_on_loopback_unless_it_is_told_otherwise(hosts):
    """Nobody else sees the names of the hosts."""
    server = Server(Table(hosts))
    addresses = await server.start(port=0)
    await server.aclose()

    assert [re.sub(":[0-9]+$", "", address) for address in addresses] == ["127.0.0.1"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [GET, GET[:-2], b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n", b"Connection: close\r\n", b"x" * 9000]
            ),
        ),
        max_size=6,
    )
)
def test_whatever_comes_is_answered_or_waited_for(told, pieces):
    """Never an error of our own, never an answer that is none."""

    async def run():
        async with told(["a"]) as hosts:
            hosts.tell_all()
            server = Server(Table(hosts))
            written, transport = [], Recorder()
            transport.write = written.append
            loop = asyncio.get_running_loop()
            server._sweeper = loop.call_later(0, lambda: None)
            from context_sqla_hosts._server import _Connection

            connection = _Connection(server)
            connection.connection_made(transport)
            for piece in pieces:
                if not transport.closed:
                    connection.data_received(piece)
            assert len(connection._buffer) < 8192 + 9000
            return b"".join(written)

    found = asyncio.run(run())

    assert found == b"" or found.startswith(b"HTTP/1.1 ")
    assert b"HTTP/1.1 500" not in found


class Recorder(asyncio.Transport):
    """A transport that goes nowhere."""

    closed = False

    def close(self):
        self.closed = True

    abort = close

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        pass

    resume_reading = pause_reading
