"""The middleware that gives each HTTP request its unit of work."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from context_sqla import DBConnect
from context_sqla.adapters import BeforeCommitCallback, Phase, Policy, Unit, hidden_unit, retry_after_header
from context_sqla.errors import UnavailableError

from ._lifespan import run_lifespan
from ._types import ASGIApp, Receive, Scope, Send
from ._wire import SCOPE_KEY, Wire, wire_of

__all__ = [
    "ASGIHTTPDBSessionMiddleware",
    "Answer",
    "CommitPoint",
    "UnitMiddleware",
    "Watch",
    "answer_unavailable",
    "request_label",
    "setup",
]

Answer: TypeAlias = Callable[[Exception, Scope, Wire], Awaitable[bool]]
"""An async function that may answer, through the wire, an exception that came before any head; returns whether it did."""

Watch: TypeAlias = Callable[[Unit, Scope], None]
"""A function that is called with the unit of each request before the application runs, in the task in which it runs."""


def setup(
    app: ASGIApp,
    *connects: DBConnect[Any],
    should_commit: Callable[[int], bool] | None = None,
    before_commit: BeforeCommitCallback | None = None,
) -> ASGIApp:
    """Return the application with a unit of work for each HTTP request (P3, P4, P5).

    An application that lets `UnavailableError` escape before its head answers 503 with `Retry-After`.

    Args:
        app: any ASGI application; it need not support the lifespan protocol.
        connects: closed at shutdown, after the application's own shutdown.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.
    """
    return UnitMiddleware(app, Policy(should_commit, before_commit), connects=connects)


async def answer_unavailable(error: Exception, scope: Scope, wire: Wire) -> bool:
    """Answer an `UnavailableError` with 503 and `Retry-After`; the unit rolls back."""
    if not isinstance(error, UnavailableError):
        return False
    body = b"Service Unavailable"
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", retry_after_header(error).encode()),
    ]
    await wire.send({"type": "http.response.start", "status": 503, "headers": headers})
    await wire.send({"type": "http.response.body", "body": body})
    return True


def request_label(scope: Scope) -> str:
    """Return "METHOD /path"."""
    return f"{scope['method']} {scope['path']}"


class UnitMiddleware:
    """Give each HTTP request a unit of work, and hide every unit from the other scopes (P11, P12).

    The outer part of an adapter: errors of a commit are raised out of `send`, where it stands. A `CommitPoint` further in
    raises them there.

    Args:
        app: the application.
        policy: when to commit.
        connects: closed at the end of the lifespan.
        label: names a request in log lines; called late.
        answer: may answer an exception that escapes before a head was sent; it then counts as handled.
        watch: called with the unit of each request, for example to set its `runs_ahead`.
    """

    def __init__(
        self,
        app: ASGIApp,
        policy: Policy,
        *,
        connects: tuple[DBConnect[Any], ...] = (),
        label: Callable[[Scope], str] = request_label,
        answer: Answer = answer_unavailable,
        watch: Watch | None = None,
    ) -> None:
        self.app: ASGIApp = app
        self._policy = policy
        self._connects = connects
        self._label = label
        self._answer = answer
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or SCOPE_KEY in scope:
            await self._pass(scope, receive, send)
            return
        unit = Unit.enter(self._policy, partial(self._label, scope))
        wire = scope[SCOPE_KEY] = Wire(unit, scope.get("app"), receive, send)
        error: BaseException | None = None
        try:
            if self._watch is not None:
                self._watch(unit, scope)
            try:
                await self.app(scope, wire.receive, wire.send)
            except Exception:
                if wire.failed is None:
                    raise
            if wire.failed is not None:
                raise wire.failed  # noqa: TRY301 - whatever the application made of it on its way (P4)
            error = wire.late
        except BaseException as exc:
            error = exc
            if wire.started or not isinstance(exc, Exception) or not await self._answer(exc, scope, wire):
                raise
            error = None
        finally:
            scope.pop(SCOPE_KEY, None)  # or each request is a cycle: scope, wire, unit, label, scope
            await unit.close(error)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.app(scope, receive, send)
            return
        with hidden_unit():
            if scope["type"] == "lifespan" and self._connects:
                await run_lifespan(self.app, self._connects, scope, receive, send)
            else:
                await self.app(scope, receive, send)


class ASGIHTTPDBSessionMiddleware(UnitMiddleware):
    """Give each HTTP request of any ASGI application a unit of work (P3, P4, P5).

    Around a framework it cannot let the framework's handlers answer an error of the commit (P4b): that error is raised to the
    server as it is. The framework's own adapter can.

    Args:
        app: the application.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".
    """

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None = None,
        *,
        should_commit: Callable[[int], bool] | None = None,
    ) -> None:
        super().__init__(app, Policy(should_commit, before_commit))


class CommitPoint:
    """Decide about a request's unit here, further in than the `UnitMiddleware` that opened it (P4b).

    The inner part of an adapter: middleware between the two may buffer or copy the response, and its error handling stands
    around the commit. Where no unit was opened it does nothing.

    Args:
        app: the application.
        answer: may answer an exception that escapes before a head was sent, in particular the commit's (`wire.failed`).
        watch: called with the unit of each request, for example to set its `runs_ahead`.
    """

    def __init__(self, app: ASGIApp, *, answer: Answer, watch: Watch | None = None) -> None:
        self.app: ASGIApp = app
        self._answer = answer
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outer = wire_of(scope)
        if outer is None:
            await self.app(scope, receive, send)
            return
        if self._watch is not None:
            self._watch(outer.unit, scope)
        wire = Wire(outer.unit, scope.get("app"), receive, send)
        try:
            try:
                await self.app(scope, wire.receive, wire.send)
            except Exception:
                if wire.failed is None:
                    raise
            if wire.failed is not None:
                raise wire.failed  # noqa: TRY301 - whatever the application made of it on its way (P4)
        except Exception as error:
            if not await self._is_answered(error, scope, wire, outer):
                raise

    async def _is_answered(self, error: Exception, scope: Scope, wire: Wire, outer: Wire) -> bool:
        if not wire.started:
            return await self._answer(error, scope, wire)
        if wire.failed is not None or wire.unit.phase is Phase.STREAM:
            outer.failed = error  # P5: no middleware further out may end this body well
        else:
            outer.late = error  # P6: nor take what failed afterwards for done
        return False
