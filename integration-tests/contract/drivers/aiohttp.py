"""aiohttp, with ``context_sqla_aiohttp.setup``, served by its own runner."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestClient, TestServer
from context_sqla import run_in_new_ctx
from context_sqla_aiohttp import DBSessionMiddleware, db_session_middleware, setup
from support.scenario import (
    Answer,
    Application,
    BackgroundWork,
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
from support.servers import LOOPBACK, Running, ServerOptions, StartupError
from support.wire import Address


def build(application: Application) -> web.Application:
    """Make the application."""
    app = web.Application(client_max_size=2**24)
    for route in application.routes:
        if isinstance(route, Route):
            methods = [one for one in route.methods if one != "HEAD"]
            for method in methods:
                app.router.add_route(method, route.path, endpoint(route.handler))
            if "GET" in methods:
                app.router.add_route("HEAD", route.path, endpoint(route.handler))
        else:
            app.router.add_get(route.path, socket_endpoint(route.handler))
    options = {"should_commit": application.should_commit, "before_commit": application.before_commit}
    if application.setup_first:
        setup(app, *application.connects, **options)  # type: ignore[arg-type]
    app.middlewares.append(_error_middleware(application))
    for one in application.middleware:
        if isinstance(one, Gate):
            app.middlewares.append(_gate_middleware(one))
        elif one is Feature.CORS:
            app.on_response_prepare.append(_allow_origins)
        else:
            app.middlewares.append(_MIDDLEWARE[one])
    app.on_startup.extend(_hook(work) for work in application.on_startup)
    app.on_cleanup.extend(_hook(work) for work in application.on_shutdown)
    if not application.setup_first:
        setup(app, *application.connects, **options)  # type: ignore[arg-type]
    return app


async def start(app: web.Application, server: str, options: ServerOptions) -> Running:
    """Serve it; cancelling: the handler of a client that has left is cancelled; test: by what users' tests start."""
    if server == "aiohttp-test":
        return await _TestServer.start_one(app)
    return await _Runner.start_one(app, handler_cancellation=server == "aiohttp-cancelling")


class _Runner(Running):
    _runner: Any

    @classmethod
    async def start_one(cls, app: web.Application, **options: Any) -> "Running":
        running = cls()
        running._runner = web.AppRunner(app, access_log=None, **options)
        try:
            await running._runner.setup()
        except Exception as exc:
            await running._runner.cleanup()
            raise StartupError("the application's startup failed") from exc
        site = web.TCPSite(running._runner, LOOPBACK, 0)
        await site.start()
        running.address = Address(*running._runner.addresses[0])
        return running

    async def stop(self, grace: float = 30) -> None:
        self._runner._shutdown_timeout = grace
        await self._runner.cleanup()


class _TestServer(Running):
    _server: TestServer

    @classmethod
    async def start_one(cls, app: web.Application) -> "Running":
        running = cls()
        running._server = TestServer(app, host=LOOPBACK)
        try:
            await running._server.start_server(access_log=None)
        except Exception as exc:
            await running._server.close()
            raise StartupError("the application's startup failed") from exc
        assert running._server.port is not None
        running.address = Address(LOOPBACK, running._server.port)
        return running

    async def stop(self, grace: float = 30) -> None:
        self._server.runner._shutdown_timeout = grace  # type: ignore[union-attr]
        await self._server.close()


def endpoint(handler: Handler) -> Callable[[web.Request], Any]:
    """Make a handler; one that has events or background work sends its own response, as handlers do in aiohttp."""

    async def run(request: web.Request) -> web.StreamResponse:
        try:
            result = handler(exchange(request))
            answer = await result if inspect.isawaitable(result) else result
        except Redirect as exc:
            raise _RAISED[exc.status](location=exc.location) from None
        except Fail as exc:
            raise _failure(exc) from None
        response: web.StreamResponse = respond(answer)
        if isinstance(answer, Answer) and answer.stream and response.content_type == "text/event-stream":
            # The head of a `Response` waits for the first piece of its body, which may be long in coming.
            response = await _stream(request, answer)
        if isinstance(answer, Answer) and answer.background:
            await response.prepare(request)
            await response.write_eof()
            # Where the server cancels handlers, this one is cancelled when its client leaves; its work is not to be.
            task = asyncio.create_task(run_in_new_ctx(_all, answer.background))
            await asyncio.shield(task)
        return response

    return run


async def _stream(request: web.Request, answer: Answer) -> web.StreamResponse:
    assert answer.stream is not None
    response = web.StreamResponse(status=answer.status, headers=answer.fields)
    await response.prepare(request)
    async for piece in answer.stream:
        await response.write(piece)
    return response


async def _all(background: Sequence[BackgroundWork]) -> None:
    for work in background:
        await work()


_RAISED: Mapping[int, Any] = {
    301: web.HTTPMovedPermanently,
    302: web.HTTPFound,
    303: web.HTTPSeeOther,
    307: web.HTTPTemporaryRedirect,
    308: web.HTTPPermanentRedirect,
}


def _failure(exc: Fail) -> web.HTTPException:
    kind = type("Failure", (web.HTTPException,), {"status_code": exc.status})
    raised: web.HTTPException = kind(text=exc.detail)
    return raised


def socket_endpoint(handler: SocketHandler) -> Callable[[web.Request], Any]:
    """Make a websocket handler."""

    async def run(request: web.Request) -> web.StreamResponse:
        socket = _Socket(request)
        await handler(socket)
        return socket.response

    return run


def exchange(request: web.Request) -> Exchange:
    """Make the scenario's view of a request."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    return Exchange(request.method, request.path, dict(request.query), headers, request.read, request)


def respond(result: Result) -> web.Response:
    """Make a response."""
    if isinstance(result, Redirect):
        return web.Response(status=result.status, headers={"Location": result.location})
    body: Any = result.payload if result.stream is None else result.stream
    return web.Response(body=body, status=result.status, headers=result.fields)


def _hook(work: BackgroundWork) -> Callable[[web.Application], Any]:
    async def run(app: web.Application) -> None:
        await work()

    return run


def _error_middleware(application: Application) -> Any:
    @web.middleware
    async def answer_errors(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
        except web.HTTPException:
            raise
        except Exception as exc:
            for kind, answer in application.error_handlers.items():
                if isinstance(exc, kind):
                    return respond(await answer(exc))
            raise
        return response

    return answer_errors


def _gate_middleware(gate: Gate) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        answer = await gate.check(exchange(request))
        response: web.StreamResponse = await handler(request) if answer is None else respond(answer)
        return response

    return check


@web.middleware
async def _compress(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request)
    if not response.prepared:
        response.enable_compression()
    return response


@web.middleware
async def _pass_through(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request)
    return response


async def _allow_origins(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Access-Control-Allow-Origin"] = "*"


_MIDDLEWARE: Mapping[Feature, Any] = {Feature.GZIP: _compress, Feature.BASE_HTTP: _pass_through}


class _Socket:
    def __init__(self, request: web.Request) -> None:
        self.native = request
        self.response = web.WebSocketResponse()

    async def accept(self) -> None:
        await self.response.prepare(self.native)

    async def receive(self) -> str:
        message = await self.response.receive()
        if message.type is not WSMsgType.TEXT:
            raise SocketGone
        return str(message.data)

    async def send(self, text: str) -> None:
        await self.response.send_str(text)

    async def close(self) -> None:
        if self.response.prepared:
            await self.response.close()


def file(path: Path, work: Any, connect: Any) -> web.Application:
    """Make an application that does the work and answers with a ``FileResponse``."""

    async def run(request: web.Request) -> web.StreamResponse:
        await work()
        return web.FileResponse(path)

    app = web.Application()
    app.router.add_get("/", run)
    setup(app, connect)
    return app


def unfinished(write: Any, connect: Any) -> web.Application:
    """Make an application whose response does not write its end."""

    class Unfinished(web.StreamResponse):
        async def prepare(self, request: Any) -> Any:
            writer = await super().prepare(request)
            await write("body")
            await self.write(b"first")
            return writer

        async def write_eof(self, data: Any = b"") -> None:
            pass

    async def run(request: web.Request) -> web.StreamResponse:
        await write("handler")
        return Unfinished()

    app = web.Application()
    app.router.add_get("/", run)
    setup(app, connect)
    return app


def between(write: Any) -> Any:
    """Make middleware that writes."""

    @web.middleware
    async def run(request: web.Request, handler: Any) -> web.StreamResponse:
        await write()
        response: web.StreamResponse = await handler(request)
        return response

    return run


def twice(handler: Handler, write: Any) -> web.Application:
    """Add the middleware twice, in both of its forms, and no ``setup``."""
    app = web.Application(middlewares=[db_session_middleware, between(write), DBSessionMiddleware()])
    app.router.add_post("/", endpoint(handler))
    return app


def mounted(handler: Handler, write: Any) -> web.Application:
    """Add an application to another, as that of a domain."""
    outer = web.Application(middlewares=[between(write)])
    setup(outer)
    outer.add_domain("localhost", build(Application([Route("/", handler)])))
    return outer


def post(app: web.Application, url: str) -> int:
    """Make a request with aiohttp's client, in a loop of its own."""

    async def call() -> int:
        async with TestClient(TestServer(app)) as client:
            return (await client.post(url)).status

    return asyncio.run(call())
