"""What must not be interrupted, in the task that asks for it: a cancellation hands it over to a task of its own (P7).

That costs nothing where nobody is cancelled. It is for drivers that never cancel the task in which they are awaited: such a
cancellation is meant for the driver, and would be taken for one of the request.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from types import coroutine
from typing import Any

from ._settle import finish

BEGIN = object()


class _Awaited:
    """What a driver awaits, as the task is shown it: cancelled at a protected moment, the driver's own goes on."""

    __slots__ = ("_asyncio_future_blocking", "_context", "_error", "_future", "_is_protected", "_wake", "get_loop")

    def __init__(self, future: "asyncio.Future[Any]", is_protected: Callable[[], bool]) -> None:
        self._future = future
        self._is_protected = is_protected
        self._asyncio_future_blocking = True  # by this a task knows what it can wait for
        self.get_loop = future.get_loop  # a task asks for it

    def add_done_callback(self, wake: Callable[[Any], object], *, context: Context | None = None) -> None:
        self._wake, self._context = wake, context
        self._future.add_done_callback(wake, context=context)

    def cancel(self, msg: Any = None) -> bool:
        if not self._is_protected():
            return self._future.cancel(msg)
        if not self._future.remove_done_callback(self._wake):
            return False  # it is done: the task is told when it wakes
        self._error = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)  # by which anyio knows its own
        self.get_loop().call_soon(self._wake, self, context=self._context)
        return True

    def result(self) -> None:
        raise self._error


class Left:
    """Where a coroutine stood when its task was cancelled."""

    __slots__ = ("awaited", "cancelled", "work")

    def __init__(self, work: Coroutine[Any, Any, Any], awaited: Any, cancelled: asyncio.CancelledError) -> None:
        self.work = work
        self.awaited = awaited
        self.cancelled = cancelled


@coroutine
def drive(work: Coroutine[Any, Any, Any], awaited: Any, is_protected: Callable[[], bool] | None) -> Generator[Any, Any, Any]:
    """Await a coroutine; return its result, or a `Left` if its task was cancelled at a protected moment.

    Args:
        work: the coroutine.
        awaited: `BEGIN`, or what it is waiting for.
        is_protected: whether a cancellation of this moment has to wait; at every other moment it goes through.
    """
    try:
        if awaited is BEGIN:
            awaited = work.send(None)
        while True:
            try:
                yield awaited if is_protected is None or awaited is None else _Awaited(awaited, is_protected)
            except BaseException as exc:
                if is_protected is not None and isinstance(exc, asyncio.CancelledError) and is_protected():
                    return Left(work, awaited, exc)
                awaited = work.throw(exc)
            else:
                awaited = work.send(None)
    except StopIteration as done:
        return done.value


async def go_on(left: Left, *, first: Callable[[], None], patience: float) -> None:
    """Run what was left to its end in a task of its own, then raise the cancellation.

    Args:
        left: bounds itself in time.
        first: called in that task before.
        patience: seconds that it has where it does not bound itself.
    """

    async def run() -> None:
        first()
        await drive(left.work, left.awaited, None)

    await finish(asyncio.get_running_loop().create_task(run()), left.cancelled, patience)
