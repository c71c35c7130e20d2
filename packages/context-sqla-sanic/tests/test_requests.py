"""Sanic's traps, on its own server and as an ASGI application."""

import asyncio

import pytest
from context_sqla import ContextClosedError, db_session, is_context_initiated, on_commit, run_in_new_ctx
from context_sqla.adapters import Phase
from context_sqla_sanic import setup
from sanic import Blueprint, empty, json, text
from sanic.exceptions import Forbidden, NotFound, SanicException
from sanic.response import ResponseStream
from sqlalchemy.exc import IntegrityError


async def refuse(session):
    """Refuse the commit."""
    raise ZeroDivisionError("refused")


# The decision


async def test_refused_commit_is_no_200_although_response_middleware_swallows_errors(app, ledger, serve):
    """What Sanic swallows in response middleware, it does not swallow here (P4)."""
    setup(app, ledger.db, before_commit=refuse)

    @app.post("/")
    async def handler(request):
        await ledger.write("a")
        return text("ok")

    async with serve(app) as server:
        answer = await server.request("POST")

    assert (answer.status_code, ledger.names()) == (500, "")


async def test_response_middleware_decides_with_its_own_status_and_writes_before_the_commit(app, ledger, serve):
    """The response that is sent counts, and what response middleware writes is part of the request (P3, P4)."""
    setup(app, ledger.db)

    @app.on_response
    async def replace(request, response):
        await ledger.write("middleware")
        return text("no", 500) if request.path == "/replaced" else None

    @app.on_response
    async def swallowed(request, response):
        if request.path == "/swallowed":
            raise ZeroDivisionError  # Sanic logs it, calls no other one, and goes on

    @app.post("/<path>")
    async def handler(request, path):
        await ledger.write("handler")
        return text("ok", 201)

    async with serve(app) as server:
        replaced = await server.request("POST", "/replaced")
        assert (replaced.status_code, ledger.names()) == (500, "")
        kept = await server.request("POST", "/kept")
        assert (kept.status_code, ledger.names()) == (201, "handler middleware")
        swallowed = await server.request("POST", "/swallowed")

    assert (swallowed.status_code, ledger.names()) == (201, "handler handler middleware")


async def test_request_middleware_that_answers_or_raises_rolls_back(app, ledger, serve):
    """Other people's middleware answers by itself: the unit decides by that answer (P3)."""
    setup(app, ledger.db)

    @app.on_request
    async def guard(request):
        await ledger.write(request.path[1:])
        if request.path == "/answers":
            return text("no", 401)
        if request.path == "/raises":
            raise Forbidden("no")
        if request.path == "/crashes":
            raise ZeroDivisionError
        return text("fine") if request.path == "/welcomes" else None

    @app.get("/<path>")
    async def handler(request, path):
        return text("ok")

    async with serve(app) as server:
        statuses = [
            (await server.request("GET", f"/{path}")).status_code for path in ("answers", "raises", "crashes", "welcomes", "a")
        ]

    assert statuses == [401, 403, 500, 200, 200]
    assert ledger.names() == "a welcomes"


@pytest.mark.parametrize("before", [True, False])
async def test_signal_handlers_of_others_do_not_disturb(app, ledger, serve, before):
    """They are inside the unit, and one that ends the chain of its signal leaves nothing open."""
    if not before:
        setup(app, ledger.db)

    async def write(**context):
        await ledger.write("signal")
        return True  # Sanic calls no handler after this one

    app.signal("http.lifecycle.response")(write)
    app.signal("http.routing.after")(write)
    if before:
        setup(app, ledger.db)

    @app.post("/")
    async def handler(request):
        return text(str(ledger.db.pool_status().checked_out))

    async with serve(app) as server:
        answers = [(await server.request("POST")).text for _ in range(2)]

    assert answers == ["1", "1"]
    assert ledger.names() == "signal signal signal signal"


# Errors


async def test_response_middleware_runs_for_the_answer_to_a_failed_commit(app, ledger, serve):
    """The application's handler answers, inside the unit, and its middleware stands around that answer (P4b)."""
    setup(app, ledger.db)

    @app.exception(IntegrityError)
    async def conflict(request, exc):
        return json({"initiated": is_context_initiated()}, 409)

    @app.on_response
    async def mark(request, response):
        response.headers["x-mark"] = "1"

    @app.post("/")
    async def handler(request):
        await ledger.write_orphan("a")
        return text("ok")

    async with serve(app) as server:
        answer = await server.request("POST")

    assert (answer.status_code, answer.json(), answer.headers["x-mark"]) == (409, {"initiated": True}, "1")
    assert ledger.names() == ""


async def test_blueprint_answers_the_failed_commit_of_its_own_handlers(app, ledger, serve):
    """Blueprints and their exception handlers are inside (P4b)."""
    setup(app, ledger.db)
    blueprint = Blueprint("users", url_prefix="/users")

    @blueprint.exception(IntegrityError)
    async def conflict(request, exc):
        return text("conflict", 409)

    @blueprint.post("/<name>")
    async def handler(request, name):
        await (ledger.write_orphan if name == "orphan" else ledger.write)(name)
        return text("ok", 201)

    app.blueprint(blueprint)

    async with serve(app) as server:
        statuses = [(await server.request("POST", f"/users/{name}")).status_code for name in ("orphan", "good")]

    assert (statuses, ledger.names()) == ([409, 201], "good")


async def test_failed_commit_stops_a_handler_that_responds_itself(app, ledger, serve):
    """`await request.respond()` raises the error, before the head: it is answered as any other (P4b)."""
    setup(app, ledger.db)
    went_on = []

    @app.exception(IntegrityError)
    async def conflict(request, exc):
        return text("conflict", 409)

    @app.post("/")
    async def handler(request):
        await ledger.write_orphan("a")
        response = await request.respond(status=201)
        went_on.append(True)
        await response.send("ok")

    async with serve(app) as server:
        answer = await server.request("POST")

    assert (answer.status_code, answer.text, went_on) == (409, "conflict", [])


@pytest.mark.parametrize("rule", [None, lambda status: True])
async def test_refused_commit_of_an_exception_handlers_answer_is_no_success(app, ledger, serve, rule):
    """Sanic would send the answer all the same: it is replaced, once, whatever the rule says (P4)."""
    setup(app, ledger.db, before_commit=refuse, should_commit=rule)

    @app.exception(KeyError)
    async def answer_key(request, exc):
        await ledger.write("a")
        return text("fine")

    @app.on_response
    async def write(request, response):
        if response.status < 400:
            await ledger.write("b")

    @app.get("/")
    async def handler(request):
        raise KeyError

    async with serve(app) as server:
        answers = [await server.request("GET") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [500, 500]
    assert ledger.names() == ""


async def test_exception_handler_that_crashes_rolls_back(app, ledger, serve):
    """Sanic's own answer to that is a 500, and what either has written is gone (P3)."""
    setup(app, ledger.db)

    @app.exception(KeyError)
    async def crash(request, exc):
        await ledger.write("b")
        raise ZeroDivisionError

    @app.get("/")
    async def handler(request):
        await ledger.write("a")
        raise KeyError

    async with serve(app) as server:
        answer = await server.request("GET")

    assert (answer.status_code, ledger.names()) == (500, "")


async def test_what_a_handler_for_404_writes_follows_the_rule(app, ledger, serve):
    """404 and 405 have a unit for the application's handler too, and none of it stays."""
    setup(app, ledger.db)
    seen = []

    @app.exception(SanicException)
    async def refused(request, exc):
        await ledger.write("a")
        seen.append((request.path, exc.status_code))
        return text("refused", exc.status_code) if request.path != "/kept" else text("kept")

    app.post("/there")(lambda request: text("ok"))

    async with serve(app) as server:
        statuses = [(await server.request("GET", path)).status_code for path in ("/nowhere", "/there", "/kept")]

    assert statuses == [404, 405, 200]
    assert seen == [("/nowhere", 404), ("/there", 405), ("/kept", 404)]
    assert ledger.names() == "a"


async def test_response_timeout_rolls_back(app, ledger, serve_natively):
    """Sanic cancels the handler and answers 503 on the same task: nothing is committed, and nothing is left (P7)."""
    app.config.RESPONSE_TIMEOUT = 0.3
    setup(app, ledger.db)

    @app.post("/")
    async def handler(request):
        await ledger.write("a")
        await asyncio.Event().wait()

    async with serve_natively(app) as server:
        answer = await server.request("POST")
        assert ledger.db.pool_status().checked_out == 0

    assert (answer.status_code, ledger.names()) == (503, "")


# One task per connection


async def test_requests_of_one_connection_have_units_of_their_own(app, ledger, serve_natively):
    """One task serves a connection, whose end is no end of a request: each commits and ends by itself (P10, P12)."""
    setup(app, ledger.db)
    seen, errors, tasks, units = [], [], set(), []

    @app.post("/<name>")
    async def handler(request, name):
        tasks.add(asyncio.current_task())
        units.append(request.unit)
        if seen:
            try:
                await seen[-1].connection()
            except ContextClosedError as exc:
                errors.append(exc)
        seen.append(await db_session(ledger.db))
        await ledger.write(name)
        return text("ok", 404 if name == "b" else 200)

    async with serve_natively(app) as server:
        for name in "abc":
            await server.request("POST", f"/{name}")
            assert [unit.phase for unit in units] == [Phase.CLOSED] * len(units)

    assert len(tasks) == 1
    assert len({id(session) for session in seen}) == 3
    assert len(errors) == 2
    assert ledger.names() == "a c"


async def test_upgrade_header_alone_makes_no_websocket(app, ledger, serve):
    """The route decides, not a header that any client can send (P11)."""
    setup(app, ledger.db)

    @app.post("/")
    async def handler(request):
        await ledger.write("a")
        return text("ok")

    async with serve(app) as server:
        answer = await server.request("POST", headers={"upgrade": "websocket", "connection": "upgrade"})

    assert (answer.status_code, ledger.names()) == (200, "a")


async def test_plain_request_to_a_websocket_route_is_refused_and_answered_in_a_unit(app, ledger, serve_natively):
    """The handshake fails; what answers that is a request like any other (P11)."""
    setup(app, ledger.db)
    seen = []

    @app.exception(Exception)
    async def answer_any(request, exc):
        seen.append(is_context_initiated())
        return text("no", 400)

    @app.websocket("/ws")
    async def handler(request, ws):
        raise AssertionError

    async with serve_natively(app) as server:
        answer = await server.request("GET", "/ws")

    assert (answer.status_code, seen) == (400, [True])


# Bodies


@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}], ids=["chunked", "length"])
@pytest.mark.parametrize("how", ["error", "commit", "stream"])
async def test_failed_stream_does_not_look_complete(app, ledger, serve_natively, how, headers):
    """Sanic would end the chunked body well (P5)."""
    import httpx

    setup(app, ledger.db)

    async def body(response):
        await response.send("one")
        await (ledger.write_orphan if how == "commit" else ledger.write)("a")
        if how == "error":
            raise ZeroDivisionError
        await response.send("more...")

    @app.get("/")
    async def handler(request):
        if how == "stream":

            async def stream(response):
                await response.write("one")
                await ledger.write("a")
                raise ZeroDivisionError

            return ResponseStream(stream, headers=headers)
        return await body(await request.respond(headers=headers))

    async with serve_natively(app) as server:
        with pytest.raises(httpx.RemoteProtocolError):
            await server.request("GET")

    assert ledger.names() == ""


async def test_file_stream_and_response_stream_commit_before_the_head_and_at_the_end(app, ledger, serve):
    """Sanic's older kind of stream goes the same way (P4, P5)."""
    setup(app, ledger.db)
    seen = []

    @app.post("/")
    async def handler(request):
        async def stream(response):
            seen.append(ledger.names())
            await ledger.write("body")
            await response.write("one")

        await ledger.write("handler")
        return ResponseStream(stream)

    async with serve(app) as server:
        answer = await server.request("POST")

    assert (answer.text, seen, ledger.names()) == ("one", ["handler"], "body handler")


async def test_body_commits_before_its_end_by_hand(app, ledger, serve):
    """`eof` in the handler is the last byte: what comes after it is background work (P5, P6)."""
    setup(app, ledger.db)
    seen = []

    @app.get("/")
    async def handler(request):
        response = await request.respond()
        await response.send("one")
        await ledger.write("a")
        await response.eof()
        seen.append(ledger.names())
        await ledger.write("after")

    async with serve(app) as server:
        assert (await server.request("GET")).text == "one"
        await ledger.until("a after")

    assert seen == ["a"]


async def test_what_an_exception_handler_writes_after_the_last_byte_stays(app, ledger, serve_as_asgi):
    """It is background work, which commits after an error's answer too (P6); Sanic's own server takes it for no answer."""
    setup(app, ledger.db)

    @app.exception(KeyError)
    async def answer(request, exc):
        await ledger.write("answer")
        response = await request.respond(status=404)
        await response.eof()
        await ledger.write("after")

    @app.get("/")
    async def handler(request):
        raise KeyError

    async with serve_as_asgi(app) as server:
        answered = await server.request("GET")

    assert (answered.status_code, ledger.names()) == (404, "after")


async def test_failed_commit_after_the_last_byte_is_reported(app, ledger, serve, caplog):
    """Nobody can be answered any more, but the application's signal handlers are told, and Sanic logs it (P4, P6)."""
    setup(app, ledger.db)
    told, reported = [], asyncio.Event()

    @app.signal("http.lifecycle.exception")
    async def tell(exception, **context):
        told.append(type(exception))
        reported.set()

    @app.get("/")
    async def handler(request):
        response = await request.respond(status=201)
        await response.eof()
        await ledger.write_orphan("a")

    async with serve(app) as server:
        answer = await server.request("GET")
        await asyncio.wait_for(reported.wait(), 10)

    assert answer.status_code == 201
    assert told == [IntegrityError]
    assert "FOREIGN KEY" in caplog.text
    assert ledger.names() == ""


async def test_client_that_leaves_a_stream_leaves_nothing_behind(app, ledger, serve_natively):
    """Sanic cancels the connection's task and says nothing more: the unit ends all the same (P5, P7)."""
    setup(app, ledger.db)
    tasks, units = [], []

    @app.get("/")
    async def handler(request):
        tasks.append(asyncio.current_task())
        units.append(request.unit)
        await ledger.write("handler")
        response = await request.respond()
        await ledger.write("body")
        await response.send("one")
        await asyncio.Event().wait()

    async with serve_natively(app) as server:
        await server.leave("/", seen=b"one")
        await asyncio.wait(tasks, timeout=10)

    await ledger.db.close()  # it waits for what the unit does at its end
    assert units[0].phase is Phase.CLOSED
    assert ledger.names() == "handler"


# All kinds of requests


async def test_head_options_and_plain_functions_have_a_unit(app, ledger, serve):
    """Each method commits by the rule, and a plain function as a handler is inside too (P1, P3)."""
    setup(app, ledger.db)
    seen = []

    @app.route("/", methods=["HEAD", "OPTIONS", "GET"], name="all")
    async def handler(request):
        await ledger.write(request.method)
        return empty() if request.method == "OPTIONS" else text("body")

    @app.get("/plain")
    def plain(request):
        seen.append(is_context_initiated())
        return text("ok")

    async with serve(app) as server:
        answers = [await server.request(method) for method in ("HEAD", "OPTIONS", "GET")]
        await server.request("GET", "/plain")

    assert [(answer.status_code, answer.text) for answer in answers] == [(200, ""), (204, ""), (200, "body")]
    assert seen == [True]
    assert ledger.names() == "GET HEAD OPTIONS"


async def test_static_files_open_nothing(app, ledger, serve, tmp_path, monkeypatch):
    """A file, whole or as a stream, and one that is not there, take no session (P1)."""
    (tmp_path / "file.txt").write_text("content")
    app.static("/whole", tmp_path / "file.txt", name="whole")
    app.static("/streamed", tmp_path / "file.txt", name="streamed", stream_large_files=1)
    app.static("/folder", tmp_path, name="folder")
    setup(app, ledger.db)

    async with serve(app) as server:
        answers = [await server.request("GET", path) for path in ("/whole", "/streamed", "/folder/file.txt", "/folder/none")]
        opened = ledger.db.pool_status()

    assert [(answer.status_code, answer.text[:7]) for answer in answers[:3]] == [(200, "content")] * 3
    assert answers[3].status_code == NotFound.status_code
    assert (opened.size, opened.checked_out) == (0, 0)


async def test_job_that_waits_for_the_commit_is_a_unit_of_its_own(app, ledger, serve):
    """`on_commit` starts it, so that it sees what the request has written, and never runs for one that was rolled back (P6)."""
    setup(app, ledger.db)
    seen = []

    async def job():
        seen.append(ledger.names())
        await ledger.write("job")

    @app.post("/<status:int>")
    async def handler(request, status):
        await ledger.write(str(status))
        on_commit(lambda: app.add_task(run_in_new_ctx(job), name="job"))
        return text("ok", status)

    async with serve(app) as server:
        await server.request("POST", "/400")
        await server.request("POST", "/200")
        await ledger.until("200 job")

    assert seen == ["200"]


async def test_task_that_outlives_its_request_is_told_so(app, ledger, serve):
    """`app.add_task` starts at once, in the unit of the request; when that has ended, the error names the remedy (P6, P10)."""
    setup(app, ledger.db)
    over, errors = asyncio.Event(), []

    async def late():
        await over.wait()
        try:
            await ledger.write("late")
        except ContextClosedError as exc:
            errors.append(str(exc))

    @app.post("/")
    async def handler(request):
        app.add_task(late(), name="late")
        return text("ok")

    async with serve(app) as server:
        await server.request("POST")
        over.set()
        await app.get_task("late")

    assert ledger.names() == ""
    assert "run_in_new_ctx" in errors[0]
