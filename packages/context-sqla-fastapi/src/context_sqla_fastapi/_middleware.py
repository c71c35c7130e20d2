"""FastAPI's unit of work: Starlette's, and streams of events whose generator starts before their head."""

import inspect
from functools import lru_cache, partial
from typing import Any

from context_sqla import DBConnect
from context_sqla.adapters import BeforeCommitCallback, Unit, retry_after_header
from context_sqla.errors import UnavailableError
from context_sqla_starlette import (
    OuterPart,
    Rule,
    StarletteHTTPDBSessionMiddleware,
    install,
    starlette_http_db_session_middleware,
)
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.base import RequestResponseEndpoint
from starlette.types import ASGIApp


def setup(
    app: FastAPI, *connects: DBConnect[Any], should_commit: Rule | None = None, before_commit: BeforeCommitCallback | None = None
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
    outer = partial(OuterPart, before_commit=before_commit, should_commit=should_commit, runs_ahead=_runs_ahead)
    install(app, *connects, outer=outer, unavailable=_unavailable)


def add_fastapi_http_db_session_middleware(
    app: FastAPI, before_commit: BeforeCommitCallback | None = None, *, should_commit: Rule | None = None
) -> None:
    """Add `FastAPIHTTPDBSessionMiddleware` as the outermost middleware so far; `setup` keeps more of the contract.

    Args:
        app: the application, not started yet.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".
    """
    app.add_middleware(FastAPIHTTPDBSessionMiddleware, before_commit=before_commit, should_commit=should_commit)


async def fastapi_http_db_session_middleware(
    request: Request,
    call_next: RequestResponseEndpoint,
    before_commit: BeforeCommitCallback | None = None,
    *,
    should_commit: Rule | None = None,
) -> Response:
    """Commit or roll back between the endpoint and the head of its response, as a function for `app.middleware("http")`.

    What it keeps of the contract, and what needs `setup`, is told at `starlette_http_db_session_middleware`.

    Args:
        request: the request.
        call_next: runs the rest of the application.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".

    Raises:
        Exception: that of the commit, or the application's own.
    """
    return await starlette_http_db_session_middleware(request, call_next, before_commit, should_commit=should_commit)


def _runs_ahead(unit: Unit) -> bool:
    """Return whether the generator of an event stream asks: FastAPI starts it beside the request, before the head (P5)."""
    endpoint = unit.request.get("endpoint")
    try:
        is_generator = _is_generator(endpoint)
    except TypeError:  # an object that cannot be hashed
        is_generator = _is_generator.__wrapped__(endpoint)
    if is_generator:
        return not unit.is_at_mark()
    # The endpoint of the route itself, which that of a mount is not: no other one will follow, and nobody needs to ask again.
    if endpoint is not None and getattr(unit.request.get("route"), "endpoint", None) is endpoint:
        unit.runs_ahead = None
    return False


@lru_cache(maxsize=1024)
def _is_generator(endpoint: Any) -> bool:
    if endpoint is None:
        return False
    while isinstance(endpoint, partial):
        endpoint = endpoint.func
    calls = (endpoint, inspect.unwrap(endpoint), getattr(endpoint, "__call__", None))  # noqa: B004
    return any(inspect.isasyncgenfunction(call) or inspect.isgeneratorfunction(call) for call in calls)


class FastAPIHTTPDBSessionMiddleware(StarletteHTTPDBSessionMiddleware):
    """Give each HTTP request a unit of work, where the application's owner places it, in one piece (P3, P4, P5).

    What `setup` adds is told at `StarletteHTTPDBSessionMiddleware`.

    Args:
        app: the application.
        before_commit: awaited before each session's commit; refuses it by raising.
        should_commit: takes the status; replaces the rule "below 400 commits".
    """

    def __init__(
        self, app: ASGIApp, before_commit: BeforeCommitCallback | None = None, *, should_commit: Rule | None = None
    ) -> None:
        super().__init__(app, before_commit, should_commit=should_commit, runs_ahead=_runs_ahead)


async def _unavailable(request: Request, exc: Exception) -> Response:
    headers = {"retry-after": retry_after_header(exc)} if isinstance(exc, UnavailableError) else None
    return JSONResponse({"detail": "Service Unavailable"}, status_code=503, headers=headers)
