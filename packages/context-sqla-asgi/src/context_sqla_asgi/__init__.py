"""A unit of work per request for any ASGI application, and the parts from which adapters for ASGI frameworks are made."""

from ._lifespan import closing
from ._middleware import (
    Answer,
    ASGIHTTPDBSessionMiddleware,
    CommitPoint,
    UnitMiddleware,
    Watch,
    answer_unavailable,
    request_label,
    setup,
)
from ._types import ASGIApp, Message, Receive, Scope, Send
from ._wire import SCOPE_KEY, Wire, wire_of

__all__ = [
    "SCOPE_KEY",
    "ASGIApp",
    "ASGIHTTPDBSessionMiddleware",
    "Answer",
    "CommitPoint",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "UnitMiddleware",
    "Watch",
    "Wire",
    "answer_unavailable",
    "closing",
    "request_label",
    "setup",
    "wire_of",
]
