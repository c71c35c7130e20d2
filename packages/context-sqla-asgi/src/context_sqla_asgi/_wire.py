"""The messages of one request, and the unit of work that they drive."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from context_sqla.adapters import NOTHING, Phase, Unit

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

SCOPE_KEY = "context_sqla.wire"
"""Where a scope has the nearest `Wire` around, of those of its request, or None if it has a unit of work that no wire drives.

This, and never the context variable, tells that a request has a unit already (P12).
"""

_BODY = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})
_HANDLER = Phase.HANDLER  # a member of an Enum is slow to look up in Python 3.11


class Wire:
    """Drive a unit of work by the messages of its request: decide before the head, finish before the last byte (P4, P5).

    Give `receive` and `send` to the application instead of the server's. Several wires may surround one unit, one inside the
    other: the one that decides about the head also finishes the body.

    Args:
        unit: the request's unit of work.
        app: what the scope names as its application when the request comes in; mounted applications overwrite it.
        receive: the server's, or that of the middleware around.
        send: the same.

    Attributes:
        head: the head that was sent on.
        decides: the unit was asked about the head here, so that this wire finishes the body. An adapter that calls `unit.head`
            by itself sets it.
        failed: the error that broke the response. Until a head that admits it comes by, nothing is sent on.
        late: an error that came after the response; what was written since then rolls back (P6).
        body_read: the request's body was received to its end.
    """

    __slots__ = ("_left", "_receive", "_send", "app", "body_read", "decides", "failed", "head", "late", "unit")

    def __init__(self, unit: Unit, app: Any, receive: Receive, send: Send) -> None:
        self.unit: Unit = unit
        self.app: Any = app
        self.head: Message | None = None
        self.decides: bool = False
        self.failed: Exception | None = None
        self.late: Exception | None = None
        self.body_read: bool = False
        self._receive = receive
        self._send = send
        self._left: float | None = None  # of the Content-Length, once it was asked for

    async def receive(self) -> Message:
        """Return the next message of the server; a client that has left ends an unfinished body (P5)."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.unit.disconnected()
        elif not message.get("more_body", False):
            self.body_read = True
        return message

    def send(self, message: Message) -> Awaitable[None]:  # noqa: C901  # one piece: each message comes by
        """Send a message on, after what the unit has to do before it.

        Raises:
            Exception: that of the commit, here or when awaited; the message is then withheld.
        """
        kind = message["type"]
        # An informational 1xx decides nothing: the head is still to come.
        if kind == "http.response.start" and self.head is None and message["status"] >= 200:
            if self.unit.phase is _HANDLER:
                self.decides, self.failed = True, None
                step = self.unit.head(message["status"])
                if step is not NOTHING:
                    return self._send_after(step, message)
                self.head = message
                return self._send(message)
            # If the body broke before middleware lets its head pass, only an answer that admits it may still go (P5).
            if self.failed is None or message["status"] >= 400:
                self.failed, self.head = None, message
        if self.failed is not None:
            raise self.failed
        if self.decides and kind in _BODY:
            if message.get("more_body") and not self._is_last(message):
                self.unit.in_body(beside=True)
            elif (step := self.unit.end_of_body()) is not NOTHING:
                return self._send_after(step, message)
        return self._send(message)

    async def _send_after(self, step: Awaitable[None], message: Message) -> None:
        try:
            await step
        except Exception as error:
            self.failed = error
            raise
        if message["type"] == "http.response.start":
            self.head = message
            self.unit.in_body(beside=True)  # whose client may leave before its first piece
        await self._send(message)

    def _is_last(self, message: Message) -> bool:
        """Return whether the response is complete with this message, although it has no mark: by the declared length."""
        if self._left is None:
            fields = self.head.get("headers", ()) if self.head is not None else ()
            lengths = [value for name, value in fields if name.lower() == b"content-length" and value.isdigit()]
            self._left = float(lengths[0]) if lengths else float("inf")
        left = self._left = self._left - (message.get("count") or len(message.get("body", b"")))
        return left <= 0
