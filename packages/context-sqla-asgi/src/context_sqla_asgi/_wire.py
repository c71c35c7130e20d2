"""The messages of one request, and the unit of work that they drive."""

from collections.abc import Awaitable
from typing import Any

from context_sqla.adapters import Phase, Unit

from ._types import Message, Receive, Scope, Send

__all__ = ["SCOPE_KEY", "Wire", "wire_of"]

SCOPE_KEY = "context_sqla.wire"
"""Where a request carries its wire: this, and never the context variable, tells that the request has a unit already (P12)."""

_BODY = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})
_HANDLER = Phase.HANDLER  # a member of an Enum is slow to look up in Python 3.11


class Wire:
    """Drive a unit of work by the messages of its request: decide before the head, finish before the last byte (P4, P5).

    Give `receive` and `send` to the application instead of the server's. Several wires may surround one unit, one inside the
    other: the one that decides about the head also finishes the body.

    Args:
        unit: the request's unit of work.
        app: what the scope named as its application when the request came in; mounted applications overwrite it.
        receive: the server's, or that of the middleware around.
        send: the same.

    Attributes:
        started: a head was sent on.
        decides: the unit was asked about the head here, so that this wire finishes the body. An adapter that calls `unit.head`
            by itself sets it.
        failed: the error that broke the response. Until a head that admits it comes by, nothing is sent on.
        late: an error that came after the response; what was written since then rolls back (P6).
        body_read: the request's body was received to its end.
    """

    __slots__ = ("_left", "_receive", "_send", "app", "body_read", "decides", "failed", "late", "started", "unit")

    def __init__(self, unit: Unit, app: Any, receive: Receive, send: Send) -> None:
        self.unit: Unit = unit
        self.app: Any = app
        self.started: bool = False
        self.decides: bool = False
        self.failed: Exception | None = None
        self.late: Exception | None = None
        self.body_read: bool = False
        self._receive = receive
        self._send = send
        self._left: Message | int | None = None  # the head until somebody asks, then what is left of its Content-Length

    async def receive(self) -> Message:
        """Return the next message of the server; a client that has left ends an unfinished body (P5)."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.unit.disconnected()
        elif not message.get("more_body", False):
            self.body_read = True
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """Send a message on, after what the unit has to do before it.

        Raises:
            Exception: when awaited: that of the commit; the message is then withheld.
        """
        kind = message["type"]
        # An informational 1xx decides nothing: the head is still to come.
        if kind == "http.response.start" and not self.started and message["status"] >= 200:
            if self.unit.phase is _HANDLER:
                return self._send_head(message)
            # The body broke before middleware let its head pass: only an answer that admits it may still go (P5).
            if self.failed is not None and message["status"] < 400:
                return self._send_last(message)
            self.failed = None
            self.started = True
            self._left = message
        elif self.failed is not None or (self.decides and kind in _BODY and self._is_last(message)):
            return self._send_last(message)
        return self._send(message)

    async def _send_head(self, message: Message) -> None:
        self.decides = True
        self.failed = None  # what this head answers, if anything
        try:
            await self.unit.head(message["status"])
        except Exception as error:
            self.failed = error
            raise
        self.started = True
        self._left = message
        await self._send(message)

    async def _send_last(self, message: Message) -> None:
        if self.failed is not None:
            raise self.failed
        try:
            await self.unit.end_of_body()
        except Exception as error:
            self.failed = error
            raise
        await self._send(message)

    def _is_last(self, message: Message) -> bool:
        """Return whether the response is complete with this message: by its mark, or by the declared length."""
        if not message.get("more_body", False):
            return True
        left = self._left
        if left is not None and not isinstance(left, int):
            left = _content_length(left)
        if left is not None:
            size = message.get("count") if message["type"] == "http.response.zerocopysend" else len(message.get("body", b""))
            left = None if size is None else left - size
        self._left = left
        return left is not None and left <= 0


def wire_of(scope: Scope) -> Wire | None:
    """Return the outermost wire of this request, or None if it has no unit of work, or none that its messages drive."""
    wire: Wire | None = scope.get(SCOPE_KEY)
    return wire


def _content_length(head: Message) -> int | None:
    for name, value in head.get("headers", ()):
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None
