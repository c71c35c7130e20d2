"""Give a request to an application in this very process, as its server would, without a socket."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

_REQUEST = {"type": "http.request", "body": b"", "more_body": False}


class _Client:
    """One that asks, stays until the answer is complete, and leaves then, as servers tell it: Quart 0.23 waits for that."""

    __slots__ = ("_asked", "_left", "_waiter", "statuses")

    def __init__(self, statuses: list[int]) -> None:
        self.statuses = statuses
        self._asked = self._left = False
        self._waiter: asyncio.Future[None] | None = None

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return _REQUEST
        if not self._left:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])
        elif not message.get("more_body", False):
            self._left = True
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)


def asgi(app: Any, *, path: str = "/", query: bytes = b"", check: bool = True) -> Callable[[int], Awaitable[None]]:
    """Drive an ASGI application; its lifespan is not run."""

    async def run(count: int) -> None:
        statuses: list[int] = []
        for _ in range(count):
            scope = {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": "2.3"},
                "http_version": "1.1",
                "method": "GET",
                "scheme": "http",
                "path": path,
                "raw_path": path.encode(),
                "query_string": query,
                "root_path": "",
                "headers": [(b"host", b"localhost"), (b"accept", b"*/*")],
                "client": ("127.0.0.1", 40000),
                "server": ("127.0.0.1", 80),
                "state": {},
                "extensions": {},
            }
            client = _Client(statuses)
            await app(scope, client.receive, client.send)
        if check and (len(statuses) != count or set(statuses) != {200}):
            raise AssertionError(f"{len(statuses)} answers to {count} requests: {sorted(set(statuses))}")

    return run


class Transport(asyncio.Transport):
    """Takes what a server's protocol writes, and says when an answer is complete."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 40000), "sockname": ("127.0.0.1", 80)})
        self.written = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._closing = False

    def write(self, data: Any) -> None:
        """Take bytes of the answer."""
        self.written += data
        if self._waiter is not None and self._complete() and not self._waiter.done():
            self._waiter.set_result(None)

    def writelines(self, list_of_data: Any) -> None:
        """Take several pieces."""
        self.write(b"".join(list_of_data))

    def _complete(self) -> bool:
        head, found, body = bytes(self.written).partition(b"\r\n\r\n")
        if not found:
            return False
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                return len(body) >= int(value)
        return body.endswith(b"0\r\n\r\n")

    async def answer(self) -> bytes:
        """Wait for a complete answer, and forget it."""
        if not self._complete():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        answer = bytes(self.written)
        self.written.clear()
        return answer

    def is_closing(self) -> bool:
        """Return whether the server has closed the connection."""
        return self._closing

    def close(self) -> None:
        """Note that the server closes the connection."""
        self._closing = True

    def abort(self) -> None:
        """Note the same."""
        self._closing = True

    def get_write_buffer_size(self) -> int:
        """Return what is not sent yet: nothing."""
        return 0

    def pause_reading(self) -> None:
        """Do nothing: the next request is sent when the last is answered."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: the buffer is always empty."""


def protocol(make: Callable[[], Any], *, path: str = "/") -> Callable[[int], Awaitable[None]]:
    """Drive a server's protocol over one connection that is kept alive."""
    connection: list[tuple[Any, Transport]] = []
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n".encode()

    async def run(count: int) -> None:
        if not connection:
            one, transport = make(), Transport()
            one.connection_made(transport)
            connection.append((one, transport))
        one, transport = connection[0]
        for _ in range(count):
            one.data_received(request)
            answer = await transport.answer()
            if not answer.startswith(b"HTTP/1.1 200"):
                raise AssertionError(answer[:200])

    return run
