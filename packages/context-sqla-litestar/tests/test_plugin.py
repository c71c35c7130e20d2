"""What the plugin and `setup` place where, and what they keep."""

import asyncio

import pytest
from context_sqla import ContextNotInitiatedError, UnavailableError, db_context, db_session, is_context_initiated
from context_sqla.errors import ContextSqlaError, SetupError
from context_sqla_asgi import SCOPE_KEY
from context_sqla_litestar import ContextSQLAPlugin, provide_session, setup
from litestar import Litestar, Request, Response, Router, WebSocket, asgi, delete, get, post, websocket, websocket_listener
from litestar.background_tasks import BackgroundTask, BackgroundTasks
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException, NotAuthorizedException
from litestar.response import Redirect, ServerSentEvent, Stream
from litestar.types import Receive, Scope, Send
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession


def by_plugin(handlers, *connects, **options):
    return Litestar(handlers, plugins=[ContextSQLAPlugin(*connects)], openapi_config=None, logging_config=None, **options)


def by_setup(handlers, *connects, **options):
    app = Litestar(handlers, openapi_config=None, logging_config=None, **options)
    setup(app, *connects)
    return app


def by_hook(handlers, *connects, **options):
    def configure(config):
        setup(config, *connects)
        return config

    return Litestar(handlers, on_app_init=[configure], openapi_config=None, logging_config=None, **options)


def pass_on(app):
    async def middleware(scope, receive, send):
        await app(scope, receive, send)

    return middleware


def with_middleware(handlers, *connects, **options):
    """A route that has middleware is decided inside it, and once more around it."""
    return by_plugin(handlers, *connects, **options | {"middleware": [pass_on, *options.get("middleware", [])]})


@pytest.fixture(name="make", params=[by_plugin, by_setup, by_hook, with_middleware])
def _make(request):
    return request.param


def conflict(request: Request, exc: Exception) -> Response:
    return Response(f"conflict: {type(exc).__name__}", status_code=409, media_type="text/plain")


@pytest.fixture(name="handlers")
def _handlers(ledger):
    """An application that writes in every way."""

    @get("/write")
    async def write(request: Request) -> Response:
        await ledger.write("a")
        return Response("ok", status_code=int(request.query_params.get("status", "200")), media_type="text/plain")

    @get("/refuse")
    async def refuse() -> str:
        await ledger.write("a")
        raise HTTPException(status_code=409)

    @get("/redirect")
    async def redirect() -> Redirect:
        await ledger.write("a")
        return Redirect("/elsewhere")

    @get("/crash")
    async def crash() -> str:
        await ledger.write("a")
        raise LookupError

    @get("/orphan")
    async def orphan() -> Response:
        await ledger.write_orphan("a")
        return Response("ok", background=BackgroundTask(ledger.write, "never"))

    @get("/stream")
    async def stream() -> Stream:
        await ledger.write("a")

        async def body():
            await ledger.write("b")
            yield b"1"
            await ledger.write("c")
            yield b"2"

        return Stream(body())

    @get("/unavailable")
    async def unavailable() -> str:
        raise UnavailableError("no master", retry_after=6.2)

    return [write, refuse, redirect, crash, orphan, stream, unavailable]


@pytest.mark.parametrize(
    ("path", "status", "rows"),
    [
        ("/write", 200, "a"),
        ("/write?status=400", 400, ""),
        ("/refuse", 409, ""),
        ("/redirect", 302, "a"),
        ("/crash", 500, ""),
        ("/orphan", 500, ""),
        ("/nowhere", 404, ""),
    ],
)
async def test_status_decides(make, handlers, ledger, client_of, path, status, rows):
    """Below 400 commits, redirects included; the rest rolls back (P3)."""
    client = await client_of(make(handlers, ledger.db))

    response = await client.get(path)

    assert response.status_code == status
    assert ledger.names() == rows


async def test_commit_comes_before_the_head_and_before_the_last_byte(make, handlers, ledger, messages_of):
    """A stream has a transaction of its own (P4, P5)."""
    log = await messages_of(make(handlers, ledger.db), "/stream")

    assert log == ["start 200 [a]", "body 1+ [a]", "body 2+ [a]", "body  [a b c]"]


async def test_body_does_not_run_ahead_under_compression(make, handlers, ledger, messages_of):
    """Compression holds the head until the first part; the commit stands further in (P5)."""
    app = make(handlers, ledger.db, compression_config=CompressionConfig("gzip", minimum_size=1))

    log = await messages_of(app, "/stream", headers=[(b"accept-encoding", b"gzip"), (b"host", b"test")])

    assert log[0] == "start 200 [a]"
    assert log[-1].endswith("[a b c]")


@pytest.mark.parametrize("layer", ["app", "router"])
async def test_handlers_answer_a_failed_commit(make, handlers, ledger, client_of, layer):
    """Handlers of every layer, `after_exception` and CORS treat it as an error of the handler (P4b)."""
    seen = []

    async def after_exception(exc, scope):
        seen.append(type(exc))

    own = {IntegrityError: conflict}
    handlers = [Router("/", route_handlers=handlers, exception_handlers=own)] if layer == "router" else handlers
    options = {"exception_handlers": own} if layer == "app" else {}
    app = make(handlers, ledger.db, after_exception=[after_exception], cors_config=CORSConfig(["*"]), **options)
    client = await client_of(app)

    response = await client.get("/orphan", headers={"origin": "http://elsewhere"})

    assert (response.status_code, response.text) == (409, "conflict: IntegrityError")
    assert "access-control-allow-origin" in response.headers
    assert seen == [IntegrityError]
    assert ledger.names() == ""


async def test_answer_below_400_to_a_failed_commit_is_sent(make, handlers, ledger, client_of):
    """The handler decides what the client gets, also a redirect (P4b)."""
    app = make(handlers, ledger.db, exception_handlers={IntegrityError: lambda request, exc: Redirect("/form")})
    client = await client_of(app)

    response = await client.get("/orphan")

    assert response.status_code == 302


async def test_failed_commit_of_middleware_that_answers_by_itself(make, ledger, client_of):
    """What middleware writes before its own answer fails like the rest (P4b)."""

    def middleware(app):
        async def answer(scope, receive, send):
            await ledger.write_orphan("a")
            await Response("ok").to_asgi_response(app=None, request=Request(scope))(scope, receive, send)

        return answer

    @get("/")
    async def endpoint() -> str:
        raise AssertionError

    app = make([endpoint], ledger.db, middleware=[middleware], exception_handlers={IntegrityError: conflict})
    client = await client_of(app)

    response = await client.get("/")

    assert response.status_code == 409


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_unknown_path_and_method_have_a_unit(make, handlers, ledger, client_of, method):
    """The handler of 404 or 405 may write, and the rule holds for it (P3)."""
    seen = []

    def missing(request: Request, exc: Exception) -> Response:
        seen.append(is_context_initiated())
        return Response("no", status_code=exc.status_code)

    client = await client_of(make(handlers, ledger.db, exception_handlers={404: missing, 405: missing}))

    response = await client.request(method, "/write" if method == "POST" else "/nowhere")

    assert response.status_code == (405 if method == "POST" else 404)
    assert seen == [True]


async def test_dependencies_guards_and_hooks_are_inside(make, ledger, client_of):
    """What a yielding dependency writes at its exit is committed with the rest; a guard's refusal rolls back (P3)."""

    async def resource():
        await ledger.write("before")
        yield 1
        await ledger.write("exit")

    async def guard(connection, handler):
        await ledger.write("guard")
        if connection.query_params.get("refuse"):
            raise NotAuthorizedException

    async def after_request(response: Response) -> Response:
        await ledger.write("hook")
        return response

    async def after_response(request: Request) -> None:
        await ledger.write("late")

    @get("/", dependencies={"one": Provide(resource)}, guards=[guard], after_request=after_request, after_response=after_response)
    async def endpoint(one: NamedDependency[int]) -> str:
        return "ok"

    client = await client_of(make([endpoint], ledger.db))

    refused = await client.get("/?refuse=1")
    after_refusal = ledger.names()
    await client.get("/")

    assert (refused.status_code, after_refusal) == (401, "")
    assert ledger.names() == "before exit guard hook late"


async def test_cache_never_keeps_what_was_not_committed(make, ledger, client_of):
    """A response whose commit failed is not cached; one that is cached opens nothing (P1, P4)."""
    calls = []

    @get("/", cache=60)
    async def endpoint() -> str:
        calls.append(1)
        await (ledger.write_orphan if len(calls) == 1 else ledger.write)("a")
        return "ok"

    client = await client_of(make([endpoint], ledger.db))

    statuses = [(await client.get("/")).status_code for _ in range(3)]

    assert statuses == [500, 200, 200]
    assert len(calls) == 2
    assert ledger.names() == "a"


async def test_background_work_is_a_unit_of_its_own(make, ledger, client_of):
    """It commits on success, after the request (P6)."""

    @delete("/", status_code=200)
    async def endpoint() -> Response:
        await ledger.write("a")
        work = BackgroundTasks([BackgroundTask(ledger.write, "b"), BackgroundTask(ledger.write, "c")])
        return Response("no", status_code=400, background=work)

    client = await client_of(make([endpoint], ledger.db))

    await client.delete("/")

    assert ledger.names() == "b c"


async def test_server_sent_events_commit(make, ledger, messages_of):
    """Events are a stream like any other (P5)."""

    @get("/")
    async def endpoint() -> ServerSentEvent:
        async def events():
            await ledger.write("a")
            yield "one"

        return ServerSentEvent(events())

    log = await messages_of(make([endpoint], ledger.db))

    assert log[0] == "start 200 []"
    assert log[-1] == "body  [a]"


async def test_unavailable_database_is_503(make, handlers, ledger, client_of):
    """With the time after which the client may try again."""
    client = await client_of(make(handlers, ledger.db))

    response = await client.get("/unavailable")

    assert (response.status_code, response.text) == (503, "Service Unavailable")
    assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("cls", [UnavailableError, ContextSqlaError])
@pytest.mark.parametrize("layer", ["app", "router"])
async def test_application_answers_unavailable_by_itself(make, handlers, ledger, client_of, cls, layer):
    """Its own handler counts, in whatever layer, also one for all errors of the library."""
    own = {cls: conflict}
    handlers = [Router("/", route_handlers=handlers, exception_handlers=own)] if layer == "router" else handlers
    client = await client_of(make(handlers, ledger.db, exception_handlers=own if layer == "app" else {}))

    response = await client.get("/unavailable")

    assert response.text == "conflict: UnavailableError"


async def test_handler_of_everything_is_no_answer_to_unavailable(make, handlers, ledger, client_of):
    """A 500 would tell the client not to try again."""
    client = await client_of(make(handlers, ledger.db, exception_handlers={Exception: conflict}))

    response = await client.get("/unavailable")

    assert response.status_code == 503


async def test_unavailable_for_an_unknown_path(make, ledger, client_of):
    """The default handler answers where no route was found, too."""

    def missing(request: Request, exc: Exception) -> Response:
        raise AssertionError

    def middleware(app):
        async def fail(scope, receive, send):
            raise UnavailableError("no master")

        return fail

    @get("/")
    async def endpoint() -> str:
        return "ok"

    client = await client_of(make([endpoint], ledger.db, middleware=[middleware]))

    response = await client.get("/")

    assert response.status_code == 503


async def test_websocket_has_no_unit(make, ledger, messages_of):
    """A socket is no unit of work; its messages open their own (P11)."""

    @websocket("/")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        with pytest.raises(ContextNotInitiatedError, match="db_context"):
            await db_session(ledger.db)
        async with db_context():
            await ledger.write("a")
        await socket.send_text("written")
        await socket.close()

    app = make([talk], ledger.db)

    async with db_context():
        log = await messages_of(app, kind="websocket")

    assert log == ["accept  []", "send written [a]", "close  [a]"]


async def test_websocket_listener_has_no_unit(make, ledger):
    """A listener is a websocket (P11)."""
    seen = []
    received = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "x"},
        {"type": "websocket.disconnect", "code": 1000},
    ]

    @websocket_listener("/")
    async def listen(data: str) -> str:
        seen.append(is_context_initiated())
        return data

    async def receive():
        return received.pop(0) if received else await asyncio.Event().wait()

    async def send(message):
        pass

    scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "root_path": ""}
    async with db_context():
        await make([listen], ledger.db)(scope, receive, send)

    assert seen == [False]


async def test_mounted_application_shares_the_unit(ledger, client_of):
    """One request has one unit, and the inner handlers come first (P4b, P12)."""

    @get("/orphan")
    async def orphan() -> str:
        await ledger.write_orphan("a")
        return "ok"

    inner = by_plugin([orphan], exception_handlers={IntegrityError: conflict})

    @asgi("/inner", is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)

    client = await client_of(by_plugin([mounted], ledger.db))

    response = await client.get("/inner/orphan")

    assert response.text == "conflict: IntegrityError"
    assert ledger.names() == ""


async def test_route_that_is_registered_later(make, handlers, ledger, messages_of):
    """It gets what the others have."""
    app = make(handlers[:1], ledger.db)
    app.register(handlers[5])

    log = await messages_of(app, "/stream")

    assert log[0] == "start 200 [a]"
    assert log[-1] == "body  [a b c]"


async def test_session_is_a_dependency(ledger, client_of):
    """Under the key that was chosen, and of any other connect with `provide_session`."""
    seen = []

    @post("/", dependencies={"other": provide_session(ledger.db)})
    async def endpoint(session: NamedDependency[AsyncSession], other: NamedDependency[AsyncSession]) -> str:
        seen.append(session is other is await ledger.session())
        return "ok"

    plugin = ContextSQLAPlugin(ledger.db, session_key="session")
    app = Litestar([endpoint], plugins=[plugin], openapi_config=None, logging_config=None)
    client = await client_of(app)
    await client.post("/")

    assert seen == [True]


def test_session_key_needs_a_connect():
    """Whose session should it be?"""
    with pytest.raises(ValueError, match="connect"):
        ContextSQLAPlugin(session_key="session")


async def test_unit_is_named_by_the_template_of_its_path(make, client_of):
    """Log lines have the names of parameters, not every value (P16)."""
    labels = []

    @get("/items/{number:int}")
    async def endpoint(request: Request) -> str:
        labels.append(request.scope[SCOPE_KEY].unit.label())
        return "ok"

    client = await client_of(make([endpoint]))

    await client.get("/items/7")

    assert labels == ["GET /items/{number}"]


async def test_connects_are_closed_after_the_application_s_own_shutdown(make, handlers, ledger):
    """Its hooks and managers may still use them, and see no unit that the server was started in (P11, P15)."""
    log = []

    async def up() -> None:
        log.append(is_context_initiated())
        async with db_context():
            await ledger.write("up")

    async def down() -> None:
        log.append(ledger.db.pool_status().size > 0)

    app = make(handlers, ledger.db, on_startup=[up], on_shutdown=[down])
    asked = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive():
        return asked.pop(0)

    async def send(message):
        log.append(message["type"])

    async with db_context():
        await app({"type": "lifespan", "state": {}}, receive, send)

    assert log == [False, "lifespan.startup.complete", True, "lifespan.shutdown.complete"]
    assert ledger.db.pool_status().size == 0


@pytest.mark.parametrize("again", [by_plugin, by_hook])
def test_second_plugin_is_an_error(ledger, again):
    """Two units would be one too many."""

    def configure(config):
        setup(config, ledger.db)
        return config

    with pytest.raises(SetupError, match="already"):
        if again is by_plugin:
            Litestar([], plugins=[ContextSQLAPlugin(ledger.db), ContextSQLAPlugin(ledger.db)])
        else:
            Litestar([], on_app_init=[configure, configure])


def test_setup_of_an_application_with_the_plugin_is_an_error(make, handlers, ledger):
    """In whatever form the first one came."""
    with pytest.raises(SetupError, match="already"):
        setup(make(handlers, ledger.db), ledger.db)


async def test_setup_after_the_start_is_an_error(handlers, ledger):
    """The hooks of the shutdown are taken at the start."""
    app = Litestar(handlers, openapi_config=None, logging_config=None)

    async with app.lifespan():
        with pytest.raises(SetupError, match="started"):
            setup(app, ledger.db)


def test_application_keeps_its_class(make, handlers, ledger):
    """It is still what its owner made."""

    class Own(Litestar):
        pass

    app = Own(handlers, plugins=[ContextSQLAPlugin(ledger.db)], openapi_config=None, logging_config=None)

    assert isinstance(app, Own)
    assert type(app).__name__ == "Own"
    assert isinstance(make(handlers, ledger.db), Litestar)
