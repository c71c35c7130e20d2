"""A unit of work per request for Falcon's ASGI applications."""

from context_sqla_asgi import Rule

from ._app import setup

__all__ = ["Rule", "setup"]
