"""P17: transactions by hand."""

import asyncio

import pytest
from context_sqla import (
    UnsupportedOptionError,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    rollback_db_session,
)
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InvalidRequestError
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Route

MODES = ["commit", "rollback", "append", "raise"]


class Boom(Exception):
    """An error of the application."""


async def _show(connect, *settings):
    session = await db_session(connect)
    return [await session.scalar(text(f"SHOW {setting}")) for setting in settings]


async def _isolation(connect):
    """The isolation level of the open transaction, and whether it is read-only."""
    return tuple(await _show(connect, "transaction_isolation", "transaction_read_only"))


DEFAULT = ("read committed", "off")


# Commit, rollback, close


@pytest.mark.wire
async def test_commit_by_hand_is_visible_at_once(serve, db, ledger):
    """A commit in the middle of a request is a commit; what follows obeys the status (P17)."""
    seen = []

    async def handler(request):
        await insert(db, "a")
        await commit_db_session(db)
        seen.append(await ledger.names())
        await insert(db, "b")
        return Answer(int(request.query["status"]))

    service = await serve(handler)
    await service.post("/?status=409")
    await ledger.execute("DELETE FROM items")
    await service.post("/?status=201")

    assert seen == [["a"], ["a"]]
    assert await ledger.names() == ["a", "b"]


async def test_rollback_by_hand_takes_back_what_is_open(serve, db, ledger):
    """A rollback in the middle drops what came before it; what follows commits (P17)."""

    async def handler(request):
        await insert(db, "a")
        await rollback_db_session(db)
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["b"]


async def test_rollback_by_hand_makes_a_failed_transaction_usable(serve, db, ledger):
    """After a statement failed, a rollback by hand lets the request go on, and its answer is a success (P4a, P17)."""

    async def handler(request):
        await insert(db, "a")
        with pytest.raises(IntegrityError):
            await (await db_session(db)).execute(text("INSERT INTO items (name) VALUES ('a')"))
        await rollback_db_session(db)
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["b"]


async def test_failed_commit_by_hand_is_the_handlers_affair(serve, db, ledger):
    """A commit by hand that fails raises in the handler; caught, the request goes on in a new transaction (P17)."""

    async def handler(request):
        await insert(db, "a")
        await insert_orphan(db)
        with pytest.raises(IntegrityError):
            await commit_db_session(db)
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["b"]
    assert await ledger.count("children") == 0


@pytest.mark.parametrize("finish", [commit_db_session, rollback_db_session, close_db_session])
async def test_nothing_happens_where_nothing_is_open(serve, db, bench, finish):
    """Without a session, and with one that did nothing, they take no connection (P17)."""

    async def handler(request):
        await finish(db)
        await db_session(db)
        await finish(db)
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert all(engine.sync_engine.pool.checkedin() == 0 for engine in bench.databases.engines)


async def test_close_by_hand_gives_a_fresh_session(serve, db, ledger):
    """After ``close_db_session`` the next ``db_session`` is a new one; what was not committed is gone (P17)."""
    sessions = []

    async def handler(request):
        sessions.append(await db_session(db))
        await insert(db, "a")
        await close_db_session(db)
        sessions.append(await db_session(db))
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert sessions[0] is not sessions[1]
    assert await ledger.names() == ["b"]


async def test_plain_close_resets_the_session(serve, db, ledger, bench):
    """``session.close()`` is SQLAlchemy's: it rolls back, gives the connection back, and the session may be used again (P17)."""
    seen = []

    async def handler(request):
        session = await db_session(db)
        await insert(db, "a")
        await session.close()
        seen.append((bench.databases.checked_out(), await db_session(db) is session))
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert seen == [(0, True)]
    assert await ledger.names() == ["b"]


@pytest.mark.parametrize("close", [False, True], ids=["commit", "commit-and-close"])
async def test_commit_frees_the_connection_for_others(serve, connect, ledger, close):
    """With one connection: who commits before slow work lets other requests through meanwhile (P17)."""
    db = await connect("one", engine_options={"pool_size": 1})
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request):
        await insert(db, "a")
        await commit_db_session(db)
        if close:
            await close_db_session(db)
        reached.set()
        await asyncio.wait_for(go_on.wait(), 10)
        await insert(db, "c")
        return Answer(201)

    async def quick(request):
        await insert(db, "b")
        return Answer(201)

    service = await serve(Route("/slow", slow), Route("/quick", quick))
    waiting = asyncio.create_task(service.post("/slow"))
    await asyncio.wait_for(reached.wait(), 10)
    between = await service.post("/quick")
    seen = await ledger.names()
    go_on.set()

    assert (between.status, (await waiting).status) == (201, 201)
    assert seen == ["a", "b"]
    assert await ledger.names() == ["a", "b", "c"]


async def test_body_commits_by_hand(serve, db, ledger):
    """A body that commits as it goes has its rows in the database before its next chunk (P5, P17)."""
    seen = []

    async def body():
        for name in "abc":
            await insert(db, name)
            await commit_db_session(db)
            seen.append(await ledger.count())
            yield name.encode()

    async def handler(request):
        return Answer(200, stream=body())

    answer = await (await serve(handler)).get()

    assert (answer.text, answer.complete) == ("abc", True)
    assert seen == [1, 2, 3]


# atomic_db_session


@pytest.mark.parametrize("mode", MODES)
async def test_atomic_block_is_a_transaction_of_its_own(serve, db, ledger, mode):
    """Nothing open: committed at its end although the request fails later, rolled back on an error although it succeeds (P17)."""
    seen = []

    async def handler(request):
        async with atomic_db_session(db, mode):
            await insert(db, "kept")
            seen.append(await ledger.names())
        seen.append(await ledger.names())
        with pytest.raises(Boom):
            async with atomic_db_session(db, mode):
                await insert(db, "dropped")
                raise Boom
        await insert(db, request.query["status"])
        return Answer(int(request.query["status"]))

    service = await serve(handler)
    await service.post("/?status=400")
    assert await ledger.names() == ["kept"]
    await ledger.execute("DELETE FROM items")
    await service.post("/?status=201")

    assert seen == [[], ["kept"]] * 2
    assert await ledger.names() == ["201", "kept"]


@pytest.mark.parametrize(
    ("mode", "at_the_begin", "good", "bad"),
    [
        ("commit", ["before"], ["before", "inside"], ["before"]),
        ("rollback", [], ["inside"], []),
        ("append", [], ["before", "inside"], []),
        (None, ["before"], ["before", "inside"], ["before"]),
    ],
)
@pytest.mark.parametrize("fails", [False, True], ids=["good", "error"])
async def test_what_becomes_of_an_open_transaction(serve, db, ledger, mode, at_the_begin, good, bad, fails):
    """``commit`` (the default) and ``rollback`` end it and begin anew, ``append`` goes on in it (P17)."""
    seen = []

    async def handler(request):
        await insert(db, "before")
        try:
            async with atomic_db_session(db, **({"current_transaction": mode} if mode else {})):
                seen.append(await ledger.names())
                await add(db, "inside")
                if fails:
                    raise Boom
        except Boom:
            pass
        seen.append(await ledger.names())
        await insert(db, "after")
        return Answer(400)

    answer = await (await serve(handler)).post()

    assert answer.status == 400
    assert seen == [at_the_begin, bad if fails else good]
    assert await ledger.names() == (bad if fails else good)


async def test_mode_raise_raises_sqlalchemys_own_error(serve, db, ledger):
    """``raise``: an open transaction is ``InvalidRequestError``; the block does not run, the transaction goes on (P17)."""
    ran = []

    async def handler(request):
        await insert(db, "before")
        with pytest.raises(InvalidRequestError, match="already begun"):
            async with atomic_db_session(db, "raise"):
                ran.append(True)
        await insert(db, "after")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert ran == []
    assert await ledger.names() == ["after", "before"]


async def test_error_of_an_atomic_commit_reaches_the_handler(serve, db, ledger):
    """The commit at the end of the block raises there, and the request goes on (P17)."""

    async def handler(request):
        with pytest.raises(IntegrityError):
            async with atomic_db_session(db):
                await insert(db, "a")
                await insert_orphan(db)
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["b"]


@pytest.mark.postgresql
async def test_atomic_block_that_swallows_an_error_is_no_silent_rollback(serve, db, ledger):
    """The commit at the end of the block is looked after as that of a request is (P4a, P17)."""

    async def handler(request):
        async with atomic_db_session(db):
            await insert(db, "a")
            with pytest.raises(IntegrityError):
                await (await db_session(db)).execute(text("INSERT INTO items (name) VALUES ('a')"))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


# Options of one block


@pytest.mark.postgresql
@pytest.mark.parametrize("mode", MODES)
async def test_options_hold_for_the_block(serve, db, mode):
    """Isolation level and read-only are the server's for this block, and no longer after it (P17)."""
    seen = []

    async def handler(request):
        async with atomic_db_session(db, mode, isolation_level="SERIALIZABLE"):
            seen.append(await _isolation(db))
        seen.append(await _isolation(db))
        await commit_db_session(db)
        async with atomic_db_session(db, mode, read_only=True):
            seen.append(await _isolation(db))
        seen.append(await _isolation(db))
        await rollback_db_session(db)
        async with atomic_db_session(db, mode, isolation_level="REPEATABLE READ", read_only=True):
            seen.append(await _isolation(db))
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert seen == [("serializable", "off"), DEFAULT, ("read committed", "on"), DEFAULT, ("repeatable read", "on")]


@pytest.mark.postgresql
async def test_options_do_not_stay_with_the_connection(serve, connect):
    """The next request on the same connection has the default again, also after an error in the block (P17)."""
    db = await connect("one", engine_options={"pool_size": 1})
    seen = []

    async def handler(request):
        if request.path == "/look":
            seen.append(await _isolation(db))
            return Answer(200)
        async with atomic_db_session(db, isolation_level="SERIALIZABLE", read_only=True):
            seen.append(await _isolation(db))
            if "error" in request.query:
                raise Boom
        return Answer(200)

    service = await serve(Route("/", handler), Route("/look", handler))
    for path in ("/", "/look", "/?error=1", "/look"):
        await service.get(path)

    assert seen == [("serializable", "on"), DEFAULT] * 2


@pytest.mark.postgresql
@pytest.mark.parametrize(("mode", "names"), [("commit", ["before", "inside"]), ("rollback", ["inside"])])
async def test_options_with_an_open_transaction_that_ends(serve, db, ledger, mode, names):
    """``commit`` and ``rollback`` end what is open first: the new transaction can have options (P17)."""
    seen = []

    async def handler(request):
        await insert(db, "before")
        async with atomic_db_session(db, mode, isolation_level="SERIALIZABLE"):
            seen.append(await _isolation(db))
            await insert(db, "inside")
        return Answer(200)

    answer = await (await serve(handler)).post()

    assert answer.status == 200
    assert seen == [("serializable", "off")]
    assert await ledger.names() == names


@pytest.mark.parametrize("options", [{"isolation_level": "SERIALIZABLE"}, {"read_only": True}], ids=["isolation", "read-only"])
async def test_option_with_an_open_transaction_to_append_to_is_refused(serve, db, ledger, options):
    """A transaction that has begun cannot get options: an error, never ignored, and the transaction goes on as it was (P17)."""
    ran = []

    async def handler(request):
        await insert(db, "before")
        with pytest.raises(UnsupportedOptionError, match="'db'"):
            async with atomic_db_session(db, "append", **options):
                ran.append(True)
        await insert(db, "after")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert ran == []
    assert await ledger.names() == ["after", "before"]


@pytest.mark.postgresql
async def test_read_only_block_writes_nothing(serve, db, ledger):
    """The database itself refuses a write in a read-only block (P17)."""

    async def handler(request):
        with pytest.raises(DBAPIError, match="read-only"):
            async with atomic_db_session(db, read_only=True):
                await insert(db, "a")
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["b"]


@pytest.mark.sqlite
async def test_read_only_is_refused_where_the_dialect_has_it_not(serve, db, ledger):
    """On SQLite read-only is an error, never a block that writes (P17)."""
    ran = []

    async def handler(request):
        with pytest.raises(UnsupportedOptionError, match=r"'db'.*read_only"):
            async with atomic_db_session(db, read_only=True):
                ran.append(True)
        await insert(db, "a")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert ran == []
    assert await ledger.names() == ["a"]


async def test_unknown_isolation_level_is_refused(serve, db, ledger, bench):
    """A level that the database does not know is an error, and the request can go on (P17)."""

    async def handler(request):
        with pytest.raises((UnsupportedOptionError, ArgumentError), match="MOSTLY HARMLESS"):
            async with atomic_db_session(db, isolation_level="MOSTLY HARMLESS"):
                await insert(db, "a")
        await insert(db, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["b"]


@pytest.mark.postgresql
async def test_options_concern_one_connect(serve, db, other):
    """The other database's transaction keeps its own isolation level (P17)."""
    seen = []

    async def handler(request):
        async with atomic_db_session(db, isolation_level="SERIALIZABLE", read_only=True):
            seen.append(await _isolation(other))
        return Answer(200)

    await (await serve(handler)).get()

    assert seen == [DEFAULT]
