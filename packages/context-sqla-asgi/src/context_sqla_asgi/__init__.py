"""A unit of work per request for any ASGI application, and the parts from which adapters for ASGI frameworks are made."""

from ._lifespan import closing
from ._middleware import ASGIHTTPDBSessionMiddleware, CommitPoint, Rule, request_label, setup
from ._wire import SCOPE_KEY, Wire

__all__ = ["SCOPE_KEY", "ASGIHTTPDBSessionMiddleware", "CommitPoint", "Rule", "Wire", "closing", "request_label", "setup"]
