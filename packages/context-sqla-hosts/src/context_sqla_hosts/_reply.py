"""Answers: a status, headers and a body, ready for a socket and for ASGI."""

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, TypeAlias

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
_ALWAYS = (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"))


class Reply:
    """One answer; it is made once and sent often.

    Args:
        status: of HTTP.
        body: what is sent.
        content_type: of the body, None where there is none.
        headers: more of them.
    """

    __slots__ = ("body", "head", "headers", "status")

    def __init__(
        self, status: int, body: bytes = b"", content_type: str | None = None, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self.status: int = status
        self.body: bytes = body
        kind = (("Content-Type", content_type),) if content_type else ()
        length = () if status == HTTPStatus.NO_CONTENT else (("Content-Length", str(len(body))),)
        self.headers: tuple[tuple[str, str], ...] = (*kind, *length, *_ALWAYS, *headers)
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in self.headers)]
        self.head: bytes = "\r\n".join(lines).encode("latin-1") + b"\r\n"  # more headers may follow

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.body!r}>"


Later: TypeAlias = Callable[[], Awaitable[Reply]]
"""An answer that has to be waited for; a function, so that nothing is left of it where nobody does."""


def text_reply(text: str, status: int = 200, **options: Any) -> Reply:
    """Answer with text; nothing has no type."""
    return Reply(status, text.encode(), TEXT if text else None, **options)


def json_reply(value: object, status: int = 200, **options: Any) -> Reply:
    """Answer with JSON, without spaces."""
    return Reply(status, json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(), JSON, **options)


def error_reply(text: str, status: int, **options: Any) -> Reply:
    """Answer with an error, in the form that pg-status has: the space after the colon is part of it."""
    return Reply(status, f'{{"error_text": {json.dumps(text)}}}'.encode(), JSON, **options)


NOT_READY = error_reply("pg_monitor is not ready", 503, headers=(("Retry-After", "1"),))
NOT_FOUND = Reply(404)
NO_METHOD = Reply(405, headers=(("Allow", "GET, HEAD, OPTIONS"),))
OPTIONS = Reply(204, headers=(("Allow", "GET, HEAD, OPTIONS"),))
