"""What Litestar puts around a handler and its response, one by one."""

import asyncio

import httpx
import pytest
from context_sqla import ContextNotInitiatedError, db_context, db_session, is_context_initiated, run_in_new_ctx
from context_sqla.errors import ForeignLoopError
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from context_sqla_asgi import SCOPE_KEY
from context_sqla_litestar import ContextSQLAPlugin, provide_session
from litestar import Controller, Litestar, Request, Response, Router, WebSocket, asgi, get, head, post, route, websocket
from litestar.background_tasks import BackgroundTask, BackgroundTasks
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.config.csrf import CSRFConfig
from litestar.di import NamedDependency, Provide
from litestar.events import listener
from litestar.exceptions import HTTPException, PermissionDeniedException
from litestar.response import File, ServerSentEvent, Stream
from litestar.static_files import create_static_files_router
from litestar.stores.memory import MemoryStore
from litestar.testing import AsyncTestClient
from litestar.types import Receive, Scope, Send
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession


def make(ledger, *handlers, **options):
    options = {"openapi_config": None, "logging_config": None} | options
    return Litestar(handlers, plugins=[ContextSQLAPlugin(ledger.db)], **options)


def conflict(request: Request, exc: Exception) -> Response:
    return Response("conflict", status_code=409, media_type="text/plain")


def answer(status):
    """Make a handler of exceptions that answers with this status."""
    return lambda request, exc: Response(f"answer {status}", status_code=status, media_type="text/plain")


# Exception handlers


@pytest.mark.parametrize("layer", ["app", "router", "controller", "handler"])
@pytest.mark.parametrize("fails", ["statement", "commit"])
async def test_handlers_of_every_layer_answer_the_commit_as_they_answer_a_statement(ledger, client_of, layer, fails):
    """Whatever layer has the handler, it need not know when the database refused (P4b)."""
    own = {layer: {"exception_handlers": {IntegrityError: conflict}}}

    class Items(Controller):
        path = "/"
        exception_handlers = own.get("controller", {}).get("exception_handlers")

        @post("/", **own.get("handler", {}))
        async def create(self) -> str:
            await ledger.write_orphan("a")
            if fails == "statement":
                raise IntegrityError("INSERT", {}, Exception())
            return "ok"

    router = Router("/", route_handlers=[Items], **own.get("router", {}))
    client = await client_of(make(ledger, router, **own.get("app", {})))

    response = await client.post("/")

    assert (response.status_code, response.text) == (409, "conflict")
    assert ledger.names() == ""


async def test_nearest_handler_answers_the_commit(ledger, client_of):
    """The route's own comes before the application's, and before one for a class further up (P4b)."""

    @post("/", exception_handlers={IntegrityError: conflict})
    async def create() -> str:
        await ledger.write_orphan("a")
        return "ok"

    client = await client_of(make(ledger, create, exception_handlers={IntegrityError: answer(400), Exception: answer(500)}))

    response = await client.post("/")

    assert response.text == "conflict"


@pytest.mark.parametrize(("status", "rows"), [(200, "b"), (302, "b"), (400, ""), (500, "")])
async def test_what_an_exception_handler_writes_follows_its_status(ledger, client_of, status, rows):
    """What the handler of the route wrote before it failed is decided with it (P3)."""

    class Later(Response):
        def to_asgi_response(self, *args, **kwargs):
            own = super().to_asgi_response(*args, **kwargs)

            async def app(scope, receive, send):
                await (await db_session(ledger.db)).rollback()
                await ledger.write("b")
                await own(scope, receive, send)

            return app

    @post("/")
    async def create() -> str:
        await ledger.write("a")
        raise LookupError

    def handle(request: Request, exc: Exception) -> Response:
        return Later("later", status_code=status)

    client = await client_of(make(ledger, create, exception_handlers={LookupError: handle}))

    response = await client.post("/")

    assert response.status_code == status
    assert ledger.names() == rows


@pytest.mark.parametrize("compressed", [False, True])
async def test_failed_commit_of_what_an_exception_handler_wrote_is_answered(ledger, client_of, compressed):
    """The answer of a handler whose own writes fail is the business of the handler for that error (P4b)."""

    class Later(Response):
        def to_asgi_response(self, *args, **kwargs):
            own = super().to_asgi_response(*args, **kwargs)

            async def app(scope, receive, send):
                await ledger.write_orphan("a")
                await own(scope, receive, send)

            return app

    @post("/")
    async def create() -> str:
        raise LookupError

    handlers = {LookupError: lambda request, exc: Later("later", status_code=200), IntegrityError: conflict}
    compression = CompressionConfig("gzip", minimum_size=1) if compressed else None
    client = await client_of(make(ledger, create, exception_handlers=handlers, compression_config=compression))

    response = await client.post("/")

    assert response.text == "conflict"
    assert ledger.names() == ""


async def test_failed_commit_without_a_handler_is_litestars_500(ledger, client_of):
    """Nobody's handler: the application's own page, with its headers, and not the server's (P4b)."""

    @post("/")
    async def create() -> str:
        await ledger.write_orphan("a")
        return "ok"

    client = await client_of(make(ledger, create, cors_config=CORSConfig(["*"])))

    response = await client.post("/", headers={"origin": "http://elsewhere"})

    assert response.json() == {"status_code": 500, "detail": "Internal Server Error"}
    assert response.headers["access-control-allow-origin"] == "*"


# Redirects, other methods, other paths


@pytest.mark.parametrize(("status", "rows"), [(301, "a"), (303, "a"), (308, "a"), (400, ""), (503, "")])
async def test_raised_status_decides(ledger, client_of, status, rows):
    """A redirect commits, whether it was returned or raised (P3)."""

    @post("/")
    async def create() -> str:
        await ledger.write("a")
        raise HTTPException(status_code=status)

    client = await client_of(make(ledger, create))

    response = await client.post("/")

    assert response.status_code == status
    assert ledger.names() == rows


async def test_changed_status_decides(ledger, client_of):
    """The status that counts is the one that `after_request` has left (P3)."""

    async def refuse(response: Response) -> Response:
        return Response("no", status_code=400)

    @post("/", after_request=refuse)
    async def create() -> str:
        await ledger.write("a")
        return "ok"

    client = await client_of(make(ledger, create))

    response = await client.post("/")

    assert response.status_code == 400
    assert ledger.names() == ""


async def test_methods_that_litestar_answers_open_nothing(ledger, client_of):
    """OPTIONS, the schema, an unknown path and method cost no session (P1)."""

    @get("/")
    async def read() -> str:
        raise AssertionError

    app = Litestar([read], plugins=[ContextSQLAPlugin(ledger.db)], cors_config=CORSConfig(["*"]), logging_config=None)
    client = await client_of(app)
    preflight = {"origin": "http://elsewhere", "access-control-request-method": "GET"}

    statuses = [
        (await client.options("/")).status_code,
        (await client.options("/", headers=preflight)).status_code,
        (await client.get("/schema/openapi.json")).status_code,
        (await client.get("/schema/elsewhere")).status_code,
        (await client.get("/elsewhere")).status_code,
        (await client.post("/")).status_code,
        (await client.head("/")).status_code,
    ]

    assert statuses == [204, 204, 200, 404, 404, 405, 405]
    assert ledger.db.pool_status().size == 0


async def test_head_and_other_methods_commit(ledger, client_of):
    """Every method that a route takes has a unit, HEAD included (P3)."""

    @head("/head")
    async def only_head() -> None:
        await ledger.write("a")

    @route("/", http_method=["PUT", "PATCH", "OPTIONS"])
    async def several(request: Request) -> None:
        await ledger.write(request.method)

    client = await client_of(make(ledger, only_head, several))

    statuses = [(await client.head("/head")).status_code]
    statuses += [(await client.request(method, "/")).status_code for method in ("PUT", "PATCH", "OPTIONS")]

    assert max(statuses) < 300
    assert ledger.names() == "OPTIONS PATCH PUT a"


async def test_static_files_open_nothing(ledger, client_of, tmp_path):
    """A file, and one that is not there (P1)."""
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "page.txt").write_text("page")
    client = await client_of(make(ledger, create_static_files_router("/static", [tmp_path / "static"])))

    found, lost = await client.get("/static/page.txt"), await client.get("/static/lost.txt")

    assert (found.status_code, found.text, lost.status_code) == (200, "page", 404)
    assert ledger.db.pool_status().size == 0


async def test_file_is_sent_after_the_commit(ledger, messages_of, tmp_path):
    """A download that is counted, for one (P4)."""
    path = tmp_path / "page.txt"
    path.write_text("page")

    @get("/")
    async def download() -> File:
        await ledger.write("a")
        return File(path)

    log = await messages_of(make(ledger, download))

    assert log[0] == "start 200 [a]"
    assert "".join(log).count("page") == 1


# What stands around a handler


async def test_refusing_guard_rolls_back_what_came_before(ledger, client_of):
    """Also with a status of its own (P3)."""

    async def guard(connection, handler):
        await ledger.write("a")
        raise PermissionDeniedException

    @post("/", guards=[guard])
    async def create() -> str:
        raise AssertionError

    client = await client_of(make(ledger, create))

    response = await client.post("/")

    assert response.status_code == 403
    assert ledger.names() == ""


async def test_dependency_ends_before_the_head(ledger, messages_of):
    """What a dependency with `yield` does at its exit is in time for the commit (P4)."""
    log = []

    async def resource():
        yield 1
        log.append(f"exit [{ledger.names()}]")
        await ledger.write("exit")

    @get("/", dependencies={"one": Provide(resource)})
    async def read(one: NamedDependency[int]) -> str:
        await ledger.write("a")
        return "ok"

    await messages_of(make(ledger, read), log=log)

    assert log == ["exit []", "start 200 [a exit]", "body ok [a exit]"]


async def test_dependency_of_a_stream_ends_before_its_body(ledger, messages_of):
    """So it must not close what the body still needs; the unit's own session is not closed (P5)."""
    log = []

    async def resource():
        session = await ledger.session()
        yield session
        log.append("exit")

    @get("/", dependencies={"session": Provide(resource)})
    async def read(session: NamedDependency[AsyncSession]) -> Stream:
        async def body():
            log.append(f"same {session is await ledger.session()}")
            await ledger.write("b")
            yield "1"

        return Stream(body())

    await messages_of(make(ledger, read), log=log)

    assert log == ["exit", "start 200 []", "same True", "body 1+ []", "body  [b]"]


async def test_dependency_sees_the_exception_and_its_work_rolls_back(ledger, client_of):
    """Clean-up code that writes is no exception to the rule (P3)."""
    seen = []

    async def resource():
        try:
            yield 1
        except LookupError as exc:
            seen.append(type(exc))
            await ledger.write("exit")
            raise

    @post("/", dependencies={"one": Provide(resource)}, exception_handlers={LookupError: answer(404)})
    async def create(one: NamedDependency[int]) -> str:
        await ledger.write("a")
        raise LookupError

    client = await client_of(make(ledger, create))

    response = await client.post("/")

    assert (response.status_code, seen) == (404, [LookupError])
    assert ledger.names() == ""


async def test_failed_commit_of_what_a_dependency_wrote_at_its_exit(ledger, client_of):
    """It is a commit error like any other (P4b)."""

    async def resource():
        yield 1
        await ledger.write_orphan("exit")

    @post("/", dependencies={"one": Provide(resource)}, exception_handlers={IntegrityError: conflict})
    async def create(one: NamedDependency[int]) -> str:
        return "ok"

    client = await client_of(make(ledger, create))

    response = await client.post("/")

    assert response.text == "conflict"


async def test_dependencies_that_run_at_once_share_the_session(ledger, client_of):
    """Litestar resolves those that do not need each other in a task group: still one session (P2)."""
    seen = []

    async def one() -> AsyncSession:
        return await ledger.session()

    async def two() -> AsyncSession:
        return await ledger.session()

    @post("/", dependencies={"a": Provide(one), "b": Provide(two), "c": provide_session(ledger.db)})
    async def create(a: NamedDependency[AsyncSession], b: NamedDependency[AsyncSession], c: NamedDependency[AsyncSession]) -> str:
        seen.append(a is b is c)
        return "ok"

    client = await client_of(make(ledger, create))
    await client.post("/")

    assert seen == [True]


@pytest.mark.parametrize("in_thread", [False, True])
async def test_sync_handler_and_dependency_have_the_unit(ledger, client_of, in_thread):
    """In the loop, or in a thread (P2)."""

    def resource() -> bool:
        return is_context_initiated()

    @get("/", sync_to_thread=in_thread, dependencies={"one": Provide(resource, sync_to_thread=in_thread)})
    def read(one: NamedDependency[bool]) -> str:
        return f"{one} {is_context_initiated()}"

    client = await client_of(make(ledger, read))

    response = await client.get("/")

    assert response.text == "True True"


@pytest.mark.parametrize(("when", "rows"), [("before", ""), ("with the head", "a middleware")])
async def test_foreign_middleware_that_raises(ledger, client_of, when, rows):
    """Before the handler has answered it rolls back; what it thinks of the head comes after the commit (P3, P4)."""

    def middleware(app):
        async def run(scope, receive, send):
            async def refuse(message):
                raise LookupError

            await ledger.write("middleware")
            if when == "before":
                raise LookupError
            await app(scope, receive, refuse)

        return run

    @post("/")
    async def create() -> str:
        await ledger.write("a")
        return "ok"

    client = await client_of(make(ledger, create, middleware=[middleware]))

    response = await client.post("/")

    assert response.status_code == 500
    assert ledger.names() == rows


async def test_before_send_sees_what_is_committed(ledger, messages_of):
    """It is shown the head of a success only after the commit, and never that of one that failed (P4)."""
    seen = []

    async def before_send(message, scope):
        if message["type"] == "http.response.start":
            seen.append(f"{message['status']} [{ledger.names()}]")

    @get("/")
    async def read(request: Request) -> str:
        await (ledger.write_orphan if request.query_params else ledger.write)("a")
        return "ok"

    app = make(ledger, read, before_send=[before_send], exception_handlers={IntegrityError: conflict})
    await messages_of(app)
    await messages_of(app, query_string=b"fail=1")

    assert seen == ["200 [a]", "409 [a]"]


@pytest.mark.parametrize("fails", ["commit", "rule"])
async def test_rule_of_the_application_decides_and_its_errors_are_answered(ledger, messages_of, fails):
    """`should_commit` is asked about every head, and an error of it is one of the commit (P3, P4b)."""
    asked = []

    def should_commit(status):
        asked.append(status)
        if fails == "rule" and status == 200:
            raise LookupError
        return True

    @get("/")
    async def read() -> str:
        if fails == "commit":
            await ledger.write_orphan("a")
        return "ok"

    own = {IntegrityError: conflict, LookupError: conflict}
    plugin = ContextSQLAPlugin(ledger.db, should_commit=should_commit)
    app = Litestar([read], plugins=[plugin], exception_handlers=own, openapi_config=None, logging_config=None)
    log = await messages_of(app)

    assert (log, asked) == (["start 409 []", "body conflict []"], [200, 409])


async def test_foreign_middleware_that_refuses_rolls_back(ledger, client_of):
    """A check that fails before the handler runs, like that of a CSRF token (P3)."""

    def middleware(app):
        async def run(scope, receive, send):
            await ledger.write("middleware")
            await app(scope, receive, send)

        return run

    @post("/")
    async def create() -> str:
        raise AssertionError

    csrf = CSRFConfig(secret="secret")
    client = await client_of(make(ledger, create, middleware=[middleware], csrf_config=csrf))

    response = await client.post("/")

    assert response.status_code == 403
    assert ledger.names() == ""


# Kinds of responses


async def test_stream_of_a_plain_iterator_commits(ledger, messages_of):
    """Litestar runs it in a thread (P5)."""

    @get("/")
    async def read() -> Stream:
        await ledger.write("a")
        return Stream(part for part in ("1", "2"))

    log = await messages_of(make(ledger, read))

    assert log == ["start 200 [a]", "body 1+ [a]", "body 2+ [a]", "body  [a]"]


@pytest.mark.parametrize("kind", [Stream, ServerSentEvent])
@pytest.mark.parametrize("compressed", [False, True])
async def test_body_whose_commit_fails_never_ends_well(ledger, messages_of, kind, compressed):
    """Nor behind compression, which has kept the head back (P5)."""
    log = []

    @get("/")
    async def read() -> Response:
        async def body():
            yield "one"
            await ledger.write_orphan("a")
            yield "two"

        return kind(body())

    options = {"compression_config": CompressionConfig("gzip", minimum_size=1)} if compressed else {}

    with pytest.raises(IntegrityError):
        await messages_of(make(ledger, read, **options), log=log, headers=[(b"accept-encoding", b"gzip")])

    assert [message for message in log if message.startswith("body") and "+" not in message] == []
    assert ledger.names() == ""


async def test_body_of_an_error_answer_is_rolled_back(ledger, messages_of):
    """The decision about the head holds for the body (P3)."""

    @get("/")
    async def read() -> Stream:
        async def body():
            await ledger.write("b")
            yield "one"

        return Stream(body(), status_code=404)

    log = await messages_of(make(ledger, read))

    assert log == ["start 404 []", "body one+ []", "body  []"]


async def test_stream_that_is_cached_is_kept_once_its_body_is_committed(ledger, messages_of):
    """A body whose commit failed is not what the next client gets (P5)."""
    calls = []
    outcomes = []

    @get("/", cache=60)
    async def read() -> Stream:
        calls.append(1)

        async def body():
            await (ledger.write_orphan if len(calls) == 1 else ledger.write)("a")
            yield "one"

        return Stream(body())

    app = make(ledger, read)
    for _ in range(3):
        try:
            outcomes.append((await messages_of(app))[-1])
        except IntegrityError:
            outcomes.append("broken off")

    assert outcomes == ["broken off", "body  [a]", "body  [a]"]
    assert len(calls) == 2


async def test_cached_response_opens_nothing(ledger, client_of):
    """The guards still run, the handler does not (P1)."""
    opened = []

    @get("/", cache=True)
    async def read() -> str:
        opened.append(await ledger.session())
        return "ok"

    client = await client_of(make(ledger, read, stores={"response_cache": MemoryStore()}))

    texts = [(await client.get("/")).text for _ in range(3)]

    assert texts == ["ok", "ok", "ok"]
    assert len(opened) == 1


async def test_background_tasks_that_run_at_once_are_separated_by_run_in_new_ctx(ledger, client_of):
    """`run_in_task_group` shares a unit among tasks that run at the same moment, so give each its own (P6, P18)."""

    @post("/", status_code=200)
    async def create() -> Response:
        work = [BackgroundTask(run_in_new_ctx, ledger.write, name) for name in "abc"]
        return Response("ok", background=BackgroundTasks(work, run_in_task_group=True))

    client = await client_of(make(ledger, create))
    await client.post("/")

    assert ledger.names() == "a b c"


async def test_failing_background_task_takes_the_others_along(ledger, client_of):
    """They are one unit, apart from the request's (P6)."""

    async def fail() -> None:
        raise LookupError

    @post("/", status_code=200)
    async def create() -> Response:
        await ledger.write("request")
        return Response("ok", background=BackgroundTasks([BackgroundTask(ledger.write, "a"), BackgroundTask(fail)]))

    client = await client_of(make(ledger, create))

    response = await client.post("/")

    assert response.text == "ok"
    assert ledger.names() == "request"


async def test_after_response_is_background_work(ledger, messages_of):
    """Its connection is another one, its error comes too late for the client and rolls back only itself (P6)."""
    log = []

    async def after_response(request: Request) -> None:
        await ledger.write("late")
        log.append(f"after [{ledger.names()}]")
        if request.query_params:
            raise LookupError

    @get("/", after_response=after_response)
    async def read() -> str:
        await ledger.write("a")
        return "ok"

    app = make(ledger, read)
    await messages_of(app, log=log)
    committed = ledger.names()
    with pytest.raises(Exception, match="after response started"):
        await messages_of(app, query_string=b"fail=1")

    assert log == ["start 200 [a]", "body ok [a]", "after [a]", "after [a a late]"]
    assert (committed, ledger.names()) == ("a late", "a a late")


async def test_events_of_the_application_belong_to_no_request(ledger, client_of):
    """A listener runs in a task of the application (P10)."""
    heard = asyncio.Queue()

    @listener("written")
    async def hear() -> None:
        before = is_context_initiated()
        async with db_context():
            await ledger.write("b")
        await heard.put(before)

    @post("/")
    async def create(request: Request) -> str:
        await ledger.write("a")
        request.app.emit("written")
        return "ok"

    app = make(ledger, create, listeners=[hear])
    async with app.lifespan():
        client = await client_of(app)
        await client.post("/")
        initiated = await asyncio.wait_for(heard.get(), 10)

    assert initiated is False
    assert ledger.names() == "a b"


# Mounted applications


async def test_mounted_asgi_application_is_committed_before_its_head(ledger, messages_of):
    """It needs no adapter of its own (P4, P5)."""

    @asgi("/inner", is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await ledger.write("a")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await ledger.write("b")
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        await ledger.write("c")

    log = await messages_of(make(ledger, mounted), "/inner/page")

    assert log == ["start 200 [a]", "body one+ [a]", "body  [a b]"]
    assert ledger.names() == "a b c"


async def test_failed_commit_of_a_mounted_application_is_answered(ledger, client_of):
    """By the handlers of the outer one, if it has none (P4b)."""

    @asgi("/inner", is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await ledger.write_orphan("a")
        await Response("ok").to_asgi_response(app=None, request=Request(scope))(scope, receive, send)

    client = await client_of(make(ledger, mounted, exception_handlers={IntegrityError: conflict}))

    response = await client.get("/inner/page")

    assert response.text == "conflict"


@pytest.mark.parametrize("swallows", ["and returns", "and raises another", "and answers"])
async def test_mounted_application_that_swallows_the_error_of_the_commit(ledger, messages_of, swallows):
    """It is answered nevertheless, or by the application itself; a success is not what leaves (P4, P4b)."""

    @asgi("/inner", is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await ledger.write_orphan("a")
        if swallows == "and answers":
            await send({"type": "http.response.start", "status": 103, "headers": []})
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except IntegrityError:
            with pytest.raises(IntegrityError):
                await send({"type": "http.response.body", "body": b"fine"})
        if swallows == "and raises another":
            raise LookupError
        if swallows == "and answers":
            await ledger.write("b")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"mine"})

    log = await messages_of(make(ledger, mounted, exception_handlers={IntegrityError: conflict}), "/inner/page")

    mine = ["start 103 []", "start 200 [b]", "body mine [b]"]
    assert log == (mine if swallows == "and answers" else ["start 409 []", "body conflict []"])


@pytest.mark.parametrize("middleware", [False, True])
async def test_body_that_fails_is_raised_as_it_is(ledger, messages_of, middleware):
    """The server gets the error itself, whatever Litestar makes of it (P5)."""

    def pass_on(app):
        async def run(scope, receive, send):
            await app(scope, receive, send)

        return run

    @asgi("/", copy_scope=True)
    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await ledger.write("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await messages_of(make(ledger, read, middleware=[pass_on] if middleware else []))

    assert ledger.names() == ""


async def test_request_whose_unit_somebody_else_drives_is_left_to_them(ledger, client_of):
    """Where no wire is, nothing is decided (P12)."""

    @post("/")
    async def create() -> str:
        await ledger.write("a")
        return "ok"

    app = make(ledger, create)

    async def hide(scope, receive, send):
        await app({**scope, SCOPE_KEY: None}, receive, send)

    client = await client_of(hide)
    async with db_context():
        response = await client.post("/")
        meanwhile = ledger.names()

    assert (response.status_code, meanwhile, ledger.names()) == (201, "", "a")


# Websockets


async def test_session_as_a_dependency_of_a_websocket_names_the_remedy(ledger, messages_of):
    """A socket has no unit, whose session could be given to it (P11)."""
    seen = []

    async def after_exception(exc, scope):
        seen.append(exc)

    @websocket("/", dependencies={"session": provide_session(ledger.db)})
    async def talk(socket: WebSocket, session: NamedDependency[AsyncSession]) -> None:
        raise AssertionError

    await messages_of(make(ledger, talk, after_exception=[after_exception]), kind="websocket")

    assert [type(exc) for exc in seen] == [ContextNotInitiatedError]
    assert "db_context" in str(seen[0])


# Test clients


async def test_transport_joins_the_tests_transaction(ledger):
    """`httpx.ASGITransport` runs the application in the test's own loop (P12)."""

    @post("/")
    async def create() -> str:
        await ledger.write("a")
        return "ok"

    app = make(ledger, create)
    async with rollback_session(ledger.db) as session, set_test_context(), put_savepoint_session_in_ctx(ledger.db, session):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            response = await client.post("/")
        meanwhile = ledger.names()

    assert response.status_code == 201
    assert (meanwhile, ledger.names()) == ("", "")


@pytest.mark.parametrize("marked", [False, True])
async def test_litestars_clients_refuse_a_marked_context(ledger, marked):
    """They run the application in another loop: without a marked context it works, with one it is told why not (P12, P15)."""

    @post("/")
    async def create() -> str:
        await ledger.write("a")
        return "ok"

    app = make(ledger, create)
    if not marked:
        async with AsyncTestClient(app) as client:
            assert (await client.post("/")).status_code == 201
        assert ledger.names() == "a"
        return
    async with rollback_session(ledger.db) as session, set_test_context(), put_savepoint_session_in_ctx(ledger.db, session):
        with pytest.raises(ForeignLoopError, match="ASGITransport"):
            async with AsyncTestClient(app) as client:
                await client.post("/")

    assert ledger.names() == ""
