"""A unit of work per request for Starlette."""

from context_sqla_asgi import Rule

from ._middleware import (
    OuterPart,
    StarletteHTTPDBSessionMiddleware,
    add_starlette_http_db_session_middleware,
    install,
    setup,
    starlette_http_db_session_middleware,
)

__all__ = [
    "OuterPart",
    "Rule",
    "StarletteHTTPDBSessionMiddleware",
    "add_starlette_http_db_session_middleware",
    "install",
    "setup",
    "starlette_http_db_session_middleware",
]
