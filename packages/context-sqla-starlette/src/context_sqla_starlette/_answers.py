"""Errors of a commit, answered by the application's own exception handlers (P4b)."""

from context_sqla.adapters import retry_after_header
from context_sqla.errors import UnavailableError
from context_sqla_asgi import Wire, answer_unavailable
from starlette.applications import Starlette
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["answer_commit_error", "answer_outermost", "answer_unhandled", "unavailable"]

_EMPTY: Message = {"type": "http.request", "body": b"", "more_body": False}


async def answer_commit_error(error: Exception, scope: Scope, wire: Wire) -> bool:
    """Let the handlers of the application, and of the one mounted in it, answer as if the endpoint had raised the error.

    Starlette itself would not ask them: it believes that the response has started. The exceptions that the application raised
    were seen by its handlers already, and are left alone.
    """
    return await _answer(error, scope, wire, outermost=False)


async def answer_unhandled(error: Exception, scope: Scope, wire: Wire) -> bool:
    """Answer as `answer_commit_error` does, and an `UnavailableError` that has no handler with 503."""
    return await answer_commit_error(error, scope, wire) or await answer_unavailable(error, scope, wire)


async def answer_outermost(error: Exception, scope: Scope, wire: Wire) -> bool:
    """Answer as `answer_commit_error` does, for a head that middleware made by itself; without a handler with a 500."""
    return await _answer(error, scope, wire, outermost=True)


async def unavailable(request: Request, exc: Exception) -> Response:
    """Answer 503 with `Retry-After`: the default handler of `UnavailableError`."""
    headers = {"retry-after": retry_after_header(exc)} if isinstance(exc, UnavailableError) else None
    return PlainTextResponse("Service Unavailable", status_code=503, headers=headers)


async def _answer(error: Exception, scope: Scope, wire: Wire, *, outermost: bool) -> bool:
    if error is not wire.failed:
        return False

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    app: ASGIApp = fail
    # The innermost application, whose name is in the scope now, comes first, as it would for an error of the endpoint.
    for owner in dict.fromkeys((scope.get("app"), wire.app)):
        if isinstance(owner, Starlette):
            app = _guard(app, owner, whole=outermost if owner is wire.app else _has_last_resort(owner))
    try:
        await app(scope, _receive_again(wire), wire.send)
    except Exception as exc:
        if exc is not error or wire.started:
            raise
        return False
    return True


def _guard(app: ASGIApp, owner: Starlette, *, whole: bool) -> ASGIApp:
    """Put an application's exception handlers around something; `whole`: also the one that answers 500."""
    handlers = dict(owner.exception_handlers)
    last = None
    for key in [key for key in handlers if key in (500, Exception)]:
        last = handlers.pop(key)
    app = ExceptionMiddleware(app, handlers=handlers, debug=owner.debug)
    return ServerErrorMiddleware(app, handler=last, debug=owner.debug) if whole else app


def _has_last_resort(owner: Starlette) -> bool:
    return 500 in owner.exception_handlers or Exception in owner.exception_handlers


def _receive_again(wire: Wire) -> Receive:
    """Return a `receive` for the request of a handler: a body that was read already is empty, or reading it would never end."""
    spent = wire.body_read

    async def receive() -> Message:
        nonlocal spent
        if spent:
            spent = False
            return dict(_EMPTY)
        return await wire.receive()

    return receive
