"""The middleware that gives each HTTP request its unit of work, in one part or in two."""

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, TypeAlias

from context_sqla import DBConnect
from context_sqla.adapters import (
    NOTHING,
    BeforeCommitCallback,
    Phase,
    Policy,
    Unit,
    check_connects,
    hidden_unit,
    retry_after_header,
)
from context_sqla.errors import UnavailableError

from ._lifespan import run_lifespan
from ._wire import SCOPE_KEY, ASGIApp, Receive, Scope, Send, Wire

Rule: TypeAlias = Callable[[int], bool]
"""Takes the status of a response and returns whether what its request wrote is committed; the default is "below 400" (P3)."""

_enter = Unit.enter  # every request comes by


def setup(
    app: ASGIApp, *connects: DBConnect[Any], should_commit: Rule | None = None, before_commit: BeforeCommitCallback | None = None
) -> ASGIApp:
    """Return the application with a unit of work for each HTTP request (P3, P4, P5).

    Args:
        app: any ASGI application; it need not support the lifespan protocol.
        connects: closed at shutdown, after the application's own shutdown.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.
    """
    whole = ASGIHTTPDBSessionMiddleware(app, before_commit, should_commit=should_commit)
    whole.lifespan = partial(run_lifespan, app, check_connects(*connects)) if connects else app
    return whole


def request_label(scope: Scope) -> str:
    """Return "METHOD /path", with the names of the path's parameters where the framework has noted them in the scope."""
    names = {str(value): f"{{{name}}}" for name, value in scope.get("path_params", {}).items()}
    return f"{scope['method']} {'/'.join(names.get(part, part) for part in str(scope['path']).split('/'))}"


async def _answer_unavailable(error: Exception, scope: Scope, wire: Wire) -> bool:
    """Answer an `UnavailableError` with 503 and `Retry-After`, and nothing else; the unit rolls back."""
    if not isinstance(error, UnavailableError):
        return False
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", retry_after_header(error).encode())]
    await wire.send({"type": "http.response.start", "status": 503, "headers": headers})
    await wire.send({"type": "http.response.body", "body": b"Service Unavailable"})
    return True


class ASGIHTTPDBSessionMiddleware:
    """Give each HTTP request of any ASGI application a unit of work (P3, P4, P5), and hide units from other scopes (P11).

    Around a framework it cannot let the framework's handlers answer an error of the commit (P4b): that error is raised to the
    server as it is. The framework's own adapter can. An `UnavailableError` that escapes before the head is answered with 503.

    Args:
        app: the application.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".
        runs_ahead: for adapters, as for `Unit.enter`.

    Attributes:
        lifespan: what runs in a lifespan scope: the application, unless an adapter puts something around it.
        answer: may answer, through the wire, an exception that escapes before any head; returns whether it did. The exception
            then counts as handled. For adapters to replace.
    """

    answer: ClassVar["staticmethod[[Exception, Scope, Wire], Awaitable[bool]]"] = staticmethod(_answer_unavailable)

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None = None,
        *,
        should_commit: Rule | None = None,
        runs_ahead: Callable[[Unit], bool] | None = None,
    ) -> None:
        self.app: ASGIApp = app
        self.lifespan: ASGIApp = app
        self._runs_ahead = runs_ahead
        self._policy = Policy(should_commit, before_commit, request_label)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or SCOPE_KEY in scope:
            await self._pass(scope, receive, send)
            return
        unit = _enter(self._policy, scope, self._runs_ahead)
        wire = scope[SCOPE_KEY] = Wire(unit, scope.get("app"), receive, send)
        error: BaseException | None = None
        try:
            try:
                await self.app(scope, wire.receive, wire.send)
            except Exception:
                if wire.failed is None:
                    raise
            if wire.failed is not None:
                raise wire.failed  # noqa: TRY301  # P4: what broke the response, whatever the application made of it
            error = wire.late
        except BaseException as exc:
            error = exc
            if wire.head is not None or not isinstance(exc, Exception) or not await self.answer(exc, scope, wire):
                raise
            error = None
        finally:
            scope.pop(SCOPE_KEY, None)  # or each request is a cycle: scope, wire, unit, scope
            error, closing = None, unit.close(error)  # and each failed one: error, traceback, this frame, error
            if closing is not NOTHING:
                await closing

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Mounted in an application of a framework that knows of no such bodies.
        if self._runs_ahead is not None and (wire := scope.get(SCOPE_KEY)) is not None:
            wire.unit.mark(scope, self._runs_ahead)
        with nullcontext() if scope["type"] == "http" else hidden_unit():
            await (self.lifespan if scope["type"] == "lifespan" else self.app)(scope, receive, send)


class CommitPoint:
    """Decide about a request's unit here, further in than the middleware that opened it (P4b).

    The inner part of an adapter: middleware between the two may buffer or copy the response, and its error handling stands
    around the commit. Where no unit was opened it does nothing.

    Args:
        app: the application.

    Attributes:
        answer: as in `ASGIHTTPDBSessionMiddleware`; the error of the commit is `wire.failed`. For adapters to replace.
    """

    answer: ClassVar["staticmethod[[Exception, Scope, Wire], Awaitable[bool]]"] = staticmethod(_answer_unavailable)

    def __init__(self, app: ASGIApp) -> None:
        self.app: ASGIApp = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outer: Wire | None = scope.get(SCOPE_KEY)
        if outer is None:
            await self.app(scope, receive, send)
            return
        outer.unit.mark(scope, outer.unit.runs_ahead)
        wire = scope[SCOPE_KEY] = Wire(outer.unit, scope.get("app"), receive, send)
        try:
            try:
                await self.app(scope, wire.receive, wire.send)
            except Exception:
                if wire.failed is None:
                    raise
            if wire.failed is not None:
                raise wire.failed  # noqa: TRY301  # as above
        except Exception as error:
            if not await self._is_answered(error, scope, wire, outer):
                raise
        finally:
            scope[SCOPE_KEY] = outer
            if wire.late is not None:
                outer.late = wire.late

    async def _is_answered(self, error: Exception, scope: Scope, wire: Wire, outer: Wire) -> bool:
        if wire.head is None and await self.answer(error, scope, wire):
            return True
        if wire.failed is not None or wire.unit.phase is Phase.STREAM:
            outer.failed = error  # P5: no middleware further out may end this body well
        elif wire.head is not None:
            wire.late = error  # P6: nor take what failed afterwards for done
        return False
