"""What one request writes to its client, and the unit of work that this drives."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from aiohttp import web
from context_sqla.adapters import NOTHING, Phase, Policy, Unit, hidden_unit
from context_sqla.errors import ContextSqlaError

# Members of an enumeration are slow to reach on Python 3.11.
_STREAM, _BACKGROUND, _CLOSED = Phase.STREAM, Phase.BACKGROUND, Phase.CLOSED
_REPLACED = ("write_headers", "write", "write_eof")
_delete = object.__delattr__  # `del` would take a mocked writer its own methods as well
_BYTES = frozenset({bytes, bytearray, type(None)})


class Wire:
    """Drive a unit of work by what goes through the request's writer: decide before the head, finish before the last byte.

    aiohttp writes each response through the methods of one writer, whether a handler prepares it or the server does after all
    middleware. The one for heads is replaced, in this one object, while middleware runs, and the others from the first head
    on; where something of the application is still to run after all middleware, they stay until the request's task ends.

    Args:
        policy: of the unit.
        request: the request.
        writer: of the request.

    Attributes:
        unit: the request's unit of work.
        sent: the head was sent.
    """

    __slots__ = ("_failed", "_hidden", "_own", "_request", "_writer", "sent", "unit")

    def __init__(self, policy: Policy, request: web.Request, writer: Any) -> None:
        self.sent: bool = False
        self._failed: Exception | None = None  # what broke the response: until another head may be sent, nothing is (P4, P5)
        self._hidden: AbstractContextManager[None] | None = None
        self._own: tuple[Callable[..., Awaitable[None]], ...] = ()  # the writer's methods, once all are replaced
        self._request: web.Request = request
        self._writer: Any = writer
        self.unit: Unit = Unit.enter(policy, request)
        writer.write_headers = self.write_headers

    # What the application returns and raises

    async def raised(self, error: Exception) -> None:
        """Take note of an exception that the application raised: a body that is not finished must not end well (P5).

        Raises:
            Exception: that of the commit, if the exception is a response: a redirect commits.
        """
        if self.sent:
            self._failed = error
            return
        self._reset()
        if isinstance(error, web.HTTPException):
            await self.unit.head(error.status)

    def decide(self, response: web.StreamResponse) -> Awaitable[None]:
        """Decide by a response that was returned; one that its handler prepared was decided about there.

        Raises:
            Exception: that of the commit, when awaited; or at once what broke the response, whoever has swallowed it.
        """
        prepared = getattr(response, "prepared", False)
        if self._failed is not None and (self.sent or prepared):
            raise self._failed
        return NOTHING if prepared else self.unit.head(getattr(response, "status", 500))  # what is no response becomes a 500

    async def returned(self, response: web.StreamResponse) -> None:
        """Decide by what all middleware has returned, and end the unit if no code of the application runs after that.

        Raises:
            Exception: that of a commit, or what middleware has answered although the head of another response was out.
        """
        await self.decide(response)
        if not getattr(response, "prepared", True) and self._is_whole(response):
            await self._finish()
        if self.unit.phase is _BACKGROUND:  # also if the handler went on after the last byte (P6)
            await self.unit.close()
        self.leave(response)

    def dismiss(self, response: object) -> bool:
        """Let go of unit and writer if nothing depends on them any more, and return whether it is so.

        Args:
            response: what the application answers.
        """
        unit = self.unit
        over = (unit.phase is _CLOSED or not (unit.used or unit.policy.should_commit)) and self._is_whole(response)
        if over:
            unit.close()
            _delete(self._writer, "write_headers")
        return over

    def leave(self, response: object) -> None:
        """Let go of unit and writer, at the end of the request's task if need be: aiohttp writes most responses there."""
        if not self.dismiss(response) and (task := asyncio.current_task()) is not None:
            self._watch()
            self.unit.close_with(task)
            task.add_done_callback(self._release)

    def _is_whole(self, response: object) -> bool:
        """Return whether aiohttp sends all of this from now on, without running any code of the application."""
        if self._own or (type(response) is not web.Response and not isinstance(response, web.HTTPException)):
            return False
        for app in self._request.match_info.apps:
            if app.on_response_prepare:
                return False
        return type(response.body) in _BYTES

    # What goes to the client

    async def write_headers(self, status_line: str, *args: Any, **kwargs: Any) -> None:
        """Send a head, after the decision about the unit by its status."""
        if self.sent and (self._failed is not None or self.unit.phase is _STREAM):
            raise self._failed or ContextSqlaError("the response that was prepared is not the one that was returned")
        self._watch()
        status = int(status_line.split(" ", 2)[1])
        await self._settled(self.unit.head(status))
        if status == 101:
            await self.unit.end_of_body()
            await self.unit.close()
            self._hidden = hidden_unit()  # P11: a websocket is no unit, nor what the server was started in
            self._hidden.__enter__()
        self._failed = None
        await self._own[0](status_line, *args, **kwargs)
        self.sent = True

    async def write(self, chunk: Any, *args: Any, **kwargs: Any) -> None:
        """Send a piece of the body; the one that completes the declared length is the last."""
        if self._failed is not None:
            raise self._failed
        if (left := getattr(self._writer, "length", None)) is not None and getattr(chunk, "nbytes", len(chunk)) >= left:
            await self._finish()
        elif self._request.transport is None:
            self.unit.in_body()
            self.unit.disconnected()
        await self._own[1](chunk, *args, **kwargs)

    async def write_eof(self, chunk: bytes = b"") -> None:
        """Send the last byte of the body, after the unit has finished it."""
        if self._failed is not None:
            raise self._failed
        await self._finish()
        await self._own[2](chunk)

    async def _finish(self) -> None:
        if self._request.transport is None:  # P5: nobody is there any more, and what follows will fail
            self.unit.disconnected()
        await self._settled(self.unit.end_of_body())

    async def _settled(self, step: Awaitable[None]) -> None:
        try:
            await step
        except Exception as error:
            self._failed = error
            self._reset()
            raise

    def _reset(self) -> None:
        """Make the writer what it was before a response set its framing: an answer of another kind may follow."""
        vars(self._writer).update(length=None, chunked=False, _compress=None)

    def _watch(self) -> None:
        """Replace the methods for the body as well."""
        if not self._own:
            del vars(self._writer)["write_headers"]
            self._own = tuple(getattr(self._writer, name) for name in _REPLACED)
            vars(self._writer).update((name, getattr(self, name)) for name in _REPLACED)

    def _release(self, _: "asyncio.Task[Any] | None" = None) -> None:
        """Give the writer its own methods back, or each request would be a cycle: writer, wire, request."""
        for name in _REPLACED:
            _delete(self._writer, name)
        if self._hidden is not None:
            with suppress(ValueError):  # it was answered in a task, and context, of its own
                self._hidden.__exit__(None, None, None)


def wire_of(request: web.Request) -> Wire | None:
    """Return the wire of a request that has a unit of work already.

    The writer, which a request shares with its clones, tells; never the context variable (P12).
    """
    wire = getattr(request.writer.write_headers, "__self__", None)
    return wire if type(wire) is Wire else None


def request_label(request: web.Request) -> str:
    """Return "METHOD /path", with the names of the path's parameters."""
    resource = request.match_info.route.resource
    return f"{request.method} {request.path if resource is None else resource.canonical}"
