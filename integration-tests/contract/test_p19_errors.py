"""P19: one tree of errors; each says what happened, to which connect, and the remedy, where it happens in a request."""

import asyncio
import importlib

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
    close_db_session,
    db_session,
    init_db_session_ctx,
    keep_transaction,
    on_commit,
    rollback_db_session,
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
    setup = importlib.import_module(f"context_sqla_{framework.module}").setup
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
    setup = importlib.import_module(f"context_sqla_{framework.module}").setup
    with pytest.raises(SetupError, match="started"):
        setup(service.app, db)


# What the application gives the adapter, and that cannot work


async def _write_as(serve, db, status, **application):
    """Serve a handler that writes and answers with a status; return what the client got."""

    async def handler(request):
        await insert(db, "a")
        return Answer(status)

    return await (await serve(handler, **application)).post()


def _rule_that_raises(status):
    raise ZeroDivisionError


async def _asynchronous_rule(status):
    return status < 400


@pytest.mark.parametrize(
    ("rule", "status"),
    [(_rule_that_raises, 200), (lambda status: None, 200), (_asynchronous_rule, 404)],
    ids=["raises", "None", "async"],
)
async def test_rule_without_an_answer_is_a_500(serve, db, ledger, rule, status):
    """A ``should_commit`` that fails, forgets to answer or is asynchronous decides nothing: a 500, and no row (P3, P19)."""
    answer = await _write_as(serve, db, status, should_commit=rule)

    assert answer.status == 500
    assert await ledger.names() == []


async def _commits(session):
    await session.commit()


@pytest.mark.parametrize("hook", [lambda session: None, _commits], ids=["plain", "commits"])
async def test_before_commit_that_cannot_work_is_a_500(serve, db, ledger, hook):
    """One that is no async function, or ends the transaction that it is asked about, refuses: a 500, and no row (P14, P19)."""
    answer = await _write_as(serve, db, 200, before_commit=hook)

    assert answer.status == 500
    assert await ledger.names() == []


@pytest.mark.parametrize("bound", [False, True], ids=["unit", "connect"])
async def test_callback_that_is_cancelled_from_inside_changes_nothing(serve, db, ledger, bound):
    """A callback that ends with a cancellation of its own does not cancel the request (P14)."""

    async def cancelled():
        raise asyncio.CancelledError

    async def handler(request):
        await insert(db, "a")
        on_commit(cancelled, connect=db if bound else None)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert (answer.status, answer.complete) == (201, True)
    assert await ledger.names() == ["a"]


async def test_handler_of_hosts_that_is_cancelled_from_inside_is_a_500(serve, connect, ledger):
    """A ``before_create_session_handler`` whose own work was cancelled fails the request, and does not cancel it (P13, P19)."""

    async def choose(connect):
        raise asyncio.CancelledError

    db = await connect("db", handler=choose)
    answer = await _write_as(serve, db, 200)

    assert answer.status == 500
    assert await ledger.names() == []


@pytest.mark.parametrize("returned", [5, ""])
async def test_handler_of_hosts_that_returns_nonsense_is_a_500(serve, connect, ledger, returned):
    """What is no host is refused; the next request is not harmed (P13, P19)."""
    answers = [returned, None]

    async def choose(connect):
        return answers.pop(0)

    db = await connect("db", handler=choose)

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    service = await serve(handler)

    assert [(await service.post()).status, (await service.post()).status] == [500, 201]
    assert await ledger.names() == ["a"]


async def test_unit_ended_by_hand_in_every_way_answers_all_the_same(serve, db, ledger):
    """Committed, rolled back, closed and closed again in the handler: what was committed is there, and the answer is good (P17)."""

    async def handler(request):
        await insert(db, "a")
        session = await db_session(db)
        async with session.begin_nested():
            await insert(db, "b")
        await session.commit()
        await insert(db, "c")
        await session.close()
        await session.close()
        await close_db_session(db)
        await close_db_session(db)
        await insert(db, "d")
        await rollback_db_session(db)
        await insert(db, "e")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["a", "b", "e"]


async def test_thread_that_asks_first_fails_its_request(serve, db, ledger):
    """A thread with a loop of its own gets no session of the request, also where it asks first: a 500, and nothing is lost (P15)."""

    async def handler(request):
        await asyncio.to_thread(lambda: asyncio.run(insert(db, "a")))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


async def test_session_that_a_thread_was_given_fails_its_request(serve, db, ledger):
    """Nor can it use one that the request has asked for: nothing is committed that was not answered for (P15)."""

    async def handler(request):
        session = await db_session(db)
        await asyncio.to_thread(lambda: asyncio.run(_insert_on(session)))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


async def _insert_on(session):
    await session.execute(text("INSERT INTO items (name) VALUES ('a')"))


# setup, twice and with what cannot work


def _setup_of(framework):
    return importlib.import_module(f"context_sqla_{framework.module}").setup


@pytest.mark.parametrize("wrong", [None, "sqlite+aiosqlite://"], ids=["None", "url"])
async def test_setup_takes_connects_and_can_be_repeated(framework, bench, db, monkeypatch, wrong):
    """What is no connect is told where it is written; the application is as it was, and can be set up well (P19)."""

    async def handler(request):
        return Answer(200)

    setup = _setup_of(framework)
    monkeypatch.setattr(framework.driver(), "setup", lambda app, *connects, **options: app)
    app = bench.build(Route("/", handler))
    with pytest.raises(TypeError, match=r"setup\(app, \*connects\) takes DBConnect objects"):
        setup(app, db, wrong)
    setup(app, db)


async def test_setup_of_a_connect_tells_what_goes_first(framework, db):
    """The connect in the application's place is told as such (P19)."""
    with pytest.raises(TypeError, match=r"setup\(app, db, other\)"):
        _setup_of(framework)(db, object())


async def test_two_applications_share_a_connect(serve, db, ledger):
    """Each is set up with it; one that stops closes it, and the other goes on (P15)."""

    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(201)

    one, two = await serve(handler), await serve(handler)
    answers = [(await one.post("/?name=a")).status, (await two.post("/?name=b")).status]
    await one.stop()
    answers += [(await two.post("/?name=c")).status, (await two.post("/?name=d")).status]

    assert answers == [201] * 4
    assert await ledger.names() == ["a", "b", "c", "d"]


async def test_connect_named_twice_is_closed_once(serve, db, ledger):
    """``setup(app, db, db)`` is ``setup(app, db)`` (P15)."""
    answer = await _write_as(serve, db, 201, connects=[db, db])

    assert answer.status == 201
    assert await ledger.names() == ["a"]
