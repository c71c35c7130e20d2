"""The unit of work of a Falcon application: opened around it, decided after its middleware, before its error handlers."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from context_sqla import DBConnect, run_in_new_ctx
from context_sqla.adapters import BeforeCommitCallback, check_connects, explain, retry_after_header
from context_sqla.errors import ContextSqlaError, SetupError, UnavailableError
from context_sqla_asgi import SCOPE_KEY, Rule, Wire
from context_sqla_asgi import setup as setup_asgi
from falcon import HTTPServiceUnavailable
from falcon.asgi import App, Request, Response

# A handler for one of these is the application's own answer; one for every Exception is not.
_ANSWERED = [cls for cls in UnavailableError.__mro__ if issubclass(cls, ContextSqlaError)]


def setup(
    app: "App[Any, Any]",
    *connects: DBConnect[Any],
    should_commit: Rule | None = None,
    before_commit: BeforeCommitCallback | None = None,
) -> None:
    """Give each HTTP request of the application a unit of work, and close the connects at its shutdown (P3, P4, P5, P6).

    Call it before or after middleware is added: the commit comes after all of it, and after the body is rendered. The
    application's error handlers answer errors of the commit (P4b). `UnavailableError` is answered 503 with `Retry-After` if the
    application has no handler for it.

    Args:
        app: the application, not started yet. It gets a class of its own, derived from the one that it has.
        connects: closed after the `process_shutdown` of the application's middleware.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.

    Raises:
        SetupError: the application is set up already, or has started since.
    """
    if isinstance(app, _SetUp):
        raise SetupError(
            "the application has started: call setup(app, ...) where the application is made"
            if app.started
            else "the application is set up already: call setup(app, ...) once, with all its connects"
        )
    cls = type(app)
    inner: Any = partial(cls.__call__, app)
    whole = setup_asgi(inner, *check_connects(*connects), should_commit=should_commit, before_commit=before_commit)
    # An application has slots, and Falcon offers no place around the sending of a response but the application's own call.
    space = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__, "whole": whole}
    app.__class__ = type(cls.__name__, (_SetUp, cls), space)
    app.add_middleware([])  # prepares what is there already once more


class _SetUp:
    """What the class of an application that is set up has before that of Falcon, or of the application's author."""

    __slots__ = ()

    started = False
    whole: Any
    _error_handlers: dict[type[Exception], Any]  # Falcon's

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.started:
            type(self).started = True
        await self.whole(scope, receive, send)

    def _prepare_middleware(self, middleware: list[Any], *args: Any, **options: Any) -> Any:
        return super()._prepare_middleware([_COMMIT, *middleware], *args, **options)  # type: ignore[misc]

    def _find_error_handler(self, ex: Exception) -> Any:
        explain(ex)  # the unit never sees an error that is answered here
        if isinstance(ex, UnavailableError) and not any(cls in self._error_handlers for cls in _ANSWERED):
            return _unavailable
        return super()._find_error_handler(ex)  # type: ignore[misc]

    def _schedule_callbacks(self, resp: Any) -> None:
        jobs = []
        for callback, is_async in _forget_work(resp):
            if is_async:
                jobs.append(callback)
            else:
                resp.schedule_sync(callback)
        if jobs:
            resp.schedule(partial(run_in_new_ctx, _run_all, jobs))
        super()._schedule_callbacks(resp)  # type: ignore[misc]


class _Commit:
    """The first of the middleware, whose `process_response` is the last: nothing but the sending comes after it."""

    async def process_resource(self, req: Request, _resp: Response, _resource: object, params: dict[str, Any]) -> None:
        """Put the names of the path's parameters where the unit's label looks for them."""
        req.scope["path_params"] = params

    async def process_response(self, req: Request, resp: Response, *_: object) -> None:
        """Decide about the unit; Falcon answers an error with the application's handlers, as it does for its middleware."""
        wire: Wire | None = req.scope.get(SCOPE_KEY)
        if wire is None:
            return
        try:
            # What can still fail in making the response fails before the commit.
            await resp.render_body()
            resp._asgi_headers()  # noqa: SLF001
            await wire.unit.head(resp.status_code)
        except Exception as error:
            # Falcon would go on with the stream and the background work of the answer that is given up.
            given_up, resp.stream, resp.sse = resp.stream, None, None
            _forget_work(resp)
            try:
                await _close(given_up)
            except Exception as failed:  # noqa: BLE001 - P8: the error that came before wins
                error.add_note(f"closing the stream of the answer failed as well: {failed!r}")
            raise
        wire.decides = True
        if resp.stream is not None and not hasattr(resp.stream, "read"):
            stream: Any = _Stream(resp.stream, wire)
            resp.stream = stream


_COMMIT = _Commit()


class _Stream:
    """A stream that ends when its client has left, and is closed in any case: Falcon does neither for a generator.

    Args:
        stream: the application's own.
        wire: that of the request.
    """

    __slots__ = ("_pieces",)

    def __init__(self, stream: Any, wire: Wire) -> None:
        self._pieces: AsyncGenerator[Any, None] = _until_the_client_has_left(stream, wire)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._pieces

    async def close(self) -> None:
        """Close the application's stream; Falcon calls this however the response ends."""
        await self._pieces.aclose()


async def _until_the_client_has_left(stream: Any, wire: Wire) -> AsyncGenerator[Any, None]:
    try:
        async for piece in stream:
            if await _has_left(wire):
                return
            yield piece
        await _has_left(wire)
    finally:
        await _close(stream)


async def _close(stream: Any) -> None:
    close = getattr(stream, "aclose", None) or getattr(stream, "close", None)
    if close is not None:
        await close()


async def _has_left(wire: Wire) -> bool:
    """Return whether the server has said that the client is gone; the unit is told by the wire (P5)."""
    if not wire.body_read:  # what is not read yet of the request is the application's
        return False
    try:
        async with asyncio.timeout(0):
            message = await wire.receive()
    except TimeoutError:
        return False
    return bool(message["type"] == "http.disconnect")


async def _unavailable(req: Request, resp: Response | None, ex: UnavailableError, params: dict[str, Any], **_: Any) -> None:
    """Answer 503 with `Retry-After`: the default handler of `UnavailableError`."""
    raise HTTPServiceUnavailable(retry_after=int(retry_after_header(ex)))


def _forget_work(resp: Any) -> list[tuple[Callable[[], Any], bool]]:
    """Return what a response was to start when it is sent, each with whether it is a coroutine function; it starts none of it."""
    work = resp._registered_callbacks or []  # noqa: SLF001 - Falcon shows what is scheduled to nobody
    resp._registered_callbacks = None  # noqa: SLF001
    return work


async def _run_all(jobs: Iterable[Callable[[], Awaitable[Any]]]) -> None:
    for job in jobs:
        await job()
