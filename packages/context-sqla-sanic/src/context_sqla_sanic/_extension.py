"""The unit of work of a Sanic request: opened when its route is known, decided where it responds, ended with its handling.

Sanic sends a signal only where somebody listens, and sending one costs more than a unit that nobody uses. So requests and the
application are of classes that override what Sanic calls anyway.
"""

import re
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from functools import partial
from inspect import isawaitable
from typing import Any, ClassVar, TypeAlias

from context_sqla import DBConnect, adapters
from context_sqla.adapters import NOTHING, BeforeCommitCallback, Phase, Policy, Unit, hidden_unit
from context_sqla.errors import ContextSqlaError, ForeignLoopError, SetupError, UnavailableError
from sanic import Request, Sanic
from sanic.http import Stage
from sanic.response import BaseHTTPResponse, HTTPResponse, ResponseStream, text

from ._body import Body

Rule: TypeAlias = Callable[[int], bool]
"""Takes the status of a response and returns whether what its request wrote is committed; the default is "below 400" (P3)."""

# A handler for one of these is the application's own answer; one for every Exception is not.
_ANSWERED = [cls for cls in UnavailableError.__mro__ if issubclass(cls, ContextSqlaError)]
_PARAMETER, _BRACED = re.compile("<([^:>]+)[^>]*>"), r"{\1}"  # as other frameworks write it
_FIRST, _LAST = 1_000_000, -1_000_000
_RESPONSES = (BaseHTTPResponse, ResponseStream)
# Of the class that `setup` makes: its two bases cannot both have some of their own.
_SLOTS = ("_again", "_answers", "_hidden", "unit")


def setup(
    app: "Sanic[Any, Any]",
    *connects: DBConnect[Any],
    should_commit: Rule | None = None,
    before_commit: BeforeCommitCallback | None = None,
) -> None:
    """Give each HTTP request of the application a unit of work, and close the connects when its server has stopped (P3, P4, P5).

    The application's exception handlers answer errors of the commit (P4b). `UnavailableError` is answered 503 with
    `Retry-After` if the application has no handler for it.

    Args:
        app: the application, not started yet.
        connects: closed in each worker, after the application's own `after_server_stop` listeners.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.

    Raises:
        SetupError: the application has started, or is set up already.
        TypeError: one of the connects is no `DBConnect`.
    """
    adapters.check_connects(*connects)
    base: Any = app.request_class or Request
    if app.state.is_started:
        raise SetupError("the application has started: call setup(app, ...) where the application is made")
    if issubclass(base, UnitRequest):
        raise SetupError("the application is set up already: call setup(app, ...) once, with all its connects")
    kind: Any = type(app)
    space: dict[str, Any] = {"__slots__": _SLOTS, "__doc__": UnitRequest.__doc__}
    space |= {"policy": Policy(should_commit, before_commit, _label)}
    space |= {"put_route": base.route.__set__, "route": property(base.route.__get__, UnitRequest.begin)}
    app.request_class = type("UnitRequest", (UnitRequest, base), space)
    # The class that serves is sent to the workers: it is one that they can import.
    space = {"__slots__": (), "__doc__": kind.__doc__, "serve": kind.serve}
    app.__class__ = type(kind)(kind.__name__, (UnitSanic, kind), space)
    hidden = ExitStack()
    app.listener("before_server_start", priority=_FIRST)(partial(_hide, hidden))
    app.listener("before_server_start")(_answer_unavailable)
    app.listener("after_server_start", priority=_LAST)(partial(_show, hidden))
    app.listener("after_server_stop", priority=_FIRST)(partial(_close, connects))


class UnitRequest(Request[Any, Any]):
    """A request with a unit of work, which decides where the request responds: each head passes here."""

    policy: ClassVar[Policy]
    put_route: ClassVar[Callable[[Request[Any, Any], Any], None]]
    unit: Unit | None
    _answers: BaseException | None  # the exception that is being answered
    _again: bool  # the commit behind the answer to an exception has failed
    _hidden: ExitStack | None

    def begin(self, route: Any) -> None:
        """Take the route, and begin what it wants: a unit, or none for a websocket (P11)."""
        type(self).put_route(self, route)
        if route is None:  # in the constructor
            self.unit = self._hidden = self._answers = None
            self._again = False
        elif hasattr(route.handler, "is_websocket"):
            self._hidden = ExitStack()
            self._hidden.enter_context(hidden_unit())
        else:
            self.unit = Unit.enter(self.policy, self)

    async def settle(self, handling: Coroutine[Any, Any, None]) -> None:
        """End the unit with the handling of the request, or of an exception."""
        try:
            await handling
        except BaseException as error:
            if self.unit is not None:
                await self.unit.close(error)
            raise
        finally:
            if self._hidden is not None:
                self._hidden.close()
        if self.unit is not None and (step := self.unit.close()) is not NOTHING:
            try:
                await step
            except Exception as error:  # noqa: BLE001  # of what came after the last byte, which Sanic would not report
                await self.app.handle_exception(self, error, run_middleware=False)

    async def respond(self, response: BaseHTTPResponse | None = None, **kwargs: Any) -> Any:
        """Respond, after Sanic's own middleware, and decide about the unit by the status (P3, P4).

        Raises:
            Exception: that of the commit, for the application's exception handlers (P4b).
        """
        final: Any = await super().respond(response, **kwargs)
        if (unit := self.unit) is None or not isinstance(final, _RESPONSES):
            return final
        try:
            if (step := unit.head(final.status)) is not NOTHING:
                await step
        except Exception as error:
            self._response_middleware_started = False  # P4b: it runs for the answer to this error too
            if self._answers is None:
                raise
            # The answer of an exception handler, which Sanic would send in spite of the error.
            return await self.respond(await self._answer(error))
        except BaseException:
            if self._answers is not None and response is not None:
                response.status = 500  # the same
            raise
        if not isinstance(final, ResponseStream) and final.stream is not None:
            body: Any = Body(final.stream, final, self, unit)
            final.stream = body
        return final

    async def fail(self, error: BaseException) -> None:
        """Prepare for the answer to an exception, or break off a body that has begun."""
        if self._hidden is not None:
            self._hidden.close()
        adapters.explain(error)
        self._answers = error
        unit, stream = self.unit, self.stream
        answers = stream is not None and stream.stage is Stage.HANDLER
        if unit is not None and unit.phase is not Phase.HANDLER:
            if unit.phase is Phase.STREAM and stream is not None and not answers and stream.response is not None:
                stream.response.stream = None  # P5: Sanic would end the body well
            self.unit = None
            await unit.close(error)
        if self.unit is None and answers and not isinstance(error, ForeignLoopError):  # which would only be raised again
            self.unit = Unit.enter(self.policy, self)

    async def _answer(self, error: Exception) -> Any:
        """Return the answer to the commit error of an answer: the application's (P4b), and then one that decides nothing."""
        self.reset_response()
        if not self._again:
            self._again, self._answers = True, error
            try:
                answer = self.app.error_handler.response(self, error)
                return await answer if isawaitable(answer) else answer
            except Exception as failed:  # noqa: BLE001  # Sanic would send the answer whose commit has failed
                error.add_note(f"its exception handler failed as well: {type(failed).__name__}: {failed}")
        if self.unit is not None:
            await self.unit.close(error)
        self.unit = None
        return self.app.error_handler.default(self, error)


class UnitSanic(Sanic[Any, Any]):
    """An application that ends the unit of each request where its handling ends."""

    async def handle_request(self, request: Any) -> None:
        """Handle a request, in a unit from where its route is known."""
        await request.settle(super().handle_request(request))

    async def handle_exception(self, request: Any, exception: BaseException, run_middleware: bool = True) -> None:
        """Answer an exception, in the unit of its request or in one of its own."""
        await request.fail(exception)
        await request.settle(super().handle_exception(request, exception, run_middleware))


def _label(request: Request[Any, Any]) -> str:
    return f"{request.method} {_PARAMETER.sub(_BRACED, request.uri_template or request.path)}"


async def _hide(hidden: ExitStack, app: "Sanic[Any, Any]") -> None:
    """Hide the unit in which the server was started from what runs at its start (P11)."""
    hidden.enter_context(hidden_unit())


async def _show(hidden: ExitStack, app: "Sanic[Any, Any]") -> None:
    with suppress(ValueError):  # a task of its own, which has nothing to show
        hidden.close()


async def _answer_unavailable(app: "Sanic[Any, Any]") -> None:
    if not any((cls, None) in app.error_handler.cached_handlers for cls in _ANSWERED):
        app.error_handler.add(UnavailableError, _unavailable)


async def _unavailable(request: Request[Any, Any], exc: UnavailableError) -> HTTPResponse:
    """Answer 503 with `Retry-After`: the default handler of `UnavailableError`."""
    return text("Service Unavailable", 503, {"retry-after": adapters.retry_after_header(exc)})


async def _close(connects: tuple[DBConnect[Any], ...], app: "Sanic[Any, Any]") -> None:
    await adapters.close_connects(*connects)
