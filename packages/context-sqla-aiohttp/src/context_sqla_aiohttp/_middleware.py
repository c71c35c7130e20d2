"""The unit of work of an aiohttp application: a middleware that opens it, and points in the chain where it is decided."""

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

from aiohttp import web
from aiohttp.typedefs import Handler
from context_sqla import DBConnect
from context_sqla.adapters import BeforeCommitCallback, Policy, check_connects, close_connects, retry_after_header
from context_sqla.errors import SetupError, UnavailableError

from ._wire import Wire, request_label, wire_of

Rule: TypeAlias = Callable[[int], bool]

_READY = "_context_sqla_ready"


def setup(
    app: web.Application,
    *connects: DBConnect[Any],
    should_commit: Rule | None = None,
    before_commit: BeforeCommitCallback | None = None,
) -> None:
    """Give each HTTP request of the application a unit of work, and close the connects at its cleanup (P3, P4, P5).

    Call it before or after other middleware is added: its parts are placed when the application is frozen, one that opens the
    unit outside everything, and points of decision inside each middleware, so that error middleware answers errors of the
    commit (P4b). An `UnavailableError` that no middleware answers is a 503 with `Retry-After`.

    Args:
        app: the application, not started yet. One that is added to another with `add_subapp` is set up by itself, before that
            and without connects, if its own middleware is to stand around its commits; it shares the unit of the request.
        connects: closed after the application's own cleanup.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.

    Raises:
        SetupError: the application has started, was added to another, or is set up already.
        TypeError: one of the connects is no `DBConnect`.
    """
    check_connects(*connects)
    if app.pre_frozen or app.on_startup.frozen:
        raise SetupError("the application has started, or was added to another: call setup(app, ...) where it is made")
    if _READY in vars(app):
        raise SetupError("the application is set up already: call setup(app, ...) once, with all its connects")
    pre_freeze = app.pre_freeze

    def place() -> None:
        if not app.pre_frozen:
            outermost = DBSessionMiddleware(should_commit=should_commit, before_commit=before_commit)
            app.middlewares[:] = [outermost.__call__, *(part for one in app.middlewares for part in (one, _point))]
            app.on_cleanup.append(lambda _: close_connects(*connects))
        pre_freeze()

    async def closing(_: web.Application) -> AsyncIterator[None]:
        yield
        await close_connects(*connects)

    # The first context is the last to end, whatever fails before; handlers of on_cleanup may use the connects after that.
    app.cleanup_ctx.insert(0, closing)
    vars(app).update({_READY: True, "pre_freeze": place})  # not by assignment: aiohttp warns of that in development mode


class DBSessionMiddleware:
    """Give each request a unit of work, where the application's owner places it among its middlewares (P3, P4, P5).

    Middleware further out answers errors of the commit (P4b), and has no unit. What `setup` adds: it is placed right whatever
    is added later, all other middleware has the unit, and the connects are closed at cleanup.

    Args:
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.
    """

    __middleware_version__: int = 1  # what aiohttp's decorator sets

    def __init__(self, *, should_commit: Rule | None = None, before_commit: BeforeCommitCallback | None = None) -> None:
        self._policy = Policy(should_commit, before_commit, request_label)

    @web.middleware
    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Run the rest of the application in the request's unit of work.

        Raises:
            Exception: that of the commit, or the application's own.
        """
        writer: Any = request.writer
        if type(getattr(writer.write_headers, "__self__", None)) is Wire:
            return await _point(request, handler)
        wire = Wire(self._policy, request, writer)
        try:
            try:  # as `_point` does: a request that uses no session shall not pay for another coroutine (P1)
                response = await handler(request)
            except Exception as error:
                await wire.raised(error)
                raise
            if not wire.dismiss(response):
                await wire.returned(response)
        except BaseException as error:
            answer = await _leave(wire, error)
            if answer is None:
                raise
            return answer
        return response


db_session_middleware: DBSessionMiddleware = DBSessionMiddleware()
"""The middleware without options, for `app.middlewares.append(db_session_middleware)`."""


@web.middleware
async def _point(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Decide here, inside the middleware that was added before."""
    wire = wire_of(request)
    if wire is None:
        return await handler(request)
    try:
        response = await handler(request)
    except Exception as error:
        await wire.raised(error)
        raise
    await wire.decide(response)
    return response


async def _leave(wire: Wire, error: BaseException) -> web.Response | None:
    """End the unit of a request that ends with an error, or answer that."""
    answer = None
    if isinstance(error, UnavailableError) and not wire.sent:
        answer = web.Response(status=503, text="Service Unavailable", headers={"Retry-After": retry_after_header(error)})
    wire.leave(answer or error)
    if answer is not None:
        await wire.unit.head(503)
    elif wire.sent or not isinstance(error, web.HTTPException):  # or else it is a response, decided about already
        await wire.unit.close(error)
    return answer
