"""Waiting for something to become true, with a limit that a slow machine never meets."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

from .workers import settle

#: Ten times what is expected anywhere in this suite: a limit, never a duration to wait for.
DEADLINE = 10.0


async def until(
    condition: Callable[[], object | Awaitable[object]],
    *,
    deadline: float = DEADLINE,
    message: str = "the awaited condition never came true",
) -> None:
    """Return as soon as ``condition()`` is true; it may be a plain or an async callable.

    For what announces itself by no event that a test could wait for: the state of a server or of a pool.

    Raises:
        TimeoutError: ``deadline`` seconds have passed.
    """
    end = time.monotonic() + deadline
    while True:
        settle()
        met = condition()
        if inspect.isawaitable(met):
            met = await met
        if met:
            return
        if time.monotonic() > end:
            raise TimeoutError(message)
        await asyncio.sleep(0.002)
