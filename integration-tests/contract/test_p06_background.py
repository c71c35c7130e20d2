"""P6: the background work of one response is one unit of its own."""

import asyncio

import pytest
from context_sqla import ContextClosedError, db_session, is_context_initiated, run_in_new_ctx
from sqlalchemy import text
from support.deadline import until
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Feature

# All frameworks so far run work after the response, as a unit; one that starts it at once (Feature.BACKGROUND_UNIT) is P2 and P10.


class Broken(Exception):
    """An error of the application."""


class Work:
    """Background work; ``done`` is set when the last of its functions has returned or raised, its unit is not over then."""

    def __init__(self, db):
        self.db = db
        self.done = asyncio.Event()

    def insert(self, name, *, last=True, error=None):
        """Return a function that writes a row, then raises ``error``."""

        async def work():
            try:
                await insert(self.db, name)
                if error is not None:
                    raise error
            finally:
                if last:
                    self.done.set()

        return work


async def _names(ledger, *names):
    """Wait for exactly these rows: what runs after a response announces its end to nobody."""

    async def there():
        return await ledger.names() == list(names)

    await until(there, message=f"the rows never were {names}")


async def _over(work, bench):
    """Wait until the background unit, which wrote something, has given its connection back."""
    await asyncio.wait_for(work.done.wait(), 10)
    await until(lambda: bench.databases.checked_out() == 0)


@pytest.mark.wire
async def test_background_work_commits(serve, db, ledger):
    """Background work that succeeds is committed (P6)."""

    async def work():
        await insert(db, "work")

    async def handler(request):
        await insert(db, "handler")
        return Answer(202, "later", background=[work])

    answer = await (await serve(handler)).post()
    await _names(ledger, "handler", "work")

    assert (answer.status, answer.text) == (202, "later")


async def test_what_background_work_leaves_to_a_flush_is_committed(serve, db, ledger):
    """Objects that background work adds and does not flush are written (P6)."""

    async def work():
        await add(db, "work")

    async def handler(request):
        return Answer(202, background=[work])

    answer = await (await serve(handler)).post()
    await _names(ledger, "work")

    assert answer.status == 202


@pytest.mark.wire
async def test_failing_background_work_rolls_back(serve, db, bench, ledger):
    """Background work that fails is rolled back; the response and what the handler wrote stay (P6)."""
    work = Work(db)

    async def handler(request):
        await insert(db, "handler")
        return Answer(202, "later", background=[work.insert("work", error=Broken())])

    answer = await (await serve(handler)).post()
    await _over(work, bench)

    assert (answer.status, answer.text, answer.complete) == (202, "later", True)
    assert await ledger.names() == ["handler"]


async def test_failed_commit_of_background_work_rolls_back(serve, db, bench, ledger):
    """Background work whose commit fails leaves nothing, and the pool serves the next request (P6)."""
    done = asyncio.Event()

    async def work():
        await insert(db, "work")
        await insert_orphan(db)
        done.set()

    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(202, background=[work] if request.query["name"] == "a" else [])

    service = await serve(handler)
    first = await service.post("/?name=a")
    await asyncio.wait_for(done.wait(), 10)
    await until(lambda: bench.databases.checked_out() == 0)
    second = await service.post("/?name=b")

    assert (first.status, second.status) == (202, 202)
    assert await ledger.names() == ["a", "b"]
    assert await ledger.names("children") == []


@pytest.mark.parametrize("status", [303, 404, 500])
async def test_background_work_does_not_follow_the_status(serve, db, ledger, status):
    """Background work commits after an error response too, whose own writes are rolled back (P6)."""

    async def work():
        await insert(db, "work")

    async def handler(request):
        await insert(db, "handler")
        return Answer(status, background=[work])

    answer = await (await serve(handler)).post()
    names = ["handler", "work"] if status < 400 else ["work"]
    await _names(ledger, *names)

    assert answer.status == status


async def test_should_commit_does_not_decide_about_background_work(serve, db, ledger):
    """A rule that rolls the response back leaves its background work alone (P6)."""

    async def work():
        await insert(db, "work")

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, background=[work])

    answer = await (await serve(handler, should_commit=lambda status: False)).post()
    await _names(ledger, "work")

    assert answer.status == 200


async def test_tasks_of_one_response_are_one_unit(serve, db, ledger):
    """Two tasks of one response share a session and a transaction, which commits after the last of them (P6)."""
    seen = []

    async def first():
        seen.append(await db_session(db))
        await insert(db, "first")

    async def second():
        seen.append(await db_session(db))
        seen.append(await ledger.names())
        await insert(db, "second")

    async def handler(request):
        return Answer(202, background=[first, second])

    answer = await (await serve(handler)).post()
    await _names(ledger, "first", "second")

    assert answer.status == 202
    assert seen[0] is seen[1]
    assert seen[2] == []


async def test_tasks_of_one_response_fail_together(serve, db, bench, ledger):
    """When the second of two tasks fails the work of the first is rolled back as well (P6)."""
    work = Work(db)

    async def handler(request):
        return Answer(202, background=[work.insert("first", last=False), work.insert("second", error=Broken())])

    answer = await (await serve(handler)).post()
    await _over(work, bench)

    assert answer.status == 202
    assert await ledger.names() == []


async def test_run_in_new_ctx_separates_tasks(serve, db, bench, ledger):
    """Tasks that run in run_in_new_ctx stand and fall alone (P6)."""
    work = Work(db)

    async def first():
        await run_in_new_ctx(work.insert("first", last=False))

    async def second():
        await run_in_new_ctx(work.insert("second", error=Broken()))

    async def handler(request):
        return Answer(202, background=[first, second])

    answer = await (await serve(handler)).post()
    await _over(work, bench)

    assert answer.status == 202
    assert await ledger.names() == ["first"]


@pytest.mark.wire
async def test_connection_is_back_while_background_work_runs(serve, connect, bench, ledger):
    """While background work runs the request's connection serves others, from a pool of one (P6)."""
    db = await connect("db", engine_options={"pool_size": 1})
    go_on = asyncio.Event()
    running = asyncio.Event()
    held = []

    async def work():
        held.append(bench.databases.checked_out())
        running.set()
        await go_on.wait()
        await insert(db, "work")

    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(202, background=[work] if request.query["name"] == "a" else [])

    service = await serve(handler)
    await service.post("/?name=a")
    await asyncio.wait_for(running.wait(), 10)
    answer = await service.post("/?name=b")
    before = await ledger.names()
    go_on.set()
    await _names(ledger, "a", "b", "work")

    assert answer.status == 202
    assert held == [0]
    assert before == ["a", "b"]


async def test_background_work_has_a_session_of_its_own(serve, db, ledger):
    """Background work does not get the session of the request (P6)."""
    sessions = []

    async def work():
        sessions.append(await db_session(db))
        await insert(db, "work")

    async def handler(request):
        sessions.append(await db_session(db))
        await insert(db, "handler")
        return Answer(202, background=[work])

    answer = await (await serve(handler)).post()
    await _names(ledger, "handler", "work")

    assert answer.status == 202
    assert sessions[0] is not sessions[1]


@pytest.mark.parametrize("status", [202, 409])
async def test_captured_session_is_refused_in_background_work(serve, db, bench, ledger, status):
    """A session that background work was given by the handler is refused: its unit is over (P6, P10)."""
    errors = []
    done = asyncio.Event()

    async def handler(request):
        session = await db_session(db)
        await insert(db, "handler")

        async def work():
            try:
                await session.execute(text("SELECT 1"))
            except Exception as exc:
                errors.append(exc)
            done.set()

        return Answer(status, background=[work])

    answer = await (await serve(handler)).post()
    await asyncio.wait_for(done.wait(), 10)

    assert answer.status == status
    assert [type(one) for one in errors] == [ContextClosedError]
    assert bench.databases.checked_out() == 0
    assert await ledger.names() == (["handler"] if status < 400 else [])


async def test_background_work_without_a_session_opens_nothing(serve, db, bench):
    """Background work that asks for no session opens nothing (P6, P1)."""
    done = asyncio.Event()

    async def work():
        done.set()

    async def handler(request):
        return Answer(202, background=[work])

    answer = await (await serve(handler)).post()
    await asyncio.wait_for(done.wait(), 10)

    assert answer.status == 202
    assert bench.databases.engines == []


async def test_background_work_of_a_stream_commits(serve, db, ledger):
    """Background work after a stream is a unit apart from what the body wrote (P6)."""
    sessions = []

    async def work():
        sessions.append(await db_session(db))
        await insert(db, "work")

    async def body():
        yield b"first"
        sessions.append(await db_session(db))
        await insert(db, "body")

    async def handler(request):
        return Answer(200, stream=body(), background=[work])

    answer = await (await serve(handler)).get()
    await _names(ledger, "body", "work")

    assert (answer.text, answer.complete) == ("first", True)
    assert sessions[0] is not sessions[1]


@pytest.mark.wire
async def test_background_work_after_a_disconnect_commits(serve, connect, bench, ledger, framework):
    """After a client has left mid-stream the body is rolled back and the background work is committed (P6)."""
    db = await connect("db", engine_options={"pool_size": 1})
    held = []

    async def work():
        await insert(db, "work")

    async def body(request):
        await insert(db, "body")
        held.append(True)
        yield b"first"
        if Feature.DISCONNECT not in framework.lacks:
            await asyncio.Event().wait()
        if framework.module == "aiohttp":
            await until(lambda: request.native.transport is None)
            return
        while True:  # who writes learns it
            yield b"more"
            await asyncio.sleep(0.001)

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body(request), background=[work])

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        await connection.chunk()
        connection.abort()
    if Feature.BACKGROUND in framework.lacks:  # nobody starts it
        await until(lambda: bench.databases.checked_out() == 0)
        await _names(ledger, "handler")
    else:
        await _names(ledger, "handler", "work")

    assert held == [True]


@pytest.mark.wire
async def test_client_that_leaves_during_background_work_changes_nothing(serve, db, ledger):
    """A client that leaves after its response, while background work is in a transaction, does not undo it (P6)."""
    go_on = asyncio.Event()
    written = asyncio.Event()

    async def work():
        await insert(db, "work")
        written.set()
        await go_on.wait()

    async def handler(request):
        return Answer(202, background=[work])

    service = await serve(handler)
    async with service.connect() as connection:
        answer = await connection.request("POST", "/")
        await asyncio.wait_for(written.wait(), 10)
        connection.abort()
    # A request that comes later has been answered: the server has seen the other client go.
    await service.get("/elsewhere")
    go_on.set()
    await _names(ledger, "work")

    assert answer.status == 202


async def test_failed_commit_of_the_request_runs_no_background_work(serve, db, ledger):
    """When the commit of the request fails the response is another one, without its background work (P6)."""
    started = []

    async def work():
        started.append(True)

    async def handler(request):
        await insert_orphan(db)
        return Answer(202, background=[work])

    service = await serve(handler)
    answers = [await service.post() for _ in range(2)]
    await service.stop()

    assert [answer.status for answer in answers] == [500, 500]
    assert started == []


@pytest.mark.parametrize("middleware", [Feature.BASE_HTTP, Feature.GZIP, Feature.CORS], ids=lambda one: one.name.lower())
async def test_background_work_behind_middleware_commits(serve, db, ledger, framework, middleware):
    """Behind the framework's own middleware background work is a unit as without it (P6)."""
    sessions = []

    async def work():
        sessions.append(await db_session(db))
        await insert(db, "work")

    async def handler(request):
        sessions.append(await db_session(db))
        await insert(db, "handler")
        return Answer(202, "later", background=[work])

    service = await serve(handler, middleware=[] if middleware in framework.lacks else [middleware])
    answer = await service.post(headers={"accept-encoding": "gzip", "origin": "https://example.org"})
    await _names(ledger, "handler", "work")

    assert answer.status == 202
    assert sessions[0] is not sessions[1]


async def test_background_work_of_two_requests_is_apart(serve, db, bench, ledger):
    """The background work of one request fails, that of another at the same time commits (P6)."""
    work = {"good": Work(db), "bad": Work(db)}

    async def handler(request):
        name = request.query["name"]
        return Answer(202, background=[work[name].insert(name, error=Broken() if name == "bad" else None)])

    service = await serve(handler)
    answers = await asyncio.gather(*(service.post(f"/?name={name}") for name in work))
    for one in work.values():
        await _over(one, bench)

    assert [answer.status for answer in answers] == [202, 202]
    assert await ledger.names() == ["good"]


async def test_plain_task_shares_the_unit_while_that_lives(serve, db, ledger):
    """A bare task that ends before its request does shares the session, and the request commits its work (P6, P2)."""
    sessions = []

    async def work():
        sessions.append(await db_session(db))
        await insert(db, "task")

    async def handler(request):
        task = asyncio.create_task(work())
        sessions.append(await db_session(db))
        await asyncio.wait([task])
        return Answer(202)

    answer = await (await serve(handler)).post()

    assert answer.status == 202
    assert sessions[0] is sessions[1]
    assert await ledger.names() == ["task"]


async def test_plain_task_that_is_late_is_told_run_in_new_ctx(serve, db):
    """A bare task that asks when its request is over gets an error that says run_in_new_ctx (P6, P10)."""
    tasks = []

    async def work():
        await until(lambda: not is_context_initiated())
        await db_session(db)

    async def handler(request):
        tasks.append(asyncio.create_task(work()))
        return Answer(202)

    answer = await (await serve(handler)).post()
    [outcome] = await asyncio.gather(*tasks, return_exceptions=True)

    assert answer.status == 202
    assert isinstance(outcome, ContextClosedError)
    assert "run_in_new_ctx" in str(outcome)


async def test_plain_task_in_a_new_ctx_outlives_its_request(serve, db, ledger):
    """A bare task whose work runs in run_in_new_ctx may go on after its request, rolled back or not (P6, P10)."""
    tasks = []
    go_on = asyncio.Event()

    async def work():
        await insert(db, "task")
        await go_on.wait()

    async def handler(request):
        await insert(db, "handler")
        tasks.append(asyncio.create_task(run_in_new_ctx(work)))
        return Answer(500)

    answer = await (await serve(handler)).post()
    go_on.set()
    await asyncio.gather(*tasks)

    assert answer.status == 500
    assert await ledger.names() == ["task"]
