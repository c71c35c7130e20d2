"""P11: db_context() is a unit anywhere; a websocket is none, whatever context it was started in."""

import asyncio

import pytest
from context_sqla import (
    ContextNotInitiatedError,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_context,
    db_session,
    is_context_initiated,
    rollback_db_session,
)
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from support.deadline import until
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Feature, Route, SocketGone, SocketRoute

UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


class Broken(Exception):
    """An error of the application."""


class Ask:
    """Ask for a session, and remember what came of it."""

    def __init__(self, db):
        self.db = db
        self.seen = []
        self.done = asyncio.Event()

    async def __call__(self):
        try:
            self.seen.append(await db_session(self.db))
        except Exception as exc:
            self.seen.append(exc)
        self.seen.append(is_context_initiated())
        self.done.set()

    @property
    def refused(self):
        """Whether every question got the error that says db_context(), and no unit was there."""
        errors, units = self.seen[::2], self.seen[1::2]
        return (
            bool(errors)
            and all(type(one) is ContextNotInitiatedError and "db_context()" in str(one) for one in errors)
            and not any(units)
        )


# Scripts, workers, schedulers


async def test_script_commits_at_the_end_of_its_block(db, ledger):
    """A db_context() in a script is a unit: lazy, one session, committed at its end (P11)."""
    async with db_context():
        session = await db_session(db)
        same = await db_session(db) is session
        await add(db, "a")
        before = await ledger.names()
    after = await ledger.names()

    assert same
    assert (before, after) == ([], ["a"])
    assert not is_context_initiated()


async def test_error_rolls_the_block_back_and_passes_unchanged(db, bench, ledger):
    """An error in a db_context() rolls back and is raised as the object that it is (P11)."""
    broken = Broken()

    with pytest.raises(Broken) as caught:
        async with db_context():
            await insert(db, "a")
            raise broken

    assert caught.value is broken
    assert bench.databases.checked_out() == 0
    assert await ledger.names() == []
    assert not is_context_initiated()


async def test_cancelled_block_rolls_back(db, bench, ledger):
    """A db_context() whose task is cancelled rolls back (P11)."""
    written = asyncio.Event()

    async def work():
        async with db_context():
            await insert(db, "a")
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await written.wait()
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    assert bench.databases.checked_out() == 0
    assert await ledger.names() == []


async def test_failed_commit_is_raised_by_the_block(db, other, bench, ledger):
    """A commit that fails at the end of a db_context() is raised there, and everything is rolled back (P11)."""
    with pytest.raises(IntegrityError):
        async with db_context():
            await insert(db, "a")
            await insert_orphan(db)

    assert bench.databases.checked_out() == 0
    assert await ledger.names() == []
    assert await ledger.names("children") == []


async def test_block_left_early_commits(db, ledger):
    """Leaving a db_context() by return or break is no error: it commits (P11)."""

    async def work():
        for name in ("a", "b"):
            async with db_context():
                await insert(db, name)
                if name == "b":
                    break
        async with db_context():
            await insert(db, "c")
            return

    await work()

    assert await ledger.names() == ["a", "b", "c"]


async def test_block_without_a_session_opens_nothing(db, bench):
    """A db_context() in which nobody asks opens nothing (P11, P1)."""
    async with db_context():
        pass

    assert bench.databases.engines == []


async def _atomic(db):
    async with atomic_db_session(db):
        pass


@pytest.mark.parametrize(
    "ask",
    [db_session, commit_db_session, rollback_db_session, close_db_session, _atomic],
    ids=["session", "commit", "rollback", "close", "atomic"],
)
async def test_outside_every_unit_the_error_says_db_context(db, bench, ask):
    """Whatever asks for a session outside every unit gets an error that names the connect and says db_context() (P11)."""
    with pytest.raises(ContextNotInitiatedError) as caught:
        await ask(db)

    assert "db_context()" in str(caught.value)
    assert repr(db) in str(caught.value)
    assert bench.databases.engines == []


async def test_after_the_block_there_is_no_unit(db):
    """After a db_context() asking is an error again (P11)."""
    async with db_context():
        await db_session(db)
    with pytest.raises(ContextNotInitiatedError):
        await db_session(db)

    assert not is_context_initiated()


async def test_workers_side_by_side_have_a_unit_each(db, bench, ledger):
    """Tasks that each open a db_context() have a session, a connection and an end of their own (P11)."""
    together = asyncio.Barrier(3)
    sessions = []
    held = []

    async def work(name):
        async with db_context():
            sessions.append(await db_session(db))
            await db_session(db)
            await (await db_session(db)).execute(text("SELECT 1"))
            await together.wait()
            held.append(bench.databases.checked_out())
            await together.wait()
        async with db_context():
            await insert(db, name)
            if name == "bad":
                raise Broken

    outcomes = await asyncio.gather(*(work(name) for name in ("one", "two", "bad")), return_exceptions=True)

    assert [type(one) for one in outcomes] == [type(None), type(None), Broken]
    assert len(set(sessions)) == 3
    assert held == [3, 3, 3]
    assert await ledger.names() == ["one", "two"]


# A block inside a unit


async def test_block_inside_a_block_is_a_unit_of_its_own(db, bench, ledger):
    """A db_context() inside another has its own session and connection, and commits by itself (P11)."""
    async with db_context():
        outer = await db_session(db)
        await outer.execute(text("SELECT 1"))
        async with db_context():
            inner = await db_session(db)
            await insert(db, "inner")
            held = bench.databases.checked_out()
        between = await ledger.names()
        again = await db_session(db)

    assert inner is not outer
    assert again is outer
    assert (held, between) == (2, ["inner"])


@pytest.mark.postgresql
async def test_block_inside_a_request_has_its_own_connection(serve, db, bench, ledger):
    """A db_context() in a handler works on another connection, and the request's session is there again after it (P11)."""
    sessions, pids = [], []

    async def look():
        sessions.append(await db_session(db))
        pids.append(await sessions[-1].scalar(text("SELECT pg_backend_pid()")))

    async def handler(request):
        await look()
        async with db_context():
            await look()
        await look()
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert sessions[0] is sessions[2]
    assert sessions[0] is not sessions[1]
    assert pids[0] == pids[2]
    assert pids[0] != pids[1]


async def test_block_inside_a_request_commits_although_that_rolls_back(serve, db, ledger):
    """What a db_context() in a handler wrote is committed at its end, and stays when the request fails (P11)."""
    seen = []

    async def handler(request):
        async with db_context():
            await insert(db, "block")
        seen.append(await ledger.names())
        await insert(db, "request")
        raise Broken

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert seen == [["block"]]
    assert await ledger.names() == ["block"]


async def test_block_inside_a_request_rolls_back_although_that_commits(serve, db, ledger):
    """A db_context() in a handler that fails is rolled back alone (P11)."""

    async def handler(request):
        try:
            async with db_context():
                await insert(db, "block")
                raise Broken
        except Broken:
            await insert(db, "request")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["request"]


@pytest.mark.postgresql
async def test_block_inside_a_request_does_not_see_what_that_has_not_committed(serve, db, ledger):
    """A db_context() in a handler is another transaction: it sees nothing of the request's, and the other way round (P11)."""
    seen = []

    async def names():
        session = await db_session(db)
        return (await session.scalars(text("SELECT name FROM items ORDER BY name"))).all()

    async def handler(request):
        await insert(db, "request")
        async with db_context():
            seen.append(await names())
            await insert(db, "block")
        seen.append(await names())
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert seen == [[], ["block", "request"]]
    assert await ledger.names() == ["block", "request"]


# Startup and shutdown


async def test_lifespan_is_no_unit(serve, db):
    """Hooks at startup and shutdown are in no unit: asking is an error that says db_context() (P11)."""
    ask = Ask(db)

    async def handler(request):
        return Answer(200)

    service = await serve(handler, on_startup=[ask], on_shutdown=[ask])
    await service.get()
    await service.stop()

    assert ask.refused
    assert len(ask.seen) == 4


async def test_block_works_at_startup_and_shutdown(serve, db, ledger):
    """A db_context() in the hooks at startup and at shutdown commits (P11)."""

    async def begin():
        async with db_context():
            await insert(db, "begin")

    async def end():
        async with db_context():
            await insert(db, "end")

    async def handler(request):
        return Answer(200, ",".join(await ledger.names()))

    service = await serve(handler, on_startup=[begin], on_shutdown=[end])
    answer = await service.get()
    await service.stop()

    assert answer.text == "begin"
    assert await ledger.names() == ["begin", "end"]


async def test_worker_of_the_application_has_no_unit_of_a_request(serve, db, ledger):
    """A worker that runs beside the requests, and is fed by them, opens its own units (P11)."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    ask = Ask(db)
    workers = []

    async def work():
        await ask()
        while name := await queue.get():
            async with db_context():
                await insert(db, f"worker {name}")

    async def begin():
        workers.append(asyncio.create_task(work()))

    async def handler(request):
        await insert(db, "request")
        queue.put_nowait("job")
        return Answer(409)

    service = await serve(handler, on_startup=[begin])
    answer = await service.post()
    queue.put_nowait("")
    await asyncio.gather(*workers)

    assert answer.status == 409
    assert ask.refused
    assert await ledger.names() == ["worker job"]


# Websockets


@pytest.mark.wire
async def test_websocket_is_no_unit(serve, db, bench, framework):
    """Asking for a session on a websocket, before its handshake and after it, is an error that says db_context() (P11)."""
    ask = Ask(db)

    async def talk(socket):
        if Feature.HANDSHAKE not in framework.lacks:
            await ask()
        await socket.accept()
        await ask()
        await socket.send("asked")

    service = await serve(SocketRoute("/ws", talk))
    async with service.websocket("/ws") as socket:
        heard = await socket.recv()

    assert heard == "asked"
    assert ask.refused
    assert len(ask.seen) == (2 if Feature.HANDSHAKE in framework.lacks else 4)
    assert bench.databases.engines == []


@pytest.mark.wire
async def test_message_in_a_block_is_a_unit(serve, connect, bench, ledger):
    """Each message in its own db_context() is committed before its answer; between messages nothing is held (P11)."""
    db = await connect("db", engine_options={"pool_size": 1})
    sessions = []

    async def talk(socket):
        await socket.accept()
        for _ in range(3):
            name = await socket.receive()
            async with db_context():
                sessions.append(await db_session(db))
                await insert(db, name)
            await socket.send(f"{bench.databases.checked_out()} {is_context_initiated()}")

    async def write(request):
        await insert(db, f"request {request.query['name']}")
        return Answer(201)

    service = await serve(SocketRoute("/ws", talk), Route("/", write))
    heard, counts, statuses = [], [], []
    async with service.websocket("/ws") as socket:
        for number in range(3):
            await socket.send(str(number))
            heard.append(await socket.recv())
            counts.append(await ledger.count())
            statuses.append((await service.post(f"/?name={number}")).status)

    assert heard == ["0 False"] * 3
    assert counts == [1, 3, 5]
    assert statuses == [201] * 3
    assert len(set(sessions)) == 3


async def test_message_that_fails_leaves_the_others_alone(serve, db, ledger):
    """A db_context() that fails for one message rolls back that one; the socket goes on (P11)."""

    async def talk(socket):
        await socket.accept()
        for _ in range(3):
            name = await socket.receive()
            try:
                async with db_context():
                    await insert(db, name)
                    if name == "bad":
                        raise Broken
                await socket.send("done")
            except Broken:
                await socket.send("failed")

    service = await serve(SocketRoute("/ws", talk))
    heard = []
    async with service.websocket("/ws") as socket:
        for name in ("first", "bad", "last"):
            await socket.send(name)
            heard.append(await socket.recv())

    assert heard == ["done", "failed", "done"]
    assert await ledger.names() == ["first", "last"]


@pytest.mark.wire
async def test_client_that_leaves_within_a_block_rolls_it_back(serve, db, bench, ledger, framework):
    """A db_context() that waits for a message of a client that has left is rolled back by the error (P11)."""
    gone = asyncio.Event()

    async def talk(socket):
        await socket.accept()
        try:
            async with db_context():
                await insert(db, await socket.receive())
                await socket.send("go on")
                await socket.receive()
        except (SocketGone, asyncio.CancelledError) if Feature.HANDLER_RUNS_ON in framework.lacks else SocketGone:
            gone.set()

    service = await serve(SocketRoute("/ws", talk))
    async with service.websocket("/ws") as socket:
        await socket.send("a")
        await socket.recv()
    await asyncio.wait_for(gone.wait(), 10)
    await until(lambda: bench.databases.checked_out() == 0)

    assert await ledger.names() == []


async def test_child_task_of_a_websocket_has_no_unit(serve, db, ledger):
    """A task that a websocket handler starts has no unit either, until it opens one (P11)."""
    ask = Ask(db)

    async def work():
        await ask()
        async with db_context():
            await insert(db, "task")

    async def talk(socket):
        await socket.accept()
        await asyncio.create_task(work())
        await socket.send("done")

    service = await serve(SocketRoute("/ws", talk))
    async with service.websocket("/ws") as socket:
        heard = await socket.recv()

    assert heard == "done"
    assert ask.refused
    assert await ledger.names() == ["task"]


@pytest.mark.wire
async def test_server_started_in_a_block_hides_it_from_websockets(serve, db, bench, ledger, framework):
    """A server that was started inside an open db_context() hides that from its websockets and from its lifespan (P11)."""
    startup, socket_asks = Ask(db), Ask(db)

    async def talk(socket):
        if Feature.HANDSHAKE not in framework.lacks:
            await socket_asks()
        await socket.accept()
        async with db_context():
            await insert(db, "message")
        await socket_asks()
        await socket.send("asked")

    async with db_context():
        outer = await db_session(db)
        await outer.execute(text("SELECT 1"))
        service = await serve(SocketRoute("/ws", talk), on_startup=[startup])
        async with service.websocket("/ws") as socket:
            heard = await socket.recv()
        names = await ledger.names()
        same = await db_session(db) is outer

    assert heard == "asked"
    assert startup.refused == (Feature.HIDDEN_HOOKS not in framework.lacks)
    assert socket_asks.refused
    assert names == ["message"]
    assert same


@pytest.mark.wire
async def test_server_started_in_a_block_gives_requests_their_own_unit(serve, db, ledger):
    """A request to a server that was started inside a db_context() commits by itself, whatever becomes of that block (P11, P12)."""
    sessions = []

    async def handler(request):
        sessions.append(await db_session(db))
        await insert(db, request.query["status"])
        return Answer(int(request.query["status"]))

    with pytest.raises(Broken):
        async with db_context():
            sessions.append(await db_session(db))
            service = await serve(handler)
            answers = [await service.post(f"/?status={status}") for status in (201, 409, 202)]
            names = await ledger.names()
            raise Broken

    assert [answer.status for answer in answers] == [201, 409, 202]
    assert len(set(sessions)) == 4
    assert names == ["201", "202"]
    assert await ledger.names() == ["201", "202"]


@pytest.mark.wire
@pytest.mark.loops("asyncio", "uvloop")
async def test_websocket_after_a_request_on_the_same_connection_is_no_unit(serve, db, ledger, framework):
    """A websocket that is opened on a connection which has served requests inherits none of their units (P11)."""
    ask = Ask(db)

    async def talk(socket):
        if Feature.HANDSHAKE not in framework.lacks:
            await ask()
        await socket.accept()
        await ask()

    async def write(request):
        await insert(db, (await request.body())[:1].decode())
        return Answer(201)

    service = await serve(SocketRoute("/ws", talk), Route("/", write))
    async with service.connect() as connection:
        statuses = [(await connection.request("POST", "/", body=body)).status for body in (b"1" * 400_000, b"2")]
        await connection.send("GET", "/ws", headers=UPGRADE)
        head = await connection.head()
        await until(lambda: len(ask.seen) == (2 if Feature.HANDSHAKE in framework.lacks else 4))
        connection.abort()

    assert statuses == [201, 201]
    assert head.status == 101
    assert ask.refused
    assert await ledger.names() == ["1", "2"]


@pytest.mark.wire
@pytest.mark.parametrize(
    "fields", [["Upgrade"], ["Upgrade", "Sec-WebSocket-Version", "Sec-WebSocket-Key"]], ids=["upgrade", "keys"]
)
async def test_request_that_calls_itself_a_websocket_has_its_unit(serve, db, ledger, fields):
    """A POST with an Upgrade header is a request like any other: it has a unit, which commits or rolls back (P11)."""

    async def handler(request):
        await insert(db, request.query["status"])
        return Answer(int(request.query["status"]), request.headers["upgrade"])

    service = await serve(handler)
    headers = {name: UPGRADE[name] for name in fields}
    answers = [await service.post(f"/?status={status}", headers=headers) for status in (201, 409)]

    assert [(answer.status, answer.text) for answer in answers] == [(201, "websocket"), (409, "websocket")]
    assert await ledger.names() == ["201"]


@pytest.mark.wire
async def test_upgrade_that_nobody_asked_for_loses_no_write(serve, db, ledger):
    """A POST that is a whole websocket handshake is either refused by the server or answered from a unit that commits (P11)."""
    handled = []

    async def handler(request):
        await insert(db, "a")
        handled.append(is_context_initiated())
        return Answer(201)

    answer = await (await serve(handler)).post(headers=UPGRADE)

    assert answer.status == (201 if handled else answer.status)
    assert handled or answer.status >= 400
    assert all(handled)
    assert await ledger.names() == ["a"] * len(handled)


async def test_request_to_a_websockets_path_is_no_websocket(serve, db):
    """A plain request to the path of a websocket does not reach its handler, and the next websocket does (P11)."""
    ask = Ask(db)

    async def talk(socket):
        await socket.accept()
        await ask()
        await socket.send("asked")

    service = await serve(SocketRoute("/ws", talk))
    answer = await service.get("/ws", headers={"Upgrade": "websocket"})
    before = list(ask.seen)
    async with service.websocket("/ws") as socket:
        heard = await socket.recv()

    assert answer.status >= 400
    assert before == []
    assert heard == "asked"
    assert ask.refused
