"""What one request writes to its client, and the unit of work that this drives."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from context_sqla.adapters import NOTHING, Phase, Unit, hidden_unit
from context_sqla.errors import ContextSqlaError

_KEY = "_context_sqla_wire"


def wire_of(request: web.Request) -> "Wire | None":
    """Return the wire of a request that has a unit of work already.

    The writer, which a request shares with its clones, tells; never the context variable (P12).
    """
    wire: Wire | None = vars(request.writer).get(_KEY)
    return wire


class Wire:
    """Drive a unit of work by what goes through the request's writer: decide before the head, finish before the last byte.

    aiohttp writes each response through the methods of one writer, whether a handler prepares it or the server does after all
    middleware; these methods of this one object are replaced until the request's task ends.

    Args:
        unit: the request's unit of work.
        request: the request.

    Attributes:
        sent: the head was sent.
        failed: the error that broke the response. Until another head comes by, nothing is sent on (P4, P5).
        late: an error that came after the head was sent.
        returned: all middleware has returned; what is still to come is the server's own.
    """

    def __init__(self, unit: Unit, request: web.Request, task: "asyncio.Task[Any]") -> None:
        writer: AbstractStreamWriter = request.writer
        self.unit: Unit = unit
        self.sent: bool = False
        self.failed: Exception | None = None
        self.late: Exception | None = None
        self.returned: bool = False
        self._task = task
        self._request = request
        self._writer = writer
        self._write_headers: Callable[..., Awaitable[None]] = writer.write_headers
        self._write: Callable[..., Awaitable[None]] = writer.write
        self._write_eof: Callable[..., Awaitable[None]] = writer.write_eof
        self._hidden: AbstractContextManager[None] | None = None
        vars(writer).update({_KEY: self, "write_headers": self.write_headers, "write": self.write, "write_eof": self.write_eof})
        self._unused = dict(vars(writer))
        unit.close_with(task)  # aiohttp writes most responses after all middleware
        task.add_done_callback(self.release)

    def release(self, _: "asyncio.Task[Any] | None" = None) -> None:
        """Give the writer its own methods back, or each request would be a cycle: writer, wire, unit, label, request."""
        own = vars(self._writer)
        for name in (_KEY, "write_headers", "write", "write_eof"):
            own.pop(name, None)
        self._unused.clear()

    def show(self) -> None:
        """Let units be seen again that were hidden from a websocket."""
        if self._hidden is not None:
            with suppress(ValueError):  # it was answered in a task, and context, of its own
                self._hidden.__exit__(None, None, None)
            self._hidden = None

    def note(self, error: Exception) -> None:
        """Take note of an exception that the application raised: a body that is not finished must not end well (P5)."""
        if not self.sent:
            self._reset()
            return
        self.late = error
        if self.unit.phase is Phase.STREAM:
            self.failed = error

    async def decide(self, response: web.StreamResponse) -> None:
        """Decide by a response that was returned; one that its handler prepared was decided about there.

        Raises:
            Exception: that of the commit, also if the handler that prepared the response has swallowed it.
        """
        if not getattr(response, "prepared", False):
            step = self.unit.head(getattr(response, "status", 500))  # what is no response becomes a 500
            if step is not NOTHING:
                await step
        elif self.failed is not None:
            raise self.failed

    async def write_headers(self, status_line: str, *args: Any, **kwargs: Any) -> None:
        """Send a head, after the decision about the unit by its status."""
        if self.sent and (self.failed is not None or self.unit.phase is Phase.STREAM):
            raise self.failed or ContextSqlaError("the response that was prepared is not the one that was returned")
        status = int(status_line.split(" ", 2)[1])
        try:
            step = self.unit.head(status)
            if step is not NOTHING:
                await step
        except Exception as error:
            self.failed = error
            self._reset()
            raise
        if status == 101:
            await self._become_websocket()
        self.failed = None
        await self._write_headers(status_line, *args, **kwargs)
        self.sent = True

    def _reset(self) -> None:
        """Make the writer what it was before a response set its framing: an answer of another kind may follow."""
        vars(self._writer).clear()
        vars(self._writer).update(self._unused)

    async def _become_websocket(self) -> None:
        await self.unit.end_of_body()
        await self.unit.close()
        self._hidden = hidden_unit()  # P11: a websocket is no unit, nor what the server was started in
        self._hidden.__enter__()

    async def write(self, chunk: Any, *args: Any, **kwargs: Any) -> None:
        """Send a piece of the body; the one that completes the declared length is the last."""
        if self.failed is not None:
            raise self.failed
        left = getattr(self._writer, "length", None)
        if left is not None and getattr(chunk, "nbytes", len(chunk)) >= left:
            await self._finish()
        elif self._request.transport is None:
            self.unit.disconnected()
        await self._write(chunk, *args, **kwargs)

    async def write_eof(self, chunk: bytes = b"") -> None:
        """Send the last byte of the body, after the unit has finished it."""
        if self.failed is not None:
            raise self.failed
        await self._finish()
        await self._write_eof(chunk)
        if self.returned:  # nothing more is written
            self._task.remove_done_callback(self.release)
            self.release()

    async def _finish(self) -> None:
        if self._request.transport is None:  # P5: nobody is there any more, and what follows will fail
            self.unit.disconnected()
        try:
            step = self.unit.end_of_body()
            if step is not NOTHING:
                await step
        except Exception as error:
            self.failed = error
            raise
