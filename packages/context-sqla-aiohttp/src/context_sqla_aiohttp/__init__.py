"""A unit of work per request for aiohttp's server."""

from ._middleware import DBSessionMiddleware, Rule, db_session_middleware, setup

__all__ = ["DBSessionMiddleware", "Rule", "db_session_middleware", "setup"]
