"""The client that reads single bytes, and the proxy that loses them."""

import asyncio
import contextlib
import socket

import pytest
from support.proxy import proxy
from support.wire import Address, BrokenOff, connect


@contextlib.asynccontextmanager
async def peer(talk):
    """Serve ``talk(reader, writer)`` on a port; it closes what it was given."""

    async def run(reader, writer):
        with contextlib.suppress(ConnectionError):
            await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(run, "127.0.0.1", 0)
    try:
        yield Address(*server.sockets[0].getsockname())
    finally:
        server.close()
        await server.wait_closed()


def answers(*raw):
    """Answer each request with the bytes that stand for it, then close."""

    async def talk(reader, writer):
        for one in raw:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(one)
            await writer.drain()

    return talk


async def echo(reader, writer):
    while data := await reader.read(1000):
        writer.write(data)
        await writer.drain()


@pytest.mark.parametrize(
    ("raw", "body", "complete"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabc", b"abc", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", b"abc", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n", b"abc", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab", b"ab", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc", True),
    ],
)
async def test_response_tells_whether_it_ended(raw, body, complete):
    """A response is complete when its own framing says so, not when the connection ends."""
    async with peer(answers(raw)) as address, connect(address) as connection:
        response = await connection.request("GET", "/")

    assert (response.body, response.complete) == (body, complete)


async def test_missing_head_is_broken_off():
    """A connection that ends before the head is an error with the bytes that came."""
    async with peer(answers(b"HTTP/1.1 200")) as address, connect(address) as connection:
        with pytest.raises(BrokenOff) as caught:
            await connection.request("GET", "/")

    assert caught.value.seen == b"HTTP/1.1 200"


async def test_responses_are_read_in_order():
    """Several requests may be on their way; a HEAD's response has no body."""
    raw = [b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + body for body in (b"1", b"", b"3")]
    async with peer(answers(*raw)) as address, connect(address) as connection:
        for method in ("GET", "HEAD", "GET"):
            await connection.send(method, "/")
        responses = [await connection.response() for _ in range(3)]

    assert [response.body for response in responses] == [b"1", b"", b"3"]


async def test_proxy_forwards_and_cuts():
    """A proxy passes bytes until it cuts the connection."""
    async with peer(echo) as address, proxy(address) as network, connect(network.address) as connection:
        await connection.send_body(b"a")
        heard = await connection._reader.read(1)
        network.cut()
        rest = await connection.until_closed()

    assert (heard, rest) == (b"a", b"")


async def test_proxy_refuses():
    """A proxy that refuses resets new connections."""
    async with peer(echo) as address, proxy(address) as network:
        network.mode = "refuse"
        async with connect(network.address) as connection:
            rest = await connection.until_closed()

    assert rest == b""


async def test_proxy_hangs_until_it_passes_again():
    """Bytes that were sent into a hanging network arrive once it is well."""
    async with peer(echo) as address, proxy(address) as network, connect(network.address) as connection:
        network.mode = "hang"
        await connection.send_body(b"a")
        heard = asyncio.create_task(connection._reader.read(1))
        done, _ = await asyncio.wait({heard}, timeout=0.05)
        network.mode = "pass"

        assert not done
        assert await heard == b"a"


@pytest.mark.parametrize("forward", [False, True])
async def test_proxy_cuts_at_a_pattern(forward):
    """The connection on which the pattern comes by is reset; with ``forward`` the server has had it."""
    got = []

    async def talk(reader, writer):
        while data := await reader.read(1000):
            got.append(data)
            writer.write(b"answer")
            await writer.drain()

    async with peer(talk) as address, proxy(address) as network, connect(network.address) as connection:
        trap = network.cut_at(b"COMMIT", forward=forward)
        await connection.send_body(b"BEGIN")
        first = await connection._reader.read(100)
        await connection.send_body(b"COMMIT;")
        rest = await connection.until_closed()

    assert (first, rest) == (b"answer", b"")
    assert trap.sprung.is_set()
    assert got == ([b"BEGIN", b"COMMIT;"] if forward else [b"BEGIN"])


@pytest.mark.parametrize("forward", [False, True])
async def test_proxy_holds_at_a_pattern(forward):
    """The pattern, or the answer to it, waits for ``release``."""
    async with peer(echo) as address, proxy(address) as network, connect(network.address) as connection:
        trap = network.hold_at(b"COMMIT", forward=forward)
        await connection.send_body(b"COMMIT;")
        heard = asyncio.create_task(connection._reader.read(100))
        await asyncio.wait_for(trap.sprung.wait(), 10)
        early = heard.done()
        trap.release()

        assert not early
        assert await heard == b"COMMIT;"


async def test_connection_whose_task_begins_after_the_network_has_stopped_is_reset():
    """asyncio has accepted it before, and nobody is left to cancel what would wait for bytes to flow again."""
    async with proxy(Address("127.0.0.1", 1)) as network:
        network.mode = "hang"
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    task = asyncio.create_task(network._serve(*await asyncio.open_connection(sock=theirs)))
    done, late = await asyncio.wait({task}, timeout=10)
    for one in late:
        one.cancel()

    assert done
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    await writer.wait_closed()
