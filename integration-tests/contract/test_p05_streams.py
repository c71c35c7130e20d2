"""P5: streams commit before their head, hold nothing they do not use, and end well only if their work was committed."""

import asyncio
import contextlib
import gc
import importlib.util
import io
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from context_sqla import (
    CursorClosedError,
    close_db_session,
    commit_db_session,
    db_context,
    db_session,
    keep_transaction,
    on_commit,
)
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from support.deadline import until
from support.proxy import proxy
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Feature, Route
from support.servers import ServerOptions
from support.service import Service
from support.tables import Item
from support.wire import Address, BrokenOff

MIDDLEWARE = pytest.mark.parametrize(
    "middleware",
    [[], [Feature.GZIP], [Feature.BASE_HTTP], [Feature.BASE_HTTP, Feature.GZIP]],
    ids=["bare", "gzip", "base-http", "both"],
)
GZIP = {"accept-encoding": "gzip"}


class Broken(Exception):
    """An error of the application."""


def _there(framework: Any, middleware: list[Feature]) -> list[Feature]:
    """Leave out what the framework does not have; the promise is then shown without."""
    return [one for one in middleware if one not in framework.lacks]


# The head


@pytest.mark.wire
async def test_handlers_work_is_committed_when_the_body_begins(serve, db, bench, ledger):
    """A stream commits before its head, and the request's connection is back in the pool when the generator starts (P5)."""
    seen = []

    async def body():
        seen.append((await ledger.names(), bench.databases.checked_out()))
        yield b"first"

    async def handler(request):
        await insert(db, "a")
        seen.append((await ledger.names(), bench.databases.checked_out()))
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert seen == [([], 1), (["a"], 0)]


@pytest.mark.wire
async def test_write_is_visible_with_the_head_of_a_stream(serve, db, ledger):
    """A client that has the head of a stream can read the handler's write, long before the stream ends (P5)."""
    go_on = asyncio.Event()

    async def body():
        yield b"first"
        await go_on.wait()
        yield b"last"

    async def handler(request):
        await add(db, "a")
        return Answer(200, stream=body())

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("POST", "/")
        head = await connection.head()
        names = await ledger.names()
        go_on.set()
        rest = await connection.rest()

    assert (head.status, names, rest) == (200, ["a"], b"firstlast")


async def test_head_request_of_a_stream_commits(serve, db, ledger):
    """A HEAD request, whose body never leaves, commits what the handler wrote (P5)."""

    async def body():
        yield b"one"
        yield b"two"

    async def handler(request):
        await insert(db, "a")
        return Answer(200, stream=body())

    answer = await (await serve(Route("/", handler, methods=["GET", "HEAD"]))).request("HEAD", "/")

    assert (answer.status, answer.body) == (200, b"")
    assert await ledger.names() == ["a"]


# What the body writes


@pytest.mark.wire
async def test_what_the_body_writes_is_committed_at_its_end(serve, db, bench, ledger):
    """A generator's first statement begins a transaction, which commits at the end of the body (P5)."""
    seen = []

    async def body():
        yield b"first"
        seen.append(bench.databases.checked_out())
        await insert(db, "body")
        seen.append((bench.databases.checked_out(), await ledger.names()))
        yield b"last"

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body())

    service = await serve(handler)
    async with service.connect() as connection:
        answer = await connection.request("POST", "/")
        names = await ledger.names()

    assert (answer.text, answer.complete) == ("firstlast", True)
    assert seen == [0, (1, ["handler"])]
    assert names == ["body", "handler"]


async def test_what_the_body_leaves_to_a_flush_is_committed(serve, db, ledger):
    """Objects that a generator adds and does not flush are written at the end of the body (P5)."""

    async def body():
        await add(db, "first")
        yield b"first"
        await add(db, "last")

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert await ledger.names() == ["first", "last"]


async def test_body_without_a_piece_is_committed(serve, db, ledger):
    """A generator that writes and yields nothing commits before the end of its empty body (P5)."""

    async def body():
        await insert(db, "a")
        for _ in ():
            yield b"never"

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.body, answer.complete) == (b"", True)
    assert await ledger.names() == ["a"]


async def test_session_from_before_the_head_works_in_the_body(serve, db, ledger):
    """A session object that the handler got goes on working in the generator, and is the one that db_session returns (P5)."""
    same = []

    async def body(session):
        same.append(await db_session(db) is session)
        session.add(Item(name="body"))
        yield b"first"
        same.append((await session.scalars(select(Item.name).order_by(Item.name))).all())

    async def handler(request):
        session = await db_session(db)
        session.add(Item(name="handler"))
        return Answer(200, stream=body(session))

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert same == [True, ["body", "handler"]]
    assert await ledger.names() == ["body", "handler"]


async def test_unused_session_from_before_the_head_works_in_the_body(serve, db, ledger):
    """A session that the handler only got, without a statement on it, works in the generator (P5)."""

    async def body(session):
        session.add(Item(name="body"))
        await session.flush()
        yield b"first"

    async def handler(request):
        return Answer(200, stream=body(await db_session(db)))

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert await ledger.names() == ["body"]


async def test_body_after_a_closed_session_gets_a_new_one(serve, db, bench, ledger):
    """After close_db_session in the handler the generator gets a new session, whose work is committed (P5)."""
    seen = []

    async def body(before):
        seen.append(await db_session(db) is before)
        await insert(db, "body")
        yield b"first"

    async def handler(request):
        session = await db_session(db)
        await insert(db, "handler")
        await commit_db_session(db)
        await close_db_session(db)
        seen.append(bench.databases.checked_out())
        return Answer(200, stream=body(session))

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert seen == [0, False]
    assert await ledger.names() == ["body", "handler"]


async def test_session_closed_within_the_body_loses_what_was_not_committed(serve, db, ledger):
    """close_db_session in a generator drops what was not committed, and the body goes on with a new session (P5)."""

    async def body():
        await insert(db, "dropped")
        await close_db_session(db)
        yield b"first"
        await insert(db, "kept")

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert await ledger.names() == ["kept"]


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "asked"])
async def test_status_from_400_rolls_the_body_back(serve, db, ledger, captured):
    """Under a status of 400 or more neither the handler's nor the body's writes are committed, whichever session did it (P5)."""

    async def body(session):
        session = session if captured else await db_session(db)
        session.add(Item(name="body"))
        await session.flush()
        yield b"first"
        session.add(Item(name="pending"))

    async def handler(request):
        await insert(db, "handler")
        return Answer(422, stream=body(await db_session(db)))

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text, answer.complete) == (422, "first", True)
    assert await ledger.names() == []


async def test_commit_by_hand_in_the_body_stays(serve, db, ledger):
    """What a generator committed by hand stays when it fails later; the rest is rolled back (P5)."""

    async def body():
        await insert(db, "committed")
        await commit_db_session(db)
        yield b"first"
        await insert(db, "lost")
        raise Broken

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", False)
    assert await ledger.names() == ["committed"]


# The end


@pytest.mark.wire
@pytest.mark.postgresql
async def test_stream_does_not_end_while_its_commit_is_on_its_way(serve, connect, database):
    """As long as the body's COMMIT is not answered, the client does not see the end of the stream (P5)."""

    async def body():
        yield b"first"
        await insert(db, "a")

    async def stream(request):
        return Answer(200, stream=body())

    async def ping(request):
        return Answer(200)

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        service = await serve(Route("/", stream), Route("/ping", ping))
        async with service.connect() as connection:
            commit = network.hold_at(b"COMMIT", forward=True)
            await connection.send("GET", "/")
            await connection.head()
            rest = asyncio.create_task(connection.rest())
            await asyncio.wait_for(commit.sprung.wait(), 10)
            # The server is alive and the kernel quick: an end that was sent would be here by now.
            await service.get("/ping")
            early = rest.done()
            commit.release()
            seen = await rest
        await service.stop()

    assert not early
    assert seen == b"first"


@pytest.mark.wire
@pytest.mark.postgresql
async def test_piece_that_completes_the_length_waits_for_the_commit(serve, connect, database):
    """The piece that completes a Content-Length is the last: it waits for the answer to COMMIT (P5)."""

    async def body():
        yield b"first"
        await insert(db, "a")
        yield b"last"

    async def stream(request):
        return Answer(200, stream=body(), content_length=9)

    async def ping(request):
        return Answer(200)

    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = await connect("db", host=network.host)
        service = await serve(Route("/", stream), Route("/ping", ping))
        async with service.connect() as connection:
            commit = network.hold_at(b"COMMIT", forward=True)
            await connection.send("GET", "/")
            await connection.head()
            first = await connection.chunk()
            last = asyncio.create_task(connection.chunk())
            await asyncio.wait_for(commit.sprung.wait(), 10)
            await service.get("/ping")
            early = last.done()
            commit.release()
            seen = await last
        await service.stop()

    assert first == b"first"
    assert not early
    assert seen == b"last"


@pytest.mark.wire
async def test_client_that_leaves_with_the_last_piece_has_its_commit(serve, db, ledger):
    """A client that has all bytes and leaves at once finds the body's writes committed, twenty times of twenty (P5)."""

    async def body(name):
        yield b"first"
        await insert(db, name)
        yield b"last"

    async def handler(request):
        return Answer(200, stream=body(request.query["name"]))

    service = await serve(handler)
    for number in range(20):
        async with service.connect() as connection:
            await connection.send("GET", f"/?name={number:02}")
            await connection.head()
            await connection.rest()
            connection.abort()

    assert await ledger.names() == [f"{number:02}" for number in range(20)]


@pytest.mark.wire
async def test_client_that_leaves_after_the_declared_length_has_its_commit(serve, db, ledger, framework):
    """Once the declared length is out the body is committed, although its generator has not ended when the client leaves (P5)."""
    ended = asyncio.Event()

    async def body(request):
        try:
            await insert(db, "a")
            yield b"all"
            async for piece in _until_the_client_has_left(request, framework):
                yield piece
        finally:
            ended.set()

    async def handler(request):
        return Answer(200, stream=body(request), content_length=3)

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        rest = await connection.rest()
        names = await ledger.names()
        connection.abort()
    await asyncio.wait_for(ended.wait(), 10)

    assert (rest, names) == (b"all", ["a"])
    assert await ledger.names() == ["a"]


@pytest.mark.wire
async def test_failed_commit_breaks_the_stream_off(serve, db, ledger):
    """When the final commit fails the client never sees the end of the stream, and nothing is written (P5)."""

    async def body():
        await insert(db, "body")
        yield b"first"
        await insert_orphan(db)

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text) == (200, "first")
    assert not answer.complete
    assert await ledger.names() == ["handler"]
    assert await ledger.names("children") == []


@pytest.mark.wire
async def test_failed_commit_withholds_the_piece_that_completes_the_length(serve, db, ledger):
    """When the final commit fails the piece that would complete a Content-Length does not leave (P5)."""

    async def body():
        yield b"first"
        await insert_orphan(db)
        yield b"last"

    async def handler(request):
        return Answer(200, stream=body(), content_length=9)

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text, answer.complete) == (200, "first", False)
    assert await ledger.names("children") == []


async def test_failed_flush_at_the_end_breaks_the_stream_off(serve, db, ledger):
    """A constraint that fails in the flush before the final commit breaks the stream off (P5)."""

    async def body():
        await add(db, "same")
        yield b"first"
        (await db_session(db)).add(Item(name="same"))

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", False)
    assert await ledger.names() == []


@pytest.mark.postgresql
async def test_swallowed_error_in_the_body_breaks_the_stream_off(serve, db, ledger):
    """A body whose statement failed, and which went on as if it had not, is no silent rollback behind a good end (P5, P4a)."""

    async def body():
        await insert(db, "lost")
        with contextlib.suppress(DBAPIError):
            await (await db_session(db)).execute(text("SELECT nothing FROM nowhere"))
        yield b"first"

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", False)
    assert await ledger.names() == []


async def test_all_connects_of_a_body_are_committed_or_none(serve, db, other, ledger, other_ledger):
    """A body that wrote to two databases and cannot flush to the second leaves nothing in the first, and is broken off (P5, P9)."""

    async def body(names):
        await insert(db, names[0])
        yield b"first"
        for name in names:
            await add(other, name)

    async def handler(request):
        return Answer(200, stream=body([request.query["a"], request.query["b"]]))

    service = await serve(handler)
    good = await service.get("/?a=one&b=two")
    bad = await service.get("/?a=same&b=same")

    assert (good.complete, bad.complete) == (True, False)
    assert await ledger.names() == ["one"]
    assert await other_ledger.names() == ["one", "two"]


async def test_before_commit_may_refuse_the_body(serve, db, ledger):
    """before_commit that refuses what the body wrote breaks the stream off (P5)."""

    async def body():
        yield b"first"
        await insert(db, "a")

    async def handler(request):
        return Answer(200, stream=body())

    async def refuse(session):
        raise Broken

    answer = await (await serve(handler, before_commit=refuse)).get()

    assert (answer.text, answer.complete) == ("first", False)
    assert await ledger.names() == []


# A body that fails, a client that leaves


@pytest.mark.wire
async def test_failing_generator_is_broken_off_and_rolled_back(serve, db, ledger):
    """A generator that fails midway is broken off for the client, and what it wrote is rolled back (P5)."""

    async def body():
        yield b"first"
        await insert(db, "body")
        yield b"second"
        raise Broken

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text, answer.complete) == (200, "firstsecond", False)
    assert await ledger.names() == ["handler"]


async def test_failing_stream_of_a_declared_length_is_broken_off(serve, db, ledger):
    """A generator that fails before its declared length is complete is broken off and rolled back (P5)."""

    async def body():
        await insert(db, "body")
        yield b"first"
        raise Broken

    async def handler(request):
        return Answer(200, stream=body(), content_length=9)

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text, answer.complete) == (200, "first", False)
    assert await ledger.names() == []


async def test_statement_that_fails_in_the_body_breaks_it_off(serve, db, ledger):
    """A generator that lets the error of a statement through is broken off and rolled back (P5)."""

    async def body():
        await insert(db, "same")
        yield b"first"
        await insert(db, "same")
        yield b"never"

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", False)
    assert await ledger.names() == []


@MIDDLEWARE
async def test_failing_stream_never_ends_well_behind_middleware(serve, db, ledger, framework, middleware):
    """Also behind the framework's own middleware a failed body is broken off, and nothing of it is committed (P5)."""

    async def body():
        await insert(db, "before")
        yield b"first"
        await insert(db, "after")
        yield b"second"
        raise Broken

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body())

    service = await serve(handler, middleware=_there(framework, middleware))
    answer = await service.get(headers=GZIP)

    assert (answer.status, answer.complete) == (200, False)
    assert await ledger.names() == ["handler"]


@MIDDLEWARE
async def test_failed_commit_never_ends_well_behind_middleware(serve, db, ledger, framework, middleware):
    """Also behind the framework's own middleware a body whose commit failed is broken off (P5)."""

    async def body():
        yield b"first"
        await insert(db, "body")
        await insert_orphan(db)

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body())

    service = await serve(handler, middleware=_there(framework, middleware))
    answer = await service.get(headers=GZIP)

    assert (answer.status, answer.complete) == (200, False)
    assert await ledger.names() == ["handler"]


@MIDDLEWARE
async def test_stream_behind_middleware_commits(serve, db, ledger, framework, middleware):
    """Behind the framework's own middleware handler and body commit as without it, the head's commit first (P5)."""
    seen = []

    async def body():
        await insert(db, "body")
        seen.append(await ledger.names())
        yield b"first"
        yield b"last"

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body())

    service = await serve(handler, middleware=_there(framework, middleware))
    answer = await service.get(headers=GZIP)

    assert (answer.status, answer.complete) == (200, True)
    assert seen == [["handler"]]
    assert await ledger.names() == ["body", "handler"]


@pytest.mark.wire
async def test_client_gone_mid_stream_twenty_times(serve, connect, bench, ledger, framework):
    """Twenty clients that vanish mid-stream leave no row and no connection: the pool of one serves the next request (P5)."""
    db = await connect("db", engine_options={"pool_size": 1})
    ended = []

    async def endless(name, request):
        try:
            yield b"first"
            await insert(db, name)
            yield b"second"
            async for piece in _until_the_client_has_left(request, framework):
                yield piece
        finally:
            ended.append(name)

    async def brief():
        await insert(db, "good")
        yield b"only"

    async def handler(request):
        name = request.query.get("name")
        return Answer(200, stream=endless(name, request) if name else brief())

    service = await serve(handler)
    for number in range(20):
        async with service.connect() as connection:
            await connection.send("GET", f"/?name={number}")
            await connection.head()
            seen = b""
            while b"second" not in seen:
                seen += await connection.chunk() or b""
            connection.abort()
    answer = await service.get()
    await until(lambda: len(ended) == 20)

    assert (answer.text, answer.complete) == ("only", True)
    assert await ledger.names() == ["good"]


@pytest.mark.postgresql
async def test_client_gone_during_a_statement_of_the_body(serve, connect, ledger, bench, framework):
    """A client that vanishes while a statement of the body runs leaves no row, no transaction and no connection (P5)."""
    db = await connect("db", engine_options={"pool_size": 1})

    async def waits(request):
        yield b"first"
        await insert(db, "lost")
        async for piece in _until_the_client_has_left(request, framework):
            yield piece

    async def brief():
        await insert(db, "good")
        yield b"only"

    async def handler(request):
        return Answer(200, stream=waits(request) if request.path == "/waits" else brief())

    service = await serve(Route("/", handler), Route("/waits", handler))
    async with ledger.lock("items"):
        async with service.connect() as connection:
            await connection.send("GET", "/waits")
            await connection.head()
            await connection.chunk()
            await ledger.waiting("db")
            connection.abort()
        if Feature.DISCONNECT not in framework.lacks:
            await until(lambda: bench.databases.checked_out() == 0)
    await until(lambda: bench.databases.checked_out() == 0)
    answer = await service.get()

    assert (answer.text, answer.complete) == ("only", True)
    assert await ledger.names() == ["good"]


@MIDDLEWARE
async def test_client_gone_mid_stream_behind_middleware(serve, db, bench, ledger, framework, middleware):
    """Behind the framework's own middleware an unfinished body is rolled back when its client leaves (P5)."""
    ended = asyncio.Event()

    async def body(request):
        try:
            await insert(db, "body")
            yield b"first"
            async for piece in _until_the_client_has_left(request, framework):
                yield piece
        finally:
            ended.set()

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body(request))

    service = await serve(handler, middleware=_there(framework, middleware))
    async with service.connect() as connection:
        await connection.send("GET", "/", headers=GZIP)
        await connection.head()
        await connection.chunk()
        connection.abort()
    await asyncio.wait_for(ended.wait(), 10)
    await until(lambda: bench.databases.checked_out() == 0)

    assert await ledger.names() == ["handler"]


@pytest.mark.wire
@pytest.mark.parametrize("middleware", [[], [Feature.BASE_HTTP]], ids=["bare", "base-http"])
async def test_body_that_writes_when_its_client_has_left_is_rolled_back(serve, connect, bench, ledger, framework, middleware):
    """What a body writes on its way out, after its client has left, is rolled back; background work follows it (P5, P6)."""
    db = await connect("db", engine_options={"pool_size": 1})
    late = []

    async def work():
        await asyncio.gather(insert(db, "work"))

    async def body(request):
        await insert(db, "body")
        try:
            yield b"first"
            async for piece in _until_the_client_has_left(request, framework):
                yield piece
        finally:
            late.append(await _in_spite_of_cancellation(insert(db, "late")))

    async def handler(request):
        await insert(db, "handler")
        return Answer(200, stream=body(request), background=[work])

    service = await serve(handler, middleware=_there(framework, middleware))
    async with service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        await connection.chunk()
        connection.abort()
    await until(lambda: late and bench.databases.checked_out() == 0)
    if Feature.BACKGROUND not in framework.lacks:
        await until(lambda: _has(ledger, "work"))
    await service.stop()

    committed = {"handler", "late"} if Feature.LATE_BODY in framework.lacks else {"handler"}
    assert set(await ledger.names()) - {"work"} == committed


# Holding nothing


async def test_stream_that_does_not_use_the_database_holds_no_connection(serve, connect, bench, ledger):
    """While a stream runs whose handler wrote and whose body does not, fifty others share the only connection (P5)."""
    db = await connect("db", engine_options={"pool_size": 1})
    ticks: asyncio.Queue[bytes] = asyncio.Queue()
    held = []

    async def events():
        while event := await ticks.get():
            held.append(bench.databases.checked_out())
            yield b"data: " + event + b"\n\n"

    async def stream(request):
        await insert(db, "stream")
        return Answer(200, headers={"content-type": "text/event-stream"}, stream=events())

    async def write(request):
        await insert(db, request.query["name"])
        return Answer(201)

    service = await serve(Route("/events", stream), Route("/", write))
    received, statuses = [], []
    async with service.connect() as connection:
        await connection.send("GET", "/events")
        await connection.head()
        for number in range(50):
            statuses.append((await service.post(f"/?name={number}")).status)
            ticks.put_nowait(str(number).encode())
            received.append(await connection.chunk())
        ticks.put_nowait(b"")
        rest = await connection.rest()

    assert statuses == [201] * 50
    assert received == [f"data: {number}\n\n".encode() for number in range(50)]
    assert (held, rest) == ([0] * 50, b"")
    assert await ledger.count() == 51


@pytest.mark.wire
@pytest.mark.parametrize("how", ["db_context", "commit"])
async def test_events_that_are_committed_one_by_one_hold_nothing_between(serve, connect, bench, ledger, how):
    """Server-sent events, each in its own db_context or committed by hand, share the only connection with other requests (P5)."""
    db = await connect("db", engine_options={"pool_size": 1})
    ticks: asyncio.Queue[str] = asyncio.Queue()
    seen = []

    async def events():
        while name := await ticks.get():
            if how == "db_context":
                async with db_context():
                    await insert(db, name)
            else:
                await insert(db, name)
                await commit_db_session(db)
            seen.append((bench.databases.checked_out(), await ledger.count()))
            yield f"data: {name}\n\n".encode()

    async def stream(request):
        await insert(db, "stream")
        return Answer(200, headers={"content-type": "text/event-stream"}, stream=events())

    async def write(request):
        await insert(db, request.query["name"])
        return Answer(201)

    service = await serve(Route("/events", stream), Route("/", write))
    async with service.connect() as connection:
        await connection.send("GET", "/events")
        await connection.head()
        for number in range(30):
            ticks.put_nowait(f"event {number}")
            await connection.chunk()
            await service.post(f"/?name={number}")
        ticks.put_nowait("")
        rest = await connection.rest()

    assert rest == b""
    assert seen == [(0, 2 + 2 * number) for number in range(30)]
    assert await ledger.count() == 61


# One transaction from the handler to the last piece


async def _fill(ledger: Any) -> list[str]:
    """Write more rows than any driver fetches ahead; return their names in order."""
    await ledger.execute("INSERT INTO items (name) SELECT lpad(number::text, 5, '0') FROM generate_series(1, 5000) AS number")
    return await ledger.names()


@pytest.mark.postgresql
async def test_kept_transaction_serves_a_cursor_to_the_last_row(serve, db, bench, ledger):
    """A server-side cursor that the handler opened is read to its end under keep_transaction (P5)."""
    held = []
    names = await _fill(ledger)

    async def body(result):
        held.append(bench.databases.checked_out())
        async for (name,) in result:
            yield name.encode()

    async def handler(request):
        await keep_transaction(db)
        result = await (await db_session(db)).stream(select(Item.name).order_by(Item.name))
        return Answer(200, stream=body(result))

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("".join(names), True)
    assert held == [1]


@pytest.mark.postgresql
async def test_cursor_of_an_ended_transaction_names_the_remedy(serve, db, ledger):
    """Without keep_transaction such a cursor fails with an error that names it, and the stream is broken off (P5)."""
    errors = []
    await _fill(ledger)

    async def body(result):
        yield b"first"
        try:
            async for (name,) in result:
                yield name.encode()
        except Exception as exc:
            errors.append(exc)
            raise

    async def handler(request):
        result = await (await db_session(db)).stream(select(Item.name).order_by(Item.name))
        return Answer(200, stream=body(result))

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.complete) == (200, False)
    assert [type(one) for one in errors] == [CursorClosedError]
    assert "keep_transaction" in str(errors[0])


@pytest.mark.postgresql
async def test_cursor_that_the_body_opens_needs_nothing(serve, db, ledger):
    """A server-side cursor that the generator opens itself is read to its end (P5)."""
    names = await _fill(ledger)

    async def body():
        async for (name,) in await (await db_session(db)).stream(select(Item.name).order_by(Item.name)):
            yield name.encode()

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("".join(names), True)


@pytest.mark.wire
async def test_kept_transaction_is_flushed_at_the_head_and_committed_at_the_end(serve, db, bench, ledger):
    """Under keep_transaction the head flushes, and the commit comes before the last piece (P5)."""
    seen = []

    async def body(session):
        seen.append((len(session.new), await ledger.names(), bench.databases.checked_out()))
        yield b"first"
        await add(db, "body")

    async def handler(request):
        await keep_transaction(db)
        await add(db, "handler")
        return Answer(200, stream=body(await db_session(db)))

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert seen == [(0, [], 1)]
    assert await ledger.names() == ["body", "handler"]


async def test_kept_transaction_that_cannot_be_flushed_is_a_5xx(serve, db, ledger):
    """An error of the flush at the head is a 5xx, and the body never starts, also under keep_transaction (P5)."""
    started = []

    async def body():
        started.append(True)
        yield b"never"

    async def handler(request):
        await keep_transaction(db)
        await insert(db, "same")
        await add(db, "same")
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert answer.status == 500
    assert started == []
    assert await ledger.names() == []


async def test_kept_transaction_under_400_is_rolled_back_at_the_head(serve, db, bench, ledger):
    """A status of 400 or more rolls back at the head what keep_transaction would have kept (P5)."""
    seen = []

    async def body():
        seen.append(bench.databases.checked_out())
        yield b"first"

    async def handler(request):
        await keep_transaction(db)
        await insert(db, "handler")
        return Answer(409, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text, answer.complete) == (409, "first", True)
    assert seen == [0]
    assert await ledger.names() == []


async def test_kept_transaction_keeps_only_its_connect(serve, db, other, ledger, other_ledger):
    """keep_transaction keeps the transaction of its connect; the others commit at the head (P5)."""
    seen = []

    async def body():
        seen.append((await ledger.names(), await other_ledger.names()))
        yield b"first"

    async def handler(request):
        await keep_transaction(db)
        await insert(db, "kept")
        await insert(other, "done")
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert seen == [([], ["done"])]
    assert await ledger.names() == ["kept"]


@pytest.mark.wire
async def test_kept_transaction_is_rolled_back_when_the_client_leaves(serve, db, bench, ledger, framework):
    """A kept transaction goes back as a whole, the handler's part too, when the client leaves mid-stream (P5)."""
    ended = asyncio.Event()

    async def body(request):
        try:
            await insert(db, "body")
            yield b"first"
            async for piece in _until_the_client_has_left(request, framework):
                yield piece
        finally:
            ended.set()

    async def handler(request):
        await keep_transaction(db)
        await insert(db, "handler")
        return Answer(200, stream=body(request))

    service = await serve(handler)
    async with service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        await connection.chunk()
        connection.abort()
    await asyncio.wait_for(ended.wait(), 10)
    await until(lambda: bench.databases.checked_out() == 0)

    assert await ledger.names() == []


@pytest.mark.parametrize("how", ["error", "commit"])
async def test_kept_transaction_that_fails_breaks_the_stream_off(serve, db, ledger, how):
    """A kept transaction whose body or whose commit fails is rolled back as a whole, and broken off for the client (P5)."""

    async def body():
        yield b"first"
        if how == "error":
            raise Broken

    async def handler(request):
        await keep_transaction(db)
        await insert(db, "handler")
        if how == "commit":
            await insert_orphan(db)
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.status, answer.text, answer.complete) == (200, "first", False)
    assert await ledger.names() == []


async def test_keep_transaction_ends_with_a_commit_by_hand(serve, db, bench, ledger):
    """A commit by hand in the body ends what was kept; what comes after it is committed at the end as always (P5)."""
    seen = []

    async def body():
        await commit_db_session(db)
        seen.append((await ledger.names(), bench.databases.checked_out()))
        yield b"first"
        await insert(db, "body")

    async def handler(request):
        await keep_transaction(db)
        await insert(db, "handler")
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("first", True)
    assert seen == [(["handler"], 0)]
    assert await ledger.names() == ["body", "handler"]


# The frameworks' own kinds of streams


async def _until_the_client_has_left(request: Any, framework: Any) -> AsyncIterator[bytes]:
    """Wait in a body until its client leaves: the body ends here, or, where nobody tells it, has to look or to write itself."""
    if Feature.DISCONNECT not in framework.lacks:
        await asyncio.Event().wait()
    elif framework.module == "aiohttp":
        await until(lambda: request.native.transport is None)
    else:
        while True:
            yield b"more"
            await asyncio.sleep(0.001)


async def _in_spite_of_cancellation(work: Coroutine[Any, Any, None]) -> BaseException | None:
    """Do this to its end, however often it is cancelled meanwhile, and return its error: what shields itself does that."""
    task = asyncio.create_task(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    return task.exception()


async def _has(ledger: Any, name: str) -> bool:
    return name in await ledger.names()


def _is_open(path: Path) -> bool:
    """Return whether anything in this process has the file open."""
    files = [one for one in gc.get_objects() if isinstance(one, io.FileIO)]
    return any(not one.closed and str(one.name) == str(path) for one in files)


@contextlib.asynccontextmanager
async def _native(app: Any, framework: Any, stack: Any) -> AsyncIterator[Service]:
    """Serve an application that the test has built itself."""
    service = Service(app, await framework.driver().start(app, stack.server, ServerOptions()))
    try:
        yield service
    finally:
        await service.stop()


@pytest.mark.wire
async def test_body_without_its_last_piece_is_rolled_back(db, bench, ledger, framework, stack):
    """An application that returns without an error and without its last piece has its body rolled back (P5)."""
    app = framework.driver().unfinished(lambda name: insert(db, name), db)

    async with _native(app, framework, stack) as service, service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        await connection.chunk()
        await until(lambda: bench.databases.checked_out() == 0)
        connection.abort()

    assert await ledger.names() == ["handler"]


@pytest.mark.wire
async def test_file_response_commits_before_its_head(db, bench, ledger, framework, stack, tmp_path):
    """A file that the framework sends in its own way commits before the head, and holds no connection (P5)."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"0123456789" * 100_000)

    async def work():
        await insert(db, "a")

    async with _native(framework.driver().file(path, work, db), framework, stack) as service, service.connect() as connection:
        await connection.send("GET", "/")
        head = await connection.head()
        seen = (await ledger.names(), bench.databases.checked_out())
        rest = await connection.rest()
        await until(lambda: not _is_open(path))  # the framework closes it after the last piece: a cut would leave it open

    assert head.status == 200
    assert seen == (["a"], 0)
    assert rest == path.read_bytes()


@pytest.mark.wire
async def test_failed_commit_sends_no_file(db, ledger, framework, stack, tmp_path):
    """A commit that fails before a file is a 5xx without a byte of the file (P5)."""
    path = tmp_path / "file.txt"
    path.write_text("secret")

    async def work():
        await insert_orphan(db)

    async with _native(framework.driver().file(path, work, db), framework, stack) as service:
        answer = await service.get()

    assert answer.status == 500
    assert "secret" not in answer.text
    assert await ledger.names("children") == []


async def test_file_from_the_database_is_a_stream(serve, db, ledger):
    """A file whose generator reads it from the database, and counts the download, arrives whole and is counted (P5)."""
    pieces = [f"piece {number:02}" for number in range(20)]
    for piece in pieces:
        await ledger.execute(f"INSERT INTO parents (name) VALUES ('{piece}')")

    async def body():
        await insert(db, "download")
        for name in await (await db_session(db)).scalars(text("SELECT name FROM parents ORDER BY name")):
            yield name.encode()

    async def handler(request):
        await insert(db, "request")
        headers = {"content-disposition": 'attachment; filename="file.txt"'}
        return Answer(200, headers=headers, stream=body(), content_length=len("".join(pieces)))

    async with (await serve(handler)).connect() as connection:
        answer = await connection.request("GET", "/")
        names = await ledger.names()

    assert (answer.text, answer.complete) == ("".join(pieces), True)
    assert names == ["download", "request"]


KINDS = pytest.mark.parametrize("kind", ["events", "lines", "raw"])


@contextlib.asynccontextmanager
async def _generator_endpoint(
    kind: str, serve: Any, db: Any, generate: Any, framework: Any, stack: Any, requests: list[Any] | None = None
) -> AsyncIterator[Service]:
    """Serve an endpoint that writes "handler" and then streams what ``generate()`` yields; append its requests to ``requests``.

    In FastAPI, where it can, the generator is the endpoint itself and a dependency writes; elsewhere it is the body of a response.
    """
    if stack.framework == "fastapi" and importlib.util.find_spec("fastapi.sse") is not None:
        async with _native(_fastapi_generator(kind, db, generate), framework, stack) as service:
            yield service
        return
    types = {"events": "text/event-stream", "lines": "application/jsonl", "raw": "application/octet-stream"}

    async def body():
        async for piece in generate():
            yield f"data: {piece}\n\n".encode()

    async def handler(request):
        if requests is not None:
            requests.append(request)
        await insert(db, "handler")
        return Answer(200, headers={"content-type": types[kind]}, stream=body())

    yield await serve(handler)


def _fastapi_generator(kind: str, db: Any, generate: Any) -> Any:
    from collections.abc import AsyncIterable

    from context_sqla_fastapi import setup
    from fastapi import Depends, FastAPI
    from fastapi.responses import StreamingResponse
    from fastapi.sse import EventSourceResponse

    app = FastAPI()

    async def dependency() -> None:
        await insert(db, "handler")

    async def pieces() -> AsyncIterable[str]:
        async for piece in generate():
            yield piece

    async def raw() -> AsyncIterable[bytes]:
        async for piece in generate():
            yield piece.encode()

    before = [Depends(dependency)]
    if kind == "events":
        app.get("/", response_class=EventSourceResponse, dependencies=before)(pieces)
    elif kind == "lines":
        app.get("/", dependencies=before)(pieces)
    else:
        app.get("/", response_class=StreamingResponse, dependencies=before)(raw)
    setup(app, db)
    return app


@pytest.mark.wire
@KINDS
async def test_generator_endpoint_commits_at_its_end(serve, db, ledger, framework, stack, kind):
    """An endpoint that is a generator commits what came before it with the head, and its own work at its end (P5)."""
    go_on = asyncio.Event()

    async def generate():
        await insert(db, "body")
        yield "first"
        await go_on.wait()
        await insert(db, "last")
        yield "last"

    async with _generator_endpoint(kind, serve, db, generate, framework, stack) as service, service.connect() as connection:
        await connection.send("GET", "/")
        head = await connection.head()
        first = await connection.chunk()
        before = await ledger.names()
        go_on.set()
        rest = await connection.rest()

    assert head.status == 200
    assert b"first" in first
    assert b"last" in rest
    assert before == ["handler"]
    assert await ledger.names() == ["body", "handler", "last"]


@pytest.mark.wire
@KINDS
async def test_generator_endpoint_that_fails_is_broken_off(serve, db, ledger, framework, stack, kind):
    """An endpoint that is a generator and fails midway is broken off, and its own work is rolled back (P5)."""
    go_on = asyncio.Event()

    async def generate():
        await insert(db, "body")
        yield "first"
        await go_on.wait()
        raise Broken

    async with _generator_endpoint(kind, serve, db, generate, framework, stack) as service, service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        await connection.chunk()
        go_on.set()
        with pytest.raises(BrokenOff):
            await connection.rest()

    assert await ledger.names() == ["handler"]


@KINDS
async def test_generator_endpoint_whose_commit_fails_is_broken_off(serve, db, ledger, framework, stack, kind):
    """An endpoint that is a generator and whose final commit fails is broken off (P5)."""

    async def generate():
        await insert(db, "body")
        yield "first"
        await insert_orphan(db)

    async with _generator_endpoint(kind, serve, db, generate, framework, stack) as service:
        answer = await service.get()

    assert (answer.status, answer.complete) == (200, False)
    assert await ledger.names() == ["handler"]


@KINDS
async def test_generator_endpoint_whose_client_leaves_is_rolled_back(serve, db, bench, ledger, framework, stack, kind):
    """An endpoint that is a generator and whose client leaves is rolled back, and its connection returns (P5)."""
    ended = asyncio.Event()
    requests = []

    async def generate():
        try:
            await insert(db, "body")
            yield "first"
            async for piece in _until_the_client_has_left(requests and requests[0], framework):
                yield piece.decode()
        finally:
            ended.set()

    async with _generator_endpoint(kind, serve, db, generate, framework, stack, requests) as service:
        async with service.connect() as connection:
            await connection.send("GET", "/")
            await connection.head()
            await connection.chunk()
            connection.abort()
        await asyncio.wait_for(ended.wait(), 10)
        await until(lambda: bench.databases.checked_out() == 0)

    assert await ledger.names() == ["handler"]


@KINDS
async def test_generator_endpoint_keeps_its_session(serve, db, ledger, framework, stack, kind):
    """The generator has one session from its first step to its last, before and after the head (P5)."""
    sessions = []
    go_on = asyncio.Event()

    async def generate():
        sessions.append(await db_session(db))
        yield "first"
        await go_on.wait()
        sessions.append(await db_session(db))
        sessions[0].add(Item(name="body"))

    async with _generator_endpoint(kind, serve, db, generate, framework, stack) as service, service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        await connection.chunk()
        go_on.set()
        await connection.rest()

    assert sessions[0] is sessions[1]
    assert await ledger.names() == ["body", "handler"]


@KINDS
async def test_generator_endpoint_commits_by_hand(serve, db, ledger, framework, stack, kind):
    """A commit by hand in the generator is that of its own session, before the head as well, and stays (P5, P17)."""

    async def generate():
        await insert(db, "body")
        await commit_db_session(db)
        yield "first"
        await insert(db, "lost")
        raise Broken

    async with _generator_endpoint(kind, serve, db, generate, framework, stack) as service:
        answer = await service.get()

    assert (answer.status, answer.complete) == (200, Feature.STREAM_BROKEN_OFF in framework.lacks)
    assert await ledger.names() == ["body", "handler"]


@pytest.mark.wire
@KINDS
async def test_generator_endpoint_registers_for_its_own_commit(serve, db, ledger, framework, stack, kind):
    """What the generator registers to run after the commit runs after its own, not after that before the head (P5, P14)."""
    go_on = asyncio.Event()
    ran = []

    async def generate():
        await insert(db, "body")
        on_commit(lambda: ran.append("unit"))
        on_commit(lambda: ran.append("session"), connect=db)
        yield "first"
        await go_on.wait()

    async with _generator_endpoint(kind, serve, db, generate, framework, stack) as service, service.connect() as connection:
        await connection.send("GET", "/")
        await connection.head()
        await connection.chunk()
        before = list(ran)
        go_on.set()
        await connection.rest()

    assert (before, sorted(ran)) == ([], ["session", "unit"])
    assert await ledger.names() == ["body", "handler"]
