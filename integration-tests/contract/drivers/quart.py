"""Quart, with ``context_sqla_quart.setup``."""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from context_sqla_asgi import ASGIHTTPDBSessionMiddleware
from context_sqla_quart import setup
from quart import Quart, Request, Response, abort, current_app, redirect, request, send_file, websocket
from quart.typing import ResponseTypes
from support import servers
from support.scenario import (
    Answer,
    Application,
    BackgroundWork,
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

from .asgi import Between


def build(application: Application) -> Quart:
    """Make the application."""
    app = Quart(__name__)
    for number, route in enumerate(application.routes):
        name = f"route{number}"
        if isinstance(route, Route):
            app.add_url_rule(_rule(route.path), name, _view(route.handler), methods=list(route.methods))
        else:
            app.add_websocket(_rule(route.path), name, _socket_view(route.handler))
    for kind, handler in application.error_handlers.items():
        app.register_error_handler(kind, _error_handler(handler))
    for hook in application.on_startup:
        app.before_serving(_hook(hook))
    for hook in application.on_shutdown:
        app.after_serving(_hook(hook))
    options = {"should_commit": application.should_commit, "before_commit": application.before_commit}
    if application.setup_first:
        setup(app, *application.connects, **options)
    for one in application.middleware:
        if isinstance(one, Gate):
            app.before_request(_gate(one))
    for one in reversed(application.middleware):  # Quart runs the hook that was added last first
        if isinstance(one, Feature):
            app.after_request(_HOOKS[one])
    if not application.setup_first:
        setup(app, *application.connects, **options)
    return app


async def start(app: Quart, server: str, options: ServerOptions) -> Running:
    """Serve it."""
    return await servers.start(app, server, options)  # type: ignore[arg-type]


def _rule(path: str) -> str:
    return path.replace("{", "<").replace("}", ">")


def _hook(work: BackgroundWork) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        await work()

    return run


def _view(handler: Handler) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(handler):

        async def run(**names: str) -> ResponseTypes:
            with _own_exceptions():
                return _respond(await handler(_exchange()))

        return run

    def run_in_thread(**names: str) -> ResponseTypes:
        with _own_exceptions():
            result = handler(_exchange())
            assert isinstance(result, Answer | Redirect)
            return _respond(result)

    return run_in_thread


def _socket_view(handler: SocketHandler) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        await handler(_Socket())

    return run


def _error_handler(handler: ErrorHandler) -> Callable[[Exception], Awaitable[ResponseTypes]]:
    async def run(exc: Exception) -> ResponseTypes:
        return _respond(await handler(exc))

    return run


def _gate(gate: Gate) -> Callable[[], Awaitable[ResponseTypes | None]]:
    async def run() -> ResponseTypes | None:
        answer = await gate.check(_exchange())
        return None if answer is None else _respond(answer)

    return run


async def _allow_every_origin(response: Response) -> Response:
    """Do what quart-cors does for a simple request, in the place where it does it."""
    if "origin" in request.headers:
        response.headers["access-control-allow-origin"] = "*"
    return response


async def _pass_through(response: Response) -> Response:
    return response


_HOOKS = {Feature.CORS: _allow_every_origin, Feature.BASE_HTTP: _pass_through}


def _exchange() -> Exchange:
    native: Request = request._get_current_object()  # type: ignore[attr-defined]

    async def body() -> bytes:
        return await native.get_data(as_text=False)

    headers = {name.lower(): value for name, value in native.headers.items()}
    return Exchange(native.method, native.path, native.args.to_dict(), headers, body, native)


def _respond(result: Result) -> ResponseTypes:
    if isinstance(result, Redirect):
        return redirect(result.location, result.status)
    for work in result.background:
        current_app.add_background_task(work)
    return Response(result.payload if result.stream is None else result.stream, result.status, result.fields)


@contextlib.contextmanager
def _own_exceptions() -> Iterator[None]:
    try:
        yield
    except Redirect as exc:
        abort(redirect(exc.location, exc.status))
    except Fail as exc:
        abort(exc.status, exc.detail)


class _Socket:
    def __init__(self) -> None:
        self.native: Any = websocket

    async def accept(self) -> None:
        await websocket.accept()

    async def receive(self) -> str:
        try:
            return str(await websocket.receive())
        except asyncio.CancelledError:  # so Quart tells that the client has left
            raise SocketGone from None

    async def send(self, text: str) -> None:
        await websocket.send(text)

    async def close(self) -> None:
        await websocket.close(1000)


def file(path: Path, work: Any, connect: Any) -> Quart:
    """Make an application that does the work and answers with ``send_file``."""
    app = Quart(__name__)

    @app.get("/")
    async def view() -> Response:
        await work()
        return await send_file(path)

    setup(app, connect)
    return app


def unfinished(write: Any, connect: Any) -> Quart:
    """Make an application whose response Quart ends for its timeout, without an error."""
    app = Quart(__name__)

    async def body() -> AsyncIterator[bytes]:
        await write("body")
        yield b"first"
        await asyncio.Event().wait()

    @app.get("/")
    async def view() -> Response:
        await write("handler")
        response = Response(body())
        response.timeout = 0.05
        return response

    setup(app, connect)
    return app


def twice(handler: Handler, write: Any) -> Quart:
    """Put ASGI middleware around an application that is set up: it has one extension."""
    app = build(Application([Route("/", handler)]))
    app.asgi_app = ASGIHTTPDBSessionMiddleware(Between(app.asgi_app, write))  # type: ignore[method-assign]
    return app


def mounted(handler: Handler, write: Any) -> Quart:
    """Set an application up whose ASGI part is another one."""
    app = Quart(__name__)
    app.asgi_app = Between(build(Application([Route("/", handler)])), write)  # type: ignore[method-assign, assignment, arg-type]
    setup(app)
    return app


def post(app: Quart, url: str) -> int:
    """Make a request with Quart's client, in a loop of its own."""

    async def call() -> int:
        return (await app.test_client().post(url)).status_code

    return asyncio.run(call())
