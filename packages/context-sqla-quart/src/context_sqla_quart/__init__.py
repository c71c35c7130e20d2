"""A unit of work per request for Quart."""

from context_sqla_asgi import Rule

from ._extension import ContextSQLA, setup

__all__ = ["ContextSQLA", "Rule", "setup"]
