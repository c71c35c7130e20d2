"""The placing of the two parts around a Starlette application, when it builds its stack of middleware."""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakSet

from context_sqla import DBConnect
from context_sqla.adapters import BeforeCommitCallback, Policy
from context_sqla.errors import ContextSqlaError, SetupError, UnavailableError
from context_sqla_asgi import CommitPoint, UnitMiddleware, Watch, closing
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from ._answers import answer_commit_error, answer_outermost, unavailable
from ._middleware import route_label

__all__ = ["install", "setup"]

# A handler for one of these is the application's own answer; one for every Exception is not.
_ANSWERED = [cls for cls in UnavailableError.__mro__ if issubclass(cls, ContextSqlaError)]

_ready: WeakSet[Starlette] = WeakSet()


def setup(
    app: Starlette,
    *connects: DBConnect[Any],
    should_commit: Callable[[int], bool] | None = None,
    before_commit: BeforeCommitCallback | None = None,
) -> None:
    """Give each HTTP request of the application a unit of work, and close the connects at its shutdown (P3, P4, P5, P6).

    Call it before or after other middleware is added: its parts are placed when the application builds its stack, the one that
    opens the unit outside everything, the one that commits inside all middleware. The application's exception handlers answer
    errors of the commit (P4b). `UnavailableError` is answered 503 with `Retry-After` if the application has no handler for it.

    Args:
        app: the application, not started yet. One that is mounted in another is set up by itself, without connects, if its own
            middleware is to stand around its commits; it shares the unit of the request.
        connects: closed after the application's own shutdown.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.

    Raises:
        SetupError: the application has started, or is set up already.
    """
    install(app, *connects, policy=Policy(should_commit, before_commit))


def install(
    app: Starlette,
    *connects: DBConnect[Any],
    policy: Policy,
    label: Callable[[Scope], str] = route_label,
    watch: Watch | None = None,
    unavailable: Callable[[Request, Exception], Awaitable[Response]] = unavailable,
) -> None:
    """Do what `setup` does, with parts that adapters of frameworks on top of Starlette may choose.

    Args:
        app: the application, not started yet.
        connects: closed after the application's own shutdown.
        policy: when to commit.
        label: names a request in log lines; called late.
        watch: called with the unit of each request, in the task in which the application runs.
        unavailable: the default handler of `UnavailableError`.

    Raises:
        SetupError: the application has started, or is set up already.
    """
    if app.middleware_stack is not None:
        raise SetupError("the application has started: call setup(app, ...) where the application is made")
    if app in _ready:
        raise SetupError("the application is set up already: call setup(app, ...) once, with all its connects")
    _ready.add(app)
    app.router.lifespan_context = _closing_after(app.router.lifespan_context, connects)
    build = app.build_middleware_stack

    def build_middleware_stack() -> ASGIApp:
        if not any(cls in app.exception_handlers for cls in _ANSWERED):
            app.exception_handlers[UnavailableError] = unavailable
        user_middleware = app.user_middleware
        app.user_middleware = [*user_middleware, Middleware(CommitPoint, answer=answer_commit_error, watch=watch)]
        try:
            stack = build()
        finally:
            app.user_middleware = user_middleware
        return _Outermost(UnitMiddleware(stack, policy, label=label, answer=answer_outermost))

    app.build_middleware_stack = build_middleware_stack  # type: ignore[method-assign]


def _closing_after(lifespan_context: Lifespan[Any], connects: tuple[DBConnect[Any], ...]) -> Lifespan[Any]:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with closing(*connects), lifespan_context(app) as state:
            yield state

    return lifespan


class _Outermost(ServerErrorMiddleware):
    """Look like the outermost part that Starlette builds: OpenTelemetry's instrumentation insists on it, and keeps its `app`."""

    def __init__(self, app: UnitMiddleware) -> None:
        super().__init__(app)
        self._call = app.__call__

    # Not async: the other's coroutine is all that is needed, in every request.
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._call(scope, receive, send)
