"""P19: one tree of errors; each says what happened, to which connect, and the remedy, where it happens in a request."""

import asyncio

import pytest
from context_sqla import (
    ContextAlreadyInitiatedError,
    ContextClosedError,
    ContextNotInitiatedError,
    ContextSqlaError,
    CursorClosedError,
    SessionBusyError,
    SetupError,
    UnavailableError,
    UnsupportedOptionError,
    atomic_db_session,
    db_session,
    init_db_session_ctx,
    keep_transaction,
)
from sqlalchemy import text
from support.deadline import until
from support.rows import insert
from support.scenario import Answer, Feature, Route, SocketGone, SocketRoute


class Raises:
    """Handlers that meet one of our errors each."""

    def __init__(self, db):
        self.db = db

    async def already_initiated(self, request):
        init_db_session_ctx()

    async def unsupported_option(self, request):
        await insert(self.db, "a")
        async with atomic_db_session(self.db, "append", isolation_level="SERIALIZABLE"):
            pass

    async def unavailable(self, request):
        raise UnavailableError(f"{self.db!r}: no master", retry_after=3)

    async def closing_itself(self, request):
        await insert(self.db, "a")
        await self.db.close()


@pytest.mark.parametrize(
    ("name", "cls", "says"),
    [
        ("already_initiated", ContextAlreadyInitiatedError, ["force=True"]),
        ("unsupported_option", UnsupportedOptionError, ["'db'", "isolation_level"]),
        ("unavailable", UnavailableError, ["'db'", "no master"]),
        ("closing_itself", ContextSqlaError, ["'db'", "shutdown"]),
    ],
)
async def test_one_handler_answers_every_error_of_ours(serve, db, ledger, name, cls, says):
    """A handler for ``ContextSqlaError`` gets each of them, as the object it is, and everything is rolled back (P19)."""
    caught = []

    async def answer_ours(exc):
        caught.append(exc)
        return Answer(418, str(exc))

    answer = await (await serve(getattr(Raises(db), name), error_handlers={ContextSqlaError: answer_ours})).post()

    assert answer.status == 418
    assert type(caught[0]) is cls
    assert [part for part in says if part not in answer.text] == []
    assert await ledger.names() == []


async def test_unavailable_is_a_503_by_default(serve, db, ledger):
    """Without a handler of the application the client gets a 503 that says when to come again, and no details (P19)."""

    async def handler(request):
        await insert(db, "a")
        raise UnavailableError(f"{db!r}: no master at 10.0.0.1", retry_after=2.1)

    answer = await (await serve(handler)).post()

    assert answer.status == 503
    assert answer.headers["retry-after"] == "3"
    assert "10.0.0.1" not in answer.text
    assert await ledger.names() == []


async def test_unavailable_goes_to_the_applications_own_handler(serve, db):
    """A handler that the application has for it is asked instead (P19)."""

    async def handler(request):
        raise UnavailableError(f"{db!r}: no master")

    async def later(exc):
        return Answer(504, "mine")

    answer = await (await serve(handler, error_handlers={UnavailableError: later})).get()

    assert (answer.status, answer.text) == (504, "mine")


async def test_unavailable_handler_of_hosts_is_a_503(serve, connect):
    """A ``before_create_session_handler`` that finds no host raises out of ``db_session``: a 503 (P13, P19)."""

    async def choose(connect):
        raise UnavailableError(f"{connect!r}: no host is up", retry_after=1)

    db = await connect("db", handler=choose)

    async def handler(request):
        await db_session(db)
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


async def test_handler_that_takes_too_long_is_unavailable(serve, connect):
    """Past ``handler_timeout`` the error is an ``UnavailableError`` that names the connect: a 503 (P13, P19)."""
    seen = []

    async def choose(connect):
        await asyncio.Event().wait()

    db = await connect("slow", handler=choose, handler_timeout=0.01)

    async def handler(request):
        try:
            await db_session(db)
        except UnavailableError as exc:
            seen.append(str(exc))
            raise
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 503
    assert "'slow'" in seen[0]


async def test_websocket_without_a_unit_names_the_remedy(serve, db, framework):
    """In a websocket handler a session needs ``db_context()``: the error says so, and names the connect (P11, P19)."""
    seen = []

    async def handler(socket):
        await socket.accept()
        try:
            await db_session(db)
        except ContextNotInitiatedError as exc:
            seen.append(str(exc))
        await socket.send("done")
        try:
            await socket.receive()
        except SocketGone:
            pass

    service = await serve(SocketRoute("/ws", handler))
    async with service.websocket("/ws") as socket:
        await socket.recv()

    assert len(seen) == 1
    assert [part for part in ("'db'", "db_context()") if part not in seen[0]] == []


async def test_task_that_outlived_its_request_names_the_remedy(serve, db):
    """Asking for a session too late: the connect, ``db_context()`` and ``run_in_new_ctx()`` are named (P10, P19)."""
    answered = asyncio.Event()
    tasks = []

    async def late():
        await asyncio.wait_for(answered.wait(), 10)
        await db_session(db)

    async def handler(request):
        tasks.append(asyncio.create_task(late()))
        return Answer(200)

    service = await serve(handler)
    await service.get()
    await service.stop()
    answered.set()
    with pytest.raises(ContextClosedError) as caught:
        await tasks[0]

    assert [part for part in ("'db'", "db_context()", "run_in_new_ctx()") if part not in str(caught.value)] == []


async def test_session_that_outlived_its_request_names_the_remedy(serve, db, bench):
    """Using a session too late: the same, and no connection is taken (P10, P19)."""
    sessions = []

    async def handler(request):
        sessions.append(await db_session(db))
        return Answer(200)

    service = await serve(handler)
    await service.get()
    await service.stop()
    with pytest.raises(ContextClosedError) as caught:
        await sessions[0].execute(text("SELECT 1"))

    assert [part for part in ("'db'", "db_session()", "db_context()", "run_in_new_ctx()") if part not in str(caught.value)] == []
    assert bench.databases.checked_out() == 0


@pytest.mark.postgresql
async def test_statement_that_does_not_end_names_the_remedy(serve, connect, ledger, framework):
    """A statement that still runs when its request wants to commit: a 5xx, whose error names the connect and what to do (P7a, P19)."""
    db = await connect("busy", cleanup_timeout=0.1)
    seen = []
    tasks = []

    async def left_behind():
        await insert(db, "a")

    async def handler(request):
        tasks.append(asyncio.create_task(left_behind()))
        await ledger.waiting("busy")
        return Answer(201)

    async def answer_busy(exc):
        seen.append(str(exc))
        return Answer(503)

    service = await serve(handler, error_handlers={SessionBusyError: answer_busy})
    async with ledger.lock():
        answer = await service.post()
        failed = (await asyncio.gather(*tasks, return_exceptions=True))[0]

    assert answer.status == (500 if Feature.COMMIT_ERROR_HANDLERS in framework.lacks else 503)
    assert isinstance(failed, Exception)
    assert seen == [] or ("'busy'" in seen[0] and "run_in_new_ctx()" in seen[0])
    assert (seen == []) == (Feature.COMMIT_ERROR_HANDLERS in framework.lacks)
    assert await ledger.names() == []


@pytest.mark.postgresql
@pytest.mark.parametrize("kept", [False, True], ids=["closed", "kept"])
async def test_cursor_of_the_handler_names_the_remedy(serve, db, ledger, kept):
    """A server-side cursor read after the head: an error that names ``keep_transaction``; with it the cursor lives (P5, P19)."""
    await ledger.execute("INSERT INTO items (name) SELECT 'row ' || n FROM generate_series(1, 2000) AS n")
    seen = []

    async def body(result):
        try:
            async for (name,) in result:
                yield name.encode()
        except Exception as exc:
            seen.append(exc)
            raise

    async def handler(request):
        session = await db_session(db)
        if kept:
            await keep_transaction(db)
        result = await session.stream(text("SELECT name FROM items ORDER BY id").execution_options(yield_per=10))
        return Answer(200, stream=body(result))

    answer = await (await serve(handler)).get()
    if kept:
        assert answer.complete
        assert seen == []
    else:
        await until(lambda: seen)
        assert isinstance(seen[0], CursorClosedError)
        assert "keep_transaction" in str(seen[0])
        assert not answer.complete


async def test_second_setup_is_refused(framework, bench, db):
    """``setup`` twice, or after the start, is a ``SetupError`` that says what to do; asgi's wraps, and may do so again (P19)."""

    async def handler(request):
        return Answer(200)

    app = bench.build(Route("/", handler))
    if framework.module == "asgi":
        from context_sqla_asgi import setup

        assert callable(setup(app, db))
        return
    if framework.module == "starlette":
        from context_sqla_starlette import setup
    elif framework.module == "sanic":
        from context_sqla_sanic import setup
    else:
        from context_sqla_fastapi import setup
    with pytest.raises(SetupError, match="already"):
        setup(app, db)


async def test_setup_after_the_start_is_refused(serve, framework, db):
    """An application that is being served cannot be set up any more (P19)."""

    async def handler(request):
        return Answer(200)

    service = await serve(handler)
    await service.get()
    if framework.module == "asgi":
        assert callable(service.app)
        return
    if framework.module == "starlette":
        from context_sqla_starlette import setup
    elif framework.module == "sanic":
        from context_sqla_sanic import setup
    else:
        from context_sqla_fastapi import setup
    with pytest.raises(SetupError, match="started"):
        setup(service.app, db)
