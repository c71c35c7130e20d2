"""The messages of one request, and the unit of work that they drive."""

from typing import Any

from context_sqla.adapters import Phase, Unit

from ._types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SCOPE_KEY", "Wire", "run_app", "wire_of"]

SCOPE_KEY = "context_sqla.wire"
"""Where a request carries its wire: this, and never the context variable, tells that the request has a unit already (P12)."""

_BODY = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})


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
        failed: the error that broke the response. Until a head that admits it comes by, nothing is sent on.
        body_read: the request's body was received to its end.
    """

    __slots__ = ("_decides", "_head", "_left", "_receive", "_send", "app", "body_read", "failed", "started", "unit")

    def __init__(self, unit: Unit, app: Any, receive: Receive, send: Send) -> None:
        self.unit = unit
        self.app = app
        self.started = False
        self.failed: Exception | None = None
        self.body_read = False
        self._receive = receive
        self._send = send
        self._decides = False
        self._head: Message | None = None
        self._left: int | None = None

    async def receive(self) -> Message:
        """Return the next message of the server; a client that has left ends an unfinished body (P5)."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.unit.disconnected()
        elif not message.get("more_body", False):
            self.body_read = True
        return message

    async def send(self, message: Message) -> None:
        """Send a message on, after what the unit has to do before it.

        Raises:
            Exception: that of the commit; the message is then withheld.
        """
        kind = message["type"]
        # An informational 1xx decides nothing: the head is still to come.
        if kind == "http.response.start" and not self.started and message["status"] >= 200:
            await self.head(message["status"])
            self.started = True
            self._head = message
        elif self.failed is not None:
            raise self.failed
        elif self._decides and kind in _BODY and self._is_last(message):
            await self._finish()
        await self._send(message)

    async def head(self, status: int) -> None:
        """Let the unit decide by the status of the head that is about to leave, or of an error handler's answer (P3, P4).

        Raises:
            Exception: that of the commit, or one that is known to have broken the body of this success.
        """
        if self.unit.phase is Phase.HANDLER:
            self._decides = True
            self.failed = None
            try:
                await self.unit.head(status)
            except Exception as error:
                self.failed = error
                raise
        elif self.failed is not None:
            # The body broke before middleware let its head pass: only an answer that admits it may still go (P5).
            if status < 400:
                raise self.failed
            self.failed = None

    async def _finish(self) -> None:
        try:
            await self.unit.end_of_body()
        except Exception as error:
            self.failed = error
            raise

    def _is_last(self, message: Message) -> bool:
        """Return whether the response is complete with this message: by its mark, or by the declared length."""
        if not message.get("more_body", False):
            return True
        if self._head is not None:
            self._left = _content_length(self._head)
            self._head = None
        if self._left is not None:
            size = message.get("count") if message["type"] == "http.response.zerocopysend" else len(message.get("body", b""))
            self._left = None if size is None else self._left - size
        return self._left is not None and self._left <= 0


def wire_of(scope: Scope) -> Wire | None:
    """Return the outermost wire of this request, or None if it has no unit of work, or none that its messages drive."""
    wire: Wire | None = scope.get(SCOPE_KEY)
    return wire


async def run_app(app: ASGIApp, scope: Scope, wire: Wire) -> None:
    """Run an application on a wire.

    Raises:
        Exception: the unit's own error where one broke the response, whatever the application made of it on its way (P4).
    """
    try:
        await app(scope, wire.receive, wire.send)
    except Exception:
        if wire.failed is None:
            raise
    if wire.failed is not None:
        raise wire.failed


def _content_length(head: Message) -> int | None:
    for name, value in head.get("headers", ()):
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None
