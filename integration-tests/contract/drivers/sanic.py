"""Sanic, with ``context_sqla_sanic.setup``; on its own server, or as an ASGI application."""

import asyncio
import contextlib
import inspect
import multiprocessing
import os
import signal
import socket
import stat
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from context_sqla import run_in_new_ctx
from context_sqla_sanic import setup
from sanic import HTTPResponse, Request, Sanic, raw, redirect
from sanic.application.constants import ServerStage
from sanic.application.state import ApplicationServerInfo
from sanic.exceptions import SanicException, WebsocketClosed
from sanic.mixins import startup
from sanic.response import BaseHTTPResponse, file_stream
from sanic.worker.manager import WorkerManager
from support import servers
from support.deadline import DEADLINE, until
from support.scenario import (
    Answer,
    Application,
    ErrorHandler,
    Exchange,
    Fail,
    Gate,
    Handler,
    Redirect,
    Result,
    Route,
    SocketGone,
    SocketHandler,
)
from support.servers import LOOPBACK, Running, ServerOptions
from support.wire import Address
from support.workers import Group, Worker
from websockets.exceptions import ConnectionClosed

Sanic.test_mode = True  # many applications in one process, with one name


def build(application: Application) -> "Sanic[Any, Any]":
    """Make the application."""
    app: Sanic[Any, Any] = Sanic("contract", configure_logging=False)
    app.config.ACCESS_LOG = False
    app.config.MOTD = False  # it imports every extension that is installed
    app.ctx.application = application
    options = {"should_commit": application.should_commit, "before_commit": application.before_commit}
    if application.setup_first:
        setup(app, *application.connects, **options)
    for number, route in enumerate(application.routes):
        if isinstance(route, Route):
            app.add_route(endpoint(route.handler), template(route.path), list(route.methods), name=f"route{number}")
        else:
            app.add_websocket_route(socket_endpoint(route.handler), template(route.path), name=f"route{number}")
    for kind, handler in application.error_handlers.items():
        app.error_handler.add(kind, error_endpoint(handler))
    for one in application.middleware:
        if isinstance(one, Gate):
            app.register_middleware(gate(one), "request")
    for hook in application.on_startup:
        app.before_server_start(listener(hook))
    for hook in reversed(application.on_shutdown):
        app.after_server_stop(listener(hook))
    app.signal("http.lifecycle.exception")(drop_background_work)
    app.signal("http.lifecycle.response")(start_background_work)
    if not application.setup_first:
        setup(app, *application.connects, **options)
    return app


async def start(app: "Sanic[Any, Any]", server: str, options: ServerOptions) -> Running:
    """Serve it."""
    if server == "sanic-workers":
        return await _Workers.start(app, options)
    return await (_Native.start(app) if server == "sanic" else servers.start(app, server, options))


def asgi(app: "Sanic[Any, Any]") -> Callable[..., Awaitable[None]]:
    """Make what can be called in the task of a test, without a server: what the framework's own ``asgi_client`` does."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        app.asgi = True
        if not app.state.is_started:
            await app._startup()
            await app._server_event("init", "before")
            await app._server_event("init", "after")
        await app({"raw_path": scope["path"].encode(), **scope}, receive, send)

    return call


async def start_background_work(request: Request, **_: Any) -> None:
    """Start it as the how-to says: when the unit of the request has decided, as a unit of its own."""
    works = getattr(request.ctx, "works", ())
    if works:
        request.app.add_task(run_in_new_ctx(_in_order, works))


async def drop_background_work(request: Request, **_: Any) -> None:
    """An answer that was not sent has none."""
    request.ctx.works = ()


async def _in_order(works: Any) -> None:
    for work in works:
        await work()


def template(path: str) -> str:
    """Write a path's parameters as Sanic does."""
    return path.replace("{", "<").replace("}", ">")


def endpoint(handler: Handler) -> Callable[..., Any]:
    """Make a handler; a plain function stays one, and runs in the loop."""
    if inspect.iscoroutinefunction(handler):

        async def run(request: Request, **_: Any) -> BaseHTTPResponse | None:
            try:
                return await respond(await handler(exchange(request)), request)
            except Redirect as exc:
                raise SanicException(status_code=exc.status, headers={"location": exc.location}) from None
            except Fail as exc:
                raise SanicException(exc.detail, status_code=exc.status) from None

        return run

    def run_in_the_loop(request: Request, **_: Any) -> BaseHTTPResponse:
        result = handler(exchange(request))
        assert isinstance(result, Answer | Redirect)
        return plain(result)

    return run_in_the_loop


def socket_endpoint(handler: SocketHandler) -> Callable[..., Awaitable[None]]:
    """Make a websocket handler."""

    async def run(request: Request, websocket: Any) -> None:
        await handler(_Socket(websocket))

    return run


def error_endpoint(handler: ErrorHandler) -> Callable[[Request, Exception], Awaitable[BaseHTTPResponse | None]]:
    """Make an exception handler."""

    async def run(request: Request, exc: Exception) -> BaseHTTPResponse | None:
        return await respond(await handler(exc), request)

    return run


def gate(one: Gate) -> Callable[[Request], Awaitable[BaseHTTPResponse | None]]:
    """Make request middleware."""

    async def run(request: Request) -> BaseHTTPResponse | None:
        answer = await one.check(exchange(request))
        return None if answer is None else plain(answer)

    return run


def listener(hook: Callable[[], Awaitable[object]]) -> Callable[[Any], Awaitable[None]]:
    """Make a listener."""

    async def run(app: Any) -> None:
        await hook()

    return run


def exchange(request: Request) -> Exchange:
    """Make the scenario's view of a request."""

    async def body() -> bytes:
        await request.receive_body()
        return bytes(request.body)

    query = {name: values[0] for name, values in request.args.items()}
    return Exchange(request.method, request.path, query, dict(request.headers), body, request)


def plain(result: Result) -> HTTPResponse:
    """Make a response that is no stream."""
    if isinstance(result, Redirect):
        return redirect(result.location, status=result.status)
    fields = {"content-length": str(len(result.payload)), **result.fields}  # Sanic's own server adds it, others would not
    return raw(result.payload, result.status, fields, fields.pop("content-type", "text/plain; charset=utf-8"))


async def respond(result: Result, request: Request) -> BaseHTTPResponse | None:
    """Make a response, or send a stream as a handler does in Sanic."""
    request.ctx.works = getattr(result, "background", ())
    if isinstance(result, Redirect) or result.stream is None:
        return plain(result)
    stream = result.stream
    try:
        response = await request.respond(status=result.status, headers=result.fields, content_type="text/plain")
        await response.send("")  # the head, which would otherwise wait for the first piece
        async for piece in stream:
            await response.send(piece)
    except asyncio.CancelledError:  # no signal tells of a client that has left
        await start_background_work(request)
        raise
    finally:
        if (aclose := getattr(stream, "aclose", None)) is not None:
            await aclose()
    return None


class _Native(Running):
    """Sanic's own server, a worker that lives in the loop of the test."""

    def __init__(self, app: "Sanic[Any, Any]", server: Any, address: Address) -> None:
        self.address = address
        self._app = app
        self._server = server

    @classmethod
    async def start(cls, app: "Sanic[Any, Any]") -> Running:
        sock = socket.create_server((LOOPBACK, 0))
        sock.setblocking(False)
        server = await app.create_server(
            sock=sock, return_asyncio_server=True, access_log=False, asyncio_server_kwargs={"start_serving": False}
        )
        assert server is not None
        try:
            await server.startup()
            await server.before_start()
        except Exception as exc:
            await server.close()
            raise servers.StartupError("a listener failed") from exc
        # As `run` does, or add_task would wait for the start.
        app.state.server_info.append(ApplicationServerInfo({}, ServerStage.SERVING))
        await server.start_serving()
        await server.after_start()
        return cls(app, server, Address(*server.server.sockets[0].getsockname()))

    async def stop(self, grace: float = 30) -> None:
        """Do what ``sanic.server.runners`` does on SIGTERM, step by step."""
        await self._server.before_stop()
        self._server.server.close()
        for connection in tuple(self._server.connections):
            connection.close_if_idle()
        try:
            async with asyncio.timeout(grace):
                await until(lambda: not self._server.connections, deadline=grace)
        except TimeoutError:
            pass
        for connection in tuple(self._server.connections):
            if getattr(connection, "websocket", None):
                connection.websocket.fail_connection(code=1001)
            else:
                connection.abort()
        await self._server.after_stop()
        self._app.state.server_info.clear()


class _Workers(Running):
    """Sanic's own server as ``app.run(workers=2)`` starts it: a process that manages two workers, forked from the test."""

    def __init__(self, group: Group, address: Address, process: Any, manager: socket.socket, options: ServerOptions) -> None:
        self.address = address
        self._group = group
        self._process = process
        self._manager = manager
        self._together = options.workers != "in turn"

    @classmethod
    async def start(cls, app: "Sanic[Any, Any]", options: ServerOptions) -> Running:
        listening = socket.create_server((LOOPBACK, 0))
        listening.setblocking(False)
        ours, theirs = socket.socketpair()
        group = Group(_parts(app.ctx.application), 1 if options.workers == "only one" else 2)
        app.config.USE_UVLOOP = type(asyncio.get_running_loop()).__module__.startswith("uvloop")
        process = multiprocessing.get_context("fork").Process(target=_manage, args=(app, group, listening, theirs))
        with warnings.catch_warnings():
            # From Python 3.12 on: a thread of the test may hold a lock that the child will want. It wants none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        running = cls(group, Address(*listening.getsockname()), process, ours, options)
        listening.close()
        theirs.close()
        group.forked()
        try:
            await running._listening()
        except BaseException:
            await running._ended()
            raise
        return running

    def admission(self) -> Any:
        return self._group.admission(together=self._together)

    async def stop(self, grace: float = 30) -> None:
        """Send SIGTERM to the managing process, and wait for its end."""
        self._group.settle()
        for member in self._group.members:
            if not member.is_over:
                self._group.ask(member, "grace", grace)
        # A SIGTERM that comes before the manager has seen all workers makes it wait for them forever.
        async with asyncio.timeout(DEADLINE * 3):
            await asyncio.get_running_loop().sock_recv(self._manager, 1)
        os.kill(self._process.pid, signal.SIGTERM)
        await self._ended()
        if self._group.problems:
            raise AssertionError("; ".join(self._group.problems))

    async def _listening(self) -> None:
        ended = asyncio.ensure_future(_readable(self._process.sentinel))
        try:
            async with asyncio.timeout(DEADLINE * 3):
                while not all(member.is_serving for member in self._group.members):
                    self._group.changed.clear()
                    changed = asyncio.ensure_future(self._group.changed.wait())
                    await asyncio.wait({changed, ended}, return_when=asyncio.FIRST_COMPLETED)
                    changed.cancel()
                    if ended.done():
                        raise servers.StartupError("a worker did not start")
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    async def _ended(self) -> None:
        try:
            async with asyncio.timeout(DEADLINE * 6):
                await _readable(self._process.sentinel)
        finally:
            if self._process.is_alive():
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
            self._group.close()
            self._manager.close()


def _parts(application: Application) -> list[Any]:
    hooks = [*application.on_startup, *application.on_shutdown]
    rules = [application.should_commit, application.before_commit]
    middleware = list(application.middleware)
    return [list(application.routes), application.connects, list(application.error_handlers.values()), rules, middleware, hooks]


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def _manage(app: "Sanic[Any, Any]", group: Group, listening: socket.socket, test: socket.socket) -> None:
    """Be the process that manages the workers: its signals and its group are its own."""
    os.setsid()
    signal.set_wakeup_fd(-1)  # that of the test's loop
    _let_go({listening.fileno(), test.fileno(), *(end.fileno() for end in group.ends)})
    serve, wait_for_ack = startup.worker_serve, WorkerManager.wait_for_ack

    def worker_serve(*args: Any, **kwargs: Any) -> None:
        name = os.environ["SANIC_WORKER_NAME"]
        while "starts" not in kwargs["worker_state"][name]:
            time.sleep(0.001)  # the manager's note that it has started a worker would wipe out the worker's that it is ready
        number = int(name.split("-")[2])
        worker = Worker(group, number, listening)
        worker.grace = lambda seconds: setattr(app.config, "GRACEFUL_SHUTDOWN_TIMEOUT", seconds)
        app.listener("before_server_start", priority=2_000_000)(listener(worker.attach))
        app.listener("after_server_start", priority=-2_000_000)(listener(worker.serving))
        serve(*args, **kwargs)
        worker.over()

    def waited_for_ack(manager: WorkerManager) -> None:
        wait_for_ack(manager)
        test.send(b"1")

    def sync_states(manager: WorkerManager) -> None:
        # Its answer to a SIGTERM asks for states as well, over the same connection, which has just been asked something.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            told(manager)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    startup.worker_serve = worker_serve
    WorkerManager.wait_for_ack = waited_for_ack  # type: ignore[method-assign]
    told, WorkerManager._sync_states = WorkerManager._sync_states, sync_states  # type: ignore[method-assign]
    Sanic.start_method = "fork"
    Sanic._app_registry = {app.name: app}
    app.prepare(sock=listening, workers=len(group.members), access_log=False, motd=False)
    Sanic.serve(app)


def _let_go(kept: set[int]) -> None:
    """Give up the sockets of the test, which would stay open here when it closes them; their numbers stay taken."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):
            if fd not in kept and stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.dup2(nothing, fd, inheritable=False)


class _Socket:
    def __init__(self, websocket: Any) -> None:
        self.native = websocket

    async def accept(self) -> None:
        """Sanic has accepted before it calls the handler."""

    async def receive(self) -> str:
        try:
            message = await self.native.recv()
        except (ConnectionClosed, WebsocketClosed, asyncio.CancelledError):  # the last one if it waits as the client leaves
            raise SocketGone from None
        if message is None:
            raise SocketGone
        return str(message)

    async def send(self, text: str) -> None:
        await self.native.send(text)

    async def close(self) -> None:
        await self.native.close()


def file(path: Path, work: Any, connect: Any) -> "Sanic[Any, Any]":
    """Make an application that does the work and answers with ``file_stream``."""
    app = build(Application([]))

    @app.get("/")
    async def run(request: Request) -> Any:
        await work()
        return await file_stream(path)

    return app


def unfinished(write: Any, connect: Any) -> "Sanic[Any, Any]":
    """Make an application that fails in the middle of its response: Sanic itself adds the last piece otherwise."""
    app = build(Application([]))

    @app.get("/")
    async def run(request: Request) -> None:
        await write("handler")
        response: Any = await request.respond(content_type="text/plain")
        await response.send("one")
        await write("body")
        raise ZeroDivisionError

    return app


def post(app: "Sanic[Any, Any]", url: str) -> int:
    """Make a request of ASGI's kind, in a loop of its own."""
    from .asgi import post

    return post(asgi(app), url)
