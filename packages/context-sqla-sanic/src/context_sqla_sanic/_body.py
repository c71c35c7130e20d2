"""The body of a response on its way out."""

from collections.abc import Awaitable, Callable
from typing import Any

from context_sqla.adapters import NOTHING, Unit
from sanic import Request
from sanic.exceptions import RequestCancelled
from sanic.http import Stage
from sanic.response import BaseHTTPResponse

_RESPONSE = Stage.RESPONSE  # members of an enumeration are slow to reach on Python 3.11


class Body:
    """Stand between a response and its stream: finish the unit before the last byte leaves (P5).

    Args:
        stream: Sanic's own.
        response: the response that writes to it.
        request: its request.
        unit: the request's unit of work.
    """

    __slots__ = ("_left", "_request", "_response", "_stream", "_unit")

    def __init__(self, stream: Any, response: BaseHTTPResponse, request: Request[Any, Any], unit: Unit) -> None:
        self._stream = stream
        self._response = response
        self._request = request
        self._unit = unit
        self._left: float | None = None  # of the Content-Length, once it was asked for

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def send(self) -> Callable[[bytes, bool], Awaitable[None]] | None:
        """Sanic's own, after what the unit has to do; None if the body is complete."""
        return self._send if self._stream.send is not None else None

    async def _send(self, data: bytes, end_stream: bool) -> None:
        stream, unit = self._stream, self._unit
        if stream.stage is _RESPONSE and await self._is_left():  # a decided answer goes out whole
            unit.in_body()
            unit.disconnected()
            raise RequestCancelled
        if (end_stream or self._is_last(data)) and (step := unit.end_of_body()) is not NOTHING:
            await step
        # Asked for again, it is another one after the head; not all of them are coroutines.
        sent = stream.send(data, end_stream)
        if sent is not None:
            await sent

    def _is_last(self, data: bytes) -> bool:
        """Return whether the response is complete with this, by its declared length."""
        if self._left is None:
            length = str(self._response.headers.get("content-length", ""))
            self._left = float(length) if length.isdigit() else float("inf")
        self._left -= len(data)
        return self._left <= 0

    async def _is_left(self) -> bool:
        """Return whether the client has left; Sanic itself does not ask an ASGI server."""
        receive = getattr(self._request.transport, "receive", None)
        if receive is None:
            return self._request.conn_info is not None and self._request.conn_info.lost
        route = self._request.route
        if self._stream.request_body and not (route is not None and route.extra.ignore_body):
            return False
        while (message := _at_once(receive())) is not None:
            if message["type"] == "http.disconnect":
                return True
        return False


def _at_once(message: Any) -> Any:
    """Return what is there already, or None."""
    try:
        message.send(None)
    except StopIteration as there:
        return there.value
    message.close()
    return None
