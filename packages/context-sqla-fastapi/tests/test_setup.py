"""FastAPI's own ways: dependencies, routers, and the unit of work around them."""

import asyncio
import functools
import gc
import weakref
from typing import Annotated

import fastapi
import pytest
from context_sqla import UnavailableError, db_context, db_session
from context_sqla.adapters import AsyncSession
from context_sqla.errors import SetupError
from context_sqla_asgi import SCOPE_KEY
from context_sqla_fastapi import (
    FastAPIHTTPDBSessionMiddleware,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
    session_dependency,
    setup,
)
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError


async def conflict(request, exc):
    return JSONResponse({"detail": "conflict"}, 409)


def by_setup(app, db, **options):
    setup(app, db, **options)


def by_function(app, db, **options):
    add_fastapi_http_db_session_middleware(app, **options)


def by_class(app, db, **options):
    app.user_middleware.append(Middleware(FastAPIHTTPDBSessionMiddleware, **options))


def by_dispatch(app, db, **options):
    @app.middleware("http")
    async def dispatch(request, call_next):
        return await fastapi_http_db_session_middleware(request, call_next, **options)


VERSION = tuple(map(int, fastapi.__version__.split(".")[:2]))
WHOLE = [by_setup, by_function, by_class]


@pytest.mark.parametrize("install", [*WHOLE, by_dispatch])
async def test_status_decides(ledger, client_of, install):
    """Answers, exceptions and refused parameters (P3)."""
    app = FastAPI()

    @app.post("/write/{status}")
    async def write(status: int):
        await ledger.write(str(status))
        if status >= 400:
            raise HTTPException(status)
        return status

    install(app, ledger.db)
    client = await client_of(app)

    statuses = [(await client.post(f"/write/{status}")).status_code for status in ("200", "409", "word")]

    assert statuses == [200, 409, 422]
    assert ledger.names() == "200"


@pytest.mark.parametrize("install", [*WHOLE, by_dispatch])
async def test_options_are_taken(ledger, client_of, install):
    """`should_commit` and `before_commit` mean the same everywhere (P3, P14)."""
    app = FastAPI()
    asked = []

    async def before_commit(session):
        asked.append(session)

    @app.get("/")
    async def write():
        await ledger.write("a")
        return JSONResponse(None, 400)

    install(app, ledger.db, before_commit=before_commit, should_commit=lambda status: status == 400)
    client = await client_of(app)

    await client.get("/")

    assert ledger.names() == "a"
    assert len(asked) == 1


@pytest.mark.parametrize("install", WHOLE)
async def test_handler_answers_a_failed_commit(ledger, client_of, install):
    """A registered handler answers as if the endpoint had raised the error (P4b)."""
    app = FastAPI()
    app.exception_handler(IntegrityError)(conflict)

    @app.get("/")
    async def orphan():
        await ledger.write_orphan("a")

    install(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/")

    assert (response.status_code, response.json()) == (409, {"detail": "conflict"})
    assert ledger.names() == ""


@pytest.mark.parametrize("install", WHOLE)
async def test_unavailable_database_is_503(ledger, client_of, install):
    """With the time after which the client may try again."""
    app = FastAPI()

    @app.get("/")
    async def unavailable():
        raise UnavailableError("no master", retry_after=7)

    install(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/")

    assert (response.status_code, response.headers["retry-after"]) == (503, "7")


async def test_default_answer_to_unavailable_looks_like_fastapi(ledger, client_of):
    """Clients find its text where FastAPI's own errors have it."""
    app = FastAPI()

    @app.get("/")
    async def unavailable():
        raise UnavailableError("no master")

    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/")

    assert response.json() == {"detail": "Service Unavailable"}


async def test_second_setup_is_an_error(ledger):
    """Two units would be one too many."""
    app = FastAPI()
    setup(app, ledger.db)

    with pytest.raises(SetupError):
        setup(app, ledger.db)


async def test_session_dependency_gives_the_unit_its_session(ledger, client_of):
    """It is the session that `db_session` gives, and the unit commits it (P2)."""
    Session = Annotated[AsyncSession, session_dependency(ledger.db)]
    app = FastAPI()

    def nested(session: Session):
        return session

    @app.get("/")
    async def endpoint(session: Session, same: Annotated[AsyncSession, Depends(nested)]):
        await session.execute(text("INSERT INTO item (name) VALUES ('a')"))
        return session is same is await db_session(ledger.db)

    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/")

    assert response.json() is True
    assert ledger.names() == "a"


async def test_session_dependency_can_be_overridden(ledger, client_of):
    """Its function is what `dependency_overrides` needs."""
    dependency = session_dependency(ledger.db)
    app = FastAPI()
    app.dependency_overrides[dependency.dependency] = lambda: "another"

    @app.get("/")
    async def endpoint(session: Annotated[AsyncSession, dependency]):
        return session

    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/")

    assert response.json() == "another"


async def test_dependencies_work_in_the_unit(ledger, client_of):
    """What a dependency writes before its `yield` commits with the request, after it at the end (P3, P6)."""
    app = FastAPI()
    seen = []

    async def dependency():
        await ledger.write("before")
        try:
            yield
        finally:
            await ledger.write("after")

    @app.get("/")
    async def endpoint(_: Annotated[None, Depends(dependency)], background: BackgroundTasks):
        background.add_task(ledger.write, "background")
        seen.append(ledger.names())

    setup(app, ledger.db)
    client = await client_of(app)

    await client.get("/")

    assert seen == [""]
    assert ledger.names() == "after background before"


@pytest.mark.skipif(VERSION < (0, 118), reason="in this version of FastAPI dependencies end before the head")
async def test_dependency_sees_the_failed_commit(ledger, client_of):
    """It can clean up after it."""
    app = FastAPI()
    seen = []

    async def dependency():
        try:
            yield
        except Exception as error:
            seen.append(type(error))
            raise

    @app.get("/")
    async def endpoint(_: Annotated[None, Depends(dependency)]):
        await ledger.write_orphan("a")

    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/")

    assert response.status_code == 500
    assert seen == [IntegrityError]


async def test_middleware_may_open_a_unit_around_the_application(ledger, client_of):
    """The application works in it, and so does the middleware afterwards (P11)."""
    app = FastAPI()
    sessions = []

    class Opens:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            async with db_context():
                sessions.append(await ledger.session())
                await self.app(scope, receive, send)
                sessions.append(await ledger.session())
                await ledger.write("after")

    @app.get("/")
    async def endpoint():
        sessions.append(await ledger.session())
        await ledger.write("endpoint")

    setup(app, ledger.db)
    app.add_middleware(Opens)
    client = await client_of(app)

    await client.get("/")

    assert sessions == [sessions[0]] * 3
    assert ledger.names() == "after endpoint"


@pytest.mark.parametrize("middleware", [False, True], ids=["one part", "two parts"])
@pytest.mark.parametrize("path", ["/nothing", "/write"])
async def test_request_leaves_no_cycle(ledger, messages_of, middleware, path):
    """A request without an error is freed by reference counting alone, unit and all."""
    app = FastAPI()
    units = []

    @app.get("/nothing")
    async def nothing(request: Request):
        units.append(weakref.ref(request.scope[SCOPE_KEY].unit))

    @app.get("/write")
    async def write(request: Request):
        await ledger.write("a")
        units.append(weakref.ref(request.scope[SCOPE_KEY].unit))

    setup(app, ledger.db)
    if middleware:
        app.add_middleware(CORSMiddleware)
    await messages_of(app, path)

    gc.disable()
    try:
        await asyncio.create_task(messages_of(app, path))
        assert units[1]() is None
    finally:
        gc.enable()


def generator():
    yield


async def coroutine():
    pass


class Callable:
    async def __call__(self):
        yield


class Unhashable(Callable):
    __hash__ = None


@functools.wraps(generator)
def wrapper():
    return generator()


@pytest.mark.parametrize(
    ("endpoint", "ahead"),
    [
        (generator, True),
        (wrapper, True),
        (Callable(), True),
        (functools.partial(generator), True),
        (functools.partial(Callable()), True),
        (Unhashable(), True),
        (coroutine, False),
        (functools.partial(coroutine), False),
        (None, False),
    ],
)
async def test_only_generator_endpoints_run_ahead(ledger, endpoint, ahead):
    """Child tasks of other endpoints share the session of the request (P2)."""
    seen = []

    async def app(scope, receive, send):
        unit = scope[SCOPE_KEY].unit

        async def ask():
            return unit.runs_ahead(unit)

        seen.append(await asyncio.create_task(ask()))
        seen.extend(unit.runs_ahead(unit) for _ in range(2))

    await FastAPIHTTPDBSessionMiddleware(app)({"type": "http", "method": "GET", "path": "/", "endpoint": endpoint}, None, None)

    assert seen == [ahead, False, False]


async def test_nobody_is_asked_again_once_the_route_is_known(ledger, client_of):
    """A session that is asked for again is found at once, as in other frameworks; middleware asks before there is a route."""
    app, seen = FastAPI(), []

    async def ask(request):
        await db_session(ledger.db)
        seen.append(request.scope[SCOPE_KEY].unit.runs_ahead is not None)

    @app.middleware("http")
    async def asking(request, call_next):
        await ask(request)
        return await call_next(request)

    @app.get("/")
    async def endpoint(request: Request):
        await ask(request)

    app.add_middleware(FastAPIHTTPDBSessionMiddleware)
    client = await client_of(app)

    assert (await client.get("/")).status_code == 200
    assert seen == [True, False]


async def test_unit_is_named_by_the_template_of_its_path(ledger, client_of):
    """Log lines have the names of parameters, with the prefixes of routers and mounts (P16)."""
    labels = []

    async def endpoint(request: Request, id: str):  # noqa: A002
        labels.append(request.scope[SCOPE_KEY].unit.label())

    router = APIRouter(prefix="/users")
    router.get("/{id}")(endpoint)
    inner = FastAPI()
    inner.get("/things/{id}")(endpoint)
    app = FastAPI()
    app.get("/items/{id}")(endpoint)
    app.include_router(router, prefix="/api")
    app.mount("/inner", inner)
    setup(app)
    client = await client_of(app)

    for path in ("/items/1", "/api/users/2", "/inner/things/3"):
        assert (await client.get(path)).status_code == 200

    old = "GET /things/{id}"  # Starlette before 0.33 takes the mount's prefix off the path
    assert labels in (["GET /items/{id}", "GET /api/users/{id}", label] for label in ("GET /inner/things/{id}", old))
