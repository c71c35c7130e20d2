"""P1: no session and no connection before first use."""

from context_sqla import db_session
from sqlalchemy import text
from support.rows import insert
from support.scenario import Answer


async def test_request_without_a_session_opens_nothing(serve, connect, bench, ledger):
    """A request that never asks for a session opens nothing (P1)."""
    asked = []

    async def handler(request):
        return Answer(200, "nothing to do")

    async def choose_host(connect):
        asked.append(connect)

    db = await connect("db", handler=choose_host)
    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert asked == []
    assert bench.databases.engines == []
    assert db.pool_status().checked_out == 0
    assert await ledger.backends() == []


async def test_session_without_a_statement_takes_no_connection(serve, db, bench, ledger):
    """A session that was asked for and not used has no connection (P1)."""
    seen = []

    async def handler(request):
        session = await db_session(db)
        seen.append((session.in_transaction(), bench.databases.checked_out(), await ledger.backends("db")))
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert seen == [(False, 0, [])]
    assert await ledger.backends("db") == []


async def test_first_statement_takes_the_connection(serve, db, bench):
    """The first statement takes a connection, and the end of the request gives it back (P1)."""
    seen = []

    async def handler(request):
        session = await db_session(db)
        seen.append(bench.databases.checked_out())
        await session.execute(text("SELECT 1"))
        seen.append(bench.databases.checked_out())
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert seen == [0, 1]
    assert bench.databases.checked_out() == 0


async def test_only_the_connect_that_is_used_is_opened(serve, db, other, bench, ledger):
    """Of several connects a request opens only the one that it uses (P1)."""

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert await ledger.names() == ["a"]
    assert len(bench.databases.engines) == 1
    assert await ledger.backends("other") == []


async def test_unknown_path_opens_nothing(serve, db, bench):
    """A request for which there is no handler opens nothing (P1)."""

    async def handler(request):
        await insert(db, "a")
        return Answer(201)

    answer = await (await serve(handler)).get("/elsewhere")

    assert answer.status == 404
    assert bench.databases.engines == []
