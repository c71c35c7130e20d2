"""A unit of work per request for Sanic."""

from ._extension import Rule, setup

__all__ = ["Rule", "setup"]
