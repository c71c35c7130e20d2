"""The frameworks of the contract: a driver mounts an ``Application``, serves it, and asserts nothing."""

import importlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from context_sqla import DBConnect
from support.scenario import Application, Feature, Handler
from support.servers import Running, ServerOptions

ASGI_SERVERS = ("uvicorn", "hypercorn", "granian")

#: What the docs call a server whose name does not say it.
SERVERS: Mapping[str, str] = {
    "uvicorn": "uvicorn (h11 and httptools)",
    "aiohttp": "aiohttp's own",
    "aiohttp-cancelling": "aiohttp's own with `handler_cancellation`",
    "aiohttp-test": "aiohttp's `TestServer`",
    "sanic": "Sanic's own",
    "sanic-workers": "Sanic's own with two workers",
}


Work = Callable[[], Awaitable[object]]
Write = Callable[..., Awaitable[object]]


class Driver(Protocol):
    """What a driver's module offers."""

    def build(self, application: Application) -> Any:
        """Make the framework's application, with the adapter's ``setup`` called on it."""

    async def start(self, app: Any, server: str, options: ServerOptions) -> Running:
        """Serve it on a loopback port."""

    # What no scenario can describe, because each framework has its own way to it.

    def file(self, path: Path, work: Work, connect: DBConnect[Any]) -> Any:
        """Make an application whose GET / does the work and answers with the file, as the framework sends files."""

    def unfinished(self, write: Write, connect: DBConnect[Any]) -> Any:
        """Make an application whose GET / writes "handler", sends a piece, writes "body", and never sends its last piece."""

    def twice(self, handler: Handler, write: Write) -> Any:
        """Register the adapter's middleware twice around POST /, with something between the two that writes."""

    def mounted(self, handler: Handler, write: Write) -> Any:
        """Put POST / in an application that is set up inside another that is, with something between the two that writes."""

    def post(self, app: Any, url: str) -> int:
        """POST with the framework's own client, in a thread and in a loop of its own; return the status."""


@dataclass(frozen=True)
class Framework:
    """One row: the module of the driver, its servers (the default one first), and what the framework lacks, with the reason.

    ``more_servers`` are those that ``--server`` has to ask for: every test runs on them in a run of their own. ``lacks_on`` has what is lacking on one of its servers only; ``on(server)`` is the row with that as well.
    """

    module: str
    servers: Sequence[str]
    lacks: Mapping[Feature, str] = field(default_factory=dict)
    lacks_on: Mapping[str, Mapping[Feature, str]] = field(default_factory=dict)
    more_servers: Sequence[str] = ()

    def on(self, server: str) -> "Framework":
        """Return the row as it is on one of its servers."""
        return replace(self, lacks={**self.lacks, **self.lacks_on.get(server, {})})

    def driver(self) -> Driver:
        """Import the driver, and with it the framework.

        Raises:
            ImportError: the framework or its adapter is not installed.
        """
        driver: Driver = importlib.import_module(f"contract.drivers.{self.module}")
        return driver


FRAMEWORKS: Mapping[str, Framework] = {
    "asgi": Framework(
        "asgi",
        ASGI_SERVERS,
        {
            Feature.COMMIT_ERROR_HANDLERS: (
                "the middleware stands outside the application, whose error handling is over by then: the error is raised from "
                "`send`, where the application may catch it, and is the server's 500 otherwise"
            ),
            Feature.LATE_BODY: (
                "where a body runs in the request's own task, so does what follows it: if the last message never comes, what is "
                "written after the client has left is committed; a body in a task of its own is told from it"
            ),
            Feature.SYNC_HANDLERS: "an ASGI application is a coroutine function",
            Feature.GZIP: "bare ASGI has no such middleware",
            Feature.CORS: "bare ASGI has no such middleware",
            Feature.BASE_HTTP: "bare ASGI has no such middleware",
        },
    ),
    "starlette": Framework("starlette", ASGI_SERVERS),
    "fastapi": Framework("fastapi", ASGI_SERVERS),
    "litestar": Framework("litestar", ASGI_SERVERS),
    "quart": Framework(
        "quart",
        ("hypercorn", "uvicorn", "granian"),
        {
            Feature.BACKGROUND_AFTER_STREAM: "a stream may wait for what its background work makes: both begin after the commit",
            Feature.GZIP: "Quart has no compression of its own",
            Feature.HANDLER_RUNS_ON: "Quart cancels the handler of a client that has left, under every server: it is rolled back",
        },
    ),
    "falcon": Framework(
        "falcon",
        ASGI_SERVERS,
        {
            Feature.DISCONNECT: "Falcon does not listen to the server while it streams: only who writes learns that a client has left",
            Feature.SYNC_HANDLERS: "Falcon takes only coroutine functions as responders of an ASGI application",
            Feature.GZIP: "Falcon has no compression of its own",
            Feature.BASE_HTTP: "no middleware of Falcon's stands around a responder",
        },
    ),
    "aiohttp": Framework(
        "aiohttp",
        # Its own runner with handler_cancellation off, as it is by default, and on; and what aiohttp's test client starts.
        ("aiohttp", "aiohttp-cancelling", "aiohttp-test"),
        {
            Feature.SYNC_HANDLERS: "aiohttp takes only coroutine functions as handlers",
            Feature.BACKGROUND: "aiohttp runs nothing after a response: a handler that has written it starts such work itself",
            Feature.HANDSHAKE: "a handler makes a websocket of its request: work before ws.prepare() commits at the 101",
            Feature.HIDDEN_HOOKS: "aiohttp runs them in the task that starts the server",
        },
        {
            "aiohttp": {Feature.DISCONNECT: "with handler_cancellation off, only who writes learns that a client has left"},
            "aiohttp-cancelling": {Feature.HANDLER_RUNS_ON: "handler_cancellation cancels it"},
            "aiohttp-test": {Feature.HANDLER_RUNS_ON: "aiohttp's TestServer sets handler_cancellation"},
        },
    ),
    "sanic": Framework(
        "sanic",
        ("sanic", "uvicorn", "hypercorn"),
        {
            Feature.BACKGROUND_UNIT: "Sanic runs nothing after a response: `add_task(run_in_new_ctx(...))`, once it is decided",
            Feature.GZIP: "Sanic has no such middleware",
            Feature.CORS: "Sanic has no such middleware; its extension package has",
            Feature.BASE_HTTP: "Sanic has no middleware around the handler",
            Feature.SYNC_HANDLERS: "Sanic runs plain functions in the event loop, which they must not keep waiting",
        },
        {
            "sanic": {Feature.HANDLER_RUNS_ON: "Sanic's own server cancels the handler of a client that has left"},
            "sanic-workers": {Feature.HANDLER_RUNS_ON: "Sanic's own server cancels the handler of a client that has left"},
            "uvicorn": {
                Feature.DISCONNECT: "Sanic does not listen to an ASGI server: only who writes learns that a client has left"
            },
            "hypercorn": {Feature.DISCONNECT: "as under uvicorn"},
        },
        more_servers=("sanic-workers",),
    ),
}
