"""What Falcon does in its own way: its middleware, its rendering, its error handlers, its streams, its callbacks."""

import asyncio

import falcon
import falcon.asgi
import falcon.testing
import pytest
from context_sqla import ContextNotInitiatedError, UnavailableError, db_context, db_session, is_context_initiated
from context_sqla.adapters import Policy, Unit
from context_sqla.errors import ContextSqlaError, SetupError
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from context_sqla_asgi import SCOPE_KEY
from context_sqla_asgi import setup as setup_asgi
from context_sqla_falcon import setup
from falcon.asgi import SSEvent
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, InvalidRequestError


def resource(**responders):
    """Make a resource of functions that take a request and a response."""

    def method(function):
        async def responder(self, req, resp, **params):
            await function(req, resp, **params)

        return responder

    return type("Resource", (), {f"on_{name}": method(function) for name, function in responders.items()})()


@pytest.fixture(name="app")
def _app(ledger, tmp_path):
    """An application that writes in every way."""
    app = falcon.asgi.App()

    async def write(req, resp):
        await ledger.write("a")
        resp.status, resp.text = int(req.get_param("status", default="200")), "ok"

    async def move(req, resp):
        await ledger.write("a")
        raise falcon.HTTPFound("/write")

    async def refuse(req, resp):
        await ledger.write("a")
        raise falcon.HTTPConflict

    async def boom(req, resp):
        await ledger.write("a")
        raise ZeroDivisionError

    async def orphan(req, resp):
        await ledger.write_orphan("a")

    app.add_route("/write", resource(get=write, post=write))
    for name, function in {"move": move, "refuse": refuse, "boom": boom, "orphan": orphan}.items():
        app.add_route(f"/{name}", resource(post=function))
    app.add_static_route("/static", str(tmp_path))
    setup(app, ledger.db)
    return app


@pytest.mark.parametrize(
    ("path", "status", "names"),
    [
        ("/write", 200, "a"),
        ("/write?status=303", 303, "a"),
        ("/write?status=400", 400, ""),
        ("/write?status=500", 500, ""),
        ("/move", 302, "a"),
        ("/refuse", 409, ""),
        ("/boom", 500, ""),
        ("/orphan", 500, ""),
        ("/nothing", 404, ""),
    ],
)
async def test_the_status_decides(app, ledger, client_of, path, status, names):
    """Falcon answers every exception itself; the decision follows the status that comes of it (P3, P4)."""
    answer = await (await client_of(app)).post(path)

    assert (answer.status_code, ledger.names()) == (status, names)


async def test_methods_and_files_open_nothing(app, ledger, client_of, tmp_path):
    """405, OPTIONS and static files are answered as ever, and nothing is opened for them (P1)."""
    (tmp_path / "page.txt").write_text("page")
    client = await client_of(app)

    answers = [await client.put("/write"), await client.options("/write"), await client.get("/static/page.txt")]

    assert [answer.status_code for answer in answers] == [405, 200, 200]
    assert answers[-1].text == "page"
    assert ledger.db.pool_status().checked_out == 0


class Writing:
    """Middleware that writes after the responder."""

    def __init__(self, ledger, name, error=None):
        self.ledger, self.name, self.error = ledger, name, error

    async def process_response(self, req, resp, resource, req_succeeded):
        await self.ledger.write(self.name)
        if (status := req.get_param("then")) is not None:
            resp.status = int(status)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("independent", [True, False])
async def test_middleware_writes_before_the_commit(ledger, client_of, independent):
    """What middleware writes after the responder is committed with it, added before or after `setup`; its status decides (P3)."""
    app = falcon.asgi.App(middleware=[Writing(ledger, "first")], independent_middleware=independent)

    async def write(req, resp):
        await ledger.write("responder")

    app.add_route("/", resource(post=write))
    setup(app, ledger.db)
    app.add_middleware(Writing(ledger, "second"))
    client = await client_of(app)

    refused = await client.post("/?then=400")
    names = ledger.names()
    answer = await client.post("/")

    assert (refused.status_code, names) == (400, "")
    assert (answer.status_code, ledger.names()) == (200, "first responder second")


async def test_middleware_that_fails_after_the_responder_rolls_back(app, ledger, client_of):
    """The responder had succeeded; nothing of it is committed (P3)."""
    app.add_middleware(Writing(ledger, "middleware", ZeroDivisionError()))

    answer = await (await client_of(app)).post("/write")

    assert (answer.status_code, ledger.names()) == (500, "")


async def test_middleware_that_answers_early(app, ledger, client_of):
    """Middleware that completes the response has the unit, and its status decides (P3)."""

    class Early:
        async def process_request(self, req, resp):
            await ledger.write("early")
            resp.status, resp.complete = int(req.get_param("early")), True

    app.add_middleware(Early())
    client = await client_of(app)
    answers = [(await client.post(f"/write?early={status}")).status_code for status in (401, 202)]

    assert (answers, ledger.names()) == ([401, 202], "early")


@pytest.mark.parametrize("what", ["media", "text", "header", "status"])
async def test_response_that_cannot_be_made_rolls_back(app, ledger, client_of, what):
    """Falcon renders the body and encodes the head when all middleware is done: still before the commit (P3)."""

    async def broken(req, resp):
        await ledger.write("a")
        if what == "media":
            resp.media = {"value": object()}
        elif what == "text":
            resp.text = "\ud800"
        elif what == "header":
            resp.set_header("x-name", "\u20ac")
        else:
            resp.status = "unheard of"

    app.add_route("/broken", resource(post=broken))

    answer = await (await client_of(app)).post("/broken")

    assert (answer.status_code, ledger.names()) == (500, "")


async def test_error_handler_answers_a_failed_commit(app, ledger, client_of):
    """The handler has the original error, writes in the unit, and CORS applies to its answer (P4b)."""
    seen = []

    async def conflict(req, resp, error, params):
        seen.append((is_context_initiated(), type(error), req.path))
        resp.status, resp.media = 409, {"detail": "conflict"}

    app.add_error_handler(IntegrityError, conflict)
    app.add_middleware(falcon.CORSMiddleware())
    answer = await (await client_of(app)).post("/orphan", headers={"origin": "https://example.org"})

    assert (answer.status_code, answer.json()) == (409, {"detail": "conflict"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert (seen, ledger.names()) == ([(True, IntegrityError, "/orphan")], "")


@pytest.mark.parametrize(("status", "names"), [(409, ""), (200, "handler")])
async def test_error_handler_writes_after_a_failed_commit(app, ledger, client_of, status, names):
    """What the answer writes is decided by its own status; what the responder wrote stays rolled back (P3, P4b)."""

    async def conflict(req, resp, error, params):
        await ledger.write("handler")
        resp.status = status

    app.add_error_handler(IntegrityError, conflict)
    answer = await (await client_of(app)).post("/orphan")

    assert (answer.status_code, ledger.names()) == (status, names)


@pytest.mark.parametrize("kind", ["generator", "file", "events"])
async def test_answer_that_is_given_up_leaves_nothing_behind(app, ledger, client_of, kind):
    """When the commit fails, Falcon alone would send the stream of the answer under the status of the other (P4, P6)."""
    seen = []

    class File:
        async def read(self, size=-1):
            seen.append("read")
            return b""

        async def close(self):
            seen.append("closed")

    async def generator():
        seen.append("generator")
        yield b"piece"

    async def work():
        seen.append("work")

    async def give(req, resp):
        await ledger.write_orphan("a")
        resp.schedule(work)
        resp.schedule_sync(lambda: seen.append("work"))
        if kind == "events":
            resp.sse = generator()
        else:
            resp.set_stream(File() if kind == "file" else generator(), 5)

    async def conflict(req, resp, error, params):
        resp.status = 409

    app.add_route("/give", resource(post=give))
    app.add_error_handler(IntegrityError, conflict)
    answer = await (await client_of(app)).post("/give")

    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (409, b"", "0")
    assert seen == (["closed"] if kind == "file" else [])


async def test_error_of_closing_what_is_given_up_is_a_note(app, ledger, client_of):
    """The error of the commit is the one that is answered (P8)."""
    seen = []

    class File:
        async def read(self, size=-1):
            raise AssertionError

        async def close(self):
            raise ZeroDivisionError

    async def give(req, resp):
        await ledger.write_orphan("a")
        resp.stream = File()

    async def conflict(req, resp, error, params):
        seen.extend(error.__notes__)
        resp.status = 409

    app.add_route("/give", resource(post=give))
    app.add_error_handler(IntegrityError, conflict)
    answer = await (await client_of(app)).post("/give")

    assert (answer.status_code, ["ZeroDivisionError" in note for note in seen]) == (409, [True])


async def test_unavailable_is_a_503_unless_the_application_answers(ledger, client_of):
    """The default gives way to the application's own handlers, whenever they were added, but not to one for all (P19)."""
    answers = []
    for kind in (None, Exception, UnavailableError, ContextSqlaError):
        app = falcon.asgi.App()
        setup(app)

        async def refuse(req, resp):
            raise UnavailableError("no", retry_after=2.5)

        async def mine(req, resp, error, params):
            resp.status, resp.text = 418, "mine"

        app.add_route("/", resource(get=refuse))
        if kind is not None:
            app.add_error_handler(kind, mine)
        answer = await (await client_of(app)).get("/")
        answers.append((answer.status_code, answer.headers.get("retry-after")))

    assert answers == [(503, "3"), (503, "3"), (418, None), (418, None)]


async def test_error_that_falcon_answers_names_the_remedy(app, ledger, client_of):
    """The note on sharing a session is there, once, though the error never reaches the unit (P2)."""
    seen = []

    async def both(req, resp):
        session = await db_session(ledger.db)
        outcomes = await asyncio.gather(*(session.execute(text("SELECT 1")) for _ in range(2)), return_exceptions=True)
        raise next(one for one in outcomes if isinstance(one, Exception))

    async def look(req, resp, error, params):
        seen.extend(error.__notes__)
        resp.status = 500

    app.add_route("/both", resource(post=both))
    app.add_error_handler(InvalidRequestError, look)
    await (await client_of(app)).post("/both")

    assert ["run_in_new_ctx" in note for note in seen] == [True]


async def test_scheduled_work_is_a_unit_of_its_own(app, ledger, client_of):
    """The coroutine functions of one response run in their order and commit together; one that fails ends them all (P6)."""
    done = asyncio.Event()
    seen = []

    def job(name):
        async def work():
            try:
                seen.append(ledger.names())
                await ledger.write(name)
                if name == "bad":
                    raise ZeroDivisionError
            finally:
                if name in ("bad", "last"):
                    done.set()

        return work

    async def later(req, resp):
        await ledger.write("responder")
        for name in req.get_param_as_list("job"):
            resp.schedule(job(name))
        resp.status = int(req.get_param("status"))

    async def committed(names):
        async with asyncio.timeout(10):
            await done.wait()
            while ledger.names() != names or ledger.db.pool_status().checked_out:
                await asyncio.sleep(0.001)
        done.clear()

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(type(context["exception"]).__name__))
    app.add_route("/later", resource(post=later))
    client = await client_of(app)
    await client.post("/later?status=500&job=one&job=bad&job=never")
    await committed("")
    await client.post("/later?status=202&job=one&job=last")
    await committed("last one responder")

    assert seen == ["", "", "ZeroDivisionError", "responder", "responder"]


async def test_plain_functions_are_scheduled_as_ever(app, client_of):
    """They run in a thread, which knows no unit (P6)."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    seen = []

    def work():
        seen.append(is_context_initiated())
        loop.call_soon_threadsafe(done.set)

    async def later(req, resp):
        resp.schedule_sync(work)

    app.add_route("/later", resource(post=later))
    await (await client_of(app)).post("/later")
    await asyncio.wait_for(done.wait(), 10)

    assert seen == [False]


async def test_stream_is_a_transaction_of_its_own(app, ledger, messages_of):
    """The head is committed, then the body before its last message; a piece that is None ends it, as Falcon has it (P5)."""
    seen = []

    async def lines():
        try:
            yield b"one"
            await ledger.write("body")
            yield None
            yield b"never"
        finally:
            seen.append(is_context_initiated())

    async def stream(req, resp):
        await ledger.write("a")
        resp.stream = lines()

    app.add_route("/stream", resource(get=stream))
    log = await messages_of(app, "/stream")

    assert log == ["start 200 [a]", "body one+ [a]", "body  [a body]"]
    assert seen == [True]


async def test_stream_whose_server_fails_is_closed_at_once(app, ledger):
    """Falcon closes what has a `close`, and generators have none: a connection would be held until somebody collects them (P5)."""
    seen = []

    async def lines():
        try:
            await ledger.write("body")
            yield b"one"
        finally:
            seen.append((is_context_initiated(), await (await ledger.session()).scalar(text("SELECT 1"))))

    async def stream(req, resp):
        resp.stream = lines()

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        if message["type"] == "http.response.body":
            raise OSError

    app.add_route("/stream", resource(get=stream))
    scope = {"type": "http", "method": "GET", "path": "/stream", "headers": [], "query_string": b"", "root_path": ""}
    with pytest.raises(OSError):
        await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)

    assert (seen, ledger.names()) == ([(True, 1)], "")


@pytest.mark.parametrize("read", [True, False])
async def test_stream_ends_when_its_client_has_left(app, ledger, read):
    """Falcon does not ask the server; the body of a request that the stream may still read is not taken from it (P5)."""
    messages = [{"type": "http.request", "body": b"a", "more_body": True}]
    messages += [{"type": "http.request", "body": b"b"}] if read else []
    sent = []

    async def lines(req):
        for number in range(3):
            await ledger.write(str(number))
            yield b"piece"

    async def stream(req, resp):
        if read:
            sent.append(await req.stream.read())
        resp.stream = lines(req)

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message.get("body", message.get("status")))

    app.add_route("/stream", resource(post=stream))
    scope = {"type": "http", "method": "POST", "path": "/stream", "headers": [], "query_string": b"", "root_path": ""}
    await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)

    assert sent == ([b"ab", 200, None] if read else [200, b"piece", b"piece", b"piece", None])
    assert ledger.names() == ("" if read else "0 1 2")


async def test_events_are_a_stream(app, ledger, messages_of):
    """Server-sent events are committed at their head and at their end; scheduled work starts with them (P5, P6)."""
    started = asyncio.Event()

    async def work():
        started.set()

    async def events():
        await asyncio.wait_for(started.wait(), 10)
        yield SSEvent(text="one")
        await ledger.write("body")

    async def stream(req, resp):
        await ledger.write("a")
        resp.schedule(work)
        resp.sse = events()

    app.add_route("/events", resource(get=stream))
    log = await messages_of(app, "/events")

    assert log == ["start 200 [a]", "body data: one\n\n+ [a]", "body  [a body]"]


async def test_events_of_a_client_that_has_left_roll_back(app, ledger):
    """Falcon watches the server while it sends events, and ends them after the next one; that is no good end (P5)."""
    gone = asyncio.Event()
    messages = [{"type": "http.request"}]

    async def events():
        await ledger.write("body")
        yield SSEvent(text="one")
        gone.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        yield SSEvent(text="two")
        raise AssertionError

    async def stream(req, resp):
        await ledger.write("a")
        resp.sse = events()

    async def receive():
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    app.add_route("/events", resource(get=stream))
    scope = {"type": "http", "method": "GET", "path": "/events", "headers": [], "query_string": b"", "root_path": ""}
    await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)

    assert ledger.names() == "a"


async def test_sink_is_part_of_the_request(app, ledger, client_of):
    """It has no resource, and the unit all the same (P3)."""

    async def sink(req, resp, **params):
        await ledger.write("sink")
        resp.status = 202

    app.add_sink(sink, "/sink")
    answer = await (await client_of(app)).post("/sink/it")

    assert (answer.status_code, ledger.names()) == (202, "sink")


async def test_websocket_is_no_unit(app, ledger, messages_of):
    """Not in its middleware and not in its responder, though the server was started in a unit; one per message is (P11)."""
    refused = []

    async def ask():
        with pytest.raises(ContextNotInitiatedError):
            await ledger.session()
        refused.append(True)

    class Middleware:
        async def process_request_ws(self, req, ws):
            await ask()

        async def process_resource_ws(self, req, ws, resource, params):
            await ask()

    class Talk:
        async def on_websocket(self, req, ws):
            await ask()
            await ws.accept()
            async with db_context():
                await ledger.write("message")
            raise UnavailableError("no")

    app.add_route("/ws", Talk())
    app.add_middleware(Middleware())
    async with db_context():
        log = await messages_of(app, "/ws", kind="websocket")

    assert (len(refused), ledger.names()) == (3, "message")
    assert log[0].startswith("accept")


async def test_setup_is_done_once(app, ledger, client_of):
    """A second time, and after the first request, it says what to do (P19)."""
    with pytest.raises(SetupError, match="already"):
        setup(app, ledger.db)
    await (await client_of(app)).get("/write")
    with pytest.raises(SetupError, match="started"):
        setup(app, ledger.db)


async def test_setup_takes_connects_only(ledger):
    """Anything else is refused before the application is touched (P19)."""
    app = falcon.asgi.App()
    with pytest.raises(TypeError, match="DBConnect"):
        setup(app, "sqlite://")

    assert type(app) is falcon.asgi.App


async def test_application_keeps_its_class(ledger, client_of):
    """A class of the application's own, with attributes and a `__call__`, is what it was."""

    class Mine(falcon.asgi.App):
        def __init__(self):
            super().__init__()
            self.calls = 0

        async def __call__(self, scope, receive, send):
            self.calls += is_context_initiated()
            await super().__call__(scope, receive, send)

    app = Mine()
    setup(app, ledger.db)
    answer = await (await client_of(app)).get("/")

    assert (answer.status_code, app.calls, isinstance(app, Mine), type(app).__name__) == (404, 1, True, "Mine")


async def test_connects_are_closed_after_the_applications_own(ledger):
    """`process_shutdown` still has the database; a startup that fails closes as well (P15)."""
    seen = []

    class Hooks:
        async def process_startup(self, scope, event):
            async with db_context():
                await ledger.write("start")

        async def process_shutdown(self, scope, event):
            async with db_context():
                await ledger.write("stop")
            seen.append(ledger.db.pool_status().size > 0)

    app = falcon.asgi.App(middleware=[Hooks()])
    setup(app, ledger.db)
    async with falcon.testing.ASGIConductor(app):
        pass

    assert (ledger.names(), seen) == ("start stop", [True])
    assert ledger.db.pool_status().size == 0


async def test_requests_are_named_by_their_route(app, ledger, client_of):
    """The label of a unit has the names of the parameters, not their values (P16)."""
    seen = []

    async def look(req, resp, number):
        seen.append(req.scope[SCOPE_KEY].unit.label())

    app.add_route("/users/{number:int}", resource(get=look))
    await (await client_of(app)).get("/users/7")

    assert seen == ["GET /users/{number}"]


async def test_falcon_behind_another_adapter_is_one_unit(app, ledger, client_of):
    """The application that stands around it opened the unit; this one decides, and says so to the wire (P12)."""

    async def stream(req, resp):
        async def lines():
            yield b"one"
            await ledger.write("body")

        await ledger.write("a")
        resp.stream = lines()

    app.add_route("/stream", resource(get=stream))
    answer = await (await client_of(setup_asgi(app))).get("/stream")

    assert (answer.text, ledger.names()) == ("one", "a body")


async def test_unit_that_no_wire_drives_is_left_to_its_owner(app, ledger, client_of):
    """Function middleware of Starlette's around a mounted Falcon decides when the response comes by (P12)."""
    unit = Unit.enter(Policy())

    async def outer(scope, receive, send):
        await app({**scope, SCOPE_KEY: None}, receive, send)

    answer = await (await client_of(outer)).get("/write")
    names = ledger.names()
    await unit.head(answer.status_code)
    await unit.end_of_body()
    await unit.close(None)

    assert (answer.status_code, names, ledger.names()) == (200, "", "a")


async def test_falcons_client_in_the_tests_loop_shares_its_transaction(app, ledger):
    """`ASGIConductor` runs the application in the loop of the test, so a marked context is joined (P12)."""
    async with rollback_session(ledger.db) as session, set_test_context(), put_savepoint_session_in_ctx(ledger.db, session):
        async with falcon.testing.ASGIConductor(app) as conductor:
            answer = await conductor.simulate_post("/write")
        names = [name for (name,) in await session.execute(text("SELECT name FROM item"))]

    assert (answer.status_code, names, ledger.names()) == (200, ["a"], "")


def test_falcons_client_with_a_loop_of_its_own(app, ledger):
    """`simulate_request` makes a loop for each call: with real commits it works (P15)."""
    statuses = [falcon.testing.simulate_post(app, "/write").status_code for _ in range(2)]

    assert (statuses, ledger.names()) == ([200, 200], "a a")
