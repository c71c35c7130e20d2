"""Real ASGI servers on loopback ports, inside the test's own event loop.

Sharing the loop lets a test look at pools, hold events and cancel the task of a request, while every byte still goes through
the kernel and the server's own protocol code.
"""

import asyncio
import contextlib
import logging
import socket
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn

from .deadline import DEADLINE, until
from .wire import Address

Workers = Literal["in turn", "one of them", "only one"]
LOOPBACK = "127.0.0.1"
Message = MutableMapping[str, Any]
ASGIApp = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


@dataclass(frozen=True)
class ServerOptions:
    """``http`` chooses uvicorn's parser; the other servers have one.

    ``workers`` is for servers with several processes, see ``Stack``.
    """

    http: Literal["httptools", "h11"] = "httptools"
    workers: Workers = "in turn"


class StartupError(RuntimeError):
    """The server did not start: the application's lifespan failed, as a rule."""


class Running(ABC):
    """A server that runs."""

    address: Address

    def admission(self) -> AbstractAsyncContextManager[None]:
        """Stand around the opening of a connection; several workers take turns."""
        return contextlib.nullcontext()

    @abstractmethod
    async def stop(self, grace: float = 30) -> None:
        """Shut down as on SIGTERM: requests get ``grace`` seconds, then what the server does to those that are late."""


async def start(app: ASGIApp, server: str, options: ServerOptions) -> Running:
    """Start an ASGI application under uvicorn, hypercorn or granian; its lifespan has started when this returns.

    Raises:
        StartupError: the lifespan failed, or the server ended at once.
    """
    return await _STARTERS[server](app, options)


@contextlib.asynccontextmanager
async def serve(app: ASGIApp, server: str = "uvicorn", options: ServerOptions = ServerOptions()) -> AsyncIterator[Address]:
    """Serve an application for the length of the block."""
    running = await start(app, server, options)
    try:
        yield running.address
    finally:
        await running.stop()


class _Task(Running):
    """A server that is a task of this loop."""

    def __init__(self, address: Address, task: "asyncio.Task[None]") -> None:
        self.address = address
        self._task = task

    async def _ended(self, grace: float, *, requests: str) -> None:
        """Wait for the end; past the grace cancel the tasks of requests, which are known by their coroutine's name."""
        await asyncio.wait({self._task}, timeout=grace)
        if not self._task.done():
            for task in asyncio.all_tasks():
                if getattr(task.get_coro(), "__qualname__", "") == requests:
                    task.cancel()
        await self._task

    async def _listening(self, listens: Callable[[], object | Awaitable[object]]) -> None:
        async def up() -> bool:
            if self._task.done():
                raise StartupError("the server ended before it was up") from self._task.exception()
            answer = listens()
            return bool(await answer if isinstance(answer, Awaitable) else answer)

        try:
            await until(up)
        except BaseException:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            raise


class _UvicornServer(uvicorn.Server):
    """uvicorn without what only costs time in a test: its clock of 0.1 s, and the wait for connections that do not exist."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.asked_to_stop = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            raise StartupError("the application's lifespan failed") from None

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.asked_to_stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = time.monotonic() + 0.05
        while self._busy and time.monotonic() < end:
            await asyncio.sleep(0.001)
        if self._busy:
            await super().shutdown(sockets)
            return
        for server in self.servers:
            server.close()
            await server.wait_closed()
        await self.lifespan.shutdown()

    @property
    def _busy(self) -> bool:
        return bool(self.server_state.connections or self.server_state.tasks)


class _Uvicorn(_Task):
    def __init__(self, server: _UvicornServer) -> None:
        super().__init__(Address(LOOPBACK, 0), asyncio.create_task(server.serve(), name="uvicorn"))
        self._server = server

    @classmethod
    async def start(cls, app: ASGIApp, options: ServerOptions) -> Running:
        config = uvicorn.Config(
            app,
            host=LOOPBACK,
            port=0,
            http=options.http,
            ws="websockets-sansio",
            lifespan="on",
            log_config=None,
            access_log=False,
        )
        running = cls(_UvicornServer(config))
        await running._listening(lambda: running._server.started)
        running.address = Address(*running._server.servers[0].sockets[0].getsockname())
        return running

    async def stop(self, grace: float = 30) -> None:
        self._server.config.timeout_graceful_shutdown = grace  # type: ignore[assignment]  # passed on to asyncio.wait_for
        self._server.asked_to_stop.set()
        await self._task


class _Hypercorn(_Task):
    @classmethod
    async def start(cls, app: ASGIApp, options: ServerOptions) -> Running:
        from hypercorn.asyncio.run import worker_serve
        from hypercorn.config import Config, Sockets
        from hypercorn.utils import wrap_app

        sock = _bound()
        config = Config()
        config.errorlog = logging.getLogger("hypercorn.error")
        config.accesslog = None
        config.alt_svc_headers = []
        asked_to_stop = asyncio.Event()
        serving = worker_serve(
            wrap_app(app, config.wsgi_max_body_size, "asgi"),  # type: ignore[arg-type]
            config,
            sockets=Sockets([], [sock], []),
            shutdown_trigger=asked_to_stop.wait,
        )
        running = cls(Address(*sock.getsockname()), asyncio.create_task(serving, name="hypercorn"))
        running._config = config
        running._asked_to_stop = asked_to_stop
        try:
            await running._listening(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        except BaseException:
            sock.close()
            raise
        return running

    _config: Any
    _asked_to_stop: asyncio.Event

    async def stop(self, grace: float = 30) -> None:
        self._config.graceful_timeout = grace
        self._asked_to_stop.set()
        # On Python 3.12 and later it waits for the connections to close before it looks at its limit.
        await self._ended(grace + 0.2, requests="_handle")


class _Granian(_Task):
    @classmethod
    async def start(cls, app: ASGIApp, options: ServerOptions) -> Running:
        from granian.constants import HTTPModes, Interfaces
        from granian.server.embed import Server

        requests: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

        async def noted(scope: Message, receive: Any, send: Any) -> None:
            task = asyncio.current_task()
            assert task is not None
            requests.add(task)
            await app(scope, receive, send)

        # Reserved as long as nobody listens: granian binds the port again, with SO_REUSEPORT.
        with _bound() as sock:
            address = Address(*sock.getsockname())
            server = Server(
                noted, address=address.host, port=address.port, interface=Interfaces.ASGI, http=HTTPModes.http1, log_enabled=False
            )
            running = cls(address, asyncio.create_task(server.serve(), name="granian"))
            running._server = server
            running._requests = requests
            await running._listening(lambda: _accepts(address))
        return running

    _server: Any
    _requests: "weakref.WeakSet[asyncio.Task[Any]]"

    async def stop(self, grace: float = 30) -> None:
        self._server.stop()
        # Past the limit granian kills its worker process; what comes nearest in one process is to cancel the requests.
        await self._ended(grace, requests="_future_watcher_wrapper.<locals>.future_watcher")
        # granian 2.8 may never say "http.disconnect" to who asks for it when the answer of a declared length is out already, as
        # Litestar's streams do. Such a task ends with the worker's process: it is granian's, and nothing that was left behind.
        if late := {task for task in self._requests if not task.done()}:
            _, late = await asyncio.wait(late, timeout=1)
        for task in late:
            if type(getattr(task, "_fut_waiter", None)).__module__.startswith("granian"):
                task.cancel()


def _bound() -> socket.socket:
    """A socket on a free port that nobody else can be given; it does not listen."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((LOOPBACK, 0))
    return sock


async def _accepts(address: Address) -> bool:
    try:
        async with asyncio.timeout(DEADLINE):
            _, writer = await asyncio.open_connection(*address)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


_STARTERS: Mapping[str, Callable[[ASGIApp, ServerOptions], Awaitable[Running]]] = {
    "uvicorn": _Uvicorn.start,
    "hypercorn": _Hypercorn.start,
    "granian": _Granian.start,
}
