"""Falcon's ASGI applications, with ``context_sqla_falcon.setup``."""

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import falcon
import falcon.asgi
import falcon.testing
from context_sqla_asgi import ASGIHTTPDBSessionMiddleware
from context_sqla_asgi import setup as setup_asgi
from context_sqla_falcon import setup
from support import servers
from support.scenario import (
    Answer,
    Application,
    ErrorHandler,
    Exchange,
    Fail,
    Feature,
    Gate,
    Handler,
    Redirect,
    Result,
    Route,
    SocketGone,
    SocketHandler,
)
from support.servers import Running, ServerOptions

from .asgi import Between, Unfinished


def build(application: Application) -> falcon.asgi.App:
    """Make the application."""
    app = falcon.asgi.App(cors_enable=False)
    for route in application.routes:
        app.add_route(route.path, resource(route.handler, route.methods) if isinstance(route, Route) else _Talk(route.handler))
    for kind, handler in application.error_handlers.items():
        app.add_error_handler(kind, _error_handler(handler))
    if application.on_startup or application.on_shutdown:
        app.add_middleware(_Hooks(application))
    options = {"should_commit": application.should_commit, "before_commit": application.before_commit}
    if application.setup_first:
        setup(app, *application.connects, **options)
    for one in application.middleware:
        app.add_middleware(_Check(one) if isinstance(one, Gate) else _MIDDLEWARE[one]())
    if not application.setup_first:
        setup(app, *application.connects, **options)
    return app


async def start(app: falcon.asgi.App, server: str, options: ServerOptions) -> Running:
    """Serve it."""
    return await servers.start(app, server, options)


def resource(handler: Handler, methods: Any = ("GET", "POST")) -> object:
    """Make a resource that answers these methods."""

    async def respond_to(self: Any, req: falcon.asgi.Request, resp: falcon.asgi.Response, **names: str) -> None:
        with _own_exceptions():
            result: Any = handler(_exchange(req))
            _respond(result if isinstance(result, Answer | Redirect) else await result, resp)

    return type("Resource", (), {f"on_{method.lower()}": respond_to for method in methods})()


def _exchange(req: falcon.asgi.Request) -> Exchange:
    async def body() -> bytes:
        return await req.stream.read()

    headers = {name.lower(): value for name, value in req.headers.items()}
    return Exchange(req.method, req.path, dict(req.params), headers, body, req)


def _respond(result: Result, resp: falcon.asgi.Response) -> None:
    if isinstance(result, Redirect):
        resp.status, resp.location = result.status, result.location
        return
    resp.status = result.status
    for name, value in result.headers.items():
        resp.set_header(name, value)
    if result.stream is None:
        resp.data = result.payload
    elif result.content_length is None:
        resp.stream = result.stream
    else:
        resp.set_stream(result.stream, result.content_length)
    for work in result.background:
        resp.schedule(work)


@contextlib.contextmanager
def _own_exceptions() -> Iterator[None]:
    try:
        yield
    except Redirect as exc:
        raise falcon.HTTPStatus(HTTPStatus(exc.status), headers={"location": exc.location}) from None
    except Fail as exc:
        raise falcon.HTTPError(HTTPStatus(exc.status), description=exc.detail) from None


def _error_handler(handler: ErrorHandler) -> Any:
    async def handle(req: falcon.asgi.Request, resp: falcon.asgi.Response, exc: Exception, params: Any) -> None:
        _respond(await handler(exc), resp)

    return handle


class _Talk:
    def __init__(self, handler: SocketHandler) -> None:
        self._handler = handler

    async def on_websocket(self, req: falcon.asgi.Request, ws: falcon.asgi.WebSocket, **names: str) -> None:
        await self._handler(_Socket(ws))


class _Socket:
    def __init__(self, ws: falcon.asgi.WebSocket) -> None:
        self.native = ws

    async def accept(self) -> None:
        await self.native.accept()

    async def receive(self) -> str:
        try:
            return await self.native.receive_text()
        except falcon.WebSocketDisconnected:
            raise SocketGone from None

    async def send(self, text: str) -> None:
        await self.native.send_text(text)

    async def close(self) -> None:
        await self.native.close()


class _Hooks:
    def __init__(self, application: Application) -> None:
        self._application = application

    async def process_startup(self, scope: Any, event: Any) -> None:
        for hook in self._application.on_startup:
            await hook()

    async def process_shutdown(self, scope: Any, event: Any) -> None:
        for hook in self._application.on_shutdown:
            await hook()


class _Check:
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def process_request(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        if (answer := await self._gate.check(_exchange(req))) is not None:
            _respond(answer, resp)
            resp.complete = True


_MIDDLEWARE = {Feature.CORS: falcon.CORSMiddleware}


def file(path: Path, work: Any, connect: Any) -> falcon.asgi.App:
    """Make an application that does the work and answers with a file-like stream, as Falcon's static routes do."""
    app = falcon.asgi.App()

    class Stream:
        def __init__(self) -> None:
            self._file = path.open("rb")

        async def read(self, size: int = -1) -> bytes:
            return self._file.read(size)

        async def close(self) -> None:
            self._file.close()

    class Resource:
        async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
            await work()
            resp.set_stream(Stream(), path.stat().st_size)  # type: ignore[arg-type]

    app.add_route("/", Resource())
    setup(app, connect)
    return app


def unfinished(write: Any, connect: Any) -> falcon.asgi.App:
    """Make an application whose author answers without Falcon, and forgets the last message."""

    class App(falcon.asgi.App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # type: ignore[override]
            if scope["type"] == "lifespan":
                await super().__call__(scope, receive, send)
                return
            await write("handler")
            await Unfinished(write)(scope, receive, send)

    app = App()
    setup(app, connect)
    return app


def twice(handler: Handler, write: Any) -> Any:
    """Put ASGI middleware around an application that is set up: no middleware of Falcon's could open a unit."""
    return ASGIHTTPDBSessionMiddleware(Between(ASGIHTTPDBSessionMiddleware(build(Application([Route("/", handler)]))), write))


def mounted(handler: Handler, write: Any) -> Any:
    """Put an application behind one that is not Falcon's, for Falcon mounts none; both are set up."""
    return setup_asgi(Between(build(Application([Route("/", handler)])), write))


def post(app: falcon.asgi.App, url: str) -> int:
    """Make a request with Falcon's client, which has a loop of its own."""
    path, _, query = url.partition("?")
    return int(falcon.testing.simulate_post(app, path, query_string=query).status_code)
