"""What `setup` places where, and what it keeps."""

import asyncio
import inspect
from contextlib import asynccontextmanager

import pytest
from context_sqla import ContextNotInitiatedError, UnavailableError, db_context, db_session, is_context_initiated
from context_sqla.errors import ContextSqlaError, SetupError
from context_sqla_asgi import SCOPE_KEY
from context_sqla_starlette import setup
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute


class PassOn(BaseHTTPMiddleware):
    """The middleware that copies every response."""

    async def dispatch(self, request, call_next):
        return await call_next(request)


async def conflict(request, exc):
    return PlainTextResponse(f"conflict: {type(exc).__name__}", 409)


async def broken(request, exc):
    return PlainTextResponse(f"broken: {type(exc).__name__}", 500)


@pytest.fixture(name="routes")
def _routes(ledger, tmp_path):
    """An application that writes in every way."""

    async def write(request):
        await ledger.write("a")
        return PlainTextResponse("ok", int(request.query_params.get("status", "200")))

    async def refuse(request):
        await ledger.write("a")
        raise HTTPException(int(request.query_params.get("status", "400")))

    async def redirect(request):
        await ledger.write("a")
        return RedirectResponse("/elsewhere")

    async def crash(request):
        await ledger.write("a")
        raise LookupError

    async def orphan(request):
        await request.body()
        await ledger.write_orphan("a")
        return PlainTextResponse("ok", background=BackgroundTask(ledger.write, "never"))

    async def stream(request):
        await ledger.write("a")

        async def body():
            await ledger.write("b")
            yield b"1"
            await ledger.write("c")
            yield b"2"

        return StreamingResponse(body())

    async def failing_stream(request):
        await ledger.write("a")

        async def body():
            await ledger.write("b")
            yield b"1"
            raise LookupError

        return StreamingResponse(body())

    async def orphan_stream(request):
        await ledger.write("a")

        async def body():
            await ledger.write_orphan("b")
            yield b"1"

        return StreamingResponse(body())

    async def file(request):
        await ledger.write("a")
        path = tmp_path / "file"
        await asyncio.to_thread(path.write_text, "content")
        return FileResponse(path)

    async def background(request):
        await ledger.write("a")
        status = int(request.query_params.get("status", "200"))
        return PlainTextResponse("ok", status, background=BackgroundTask(ledger.write, "b"))

    async def failing_background(request):
        async def work():
            await ledger.write("b")
            raise LookupError

        await ledger.write("a")
        return PlainTextResponse("ok", background=BackgroundTask(work))

    async def unavailable(request):
        await ledger.write("a")
        raise UnavailableError("no master", retry_after=7)

    async def nothing(request):
        return PlainTextResponse("ok")

    endpoints = (
        write,
        refuse,
        redirect,
        crash,
        orphan,
        stream,
        failing_stream,
        orphan_stream,
        file,
        background,
        failing_background,
        unavailable,
        nothing,
    )
    return [Route(f"/{endpoint.__name__}", endpoint, methods=["GET", "POST"]) for endpoint in endpoints]


@pytest.fixture(name="app", params=["bare", "passing on", "compressing", "both, set up first"])
def _app(request, routes, ledger):
    """The application, alone and with the middleware that is known to copy or hold responses."""
    app = Starlette(routes=routes)
    if "first" in request.param:
        setup(app, ledger.db)
    if request.param != "bare" and "passing" not in request.param:
        app.add_middleware(GZipMiddleware, minimum_size=1)
    if request.param != "bare" and "compressing" not in request.param:
        app.add_middleware(PassOn)
    if "first" not in request.param:
        setup(app, ledger.db)
    return app


@pytest.mark.parametrize(
    ("path", "status", "rows"),
    [
        ("/write", 200, "a"),
        ("/write?status=399", 399, "a"),
        ("/write?status=400", 400, ""),
        ("/refuse", 400, ""),
        ("/refuse?status=304", 304, "a"),
        ("/redirect", 307, "a"),
        ("/crash", 500, ""),
        ("/orphan", 500, ""),
        ("/stream", 200, "a b c"),
        ("/file", 200, "a"),
        ("/background", 200, "a b"),
        ("/background?status=404", 404, "b"),
        ("/failing_background", 200, "a"),
        ("/unavailable", 503, ""),
        ("/nowhere", 404, ""),
    ],
)
async def test_status_decides(app, client_of, ledger, path, status, rows):
    """Answers, exceptions, redirects, streams, files and background work, under any middleware (P3, P5, P6)."""
    client = await client_of(app)

    response = await client.get(path)

    assert response.status_code == status
    assert ledger.names() == rows


async def test_commit_comes_before_the_head(app, messages_of):
    """No byte of the head leaves before the commit has succeeded (P4)."""
    log = await messages_of(app, "/write")

    assert log[0] == "start 200 [a]"


async def test_body_is_committed_before_its_last_message(app, messages_of):
    """Neither copying nor compressing middleware moves the commits (P5)."""
    log = await messages_of(app, "/stream")

    assert log[0].startswith("start 200 [a")
    assert log[-1].endswith("[a b c]")


@pytest.mark.parametrize("path", ["/failing_stream", "/orphan_stream"])
async def test_body_that_failed_is_never_complete(app, messages_of, ledger, path):
    """No middleware ends it well for the client (P5)."""
    log = []

    with pytest.raises((LookupError, IntegrityError, ExceptionGroup)):
        await messages_of(app, path, log=log)

    assert all("+" in message for message in log if message.startswith("body"))
    assert ledger.names() == "a"


async def test_handler_answers_a_failed_commit(app, client_of, ledger):
    """As it answers the same error of the endpoint; its background work does not run (P4b)."""
    app.add_exception_handler(IntegrityError, conflict)
    client = await client_of(app)

    response = await client.get("/orphan")

    assert (response.status_code, response.text) == (409, "conflict: IntegrityError")
    assert ledger.names() == ""


@pytest.mark.parametrize("key", [500, Exception])
async def test_last_handler_answers_a_failed_commit(app, client_of, key):
    """Without a handler of its own the error goes to the one for everything, as it is (P4b)."""
    app.add_exception_handler(key, broken)
    client = await client_of(app)

    response = await client.get("/orphan")

    assert (response.status_code, response.text) in [
        (500, "broken: IntegrityError"),
        (500, "broken: ExceptionGroup"),  # old BaseHTTPMiddleware, as for an error of the endpoint
    ]


@pytest.mark.parametrize("handlers", [{500}, {Exception}, {IntegrityError}, {IntegrityError, 500}])
async def test_handlers_are_asked_once_about_a_failed_commit(app, client_of, handlers):
    """By the one that answers, as for an error of the endpoint, whether the unit has one part or two (P4b)."""
    seen = []

    def answer(request, exc):
        seen.append(type(exc).__name__)
        return PlainTextResponse("no", 409)

    for key in handlers:
        app.add_exception_handler(key, answer)
    client = await client_of(app)

    response = await client.get("/orphan")

    assert response.status_code == 409
    assert seen in (["IntegrityError"], ["ExceptionGroup"])  # a group: old BaseHTTPMiddleware


async def test_answer_whose_own_commit_fails_is_a_500(app, client_of, ledger):
    """No client is left without an answer (P4)."""

    async def handler(request, exc):
        await ledger.write_orphan("b")
        return PlainTextResponse("ok")

    app.add_exception_handler(IntegrityError, handler)
    client = await client_of(app)

    response = await client.get("/orphan")

    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert ledger.names() == ""


async def test_last_handler_sees_why_a_body_failed(app, messages_of):
    """It is given the error of the commit, not what Starlette makes of one that has a handler (P4b)."""
    seen = []

    def note(request, exc):
        seen.append(type(exc).__name__)
        return PlainTextResponse("never sent", 500)

    app.add_exception_handler(IntegrityError, conflict)
    app.add_exception_handler(500, note)

    with pytest.raises((IntegrityError, ExceptionGroup)):
        await messages_of(app, "/orphan_stream")

    assert seen in (["IntegrityError"], ["ExceptionGroup"])  # a group: old BaseHTTPMiddleware


async def test_failed_commit_reaches_the_server(app, messages_of):
    """Servers log what was raised: the original error (P4)."""
    log = []

    with pytest.raises((IntegrityError, ExceptionGroup)):  # a group: old BaseHTTPMiddleware
        await messages_of(app, "/orphan", log=log)

    assert log[0] == "start 500 []"


async def test_debug_page_shows_the_commit_error(routes, ledger, client_of):
    """Debug mode works as for any error."""
    app = Starlette(debug=True, routes=routes)
    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/orphan")

    assert response.status_code == 500
    assert "FOREIGN KEY constraint failed" in response.text


async def test_handler_may_read_the_body_again(routes, ledger, client_of):
    """A body that the endpoint has read is empty for the handler; it does not wait for what never comes (P4b)."""

    async def handler(request, exc):
        return PlainTextResponse(f"{await request.body()!r}", 409)

    app = Starlette(routes=routes, exception_handlers={IntegrityError: handler})
    setup(app, ledger.db)
    client = await client_of(app)

    response = await asyncio.wait_for(client.post("/orphan", content=b"content"), 10)

    assert response.text == "b''"


async def test_handler_may_stream_its_answer(routes, ledger, messages_of):
    """A streaming answer listens for the client's leaving meanwhile (P4b)."""

    async def handler(request, exc):
        async def body():
            await ledger.write("b")
            yield b"1"

        return StreamingResponse(body(), 409)

    app = Starlette(routes=routes, exception_handlers={IntegrityError: handler})
    setup(app, ledger.db)

    log = await asyncio.wait_for(messages_of(app, "/orphan"), 10)

    assert log == ["start 409 []", "body 1+ []", "body  []"]


async def test_error_of_the_handler_is_a_500(routes, ledger, client_of):
    """A handler that fails fails as it always does."""

    async def handler(request, exc):
        raise LookupError

    app = Starlette(routes=routes, exception_handlers={IntegrityError: handler, 500: broken})
    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/orphan")

    assert response.text == "broken: LookupError"


async def test_errors_of_the_endpoint_are_left_to_starlette(client_of):
    """A handler that raises again is asked as often as without `setup` (P4b)."""
    seen = []

    async def crash(request):
        raise LookupError

    async def handler(request, exc):
        seen.append(exc)
        raise exc

    plain, app = (Starlette(routes=[Route("/", crash)], exception_handlers={LookupError: handler, 500: broken}) for _ in range(2))
    setup(app)

    await (await client_of(plain)).get("/")
    asked = len(seen)
    response = await (await client_of(app)).get("/")

    assert response.text == "broken: LookupError"
    assert len(seen) == 2 * asked


async def test_http_exception_of_before_commit_is_answered(routes, ledger, client_of):
    """A hook refuses a commit with the status of its choice (P14)."""

    async def refuse(session):
        raise HTTPException(423, "locked")

    app = Starlette(routes=routes)
    setup(app, ledger.db, before_commit=refuse)
    client = await client_of(app)

    response = await client.get("/write")

    assert (response.status_code, response.text) == (423, "locked")
    assert ledger.names() == ""


async def test_should_commit_replaces_the_rule(routes, ledger, client_of):
    """`should_commit` alone decides (P3)."""
    app = Starlette(routes=routes)
    setup(app, ledger.db, should_commit=lambda status: status == 404)
    client = await client_of(app)

    await client.get("/write?status=404")

    assert ledger.names() == "a"


@pytest.mark.parametrize("first", [True, False])
async def test_cors_applies_to_the_answer_to_a_failed_commit(routes, ledger, client_of, first):
    """Outer middleware handles that answer like any other, whenever it was added (P4b)."""
    app = Starlette(routes=routes, exception_handlers={IntegrityError: conflict})
    if first:
        setup(app, ledger.db)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    if not first:
        setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/orphan", headers={"origin": "http://elsewhere"})

    assert response.status_code == 409
    assert response.headers["access-control-allow-origin"] == "*"


async def test_last_handler_sees_the_unit(routes, ledger, client_of):
    """The handler of 500 may ask for a session; what it writes rolls back with its status (P3)."""

    async def handler(request, exc):
        await ledger.write("b")
        return PlainTextResponse("sorry", 500)

    app = Starlette(routes=routes, exception_handlers={500: handler})
    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/crash")

    assert response.text == "sorry"
    assert ledger.names() == ""


def gate(ledger, response, write="a"):
    class Gate:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] != "http":
                return await self.app(scope, receive, send)
            await getattr(ledger, "write_orphan" if write == "orphan" else "write")(write)
            return await response(scope, receive, send)

    return Gate


async def test_middleware_has_the_unit(routes, ledger, messages_of):
    """Middleware that answers by itself commits or rolls back by its status (P3)."""
    app = Starlette(routes=routes, middleware=[Middleware(gate(ledger, RedirectResponse("/login")))])
    setup(app, ledger.db)

    log = await messages_of(app)

    assert log[0] == "start 307 [a]"


async def test_failed_commit_of_middleware_is_answered(routes, ledger, client_of):
    """So is an error of the commit that middleware caused by its own answer (P4b)."""
    app = Starlette(routes=routes, middleware=[Middleware(gate(ledger, PlainTextResponse("ok"), "orphan"))])
    setup(app, ledger.db)
    app.add_exception_handler(IntegrityError, conflict)
    client = await client_of(app)

    response = await client.get("/")

    assert response.status_code == 409


async def test_failed_commit_of_middleware_without_a_handler_is_a_500(routes, ledger, client_of):
    """By the application's handler for everything (P4b)."""
    app = Starlette(routes=routes, middleware=[Middleware(gate(ledger, PlainTextResponse("ok"), "orphan"))])
    setup(app, ledger.db)
    app.add_exception_handler(500, broken)
    client = await client_of(app)

    response = await client.get("/")

    assert response.text == "broken: IntegrityError"


async def test_error_of_the_last_handler_reaches_the_server(routes, ledger, messages_of):
    """What nobody answers is raised."""

    async def handler(request, exc):
        raise KeyError

    app = Starlette(routes=routes, exception_handlers={500: handler})
    setup(app, ledger.db)

    with pytest.raises(KeyError):
        await messages_of(app, "/crash")


@pytest.mark.skipif("max_body_size" not in inspect.signature(Starlette).parameters, reason="this Starlette has no such limit")
@pytest.mark.parametrize("middleware", [[], [Middleware(PassOn)]], ids=["one part", "two parts"])
@pytest.mark.parametrize(("size", "status", "rows"), [(8, 200, "a"), (9, 413, "")])
async def test_request_that_is_too_large_writes_nothing(ledger, client_of, middleware, size, status, rows):
    """Starlette answers 413 in the place of an endpoint that does not read the body, and answers 200 (P3)."""

    async def endpoint(request):
        await ledger.write("a")
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])], middleware=middleware, max_body_size=8)
    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.post("/", content=b"x" * size)

    assert response.status_code == status
    assert ledger.names() == rows


async def test_unavailable_database_is_503(app, client_of):
    """With the time after which the client may try again."""
    client = await client_of(app)

    response = await client.get("/unavailable")

    assert (response.status_code, response.text) == (503, "Service Unavailable")
    assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("cls", [UnavailableError, ContextSqlaError])
async def test_application_answers_unavailable_by_itself(routes, ledger, client_of, cls):
    """Its own handler counts, also one that is registered after `setup`."""
    app = Starlette(routes=routes)
    setup(app, ledger.db)
    app.add_exception_handler(cls, conflict)
    client = await client_of(app)

    response = await client.get("/unavailable")

    assert response.text == "conflict: UnavailableError"


async def test_handler_of_everything_is_no_answer_to_unavailable(routes, ledger, client_of):
    """A 500 would tell the client not to try again."""
    app = Starlette(routes=routes, exception_handlers={Exception: broken})
    setup(app, ledger.db)
    client = await client_of(app)

    response = await client.get("/unavailable")

    assert response.status_code == 503


async def test_websocket_has_no_unit(ledger, messages_of):
    """A socket is no unit of work; its messages open their own (P11)."""

    async def talk(websocket):
        await websocket.accept()
        with pytest.raises(ContextNotInitiatedError, match="db_context"):
            await db_session(ledger.db)
        async with db_context():
            await ledger.write("a")
        await websocket.send_text("written")
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", talk)])
    setup(app, ledger.db)

    async with db_context():
        log = await messages_of(app, kind="websocket")

    assert log == ["accept  []", "send written [a]", "close  [a]"]


async def test_mounted_application_shares_the_unit(ledger, client_of):
    """Set up by itself or not, the request has one unit, and the inner handlers come first (P4b, P12)."""

    async def orphan(request):
        await ledger.write_orphan("a")
        return PlainTextResponse("ok")

    routes = [Route("/orphan", orphan)]
    alone = Starlette(routes=routes)
    answering = Starlette(routes=routes, exception_handlers={IntegrityError: conflict})
    everything = Starlette(routes=routes, exception_handlers={500: broken})
    itself = Starlette(routes=routes, middleware=[Middleware(PassOn)], exception_handlers={IntegrityError: conflict})
    setup(itself)
    mounts = {"alone": alone, "answering": answering, "everything": everything, "itself": itself}
    app = Starlette(routes=[Mount(f"/{name}", inner) for name, inner in mounts.items()])
    app.add_exception_handler(IntegrityError, lambda request, exc: PlainTextResponse("outer", 410))
    setup(app, ledger.db)
    client = await client_of(app)

    answers = {name: (await client.get(f"/{name}/orphan")).text for name in mounts}

    assert answers == {
        "alone": "outer",
        "answering": "conflict: IntegrityError",
        "everything": "broken: IntegrityError",
        "itself": "conflict: IntegrityError",
    }
    assert ledger.names() == ""


async def test_unit_is_named_by_the_template_of_its_path(ledger, client_of):
    """Log lines have the names of parameters, not every value (P16)."""
    labels = []

    async def endpoint(request):
        labels.append(request.scope[SCOPE_KEY].unit.label())
        return PlainTextResponse("ok")

    async def missing(request, exc):
        labels.append(request.scope[SCOPE_KEY].unit.label())
        return PlainTextResponse("no", 404)

    inner = Starlette(routes=[Route("/users/{id:int}/{name}", endpoint)])
    app = Starlette(routes=[Route("/items/{id}", endpoint), Mount("/v1", inner)], exception_handlers={404: missing})
    setup(app)
    client = await client_of(app)

    for path in ("/items/1", "/v1/users/2/bob", "/nowhere/3"):
        await client.get(path)

    old = "GET /users/{id}/{name}"  # Starlette before 0.33 takes the mount's prefix off the path
    assert labels in (["GET /items/{id}", label, "GET /nowhere/3"] for label in ("GET /v1/users/{id}/{name}", old))


async def test_connects_are_closed_after_the_lifespan(ledger, client_of):
    """The application's own lifespan stays, and is inside (P15)."""
    log = []

    @asynccontextmanager
    async def lifespan(app):
        async with db_context():
            await ledger.write("up")
        yield {"key": "value"}
        log.append(ledger.db.pool_status().size > 0)

    async def state(request):
        return PlainTextResponse(request.state.key)

    app = Starlette(routes=[Route("/", state)], lifespan=lifespan)
    setup(app, ledger.db)
    asked = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive():
        return asked.pop(0)

    async def send(message):
        log.append(message["type"])

    scope = {"type": "lifespan", "state": {}}
    async with db_context():
        await app(scope, receive, send)

    assert scope["state"] == {"key": "value"}
    assert log == ["lifespan.startup.complete", True, "lifespan.shutdown.complete"]
    assert ledger.db.pool_status().size == 0


async def test_lifespan_sees_no_unit(ledger):
    """A server may have been started inside a unit (P11)."""
    seen = []

    @asynccontextmanager
    async def lifespan(app):
        seen.append(is_context_initiated())
        yield

    app = Starlette(lifespan=lifespan)
    setup(app)
    asked = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive():
        return asked.pop(0)

    async def send(message):
        pass

    async with db_context():
        await app({"type": "lifespan"}, receive, send)

    assert seen == [False]


async def test_second_setup_is_an_error(ledger):
    """Two units would be one too many."""
    app = Starlette()
    setup(app, ledger.db)

    with pytest.raises(SetupError, match="already"):
        setup(app, ledger.db)


async def test_setup_after_the_start_is_an_error(client_of):
    """The stack of middleware is built once."""
    app = Starlette()
    client = await client_of(app)
    await client.get("/")

    with pytest.raises(SetupError, match="started"):
        setup(app)


async def test_setup_leaves_the_list_of_middleware_alone(ledger, client_of):
    """What the application's owner added is all that is listed, before and after the start."""
    app = Starlette(middleware=[Middleware(PassOn)])
    setup(app, ledger.db)
    client = await client_of(app)

    await client.get("/")

    assert [middleware.cls for middleware in app.user_middleware] == [PassOn]
