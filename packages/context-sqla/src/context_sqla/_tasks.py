"""Units of work outside requests: a block, a call, a call that is repeated when the database asks for it (P11, P18)."""

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from sqlalchemy.exc import DBAPIError

from ._options import transaction_options
from ._policy import DEFAULT_POLICY, BeforeCommitCallback, Policy
from ._unit import Unit, new_unit
from .errors import is_in_doubt

P = ParamSpec("P")
Q = ParamSpec("Q")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_STATES = frozenset({"40001", "40P01"})  # serialization failure, deadlock
_MYSQL = frozenset({1205, 1213})  # lock wait timeout, deadlock
_SQLITE = ("SQLITE_BUSY", "SQLITE_LOCKED")


def db_context(*, before_commit: BeforeCommitCallback | None = None) -> AbstractAsyncContextManager[None]:
    """Open a unit of work for a block: committed at its end, rolled back on an error (P11).

    For websocket messages, scripts, workers and schedulers; inside a unit it is a new one with connections of its own.

    Args:
        before_commit: awaited before each session's commit; refuses it by raising.
    """
    return _block(DEFAULT_POLICY if before_commit is None else Policy(before_commit=before_commit))


async def run_in_new_ctx(fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a coroutine function in a new unit of work with sessions of its own, committed or rolled back at its end (P18).

    Made for `asyncio.gather` and `TaskGroup`. Every argument goes to `fn`.

    Args:
        fn: the coroutine function.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        What `fn` returns.
    """
    async with new_unit():
        return await fn(*args, **kwargs)


def unit_of_work(*, retry: int | None = None, isolation_level: str | None = None, read_only: bool = False) -> "UnitOfWork":
    """Make units of work with options, as a decorator or as `await unit_of_work(retry=3)(fn, *args)` (P18).

    Args:
        retry: how often the whole function is run again after a serialization failure or a deadlock, its commit included. Never
            after a commit whose outcome is in doubt, and never once the function has committed something by hand.
        isolation_level: of every transaction of the unit.
        read_only: let the database refuse writes.

    Raises:
        ValueError: `retry` is negative.
    """
    if retry is not None and retry < 0:
        raise ValueError(f"retry is a number of repetitions, not {retry}")
    return UnitOfWork(retry or 0, transaction_options(isolation_level=isolation_level, read_only=read_only))


class UnitOfWork:
    """Decorate coroutine functions, or call them, as units of work with options; made by `unit_of_work`."""

    def __init__(self, retry: int, options: dict[str, Any]) -> None:
        self._retry = retry
        self._options = options

    @overload
    def __call__(self, fn: Callable[P, Awaitable[T]], /) -> "Work[P, T]": ...

    @overload
    def __call__(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]: ...

    def __call__(self, fn: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any) -> Any:
        """Return the decorated function, or with arguments the coroutine of its call."""
        if args or kwargs:
            return self.run(fn, args, kwargs)
        return Work(self, fn)

    async def run(self, fn: Callable[..., Awaitable[T]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """Run the function in a unit, again where the database asks for it."""
        attempt = 0
        while True:
            unit: Unit | None = None
            try:
                async with new_unit(options=self._options) as unit:
                    return await fn(*args, **kwargs)
            except Exception as exc:
                if attempt >= self._retry or (unit is not None and unit.committed) or not _is_retryable(exc):
                    raise
            attempt += 1
            # Jitter: those that collided must not collide again.
            await asyncio.sleep(random.random() * min(1.0, 0.01 * 2**attempt))  # noqa: S311


class Work(Generic[P, T_co]):
    """A coroutine function that runs as a unit of work: call it, or await it as it is if it takes no arguments."""

    def __init__(self, how: UnitOfWork, fn: Callable[P, Awaitable[T_co]]) -> None:
        functools.update_wrapper(self, fn)
        self._how = how
        self._fn = fn

    async def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Run the function in a unit of its own."""
        return await self._how.run(self._fn, args, kwargs)

    def __await__(self) -> Generator[Any, None, T_co]:
        """Run the function without arguments."""
        return self._how.run(self._fn, (), {}).__await__()

    @overload
    def __get__(self, instance: None, owner: type) -> "Work[P, T_co]": ...

    @overload
    def __get__(
        self: "Work[Concatenate[Any, Q], T_co]", instance: object, owner: type | None = None
    ) -> Callable[Q, Coroutine[Any, Any, T_co]]: ...

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind to an instance, as a function does."""
        return self if instance is None else MethodType(self, instance)


@asynccontextmanager
async def _block(policy: Policy) -> AsyncIterator[None]:
    async with new_unit(policy):
        yield


def _is_retryable(exc: BaseException) -> bool:
    """Return whether the database has rolled the transaction back only because of its neighbours."""
    if is_in_doubt(exc) or not isinstance(exc, DBAPIError):
        return False
    original: Any = exc.orig
    if (getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)) in _STATES:
        return True
    if str(getattr(original, "sqlite_errorname", "")).startswith(_SQLITE):
        return True
    arguments: list[Any] = list(getattr(original, "args", ()))
    return bool(arguments) and isinstance(arguments[0], int) and arguments[0] in _MYSQL
