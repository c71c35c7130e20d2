"""An adapter as it is written in an afternoon, to show that the checker finds what it does wrong.

It commits when the response is out, whatever it says, joins whatever context it runs in, and shields nothing.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from contract.drivers import starlette as driver
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from support import scenario

from .kits import Kit

_sessions: ContextVar[dict[str, AsyncSession] | None] = ContextVar("naive_sessions", default=None)


class NaiveMiddleware:
    """Commits after the response, unless an exception came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _sessions.get() is not None:
            await self._app(scope, receive, send)
            return
        sessions: dict[str, AsyncSession] = {}
        token = _sessions.set(sessions)
        await self._app(scope, receive, send)
        for session in sessions.values():
            await session.commit()
            await session.close()
        _sessions.reset(token)


def build(application: scenario.Application) -> Starlette:
    """Make the application as Starlette's driver does, with the naive middleware."""
    routes: list[BaseRoute] = [
        Route(route.path, driver.endpoint(route.handler), methods=list(route.methods))
        if isinstance(route, scenario.Route)
        else WebSocketRoute(route.path, driver.socket_endpoint(route.handler))
        for route in application.routes
    ]
    app = Starlette(routes=routes)
    driver.finish(app, application, lambda app, *connects, **options: app.add_middleware(NaiveMiddleware))
    return app


def kit() -> Kit:
    """Return the functions of the naive adapter."""
    return Kit(
        session=_session,
        in_new_ctx=_in_new_ctx,
        block=_block,
        commit=_commit,
        close=_close,
        on_commit=lambda callback: None,
        serializable=_in_new_ctx,
    )


async def _session(connect: Any) -> AsyncSession:
    sessions = _sessions.get()
    assert sessions is not None
    if connect.name not in sessions:
        sessions[connect.name] = await connect.create_session()
    return sessions[connect.name]


async def _in_new_ctx(function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    async with _block():
        return await function(*args)


@asynccontextmanager
async def _block() -> AsyncIterator[None]:
    if _sessions.get() is not None:
        yield
        return
    sessions: dict[str, AsyncSession] = {}
    token = _sessions.set(sessions)
    yield
    for session in sessions.values():
        await session.commit()
        await session.close()
    _sessions.reset(token)


async def _commit(connect: Any) -> None:
    await (await _session(connect)).commit()


async def _close(connect: Any) -> None:
    sessions = _sessions.get()
    assert sessions is not None
    await sessions.pop(connect.name).close()
