"""HTTP/1.1 seen from the wire: what was sent, when, and whether a response really ended.

An ordinary client hides just what the contract is about: a body that was cut off, a second request on the same connection,
a head that came before the commit.
"""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .deadline import DEADLINE
from .workers import settle


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


class BrokenOff(Exception):
    """The connection ended before the response did; ``seen`` is what came of the body since the last read."""

    def __init__(self, seen: bytes = b"") -> None:
        super().__init__(f"the connection was broken off; the last bytes were {seen[-80:]!r}")
        self.seen = seen


@dataclass(frozen=True)
class Head:
    """Status and headers (names in lower case) of a response."""

    status: int
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Response:
    """A response as it came; ``complete`` is False when the connection was broken off before its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    complete: bool

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    def json(self) -> Any:
        """Return the body read as JSON."""
        return json.loads(self.body)


class Connection:
    """One TCP connection to a server; requests go out as told, responses are read in their order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, deadline: float = DEADLINE) -> None:
        self._reader = reader
        self._writer = writer
        self._deadline = deadline
        self._methods: deque[str] = deque()
        self._body: AsyncIterator[bytes] | None = None

    async def request(self, method: str, path: str, *, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Response:
        """Send a request and read its whole response."""
        await self.send(method, path, body=body, headers=headers)
        return await self.response()

    async def send(self, method: str, path: str, *, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send a whole request without waiting for an answer; several in a row are pipelined."""
        await self.send_head(method, path, length=len(body), headers=headers)
        await self.send_body(body)

    async def send_head(self, method: str, path: str, *, length: int = 0, headers: Mapping[str, str] | None = None) -> None:
        """Send the head of a request whose body of ``length`` bytes follows by ``send_body``."""
        fields = {"Host": "localhost", **(headers or {})}
        if length:
            fields["Content-Length"] = str(length)
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        self._methods.append(method)
        await self.send_body("\r\n".join(lines).encode())

    async def send_body(self, piece: bytes) -> None:
        """Send a piece of the body, or any bytes."""
        if not piece:
            return
        settle()
        async with asyncio.timeout(self._deadline):
            self._writer.write(piece)
            await self._writer.drain()

    async def head(self) -> Head:
        """Read the head of the next response, 1xx left out; then read its body by ``chunk`` or ``rest``.

        Raises:
            BrokenOff: the connection ended before or within the head.
        """
        method = self._methods.popleft()
        head = await self._read_head()
        while head.status < 200 and head.status != 101:
            head = await self._read_head()
        self._body = self._pieces(method, head)
        return head

    async def chunk(self) -> bytes | None:
        """Read the next piece of the body; None once it has ended as it should.

        Raises:
            BrokenOff: the connection ended before the body.
        """
        assert self._body is not None, "read the head first"
        try:
            async with asyncio.timeout(self._deadline):
                return await anext(self._body, None)
        finally:
            settle()

    async def rest(self) -> bytes:
        """Read what is left of the body.

        Raises:
            BrokenOff: the connection ended before the body; ``seen`` has what came.
        """
        seen = b""
        try:
            while (piece := await self.chunk()) is not None:
                seen += piece
        except BrokenOff as exc:
            raise BrokenOff(seen + exc.seen) from None
        return seen

    async def response(self) -> Response:
        """Read the next response to its end, whichever way it ends.

        Raises:
            BrokenOff: there was not even a head.
        """
        head = await self.head()
        try:
            return Response(head.status, head.headers, await self.rest(), complete=True)
        except BrokenOff as exc:
            return Response(head.status, head.headers, exc.seen, complete=False)

    async def until_closed(self) -> bytes:
        """Return everything that still comes until the server ends the connection."""
        try:
            async with asyncio.timeout(self._deadline):
                return await self._reader.read(-1)
        except ConnectionError:
            return b""
        finally:
            settle()

    def abort(self) -> None:
        """Vanish: drop the connection at once, as a killed client does."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close the connection in an orderly way."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _read_head(self) -> Head:
        try:
            async with asyncio.timeout(self._deadline):
                raw = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as exc:
            raise BrokenOff(exc.partial) from None
        except ConnectionError:
            raise BrokenOff from None
        finally:
            settle()
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        pairs = (line.partition(":") for line in lines)
        return Head(int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs})

    async def _pieces(self, method: str, head: Head) -> AsyncIterator[bytes]:
        try:
            if method == "HEAD" or head.status in (101, 204, 304):
                return
            if head.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int(await self._reader.readuntil(b"\r\n"), 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
                await self._reader.readuntil(b"\r\n")
            elif (length := head.headers.get("content-length")) is not None:
                left = int(length)
                while left:
                    if not (piece := await self._reader.read(min(left, 65536))):
                        raise BrokenOff
                    left -= len(piece)
                    yield piece
            else:
                while piece := await self._reader.read(65536):
                    yield piece
        except asyncio.IncompleteReadError as exc:
            raise BrokenOff(exc.partial) from None
        except ConnectionError:
            raise BrokenOff from None


@contextlib.asynccontextmanager
async def connect(address: Address, *, deadline: float = DEADLINE) -> AsyncIterator[Connection]:
    """Open a connection for the length of the block; ``deadline`` bounds every read and write on it."""
    connection = Connection(*await asyncio.open_connection(*address), deadline=deadline)
    try:
        yield connection
    finally:
        await connection.close()
