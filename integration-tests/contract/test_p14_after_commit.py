"""P14: what runs after the commit, and who is asked before it."""

import asyncio
import logging

import pytest
from context_sqla import (
    atomic_db_session,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    db_context,
    db_session,
    on_commit,
    rollback_db_session,
    run_in_new_ctx,
)
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from support.deadline import until
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Feature, Route


class Boom(Exception):
    """An error of the application."""


class Log:
    """What ran, in its order, each with the rows that everybody saw then."""

    def __init__(self, *ledgers):
        self.entries = []
        self._ledgers = ledgers

    def __call__(self, name):
        async def note():
            seen = [await ledger.names() for ledger in self._ledgers]
            self.entries.append((name, *seen))

        return note

    def plain(self, name):
        return lambda: self.entries.append((name,))


@pytest.fixture(name="log")
def _log(ledger):
    return Log(ledger)


def _errors(caplog):
    return [record for record in caplog.records if record.name.startswith("context_sqla") and record.levelno >= logging.ERROR]


# Without a connect: when the unit has committed everything


async def test_callback_runs_after_the_commit(serve, db, log):
    """A callback never runs at once; it runs when the unit has committed, plain or async (P14)."""
    before = []

    async def handler(request):
        on_commit(log("async"))
        on_commit(log.plain("plain"))
        await insert(db, "a")
        before.extend(log.entries)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert before == []
    assert log.entries == [("async", ["a"]), ("plain",)]


@pytest.mark.wire
async def test_callback_runs_before_the_first_byte(serve, db):
    """As long as a callback runs, the client has no byte of the head (P14)."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def callback():
        reached.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async def write(request):
        await insert(db, "a")
        on_commit(callback)
        return Answer(201)

    async def ping(request):
        return Answer(200)

    service = await serve(Route("/", write), Route("/ping", ping))
    async with service.connect() as connection:
        await connection.send("POST", "/")
        head = asyncio.create_task(connection.head())
        await asyncio.wait_for(reached.wait(), 10)
        await service.get("/ping")
        early = head.done()
        go_on.set()
        status = (await head).status
        await connection.rest()

    assert not early
    assert status == 201


async def test_callback_waits_for_every_connect(serve, db, other, ledger, other_ledger):
    """Two databases: it runs once, when both have committed (P9, P14)."""
    log = Log(ledger, other_ledger)

    async def handler(request):
        await insert(db, "a")
        on_commit(log("done"))
        await add(other, "b")
        return Answer(201)

    await (await serve(handler)).post()

    assert log.entries == [("done", ["a"], ["b"])]


async def test_callback_does_not_run_after_a_commit_by_hand(serve, db, log):
    """A commit by hand in the middle is not everything: it runs at the head, after the second row (P14)."""

    async def handler(request):
        await insert(db, "a")
        on_commit(log("done"))
        await commit_db_session(db)
        await insert(db, "b")
        return Answer(201)

    await (await serve(handler)).post()

    assert log.entries == [("done", ["a", "b"])]


async def test_callback_of_a_request_without_a_session_runs(serve, db, log, bench):
    """A unit that wrote nothing has committed everything: the callback runs, and nothing was opened (P1, P14)."""

    async def handler(request):
        on_commit(log.plain("done"))
        return Answer(200)

    await (await serve(handler)).get()

    assert log.entries == [("done",)]
    assert bench.databases.engines == []


async def test_callbacks_run_in_their_order(serve, db, log):
    """First registered, first run; one that was registered twice runs twice (P14)."""

    async def handler(request):
        await insert(db, "a")
        for name in ("one", "two", "three"):
            on_commit(log.plain(name))
        again = log.plain("again")
        on_commit(again)
        on_commit(again)
        return Answer(201)

    await (await serve(handler)).post()

    assert [name for name, *_ in log.entries] == ["one", "two", "three", "again", "again"]


@pytest.mark.parametrize("end", ["status", "error", "commit"])
async def test_callback_is_dropped_on_rollback(serve, db, log, end):
    """A status from 400 on, an exception, a commit that fails: it never runs (P14)."""

    async def handler(request):
        if end == "commit":
            await insert_orphan(db)
        else:
            await insert(db, "a")
        on_commit(log.plain("unit"))
        on_commit(log.plain("connect"), connect=db)
        if end == "error":
            raise Boom
        return Answer(400 if end == "status" else 201)

    await (await serve(handler)).post()

    assert log.entries == []


async def test_callback_is_dropped_when_another_connect_fails(serve, db, other, log):
    """Two databases, the second cannot commit: not everything is committed, so it never runs (P9, P14)."""

    async def handler(request):
        await insert(db, "a")
        await insert_orphan(other)
        on_commit(log.plain("unit"))
        on_commit(log("first"), connect=db)
        on_commit(log.plain("second"), connect=other)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert log.entries == [("first", ["a"])]


@pytest.mark.wire
async def test_callback_of_a_body_runs_at_its_end(serve, db, log):
    """One that was registered in the body runs after the body's commit, before the last byte leaves (P5, P14)."""
    looked, reached, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def last():
        await log("body")()
        reached.set()
        await asyncio.wait_for(go_on.wait(), 10)

    async def body():
        yield b"first"
        await asyncio.wait_for(looked.wait(), 10)
        await insert(db, "b")
        on_commit(last)
        yield b"second"

    async def handler(request):
        await insert(db, "a")
        on_commit(log("handler"))
        return Answer(201, stream=body())

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("POST", "/")
        await connection.head()
        at_the_head = list(log.entries)
        looked.set()
        rest = asyncio.create_task(connection.rest())
        await asyncio.wait_for(reached.wait(), 10)
        early = rest.done()
        go_on.set()
        text = await rest

    assert at_the_head == [("handler", ["a"])]
    assert not early
    assert text == b"firstsecond"
    assert log.entries == [("handler", ["a"]), ("body", ["a", "b"])]


async def test_callback_of_a_body_that_fails_is_dropped(serve, db, log):
    """A body that breaks off is rolled back, and its callback with it (P5, P14)."""

    async def body():
        yield b"first"
        await insert(db, "b")
        on_commit(log.plain("body"))
        raise Boom

    async def handler(request):
        on_commit(log.plain("handler"))
        return Answer(201, stream=body())

    await (await serve(handler)).post()

    assert log.entries == [("handler",)]


async def test_callback_runs_at_the_exit_of_a_block(serve, db, log):
    """In ``db_context`` and ``run_in_new_ctx`` it belongs to that unit: it runs at its exit, or is dropped there (P14)."""

    async def work(name, fails=False):
        await insert(db, name)
        on_commit(log(name))
        if fails:
            raise Boom

    async def handler(request):
        on_commit(log.plain("request"))
        async with db_context():
            await work("block")
        log.entries.append(("between",))
        await run_in_new_ctx(work, "call")
        await asyncio.gather(run_in_new_ctx(work, "dropped", fails=True), return_exceptions=True)
        return Answer(201)

    await (await serve(handler)).post()

    assert log.entries == [("block", ["block"]), ("between",), ("call", ["block", "call"]), ("request",)]


async def test_callback_runs_before_background_work(serve, db, log, framework):
    """Callbacks come before the response, background work after it; what that registers runs at its own end (P6, P14)."""

    async def background():
        log.entries.append(("background",))
        await insert(db, "b")
        on_commit(log("after background"))

    async def handler(request):
        await insert(db, "a")
        on_commit(log("request"))
        return Answer(201, background=[background])

    await (await serve(handler)).post()
    await until(lambda: len(log.entries) == 3)

    assert log.entries == [("request", ["a"]), ("background",), ("after background", ["a", "b"])]


# With a connect: after the next commit of its session


@pytest.mark.parametrize("how", ["commit_db_session", "session.commit", "commit_all_sessions", "atomic_db_session"])
async def test_callback_of_a_connect_runs_after_a_commit_by_hand(serve, db, log, how):
    """With ``connect`` it runs after that session's next commit, by whatever hand, and only once (P14)."""

    async def commit():
        if how == "commit_db_session":
            await commit_db_session(db)
        elif how == "session.commit":
            await (await db_session(db)).commit()
        elif how == "commit_all_sessions":
            await commit_all_sessions()
        else:
            async with atomic_db_session(db, "append"):
                pass

    async def handler(request):
        await insert(db, "a")
        on_commit(log("done"), connect=db)
        await commit()
        log.entries.append(("between",))
        await insert(db, "b")
        return Answer(500)

    await (await serve(handler)).post()

    assert log.entries == [("done", ["a"]), ("between",)]


async def test_callback_of_a_connect_runs_at_the_head(serve, db, log):
    """With ``connect`` and without a commit by hand it runs with the unit's own commit (P14)."""

    async def handler(request):
        await insert(db, "a")
        on_commit(log("done"), connect=db)
        return Answer(201)

    await (await serve(handler)).post()

    assert log.entries == [("done", ["a"])]


async def test_callback_of_one_connect_does_not_wait_for_the_other(serve, db, other, ledger, other_ledger):
    """A commit of another connect does not run it, one of its own does not wait (P14)."""
    log = Log(ledger, other_ledger)

    async def handler(request):
        await insert(db, "a")
        await insert(other, "b")
        on_commit(log("done"), connect=db)
        await commit_db_session(other)
        log.entries.append(("between",))
        await commit_db_session(db)
        return Answer(400)

    await (await serve(handler)).post()

    assert log.entries == [("between",), ("done", ["a"], ["b"])]


async def test_callback_may_be_registered_before_there_is_a_session(serve, db, log):
    """Sessions are lazy: with ``connect`` it waits for the session that is opened later, and for its commit (P1, P14)."""

    async def handler(request):
        on_commit(log("done"), connect=db)
        await insert(db, "a")
        if request.query["by"] == "hand":
            await commit_db_session(db)
            return Answer(400)
        return Answer(int(request.query["by"]))

    service = await serve(handler)
    await service.post("/?by=400")
    refused = list(log.entries)
    await service.post("/?by=201")

    assert refused == []
    assert log.entries == [("done", ["a"])]


async def test_callback_registered_before_a_session_that_never_came_is_dropped(serve, db, log, framework):
    """A request that rolls back drops what waits for a session; background work that commits later does not run it (P14)."""

    async def background():
        await insert(db, "b")
        on_commit(log("background"), connect=db)

    async def handler(request):
        on_commit(log.plain("handler"), connect=db)
        return Answer(400, background=[background])

    await (await serve(handler)).post()
    await until(lambda: ("background", ["b"]) in log.entries)

    assert log.entries == [("background", ["b"])]


async def test_callback_of_a_session_that_did_nothing_is_dropped(serve, db, log):
    """The same for a session that was asked for and had no transaction: a refused request drops what waits for its commit (P14)."""

    async def body():
        await insert(db, "b")
        await (await db_session(db)).commit()
        yield b"done"

    async def handler(request):
        await db_session(db)
        on_commit(log.plain("handler"), connect=db)
        return Answer(400, stream=body())

    await (await serve(handler)).post()

    assert log.entries == []


@pytest.mark.parametrize("asked", [False, True])
async def test_callback_waits_for_a_session_that_only_the_body_uses(serve, db, log, asked):
    """A handler that commits nothing and answers well: the next commit of that session is the one of the body (P5, P14)."""

    async def body():
        yield b"first"
        await insert(db, "b")
        yield b"last"

    async def handler(request):
        if asked:
            await db_session(db)
        on_commit(log("done"), connect=db)
        return Answer(200, stream=body())

    await (await serve(handler)).get()

    assert log.entries == [("done", ["b"])]


@pytest.mark.parametrize("how", ["rollback_db_session", "session.rollback", "close_db_session", "session.close"])
async def test_callback_of_a_connect_is_dropped_by_a_rollback_by_hand(serve, db, log, how):
    """A rollback by hand drops it, whatever is committed afterwards (P14)."""

    async def handler(request):
        await insert(db, "a")
        on_commit(log.plain("dropped"), connect=db)
        if how == "rollback_db_session":
            await rollback_db_session(db)
        elif how == "close_db_session":
            await close_db_session(db)
        else:
            await getattr(await db_session(db), how.removeprefix("session."))()
        await insert(db, "b")
        on_commit(log("done"), connect=db)
        return Answer(201)

    await (await serve(handler)).post()

    assert log.entries == [("done", ["b"])]


async def test_callback_is_dropped_with_its_savepoint(serve, db, log):
    """Registered inside a savepoint that is rolled back: dropped; those outside it and in a good one run (P14)."""

    async def handler(request):
        session = await db_session(db)
        await insert(db, "a")
        on_commit(log("before"), connect=db)
        try:
            async with session.begin_nested():
                on_commit(log.plain("dropped"), connect=db)
                await insert(db, "b")
                raise Boom
        except Boom:
            on_commit(log("after"), connect=db)
        async with session.begin_nested():
            on_commit(log("inside"), connect=db)
            await insert(db, "c")
        return Answer(201)

    await (await serve(handler)).post()

    assert log.entries == [(name, ["a", "c"]) for name in ("before", "after", "inside")]


async def test_callback_is_dropped_with_the_savepoint_around_its_own(serve, db, log):
    """Its own savepoint was released, the one around it rolled back: its write is gone, and so is the callback (P14)."""

    async def handler(request):
        session = await db_session(db)
        try:
            async with session.begin_nested():
                async with session.begin_nested():
                    await insert(db, "a")
                    on_commit(log.plain("dropped"), connect=db)
                raise Boom
        except Boom:
            await insert(db, "b")
        return Answer(201)

    await (await serve(handler)).post()

    assert log.entries == []


async def test_callback_is_dropped_with_a_savepoint_whose_flush_fails(serve, db, log):
    """A savepoint that a failing flush takes down drops it too; one that was registered before it stays (P14)."""

    async def handler(request):
        session = await db_session(db)
        await insert(db, "a")
        on_commit(log("kept"), connect=db)
        try:
            async with session.begin_nested():
                on_commit(log.plain("dropped"), connect=db)
                await insert(db, "a")
        except IntegrityError:
            pass
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert log.entries == [("kept", ["a"])]


async def test_release_of_a_savepoint_runs_nothing(serve, db, log):
    """The end of a savepoint is no commit (P14)."""

    async def handler(request):
        session = await db_session(db)
        async with session.begin_nested():
            await insert(db, "a")
            on_commit(log("done"), connect=db)
        log.entries.append(("between",))
        return Answer(201)

    await (await serve(handler)).post()

    assert log.entries == [("between",), ("done", ["a"])]


# Errors in callbacks, and sessions in them


@pytest.mark.parametrize("with_connect", [False, True], ids=["unit", "connect"])
async def test_error_in_a_callback_changes_nothing_else(serve, db, ledger, log, caplog, with_connect):
    """It is logged with its traceback; the response and the other callbacks are as they would be without it (P14)."""

    def fail():
        raise Boom("in the callback")

    async def fail_too():
        raise Boom("in the async callback")

    async def handler(request):
        await insert(db, "a")
        for callback in (log.plain("first"), fail, fail_too, log.plain("last")):
            on_commit(callback, connect=db if with_connect else None)
        return Answer(201, "created")

    answer = await (await serve(handler)).post()

    assert (answer.status, answer.text) == (201, "created")
    assert [name for name, *_ in log.entries] == ["first", "last"]
    assert await ledger.names() == ["a"]
    assert [str(record.exc_info[1]) for record in _errors(caplog)] == ["in the callback", "in the async callback"]
    assert all(record.exc_info[2] is not None for record in _errors(caplog))


async def test_error_in_a_callback_does_not_reach_a_commit_by_hand(serve, db, ledger, caplog):
    """A commit by hand returns well although its callback fails, and the handler goes on (P14)."""

    async def fail():
        raise Boom

    async def handler(request):
        await insert(db, "a")
        on_commit(fail, connect=db)
        await commit_db_session(db)
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["a", "b"]
    assert len(_errors(caplog)) == 1


async def test_session_in_a_callback_is_a_unit_of_its_own(serve, db, ledger, log, caplog):
    """Each callback that asks for a session has one of its own, committed at its end or rolled back on its error (P14)."""
    sessions = []

    async def write(name, fails=False):
        sessions.append(await db_session(db))
        await insert(db, name)
        on_commit(log(f"after {name}"))
        if fails:
            raise Boom

    async def handler(request):
        sessions.append(await db_session(db))
        await insert(db, "a")
        on_commit(lambda: write("b"))
        on_commit(lambda: write("c", fails=True))
        on_commit(lambda: write("d"))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert len({id(session) for session in sessions}) == 4
    assert await ledger.names() == ["a", "b", "d"]
    assert log.entries == [("after b", ["a", "b"]), ("after d", ["a", "b", "d"])]
    assert len(_errors(caplog)) == 1


async def test_commit_that_fails_in_a_callback_is_logged(serve, db, ledger, caplog):
    """A callback whose own unit cannot commit changes nothing of the request (P14)."""

    async def handler(request):
        await insert(db, "a")
        on_commit(lambda: insert_orphan(db))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["a"]
    assert await ledger.count("children") == 0
    assert [type(record.exc_info[1]) for record in _errors(caplog)] == [IntegrityError]


async def test_handler_that_commits_in_a_callback_gets_its_connection(serve, connect, ledger):
    """With one connection only: the request's is back before its callback runs, so that the callback can have it (P14)."""
    db = await connect("one", engine_options={"pool_size": 1})

    async def handler(request):
        await insert(db, "a")
        on_commit(lambda: insert(db, "b"))
        on_commit(lambda: insert(db, "c"), connect=db)
        if request.query["by"] == "hand":
            await commit_db_session(db)
        return Answer(201)

    service = await serve(handler)
    first = await service.post("/?by=unit")
    await ledger.execute("DELETE FROM items")
    second = await service.post("/?by=hand")

    assert (first.status, second.status) == (201, 201)
    assert await ledger.names() == ["a", "b", "c"]


# before_commit


@pytest.mark.parametrize("where", ["policy", "connect"])
async def test_before_commit_can_refuse(serve, db, ledger, where):
    """It is awaited with the session before its commit, and refuses it by raising: a 5xx and no row (P14)."""
    asked = []

    async def refuse(session):
        asked.append((session.in_transaction(), await ledger.names()))
        raise Boom

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    if where == "connect":
        db.before_commit.append(refuse)
    answer = await (await serve(handler, before_commit=refuse if where == "policy" else None)).post()

    assert answer.status == 500
    assert asked == [(True, [])]
    assert await ledger.names() == []


@pytest.mark.parametrize("where", ["policy", "connect"])
@pytest.mark.parametrize("how", ["commit_db_session", "session.commit", "commit_all_sessions", "atomic_db_session"])
async def test_before_commit_can_refuse_a_commit_by_hand(serve, db, ledger, where, how):
    """Commits by hand are asked about as well, once each; the handler gets the error (P14)."""
    asked = []

    async def refuse(session):
        asked.append(session)
        if len(asked) == 1:
            raise Boom

    async def commit():
        if how == "commit_db_session":
            await commit_db_session(db)
        elif how == "session.commit":
            try:
                await (await db_session(db)).commit()
            except Boom:
                await rollback_db_session(db)
                raise
        elif how == "commit_all_sessions":
            await commit_all_sessions()
        else:
            async with atomic_db_session(db, "append"):
                pass

    async def handler(request):
        await insert(db, "a")
        try:
            await commit()
        except Boom:
            await insert(db, "b")
            return Answer(201, "refused")
        return Answer(201)

    if where == "connect":
        db.before_commit.append(refuse)
    answer = await (await serve(handler, before_commit=refuse if where == "policy" else None)).post()

    assert (answer.status, answer.text) == (201, "refused")
    assert len(asked) == 2
    assert await ledger.names() == ["b"]


async def test_before_commit_is_asked_for_each_session_before_any_commits(serve, db, other, ledger, other_ledger):
    """Two databases: the second one's refusal keeps the first from committing (P9, P14)."""
    asked = []

    async def note(session):
        asked.append("db")

    async def refuse(session):
        asked.append("other")
        raise Boom

    async def handler(request):
        await insert(db, "a")
        await insert(other, "b")
        return Answer(201)

    db.before_commit.append(note)
    other.before_commit.append(refuse)
    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert asked == ["db", "other"]
    assert (await ledger.names(), await other_ledger.names()) == ([], [])


async def test_before_commit_is_asked_by_several_parties(serve, db, ledger):
    """The policy's and all of the connect's list are asked, in order; each may refuse (P14)."""
    asked = []

    def party(name):
        async def ask(session):
            asked.append(name)

        return ask

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    db.before_commit.extend([party("one"), party("two")])
    await (await serve(handler, before_commit=party("policy"))).post()

    assert sorted(asked) == ["one", "policy", "two"]
    assert asked.index("one") < asked.index("two")


async def test_before_commit_is_not_asked_where_nothing_commits(serve, db):
    """Neither before a rollback nor for a session without a transaction (P14)."""
    asked = []

    async def ask(session):
        asked.append(session)

    async def handler(request):
        await db_session(db)
        if request.method == "POST":
            await insert(db, "a")
            return Answer(400)
        return Answer(200)

    db.before_commit.append(ask)
    service = await serve(handler, before_commit=ask)
    await service.get()
    await service.post()

    assert asked == []


async def test_what_before_commit_writes_is_committed(serve, db, ledger):
    """A hook that adds a row, such as an audit trail, has it in the same transaction (P14)."""

    async def audit(session):
        await session.execute(text("INSERT INTO items (name) VALUES ('audit')"))
        await add(db, "added")

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    db.before_commit.append(audit)
    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["a", "added", "audit"]


async def test_before_commit_of_the_body_and_of_background_work(serve, db, framework):
    """Each commit of a request is asked about: handler, body, background work (P5, P6, P14)."""
    asked = []

    async def ask(session):
        rows = await session.execute(text("SELECT name FROM items ORDER BY name"))
        asked.append([name for (name,) in rows])

    async def body():
        yield b"first"
        await insert(db, "b")
        yield b"last"

    async def background():
        await insert(db, "c")

    async def handler(request):
        await insert(db, "a")
        return Answer(201, stream=body(), background=[background])

    db.before_commit.append(ask)
    await (await serve(handler)).post()
    await until(lambda: len(asked) == 3)

    second = [["a", "b"], ["a", "c"]] if Feature.BACKGROUND_AFTER_STREAM in framework.lacks else [["a", "b"]]
    assert (asked[0], asked[2]) == (["a"], ["a", "b", "c"])
    assert asked[1] in second


@pytest.mark.parametrize("kind", ["block", "call"])
async def test_hooks_of_a_connect_work_in_every_kind_of_unit(serve, db, ledger, kind):
    """``before_commit`` and ``committed`` of a connect are effective in ``db_context`` and ``run_in_new_ctx`` too (P14)."""
    log = Log(ledger)

    async def before(session):
        await log("before")()

    async def committed(session, host):
        await log("committed")()

    async def handler(request):
        if kind == "block":
            async with db_context():
                await insert(db, "a")
        else:
            await run_in_new_ctx(insert, db, "a")
        return Answer(400)

    db.before_commit.append(before)
    db.committed.append(committed)
    await (await serve(handler)).post()

    assert log.entries == [("before", []), ("committed", ["a"])]


# committed


@pytest.mark.wire
async def test_committed_is_awaited_before_the_head(serve, db, ledger):
    """The hook gets session and host after the COMMIT, and the head waits for it (P14)."""
    reached, go_on = asyncio.Event(), asyncio.Event()
    seen = []

    async def committed(session, host):
        seen.append((session, host, await ledger.names()))
        reached.set()
        await asyncio.wait_for(go_on.wait(), 10)

    sessions = []

    async def write(request):
        sessions.append(await db_session(db))
        await insert(db, "a")
        return Answer(201)

    async def ping(request):
        return Answer(200)

    db.committed.append(committed)
    service = await serve(Route("/", write), Route("/ping", ping))
    async with service.connect() as connection:
        await connection.send("POST", "/")
        head = asyncio.create_task(connection.head())
        await asyncio.wait_for(reached.wait(), 10)
        await service.get("/ping")
        early = head.done()
        go_on.set()
        status = (await head).status
        await connection.rest()

    assert not early
    assert status == 201
    assert seen == [(sessions[0], db.host, ["a"])]


async def test_committed_tells_of_commits_by_hand(serve, db, ledger):
    """Every commit of a session is told, by whatever hand, and no rollback (P14)."""
    log = Log(ledger)

    async def committed(session, host):
        await log("committed")()

    async def handler(request):
        await insert(db, "a")
        await commit_db_session(db)
        await insert(db, "b")
        await (await db_session(db)).commit()
        async with atomic_db_session(db):
            await insert(db, "c")
        await insert(db, "d")
        await rollback_db_session(db)
        return Answer(201)

    db.committed.append(committed)
    await (await serve(handler)).post()

    assert log.entries == [("committed", ["a"]), ("committed", ["a", "b"]), ("committed", ["a", "b", "c"])]


async def test_error_in_committed_is_logged(serve, db, ledger, log, caplog):
    """It changes neither the response nor what else runs after the commit (P14)."""

    async def fail(session, host):
        raise Boom("in the hook")

    async def note(session, host):
        log.entries.append(("second hook",))

    async def handler(request):
        await insert(db, "a")
        on_commit(log.plain("callback"))
        return Answer(201)

    db.committed.extend([fail, note])
    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert log.entries == [("second hook",), ("callback",)]
    assert [str(record.exc_info[1]) for record in _errors(caplog)] == ["in the hook"]
    assert await ledger.names() == ["a"]


async def test_committed_may_use_the_session(serve, db, ledger, bench):
    """A hook may ask the database over the session, for example for its position; it leaves nothing open (P14)."""
    seen = []

    async def committed(session, host):
        seen.append(await session.scalar(text("SELECT count(*) FROM items")))

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    db.committed.append(committed)
    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert seen == [1]
    assert bench.databases.checked_out() == 0


async def test_callbacks_of_sync_handlers(serve, db, log):
    """``on_commit`` is a plain function: a sync handler can call it, and it runs before the head (P14)."""

    def handler(request):
        on_commit(log.plain("unit"))
        on_commit(log.plain("connect"), connect=db)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert log.entries == [("unit",)]
