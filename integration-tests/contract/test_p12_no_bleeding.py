"""P12: a request is a unit of its own, unless a test has opened a context and marked it as one to join."""

import asyncio
import contextlib

import pytest
from context_sqla import (
    DBConnect,
    SessionBusyError,
    atomic_db_session,
    commit_db_session,
    db_context,
    db_session,
    on_commit,
    run_in_new_ctx,
)
from context_sqla.errors import SetupError
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Application, Feature, Gate, Redirect, Route, SocketRoute
from support.servers import ServerOptions
from support.service import Service
from support.tables import Item

BIG = b"x" * 400_000


@contextlib.asynccontextmanager
async def shared(*connects: DBConnect):
    """Let all that the application does work in one transaction per connect; gives the test's sessions."""
    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(rollback_session(connect)) for connect in connects]
        await stack.enter_async_context(set_test_context())
        for connect, session in zip(connects, sessions, strict=True):
            await stack.enter_async_context(put_savepoint_session_in_ctx(connect, session))
        yield sessions[0] if len(sessions) == 1 else sessions


async def seen_by(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(Item.name).order_by(Item.name)))


def write(connect: DBConnect):
    """A handler that reads the body and writes the name of the query; ``status`` and ``error`` of the query decide."""

    async def handler(request):
        await request.body()
        await insert(connect, request.query["name"])
        if "error" in request.query:
            raise ZeroDivisionError
        return Answer(int(request.query.get("status", 201)))

    return handler


# One request after the other on one connection


@pytest.mark.loops("asyncio", "uvloop")
@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_big_request_does_not_bleed_into_the_next_ones(serve, db, ledger, http):
    """One POST of 400 KB and three small writes on the same keep-alive connection: all four rows are there (P12)."""
    service = await serve(write(db), options=ServerOptions(http=http))
    async with service.connect() as connection:
        answers = [await connection.request("POST", "/?name=big", body=BIG)]
        seen = [await ledger.count()]
        for number in range(3):
            answers.append(await connection.request("POST", f"/?name=small{number}", body=b"x"))
            seen.append(await ledger.count())

    assert [answer.status for answer in answers] == [201] * 4
    assert seen == [1, 2, 3, 4]


@pytest.mark.loops("asyncio", "uvloop")
@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_pipelined_requests_do_not_bleed(serve, db, ledger, http):
    """The same with requests that are sent without waiting for the answers: all rows are there (P12)."""
    service = await serve(write(db), options=ServerOptions(http=http))
    async with service.connect() as connection:
        await connection.send("POST", "/?name=big", body=BIG)
        for number in range(5):
            await connection.send("POST", f"/?name=small{number}", body=b"x")
        answers = [await connection.response() for _ in range(6)]

    assert [answer.status for answer in answers] == [201] * 6
    assert await ledger.count() == 6


@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_refused_request_does_not_bleed_into_the_next_one(serve, db, ledger, http):
    """Of requests on one connection those that are refused roll back their own rows only (P12)."""
    queries = ["name=a", "name=b&status=500", "name=c", "name=d&status=409", "name=e"]
    service = await serve(write(db), options=ServerOptions(http=http))
    async with service.connect() as connection:
        for query in queries:
            await connection.send("POST", f"/?{query}", body=b"x" * 70_000)
        statuses = [(await connection.response()).status for _ in queries]

    assert statuses == [201, 500, 201, 409, 201]
    assert await ledger.names() == ["a", "c", "e"]


@pytest.mark.wire
async def test_requests_on_one_connection_have_sessions_of_their_own(serve, db, ledger):
    """On every server: each request of a connection has a session, a transaction and a commit of its own (P12)."""
    sessions = []

    async def handler(request):
        await request.body()
        sessions.append(await db_session(db))
        await insert(db, request.query["name"])
        return Answer(201)

    service = await serve(handler)
    seen = []
    async with service.connect() as connection:
        for name, body in (("a", BIG), ("b", b"x"), ("c", BIG), ("d", b"")):
            await connection.request("POST", f"/?name={name}", body=body)
            seen.append(await ledger.count())

    assert seen == [1, 2, 3, 4]
    assert len({id(session) for session in sessions}) == 4


# A unit that is open for another reason


@pytest.mark.wire
async def test_server_inside_an_open_unit_does_not_join_it(serve, db, ledger):
    """A server that was started inside an unrelated ``db_context()``: requests commit by themselves (P12)."""
    with pytest.raises(ZeroDivisionError):
        async with db_context():
            mine = await db_session(db)
            sessions = []

            async def handler(request):
                sessions.append(await db_session(db))
                await insert(db, request.query["name"])
                return Answer(int(request.query["status"]))

            service = await serve(handler)
            await service.post("/?name=a&status=201")
            seen = await ledger.names()
            await service.post("/?name=b&status=400")
            raise ZeroDivisionError

    assert seen == ["a"]
    assert mine not in sessions
    assert await ledger.names() == ["a"]


async def test_application_called_inside_an_open_unit_does_not_join_it(framework, db, ledger):
    """An application that is called in the same task, as ``httpx.ASGITransport`` does, does not join either (P12)."""
    app = framework.driver().build(Application([Route("/", write(db))]))  # a server's shutdown in here could not close it
    async with db_context():
        mine = await db_session(db)
        [status] = await call(framework, app, "/?name=a")
        seen = await ledger.names()
        assert await db_session(db) is mine

    assert (status, seen) == (201, ["a"])


async def call(framework, app, *targets) -> list[int]:
    """POST to an application from this very task, as the framework's test client for one loop does; return the statuses."""
    if framework.module == "aiohttp":
        from aiohttp.test_utils import TestClient, TestServer

        async with TestClient(TestServer(app)) as client:
            return [(await client.post(target)).status for target in targets]
    return [await call_asgi(app, "POST", target) for target in targets]


async def call_asgi(app, method, target) -> int:
    path, _, query = target.partition("?")
    if type(app).__module__.partition(".")[0] == "sanic":
        from contract.drivers.sanic import asgi

        app = asgi(app)  # Sanic has to be started first
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    statuses = []
    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    complete = asyncio.Event()

    async def receive():
        if messages:
            return messages.pop()
        await complete.wait()  # or it would be a client that leaves before it has its answer
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            complete.set()

    await app(scope, receive, send)
    return statuses[0]


# The same request, twice


def _wrapped(framework, handler, write):
    """The bare middleware around an application that is set up."""
    if framework.module == "aiohttp":
        from context_sqla_aiohttp import db_session_middleware

        app = framework.driver().build(Application([Route("/", handler)], setup_first=True))
        app.middlewares.insert(0, framework.driver().between(write))
        app.middlewares.insert(0, db_session_middleware)
        return app
    from context_sqla_asgi import ASGIHTTPDBSessionMiddleware

    from contract.drivers.asgi import Between

    return ASGIHTTPDBSessionMiddleware(Between(framework.driver().build(Application([Route("/", handler)])), write))


def _own_class(framework, handler, write):
    """The framework's own middleware class, added twice, and no setup."""
    return framework.driver().twice(handler, write)


def _mounted(framework, handler, write):
    """An application inside another, both set up."""
    return framework.driver().mounted(handler, write)


@pytest.mark.parametrize("make", [_wrapped, _own_class, _mounted])
async def test_middleware_mounted_twice_is_one_unit(framework, db, ledger, bench, make):
    """Set up twice around one request, in whatever way: one session, one connection, one decision (P12)."""
    if framework.module == "sanic":  # nothing can be mounted in it, and it is set up once
        from context_sqla_sanic import setup

        app = framework.driver().build(Application([]))
        with pytest.raises(SetupError, match="already"):
            setup(app)
        return
    sessions = []
    seen = []

    async def write(name="between"):
        sessions.append(await db_session(db))
        await insert(db, f"{name} {len(seen)}")

    async def handler(request):
        await write("handler")
        seen.append(bench.databases.checked_out())
        on_commit(lambda: seen.append("committed"))
        return Answer(int(request.query["status"]))

    app = make(framework, handler, write)
    statuses = []
    service = Service(app, await framework.driver().start(app, framework.servers[0], ServerOptions()))
    async with service.connect() as connection:
        for status in (201, 404, 303):
            statuses.append((await connection.request("POST", f"/?status={status}")).status)
            seen.append(await ledger.count())
    await service.stop()

    assert statuses == [201, 404, 303]
    assert seen == [1, "committed", 2, 1, 2, 1, "committed", 4]
    assert sessions[::2] == sessions[1::2]


# Tests of an application: everything in one transaction


@pytest.mark.wire
async def test_request_runs_in_the_tests_transaction(serve, db, ledger):
    """A request inside a marked context of a test commits a savepoint: test and client see the row, nobody else does (P12)."""
    service = await serve(write(db))
    async with shared(db) as session:
        answer = await service.post("/?name=a")
        assert await seen_by(session) == ["a"]
        assert await seen_by(await db_session(db)) == ["a"]
        assert await ledger.names() == []
    after = await service.post("/?name=b")

    assert (answer.status, after.status) == (201, 201)
    assert await ledger.names() == ["b"]


@pytest.mark.wire
async def test_server_that_was_started_before_the_test_joins(serve, db, ledger):
    """A server in the same loop that knows only the context of its own start: its requests join all the same (P12)."""
    service = await serve(write(db))
    before = await service.post("/?name=before")
    async with service.connect() as connection:
        async with shared(db):
            answers = [await connection.request("POST", f"/?name={name}", body=BIG) for name in "ab"]
            assert await ledger.names() == ["before"]
        after = await connection.request("POST", "/?name=after")

    assert [answer.status for answer in (before, *answers, after)] == [201] * 4
    assert await ledger.names() == ["after", "before"]


async def test_refused_request_returns_to_its_savepoint(serve, db):
    """In the shared transaction a 4xx and an error take back their own rows, and nobody else's (P12)."""
    service = await serve(write(db))
    async with shared(db) as session:
        session.add(Item(name="test"))
        await session.flush()
        queries = ["name=a", "name=b&status=409", "name=c&error=1", "name=d&status=303"]
        statuses = [(await service.post(f"/?{query}")).status for query in queries]
        assert statuses == [201, 409, 500, 303]
        assert await seen_by(session) == ["a", "d", "test"]


async def test_requests_see_each_others_commits(serve, db):
    """In the shared transaction a later request sees what the earlier ones and the test have written (P12)."""

    async def read(request):
        return Answer(200, " ".join(await seen_by(await db_session(db))))

    service = await serve(Route("/", write(db)), Route("/read", read))
    async with shared(db) as session:
        texts = [(await service.get("/read")).text]
        await service.post("/?name=a")
        texts.append((await service.get("/read")).text)
        session.add(Item(name="outer"))
        await session.commit()
        await add(db, "test")
        texts.append((await service.get("/read")).text)

    assert texts == ["", "a", "a outer test"]


async def test_nothing_is_left_in_the_database(serve, db, ledger):
    """After requests of all kinds the database is as it was before the test (P12)."""

    async def by_hand(request):
        await insert(db, "committed by hand")
        await commit_db_session(db)
        async with atomic_db_session(db):
            await insert(db, "atomic")
        await run_in_new_ctx(insert, db, "new context")
        async with db_context():
            await insert(db, "block")
        return Answer(500)

    service = await serve(Route("/", write(db)), Route("/by-hand", by_hand))
    await ledger.execute("INSERT INTO items (name) VALUES ('there before')")
    async with shared(db) as session:
        for path in ("/?name=a", "/by-hand", "/?name=b&status=400"):
            await service.post(path)
        seen = await seen_by(session)
    await service.stop()

    assert seen == ["a", "atomic", "block", "committed by hand", "new context", "there before"]
    assert await ledger.names() == ["there before"]


async def test_calls_blocks_and_background_join(serve, db, framework):
    """``run_in_new_ctx``, ``db_context`` and background work of a request are savepoints of the test as well (P12)."""
    done = asyncio.Event()

    async def background():
        await insert(db, "background")
        done.set()

    async def handler(request):
        await insert(db, "handler")
        await run_in_new_ctx(insert, db, "call")
        async with db_context():
            await insert(db, "block")
        with contextlib.suppress(ZeroDivisionError):
            async with db_context():
                await insert(db, "dropped")
                raise ZeroDivisionError
        return Answer(201, background=[] if Feature.BACKGROUND in framework.lacks else [background])

    service = await serve(handler)
    async with shared(db) as session:
        await service.post()
        expected = ["block", "call", "handler"]
        if Feature.BACKGROUND not in framework.lacks:
            await asyncio.wait_for(done.wait(), 10)
            await service.stop()
            expected.insert(0, "background")
        assert await seen_by(session) == expected


async def test_stream_joins(serve, db):
    """What a body writes is a savepoint of its own, released at its end (P5, P12)."""

    async def body():
        yield b"first"
        await insert(db, "body")
        yield b"last"

    async def handler(request):
        await insert(db, "handler")
        return Answer(int(request.query["status"]), stream=body())

    service = await serve(handler)
    async with shared(db) as session:
        good = await service.post("/?status=200")
        assert await seen_by(session) == ["body", "handler"]
        await service.post("/?status=404")
        assert await seen_by(session) == ["body", "handler"]

    assert (good.text, good.complete) == ("firstlast", True)


async def test_ten_units_side_by_side_in_a_request(serve, db):
    """``gather`` of ten units of which some fail: each is all or nothing inside the test's transaction too (P12, P18)."""

    async def work(number):
        await insert(db, f"{number} a")
        await insert(db, f"{number} b")
        if number % 3 == 0:
            raise ZeroDivisionError

    async def handler(request):
        await insert(db, "handler")
        results = await asyncio.gather(*(run_in_new_ctx(work, number) for number in range(10)), return_exceptions=True)
        return Answer(201, str(sum(result is not None for result in results)))

    service = await serve(handler)
    async with shared(db) as session:
        answer = await service.post()
        rows = await seen_by(session)

    assert (answer.status, answer.text) == (201, "4")
    assert rows == sorted(["handler", *(f"{number} {half}" for number in (1, 2, 4, 5, 7, 8) for half in "ab")])


async def test_parent_cannot_use_the_connection_of_its_child(serve, db):
    """A statement of the request while a unit inside it has the connection: an error that names real commits (P12)."""
    seen = []

    async def handler(request):
        session = await db_session(db)
        await insert(db, "before")
        async with db_context():
            await insert(db, "child")
            try:
                await session.execute(text("SELECT 1"))
            except SessionBusyError as exc:
                seen.append(str(exc))
        await insert(db, "after")
        return Answer(201)

    service = await serve(handler)
    async with shared(db) as session:
        answer = await service.post()
        assert await seen_by(session) == ["after", "before", "child"]

    assert answer.status == 201
    assert len(seen) == 1
    assert "'db'" in seen[0]
    assert "real commits" in seen[0]


async def test_requests_side_by_side_take_turns(serve, db):
    """Several clients at once: the requests use the one connection one after the other, none fails (P12)."""
    service = await serve(write(db))
    async with shared(db) as session:
        answers = await asyncio.gather(
            *(service.post(f"/?name={number}&status={201 + 199 * (number % 2)}") for number in range(8))
        )
        assert await seen_by(session) == ["0", "2", "4", "6"]

    assert sorted(answer.status for answer in answers) == [201] * 4 + [400] * 4


@pytest.mark.postgresql
async def test_swallowed_error_is_no_silent_rollback_in_the_shared_transaction(serve, db):
    """A statement fails and the handler answers 200: a 5xx here as well, and the test's transaction goes on (P4a, P12)."""

    async def handler(request):
        await insert(db, "lost")
        with contextlib.suppress(IntegrityError):
            await (await db_session(db)).execute(text("INSERT INTO items (name) VALUES ('there')"))
        return Answer(200)

    service = await serve(Route("/", handler), Route("/write", write(db)))
    async with shared(db) as session:
        session.add(Item(name="there"))
        await session.commit()
        answer = await service.post()
        after = await service.post("/write?name=after")
        assert await seen_by(session) == ["after", "there"]

    assert (answer.status, after.status) == (500, 201)


async def test_swallowed_error_in_a_savepoint_is_none(serve, db):
    """With a savepoint around the failing statement: 200, and the other row is there (P4a, P12)."""

    async def handler(request):
        await insert(db, "kept")
        session = await db_session(db)
        with contextlib.suppress(IntegrityError):
            async with session.begin_nested():
                await session.execute(text("INSERT INTO items (name) VALUES ('kept')"))
        return Answer(200)

    service = await serve(handler)
    async with shared(db) as session:
        answer = await service.post()
        assert await seen_by(session) == ["kept"]

    assert answer.status == 200


async def test_callbacks_run_when_the_application_believes_it_has_committed(serve, db):
    """``on_commit`` runs before the head of a request that commits its savepoint, and not for one that is refused (P12, P14)."""
    ran = []

    async def handler(request):
        name = request.query["name"]
        await insert(db, name)
        on_commit(lambda: ran.append(name))
        on_commit(lambda: ran.append(f"{name} of db"), connect=db)
        return Answer(int(request.query["status"]))

    service = await serve(handler)
    async with shared(db):
        await service.post("/?name=a&status=201")
        assert sorted(ran) == ["a", "a of db"]
        await service.post("/?name=b&status=400")
        assert len(ran) == 2


async def test_hook_refuses_in_the_shared_transaction(serve, db):
    """``before_commit`` refuses the release of a savepoint just as it refuses a commit (P12, P14)."""

    async def refuse(session):
        if (await db_session(db)).info.get("refuse"):
            raise ZeroDivisionError

    async def handler(request):
        await insert(db, request.query["name"])
        (await db_session(db)).info["refuse"] = request.query["name"] == "bad"
        return Answer(201)

    service = await serve(handler, before_commit=refuse)
    async with shared(db) as session:
        statuses = [(await service.post(f"/?name={name}")).status for name in ("good", "bad", "better")]
        assert await seen_by(session) == ["better", "good"]

    assert statuses == [201, 500, 201]


async def test_policy_holds_in_the_shared_transaction(serve, db):
    """``should_commit`` decides about savepoints too (P3, P12)."""
    service = await serve(write(db), should_commit=lambda status: status == 404)
    async with shared(db) as session:
        await service.post("/?name=a&status=200")
        await service.post("/?name=b&status=404")
        assert await seen_by(session) == ["b"]


async def test_several_connects_share(serve, db, other, ledger, other_ledger):
    """Two databases, two shared transactions: a request commits or rolls back in both (P9, P12)."""

    async def handler(request):
        await insert(db, request.query["name"])
        await insert(other, request.query["name"])
        return Answer(int(request.query["status"]))

    service = await serve(handler)
    async with shared(db, other) as (session, other_session):
        await service.post("/?name=a&status=201")
        await service.post("/?name=b&status=400")
        assert (await seen_by(session), await seen_by(other_session)) == (["a"], ["a"])

    assert (await ledger.names(), await other_ledger.names()) == ([], [])


async def test_two_connects_to_one_database_share(serve, db, connect, ledger):
    """Two connects to one database have two shared transactions, as independent as they are without a test (P12)."""
    again = await connect("again")

    async def handler(request):
        await insert(db, "a")
        seen = await seen_by(await db_session(again))
        return Answer(201, " ".join(seen))

    service = await serve(handler)
    async with shared(db, again) as (session, _):
        answer = await service.post()
        assert await seen_by(session) == ["a"]

    assert (answer.status, answer.text) == (201, "")
    assert await ledger.names() == []


async def test_other_sessions_of_the_test_are_flushed_and_kept(serve, db, other, other_ledger, bench):
    """A connect that the test does not share: the request gets the test's session, flushed, not committed, not closed (P12)."""
    sessions = []

    async def handler(request):
        await insert(db, "a")
        await add(other, "b")
        sessions.append(await db_session(other))
        return Answer(201)

    service = await serve(handler)
    async with shared(db):
        mine = await db_session(other)
        answer = await service.post()
        assert sessions == [mine]
        assert mine.in_transaction()
        assert not mine.new
        assert await seen_by(mine) == ["b"]
        assert await other_ledger.names() == []

    assert answer.status == 201
    assert await other_ledger.names() == []


async def test_auto_close_commits_what_requests_wrote(serve, db, ledger):
    """``set_test_context(auto_close=True)`` without savepoints: what requests wrote commits at the end of the block (P12)."""
    service = await serve(write(db))
    async with set_test_context(auto_close=True):
        await service.post("/?name=a")
        before = await ledger.names()

    assert before == []
    assert await ledger.names() == ["a"]


async def test_application_called_in_the_tests_task_joins(framework, db, ledger):
    """The application called through a transport in the test's own task joins as well (P12)."""
    app = framework.driver().build(Application([Route("/", write(db))], (db,)))
    async with shared(db) as session:
        statuses = await call(framework, app, "/?name=a", "/?name=b&status=404", "/?name=c")
        assert await seen_by(session) == ["a", "c"]

    assert statuses == [201, 404, 201]
    assert await ledger.names() == []


async def test_whole_application_lives_and_dies_inside_a_test(serve, db, ledger, framework):
    """The shutdown closes the connects: it leaves the test's connection alone, and waits for nobody (P12, P15)."""
    closed = []

    async def close():
        await db.close()
        closed.append(True)

    async with shared(db) as session:
        service = await serve(write(db), on_shutdown=[close])
        await service.post("/?name=a")
        await asyncio.wait_for(service.stop(), 10)
        assert closed == [True]
        assert await seen_by(session) == ["a"]
        await run_in_new_ctx(insert, db, "b")
        assert await seen_by(session) == ["a", "b"]

    assert await ledger.names() == []


async def test_hooks_of_the_lifespan_join(serve, db, ledger):
    """A ``db_context()`` in a startup hook is in the test's transaction too, when the server is started inside it (P12)."""

    async def startup():
        async with db_context():
            await insert(db, "startup")

    async with shared(db) as session:
        service = await serve(write(db), on_startup=[startup])
        await service.post("/?name=a")
        assert await seen_by(session) == ["a", "startup"]

    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_deferred_constraint_fails_at_the_commit_of_the_application(serve, db):
    """It is checked although nothing is committed, the request is rolled back, and the next one works (P4, P12)."""

    async def handler(request):
        await insert(db, request.query["name"])
        if request.query["name"] == "orphan":
            await insert_orphan(db)
        return Answer(201)

    service = await serve(handler)
    async with shared(db) as session:
        answers = [await service.post(f"/?name={name}") for name in ("a", "orphan", "b")]
        seen = await seen_by(session)

    assert [answer.status for answer in answers] == [201, 500, 201]
    assert seen == ["a", "b"]


@pytest.mark.sqlite
async def test_deferred_constraint_of_sqlite_is_the_tests_affair(serve, db):
    """SQLite checks it at a real commit only, and the docs of testing say so (P12)."""

    async def handler(request):
        await insert_orphan(db)
        return Answer(201)

    service = await serve(handler)
    async with shared(db):
        answer = await service.post()

    assert answer.status == 201


async def test_middleware_that_answers_by_itself_joins(serve, db):
    """A gate's write in the shared transaction follows its own status (P3, P12)."""

    async def check(request):
        await add(db, request.query["name"])
        return Answer(int(request.query["status"])) if "status" in request.query else None

    async def handler(request):
        return Redirect("/next")

    service = await serve(handler, middleware=[Gate(check)])
    async with shared(db) as session:
        for query in ("name=a", "name=b&status=401", "name=c&status=202"):
            await service.post(f"/?{query}")
        assert await seen_by(session) == ["a", "c"]


async def test_websocket_joins_with_a_unit_of_its_own(serve, db, framework):
    """Messages of a websocket in ``db_context()`` blocks are savepoints of the test (P11, P12)."""

    async def handler(socket):
        await socket.accept()
        async with db_context():
            await insert(db, await socket.receive())
        await socket.send("written")
        await socket.receive()

    service = await serve(SocketRoute("/ws", handler))
    async with shared(db) as session:
        async with service.websocket("/ws") as socket:
            await socket.send("a")
            await socket.recv()
            assert await seen_by(session) == ["a"]
            await socket.send("bye")
