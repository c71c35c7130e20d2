"""The end of an application: its connects are closed after everything else."""

import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from context_sqla import DBConnect
from context_sqla.adapters import close_connects

from ._wire import ASGIApp, Message, Receive, Scope, Send

_STARTED, _STOPPED = "lifespan.startup.complete", "lifespan.shutdown.complete"


@asynccontextmanager
async def closing(*connects: DBConnect[Any]) -> AsyncIterator[None]:
    """Close the connects at the end of the block, however it ends.

    Args:
        connects: all that the block uses.

    Raises:
        Exception: the block's own, with errors of the closing as notes (P8), or else the first error of the closing.
    """
    try:
        yield
    except BaseException as error:
        try:
            await close_connects(*connects)
        except Exception as failed:  # noqa: BLE001 - P8: the error that came before wins
            error.add_note("".join(traceback.format_exception(failed)))
        raise
    await close_connects(*connects)


async def run_lifespan(app: ASGIApp, connects: tuple[DBConnect[Any], ...], scope: Scope, receive: Receive, send: Send) -> None:
    """Run an application's lifespan and close the connects at its end; answer for an application that has none.

    Raises:
        Exception: the application's own, if it had begun to take part, or that of the closing.
    """
    said = 0  # by the server and by the application, in turns

    async def hear() -> Message:
        nonlocal said
        said += 1
        return await receive()

    async def answer(message: Message) -> None:
        nonlocal said
        kind = message["type"]
        assert kind.startswith("lifespan."), f"{kind!r} is no answer to a lifespan message"
        said += 4 if kind.endswith("failed") else 1  # nothing follows a failure
        try:
            await close_connects(*(connects if kind != _STARTED else ()))
        except Exception:
            # Servers log the text; the exception alone would tell some of them that there is no lifespan.
            text = f"{message.get('message', '')}\n{traceback.format_exc()}".lstrip()
            await send({"type": kind.replace("complete", "failed"), "message": text})
            raise
        await send(message)

    try:
        await app(scope, hear, answer)
    except BaseException as error:
        # An application that refuses this type of scope has no lifespan; one that listened to its startup has one, and failed.
        if said or not isinstance(error, Exception):
            async with closing(*(connects if said < 4 else ())):
                raise
    for step in (hear, partial(answer, {"type": _STARTED}), hear, partial(answer, {"type": _STOPPED}))[said:]:
        await step()
