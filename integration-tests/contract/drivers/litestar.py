"""Litestar, with ``context_sqla_litestar``: its plugin, or ``setup`` on the application that is made."""

import inspect
import re
import warnings
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from context_sqla_asgi import ASGIHTTPDBSessionMiddleware
from context_sqla_litestar import ContextSQLAPlugin, setup
from litestar import Litestar, MediaType, Request, Response, WebSocket, asgi, get, route, websocket
from litestar.background_tasks import BackgroundTask, BackgroundTasks
from litestar.config.app import AppConfig
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.exceptions import HTTPException, WebSocketDisconnect
from litestar.middleware import DefineMiddleware
from litestar.response import File, Stream
from litestar.response import Redirect as RedirectResponse
from litestar.types import ASGIApp, Receive, Scope, Send
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
    Middleware,
    Redirect,
    Result,
    Route,
    SocketGone,
    SocketRoute,
)
from support.servers import Running, ServerOptions

from .asgi import Between, Unfinished


def build(application: Application) -> Litestar:
    """Make the application; ``setup_first`` is the plugin, with what is configured after it, the other is ``setup``."""
    options: Mapping[str, Any] = {"should_commit": application.should_commit, "before_commit": application.before_commit}
    handlers: Any = {kind: _error_handler(handler) for kind, handler in application.error_handlers.items()}

    def add_middleware(config: AppConfig) -> AppConfig:
        config.middleware.extend(_middleware(one) for one in application.middleware if one not in _CONFIGURED)
        config.cors_config = CORSConfig(allow_origins=["*"]) if Feature.CORS in application.middleware else None
        gzip = CompressionConfig("gzip", minimum_size=1) if Feature.GZIP in application.middleware else None
        config.compression_config = gzip
        return config

    app = Litestar(
        [mount(route) for route in application.routes],
        exception_handlers=handlers,
        on_startup=list(application.on_startup),
        on_shutdown=list(application.on_shutdown),
        plugins=[ContextSQLAPlugin(*application.connects, **options)] if application.setup_first else [],
        on_app_init=[add_middleware],
        logging_config=None,
        openapi_config=None,
    )
    if not application.setup_first:
        setup(app, *application.connects, **options)
    return app


async def start(app: Litestar, server: str, options: ServerOptions) -> Running:
    """Serve it."""
    return await servers.start(app, server, options)


_CONFIGURED = (Feature.CORS, Feature.GZIP)  # their places are Litestar's


def mount(one: Route | SocketRoute) -> Any:
    """Make a route handler."""
    path = re.sub(r"{(\w+)}", r"{\1:str}", one.path)
    if isinstance(one, SocketRoute):
        socket_handler = one.handler

        async def talk(socket: WebSocket[Any, Any, Any]) -> None:
            await socket_handler(_Socket(socket))

        return websocket(path)(talk)

    handler: Any = one.handler
    run: Any
    if inspect.iscoroutinefunction(handler):

        async def run(request: Request[Any, Any, Any]) -> Response[Any]:
            try:
                return _respond(await handler(_exchange(request)), request)
            except (Redirect, Fail) as exc:
                raise _own_exception(exc) from None

    else:

        def run(request: Request[Any, Any, Any]) -> Response[Any]:
            try:
                return _respond(handler(_exchange(request)), request)
            except (Redirect, Fail) as exc:
                raise _own_exception(exc) from None

    methods: Any = list(one.methods)
    in_thread = None if inspect.iscoroutinefunction(handler) else True
    return route(path, http_method=methods, status_code=200, sync_to_thread=in_thread)(run)


def _exchange(request: Request[Any, Any, Any]) -> Exchange:
    query, headers = dict(request.query_params), dict(request.headers)
    return Exchange(request.method, request.url.path, query, headers, request.body, request)


def _respond(result: Result, request: Request[Any, Any, Any]) -> Response[Any]:
    if isinstance(result, Redirect):
        return RedirectResponse(result.location, status_code=result.status)  # type: ignore[arg-type]
    background = BackgroundTasks([BackgroundTask(work) for work in result.background]) if result.background else None
    headers = dict(result.fields)
    media_type = headers.pop("content-type", MediaType.TEXT)
    if result.stream is not None:
        return Stream(result.stream, status_code=result.status, headers=headers, media_type=media_type, background=background)
    body = result.payload
    if request.method == "HEAD":
        headers, body = {"content-length": str(len(body)), **headers}, b""
    return Response(body, status_code=result.status, headers=headers, media_type=media_type, background=background)


def _own_exception(exc: Redirect | Fail) -> HTTPException:
    if isinstance(exc, Redirect):
        return HTTPException(status_code=exc.status, headers={"location": exc.location})
    return HTTPException(exc.detail, status_code=exc.status)


def _error_handler(handler: ErrorHandler) -> Callable[[Request[Any, Any, Any], Exception], Response[Any]]:
    """Make a handler of Litestar's, which is a plain function, of one that has to be awaited."""

    def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[Any]:
        return _Later(lambda: handler(exc))

    return handle


class _Later(Response[bytes]):
    """A response that is made when Litestar sends it."""

    def __init__(self, make: Callable[[], Awaitable[Answer]]) -> None:
        super().__init__(b"")
        self._make = make

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = _respond(await self._make(), kwargs["request"])
            await response.to_asgi_response(*args, **kwargs)(scope, receive, send)

        return app


def _middleware(one: Middleware) -> Any:
    def make(app: ASGIApp) -> ASGIApp:
        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request[Any, Any, Any](scope, receive, send) if scope["type"] == "http" else None
            answer = await one.check(_exchange(request)) if isinstance(one, Gate) and request is not None else None
            if answer is None or request is None:
                await app(scope, receive, send)
            else:
                await _respond(answer, request).to_asgi_response(app=None, request=request)(scope, receive, send)

        return run

    return make


class _Socket:
    def __init__(self, websocket: WebSocket[Any, Any, Any]) -> None:
        self.native = websocket

    async def accept(self) -> None:
        await self.native.accept()

    async def receive(self) -> str:
        try:
            return str(await self.native.receive_text())
        except WebSocketDisconnect:
            raise SocketGone from None

    async def send(self, text: str) -> None:
        await self.native.send_text(text)

    async def close(self) -> None:
        await self.native.close()


def file(path: Path, work: Any, connect: Any) -> Litestar:
    """Make an application that does the work and answers with a ``File``."""

    @get("/")
    async def run() -> File:
        await work()
        return File(path)

    return Litestar([run], plugins=[ContextSQLAPlugin(connect)], openapi_config=None)


def unfinished(write: Any, connect: Any) -> Litestar:
    """Make an application whose response forgets its last message."""

    class Forgetful(Response[None]):
        def to_asgi_response(self, *args: Any, **kwargs: Any) -> Any:
            return Unfinished(write)

    @get("/")
    async def run() -> Response[None]:
        await write("handler")
        return Forgetful(None)

    return Litestar([run], plugins=[ContextSQLAPlugin(connect)], openapi_config=None)


def twice(handler: Handler, write: Any) -> Litestar:
    """Add ASGI middleware twice: Litestar's adapter has no middleware class of its own."""
    middleware: Any = [ASGIHTTPDBSessionMiddleware, DefineMiddleware(Between, write=write), ASGIHTTPDBSessionMiddleware]
    return Litestar([mount(Route("/", handler))], middleware=middleware, openapi_config=None)


def mounted(handler: Handler, write: Any) -> Litestar:
    """Mount an application in another."""
    inner: Any = Between(build(Application([Route("/", handler)])), write)

    @asgi("/", is_mount=True, copy_scope=True)
    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)

    return Litestar([run], plugins=[ContextSQLAPlugin()], openapi_config=None)


def post(app: Litestar, url: str) -> int:
    """Make a request with Litestar's client, which has a loop of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for another HTTP client
        from litestar.testing import TestClient
    return TestClient(app).post(url).status_code  # no `with`: every call has a loop of its own
