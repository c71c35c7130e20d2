"""The description of an application that no framework is named in: what a driver mounts and serves."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from context_sqla import BeforeCommitCallback, DBConnect


class Feature(Enum):
    """What a framework may lack, and the promise that it touches.

    A test of a lacking feature checks what the user gets instead; it never skips.
    """

    BACKGROUND = "P6", "work that the framework runs after the response"
    BACKGROUND_UNIT = "P6", "background work is a unit of its own"
    BACKGROUND_AFTER_STREAM = "P6", "background work of a stream waits for the stream's end"
    COMMIT_ERROR_HANDLERS = "P4b", "a commit error reaches the application's own error handlers"
    REDIRECT_RAISED = "P3", "a redirect that is raised as an exception"
    SYNC_HANDLERS = "P18", "plain functions as handlers, in a thread"
    STREAM_BROKEN_OFF = "P5", "a stream that failed is broken off for the client"
    CONTENT_LENGTH_STREAM = "P5", "a stream with a declared length"
    DISCONNECT = "P5", "a body that waits learns that its client has left"
    LATE_BODY = "P5", "what a body still writes when its client has left is told from background work"
    HANDLER_RUNS_ON = "P7", "the handler of a client that has left runs to its end"
    HANDSHAKE = "P11", "a websocket is known as one before its handshake"
    HIDDEN_HOOKS = "P12", "hooks at startup do not see the unit in which the server is started"
    WEBSOCKET = "P11", "websocket routes"
    GATE = "P3", "middleware of the framework's own kind that answers by itself"
    GZIP = "P5", "the framework's own compression middleware"
    CORS = "P4b", "the framework's own CORS middleware"
    BASE_HTTP = "P5", "function middleware around the response, as Starlette's BaseHTTPMiddleware"
    LIFESPAN = "P15", "hooks at startup and shutdown"
    UNAVAILABLE_ANSWER = "P19", "a default 503 for UnavailableError"

    def __init__(self, promise: str, meaning: str) -> None:
        self.promise = promise
        self.meaning = meaning

    @property
    def is_a_tool(self) -> bool:
        """Whether tests only use it where it is: without it, there is nothing that the promise could be broken by."""
        return self in _TOOLS


_TOOLS = {
    Feature.SYNC_HANDLERS,
    Feature.CONTENT_LENGTH_STREAM,
    Feature.WEBSOCKET,
    Feature.GATE,
    Feature.GZIP,
    Feature.CORS,
    Feature.BASE_HTTP,
    Feature.LIFESPAN,
}


@dataclass(frozen=True)
class Exchange:
    """A request, as a handler sees it; ``native`` is the framework's own object."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Callable[[], Awaitable[bytes]]
    native: Any = None


BackgroundWork = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Answer:
    """A response: a body, or a stream of pieces. ``content_length`` declares a stream's length."""

    status: int = 200
    body: str | bytes = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: AsyncIterator[bytes] | None = None
    content_length: int | None = None
    background: Sequence[BackgroundWork] = ()

    @classmethod
    def json(cls, value: object, status: int = 200) -> "Answer":
        """Make an answer of JSON."""
        return cls(status, json.dumps(value), {"content-type": "application/json"})

    @property
    def payload(self) -> bytes:
        """The body in bytes."""
        return self.body.encode() if isinstance(self.body, str) else self.body

    @property
    def fields(self) -> dict[str, str]:
        """The headers, with the declared length of a stream."""
        length = {} if self.content_length is None else {"content-length": str(self.content_length)}
        return {**self.headers, **length}


class Redirect(Exception):
    """A redirect, returned or raised: the framework's own class for it."""

    def __init__(self, location: str, status: int = 303) -> None:
        super().__init__(location)
        self.location = location
        self.status = status


class Fail(Exception):
    """Raised by a handler: the framework's own HTTP exception with this status."""

    def __init__(self, status: int, detail: str = "refused") -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class SocketGone(Exception):
    """The client has left its websocket."""


class Socket(Protocol):
    """A websocket, as a handler sees it."""

    native: Any

    async def accept(self) -> None:
        """Answer the handshake."""

    async def receive(self) -> str:
        """Return the next message; raises ``SocketGone`` when there will be none."""

    async def send(self, text: str) -> None:
        """Send a message."""

    async def close(self) -> None:
        """Close from our side."""


Result = Answer | Redirect
Handler = Callable[[Exchange], Awaitable[Result]] | Callable[[Exchange], Result]
ErrorHandler = Callable[[Exception], Awaitable[Answer]]
SocketHandler = Callable[[Socket], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """A handler at a path; a plain function is a sync handler."""

    path: str
    handler: Handler
    methods: Sequence[str] = ("GET", "POST")


@dataclass(frozen=True)
class SocketRoute:
    """A websocket handler at a path."""

    path: str
    handler: SocketHandler


@dataclass(frozen=True)
class Gate:
    """Middleware, such as authentication: ``check`` runs before the handler and answers by itself or lets pass (None)."""

    check: Callable[[Exchange], Awaitable[Answer | None]]


Middleware = Gate | Feature


@dataclass(frozen=True)
class Application:
    """All that a driver needs to know.

    ``middleware`` has gates and ``Feature.GZIP``, ``CORS``, ``BASE_HTTP``, the outermost first; ``setup_first``: the adapter's
    ``setup`` is called before they are added, not after.
    """

    routes: Sequence[Route | SocketRoute]
    connects: Sequence[DBConnect[Any]] = ()
    error_handlers: Mapping[type[Exception], ErrorHandler] = field(default_factory=dict)
    should_commit: Callable[[int], bool] | None = None
    before_commit: BeforeCommitCallback | None = None
    middleware: Sequence[Middleware] = ()
    setup_first: bool = False
    on_startup: Sequence[BackgroundWork] = ()
    on_shutdown: Sequence[BackgroundWork] = ()
