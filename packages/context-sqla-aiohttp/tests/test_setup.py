"""What `setup` places where, and aiohttp's own ways to answer."""

import asyncio
import gc

import pytest
from aiohttp import ClientError, web
from aiohttp.test_utils import TestClient, TestServer
from context_sqla import ContextNotInitiatedError, UnavailableError, db_context, db_session, is_context_initiated
from context_sqla.errors import SetupError
from context_sqla.testing import set_test_context
from context_sqla_aiohttp import DBSessionMiddleware, db_session_middleware, setup
from sqlalchemy.exc import IntegrityError


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


async def test_raised_redirect_commits(ledger, client_of):
    """`raise web.HTTPFound(...)` is a response below 400: it commits (P3)."""

    async def handler(request):
        await ledger.write("a")
        raise web.HTTPFound("/elsewhere")

    client = await client_of(application(handler))
    answer = await client.get("/", allow_redirects=False)

    assert (answer.status, ledger.names()) == (302, "a")


async def test_raised_error_rolls_back(ledger, client_of):
    """`raise web.HTTPBadRequest` rolls back (P3)."""

    async def handler(request):
        await ledger.write("a")
        raise web.HTTPBadRequest

    client = await client_of(application(handler))

    assert ((await client.get("/")).status, ledger.names()) == (400, "")


@pytest.mark.parametrize("raised", [True, False])
async def test_failed_commit_reaches_error_middleware(ledger, client_of, raised):
    """Error middleware answers the commit of a response that was returned, and of one that was raised (P4b)."""

    async def handler(request):
        await ledger.write_orphan("a")
        if raised:
            raise web.HTTPFound("/elsewhere")
        return web.Response()

    client = await client_of(application(handler, conflict))
    answer = await client.get("/", allow_redirects=False)

    assert (answer.status, await answer.text()) == (409, "conflict")


async def test_failed_commit_of_middleware_reaches_the_one_around(ledger, client_of):
    """The commit of a response that middleware made by itself is decided inside the middleware around it (P4b)."""

    @web.middleware
    async def gate(request, handler):
        await ledger.write_orphan("a")
        return web.Response()

    client = await client_of(application(gate, conflict, gate))

    assert (await client.get("/")).status == 409


async def test_middleware_may_be_added_after_setup(ledger, client_of):
    """Parts are placed when the application is frozen: `setup` comes in any order."""

    async def handler(request):
        await ledger.write_orphan("a")
        return web.Response()

    app = application(handler)
    app.middlewares.append(conflict)
    client = await client_of(app)

    assert (await client.get("/")).status == 409


async def test_own_stream_commits_before_its_head(ledger, client_of):
    """A handler that prepares its own `StreamResponse` commits there; what it writes later commits before the last byte (P5)."""
    seen = []

    async def handler(request):
        await ledger.write("a")
        response = web.StreamResponse()
        await response.prepare(request)
        seen.append(ledger.names())
        await ledger.write("b")
        await response.write(b"piece")
        return response

    client = await client_of(application(handler))
    answer = await client.get("/")

    assert await answer.text() == "piece"
    assert (seen, ledger.names()) == (["a"], "a b")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("middlewares", [[], [conflict]])
async def test_failed_commit_of_an_own_stream_is_well_formed(ledger, client_of, middlewares, compress):
    """`prepare` raises into the handler, and the answer to that is not framed like the stream that was not sent (P4, P4b)."""

    async def handler(request):
        await ledger.write_orphan("a")
        response = web.StreamResponse()
        if compress:
            response.enable_compression()
        await response.prepare(request)
        raise AssertionError("not reached")

    client = await client_of(application(handler, *middlewares))
    answer = await client.get("/")
    text = await answer.text()

    assert answer.status == (409 if middlewares else 500)
    assert answer.headers["content-length"] == str(len(text))
    assert text.startswith("conflict" if middlewares else "500 Internal")


async def test_swallowed_commit_error_is_no_success(ledger, client_of):
    """A handler that swallows the error of `prepare` and returns the dead response is a 500 (P4)."""

    async def handler(request):
        await ledger.write_orphan("a")
        response = web.StreamResponse()
        try:
            await response.prepare(request)
        except IntegrityError:
            with pytest.raises(IntegrityError):
                await response.write(b"lost")
            with pytest.raises(IntegrityError):
                await response.write_eof()
        return response

    client = await client_of(application(handler))

    assert (await client.get("/")).status == 500


async def test_body_of_an_async_generator_has_the_unit(ledger, client_of):
    """The generator runs after all middleware, in the unit, and commits before the last byte (P5)."""

    async def body():
        yield b"first"
        await ledger.write("b")
        yield b"last"

    async def handler(request):
        await ledger.write("a")
        return web.Response(body=body())

    client = await client_of(application(handler))

    assert await (await client.get("/")).text() == "firstlast"
    assert ledger.names() == "a b"


@pytest.mark.parametrize("how", ["commit", "error", "http error", "answered"])
async def test_failed_body_is_broken_off(ledger, client_of, how):
    """A stream that failed never ends well, whatever middleware makes of the error (P5)."""

    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"piece")
        await ledger.write_orphan("a")
        if how == "error":
            raise LookupError
        if how == "http error":
            raise web.HTTPConflict
        if how == "answered":
            raise IntegrityError("", {}, Exception())
        return response

    client = await client_of(application(handler, conflict))
    answer = await client.get("/")
    with pytest.raises(ClientError):
        await answer.read()

    assert ledger.names() == ""


async def test_declared_length_is_the_last_byte(ledger, client_of):
    """The piece that completes the Content-Length waits for the commit (P5)."""

    async def handler(request):
        response = web.StreamResponse(headers={"Content-Length": "4"})
        await response.prepare(request)
        await response.write(b"ab")
        await ledger.write("a")
        await response.write(b"cd")
        assert ledger.names() == "a"
        return response

    client = await client_of(application(handler))

    assert await (await client.get("/")).text() == "abcd"


async def test_head_and_unknown_paths(ledger, client_of):
    """HEAD commits by its status and runs no body; 404 and 405 roll back what middleware wrote (P3)."""

    async def body():
        await ledger.write("body")
        yield b"body"

    async def handler(request):
        return web.Response(body=body())

    @web.middleware
    async def writes(request, handler):
        await ledger.write(request.method)
        return await handler(request)

    app = web.Application(middlewares=[writes])
    app.router.add_get("/", handler)
    setup(app)
    client = await client_of(app)
    statuses = [(await client.head("/")).status, (await client.get("/unknown")).status]
    statuses += [(await client.put("/")).status, (await client.options("/")).status]

    assert statuses == [200, 404, 405, 405]
    assert ledger.names() == "HEAD"


@pytest.mark.parametrize("set_up", [False, True])
async def test_sub_application_shares_the_unit(ledger, client_of, set_up):
    """A sub-application is in the unit of the request; set up itself, its own middleware answers errors of the commit (P4b)."""

    @web.middleware
    async def writes(request, handler):
        await ledger.write("a")
        return await handler(request)

    async def handler(request):
        await (ledger.write_orphan if "fail" in request.query else ledger.write)("b")
        return web.Response()

    sub = application(handler, conflict) if set_up else web.Application(middlewares=[conflict])
    if not set_up:
        sub.router.add_get("/", handler)
    app = web.Application(middlewares=[writes])
    setup(app)
    app.add_subapp("/sub", sub)
    client = await client_of(app)

    assert (await client.get("/sub/?fail=1")).status == (409 if set_up else 500)
    assert ledger.names() == ""
    assert (await client.get("/sub/")).status == 200
    assert ledger.names() == "a b"


async def test_work_before_a_websocket_commits_at_its_answer(ledger, client_of):
    """What comes before `ws.prepare()` commits at the 101; afterwards there is no unit (P11)."""
    seen = []

    async def handler(request):
        await ledger.write("a")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        seen.append(ledger.names())
        with pytest.raises(ContextNotInitiatedError, match="db_context"):
            await db_session(ledger.db)
        async with db_context():
            await ledger.write("b")
        await socket.send_str("done")
        return socket

    client = await client_of(application(handler))
    async with client.ws_connect("/") as socket:
        assert await socket.receive_str() == "done"

    assert (seen, ledger.names()) == (["a"], "a b")


async def test_websocket_sees_no_unit_of_the_servers_start(ledger, client_of):
    """A server that was started inside a unit hands it to no websocket (P11)."""
    seen = []

    async def handler(request):
        socket = web.WebSocketResponse()
        await asyncio.create_task(socket.prepare(request))
        await socket.close()
        return socket

    async def direct(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        seen.append(is_context_initiated())
        await socket.close()
        return socket

    app = application(direct)
    app.router.add_get("/task", handler)
    async with db_context():
        client = await client_of(app)
        for path in ("/", "/task"):
            async with client.ws_connect(path) as socket:
                await socket.receive()

    assert seen == [False]


async def test_refused_websocket_is_answered(ledger, client_of):
    """A commit that fails at the 101 is a 500 (P4)."""

    async def handler(request):
        await ledger.write_orphan("a")
        await web.WebSocketResponse().prepare(request)

    client = await client_of(application(handler))
    answer = await client.get(
        "/",
        headers={
            "Upgrade": "websocket",
            "Connection": "upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        },
    )

    assert answer.status == 500


async def test_unavailable_is_a_503(client_of):
    """Without middleware that answers it, `UnavailableError` is 503 with `Retry-After`."""

    async def handler(request):
        raise UnavailableError("no")

    client = await client_of(application(handler))
    answer = await client.get("/")

    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize(
    "error",
    [None, LookupError(), IntegrityError("", {}, Exception()), web.HTTPConflict()],
    ids=["good", "error", "answered", "http error"],
)
async def test_work_after_the_last_byte_is_background_work(ledger, client_of, error):
    """A handler that goes on after `write_eof` commits at its end, and one that fails rolls that back, unanswered (P6)."""
    ended = asyncio.Event()

    async def handler(request):
        response = web.Response(text="ok")
        await response.prepare(request)
        await response.write_eof()
        await ledger.write("a")
        asyncio.current_task().add_done_callback(lambda task: ended.set())
        if error:
            raise error
        return response

    client = await client_of(application(handler, conflict))

    assert await (await client.get("/")).text() == "ok"
    await asyncio.wait_for(ended.wait(), 10)
    assert ledger.names() == ("" if error else "a")


async def test_handler_that_returns_nothing_rolls_back(ledger, client_of):
    """aiohttp makes a 500 of a handler that returns no response; so does the unit (P3)."""

    async def handler(request):
        await ledger.write("a")

    client = await client_of(application(handler))

    assert ((await client.get("/")).status, ledger.names()) == (500, "")


async def test_bare_middleware(ledger, client_of):
    """`app.middlewares.append(db_session_middleware)` is enough for a unit, and for error middleware further out (P4b)."""

    async def handler(request):
        await (ledger.write_orphan if "fail" in request.query else ledger.write)("a")
        return web.Response()

    app = web.Application(middlewares=[conflict])
    app.middlewares.append(db_session_middleware)
    app.middlewares.append(DBSessionMiddleware(should_commit=lambda status: False))  # shares the unit, and its rule
    app.router.add_get("/", handler)
    client = await client_of(app)

    assert [(await client.get("/?fail=1")).status, (await client.get("/")).status] == [409, 200]
    assert ledger.names() == "a"


async def test_test_context_of_another_loop_is_an_error_that_is_answered(client_of):
    """A unit that cannot begin leaves aiohttp its writer: the client has a 500, and the log says why (P12, P15)."""

    async def handler(request):
        return web.Response()

    def serve():
        async def main():
            app = application(handler)
            async with TestClient(TestServer(app)) as client:
                return (await client.get("/")).status

        return asyncio.run(main())

    async with set_test_context():
        status = await asyncio.to_thread(serve)

    assert status == 500


async def test_points_do_nothing_without_a_unit(ledger, client_of):
    """A sub-application that is set up by itself opens the unit for its own requests only."""

    async def handler(request):
        return web.Response(text=str(is_context_initiated()))

    app = web.Application()
    app.router.add_get("/", handler)
    app.add_subapp("/sub", application(handler, conflict))
    client = await client_of(app)

    assert [await (await client.get(path)).text() for path in ("/", "/sub/")] == ["False", "True"]


async def test_connects_are_closed_after_the_applications_own_cleanup(ledger, client_of):
    """Contexts and handlers of the application's own cleanup may use the connects; they are closed after them (P15)."""
    open_at = []

    async def context(app):
        yield
        open_at.append(ledger.db.pool_status().size)

    async def last(app):
        async with db_context():
            await ledger.write("last")

    async def handler(request):
        await ledger.write("a")
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    app.cleanup_ctx.append(context)
    app.on_cleanup.append(last)
    setup(app, ledger.db)
    client = await client_of(app)
    await client.get("/")
    await client.close()

    assert ledger.names() == "a last"
    assert open_at[0] > 0


async def test_setup_is_refused_twice_and_late(client_of):
    """`setup` twice, after the start, or after `add_subapp` is a mistake that is told."""
    app = web.Application()
    setup(app)
    with pytest.raises(SetupError, match="already"):
        setup(app)
    sub = web.Application()
    app.add_subapp("/sub", sub)
    with pytest.raises(SetupError, match="added to another"):
        setup(sub)
    await client_of(app)
    with pytest.raises(SetupError, match="started"):
        setup(app)


async def test_a_request_leaves_no_cycle(client_of):
    """Units are freed when their request ends, not by the garbage collector."""
    from context_sqla.adapters import Unit

    async def handler(request):
        return web.Response()

    client = await client_of(application(handler))
    await client.get("/")
    gc.collect()
    others = [one for one in gc.get_objects() if isinstance(one, Unit)]  # of other tests in this process
    gc.disable()
    try:
        for _ in range(3):
            await client.get("/")
        await asyncio.sleep(0)
        units = [one for one in gc.get_objects() if isinstance(one, Unit)]
    finally:
        gc.enable()

    assert len(units) <= len(others) + 1
