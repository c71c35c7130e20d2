"""A unit of work per request for Starlette."""

from ._answers import answer_commit_error, answer_unhandled, unavailable
from ._middleware import (
    StarletteHTTPDBSessionMiddleware,
    add_starlette_http_db_session_middleware,
    route_label,
    starlette_http_db_session_middleware,
)
from ._setup import install, setup

__all__ = [
    "StarletteHTTPDBSessionMiddleware",
    "add_starlette_http_db_session_middleware",
    "answer_commit_error",
    "answer_unhandled",
    "install",
    "route_label",
    "setup",
    "starlette_http_db_session_middleware",
    "unavailable",
]
