"""The middleware of Starlette's own kinds, for those who place it by hand."""

from collections.abc import Callable
from functools import partial

from context_sqla.adapters import BeforeCommitCallback, Policy, Unit
from context_sqla_asgi import SCOPE_KEY, UnitMiddleware, Watch, request_label
from starlette.applications import Starlette
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from ._answers import answer_unhandled

__all__ = [
    "StarletteHTTPDBSessionMiddleware",
    "add_starlette_http_db_session_middleware",
    "route_label",
    "starlette_http_db_session_middleware",
]


def add_starlette_http_db_session_middleware(
    app: Starlette,
    before_commit: BeforeCommitCallback | None = None,
    *,
    should_commit: Callable[[int], bool] | None = None,
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
    should_commit: Callable[[int], bool] | None = None,
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
    unit = Unit.enter(Policy(should_commit, before_commit), partial(route_label, scope))
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


def route_label(scope: Scope) -> str:
    """Return "METHOD /path", with the template of the path where the route is known."""
    route = scope.get("route")
    if not isinstance(route, Route):
        return request_label(scope)
    return f"{scope['method']} {scope.get('root_path', '')}{route.path}"


class StarletteHTTPDBSessionMiddleware(UnitMiddleware):
    """Give each HTTP request a unit of work, where the application's owner places it, in one piece (P3, P4, P5).

    The application's exception handlers answer errors of the commit (P4b). What `setup` adds: `GZipMiddleware` and
    `BaseHTTPMiddleware` may stand further in without running the body ahead of the commit; the handler of 500 sees the unit;
    it is placed right whatever is added later; the connects are closed at shutdown.

    Args:
        app: the application.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".
        label: names a request in log lines; called late.
        watch: for adapters of frameworks on top of Starlette: called with the unit of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None = None,
        *,
        should_commit: Callable[[int], bool] | None = None,
        label: Callable[[Scope], str] = route_label,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(app, Policy(should_commit, before_commit), label=label, answer=answer_unhandled, watch=watch)
