"""An application that is being served, and its client."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket

from . import wire
from .servers import Running
from .wire import Address, Response
from .workers import settle


class Service:
    """A served application; every request without a connection of the test's own goes over a new one."""

    def __init__(self, app: Any, running: Running) -> None:
        #: The framework's own application object.
        self.app = app
        self._running = running
        self._stopped = False

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._running.address

    async def get(self, path: str = "/", *, headers: Mapping[str, str] | None = None) -> Response:
        """Send a GET request."""
        return await self.request("GET", path, headers=headers)

    async def post(self, path: str = "/", *, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Response:
        """Send a POST request."""
        return await self.request("POST", path, body=body, headers=headers)

    async def request(self, method: str, path: str, *, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Response:
        """Send a request over a connection of its own and read the whole response."""
        async with self.connect() as connection:
            return await connection.request(method, path, body=body, headers=headers)

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[wire.Connection]:
        """Open a connection for requests that share it, or for a look at single bytes."""
        async with contextlib.AsyncExitStack() as stack:
            async with self._running.admission():
                connection = await stack.enter_async_context(wire.connect(self.address))
            yield connection

    @contextlib.asynccontextmanager
    async def websocket(self, path: str) -> AsyncIterator[ClientConnection]:
        """Open a websocket; it has ``send``, ``recv`` and ``close``."""
        host, port = self.address
        async with contextlib.AsyncExitStack() as stack:
            async with self._running.admission():
                opening = connect_websocket(f"ws://{host}:{port}{path}", proxy=None, create_connection=_Client)
                socket = await stack.enter_async_context(opening)
            yield socket

    async def stop(self, grace: float = 30) -> None:
        """Shut the server down; requests that are still running get ``grace`` seconds."""
        if not self._stopped:
            self._stopped = True
            await self._running.stop(grace)


class _Client(ClientConnection):
    async def send(self, *args: Any, **kwargs: Any) -> None:
        settle()
        await super().send(*args, **kwargs)

    async def recv(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().recv(*args, **kwargs)
        finally:
            settle()
