"""A hand-written ASGI application, wrapped by ``context_sqla_asgi.setup``."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from context_sqla_asgi import ASGIHTTPDBSessionMiddleware, setup
from support import servers
from support.scenario import Answer, Application, Exchange, Fail, Gate, Handler, Redirect, Result, Route, SocketGone, SocketRoute
from support.servers import ASGIApp, Running, ServerOptions


def build(application: Application) -> ASGIApp:
    """Make the application; everything that follows is what its author would have written."""
    app: ASGIApp = setup(
        _App(application),
        *application.connects,
        should_commit=application.should_commit,
        before_commit=application.before_commit,
    )
    return app


async def start(app: ASGIApp, server: str, options: ServerOptions) -> Running:
    """Serve it."""
    return await servers.start(app, server, options)


class _App:
    def __init__(self, application: Application) -> None:
        self._application = application
        self._gates: Sequence[Gate] = [one for one in application.middleware if isinstance(one, Gate)]
        self._routes = {route.path: route for route in application.routes}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            route = self._routes.get(scope["path"])
            if isinstance(route, SocketRoute):
                await route.handler(_Socket(scope, receive, send))
            else:
                await send({"type": "websocket.close", "code": 1000})
        else:
            answer = await self._answer(_exchange(scope, receive))
            await _write(answer, scope["method"], receive, send)
            for work in answer.background:
                await work()

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        for hook in self._application.on_startup:
            await hook()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for hook in self._application.on_shutdown:
            await hook()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, exchange: Exchange) -> Answer:
        try:
            return _plain(await self._handle(exchange))
        except (Redirect, Fail) as exc:
            return _plain(exc)
        except Exception as exc:
            for kind, handler in self._application.error_handlers.items():
                if isinstance(exc, kind):
                    return await handler(exc)
            raise

    async def _handle(self, exchange: Exchange) -> Result:
        for gate in self._gates:
            if (answer := await gate.check(exchange)) is not None:
                return answer
        route = self._routes.get(exchange.path)
        if not isinstance(route, Route):
            return Answer(404, "Not Found")
        if exchange.method not in route.methods and not (exchange.method == "HEAD" and "GET" in route.methods):
            return Answer(405, "Method Not Allowed")
        result = route.handler(exchange)
        return result if isinstance(result, Answer | Redirect) else await result


def _plain(result: Result | Fail) -> Answer:
    if isinstance(result, Redirect):
        return Answer(result.status, headers={"location": result.location})
    if isinstance(result, Fail):
        return Answer(result.status, result.detail)
    return result


def _exchange(scope: Mapping[str, Any], receive: Any) -> Exchange:
    async def body() -> bytes:
        pieces = []
        while (message := await receive())["type"] == "http.request":
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        return b"".join(pieces)

    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    query = dict(parse_qsl(scope["query_string"].decode()))
    return Exchange(scope["method"], scope["path"], query, headers, body, scope)


async def _write(answer: Answer, method: str, receive: Any, send: Any) -> None:
    fields = answer.fields if answer.stream is not None else {"content-length": str(len(answer.payload)), **answer.fields}
    headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if answer.stream is None or method == "HEAD":
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else answer.payload})
        return
    async with _until_the_client_leaves(receive):
        async with _closing(answer.stream) as stream:
            async for piece in stream:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def _until_the_client_leaves(receive: Any) -> AsyncIterator[None]:
    """End the block early, and without an error, when the client goes: the servers say so to nobody but a receiver."""
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
    finally:
        watcher.cancel()


@contextlib.asynccontextmanager
async def _closing(stream: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    try:
        yield stream
    finally:
        if (aclose := getattr(stream, "aclose", None)) is not None:
            await aclose()


class _Socket:
    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self.native = scope
        self._receive = receive
        self._send = send

    async def accept(self) -> None:
        await self._receive()
        await self._send({"type": "websocket.accept"})

    async def receive(self) -> str:
        message = await self._receive()
        if message["type"] != "websocket.receive":
            raise SocketGone
        return str(message["text"])

    async def send(self, text: str) -> None:
        await self._send({"type": "websocket.send", "text": text})

    async def close(self) -> None:
        await self._send({"type": "websocket.close", "code": 1000})


def file(path: Path, work: Any, connect: Any) -> Any:
    """Make an application that does the work and sends a file in the server's own way, where it has one."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _no_lifespan(receive, send)
            return
        await work()
        length = str(path.stat().st_size).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        if "http.response.pathsend" in scope.get("extensions", {}):
            await send({"type": "http.response.pathsend", "path": str(path)})
        else:
            await send({"type": "http.response.body", "body": path.read_bytes()})

    return setup(app, connect)


def unfinished(write: Any, connect: Any) -> Any:
    """Make an application that forgets its last message."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _no_lifespan(receive, send)
            return
        await write("handler")
        await Unfinished(write)(scope, receive, send)

    return setup(app, connect)


async def _no_lifespan(receive: Any, send: Any) -> None:
    for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})


class Unfinished:
    """A response that sends a piece and returns as if it were done: an ASGI application that forgets its last message."""

    def __init__(self, write: Any) -> None:
        self.write = write
        self.background = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Write and send a piece."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await self.write("body")
        await send({"type": "http.response.body", "body": b"first", "more_body": True})


def twice(handler: Handler, write: Any) -> Any:
    """Put the middleware around the application twice."""
    plain = build(Application([Route("/", handler)])).app  # type: ignore[attr-defined]
    return ASGIHTTPDBSessionMiddleware(Between(ASGIHTTPDBSessionMiddleware(plain), write))


def mounted(handler: Handler, write: Any) -> Any:
    """Set an application up that is set up already."""
    return setup(Between(build(Application([Route("/", handler)])), write))


class Between:
    """Middleware of nobody's kind that stands between the two: it writes as well."""

    def __init__(self, app: ASGIApp, write: Any) -> None:
        self.app = app
        self.write = write

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Write first."""
        if scope["type"] == "http":
            await self.write()
        await self.app(scope, receive, send)


def post(app: ASGIApp, url: str) -> int:
    """Make a request in a loop of its own, without any client."""
    path, _, query = url.partition("?")
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": query.encode(), "headers": [], "http_version": "1.1"}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return int(sent[0]["status"])
