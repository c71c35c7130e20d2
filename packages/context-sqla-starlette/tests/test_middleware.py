"""Middleware that the application's owner places by hand."""

import asyncio

import pytest
from context_sqla import ContextClosedError, UnavailableError, is_context_initiated, keep_transaction
from context_sqla_starlette import (
    StarletteHTTPDBSessionMiddleware,
    add_starlette_http_db_session_middleware,
    setup,
    starlette_http_db_session_middleware,
)
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, Router


async def conflict(request, exc):
    return PlainTextResponse("conflict", 409)


@pytest.fixture(name="routes")
def _routes(ledger):
    async def write(request):
        await ledger.write("a")
        return PlainTextResponse("ok", int(request.query_params.get("status", "200")))

    async def crash(request):
        await ledger.write("a")
        raise LookupError

    async def orphan(request):
        await ledger.write_orphan("a")
        return PlainTextResponse("ok")

    async def kept(request):
        await ledger.write("a")
        await keep_transaction(ledger.db)
        return PlainTextResponse("ok")

    async def stream(request):
        await ledger.write("a")

        async def body():
            yield b"1"
            await ledger.write("b")
            yield b"2"

        return StreamingResponse(body())

    async def background(request):
        await ledger.write("a")
        return PlainTextResponse("ok", background=BackgroundTask(ledger.write, "b"))

    async def unavailable(request):
        raise UnavailableError("no master")

    endpoints = (write, crash, orphan, kept, stream, background, unavailable)
    return [Route(f"/{endpoint.__name__}", endpoint) for endpoint in endpoints]


def by_class(routes, **options):
    return Starlette(routes=routes, middleware=[Middleware(StarletteHTTPDBSessionMiddleware, **options)])


def by_function(routes, **options):
    app = Starlette(routes=routes)
    add_starlette_http_db_session_middleware(app, **options)
    return app


def by_dispatch(routes, **options):
    async def dispatch(request, call_next):
        return await starlette_http_db_session_middleware(request, call_next, **options)

    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=dispatch)])


@pytest.fixture(name="make", params=[by_class, by_function, by_dispatch])
def _make(request):
    return request.param


@pytest.fixture(name="make_whole", params=[by_class, by_function])
def _make_whole(request):
    """Those that keep more than the function can."""
    return request.param


@pytest.mark.parametrize(
    ("path", "status", "rows"),
    [
        ("/write", 200, "a"),
        ("/write?status=400", 400, ""),
        ("/crash", 500, ""),
        ("/orphan", 500, ""),
        ("/kept", 200, "a"),
        ("/nowhere", 404, ""),
    ],
)
async def test_status_decides(make, routes, ledger, client_of, path, status, rows):
    """Below 400 commits, the rest rolls back (P3)."""
    client = await client_of(make(routes))

    response = await client.get(path)

    assert response.status_code == status
    assert ledger.names() == rows


async def test_commit_comes_before_the_head(make, routes, messages_of):
    """No byte of the head leaves before the commit has succeeded (P4)."""
    log = await messages_of(make(routes), "/write")

    assert log[0] == "start 200 [a]"


async def test_options_are_taken(make, routes, ledger, client_of):
    """`should_commit` and `before_commit` mean the same everywhere (P3, P14)."""
    asked = []

    async def before_commit(session):
        asked.append(session)

    client = await client_of(make(routes, before_commit=before_commit, should_commit=lambda status: status == 400))

    await client.get("/write?status=400")

    assert ledger.names() == "a"
    assert len(asked) == 1


async def test_unit_is_over_after_the_request(make, routes, client_of):
    """A client in the same task sees no unit afterwards (P8)."""
    client = await client_of(make(routes))

    await client.get("/write")

    assert not is_context_initiated()


async def test_handler_answers_a_failed_commit(make_whole, routes, client_of):
    """The class finds the application's handlers by itself, and outer middleware applies (P4b)."""
    app = make_whole(routes)
    app.add_exception_handler(IntegrityError, conflict)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    client = await client_of(app)

    response = await client.get("/orphan", headers={"origin": "http://elsewhere"})

    assert response.status_code == 409
    assert response.headers["access-control-allow-origin"] == "*"


async def test_background_work_of_the_answer_is_committed(make_whole, routes, ledger, client_of):
    """The handler's answer to a failed commit is an answer like any other (P6)."""

    async def handler(request, exc):
        return PlainTextResponse("conflict", 409, background=BackgroundTask(ledger.write, "b"))

    app = make_whole(routes)
    app.add_exception_handler(IntegrityError, handler)
    client = await client_of(app)

    await client.get("/orphan")

    assert ledger.names() == "b"


async def test_unavailable_database_is_503(make_whole, routes, client_of):
    """The class answers what no handler did."""
    client = await client_of(make_whole(routes))

    response = await client.get("/unavailable")

    assert response.status_code == 503


async def test_body_and_background_work_are_committed(make_whole, routes, ledger, messages_of):
    """The class follows the response to its end (P5, P6)."""
    app = make_whole(routes)

    stream = await messages_of(app, "/stream")
    await messages_of(app, "/background")

    assert stream == ["start 200 [a]", "body 1+ [a]", "body 2+ [a]", "body  [a b]"]
    assert ledger.names() == "a a b b"


async def test_class_around_a_router_without_an_application(routes, ledger, messages_of):
    """Where there are no handlers the error of the commit goes on (P4)."""
    app = StarletteHTTPDBSessionMiddleware(Router(routes))

    with pytest.raises(IntegrityError):
        await messages_of(app, "/orphan")


async def test_function_ends_the_unit_with_the_head(ledger, client_of):
    """A body generator or background task that asks later is told what to do, never left without a commit (P10)."""
    told = []

    async def ask():
        try:
            await ledger.write("a")
        except ContextClosedError as error:
            told.append(str(error))

    async def endpoint(request):
        async def body():
            yield b"1"
            await asyncio.wait_for(head.wait(), 5)
            await ask()

        return StreamingResponse(body(), background=BackgroundTask(ask))

    head = asyncio.Event()
    app = by_dispatch([Route("/", endpoint)])

    async def wait(request, call_next):
        response = await call_next(request)
        head.set()
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=wait)
    client = await client_of(app)

    await client.get("/")

    assert len(told) == 2
    assert all("run_in_new_ctx" in text for text in told)


@pytest.mark.parametrize("make_inner", [by_class, by_dispatch, "setup"])
@pytest.mark.parametrize("make_outer", [by_class, by_dispatch, "setup"])
async def test_request_that_passes_twice_has_one_unit(routes, ledger, client_of, make_outer, make_inner):
    """An application and one that is mounted in it may both have the middleware (P12)."""
    seen = []

    async def both(scope, receive, send):
        seen.append(await ledger.session())
        await inner(scope, receive, send)

    async def endpoint(request):
        seen.append(await ledger.session())
        await ledger.write("a")
        return PlainTextResponse("ok")

    def make(how, routes):
        if how != "setup":
            return how(routes)
        app = Starlette(routes=routes)
        setup(app)
        return app

    inner = make(make_inner, [Route("/", endpoint)])
    outer = make(make_outer, [])
    outer.mount("/", both)
    client = await client_of(outer)

    response = await client.get("/")

    assert response.status_code == 200
    assert seen[0] is seen[1]
    assert ledger.names() == "a"
