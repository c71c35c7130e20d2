"""aiohttp's own responses, handshakes and signals: what each of them means to the unit of work."""

import asyncio
import contextlib
import zlib

import pytest
from aiohttp import ClientError, web
from aiohttp.test_utils import make_mocked_request
from context_sqla import ContextClosedError, ContextNotInitiatedError, db_session, is_context_initiated
from context_sqla_aiohttp import db_session_middleware, setup
from sqlalchemy.exc import IntegrityError
from support.deadline import until


@web.middleware
async def conflict(request, handler):
    """Middleware that answers errors, as applications write it."""
    try:
        return await handler(request)
    except IntegrityError:
        return web.Response(status=409, text="conflict")


def application(handler, *middlewares, **options):
    app = web.Application(middlewares=middlewares)
    app.router.add_route("*", "/", handler)
    setup(app, **options)
    return app


# Exceptions that are responses


@pytest.mark.parametrize("kind", [web.HTTPCreated, web.HTTPNoContent, web.HTTPNotModified])
async def test_raised_success_commits(ledger, client_of, kind):
    """Every exception that is a response below 400 commits (P3)."""

    async def handler(request):
        await ledger.write("a")
        raise kind

    client = await client_of(application(handler))

    assert ((await client.get("/")).status, ledger.names()) == (kind.status_code, "a")


async def test_raised_by_other_peoples_middleware(ledger, client_of):
    """A redirect that aiohttp's own middleware raises commits what middleware around it wrote; an error rolls it back (P3)."""

    @web.middleware
    async def writes(request, handler):
        await ledger.write(request.path)
        return await handler(request)

    @web.middleware
    async def forbids(request, handler):
        if request.path == "/forbidden":
            raise web.HTTPForbidden
        return await handler(request)

    async def handler(request):
        return web.Response()

    app = web.Application(middlewares=[writes, forbids, web.normalize_path_middleware()])
    app.router.add_get("/users/", handler)
    setup(app)
    client = await client_of(app)
    statuses = [(await client.get(path, allow_redirects=False)).status for path in ("/users", "/forbidden", "/unknown")]

    assert (statuses, ledger.names()) == ([308, 403, 404], "/users")


async def test_error_that_middleware_turns_into_an_answer_of_its_own_rolls_back(ledger, client_of):
    """A page for "not found" with status 200 commits nothing of the handler that raised 404 (P3)."""

    @web.middleware
    async def page(request, handler):
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return web.Response(text="page")

    async def handler(request):
        await ledger.write("a")
        raise web.HTTPNotFound

    client = await client_of(application(handler, page))

    assert ((await client.get("/")).status, ledger.names()) == (200, "")


async def test_timeout_of_middleware_is_answered(ledger, client_of):
    """Middleware that gives up on the handler answers by itself, and nothing is committed (P7)."""

    @web.middleware
    async def limit(request, handler):
        try:
            return await asyncio.wait_for(handler(request), 0.05)
        except TimeoutError:
            return web.Response(status=503)

    async def handler(request):
        await ledger.write("a")
        await asyncio.Event().wait()

    client = await client_of(application(handler, limit))

    assert ((await client.get("/")).status, ledger.names()) == (503, "")


# Streams


async def test_handler_that_goes_on_when_its_client_has_left_commits_nothing(ledger):
    """A handler that takes no notice of the error of its own writing has not finished its body (P5)."""
    left = asyncio.Event()

    async def handler(request):
        await ledger.write("a")
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        await until(lambda: request.transport is None)
        with contextlib.suppress(ConnectionResetError):
            await response.write(b"more")
        await ledger.write("b")
        left.set()
        return response

    runner = web.AppRunner(application(handler))  # which does not cancel handlers, as the test server does
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        reader, writer = await asyncio.open_connection(*runner.addresses[0])
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"first"), 10)
        writer.transport.abort()
        await asyncio.wait_for(left.wait(), 10)
    finally:
        await runner.cleanup()

    assert ledger.names() == "a"


# Files


@pytest.fixture(name="file")
def _file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"x" * 100_000)
    return path


@pytest.mark.parametrize("sendfile", [True, False])
async def test_returned_file_commits_before_its_head(ledger, client_of, file, sendfile, monkeypatch):
    """A `FileResponse` that is returned is decided by the status it has then: a file that is missing is found out later (P4)."""
    monkeypatch.setattr("aiohttp.web_fileresponse.NOSENDFILE", not sendfile)

    async def handler(request):
        await ledger.write(request.query["name"])
        return web.FileResponse(file.with_name(request.query["file"]))

    client = await client_of(application(handler))
    there = await client.get("/?name=a&file=file.txt")
    part = await client.get("/?name=b&file=file.txt", headers={"Range": "bytes=0-9"})
    unchanged = await client.get("/?name=c&file=file.txt", headers={"If-None-Match": there.headers["etag"]})
    missing = await client.get("/?name=d&file=missing.txt")

    assert [one.status for one in (there, part, unchanged, missing)] == [200, 206, 304, 404]
    assert [len(await one.read()) for one in (there, part, unchanged)] == [100_000, 10, 0]
    assert ledger.names() == "a b c d"


@pytest.mark.parametrize("sendfile", [True, False])
@pytest.mark.parametrize(("name", "status"), [("file.txt", 200), ("missing.txt", 404)])
async def test_file_that_the_handler_prepares_is_decided_by_its_real_status(
    ledger, client_of, file, monkeypatch, sendfile, name, status
):
    """A handler that prepares its `FileResponse` commits by what became of it; what it writes then is work after it (P3, P6)."""
    monkeypatch.setattr("aiohttp.web_fileresponse.NOSENDFILE", not sendfile)
    seen = []
    ended = asyncio.Event()

    async def handler(request):
        asyncio.current_task().add_done_callback(lambda task: ended.set())
        await ledger.write("a")
        response = web.FileResponse(file.with_name(name))
        await response.prepare(request)
        if not response.prepared or status == 404:
            await response.write_eof()
        seen.append(ledger.names())
        await ledger.write("later")
        return web.Response()  # aiohttp would prepare a file response of its own once more

    client = await client_of(application(handler))
    answer = await client.get("/")
    body = await answer.read()
    await asyncio.wait_for(ended.wait(), 10)

    assert (answer.status, len(body)) == (status, 100_000 if status == 200 else 0)
    assert seen == ["a" if status == 200 else ""]
    assert ledger.names() == ("a later" if status == 200 else "later")


async def test_file_is_not_sent_when_the_commit_fails(ledger, client_of, file):
    """No byte of a file leaves before a commit that fails, whoever prepares it (P4)."""

    async def handler(request):
        await ledger.write_orphan("a")
        response = web.FileResponse(file)
        if "prepare" in request.query:
            await response.prepare(request)
        return response

    client = await client_of(application(handler, conflict))
    answers = [await client.get("/"), await client.get("/?prepare=1")]

    assert [(one.status, await one.text()) for one in answers] == [(409, "conflict")] * 2


async def test_static_files_open_nothing(ledger, client_of, file):
    """Static files open nothing; what middleware wrote is committed before them (P1, P4)."""
    seen = []

    @web.middleware
    async def writes(request, handler):
        if "write" in request.query:
            await ledger.write("a")
        response = await handler(request)
        seen.append(ledger.names() if "write" in request.query else ledger.db.pool_status().checked_out)
        return response

    app = web.Application(middlewares=[writes])
    app.router.add_static("/static", file.parent)
    setup(app)
    client = await client_of(app)
    statuses = [(await client.get(f"/static/{path}")).status for path in ("file.txt", "file.txt?write=1")]

    assert (statuses, seen) == ([200, 200], [0, "a"])


# Compression


@pytest.mark.parametrize("how", ["returned", "generator", "own"])
async def test_compressed_response(ledger, client_of, how):
    """What compression holds back leaves with the last byte, after the commit of the body (P4, P5)."""

    async def body():
        yield b"first"
        await ledger.write("b")
        yield b"last"

    async def handler(request):
        await ledger.write("a")
        response = web.StreamResponse() if how == "own" else web.Response(body=b"firstlast" if how == "returned" else body())
        response.enable_compression(web.ContentCoding.deflate)
        if how == "own":
            await response.prepare(request)
            async for piece in body():
                await response.write(piece)
        return response

    client = await client_of(application(handler))
    answer = await client.get("/")

    assert (answer.headers["content-encoding"], await answer.text()) == ("deflate", "firstlast")
    assert ledger.names() == ("a" if how == "returned" else "a b")


@pytest.mark.parametrize("own", [True, False])
async def test_compressed_body_that_fails_is_broken_off(ledger, client_of, own):
    """A compressed stream whose last commit fails has no end (P5)."""

    async def body():
        yield b"first"
        await ledger.write_orphan("a")
        yield b"last"

    async def handler(request):
        response = web.StreamResponse() if own else web.Response(body=body())
        response.enable_compression(web.ContentCoding.deflate)
        if own:
            await response.prepare(request)
            async for piece in body():
                await response.write(piece)
        return response

    client = await client_of(application(handler))
    with pytest.raises((ClientError, zlib.error)):
        await (await client.get("/")).read()

    assert ledger.names() == ""


# Signals


async def test_signal_writes(ledger, client_of):
    """`on_response_prepare` comes before the head of an own stream, and is its unit's; for a response that was returned the
    decision has been made, and what the signal writes is the body's (P4, P5).
    """
    seen = []

    async def signal(request, response):
        await ledger.write("signal" if request.path == "/" else "own signal")

    async def handler(request):
        return web.Response(text="x")

    async def own(request):
        response = web.StreamResponse()
        await response.prepare(request)
        seen.append(ledger.names())
        return response

    app = application(handler)
    app.router.add_get("/own", own)
    app.on_response_prepare.append(signal)
    client = await client_of(app)
    assert await (await client.get("/own")).text() == ""
    assert await (await client.get("/")).text() == "x"

    assert seen == ["own signal"]
    assert ledger.names() == "own signal signal"


@pytest.mark.parametrize("own", [True, False])
async def test_signal_whose_write_fails_is_no_success(ledger, client_of, own):
    """A commit that fails because of a signal is answered by error middleware, or breaks the response off (P4, P5)."""

    async def signal(request, response):
        if response.status == 200:
            await ledger.write_orphan("a")

    async def handler(request):
        response = web.StreamResponse() if own else web.Response(text="x")
        if own:
            await response.prepare(request)
        return response

    app = application(handler, conflict)
    app.on_response_prepare.append(signal)
    client = await client_of(app)
    if own:
        assert (await client.get("/")).status == 409
    else:
        with pytest.raises(ClientError):
            await (await client.get("/")).read()

    assert ledger.names() == ""


@pytest.mark.parametrize("kind", [IntegrityError, web.HTTPConflict, LookupError])
async def test_signal_that_raises_in_an_own_stream(ledger, client_of, kind):
    """It raises into the handler: rolled back, and the answer is not framed like the stream that was not sent (P3, P4b)."""

    async def signal(request, response):
        if response.status == 200:
            raise kind("", {}, Exception()) if kind is IntegrityError else kind

    async def handler(request):
        await ledger.write("a")
        response = web.StreamResponse()
        await response.prepare(request)
        raise AssertionError("not reached")

    app = application(handler, conflict)
    app.on_response_prepare.append(signal)
    client = await client_of(app)
    answer = await client.get("/")
    text = await answer.text()

    assert answer.status == (500 if kind is LookupError else 409)
    assert answer.headers["content-length"] == str(len(text))
    assert ledger.names() == ""


async def test_signal_that_raises_for_a_returned_response(ledger, client_of):
    """aiohttp prepares it outside everything, and closes the connection without an answer: it was committed by then (P4)."""

    async def signal(request, response):
        raise LookupError

    async def handler(request):
        await ledger.write("a")
        return web.Response(text="x")

    app = application(handler)
    app.on_response_prepare.append(signal)
    client = await client_of(app)
    with pytest.raises(ClientError):
        await client.post("/")  # a GET may be tried again by the client

    assert ledger.names() == "a"


# Heads


@pytest.mark.parametrize("fails", [False, True])
async def test_expect_continue(ledger, client_of, fails):
    """`100 Continue` is no answer: the unit begins after it and is decided by the response (P4)."""

    async def handler(request):
        await (ledger.write_orphan if fails else ledger.write)(await request.text())
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"done")
        return response

    client = await client_of(application(handler, conflict))
    answer = await client.post("/", data=b"a", expect100=True)

    assert (answer.status, await answer.text()) == ((409, "conflict") if fails else (200, "done"))
    assert ledger.names() == ("" if fails else "a")


async def test_own_expect_handler_has_no_unit(ledger, client_of):
    """aiohttp calls a route's `expect_handler` before all middleware; it asks for a session and is told so (P11)."""

    async def expect(request):
        with pytest.raises(ContextNotInitiatedError):
            await db_session(ledger.db)
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def handler(request):
        await ledger.write(await request.text())
        return web.Response()

    app = web.Application()
    app.router.add_post("/", handler, expect_handler=expect)
    setup(app)
    client = await client_of(app)

    assert (await client.post("/", data=b"a", expect100=True)).status == 200
    assert ledger.names() == "a"


@pytest.mark.parametrize("finished", [True, False])
async def test_another_response_than_the_one_prepared(ledger, client_of, finished):
    """A second head is not sent into a body, whose work is rolled back; after the end of one it does no harm (P5)."""

    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"piece")
        await ledger.write("a")
        if finished:
            await response.write_eof()
        return web.Response(text="another")

    client = await client_of(application(handler))
    answer = await client.get("/")
    if finished:
        assert await answer.text() == "piece"
    else:
        with pytest.raises(ClientError):
            await answer.read()

    assert ledger.names() == ("a" if finished else "")


async def test_head_of_an_own_stream(ledger, client_of):
    """HEAD of a handler that prepares its own stream commits before the head, and at its end, like GET (P3, P5)."""
    seen = []
    ended = asyncio.Event()

    async def handler(request):
        asyncio.current_task().add_done_callback(lambda task: ended.set())
        await ledger.write("a")
        response = web.StreamResponse(headers={"Content-Length": "5"})  # or else the client leaves
        await response.prepare(request)
        seen.append(ledger.names())
        await ledger.write("b")
        return response

    client = await client_of(application(handler))
    answer = await client.head("/")
    await asyncio.wait_for(ended.wait(), 10)

    assert (answer.status, await answer.read(), seen, ledger.names()) == (200, b"", ["a"], "a b")


async def test_handshake_that_is_none_rolls_back(ledger, client_of):
    """`ws.prepare()` of a request that asks for no websocket raises 400: what came before is rolled back (P3, P11)."""

    async def handler(request):
        await ledger.write("a")
        await web.WebSocketResponse().prepare(request)

    client = await client_of(application(handler))

    assert ((await client.get("/")).status, ledger.names()) == (400, "")


async def test_upgrade_header_alone_makes_no_websocket(ledger, client_of):
    """Any client can send the header; the handler decides, and its request has a unit (P11)."""

    async def handler(request):
        await ledger.write("a")
        return web.Response()

    client = await client_of(application(handler))
    answer = await client.post("/", headers={"Upgrade": "websocket", "Connection": "upgrade"})

    assert (answer.status, ledger.names()) == (200, "a")


# Tasks and tests


async def test_bare_middleware_in_a_task_of_its_own(ledger, client_of):
    """Middleware further out that runs the rest in a task ends the unit with it: what was decided stands, a body that comes
    later has none (P10).
    """
    seen = []

    @web.middleware
    async def in_a_task(request, handler):
        return await asyncio.create_task(handler(request))

    async def body():
        seen.append(is_context_initiated())
        yield b"piece"

    async def handler(request):
        await ledger.write("a")
        return web.Response(body=body())

    app = web.Application(middlewares=[in_a_task, db_session_middleware])
    app.router.add_get("/", handler)
    client = await client_of(app)

    assert await (await client.get("/")).text() == "piece"
    assert (seen, ledger.names()) == ([False], "a")


async def test_set_up_application_in_tasks(ledger, client_of):
    """What `setup` places is outside all of its application's middleware: tasks of that share the unit to the end (P2)."""

    @web.middleware
    async def in_a_task(request, handler):
        return await asyncio.create_task(handler(request))

    async def body():
        await ledger.write("b")
        yield b"piece"

    async def handler(request):
        await ledger.write("a")
        return web.Response(body=body())

    client = await client_of(application(handler, in_a_task))

    assert await (await client.get("/")).text() == "piece"
    assert ledger.names() == "a b"


@pytest.mark.parametrize("raised", [False, True])
async def test_unit_ends_with_a_response_that_is_returned_whole(ledger, client_of, raised):
    """Nothing of the application runs after a plain response or a redirect: a task that asks then is told so (P10)."""
    late = []

    async def handler(request):
        late.append(asyncio.create_task(db_session(ledger.db)))
        if raised:
            raise web.HTTPFound("/elsewhere")
        return web.Response(text="x")

    client = await client_of(application(handler, conflict))
    answer = await client.get("/", allow_redirects=False)
    [outcome] = await asyncio.gather(*late, return_exceptions=True)

    assert answer.status == (302 if raised else 200)
    assert isinstance(outcome, ContextClosedError)


async def test_handler_that_runs_after_the_answer_has_no_unit(ledger, client_of):
    """Middleware that answers at once, and leaves the handler to a task, has ended the unit for that (P10)."""
    late = []

    @web.middleware
    async def answers_first(request, handler):
        late.append(asyncio.create_task(handler(request)))
        return web.Response(text="accepted")

    async def handler(request):
        await ledger.write("a")

    client = await client_of(application(handler, answers_first))
    text = await (await client.get("/")).text()
    [outcome] = await asyncio.gather(*late, return_exceptions=True)

    assert (text, type(outcome), ledger.names()) == ("accepted", ContextClosedError, "")


@pytest.mark.parametrize("fails", [False, True])
async def test_middleware_that_writes_after_the_decision(ledger, client_of, fails):
    """What middleware writes around a response that is decided commits before its first byte, or it is a 500 (P5)."""

    @web.middleware
    async def writes_after(request, handler):
        response = await handler(request)
        await (ledger.write_orphan if fails else ledger.write)("b")
        return response

    async def handler(request):
        await ledger.write("a")
        return web.Response(text="x")

    client = await client_of(application(handler, writes_after))
    answer = await client.get("/")

    assert (answer.status, ledger.names()) == ((500, "a") if fails else (200, "a b"))


async def test_another_response_after_a_failed_one(ledger, client_of):
    """A handler that swallows the error of `prepare` may return another response, framed as its own (P4)."""

    async def handler(request):
        await ledger.write_orphan("a")
        response = web.StreamResponse()
        response.enable_compression(web.ContentCoding.deflate)
        with pytest.raises(IntegrityError):
            await response.prepare(request)
        return web.Response(status=409, text="another")

    client = await client_of(application(handler))
    answer = await client.get("/")

    assert (answer.status, await answer.text(), answer.headers["content-length"]) == (409, "another", "7")
    assert ledger.names() == ""


@pytest.mark.parametrize("how", ["unused", "used", "raised", "stream"])
async def test_writer_gets_its_own_methods_back(ledger, client_of, how):
    """What was replaced on aiohttp's writer is gone when the request is over."""
    requests = []

    async def body():
        yield b"piece"

    async def handler(request):
        requests.append(request)
        if how == "used":
            await ledger.write("a")
        if how == "raised":
            raise LookupError
        return web.Response(body=body() if how == "stream" else b"x")

    client = await client_of(application(handler))
    async with client.get("/") as answer:
        await answer.read()
    await client.get("/")  # the task of the first one has ended

    assert not {"write_headers", "write", "write_eof"} & set(vars(requests[0].writer))


async def test_mocked_request(ledger):
    """A handler can be called in a test with aiohttp's mocked request, through the middleware."""

    async def handler(request):
        await ledger.write("a")
        return web.Response(status=201)

    request = make_mocked_request("POST", "/")
    response = await asyncio.create_task(db_session_middleware(request, handler))
    await response.prepare(request)

    assert (response.status, ledger.names()) == (201, "a")
    assert request.writer.write_headers.called
