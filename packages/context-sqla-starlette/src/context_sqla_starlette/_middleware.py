"""The unit of work of a Starlette application, in one part or in two, and its errors before the application's own handlers."""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

from context_sqla import DBConnect
from context_sqla.adapters import BeforeCommitCallback, Policy, Unit, check_connects, retry_after_header
from context_sqla.errors import ContextSqlaError, SetupError, UnavailableError
from context_sqla_asgi import SCOPE_KEY, ASGIHTTPDBSessionMiddleware, CommitPoint, Rule, Wire, closing, request_label
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.base import RequestResponseEndpoint
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

# A handler for one of these is the application's own answer; one for every Exception is not.
_ANSWERED = [cls for cls in UnavailableError.__mro__ if issubclass(cls, ContextSqlaError)]

_LIMIT = "starlette.max_body_size"  # in the scope, inside of what holds the limit

_ready: WeakSet[Starlette] = WeakSet()


def setup(
    app: Starlette,
    *connects: DBConnect[Any],
    should_commit: Rule | None = None,
    before_commit: BeforeCommitCallback | None = None,
) -> None:
    """Give each HTTP request of the application a unit of work, and close the connects at its shutdown (P3, P4, P5, P6).

    Call it before or after middleware and handlers are added: its parts are placed when the application builds its stack, the
    one that opens the unit outside all of them, the one that commits inside all middleware. The application's exception handlers
    answer errors of the commit (P4b). `UnavailableError` is answered 503 with `Retry-After` if the application has no handler
    for it.

    Args:
        app: the application, not started yet. One that is mounted in another is set up by itself, without connects, if its own
            middleware is to stand around its commits; it shares the unit of the request.
        connects: closed after the application's own shutdown.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.

    Raises:
        SetupError: the application has started, or is set up already.
        TypeError: one of the connects is no `DBConnect`.
    """
    install(app, *connects, outer=partial(OuterPart, before_commit=before_commit, should_commit=should_commit))


def add_starlette_http_db_session_middleware(
    app: Starlette, before_commit: BeforeCommitCallback | None = None, *, should_commit: Rule | None = None
) -> None:
    """Add `StarletteHTTPDBSessionMiddleware` as the outermost middleware so far; `setup` keeps more of the contract.

    Args:
        app: the application, not started yet.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".
    """
    app.add_middleware(StarletteHTTPDBSessionMiddleware, before_commit=before_commit, should_commit=should_commit)


async def starlette_http_db_session_middleware(
    request: Request,
    call_next: RequestResponseEndpoint,
    before_commit: BeforeCommitCallback | None = None,
    *,
    should_commit: Rule | None = None,
) -> Response:
    """Commit or roll back between the endpoint and the head of its response, as a function for `BaseHTTPMiddleware`.

    It keeps P1 to P4, P7 to P9 and P14. The unit ends before the head leaves, so these need `setup`:

    * P4b: an error of the commit is answered with the application's 500, not by its handler for that error;
    * P5: a body generator that asks for a session gets `ContextClosedError`, or `SessionBusyError` if it is faster than the
      commit: give it `async with db_context():`;
    * P6: so does a background task; start it with `run_in_new_ctx`;
    * P11: websockets see the unit, if any, in which the server was started.

    Args:
        request: the request.
        call_next: runs the rest of the application.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".

    Raises:
        Exception: that of the commit, or the application's own.
    """
    scope = request.scope
    if SCOPE_KEY in scope:
        return await call_next(request)
    scope[SCOPE_KEY] = None  # a unit, and no wire
    unit = Unit.enter(Policy(should_commit, before_commit, request_label), scope)
    error: BaseException | None = None
    try:
        response = await call_next(request)
        await unit.head(response.status_code)
        await unit.end_of_body()
    except BaseException as exc:
        error = exc
        raise
    finally:
        await unit.close(error)
    return response


async def _unavailable(request: Request, exc: Exception) -> Response:
    """Answer 503 with `Retry-After`: the default handler of `UnavailableError`."""
    headers = {"retry-after": retry_after_header(exc)} if isinstance(exc, UnavailableError) else None
    return PlainTextResponse("Service Unavailable", status_code=503, headers=headers)


async def _answer_commit_error(error: Exception, scope: Scope, wire: Wire, *, outermost: bool = False) -> bool:
    """Let the handlers of the application, and of the one mounted in it, answer as if the endpoint had raised the error.

    Starlette itself would not ask them: it believes that the response has started. The exceptions that the application raised
    were seen by its handlers already, and are left alone.
    """
    if error is not wire.failed:
        return False

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    # A body that the endpoint has read is empty for a handler that reads it again: to wait for more of it would never end.
    again: list[Message] = [{"type": "http.request", "body": b""}] if wire.body_read else []

    async def receive() -> Message:
        return again.pop() if again else await wire.receive()

    app: ASGIApp = fail
    # The innermost application, whose name is in the scope now, comes first, as it would for an error of the endpoint.
    for owner in dict.fromkeys((scope.get("app"), wire.app)):
        if isinstance(owner, Starlette):
            app = _guard(app, owner, last_too=outermost if owner is wire.app else None)
    try:
        await app(scope, receive, wire.send)
    except Exception as exc:
        if exc is not error or wire.head is not None:
            raise
        return False
    return True


def _guard(app: ASGIApp, owner: Starlette, *, last_too: bool | None) -> ASGIApp:
    """Put an application's exception handlers around something; also that of 500 (None: if it has one of its own)."""
    handlers = dict(owner.exception_handlers)
    by_class, by_status = handlers.pop(Exception, None), handlers.pop(500, None)
    last = by_class or by_status
    app = ExceptionMiddleware(app, handlers=handlers, debug=owner.debug)
    if last_too or (last_too is None and last is not None):
        return ServerErrorMiddleware(app, handler=last, debug=owner.debug)
    return app


async def _answer_outermost(error: Exception, scope: Scope, wire: Wire) -> bool:
    """Let the handlers answer an error of the commit of a head that middleware made by itself; without one, a 500 does."""
    return await _answer_commit_error(error, scope, wire, outermost=True)


async def _answer_unhandled(error: Exception, scope: Scope, wire: Wire) -> bool:
    """Let the handlers answer an error of the commit; an `UnavailableError` that has none is answered with 503."""
    return await _answer_commit_error(error, scope, wire) or await ASGIHTTPDBSessionMiddleware.answer(error, scope, wire)


class StarletteHTTPDBSessionMiddleware(ASGIHTTPDBSessionMiddleware):
    """Give each HTTP request a unit of work, where the application's owner places it, in one piece (P3, P4, P5).

    The application's exception handlers answer errors of the commit (P4b). What `setup` adds: `GZipMiddleware` and
    `BaseHTTPMiddleware` may stand further in without running the body ahead of the commit; the handler of 500 sees the unit;
    it is placed right whatever is added later; the connects are closed at shutdown.

    Args:
        app: the application.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".
        runs_ahead: for adapters, as for `Unit.enter`.
    """

    answer: "ClassVar[staticmethod[[Exception, Scope, Wire], Awaitable[bool]]]" = staticmethod(_answer_unhandled)


class OuterPart(ASGIHTTPDBSessionMiddleware):
    """Open the unit, and decide about the heads that no `InnerPart` has seen.

    It stands outside everything that Starlette builds or, where one part is enough, in the place of the inner one: an error of
    the commit must not pass by Starlette's own handling of errors, which would ask the handlers first, and in vain.
    """

    answer: "ClassVar[staticmethod[[Exception, Scope, Wire], Awaitable[bool]]]" = staticmethod(_answer_outermost)


class InnerPart(CommitPoint):
    """Decide about the unit inside all middleware; the application's handlers answer errors of the commit.

    Of a request that is too large Starlette itself, further out, makes a 413 whatever is answered: the outer part sees that (P3).
    """

    answer: "ClassVar[staticmethod[[Exception, Scope, Wire], Awaitable[bool]]]" = staticmethod(_answer_commit_error)

    # Not async: the other's coroutine is all that is needed, in every request.
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        app: Any = self.app if _LIMIT in scope and _is_too_large(scope) else super().__call__
        passing: Coroutine[Any, Any, None] = app(scope, receive, send)
        return passing


def _is_too_large(scope: Scope) -> bool:
    length = Headers(scope=scope).get("content-length", "")
    return length.isdigit() and int(length) > scope[_LIMIT]


def install(
    app: Starlette,
    *connects: DBConnect[Any],
    outer: Callable[[ASGIApp], OuterPart],
    unavailable: Callable[[Request, Exception], Awaitable[Response]] = _unavailable,
) -> None:
    """Do what `setup` does, with parts that adapters of frameworks on top of Starlette may choose.

    Args:
        app: the application, not started yet.
        connects: closed after the application's own shutdown.
        outer: makes the part that opens the unit.
        unavailable: the default handler of `UnavailableError`.

    Raises:
        SetupError: the application has started, or is set up already.
        TypeError: one of the connects is no `DBConnect`.
    """
    check_connects(*connects)
    if app.middleware_stack is not None:
        raise SetupError("the application has started: call setup(app, ...) where the application is made")
    if app in _ready:
        raise SetupError("the application is set up already: call setup(app, ...) once, with all its connects")
    app.router.lifespan_context = _closing_after(app.router.lifespan_context, connects)
    _ready.add(app)
    build = app.build_middleware_stack

    def build_middleware_stack() -> ASGIApp:
        if not any(cls in app.exception_handlers for cls in _ANSWERED):
            app.exception_handlers[UnavailableError] = unavailable
        # One is enough where nothing stands around it that could ask for a session, or make another answer of one.
        alone = not app.user_middleware and app.exception_handlers.keys().isdisjoint((500, Exception))
        alone = alone and getattr(app, "max_body_size", None) is None
        app.user_middleware.append(Middleware(outer if alone else InnerPart))
        try:
            stack = build()
        finally:
            app.user_middleware.pop()
        return stack if alone else _Outermost(outer(stack))

    app.build_middleware_stack = build_middleware_stack  # type: ignore[method-assign]


def _closing_after(lifespan_context: Lifespan[Any], connects: tuple[DBConnect[Any], ...]) -> Lifespan[Any]:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with closing(*connects), lifespan_context(app) as state:
            yield state

    return lifespan


class _Outermost(ServerErrorMiddleware):
    """Look like the outermost part that Starlette builds: OpenTelemetry's instrumentation insists on it, and keeps its `app`."""

    def __init__(self, app: OuterPart) -> None:
        super().__init__(app)
        self._call = app.__call__

    # Not async: the other's coroutine is all that is needed, in every request.
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._call(scope, receive, send)
