"""A unit of work per request for Litestar."""

from context_sqla_asgi import Rule

from ._plugin import ContextSQLAPlugin, provide_session, setup

__all__ = ["ContextSQLAPlugin", "Rule", "provide_session", "setup"]
