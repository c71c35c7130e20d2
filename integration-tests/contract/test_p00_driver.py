"""Before the promises: every driver mounts every part of a scenario, so that the other files test adapters, not drivers."""

import asyncio
import gzip

import pytest
from support.deadline import until
from support.scenario import Answer, Fail, Feature, Gate, Redirect, Route, SocketGone, SocketRoute
from support.servers import ServerOptions


async def test_request_arrives_whole(serve):
    """A handler sees method, path, query, headers and body."""

    async def handler(request):
        body = (await request.body()).decode()
        return Answer.json([request.method, request.path, dict(request.query), request.headers["x-name"], body])

    service = await serve(Route("/echo", handler))
    answer = await service.post("/echo?a=1", body=b"hello", headers={"X-Name": "me"})

    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == ["POST", "/echo", {"a": "1"}, "me", "hello"]


async def test_method_and_path_are_matched(serve):
    """An unknown path is a 404, another method a 405, a HEAD has no body."""

    async def handler(request):
        return Answer(200, "hello")

    service = await serve(Route("/", handler, methods=["GET", "HEAD"]))
    unknown = await service.get("/unknown")
    posted = await service.post("/")
    head = await service.request("HEAD", "/")

    assert (unknown.status, posted.status) == (404, 405)
    assert (head.status, head.headers["content-length"], head.body) == (200, "5", b"")


async def test_plain_function_is_a_handler(serve, framework):
    """A plain function is run, in a thread or in the loop."""

    def handler(request):
        return Answer(200, request.query["a"])

    answer = await (await serve(handler)).get("/?a=1")

    assert (answer.status, answer.text) == (200, "1")


async def test_own_exceptions_are_translated(serve):
    """``Fail`` and ``Redirect`` are raised as the framework's own exceptions."""

    async def fail(request):
        raise Fail(418)

    async def redirect(request):
        raise Redirect("/there", 307)

    service = await serve(Route("/fail", fail), Route("/redirect", redirect))
    failed = await service.get("/fail")
    redirected = await service.get("/redirect")

    assert failed.status == 418
    assert (redirected.status, redirected.headers["location"]) == (307, "/there")


async def test_error_handler_answers(serve):
    """An error handler answers for its class of exceptions, and for no other."""

    async def handler(request):
        raise KeyError(request.path) if request.path == "/key" else ZeroDivisionError

    async def answer_key(exc):
        return Answer(499, f"no {exc.args[0]}")

    service = await serve(Route("/key", handler), Route("/zero", handler), error_handlers={KeyError: answer_key})
    key = await service.get("/key")
    zero = await service.get("/zero")

    assert (key.status, key.text) == (499, "no /key")
    assert zero.status == 500


@pytest.mark.wire
async def test_stream_arrives_piece_by_piece(serve):
    """A piece of a stream is with the client before the next one is made."""
    go_on = asyncio.Event()

    async def body():
        yield b"one"
        await go_on.wait()
        yield b"two"

    async def handler(request):
        return Answer(200, stream=body(), headers={"x-kind": "stream"})

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("GET", "/")
        head = await connection.head()
        first = await connection.chunk()
        go_on.set()
        rest = await connection.rest()

    assert (head.status, head.headers["x-kind"]) == (200, "stream")
    assert (first, rest) == (b"one", b"two")


@pytest.mark.wire
async def test_stream_with_a_length_declares_it(serve, framework):
    """A stream with ``content_length`` is sent with that header instead of in chunks."""

    async def body():
        yield b"one"
        yield b"two"

    async def handler(request):
        return Answer(200, stream=body(), content_length=6)

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("onetwo", True)
    assert answer.headers.get("content-length") == (None if Feature.CONTENT_LENGTH_STREAM in framework.lacks else "6")


@pytest.mark.wire
async def test_failing_stream_is_broken_off(serve, framework):
    """The client of a stream that failed does not see a proper end."""

    async def body():
        yield b"one"
        raise ZeroDivisionError

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert answer.complete == (Feature.STREAM_BROKEN_OFF in framework.lacks)


@pytest.mark.wire
async def test_stream_ends_when_its_client_has_left(serve):
    """A generator is closed soon after its client has vanished."""
    ended = asyncio.Event()

    async def body():
        try:
            while True:
                yield b"more"
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async def handler(request):
        return Answer(200, stream=body())

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        await connection.chunk()
        connection.abort()
    await asyncio.wait_for(ended.wait(), 10)

    assert (await service.get("/elsewhere")).status == 404


async def test_background_work_runs_after_the_answer(serve, framework):
    """Background work runs in order, after the client has its answer."""
    done = []
    answered = asyncio.Event()

    async def first():
        await answered.wait()
        done.append(1)

    async def second():
        done.append(2)

    async def handler(request):
        return Answer(202, "later", background=[first, second])

    service = await serve(handler)
    async with service.connect() as connection:
        answer = await connection.request("POST", "/")
        before = list(done)
        answered.set()
        await until(lambda: len(done) == 2)

    assert (answer.status, before) == (202, [])
    assert done == [1, 2]


@pytest.mark.wire
async def test_websocket_talks(serve, framework):
    """A websocket handler receives, sends, and learns that its client has gone."""
    gone = asyncio.Event()

    async def echo(socket):
        await socket.accept()
        try:
            while True:
                await socket.send("you said " + await socket.receive())
        except SocketGone:
            gone.set()

    service = await serve(SocketRoute("/ws", echo))
    async with service.websocket("/ws") as socket:
        await socket.send("a")
        heard = await socket.recv()
    await asyncio.wait_for(gone.wait(), 10)

    assert heard == "you said a"


async def test_gates_stand_in_their_order(serve):
    """The first gate of the list is the outermost; one that answers keeps the request from those below."""
    passed = []

    def gate(name):
        async def check(request):
            passed.append(name)
            return Answer(401) if request.query.get("stop") == name else None

        return Gate(check)

    async def handler(request):
        passed.append("handler")
        return Answer(200)

    service = await serve(handler, middleware=[gate("outer"), gate("inner")])
    statuses = [(await service.get(f"/?stop={name}")).status for name in ("outer", "inner", "none")]

    assert statuses == [401, 401, 200]
    assert passed == ["outer", "outer", "inner", "outer", "inner", "handler"]


@pytest.mark.parametrize("setup_first", [False, True], ids=["setup-last", "setup-first"])
async def test_foreign_middleware_is_installed(serve, framework, setup_first):
    """The framework's own compression, CORS and function middleware are there when a scenario asks for them."""

    async def handler(request):
        return Answer(200, "hello")

    wanted = [one for one in (Feature.CORS, Feature.GZIP, Feature.BASE_HTTP) if one not in framework.lacks]
    service = await serve(handler, middleware=wanted, setup_first=setup_first)
    answer = await service.get(headers={"origin": "https://example.org", "accept-encoding": "gzip"})

    assert ("access-control-allow-origin" in answer.headers) == (Feature.CORS in wanted)
    assert (gzip.decompress(answer.body) if Feature.GZIP in wanted else answer.body) == b"hello"


async def test_hooks_run_at_startup_and_shutdown(serve, framework):
    """The application's own lifespan hooks run, in order, beside what the adapter does there."""
    seen = []

    async def begin():
        seen.append("begin")

    async def end():
        seen.append("end")

    async def handler(request):
        seen.append("request")
        return Answer(200)

    service = await serve(handler, on_startup=[begin], on_shutdown=[end])
    await service.get()
    await service.stop()

    assert seen == ["begin", "request", "end"]


@pytest.mark.wire
@pytest.mark.loops("asyncio", "uvloop")
@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_connection_carries_several_requests(serve, http):
    """Requests follow one another on a connection, also without waiting for the answers."""

    async def handler(request):
        return Answer(200, await request.body())

    service = await serve(handler, options=ServerOptions(http=http))
    async with service.connect() as connection:
        first = await connection.request("POST", "/", body=b"0" * 400_000)
        for number in range(1, 4):
            await connection.send("POST", "/", body=str(number).encode())
        others = [await connection.response() for _ in range(3)]

    assert len(first.body) == 400_000
    assert [answer.text for answer in others] == ["1", "2", "3"]
