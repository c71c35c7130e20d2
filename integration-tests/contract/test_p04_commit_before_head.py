"""P4, P4a and P4b: the commit comes before the answer, is never a silent rollback, and its errors reach the application."""

import asyncio
import contextlib

import pytest
from context_sqla import atomic_db_session, commit_db_session, db_context, db_session, is_in_doubt, rollback_db_session
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from support.deadline import DEADLINE
from support.proxy import proxy
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Feature, Route
from support.wire import Address


async def _conflict(exc):
    return Answer(409, "conflict")


@pytest.mark.wire
async def test_write_is_visible_once_the_head_is_there(serve, db, ledger):
    """A client that has the head can read its write from any other connection at once (P4)."""

    async def handler(request):
        await add(db, request.query["name"])
        return Answer(201)

    service = await serve(handler)
    seen = []
    async with service.connect() as connection:
        for number in range(20):
            await connection.send("POST", f"/?name={number}")
            head = await connection.head()
            seen.append((head.status, await ledger.count()))
            await connection.rest()

    assert seen == [(201, number + 1) for number in range(20)]


@pytest.mark.wire
@pytest.mark.postgresql
async def test_no_byte_leaves_while_the_commit_is_on_its_way(serve, connect, database):
    """As long as COMMIT is not answered, the client has no byte of the head (P4)."""

    async def write(request):
        await insert(db, "a")
        return Answer(201)

    async def ping(request):
        return Answer(200)

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        service = await serve(Route("/", write), Route("/ping", ping))
        async with service.connect() as connection:
            commit = network.hold_at(b"COMMIT", forward=True)
            await connection.send("POST", "/")
            head = asyncio.create_task(connection.head())
            await asyncio.wait_for(commit.sprung.wait(), 10)
            # The server is alive and the kernel quick: a byte that was sent would be here by now.
            await service.get("/ping")
            early = head.done()
            commit.release()
            status = (await head).status
            await connection.rest()
        await service.stop()

    assert not early
    assert status == 201


@pytest.mark.wire
async def test_failed_commit_is_a_5xx(serve, db, ledger):
    """A client never sees a 2xx, nor a byte of its body, for a write that was lost (P4)."""

    async def handler(request):
        await insert(db, "a")
        await insert_orphan(db)
        return Answer(201, "created")

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert "created" not in answer.text
    assert await ledger.names() == []
    assert await ledger.names("children") == []


@pytest.mark.wire
async def test_failed_commit_of_a_stream_starts_no_body(serve, db, ledger):
    """When the commit before a stream's head fails, its generator never starts and the client gets a 5xx (P4)."""
    started = []

    async def body():
        started.append(True)
        yield b"never"

    async def handler(request):
        await insert_orphan(db)
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert answer.status == 500
    assert "never" not in answer.text
    assert started == []
    assert await ledger.names("children") == []


async def test_failed_commit_leaves_the_next_request_alone(serve, db, ledger):
    """After a failed commit the connection and the pool serve the next request as before (P4)."""

    async def handler(request):
        await (insert_orphan(db) if request.path == "/orphan" else insert(db, "a"))
        return Answer(201)

    service = await serve(Route("/", handler), Route("/orphan", handler))
    answers = [await service.post(path) for path in ("/orphan", "/orphan", "/")]

    assert [answer.status for answer in answers] == [500, 500, 201]
    assert await ledger.names() == ["a"]


async def test_error_handler_answers_a_failed_commit(serve, db, ledger, framework):
    """A handler for ``IntegrityError`` answers one that COMMIT raised (P4b); where it cannot, the client gets a 500."""

    async def handler(request):
        await insert_orphan(db)
        return Answer(201)

    answer = await (await serve(handler, error_handlers={IntegrityError: _conflict})).post()

    if Feature.COMMIT_ERROR_HANDLERS in framework.lacks:
        assert answer.status == 500
    else:
        assert (answer.status, answer.text) == (409, "conflict")
    assert await ledger.names("children") == []


async def test_error_handler_answers_a_failed_statement_alike(serve, db, ledger):
    """The same handler answers an ``IntegrityError`` that a statement in the handler raised (P4b)."""

    async def handler(request):
        await insert(db, "a")
        await insert(db, "a")
        return Answer(201)

    answer = await (await serve(handler, error_handlers={IntegrityError: _conflict})).post()

    assert (answer.status, answer.text) == (409, "conflict")
    assert await ledger.names() == []


async def test_error_handler_gets_the_original_exception(serve, db, bench, framework):
    """What the error handler gets is the object that SQLAlchemy raised, not a copy and not a wrapper (P4b)."""
    raised = []
    seen = []

    async def handler(request):
        await insert_orphan(db)
        event.listen(
            bench.databases.engines[0].sync_engine, "handle_error", lambda context: raised.append(context.sqlalchemy_exception)
        )
        return Answer(201)

    async def remember(exc):
        seen.append(exc)
        return Answer(409)

    await (await serve(handler, error_handlers={IntegrityError: remember})).post()

    assert len(raised) == 1
    assert [id(exc) for exc in seen] == ([] if Feature.COMMIT_ERROR_HANDLERS in framework.lacks else [id(raised[0])])


async def test_error_handler_may_use_the_database(serve, db, ledger, framework):
    """A handler that answers a failed commit with a 2xx can write, in a transaction that commits (P4b)."""

    async def handler(request):
        await insert_orphan(db)
        return Answer(201)

    async def note(exc):
        await insert(db, "noted")
        return Answer(202)

    answer = await (await serve(handler, error_handlers={IntegrityError: note})).post()

    lacking = Feature.COMMIT_ERROR_HANDLERS in framework.lacks
    assert answer.status == (500 if lacking else 202)
    assert await ledger.names() == ([] if lacking else ["noted"])
    assert await ledger.names("children") == []


async def test_outer_middleware_sees_the_answer_to_a_failed_commit(serve, db, framework):
    """CORS headers are on the answer of an error handler, and the browser can read the 409 (P4b)."""

    async def handler(request):
        await insert_orphan(db)
        return Answer(201)

    middleware = [] if Feature.CORS in framework.lacks else [Feature.CORS]
    service = await serve(handler, error_handlers={IntegrityError: _conflict}, middleware=middleware)
    answer = await service.post("/", headers={"origin": "https://example.org"})

    assert answer.status == (500 if Feature.COMMIT_ERROR_HANDLERS in framework.lacks else 409)
    assert ("access-control-allow-origin" in answer.headers) == (Feature.CORS not in framework.lacks)


async def test_refused_commit_is_a_5xx(serve, db, ledger):
    """``before_commit`` refuses a commit by raising: a 5xx and no row (P4)."""

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    async def refuse(session):
        raise ValueError("not on a Sunday")

    answer = await (await serve(handler, before_commit=refuse)).post()

    assert answer.status == 500
    assert await ledger.names() == []


async def test_error_of_a_flush_at_the_commit_is_handled_alike(serve, db, ledger, framework):
    """A constraint that fails in the flush before COMMIT is a commit error too (P4b)."""

    async def handler(request):
        await insert(db, "a")
        await add(db, "a")
        return Answer(201)

    answer = await (await serve(handler, error_handlers={IntegrityError: _conflict})).post()

    assert answer.status == (500 if Feature.COMMIT_ERROR_HANDLERS in framework.lacks else 409)
    assert await ledger.names() == []


# ----------------------------------------------------------------------------------------------------------------------- P4a


async def _fail_quietly(db, name="a"):
    """Run a statement that fails, and swallow its error."""
    with contextlib.suppress(DBAPIError):
        await (await db_session(db)).execute(text(f"INSERT INTO items (name) VALUES ('{name}')"))


async def _write_and_fail_quietly(db):
    await insert(db, "a")
    await _fail_quietly(db)


@pytest.mark.wire
async def test_swallowed_error_of_a_statement_is_a_5xx(serve, db, stack, ledger):
    """Where a failed statement has aborted the transaction, a 2xx without its rows becomes a 5xx; SQLite aborts nothing (P4a)."""

    async def handler(request):
        await _write_and_fail_quietly(db)
        return Answer(201, "created")

    answer = await (await serve(handler)).post()

    if stack.dialect == "postgresql":
        assert answer.status == 500
        assert "created" not in answer.text
        assert await ledger.names() == []
    else:
        assert answer.status == 201
        assert await ledger.names() == ["a"]


async def test_swallowed_error_in_a_savepoint_commits_the_rest(serve, db, ledger):
    """With a savepoint around the statement that fails, the other row is committed (P4a)."""

    async def handler(request):
        await insert(db, "a")
        with contextlib.suppress(DBAPIError):
            async with (await db_session(db)).begin_nested():
                await insert(db, "a")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["a"]


@pytest.mark.postgresql
async def test_error_after_a_savepoint_that_was_rolled_back_counts(serve, db, ledger):
    """A savepoint heals what failed inside it, and nothing that fails after it (P4a)."""

    async def handler(request):
        await insert(db, "a")
        with contextlib.suppress(DBAPIError):
            async with (await db_session(db)).begin_nested():
                await insert(db, "a")
        await _fail_quietly(db)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_error_inside_a_savepoint_that_is_left_open_counts(serve, db, ledger):
    """A failed statement in a savepoint that nobody has rolled back is a failed statement (P4a)."""

    async def handler(request):
        await insert(db, "a")
        await (await db_session(db)).begin_nested()
        await _fail_quietly(db)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_check_can_be_switched_off(serve, connect, ledger):
    """With ``check_failed_transaction=False`` the answer is the handler's, and the rows are PostgreSQL's: none (P4a)."""
    db = await connect("db", check_failed_transaction=False)

    async def handler(request):
        await _write_and_fail_quietly(db)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == []


@pytest.mark.parametrize("fails", [False, True], ids=["nothing-failed", "something-failed"])
async def test_check_costs_nothing_where_nothing_failed(serve, db, bench, fails):
    """Only a transaction in which a statement failed is looked at before its commit (P4a)."""
    statements = []

    async def handler(request):
        await insert(db, "a")
        engine = bench.databases.engines[0].sync_engine
        event.listen(engine, "before_cursor_execute", lambda conn, cursor, statement, *rest: statements.append(statement))
        if fails:
            await _fail_quietly(db)
        return Answer(201)

    await (await serve(handler)).post()

    assert [statement.startswith("SELECT") for statement in statements] == ([False, True] if fails else [])


@pytest.mark.parametrize("check", [True, False], ids=["checked", "check-off"])
async def test_swallowed_error_of_a_flush_is_a_5xx(serve, connect, ledger, check):
    """A flush that failed has rolled everything back: without a rollback by the handler there is no 2xx (P4a)."""
    db = await connect("db", check_failed_transaction=check)

    async def handler(request):
        await insert(db, "a")
        with contextlib.suppress(IntegrityError):
            await insert(db, "a")
        return Answer(201, "created")

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert "created" not in answer.text
    assert await ledger.names() == []


async def test_rollback_by_hand_makes_up_for_a_failed_statement(serve, db, ledger):
    """A handler that rolls back after the error starts anew, and commits what it writes then (P4a)."""

    async def handler(request):
        await _write_and_fail_quietly(db)
        await rollback_db_session(db)
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["b"]


@pytest.mark.postgresql
async def test_check_of_a_database_that_hangs_is_cut(serve, connect, database, ledger):
    """The question that is asked before the commit gets ``cleanup_timeout`` for its answer: then the connection is cut, and it is a 5xx (P4a)."""

    async def handler(request):
        await _write_and_fail_quietly(db)
        network.mode = "hang"
        return Answer(201)

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host, cleanup_timeout=0.2)
        service = await serve(handler)
        async with asyncio.timeout(DEADLINE):
            answer = await service.post()
        network.mode = "pass"
        await service.stop()

    assert answer.status == 500
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_swallowed_error_reverts_every_connect(serve, db, other, ledger, other_ledger):
    """A failed statement of one connect keeps the others from being committed, whichever was used first (P4a)."""

    async def handler(request):
        await insert(other, "b")
        await _write_and_fail_quietly(db)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []
    assert await other_ledger.names() == []


@pytest.mark.postgresql
async def test_swallowed_error_in_a_body_breaks_it_off(serve, db, ledger, framework):
    """A body whose statement failed does not end well, and its rows are not there (P4a)."""

    async def body():
        yield b"first"
        await _write_and_fail_quietly(db)
        yield b"last"

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert answer.complete == (Feature.STREAM_BROKEN_OFF in framework.lacks)
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_swallowed_error_of_a_fetch_counts(serve, db, ledger):
    """A server-side cursor that fails in the middle has aborted the transaction as well (P4a)."""
    rows = text("SELECT 1 / (900 - i) FROM generate_series(1, 2000) i")

    async def handler(request):
        await insert(db, "a")
        with contextlib.suppress(DBAPIError):
            async for _ in await (await db_session(db)).stream(rows):
                pass
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_swallowed_error_fails_the_block(db, ledger):
    """``db_context()`` raises the database's own error at its end, with a note that names the connect and the remedy (P4a)."""
    with pytest.raises(DBAPIError) as caught:
        async with db_context():
            await _write_and_fail_quietly(db)

    notes = "\n".join(caught.value.__notes__)
    assert "'db'" in notes
    assert "begin_nested" in notes
    assert not is_in_doubt(caught.value)
    assert await ledger.names() == []


@pytest.mark.postgresql
@pytest.mark.parametrize("by", ["commit_db_session", "session.commit", "atomic_db_session"])
async def test_swallowed_error_fails_a_commit_by_hand(db, ledger, by):
    """A commit by hand is no silent rollback either: it raises (P4a)."""

    async def commit_by_hand():
        session = await db_session(db)
        if by == "atomic_db_session":
            async with atomic_db_session(db):
                await _write_and_fail_quietly(db)
            return
        await _write_and_fail_quietly(db)
        if by == "commit_db_session":
            await commit_db_session(db)
        else:
            await session.commit()

    raised = []
    with contextlib.suppress(DBAPIError):
        async with db_context():
            try:
                await commit_by_hand()
            except DBAPIError as exc:
                raised.append(exc)
                raise

    assert len(raised) == 1
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_error_handler_answers_a_swallowed_error(serve, db, ledger, framework):
    """The application's handler for the database's errors answers this one as any other (P4a, P4b)."""

    async def handler(request):
        await _write_and_fail_quietly(db)
        return Answer(201)

    answer = await (await serve(handler, error_handlers={DBAPIError: _conflict})).post()

    assert answer.status == (500 if Feature.COMMIT_ERROR_HANDLERS in framework.lacks else 409)
    assert await ledger.names() == []
