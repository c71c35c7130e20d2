"""Starlette, with ``context_sqla_starlette.setup``; FastAPI's driver uses what it can of this."""

import contextlib
import inspect
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from context_sqla_starlette import add_starlette_http_db_session_middleware, setup
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect
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

Setup = Callable[..., object]


def build(application: Application) -> Starlette:
    """Make the application."""
    routes: list[BaseRoute] = []
    for route in application.routes:
        if isinstance(route, Route):
            routes.append(StarletteRoute(route.path, endpoint(route.handler), methods=list(route.methods)))
        else:
            routes.append(WebSocketRoute(route.path, socket_endpoint(route.handler)))
    # With middleware of its own the application is set up in two parts, as FastAPI's, which has none, is in one unless it has a handler of 500 or Exception.
    app = Starlette(routes=routes, lifespan=lifespan(application), middleware=[Middleware(_Idle)])
    finish(app, application, setup)
    return app


async def start(app: Starlette, server: str, options: ServerOptions) -> Running:
    """Serve it."""
    return await servers.start(app, server, options)


def finish(app: Starlette, application: Application, setup: Setup) -> None:
    """Add error handlers and middleware, and call the adapter's ``setup`` before or after them."""
    for kind, handler in application.error_handlers.items():
        app.add_exception_handler(kind, error_endpoint(handler))
    options = {"should_commit": application.should_commit, "before_commit": application.before_commit}
    if application.setup_first:
        setup(app, *application.connects, **options)
    for one in reversed(application.middleware):
        if isinstance(one, Gate):
            app.add_middleware(_GateMiddleware, check=one.check)
        else:
            middleware, arguments = _MIDDLEWARE[one]
            app.add_middleware(middleware, **arguments)
    if not application.setup_first:
        setup(app, *application.connects, **options)


def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]] | Callable[[Request], Response]:
    """Make an endpoint of a handler; a plain function stays one, and runs in a thread."""
    if inspect.iscoroutinefunction(handler):

        async def run(request: Request) -> Response:
            with _own_exceptions():
                return respond(await handler(exchange(request)))

        return run

    def run_in_thread(request: Request) -> Response:
        with _own_exceptions():
            result = handler(exchange(request))
            assert isinstance(result, Answer | Redirect)
            return respond(result)

    return run_in_thread


def socket_endpoint(handler: SocketHandler) -> Callable[[WebSocket], Awaitable[None]]:
    """Make a websocket endpoint."""

    async def run(websocket: WebSocket) -> None:
        await handler(_Socket(websocket))

    return run


def error_endpoint(handler: ErrorHandler) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Make an exception handler."""

    async def run(request: Request, exc: Exception) -> Response:
        return respond(await handler(exc))

    return run


def lifespan(application: Application) -> Any:
    """Make a lifespan of the hooks; None if there are none."""
    if not (application.on_startup or application.on_shutdown):
        return None

    @contextlib.asynccontextmanager
    async def live(app: Starlette) -> AsyncIterator[None]:
        for hook in application.on_startup:
            await hook()
        yield
        for hook in application.on_shutdown:
            await hook()

    return live


def exchange(request: Request) -> Exchange:
    """Make the scenario's view of a request."""
    return Exchange(request.method, request.url.path, dict(request.query_params), dict(request.headers), request.body, request)


def respond(result: Result) -> Response:
    """Make a response."""
    if isinstance(result, Redirect):
        return RedirectResponse(result.location, result.status)
    background = BackgroundTasks([BackgroundTask(work) for work in result.background]) if result.background else None
    if result.stream is not None:
        return StreamingResponse(result.stream, result.status, result.fields, background=background)
    return Response(result.payload, result.status, result.fields, background=background)


@contextlib.contextmanager
def _own_exceptions() -> Any:
    try:
        yield
    except Redirect as exc:
        raise HTTPException(exc.status, headers={"location": exc.location}) from None
    except Fail as exc:
        raise HTTPException(exc.status, exc.detail) from None


async def _pass_through(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


class _Idle:
    """Middleware that does nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class _GateMiddleware:
    def __init__(self, app: ASGIApp, check: Callable[[Exchange], Awaitable[Answer | None]]) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._check(exchange(Request(scope, receive))) if scope["type"] == "http" else None
        await (self._app if answer is None else respond(answer))(scope, receive, send)


class _Socket:
    def __init__(self, websocket: WebSocket) -> None:
        self.native = websocket

    async def accept(self) -> None:
        await self.native.accept()

    async def receive(self) -> str:
        try:
            return await self.native.receive_text()
        except WebSocketDisconnect:
            raise SocketGone from None

    async def send(self, text: str) -> None:
        await self.native.send_text(text)

    async def close(self) -> None:
        await self.native.close()


_MIDDLEWARE: Mapping[Feature, tuple[Any, Mapping[str, Any]]] = {
    Feature.GZIP: (GZipMiddleware, {"minimum_size": 0}),
    Feature.CORS: (CORSMiddleware, {"allow_origins": ["*"]}),
    Feature.BASE_HTTP: (BaseHTTPMiddleware, {"dispatch": _pass_through}),
}


def file(path: Path, work: Any, connect: Any) -> Starlette:
    """Make an application that does the work and answers with a ``FileResponse``."""

    async def run(request: Request) -> Response:
        await work()
        return FileResponse(path)

    app = Starlette(routes=[StarletteRoute("/", run)])
    setup(app, connect)
    return app


def unfinished(write: Any, connect: Any) -> Starlette:
    """Make an application whose response forgets its last message."""

    async def run(request: Request) -> Any:
        await write("handler")
        return Unfinished(write)

    app = Starlette(routes=[StarletteRoute("/", run)])
    setup(app, connect)
    return app


def twice(handler: Handler, write: Any) -> Starlette:
    """Add the middleware class twice, and no ``setup``."""
    app = Starlette(routes=[StarletteRoute("/", endpoint(handler), methods=["POST"])])
    add_starlette_http_db_session_middleware(app)
    app.add_middleware(Between, write=write)
    add_starlette_http_db_session_middleware(app)
    return app


def mounted(handler: Handler, write: Any) -> Starlette:
    """Mount an application in another."""
    outer = Starlette()
    outer.mount("/", Between(build(Application([Route("/", handler)])), write))
    setup(outer)
    return outer


def post(app: ASGIApp, url: str) -> int:
    """Make a request with Starlette's client, which has a loop of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for another HTTP client
        from starlette.testclient import TestClient
    return TestClient(app).post(url).status_code  # no `with`: every call has a loop of its own
