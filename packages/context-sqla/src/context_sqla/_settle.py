"""Clean-up that nobody can interrupt: a task of its own, awaited to its end however often the caller is cancelled (P7)."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import AbstractContextManager
from contextvars import Context
from typing import Any, NoReturn, TypeAlias, TypeVar

from .errors import _outcome_of

T = TypeVar("T")
Maker: TypeAlias = Callable[[], Coroutine[Any, Any, T]]
logger = logging.getLogger("context_sqla")

# A timer that was cancelled stays in the loop's heap until its time comes: it must not keep a request's context, and its unit.
TIMERS = Context()


class Nothing:
    """What has nothing to be waited for; cheaper than a coroutine that returns at once."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        """Be done."""
        yield from ()


NOTHING: Awaitable[None] = Nothing()

_held: set[asyncio.Task[Any]] = set()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs here, None in a thread of a synchronous handler."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def hold(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run a coroutine in a task that is kept alive; an error in it is logged with its traceback."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _held.add(task)
    task.add_done_callback(_let_go)
    return task


async def settle(fn: Maker[T], *, again: bool = False, patience: float | None = None, committed: Iterable[str] = ()) -> T:
    """Run `fn` to its end in a task of its own, then raise a cancellation that arrived meanwhile.

    Args:
        fn: makes the coroutine; it bounds itself in time.
        again: run it once more if its own task is cancelled, as `asyncio.run` does with every task at its end.
        patience: seconds that it has once the caller is cancelled, where it does not bound itself: the application's own code.
        committed: the connects that have committed before, of which a cancellation is to tell (P9).
    """
    task, cancelled = await _run(fn, patience)
    if task.cancelled() and again:
        earlier = cancelled
        task, cancelled = await _run(fn, patience)
        cancelled = cancelled or earlier
    return task.result() if cancelled is None else _overtaken(task, cancelled, committed)


async def finish(task: asyncio.Task[T], cancelled: asyncio.CancelledError, patience: float) -> T:
    """Wait for a task as `settle` does, whose caller is cancelled already."""
    _limit(task, patience)
    await _end_of(task)
    return _overtaken(task, cancelled)


def _overtaken(task: asyncio.Task[Any], cancelled: asyncio.CancelledError, committed: Iterable[str] = ()) -> NoReturn:
    _outcome_of(cancelled).committed.extend(committed)
    if not task.cancelled() and (error := task.exception()) is not None:
        # P4: the caller learns of the cancellation; the error of a commit must not be lost with it.
        cancelled.add_note(f"while it was cancelled: {type(error).__name__}: {error}")
        logger.error("An error was overtaken by a cancellation", exc_info=error)
        raise cancelled from error
    raise cancelled


async def _run(fn: Maker[T], patience: float | None) -> tuple[asyncio.Task[T], asyncio.CancelledError | None]:
    loop = asyncio.get_running_loop()
    done = loop.create_future()  # is cancelled with the caller that awaits it, and the task is not

    def wake(_: object = None) -> None:
        if not done.done() and not loop.is_closed():
            done.set_result(None)

    async def run() -> T:
        try:
            return await fn()
        finally:
            wake()  # a turn of the loop before the task's own callback

    task = loop.create_task(run())
    task.add_done_callback(wake)  # one that is cancelled before it begins runs nothing
    if (caller := asyncio.current_task()) is not None and caller.cancelling():
        _limit(task, patience)
    try:
        await done
    except asyncio.CancelledError as exc:
        _limit(task, patience)
        await _end_of(task)
        return task, exc
    return task, None


async def _end_of(task: asyncio.Task[Any]) -> None:
    with _shielded():
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))


def _limit(task: asyncio.Task[Any], patience: float | None) -> None:
    if patience is not None:
        timer = task.get_loop().call_later(patience, task.cancel, context=TIMERS)
        task.add_done_callback(lambda _: timer.cancel())  # or it would keep the task, and its unit, until then


def _shielded() -> AbstractContextManager[Any]:
    """Return anyio's shield where anyio is in use: its scopes cancel again at every turn of the loop."""
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return contextlib.nullcontext()
    scope: AbstractContextManager[Any] = anyio.CancelScope(shield=True)
    return scope


def _let_go(task: asyncio.Task[Any]) -> None:
    _held.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("An error in clean-up that nobody awaits", exc_info=error)
