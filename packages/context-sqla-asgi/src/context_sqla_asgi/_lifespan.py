"""The end of an application: its connects are closed after everything else."""

import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from context_sqla import DBConnect
from context_sqla.adapters import close_connects

from ._types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["closing", "run_lifespan"]

_STARTED = "lifespan.startup.complete"
_STOPPED = "lifespan.shutdown.complete"
_ANSWERS = frozenset({_STARTED, _STOPPED, "lifespan.startup.failed", "lifespan.shutdown.failed"})


@asynccontextmanager
async def closing(*connects: DBConnect[Any]) -> AsyncIterator[None]:
    """Close the connects at the end of the block, however it ends.

    Raises:
        Exception: the block's own, with errors of the closing as notes (P8), or else the first error of the closing.
    """
    try:
        yield
    except BaseException as error:
        await _close_after(error, connects)
        raise
    await close_connects(*connects)


async def run_lifespan(app: ASGIApp, connects: tuple[DBConnect[Any], ...], scope: Scope, receive: Receive, send: Send) -> None:
    """Run an application's lifespan and close the connects at its end; answer for an application that has none.

    Raises:
        Exception: the application's own, if it had begun to answer, or that of the closing.
    """
    lifespan = _Lifespan(connects, receive, send)
    try:
        await app(scope, lifespan.receive, lifespan.send)
    except BaseException as error:
        # An application that refuses this type of scope has no lifespan. One that had received its startup has one, and failed.
        if lifespan.asked or not isinstance(error, Exception):
            await lifespan.give_up(error)
            raise
    await lifespan.answer_the_rest()


class _Lifespan:
    """The messages of one lifespan, on their way between server and application."""

    __slots__ = ("_connects", "_receive", "_send", "answered", "asked", "failed")

    def __init__(self, connects: tuple[DBConnect[Any], ...], receive: Receive, send: Send) -> None:
        self.asked: str | None = None
        self.answered: str | None = None
        self.failed: Exception | None = None
        self._connects = connects
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        message = await self._receive()
        self.asked = message["type"]
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind not in _ANSWERS:
            raise RuntimeError(f"{kind!r} is no answer to a lifespan message")
        if kind != _STARTED:
            try:
                await close_connects(*self._connects)
            except Exception as error:  # noqa: BLE001 - the server is told first, then it is raised
                self.failed = error
                message = _failed(message, error)
        self.answered = kind
        await self._send(message)
        if self.failed is not None and kind == _STOPPED:
            raise self.failed

    async def give_up(self, error: BaseException) -> None:
        if self.answered in (None, _STARTED):
            await _close_after(error, self._connects)

    async def answer_the_rest(self) -> None:
        if self.asked is None:
            await self.receive()
        if self.answered is None:
            await self.send({"type": _STARTED})
        if self.answered == _STARTED:
            if self.asked != "lifespan.shutdown":
                await self.receive()
            await self.send({"type": _STOPPED})
        if self.failed is not None:
            raise self.failed


async def _close_after(error: BaseException, connects: tuple[DBConnect[Any], ...]) -> None:
    """Close the connects; what fails is a note of the error that came before (P8)."""
    try:
        await close_connects(*connects)
    except Exception as failed:  # noqa: BLE001 - P8: the error that came before wins
        error.add_note("".join(traceback.format_exception(failed)))


def _failed(message: Message, error: Exception) -> Message:
    """Turn the answer into one that tells the server, which logs it, why the closing failed."""
    text = "".join(traceback.format_exception(error))
    if before := message.get("message"):
        text = f"{before}\n{text}"
    return {"type": message["type"].replace("complete", "failed"), "message": text}
