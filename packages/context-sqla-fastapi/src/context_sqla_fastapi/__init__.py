"""A unit of work per request for FastAPI."""

from ._depends import session_dependency
from ._middleware import (
    FastAPIHTTPDBSessionMiddleware,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
    setup,
)

__all__ = [
    "FastAPIHTTPDBSessionMiddleware",
    "add_fastapi_http_db_session_middleware",
    "fastapi_http_db_session_middleware",
    "session_dependency",
    "setup",
]
