"""The same small application on each framework, once bare, once with this suite, once with what people use today.

A contender that is not installed is left out; the report says so.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from context_sqla import DBConnect, db_session
from sqlalchemy import AsyncAdaptedQueuePool
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from .drive import asgi, protocol

Work = Callable[[Any], Awaitable[Any]]
"""What the endpoint does with a session."""
Make = Callable[[AsyncEngine, Work | None], Any]
"""Make an application on this engine whose endpoint does this work; without work it does not ask for a session."""


def installed(module: str) -> bool:
    """Return whether a library is there to be measured."""
    return find_spec(module) is not None


def maker_of(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Make sessions by hand."""
    return async_sessionmaker(engine, expire_on_commit=False)


_twins: WeakKeyDictionary[AsyncEngine, list[AsyncEngine]] = WeakKeyDictionary()


def connect_to(engine: AsyncEngine) -> DBConnect[AsyncSession]:
    """Make sessions through this suite, on a twin of the engine: what the suite does with its engine, others shall not pay."""
    options: Any = {}
    if isinstance(pool := engine.sync_engine.pool, AsyncAdaptedQueuePool):
        options = {"pool_size": pool.size(), "max_overflow": pool._max_overflow}
    twin = create_async_engine(engine.url, **options)
    _twins.setdefault(engine, []).append(twin)
    return DBConnect.from_sessionmaker(maker_of(twin))


async def dispose(engine: AsyncEngine) -> None:
    """Close the connections of an engine and its twins."""
    for one in (engine, *_twins.pop(engine, ())):
        await one.dispose()


def session_of(db: DBConnect[AsyncSession], work: Work | None) -> Callable[[], Awaitable[Any]]:
    """Return what gives an endpoint the session for its work, or nothing if that does not ask."""

    async def nothing() -> None:
        return None

    return (lambda: db_session(db)) if getattr(work, "asks", True) else nothing


def using(engine: AsyncEngine, work: Work) -> Callable[[], Awaitable[None]]:
    """Return what an endpoint does: the work on the unit's session, or without one if the work does not ask."""
    db = connect_to(engine)

    async def use() -> None:
        await work(await db_session(db) if getattr(work, "asks", True) else None)

    return use


# ------------------------------------------------------------------------------------------------------------------ pure ASGI


async def _asgi_answer(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def _asgi_bare(scope: Any, receive: Any, send: Any) -> None:
    await _asgi_answer(send)


def asgi_bare(engine: AsyncEngine, work: Work | None) -> Any:
    """Nothing but the answer."""
    return _asgi_bare


def asgi_ours(engine: AsyncEngine, work: Work | None) -> Any:
    """The application in `setup`."""
    from context_sqla_asgi import setup

    if work is None:
        return setup(_asgi_bare)
    use = using(engine, work)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await use()
        await _asgi_answer(send)

    return setup(app)


def asgi_seed(engine: AsyncEngine, work: Work | None) -> Any:
    """context-async-sqlalchemy's middleware."""
    from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware

    return ASGIHTTPDBSessionMiddleware(_asgi_bare)


_floor: ContextVar[Any] = ContextVar("floor")


def _floor_around(app: Any) -> Any:
    """The least that a middleware of this kind can do: a variable set and reset, the two messages looked at."""

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        sessions: dict[str, Any] = {}
        token = _floor.set(sessions)

        async def look(message: Any) -> None:
            if sessions:
                raise AssertionError
            await send(message)

        try:
            await app(scope, receive, look)
        finally:
            _floor.reset(token)

    return middleware


def asgi_floor(engine: AsyncEngine, work: Work | None) -> Any:
    """A minimal middleware."""
    return _floor_around(_asgi_bare)


def _passing_on(app: Any) -> Any:
    """Middleware that only calls the next."""

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return middleware


# ------------------------------------------------------------------------------------------------------------------ Starlette


def _starlette(work: Work | None = None, session: Callable[[], Any] | None = None) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def endpoint(request: Any) -> Any:
        if work is not None and session is not None:
            await work(await session())
        return PlainTextResponse("ok")

    return Starlette(routes=[Route("/", endpoint)])


def starlette_bare(engine: AsyncEngine, work: Work | None) -> Any:
    """Starlette alone."""
    return _starlette()


def starlette_floor(engine: AsyncEngine, work: Work | None) -> Any:
    """A minimal middleware."""
    app = _starlette()
    app.add_middleware(_floor_around)
    return app


def starlette_no_op(engine: AsyncEngine, work: Work | None) -> Any:
    """A middleware that only calls the next."""
    app = _starlette()
    app.add_middleware(_passing_on)
    return app


def starlette_ours(engine: AsyncEngine, work: Work | None) -> Any:
    """`setup`: in one part."""
    from context_sqla_starlette import setup

    db = connect_to(engine)
    app = _starlette(work, session_of(db, work))
    setup(app)
    return app


def starlette_ours_two_parts(engine: AsyncEngine, work: Work | None) -> Any:
    """`setup` of an application with middleware: in two parts."""
    from context_sqla_starlette import setup

    app = starlette_no_op(engine, work)
    setup(app)
    return app


def starlette_ours_one_part(engine: AsyncEngine, work: Work | None) -> Any:
    """The middleware class, in one part."""
    from context_sqla_starlette import add_starlette_http_db_session_middleware

    db = connect_to(engine)
    app = _starlette(work, lambda: db_session(db))
    add_starlette_http_db_session_middleware(app)
    return app


def starlette_seed(engine: AsyncEngine, work: Work | None) -> Any:
    """context-async-sqlalchemy's Starlette middleware."""
    from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware

    app = _starlette()
    add_starlette_http_db_session_middleware(app)
    return app


def starlette_seed_asgi(engine: AsyncEngine, work: Work | None) -> Any:
    """context-async-sqlalchemy's ASGI middleware."""
    from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware

    app = _starlette()
    app.add_middleware(ASGIHTTPDBSessionMiddleware)
    return app


def starlette_advanced_alchemy(engine: AsyncEngine, work: Work | None) -> Any:
    """advanced-alchemy's extension, committing by itself."""
    from advanced_alchemy.extensions.starlette import AdvancedAlchemy, SQLAlchemyAsyncConfig

    app = _starlette()
    AdvancedAlchemy(SQLAlchemyAsyncConfig(engine_instance=engine, commit_mode="autocommit"), app)
    return app


# -------------------------------------------------------------------------------------------------------------------- FastAPI


def _fastapi(work: Work | None = None, session: Callable[[], Any] | None = None) -> Any:
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/")
    async def endpoint() -> str:
        if work is not None and session is not None:
            await work(await session())
        return "ok"

    return app


def fastapi_bare(engine: AsyncEngine, work: Work | None) -> Any:
    """FastAPI alone."""
    return _fastapi()


def fastapi_floor(engine: AsyncEngine, work: Work | None) -> Any:
    """A minimal middleware."""
    app = _fastapi()
    app.add_middleware(_floor_around)
    return app


def fastapi_no_op(engine: AsyncEngine, work: Work | None) -> Any:
    """A middleware that only calls the next."""
    app = _fastapi()
    app.add_middleware(_passing_on)
    return app


def fastapi_ours_two_parts(engine: AsyncEngine, work: Work | None) -> Any:
    """`setup` of an application with middleware: in two parts."""
    from context_sqla_fastapi import setup

    app = fastapi_no_op(engine, work)
    setup(app)
    return app


def fastapi_hand(engine: AsyncEngine, work: Work | None) -> Any:
    """A session and its transaction in the handler."""
    from fastapi import FastAPI

    app, maker = FastAPI(), maker_of(engine)

    @app.get("/")
    async def endpoint() -> str:
        async with maker() as session, session.begin():
            if work is not None:
                await work(session)
        return "ok"

    return app


def fastapi_ours(engine: AsyncEngine, work: Work | None) -> Any:
    """`setup`."""
    from context_sqla_fastapi import setup

    db = connect_to(engine)
    app = _fastapi(work, session_of(db, work))
    setup(app)
    return app


def fastapi_depends(engine: AsyncEngine, work: Work | None) -> Any:
    """A dependency that yields the session and commits after the endpoint."""
    from fastapi import Depends, FastAPI

    app, maker = FastAPI(), maker_of(engine)

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with maker() as session, session.begin():
            yield session

    @app.get("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(get_session)]) -> str:
        if work is not None:
            await work(session)
        return "ok"

    return app


def fastapi_seed(engine: AsyncEngine, work: Work | None) -> Any:
    """context-async-sqlalchemy with its helper for FastAPI."""
    from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware

    app = _fastapi(work, _seed_session(engine))
    add_fastapi_http_db_session_middleware(app)
    return app


def fastapi_seed_asgi(engine: AsyncEngine, work: Work | None) -> Any:
    """context-async-sqlalchemy with its ASGI middleware."""
    from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware

    app = _fastapi(work, _seed_session(engine))
    app.add_middleware(ASGIHTTPDBSessionMiddleware)
    return app


def _seed_session(engine: AsyncEngine) -> Callable[[], Any]:
    from context_async_sqlalchemy import DBConnect as SeedConnect
    from context_async_sqlalchemy import db_session as seed_session

    db = SeedConnect(engine_creator=lambda host: engine, session_maker_creator=maker_of, host="localhost")
    return lambda: seed_session(db)


def fastapi_async_sqlalchemy(engine: AsyncEngine, work: Work | None) -> Any:
    """fastapi-async-sqlalchemy, committing at the end."""
    from fastapi_async_sqlalchemy.middleware import create_middleware_and_session_proxy

    middleware, proxy = create_middleware_and_session_proxy()

    async def session() -> Any:
        return proxy.session

    app = _fastapi(work, session)
    app.add_middleware(middleware, custom_engine=engine, commit_on_exit=True)
    return app


def fastapi_advanced_alchemy(engine: AsyncEngine, work: Work | None) -> Any:
    """advanced-alchemy's extension, committing by itself."""
    from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, SQLAlchemyAsyncConfig
    from fastapi import Depends, FastAPI

    app = FastAPI() if work is not None else _fastapi()
    alchemy = AdvancedAlchemy(SQLAlchemyAsyncConfig(engine_instance=engine, commit_mode="autocommit"), app)
    if work is not None:

        @app.get("/")
        async def endpoint(session: Annotated[AsyncSession, Depends(alchemy.provide_session())]) -> str:
            await work(session)
            return "ok"

    return app


def fastapi_sqla(engine: AsyncEngine, work: Work | None) -> Any:
    """fastapi-sqla's middleware, on an engine of ours instead of one from the environment."""
    import fastapi_sqla.async_sqla as library
    from fastapi import FastAPI

    library._async_session_factories["default"] = maker_of(engine)  # type: ignore[assignment]
    app = FastAPI() if work is not None else _fastapi()
    app.add_middleware(library.AsyncSessionMiddleware)
    if work is not None:

        @app.get("/")
        async def endpoint(session: library.AsyncSession) -> str:  # type: ignore[name-defined]
            await work(session)
            return "ok"

    return app


# ------------------------------------------------------------------------------------------------------------------- Litestar


def _litestar(use: Callable[[], Awaitable[None]] | None = None, **options: Any) -> Any:
    from litestar import Litestar, get

    @get("/")
    async def endpoint() -> str:
        if use is not None:
            await use()
        return "ok"

    return Litestar([endpoint], openapi_config=None, **options)


def litestar_bare(engine: AsyncEngine, work: Work | None) -> Any:
    """Litestar alone."""
    return _litestar()


def litestar_ours(engine: AsyncEngine, work: Work | None) -> Any:
    """The plugin."""
    from context_sqla_litestar import ContextSQLAPlugin

    return _litestar(using(engine, work) if work is not None else None, plugins=[ContextSQLAPlugin()])


def litestar_no_op(engine: AsyncEngine, work: Work | None) -> Any:
    """A middleware that only calls the next."""
    return _litestar(middleware=[_passing_on])


def litestar_floor(engine: AsyncEngine, work: Work | None) -> Any:
    """A minimal middleware."""
    return _litestar(middleware=[_floor_around])


def litestar_advanced_alchemy(engine: AsyncEngine, work: Work | None) -> Any:
    """advanced-alchemy's plugin, committing by itself."""
    from advanced_alchemy.extensions.litestar import SQLAlchemyAsyncConfig, SQLAlchemyPlugin

    config = SQLAlchemyAsyncConfig(engine_instance=engine, before_send_handler="autocommit")
    return _litestar(plugins=[SQLAlchemyPlugin(config=config)])


# ---------------------------------------------------------------------------------------------------------------------- Quart


def _quart(use: Callable[[], Awaitable[None]] | None = None) -> Any:
    from quart import Quart

    app = Quart(__name__)

    @app.get("/")
    async def endpoint() -> str:
        if use is not None:
            await use()
        return "ok"

    return app


def quart_bare(engine: AsyncEngine, work: Work | None) -> Any:
    """Quart alone."""
    return _quart()


def quart_ours(engine: AsyncEngine, work: Work | None) -> Any:
    """`setup`."""
    from context_sqla_quart import setup

    app = _quart(using(engine, work) if work is not None else None)
    setup(app)
    return app


def quart_no_op(engine: AsyncEngine, work: Work | None) -> Any:
    """One `after_request` function that only returns the response."""
    app = _quart()

    @app.after_request
    async def pass_on(response: Any) -> Any:
        return response

    return app


def quart_floor(engine: AsyncEngine, work: Work | None) -> Any:
    """A minimal middleware."""
    app = _quart()
    app.asgi_app = _floor_around(app.asgi_app)
    return app


# --------------------------------------------------------------------------------------------------------------------- Falcon


def _falcon(use: Callable[[], Awaitable[None]] | None = None) -> Any:
    import falcon.asgi

    class Resource:
        async def on_get(self, req: Any, resp: Any) -> None:
            if use is not None:
                await use()
            resp.text = "ok"

    app: Any = falcon.asgi.App()
    app.add_route("/", Resource())
    return app


def falcon_bare(engine: AsyncEngine, work: Work | None) -> Any:
    """Falcon alone."""
    return _falcon()


def falcon_ours(engine: AsyncEngine, work: Work | None) -> Any:
    """`setup`."""
    from context_sqla_falcon import setup

    app = _falcon(using(engine, work) if work is not None else None)
    setup(app)
    return app


def falcon_no_op(engine: AsyncEngine, work: Work | None) -> Any:
    """A middleware that does nothing after the responder."""

    class PassOn:
        async def process_response(self, req: Any, resp: Any, resource: Any, req_succeeded: bool) -> None:
            return None

    app = _falcon()
    app.add_middleware(PassOn())
    return app


# -------------------------------------------------------------------------------------------------------------------- aiohttp


def _aiohttp(*middlewares: Any, use: Callable[[], Awaitable[None]] | None = None) -> Any:
    from aiohttp import web

    async def handler(request: web.Request) -> web.Response:
        if use is not None:
            await use()
        return web.Response(text="ok")

    app = web.Application(middlewares=middlewares)
    app.router.add_get("/", handler)
    return app


def aiohttp_bare(engine: AsyncEngine, work: Work | None) -> Any:
    """An aiohttp application alone."""
    return _aiohttp()


def aiohttp_ours(engine: AsyncEngine, work: Work | None) -> Any:
    """`setup`."""
    from context_sqla_aiohttp import setup

    app = _aiohttp(use=using(engine, work) if work is not None else None)
    setup(app)
    return app


def aiohttp_no_op(engine: AsyncEngine, work: Work | None) -> Any:
    """A middleware that only calls the next."""
    from aiohttp import web

    @web.middleware
    async def pass_on(request: web.Request, handler: Any) -> web.StreamResponse:
        answer: web.StreamResponse = await handler(request)
        return answer

    return _aiohttp(pass_on)


def aiohttp_floor(engine: AsyncEngine, work: Work | None) -> Any:
    """A minimal middleware."""
    from aiohttp import web

    @web.middleware
    async def floor(request: web.Request, handler: Any) -> web.StreamResponse:
        sessions: dict[str, Any] = {}
        token = _floor.set(sessions)
        try:
            answer: web.StreamResponse = await handler(request)
            if sessions:
                raise AssertionError
            return answer
        finally:
            _floor.reset(token)

    return _aiohttp(floor)


def aiohttp_sqlalchemy(engine: AsyncEngine, work: Work | None) -> Any:
    """aiohttp-sqlalchemy's middleware."""
    import aiohttp_sqlalchemy as library

    app = _aiohttp()
    library.setup(app, [library.bind(maker_of(engine))])
    return app


# ---------------------------------------------------------------------------------------------------------------------- Sanic


def _sanic(name: str, use: Callable[[], Awaitable[None]] | None = None) -> Any:
    from sanic import Sanic
    from sanic.response import text

    Sanic.test_mode = True  # several applications in one process, whatever their names
    app: Any = Sanic(name, configure_logging=False)

    @app.get("/")
    async def handler(request: Any) -> Any:
        if use is not None:
            await use()
        return text("ok")

    return app


def sanic_bare(engine: AsyncEngine, work: Work | None) -> Any:
    """Sanic alone."""
    return _sanic("bare")


def sanic_ours(engine: AsyncEngine, work: Work | None) -> Any:
    """`setup`."""
    from context_sqla_sanic import setup

    app = _sanic("ours", using(engine, work) if work is not None else None)
    setup(app)
    return app


def sanic_no_op(engine: AsyncEngine, work: Work | None) -> Any:
    """A response middleware that does nothing."""
    app = _sanic("no-op")

    @app.on_response
    async def pass_on(request: Any, response: Any) -> None:
        return None

    return app


def sanic_floor(engine: AsyncEngine, work: Work | None) -> Any:
    """The same as two middlewares, for Sanic has none around its handlers."""
    app = _sanic("floor")

    @app.on_request
    async def begin(request: Any) -> None:
        request.ctx.token = _floor.set({})

    @app.on_response
    async def end(request: Any, response: Any) -> None:
        if _floor.get():
            raise AssertionError
        _floor.reset(request.ctx.token)

    return app


# ----------------------------------------------------------------------------------------------------------------- how they run


async def drive(framework: str, app: Any) -> Callable[[int], Awaitable[None]]:
    """Make the application ready, and return what gives it requests."""
    if framework == "aiohttp":
        from aiohttp import web

        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        server = runner.server
        if server is None:
            raise AssertionError("the runner has no server")
        return protocol(server)
    if framework == "sanic":
        return await _drive_sanic(app)
    return asgi(app)


async def _drive_sanic(app: Any) -> Callable[[int], Awaitable[None]]:
    """Sanic rewrites methods of its classes for the application that starts, so each contender brings its own back."""
    from sanic.application.constants import ServerStage
    from sanic.application.state import ApplicationServerInfo
    from sanic.server.protocols.http_protocol import HttpProtocol
    from sanic.touchup.service import TouchUp

    await app._startup()
    app.state.server_info.append(ApplicationServerInfo({}, ServerStage.SERVING))
    await app._server_event("init", "before")
    loop = asyncio.get_running_loop()
    drive_one = protocol(lambda: HttpProtocol(loop=loop, app=app, connections=set()))
    methods = {(target, name): getattr(target, name) for target, name in TouchUp._registry}

    async def run(count: int) -> None:
        for (target, name), method in methods.items():
            setattr(target, name, method)
        await drive_one(count)

    return run


BARE = "bare"
OURS = "context-sqla"
NO_DB: Mapping[str, Mapping[str, tuple[Make, str | None]]] = {
    "asgi": {
        BARE: (asgi_bare, None),
        OURS: (asgi_ours, None),
        "floor: a minimal middleware": (asgi_floor, None),
        "context-async-sqlalchemy": (asgi_seed, "context_async_sqlalchemy"),
    },
    "starlette": {
        BARE: (starlette_bare, None),
        OURS: (starlette_ours, None),
        "floor: a minimal middleware": (starlette_floor, None),
        "a middleware that does nothing": (starlette_no_op, None),
        "context-sqla, and that middleware": (starlette_ours_two_parts, None),
        "context-sqla, the class": (starlette_ours_one_part, None),
        "context-async-sqlalchemy": (starlette_seed, "context_async_sqlalchemy"),
        "context-async-sqlalchemy, its ASGI class": (starlette_seed_asgi, "context_async_sqlalchemy"),
        "advanced-alchemy": (starlette_advanced_alchemy, "advanced_alchemy"),
    },
    "fastapi": {
        BARE: (fastapi_bare, None),
        OURS: (fastapi_ours, None),
        "floor: a minimal middleware": (fastapi_floor, None),
        "a middleware that does nothing": (fastapi_no_op, None),
        "context-sqla, and that middleware": (fastapi_ours_two_parts, None),
        "Depends(yield)": (fastapi_depends, None),
        "context-async-sqlalchemy": (fastapi_seed, "context_async_sqlalchemy"),
        "context-async-sqlalchemy, its ASGI class": (fastapi_seed_asgi, "context_async_sqlalchemy"),
        "fastapi-async-sqlalchemy": (fastapi_async_sqlalchemy, "fastapi_async_sqlalchemy"),
        "advanced-alchemy": (fastapi_advanced_alchemy, "advanced_alchemy"),
        "fastapi-sqla": (fastapi_sqla, "fastapi_sqla"),
    },
    "litestar": {
        BARE: (litestar_bare, None),
        OURS: (litestar_ours, None),
        "floor: a minimal middleware": (litestar_floor, None),
        "a middleware that does nothing": (litestar_no_op, None),
        "advanced-alchemy": (litestar_advanced_alchemy, "advanced_alchemy"),
    },
    "quart": {
        BARE: (quart_bare, None),
        OURS: (quart_ours, None),
        "floor: a minimal middleware": (quart_floor, None),
        "a function that does nothing": (quart_no_op, None),
    },
    "falcon": {
        BARE: (falcon_bare, None),
        OURS: (falcon_ours, None),
        "a middleware that does nothing": (falcon_no_op, None),
    },
    "aiohttp": {
        BARE: (aiohttp_bare, None),
        OURS: (aiohttp_ours, None),
        "floor: a minimal middleware": (aiohttp_floor, None),
        "a middleware that does nothing": (aiohttp_no_op, None),
        "aiohttp-sqlalchemy": (aiohttp_sqlalchemy, "aiohttp_sqlalchemy"),
    },
    "sanic": {
        BARE: (sanic_bare, None),
        OURS: (sanic_ours, None),
        "floor: a minimal middleware": (sanic_floor, None),
        "a middleware that does nothing": (sanic_no_op, None),
    },
}
WITH_SESSION: Mapping[str, tuple[Make, str | None]] = {
    "by hand": (fastapi_hand, None),
    OURS: (fastapi_ours, None),
    "Depends(yield)": (fastapi_depends, None),
    "context-async-sqlalchemy": (fastapi_seed, "context_async_sqlalchemy"),
    "context-async-sqlalchemy, its ASGI class": (fastapi_seed_asgi, "context_async_sqlalchemy"),
    "fastapi-async-sqlalchemy": (fastapi_async_sqlalchemy, "fastapi_async_sqlalchemy"),
    "advanced-alchemy": (fastapi_advanced_alchemy, "advanced_alchemy"),
    "fastapi-sqla": (fastapi_sqla, "fastapi_sqla"),
}
