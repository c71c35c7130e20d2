"""A small HTTP/1.1 server for the table of endpoints: GET only, bounded in every direction, without dependencies."""

import asyncio
import logging
import re
import time
from email.utils import formatdate
from typing import NamedTuple

from ._reply import Later, Reply, error_reply
from ._table import Answer, Table

logger = logging.getLogger("context_sqla.hosts")

_MAX_HEAD = 8192
_MAX_TARGET = 2048
_TOGETHER = 64  # pieces that are sent at once
_KEPT_HEADS = 1024
_KEPT_HEAD_SIZE = 1024
_TARGET = re.compile(r"[!-~]+")
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_METHOD = re.compile("[A-Z]{1,16}")

_MALFORMED = error_reply("Malformed request", 400)
_TOO_LONG = error_reply("Request target too long", 414)
_TOO_LARGE = error_reply("Request head too large", 431)
_NO_BODY = error_reply("Requests have no body here", 413)
_VERSION = error_reply("HTTP/1.1 is spoken here", 505)
_TIMEOUT = error_reply("Request timeout", 408)
_BROKEN = error_reply("Internal error", 500)


class _Request(NamedTuple):
    """What a request head means: found once for each head, for clients repeat theirs."""

    answer: Answer
    with_body: bool
    keep_alive: bool


class _RefusedError(Exception):
    """A request that cannot be answered; the connection is closed after the reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


class Server:
    """Serve a table. It belongs to the event loop in which it was started.

    Args:
        table: the endpoints.
        head_timeout: seconds in which a request head has to arrive, and an answer to be taken.
        idle_timeout: seconds for which a connection without a request is kept.
        max_connections: more than these are closed at once.
    """

    def __init__(
        self, table: Table, *, head_timeout: float = 5.0, idle_timeout: float = 75.0, max_connections: int = 1000
    ) -> None:
        self.table: Table = table
        self.head_timeout: float = head_timeout
        self.idle_timeout: float = idle_timeout
        self.max_connections: int = max_connections
        self.connections: set[_Connection] = set()
        self._heads: dict[bytes, _Request] = {}
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._date, self._date_at = b"", 0

    async def start(self, host: str | None = "127.0.0.1", port: int = 8000) -> list[str]:
        """Listen, and return the addresses.

        Args:
            host: an address; None: every one that the machine has.
            port: 0: one that is free.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, port, backlog=1024)
        self._sweep()
        names = [sock.getsockname()[:2] for sock in self._server.sockets]
        return [f"[{name}]:{number}" if ":" in name else f"{name}:{number}" for name, number in names]

    async def aclose(self) -> None:
        """Listen no more, and close every connection; what is being waited for is not answered."""
        server, self._server = self._server, None
        if self._sweeper is not None:
            self._sweeper.cancel()
        waiting = [task for connection in self.connections if (task := connection.task) is not None]
        if server is not None:
            server.close()
        for connection in tuple(self.connections):
            connection.close()
        await asyncio.gather(*waiting, return_exceptions=True)
        if server is not None:
            await server.wait_closed()

    def request(self, head: bytes) -> _Request:
        """Return what a head means.

        Raises:
            _RefusedError: it means nothing.
        """
        found = self._heads.get(head)
        if found is None:
            found = _parse(head, self.table)
            if len(head) <= _KEPT_HEAD_SIZE:
                if len(self._heads) >= _KEPT_HEADS:
                    self._heads.clear()
                self._heads[head] = found
        return found

    def date(self) -> bytes:
        """Return the header with the time, which is made once a second."""
        now = int(time.time())
        if now != self._date_at:
            self._date, self._date_at = f"Date: {formatdate(now, usegmt=True)}\r\n".encode(), now
        return self._date

    def _sweep(self) -> None:
        """Close what took too long: one timer for all connections, at most a second late."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in tuple(self.connections):
            if connection.deadline < now:
                connection.expire()
        self._sweeper = loop.call_later(min(1.0, self.head_timeout / 2, self.idle_timeout / 2), self._sweep)


class _Connection(asyncio.Protocol):
    """One client: one request after the other, pipelined or not."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._held = False  # the client does not take its answers
        self._ended = False  # the client will send no more
        self.task: asyncio.Task[None] | None = None
        self.deadline: float = self._loop.time() + server.idle_timeout

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if len(self._server.connections) >= self._server.max_connections:
            transport.abort()
            return
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's
        self._transport, self._buffer = None, b""
        self._server.connections.discard(self)
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        if not self._buffer:
            self.deadline = self._loop.time() + self._server.head_timeout  # slower bytes do not move it
        self._buffer = self._buffer + data if self._buffer else data
        if self.task is None and not self._held:
            self._proceed()
        elif len(self._buffer) > _MAX_HEAD and self._transport is not None:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Keep the other direction open while an answer is on its way."""
        self._ended = True
        return self.task is not None or self._held

    def pause_writing(self) -> None:
        self._held = True
        self.deadline = self._loop.time() + self._server.head_timeout
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._held = False
        self.deadline = self._loop.time() + self._server.head_timeout
        if self.task is None:
            self._proceed()

    def close(self) -> None:
        """Close at once."""
        if self.task is not None:
            self.task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def expire(self) -> None:
        """Close because of a deadline: with an answer, where a request was begun."""
        if self.task is not None:
            return  # we are the ones who take so long
        if self._buffer and not self._held:
            self._refuse(_TIMEOUT, [])
        else:
            self.close()

    def _proceed(self) -> None:
        """Answer every request that is whole, as long as the client takes the answers; they go out together."""
        out: list[bytes] = []
        buffer, start, going, refusal = self._buffer, 0, True, None
        try:
            while going and not self._held and (end := buffer.find(b"\r\n\r\n", start, start + _MAX_HEAD)) >= 0:
                head, start = buffer[start:end], end + 4
                going = self._answer(self._server.request(head), out)
                if len(out) > _TOGETHER:
                    self._write(out)
        except _RefusedError as exc:
            refusal = exc.reply
        if self._transport is None or self._transport.is_closing():
            return
        self._buffer = buffer[start:]
        if refusal is None and going and not self._held and len(self._buffer) >= _MAX_HEAD:
            refusal = _TOO_LARGE
        if refusal is not None:
            self._refuse(refusal, out)
        elif going:
            self._write(out)
            self._rest(begun=bool(start) or not buffer)

    def _answer(self, request: _Request, out: list[bytes]) -> bool:
        """Answer one request; return whether the next one may be looked at."""
        try:
            reply = request.answer()
        except Exception:
            logger.exception("An endpoint failed")
            raise _RefusedError(_BROKEN) from None
        if not isinstance(reply, Reply):
            self._write(out)
            self.task = self._loop.create_task(self._wait(reply, request))
            return False
        self._add(reply, request, out)
        if not request.keep_alive:
            self._write(out)
            self._hang_up()
        return request.keep_alive

    async def _wait(self, answer: Later, request: _Request) -> None:
        try:
            reply = await answer()
        except Exception:
            logger.exception("An endpoint failed")
            reply, request = _BROKEN, request._replace(keep_alive=False)
        self.task = None
        self.deadline = self._loop.time() + self._server.head_timeout
        out: list[bytes] = []
        self._add(reply, request, out)
        self._write(out)
        if not request.keep_alive:
            self._hang_up()
        elif not self._held:
            self._proceed()

    def _add(self, reply: Reply, request: _Request, out: list[bytes]) -> None:
        out += (reply.head, self._server.date(), b"\r\n" if request.keep_alive else b"Connection: close\r\n\r\n")
        if request.with_body:
            out.append(reply.body)

    def _rest(self, *, begun: bool) -> None:
        """Wait for the next request, or for the rest of it; the client may have said that there is none."""
        if self._ended:
            self._hang_up()
            return
        if begun:
            limit = self._server.head_timeout if self._buffer or self._held else self._server.idle_timeout
            self.deadline = self._loop.time() + limit
        if self._transport is not None and not self._held and not self._transport.is_closing():
            self._transport.resume_reading()

    def _refuse(self, reply: Reply, out: list[bytes]) -> None:
        self._buffer = b""
        out += (reply.head, self._server.date(), b"Connection: close\r\n\r\n", reply.body)
        self._write(out)
        self._hang_up()

    def _write(self, out: list[bytes]) -> None:
        if out and self._transport is not None:
            self._transport.write(b"".join(out))
            out.clear()

    def _hang_up(self) -> None:
        self._buffer = b""
        self.deadline = self._loop.time() + self._server.head_timeout
        if self._transport is not None:
            self._transport.close()


def _parse(head: bytes, table: Table) -> _Request:
    """Read a request head; what is not plainly right is refused, for others may read it differently."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    target, _, protocol = rest.partition(" ")
    if not _METHOD.fullmatch(method) or not re.fullmatch(r"HTTP/\d\.\d", protocol):
        raise _RefusedError(_MALFORMED)
    if protocol not in ("HTTP/1.0", "HTTP/1.1"):
        raise _RefusedError(_VERSION)
    headers = _headers(lines)
    if len(target) > _MAX_TARGET:
        raise _RefusedError(_TOO_LONG)
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise _RefusedError(_NO_BODY)
    if not _TARGET.fullmatch(target) or ("host" not in headers and protocol == "HTTP/1.1"):
        raise _RefusedError(_MALFORMED)
    path, _, query = _without_origin(target).partition("?")
    options = [option.strip().lower() for option in headers.get("connection", "").split(",")]
    keep_alive = "close" not in options if protocol == "HTTP/1.1" else "keep-alive" in options
    return _Request(table.find(method, path, query, headers.get("accept", "")), method != "HEAD", keep_alive)


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(name) or "\r" in value or "\n" in value or "\0" in value:
            raise _RefusedError(_MALFORMED)
        name, value = name.lower(), value.strip(" \t")
        if name in headers and name in ("host", "content-length"):
            raise _RefusedError(_MALFORMED)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _without_origin(target: str) -> str:
    """Return the path and the query of a target that a proxy may have written as a whole URL."""
    if target.startswith("/"):
        return target
    match = re.fullmatch(r"https?://[^/?#]+(?P<rest>[/?][^#]*)?", target, re.IGNORECASE)
    if match is None and target != "*":
        raise _RefusedError(_MALFORMED)
    rest = (match["rest"] or "/") if match else "*"
    return rest if rest.startswith(("/", "*")) else f"/{rest}"
