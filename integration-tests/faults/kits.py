"""What a handler calls: the functions of context-sqla, or those of the naive adapter in their place."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from context_sqla import close_db_session, commit_db_session, db_context, db_session, on_commit, run_in_new_ctx, unit_of_work
from context_sqla.adapters import AsyncSession


@dataclass(frozen=True)
class Kit:
    """Everything that handlers need of an adapter."""

    session: Callable[[Any], Awaitable[AsyncSession]]
    in_new_ctx: Callable[..., Awaitable[Any]]
    block: Callable[[], AbstractAsyncContextManager[Any]]
    commit: Callable[[Any], Awaitable[None]]
    close: Callable[[Any], Awaitable[None]]
    on_commit: Callable[[Callable[[], object]], object]
    #: Runs a function in a serializable transaction of its own, again after a conflict.
    serializable: Callable[..., Awaitable[Any]]


def context_sqla_kit() -> Kit:
    """Return the functions under test."""
    serializable = unit_of_work(retry=4, isolation_level="SERIALIZABLE")

    async def run_serializable(function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        return await serializable(function)(*args)

    return Kit(
        session=db_session,
        in_new_ctx=run_in_new_ctx,
        block=db_context,
        commit=commit_db_session,
        close=close_db_session,
        on_commit=on_commit,
        serializable=run_serializable,
    )
