"""What Quart does in its own way: its hooks, its background tasks, its tasks, its errors."""

import asyncio

import httpx
import pytest
from context_sqla import ContextNotInitiatedError, UnavailableError, db_context, db_session, is_context_initiated
from context_sqla.errors import ContextSqlaError, SetupError
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from context_sqla_asgi import SCOPE_KEY
from context_sqla_asgi import setup as setup_asgi
from context_sqla_quart import ContextSQLA, setup
from quart import (
    Blueprint,
    Quart,
    Response,
    abort,
    after_this_request,
    redirect,
    request,
    send_file,
    stream_with_context,
    websocket,
)
from quart.sessions import SecureCookieSessionInterface
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError


@pytest.fixture(name="app")
def _app(ledger, tmp_path):
    """An application that writes in every way."""
    app = Quart(__name__, root_path=str(tmp_path), static_folder=str(tmp_path), static_url_path="/static")

    @app.route("/write", methods=["GET", "POST"])
    async def write():
        await ledger.write("a")
        return "ok", int(request.args.get("status", "200"))

    @app.post("/abort/<int:status>")
    async def refuse(status):
        await ledger.write("a")
        abort(status)

    @app.post("/redirect")
    async def move():
        await ledger.write("a")
        if request.args.get("raised"):
            abort(redirect("/write"))
        return redirect("/write")

    @app.post("/boom")
    async def boom():
        await ledger.write("a")
        raise ZeroDivisionError

    @app.post("/orphan")
    async def orphan():
        await ledger.write_orphan("a")
        return "never"

    setup(app, ledger.db)
    return app


@pytest.mark.parametrize(
    ("path", "status", "names"),
    [
        ("/write", 200, "a"),
        ("/write?status=400", 400, ""),
        ("/write?status=500", 500, ""),
        ("/abort/409", 409, ""),
        ("/boom", 500, ""),
        ("/redirect", 302, "a"),
        ("/redirect?raised=1", 302, "a"),
        ("/orphan", 500, ""),
        ("/nothing", 404, ""),
    ],
)
async def test_the_status_decides(app, ledger, client_of, path, status, names):
    """Teardown hooks would run before the head and see no exception; the decision follows the status all the same (P3, P4)."""
    client = await client_of(app)

    answer = await client.post(path)

    assert (answer.status_code, ledger.names()) == (status, names)


async def test_methods_and_files_open_nothing(app, ledger, client_of, tmp_path):
    """405, OPTIONS, HEAD and static files are answered as ever, and nothing is opened for them (P1)."""
    (tmp_path / "page.txt").write_text("page")
    client = await client_of(app)

    answers = [await client.put("/write"), await client.options("/write"), await client.get("/static/page.txt")]

    assert [answer.status_code for answer in answers] == [405, 200, 200]
    assert ledger.db.pool_status().checked_out == 0
    assert (await client.head("/write")).status_code == 200
    assert ledger.names() == "a"


async def test_hooks_write_before_the_commit(app, ledger, client_of):
    """What after_request hooks of application and blueprint write is committed with the rest, and their status decides (P3)."""
    blueprint = Blueprint("blueprint", __name__, url_prefix="/blueprint")

    @blueprint.post("/write")
    async def write():
        await ledger.write("view")
        return "ok"

    @blueprint.after_request
    async def of_the_blueprint(response):
        await ledger.write("blueprint")
        return response

    @app.after_request
    async def of_the_application(response):
        if request.args.get("refuse"):
            response.status_code = 400
        await ledger.write("application")
        return response

    app.register_blueprint(blueprint)
    client = await client_of(app)

    refused = await client.post("/blueprint/write?refuse=1")
    names = ledger.names()
    answer = await client.post("/blueprint/write")

    assert (refused.status_code, names) == (400, "")
    assert (answer.status_code, ledger.names()) == (200, "application blueprint view")


async def test_after_request_that_fails_rolls_back(app, ledger, client_of):
    """It runs again for the 500 that follows; nothing of either time is committed (P3)."""
    calls = []

    @app.after_request
    async def fail(response):
        calls.append(response.status_code)
        await ledger.write("hook")
        raise ZeroDivisionError

    client = await client_of(app)
    answer = await client.post("/write")

    assert (answer.status_code, calls, ledger.names()) == (500, [200, 500], "")


async def test_after_this_request_and_the_session_write_before_the_commit(app, ledger, client_of):
    """A hook of one request, and a session interface that saves in the database, are part of it (P3)."""

    class Saving(SecureCookieSessionInterface):
        async def save_session(self, app, session, response):
            await ledger.write("session")
            await super().save_session(app, session, response)

    app.session_interface, app.secret_key = Saving(), "key"

    @app.post("/hooked")
    async def hooked():
        @after_this_request
        async def hook(response):
            await ledger.write("hook")
            return response

        return "ok", int(request.args["status"])

    client = await client_of(app)
    refused = await client.post("/hooked?status=409")
    names = ledger.names()
    answer = await client.post("/hooked?status=200")

    assert (refused.status_code, names) == (409, "")
    assert (answer.status_code, ledger.names()) == (200, "hook session")


@pytest.mark.parametrize(("path", "status", "names"), [("/write", 200, "a teardown"), ("/boom", 500, "")])
async def test_teardown_comes_after_the_decision(app, ledger, client_of, path, status, names):
    """It sees no exception and no status, so it decides nothing; what it writes shares the fate of the body (P3, P5)."""
    seen = []

    @app.teardown_request
    async def teardown(error):
        seen.append((error, ledger.names()))
        await ledger.write("teardown")

    client = await client_of(app)
    answer = await client.post(path)

    assert (answer.status_code, ledger.names()) == (status, names)
    assert seen == [(None, names.replace("teardown", "").strip())]


async def test_teardown_that_fails(app, ledger, client_of):
    """Quart answers 500 then, and what it had answered before is committed already (P4)."""

    @app.teardown_request
    async def teardown(error):
        await ledger.write("teardown")
        raise ZeroDivisionError

    answer = await (await client_of(app)).post("/write")

    assert (answer.status_code, ledger.names()) == (500, "a")


async def test_before_request_that_answers(app, ledger, client_of):
    """A hook that answers by itself has the unit, and its status decides (P3)."""

    @app.before_request
    async def answer_early():
        await ledger.write("early")
        return "no", int(request.args["early"])

    client = await client_of(app)
    answers = [(await client.post(f"/write?early={status}")).status_code for status in (401, 202)]

    assert (answers, ledger.names()) == ([401, 202], "early")


async def test_error_handler_answers_a_failed_commit(app, ledger, client_of):
    """The handler has the original error, writes in the unit, and after_request hooks apply to its answer (P4b)."""
    seen = []

    @app.errorhandler(IntegrityError)
    async def conflict(error):
        seen.append((is_context_initiated(), type(error)))
        return "conflict", 409

    @app.after_request
    async def mark(response):
        response.headers["x-mark"] = "1"
        return response

    client = await client_of(app)
    answer = await client.post("/orphan")

    assert (answer.status_code, answer.text, answer.headers["x-mark"]) == (409, "conflict", "1")
    assert (seen, ledger.names()) == ([(True, IntegrityError)], "")


@pytest.mark.parametrize("kind", [IntegrityError, DBAPIError, Exception], ids=lambda kind: kind.__name__)
async def test_error_handler_of_a_blueprint_answers_a_failed_commit(app, ledger, client_of, kind):
    """Those of the blueprint come first, and for its own views only (P4b)."""
    blueprint = Blueprint("blueprint", __name__, url_prefix="/blueprint")

    @blueprint.post("/orphan")
    async def orphan():
        await ledger.write_orphan("view")
        return "never"

    blueprint.register_error_handler(kind, lambda error: (type(error).__name__, 409))
    app.register_error_handler(IntegrityError, lambda error: (type(error).__name__, 422))
    app.register_blueprint(blueprint)
    client = await client_of(app)

    answers = [await client.post("/blueprint/orphan"), await client.post("/orphan")]

    assert [(answer.status_code, answer.text) for answer in answers] == [(409, "IntegrityError"), (422, "IntegrityError")]
    assert ledger.names() == ""


async def test_error_handler_writes_after_a_failed_commit(app, ledger, client_of):
    """What the answer writes is decided by its own status; what the view wrote stays rolled back (P3, P4b)."""

    @app.errorhandler(IntegrityError)
    async def conflict(error):
        await ledger.write("handler")
        return "conflict", int(request.args["status"])

    client = await client_of(app)
    for status in (409, 200):
        answer = await client.post(f"/orphan?status={status}")
        assert answer.status_code == status

    assert ledger.names() == "handler"


async def test_failed_commit_where_exceptions_propagate(app, ledger, messages_of):
    """The server, or Quart's page with the traceback, gets the error of the commit as it gets any other (P4)."""
    app.config["PROPAGATE_EXCEPTIONS"] = True
    outcomes = []
    for path in ("/boom", "/orphan"):
        try:
            outcomes.append((await messages_of(app, path, method="POST", http_version="1.1", scheme="http"))[0])
        except (IntegrityError, ZeroDivisionError) as error:
            outcomes.append(type(error).__name__)
        except ExceptionGroup as group:  # since 0.23
            outcomes.append([type(error).__name__ for error in group.exceptions])

    assert outcomes in (
        ["ZeroDivisionError", "IntegrityError"],
        [["ZeroDivisionError"], ["IntegrityError"]],
        ["start 500 []"] * 2,
    )
    assert ledger.names() == ""


async def test_error_handler_of_500_answers_a_failed_commit(app, client_of):
    """The handler of 500 finds the error where it finds any other (P4b)."""

    @app.errorhandler(500)
    async def broken(error):
        return type(error.original_exception).__name__, 500

    client = await client_of(app)
    answer = await client.post("/orphan")

    assert (answer.status_code, answer.text) == (500, "IntegrityError")


@pytest.mark.parametrize("path", ["/boom", "/orphan"])
async def test_commit_that_fails_in_the_handler_of_500_is_no_success(app, ledger, client_of, path):
    """Quart ignores errors of hooks once it answers 500; an error of the commit is none of these (P4)."""

    @app.errorhandler(500)
    async def pretend(error):
        await ledger.write_orphan("b")
        return "fine", 200

    client = await client_of(app)
    answer = await client.post(path)

    assert (answer.status_code, ledger.names()) == (500, "")


async def test_unavailable_is_a_503_unless_the_application_answers(ledger, client_of):
    """The default is in the application's own table, behind its own handlers, whenever they were added (P19)."""
    answers = []
    for kind in (None, UnavailableError, ContextSqlaError):
        app = Quart(__name__)
        setup(app)

        @app.get("/")
        async def view():
            raise UnavailableError("no", retry_after=2.5)

        if kind is not None:
            app.register_error_handler(kind, lambda error: ("mine", 418))
        answer = await (await client_of(app)).get("/")
        answers.append((answer.status_code, answer.text, answer.headers.get("retry-after")))

    assert answers == [(503, "Service Unavailable", "3"), (418, "mine", None), (418, "mine", None)]


async def test_error_that_quart_answers_names_the_remedy(app, ledger, client_of):
    """The note on sharing a session is there, once, though the error never reaches the unit (P2)."""

    @app.post("/both")
    async def both():
        session = await db_session(ledger.db)
        outcomes = await asyncio.gather(*(session.execute(text("SELECT 1")) for _ in range(2)), return_exceptions=True)
        raise next(one for one in outcomes if isinstance(one, Exception))

    seen = []

    @app.errorhandler(InvalidRequestError)
    async def look(error):
        seen.extend(error.__notes__)
        return "busy", 500

    client = await client_of(app)
    await client.post("/both")

    assert ["run_in_new_ctx" in note for note in seen] == [True]


async def test_background_task_is_a_unit_of_its_own(app, ledger, client_of):
    """It begins after the response, sees what the view wrote, and commits; one that fails rolls back (P6)."""
    seen = []

    async def work(name, *, fail=False):
        seen.append((name, ledger.names()))
        await ledger.write(name)
        if fail:
            raise ZeroDivisionError

    @app.post("/later")
    async def later():
        await ledger.write("view")
        app.add_background_task(work, "one", fail="fail" in request.args)
        await asyncio.sleep(0)
        return "ok", int(request.args.get("status", "202"))

    client = await client_of(app)
    for query in ("?fail=1", "?status=409", ""):
        await client.post("/later" + query)
        await asyncio.gather(*app.background_tasks)

    assert seen == [("one", "view"), ("one", "view"), ("one", "one view view")]
    assert ledger.names() == "one one view view"


async def test_background_tasks_of_one_request_are_one_unit(app, ledger, client_of):
    """They run in their order and commit together; one that fails ends them all. The view that raised started them (P6)."""

    async def work(name):
        await ledger.write(name)
        if name == "bad":
            raise ZeroDivisionError

    @app.post("/later")
    async def later():
        await ledger.write("view")
        for name in request.args.getlist("job"):
            app.add_background_task(work, name)
        raise ZeroDivisionError

    client = await client_of(app)
    committed = []
    for query in ("?job=a&job=b", "?job=c&job=bad&job=d"):
        await client.post("/later" + query)
        await asyncio.gather(*app.background_tasks)
        committed.append(ledger.names())

    assert committed == ["a b", "a b"]


async def test_background_task_of_a_failed_commit_never_runs(app, ledger, client_of):
    """What the view started is dropped with what it wrote; what the error handler starts runs (P6)."""
    ran = []

    @app.post("/later")
    async def later():
        await ledger.write_orphan("view")
        app.add_background_task(ran.append, "view")
        return "ok"

    @app.errorhandler(IntegrityError)
    async def conflict(error):
        app.add_background_task(ran.append, "handler")
        return "conflict", 409

    client = await client_of(app)
    answer = await client.post("/later")
    await asyncio.gather(*app.background_tasks)

    assert (answer.status_code, ran) == (409, ["handler"])


async def test_background_task_of_a_stream_begins_with_it(app, ledger, client_of):
    """A stream may wait for what its background task makes; both begin after the commit (P5, P6)."""
    queue = asyncio.Queue()

    async def produce():
        await ledger.write("work")
        await queue.put(ledger.names())

    @app.get("/events")
    async def events():
        await ledger.write("view")
        app.add_background_task(produce)

        async def body():
            yield await queue.get()

        return Response(body())

    client = await client_of(app)
    answer = await client.get("/events")
    await asyncio.gather(*app.background_tasks)

    assert (answer.text, ledger.names()) == ("view", "view work")


async def test_background_task_outside_a_request_begins_at_once(app, ledger):
    """Started at startup or from a websocket it is a unit of its own, and waits for nothing (P6)."""

    async def work():
        await ledger.write("work")

    async with app.app_context():
        app.add_background_task(work)
    await asyncio.gather(*app.background_tasks)

    assert ledger.names() == "work"


async def test_background_task_started_by_a_stream(app, ledger, client_of):
    """The response is on its way then, and the task has a unit of its own at once (P6)."""

    async def work():
        await ledger.write("work")

    @app.get("/stream")
    async def stream():
        @stream_with_context
        async def body():
            yield b"a"
            app.add_background_task(work)
            yield b"b"

        return Response(body())

    client = await client_of(app)
    answer = await client.get("/stream")
    await asyncio.gather(*app.background_tasks)

    assert (answer.text, ledger.names()) == ("ab", "work")


@pytest.mark.parametrize("with_context", [False, True], ids=["plain", "stream_with_context"])
async def test_stream_writes_after_the_head(app, ledger, messages_of, with_context):
    """The view is committed before the head, the body before its last byte (P5)."""

    @app.get("/stream")
    async def stream():
        await ledger.write("view")

        async def body():
            yield b"one"
            await ledger.write("body")
            yield b"two"

        return Response(stream_with_context(body)() if with_context else body())

    log = await messages_of(app, "/stream", http_version="1.1", scheme="http")

    assert log == ["start 200 [view]", "body one+ [view]", "body two+ [view]", "body  [body view]"]


async def test_file_of_the_framework(app, ledger, client_of, tmp_path):
    """A file with a length is complete with its last piece, and committed before its head (P5)."""
    (tmp_path / "file.txt").write_text("x" * 20_000)

    @app.get("/file")
    async def file():
        await ledger.write("view")
        return await send_file(tmp_path / "file.txt")

    answer = await (await client_of(app)).get("/file")

    assert (len(answer.text), ledger.names()) == (20_000, "view")


async def test_websocket_is_no_unit(app, ledger):
    """A websocket asks for db_context(), and a background task that it starts has its own unit (P11)."""

    async def work():
        await ledger.write("work")

    @app.websocket("/ws")
    async def talk():
        with pytest.raises(ContextNotInitiatedError):
            await ledger.session()
        async with db_context():
            await ledger.write("message")
        app.add_background_task(work)
        await websocket.send("done")

    async with app.test_client().websocket("/ws") as socket:
        heard = await socket.receive()
    await asyncio.gather(*app.background_tasks)

    assert (heard, ledger.names()) == ("done", "message work")


async def test_cancelled_request_ends_its_handler(app, ledger, messages_of):
    """A server that cancels a request leaves no handler running on a session that is gone (P7, P10)."""
    begun, ended = asyncio.Event(), []

    @app.get("/wait")
    async def wait():
        await ledger.write("a")
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(is_context_initiated())

    serving = asyncio.create_task(messages_of(app, "/wait", http_version="1.1", scheme="http"))
    await asyncio.wait_for(begun.wait(), 10)
    serving.cancel()
    await asyncio.wait([serving])

    assert (serving.cancelled(), ended, ledger.names()) == (True, [True], "")


@pytest.mark.parametrize("steps", range(12))
async def test_request_that_is_cancelled_early_leaves_nothing(app, ledger, messages_of, steps):
    """After any number of steps of the loop its tasks are over with it, while its session is still opening too (P7, P10)."""
    before = asyncio.all_tasks()
    serving = asyncio.create_task(messages_of(app, "/write", http_version="1.1", scheme="http"))
    for _ in range(steps):
        await asyncio.sleep(0)
    serving.cancel()
    await asyncio.wait([serving])

    assert (serving.cancelled(), ledger.names()) == (True, "")
    assert [task for task in asyncio.all_tasks() - before if "handle_" in repr(task)] == []


async def test_client_that_leaves_cancels_the_view(app, ledger):
    """Whatever the view has written is rolled back; its background work is Quart's own affair, and runs (P6, P7)."""
    begun, ended = asyncio.Event(), []

    async def work():
        await ledger.write("work")

    @app.post("/wait")
    async def wait():
        await ledger.write("view")
        app.add_background_task(work)
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(is_context_initiated())

    async with app.test_client().request("/wait", method="POST") as connection:
        await connection.send_complete()
        await asyncio.wait_for(begun.wait(), 10)
        await connection.disconnect()
    await asyncio.gather(*app.background_tasks)

    assert (ended, ledger.names()) == ([True], "work")


async def test_websocket_that_is_left_rolls_its_block_back(app, ledger):
    """Quart cancels the handler of a client that has left (P7, P11)."""
    ended = asyncio.Event()

    @app.websocket("/ws")
    async def talk():
        try:
            async with db_context():
                await ledger.write("a")
                await websocket.send("go on")
                await websocket.receive()
        finally:
            ended.set()

    async with app.test_client().websocket("/ws") as socket:
        await socket.receive()
    await asyncio.wait_for(ended.wait(), 10)

    assert (ledger.names(), ledger.db.pool_status().checked_out) == ("", 0)


async def test_synchronous_view_reaches_its_session(app, ledger, client_of):
    """It runs in a thread, in the context of its request: a coroutine sent to the loop from there finds the unit (P2)."""
    loop = asyncio.get_running_loop()

    def view():
        asyncio.run_coroutine_threadsafe(ledger.write("sync"), loop).result(10)
        return "ok", int(request.args["status"])

    app.add_url_rule("/sync", view_func=view, methods=["POST"])
    client = await client_of(app)
    answers = [(await client.post(f"/sync?status={status}")).status_code for status in (409, 200)]

    assert (answers, ledger.names()) == ([409, 200], "sync")


async def test_middleware_within_and_around(app, ledger):
    """What was put around `asgi_app` before setup may write, answer by itself, or raise, and has the unit (P3, P4)."""
    outer = []

    class Middleware:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if b"raise" in scope["query_string"]:
                await ledger.write("raised")
                raise ZeroDivisionError
            if b"answer" in scope["query_string"]:
                await ledger.write("answered")
                await send({"type": "http.response.start", "status": int(scope["query_string"][-3:]), "headers": []})
                await send({"type": "http.response.body", "body": b"mine"})
                return
            await ledger.write("within")
            await self.app(scope, receive, send)

    plain = Quart(__name__)
    plain.add_url_rule("/", view_func=lambda: ("ok", int(request.args["status"])), methods=["POST"])
    plain.asgi_app = Middleware(plain.asgi_app)
    setup(plain, ledger.db)
    inner = plain.asgi_app

    async def around(scope, receive, send):
        outer.append(is_context_initiated())
        await inner(scope, receive, send)

    plain.asgi_app = around
    transport = httpx.ASGITransport(plain, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        urls = ["/?status=200", "/?status=409", "/?answer=201", "/?answer=403", "/?raise=1"]
        answers = [(await client.post(url)).status_code for url in urls]

    assert answers == [200, 409, 201, 403, 500]
    assert (ledger.names(), outer) == ("answered within", [False] * 5)


async def test_mounted_in_another_application(app, ledger):
    """Set up itself, inside an ASGI application that is set up as well, it has one unit and its error handlers (P4b, P12)."""

    @app.errorhandler(IntegrityError)
    async def conflict(error):
        return "conflict", 409

    async def dispatch(scope, receive, send):
        await ledger.write("outer")
        await app({**scope, "path": scope["path"].removeprefix("/mounted")}, receive, send)

    transport = httpx.ASGITransport(setup_asgi(dispatch), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answers = [(await client.post(f"/mounted{path}")).status_code for path in ("/write", "/orphan", "/write?status=400")]

    assert (answers, ledger.names()) == ([200, 409, 400], "a outer")


async def test_stream_that_is_given_up(app, ledger, messages_of):
    """Quart gives up after RESPONSE_TIMEOUT without an error; what the body wrote is rolled back, though the client stays (P5)."""
    app.config["RESPONSE_TIMEOUT"] = 0.1

    @app.get("/stream")
    async def stream():
        await ledger.write("view")

        async def body():
            await ledger.write("body")
            yield b"one"
            await asyncio.Event().wait()

        return Response(body())

    log = await messages_of(app, "/stream", http_version="1.1", scheme="http")

    assert log == ["start 200 [view]", "body one+ [view]"]
    assert ledger.names() == "view"


async def test_shared_transaction_of_a_test(app, ledger):
    """Quart's client, and test_app around it, join a marked test context (P12)."""
    async with rollback_session(ledger.db) as session, set_test_context(), put_savepoint_session_in_ctx(ledger.db, session):
        async with app.test_app() as running:
            answers = [await running.test_client().post(path) for path in ("/write", "/write?status=409", "/boom")]
            count = await session.scalar(text("SELECT count(*) FROM item"))

    assert [answer.status_code for answer in answers] == [200, 409, 500]
    assert (count, ledger.names()) == (1, "")


async def test_test_client_of_quart(app, ledger):
    """Quart's own client runs the application in the test's loop (P12)."""
    answer = await app.test_client().post("/write")

    assert (answer.status_code, ledger.names()) == (200, "a")


async def test_connects_are_closed_after_the_applications_own_hooks(ledger):
    """after_serving and while_serving may use the database to their end; then the connects are closed (P15)."""
    seen = []
    app = Quart(__name__)
    setup(app, ledger.db)

    @app.after_serving
    async def late():
        async with db_context():
            await ledger.write("late")
        seen.append(ledger.db.pool_status().size)

    async with app.test_app():
        pass

    assert (ledger.names(), len(seen)) == ("late", 1)
    assert ledger.db.pool_status().checked_out == 0


async def test_extension_is_registered(ledger):
    """`ContextSQLA(app)` and `init_app` register the extension; one may serve several applications."""
    extension = ContextSQLA(should_commit=lambda status: True)
    apps = [Quart("one"), Quart("two")]
    for app in apps:
        extension.init_app(app, ledger.db)

    assert [app.extensions["context_sqla"] is extension for app in apps] == [True, True]
    with pytest.raises(SetupError, match="already"):
        ContextSQLA(apps[0])


async def test_setup_after_the_start(ledger):
    """What is served cannot be set up any more."""
    app = Quart(__name__)
    async with app.test_app():
        with pytest.raises(SetupError, match="started"):
            setup(app, ledger.db)


async def test_where_no_wire_is_nothing_is_decided(app, ledger, client_of):
    """A request whose unit somebody else drives is left to them (P12)."""
    inner = app.asgi_app

    async def hide(scope, receive, send):
        await inner({**scope, SCOPE_KEY: None}, receive, send)

    app.asgi_app = hide
    async with db_context():
        answer = await httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test").post("/write")
        names = ledger.names()

    assert (answer.status_code, names, ledger.names()) == (200, "", "a")
