"""P9: several connects in one unit of work."""

import asyncio
import logging

import asyncpg
import psycopg
import pytest
from context_sqla import (
    DBConnect,
    commit_db_session,
    committed_connects,
    db_context,
    db_session,
    is_in_doubt,
    rollback_db_session,
)
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from support.proxy import proxy
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Feature
from support.wire import Address


@pytest.fixture(autouse=True)
def _contract(bench):
    """What serves nothing runs once per database, not once per framework."""


@pytest.fixture(name="third_database")
async def _third_database(bench):
    return await bench.databases.database("third")


async def _error_of(work):
    """Return the error of a unit that cannot commit."""
    with pytest.raises(Exception) as caught:
        async with db_context():
            await work()
    return caught.value


def _notes(exc):
    return "\n".join(exc.__notes__)


def _journal(*connects: DBConnect):
    """Return a list in which statements and ends of transactions of these connects appear, in their order."""
    seen = []

    def listen(name, engine):
        def executed(conn, cursor, statement, *rest):
            if statement.lstrip().upper().startswith("INSERT"):
                seen.append((name, "insert"))

        event.listen(engine.sync_engine, "before_cursor_execute", executed)
        for what in ("commit", "rollback", "prepare_twophase", "commit_twophase", "rollback_twophase"):
            event.listen(engine.sync_engine, what, lambda *_, what=what: seen.append((name, what)))

    for one in connects:
        one.engine_created.append(lambda engine, host, name=one.name: listen(name, engine))
    return seen


def _network(database):
    return proxy(Address(database.place.host, database.place.port))


async def _executed(network, statement, driver):
    """Return when the server has carried a statement out, while its answer is held back."""
    trap = network.hold_at(statement, forward=True)
    await asyncio.wait_for(trap.sprung.wait(), 10)
    if driver == "asyncpg":  # it was parsed so far; whatever comes next executes it
        executed = network.hold_at(b"", forward=True)
        trap.release()
        await asyncio.wait_for(executed.sprung.wait(), 10)


# One phase


@pytest.mark.wire
async def test_all_connects_of_a_request_commit(serve, db, other, ledger, other_ledger):
    """A request that used two databases has committed both when its client sees the answer (P9)."""

    async def handler(request):
        await insert(db, "a")
        await add(other, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert (await ledger.names(), await other_ledger.names()) == (["a"], ["b"])


async def test_all_connects_of_a_request_roll_back(serve, db, other, ledger, other_ledger):
    """A request that is refused has written nothing to either database (P9)."""

    async def handler(request):
        await insert(db, "a")
        await insert(other, "b")
        return Answer(409)

    answer = await (await serve(handler)).post()

    assert answer.status == 409
    assert (await ledger.names(), await other_ledger.names()) == ([], [])


@pytest.mark.wire
async def test_unique_violation_of_the_second_leaves_the_first_empty(serve, db, other, ledger, other_ledger):
    """All sessions are flushed before anything is committed: a constraint of the second spares the first (P9)."""
    await other_ledger.execute("INSERT INTO items (name) VALUES ('taken')")

    async def handler(request):
        await add(db, "a")
        await add(other, "taken")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert (await ledger.names(), await other_ledger.names()) == ([], ["taken"])


async def test_unique_violation_of_the_first_leaves_the_second_empty(serve, db, other, ledger, other_ledger):
    """It does not matter which of the two cannot be flushed (P9)."""
    await ledger.execute("INSERT INTO items (name) VALUES ('taken')")

    async def handler(request):
        await add(db, "taken")
        await add(other, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert (await ledger.names(), await other_ledger.names()) == (["taken"], [])


async def test_failed_flush_commits_nothing_and_says_so(db, other):
    """When a flush fails nothing has been committed, and ``committed_connects`` is empty (P9)."""

    async def work():
        await add(db, "a")
        await add(other, "b")
        await add(other, "b")

    exc = await _error_of(work)

    assert isinstance(exc, IntegrityError)
    assert committed_connects(exc) == ()


async def test_everything_is_flushed_before_anything_commits(db, other):
    """Every INSERT of every connect precedes the first COMMIT (P9)."""
    seen = _journal(db, other)

    async with db_context():
        await add(db, "a")
        await add(other, "b")

    assert seen == [("db", "insert"), ("other", "insert"), ("db", "commit"), ("other", "commit")]


async def test_commits_follow_the_order_of_first_use(db, other):
    """The connect that was used first commits first, whatever was written last (P9)."""
    seen = _journal(db, other)

    async with db_context():
        await insert(other, "b")
        await insert(db, "a")
        await insert(other, "c")

    assert [what for what in seen if what[1] == "commit"] == [("other", "commit"), ("db", "commit")]


async def test_hook_that_refuses_the_second_leaves_the_first_empty(serve, db, other, ledger, other_ledger):
    """All hooks are asked before anything is committed (P9)."""

    async def refuse(session):
        raise ValueError("not today")

    async def handler(request):
        await insert(db, "a")
        await insert(other, "b")
        return Answer(201)

    other.before_commit.append(refuse)
    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert (await ledger.names(), await other_ledger.names()) == ([], [])


async def test_what_a_hook_of_the_second_adds_is_flushed_before_anything_commits(db, other, ledger, other_ledger):
    """A row that a hook adds, and that violates a constraint, spares the first connect too (P9)."""
    await other_ledger.execute("INSERT INTO items (name) VALUES ('audit')")

    async def audit(session):
        await add(other, "audit")

    async def work():
        await insert(db, "a")
        await insert(other, "b")

    other.before_commit.append(audit)
    exc = await _error_of(work)

    assert isinstance(exc, IntegrityError)
    assert (await ledger.names(), await other_ledger.names()) == ([], ["audit"])


@pytest.mark.postgresql
async def test_swallowed_error_of_the_second_leaves_the_first_empty(serve, db, other, ledger):
    """A silent rollback of the second connect is noticed before the first commits (P4a, P9)."""

    async def handler(request):
        await insert(db, "a")
        try:
            await (await db_session(other)).execute(text("SELECT 1/0"))
        except Exception:
            return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert await ledger.names() == []


@pytest.mark.wire
async def test_commit_that_fails_at_the_second_is_a_5xx(serve, db, other, ledger, other_ledger):
    """A deferred key that fails at the second's COMMIT: the first has committed, the client learns of the failure (P9)."""

    async def handler(request):
        await insert(db, "a")
        await insert(other, "b")
        await insert_orphan(other)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert (await ledger.names(), await other_ledger.names()) == (["a"], [])


async def test_error_handler_can_ask_what_has_committed(serve, db, other, framework):
    """The application's own handler learns from the error which connects had committed (P4b, P9)."""
    seen = []

    async def handler(request):
        await insert(db, "a")
        await insert_orphan(other)
        return Answer(201)

    async def compensate(exc):
        seen.append(committed_connects(exc))
        return Answer(409)

    answer = await (await serve(handler, error_handlers={IntegrityError: compensate})).post()

    lacking = Feature.COMMIT_ERROR_HANDLERS in framework.lacks
    assert answer.status == (500 if lacking else 409)
    assert seen == ([] if lacking else [("db",)])


async def test_failed_commit_names_what_has_committed(connect, db, other, ledger, other_ledger, third_database):
    """The error's note and ``committed_connects`` name what is committed; what comes after it is rolled back (P9)."""
    third = await connect("third", database=third_database)

    async def work():
        await insert(db, "a")
        await insert_orphan(other)
        await insert(third, "c")

    exc = await _error_of(work)

    assert isinstance(exc, IntegrityError)
    assert committed_connects(exc) == ("db",)
    assert "already committed: db; not committed: other, third" in _notes(exc)
    assert await ledger.names() == ["a"]
    assert (await other_ledger.names("children"), await third_database.ledger.names()) == ([], [])


async def test_failed_commit_of_the_first_rolls_the_others_back(db, other, ledger, other_ledger):
    """When the first COMMIT fails nothing is committed, and the note says so (P9)."""

    async def work():
        await insert_orphan(db)
        await insert(other, "b")

    exc = await _error_of(work)

    assert committed_connects(exc) == ()
    assert "already committed: nothing; not committed: db, other" in _notes(exc)
    assert (await ledger.names("children"), await other_ledger.names()) == ([], [])


async def test_connect_that_only_read_is_part_of_the_order(db, other, other_ledger):
    """A session that only read ends its transaction with the others and does not disturb them (P9)."""
    seen = _journal(db, other)

    async with db_context():
        await (await db_session(db)).execute(text("SELECT 1"))
        await insert(other, "b")

    assert [one for one in seen if one[1] == "commit"] == [("db", "commit"), ("other", "commit")]
    assert await other_ledger.names() == ["b"]


async def test_what_was_committed_by_hand_stays(db, other, ledger, other_ledger):
    """A connect that the handler has committed by hand stays so when another one fails (P9)."""

    async def work():
        await insert(db, "a")
        await commit_db_session(db)
        await insert_orphan(other)

    exc = await _error_of(work)

    assert isinstance(exc, IntegrityError)
    assert (await ledger.names(), await other_ledger.names("children")) == (["a"], [])


@pytest.mark.postgresql
async def test_connection_that_died_is_not_in_the_way_of_the_others(db, other, other_ledger, ledger):
    """The backend of one connect is gone before the commit: nothing commits, the other one's connection goes back whole (P9)."""
    pids = []

    async def work():
        await insert(other, "b")
        await insert(db, "a")
        pids.extend(one.pid for one in await ledger.backends("db"))
        await ledger.terminate(pids[0])
        await add(db, "unsent")

    exc = await _error_of(work)

    assert len(pids) == 1
    assert committed_connects(exc) == ()
    assert not is_in_doubt(exc)
    assert (await ledger.names(), await other_ledger.names()) == ([], [])


# Hooks


async def test_hooks_run_in_the_order_of_first_use(db, other):
    """All before-commit hooks, in the order of first use, then all commits, then all committed hooks in the same order (P9)."""
    seen = _journal(db, other)

    def note(name, what):
        async def hook(session, *host):
            seen.append((name, what))

        return hook

    for one in (db, other):
        one.before_commit.append(note(one.name, "asked"))
        one.committed.append(note(one.name, "told"))
    async with db_context():
        await add(other, "b")
        await add(db, "a")

    assert seen == [
        ("other", "insert"),
        ("db", "insert"),
        ("other", "asked"),
        ("db", "asked"),
        ("other", "commit"),
        ("db", "commit"),
        ("other", "told"),
        ("db", "told"),
    ]


async def test_committed_hooks_run_for_what_has_committed(db, other, database):
    """When the second COMMIT fails, the first connect's ``committed`` hook runs, with its host, and the second's does not (P9)."""
    told = []

    async def tell(session, host):
        told.append((session.get_bind().url.database, host))

    async def work():
        await insert(db, "a")
        await insert_orphan(other)

    db.committed.append(tell)
    other.committed.append(tell)
    await _error_of(work)

    assert told == [(database.url().database, database.host)]


# Two connects to one database


async def test_two_connects_to_one_database_are_independent(serve, connect, db, ledger):
    """Two connects to one database give two sessions with transactions of their own in one request (P9)."""
    again = await connect("again")
    seen = []

    async def handler(request):
        first, second = await db_session(db), await db_session(again)
        await insert(db, "a")
        count = (await second.execute(text("SELECT count(*) FROM items"))).scalar_one()
        seen.append((first is second, count))
        await commit_db_session(db)
        await rollback_db_session(again)
        await insert(again, "b")
        await rollback_db_session(again)
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert seen == [(False, 0)]
    assert await ledger.names() == ["a"]


@pytest.mark.postgresql
async def test_two_connects_to_one_database_commit_each_for_itself(connect, db, ledger):
    """The second connect fails at its COMMIT: the first one's row in the same database stays (P9)."""
    again = await connect("again")

    async def work():
        await insert(db, "a")
        await insert(again, "b")
        await insert_orphan(again)

    exc = await _error_of(work)

    assert committed_connects(exc) == ("db",)
    assert await ledger.names() == ["a"]


# Two phases


@pytest.mark.wire
@pytest.mark.postgresql
async def test_two_phases_commit_together(serve, connect, ledger, other_database):
    """Two connects with ``twophase=True`` are prepared first, then committed (P9)."""
    db = await connect("db", twophase=True)
    other = await connect("other", database=other_database, twophase=True)
    seen = _journal(db, other)

    async def handler(request):
        await insert(db, "a")
        await insert(other, "b")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert (await ledger.names(), await other_database.ledger.names()) == (["a"], ["b"])
    assert [one for one in seen if one[1] != "insert"] == [
        ("db", "prepare_twophase"),
        ("other", "prepare_twophase"),
        ("db", "commit_twophase"),
        ("other", "commit_twophase"),
    ]


@pytest.mark.wire
@pytest.mark.postgresql
@pytest.mark.parametrize("failing", [0, 1], ids=["first", "second"])
async def test_failed_prepare_commits_nothing(serve, connect, ledger, other_database, failing):
    """A deferred key that fails at one PREPARE: nothing is committed anywhere, and nothing stays prepared (P9)."""
    db = await connect("db", twophase=True)
    other = await connect("other", database=other_database, twophase=True)

    async def handler(request):
        await insert(db, "a")
        await insert(other, "b")
        await insert_orphan((db, other)[failing])
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 500
    assert (await ledger.names(), await other_database.ledger.names()) == ([], [])
    assert (await ledger.prepared(), await other_database.ledger.prepared()) == ([], [])


@pytest.mark.postgresql
@pytest.mark.parametrize("prepared_first", [True, False])
async def test_failed_one_phase_commit_rolls_the_prepared_back(connect, db, ledger, other_database, prepared_first):
    """A one-phase connect that fails at its COMMIT rolls back what was prepared, whichever was used first (P9)."""
    two = await connect("two", database=other_database, twophase=True)

    async def work():
        if prepared_first:
            await insert(two, "b")
        await insert_orphan(db)
        await insert(two, "c")

    exc = await _error_of(work)

    assert isinstance(exc, IntegrityError)
    assert committed_connects(exc) == ()
    assert (await ledger.names("children"), await other_database.ledger.names()) == ([], [])
    assert await other_database.ledger.prepared() == []


@pytest.mark.postgresql
async def test_one_phase_commits_come_between_prepare_and_commit_prepared(connect, db, ledger, other_database):
    """The one-phase connect commits when the other is prepared, and before that is committed (P9)."""
    two = await connect("two", database=other_database, twophase=True)
    seen = _journal(db, two)

    async with db_context():
        await insert(two, "b")
        await insert(db, "a")

    assert [one for one in seen if one[1] != "insert"] == [
        ("two", "prepare_twophase"),
        ("db", "commit"),
        ("two", "commit_twophase"),
    ]
    assert (await ledger.names(), await other_database.ledger.names()) == (["a"], ["b"])


@pytest.mark.postgresql
async def test_two_phases_roll_back_together(serve, connect, ledger, other_database):
    """A refused request leaves nothing written and nothing prepared (P9)."""
    db = await connect("db", twophase=True)
    other = await connect("other", database=other_database, twophase=True)

    async def handler(request):
        await insert(db, "a")
        await insert(other, "b")
        return Answer(422)

    answer = await (await serve(handler)).post()

    assert answer.status == 422
    assert (await ledger.names(), await other_database.ledger.names()) == ([], [])
    assert await ledger.prepared() == []


@pytest.mark.postgresql
async def test_connection_lost_at_commit_prepared_is_replaced(serve, connect, ledger, database, other_database):
    """The connection dies between PREPARE and COMMIT PREPARED: the decision is carried out on a fresh one (P9)."""
    async with _network(database) as network:
        db = await connect("db", host=network.host, twophase=True)
        other = await connect("other", database=other_database, twophase=True)

        async def handler(request):
            await insert(db, "a")
            await insert(other, "b")
            return Answer(201)

        service = await serve(handler)
        network.cut_at(b"COMMIT PREPARED")
        answer = await service.post()
        await service.stop()

    assert answer.status == 201
    assert (await ledger.names(), await other_database.ledger.names()) == (["a"], ["b"])
    assert await ledger.prepared() == []


@pytest.mark.postgresql
async def test_database_that_comes_back_gets_its_decision(serve, bench, connect, db, ledger, spare_postgres):
    """The server crashes between PREPARE and COMMIT PREPARED and is back within ``commit_timeout``: it is committed (P9)."""
    there = await bench.databases.database("first", server=spare_postgres)
    async with _network(there) as network:
        two = await connect("two", database=there, host=network.host, twophase=True)
        attempts = []
        two.engine_created.append(
            lambda engine, host: event.listen(engine.sync_engine, "do_connect", lambda *_: attempts.append(1))
        )

        async def handler(request):
            await insert(two, "b")
            await insert(db, "a")
            return Answer(201)

        service = await serve(handler)
        decided = network.hold_at(b"COMMIT PREPARED")
        asked = asyncio.create_task(service.post())
        await asyncio.wait_for(decided.sprung.wait(), 10)
        await asyncio.to_thread(spare_postgres.stop, "immediate")
        network.cut()
        await asyncio.to_thread(spare_postgres.start)
        answer = await asked
        await service.stop()

    assert answer.status == 201
    assert len(attempts) > 1
    assert (await ledger.names(), await there.ledger.names()) == (["a"], ["b"])
    assert await there.ledger.prepared() == []


@pytest.mark.postgresql
async def test_database_that_is_starting_up_gets_its_decision(connect, ledger, database):
    """A database that answers that it is starting up is asked again, whatever kind of error the driver makes of it (P9)."""
    starting_up = {"asyncpg": asyncpg.CannotConnectNowError, "psycopg": psycopg.errors.CannotConnectNow}[database.driver]
    attempts = []

    def answer(*_):
        attempts.append(1)
        if len(attempts) == 2:
            raise starting_up("the database system is starting up")

    async with _network(database) as network:
        two = await connect("two", host=network.host, twophase=True)
        two.engine_created.append(lambda engine, host: event.listen(engine.sync_engine, "do_connect", answer))
        network.cut_at(b"COMMIT PREPARED")
        async with db_context():
            await insert(two, "a")
        await two.close()

    assert len(attempts) == 3
    assert (await ledger.prepared(), await ledger.names()) == ([], ["a"])


@pytest.mark.postgresql
@pytest.mark.parametrize("fault", ["refuse", "hang"])
async def test_database_that_stays_away_is_reported(serve, connect, other, ledger, database, other_ledger, caplog, fault):
    """It stays away: a 5xx, and an ERROR log line with connect, gid and decision; the rest of the unit is committed (P9)."""
    async with _network(database) as network:
        two = await connect("two", host=network.host, twophase=True, commit_timeout=0.3, cleanup_timeout=0.3)

        async def handler(request):
            await insert(two, "a")
            await insert(other, "b")
            return Answer(201)

        service = await serve(handler)
        decided = network.hold_at(b"COMMIT PREPARED")
        asked = asyncio.create_task(service.post())
        await asyncio.wait_for(decided.sprung.wait(), 10)
        network.mode = fault
        if fault == "refuse":
            network.cut()
        answer = await asked
        gids = await ledger.prepared()
        network.cut()
        await service.stop()
    lines = [
        record.getMessage() for record in caplog.records if record.name == "context_sqla" and record.levelno == logging.ERROR
    ]
    await ledger.execute(f"COMMIT PREPARED '{gids[0]}'")

    assert answer.status == 500
    assert len(gids) == 1
    assert [line for line in lines if "'two'" in line and repr(gids[0]) in line and "decision: COMMIT" in line]
    assert (await ledger.names(), await other_ledger.names()) == (["a"], ["b"])


@pytest.mark.postgresql
async def test_note_of_a_database_that_stays_away(connect, ledger, database, other_database):
    """The error's note has connect, gid and decision; the other prepared connect is committed all the same (P9)."""
    async with _network(database) as network:
        two = await connect("two", host=network.host, twophase=True, commit_timeout=0.3)
        other = await connect("other", database=other_database, twophase=True)

        async def work():
            await insert(two, "a")
            await insert(other, "b")

        decided = network.hold_at(b"COMMIT PREPARED")
        failing = asyncio.create_task(_error_of(work))
        await asyncio.wait_for(decided.sprung.wait(), 10)
        network.mode = "refuse"
        network.cut()
        exc = await failing
        gids = await ledger.prepared()
        await two.close()
    await ledger.execute(f"ROLLBACK PREPARED '{gids[0]}'")

    assert [note for note in exc.__notes__ if "'two'" in note and repr(gids[0]) in note and "decision: COMMIT" in note]
    assert committed_connects(exc) == ("other",)
    assert await other_database.ledger.names() == ["b"]


@pytest.mark.postgresql
async def test_decided_commit_that_is_left_behind_is_in_doubt(connect, ledger, database, other_database):
    """It will be committed, by whoever reads the line in the log: to call it failed would be wrong (P9)."""
    async with _network(database) as network, _network(other_database) as other_network:
        other = await connect("other", database=other_database, host=other_network.host, twophase=True)
        two = await connect("two", host=network.host, twophase=True, commit_timeout=0.3)

        async def work():
            await insert(other, "b")
            await insert(two, "a")

        decided = other_network.hold_at(b"COMMIT PREPARED")
        failing = asyncio.create_task(_error_of(work))
        await asyncio.wait_for(decided.sprung.wait(), 10)
        network.mode = "refuse"
        network.cut()
        decided.release()
        exc = await failing
        gids = await ledger.prepared()
        await two.close()
        await other.close()
    await ledger.execute(f"COMMIT PREPARED '{gids[0]}'")

    assert is_in_doubt(exc)
    assert committed_connects(exc) == ("other",)


@pytest.mark.postgresql
async def test_lost_answer_of_prepare_rolls_back(connect, ledger, database, other_database):
    """The server has prepared and its answer is lost: it is rolled back on a fresh connection, and nothing commits (P9)."""
    async with _network(database) as network:
        other = await connect("other", database=other_database, twophase=True)
        two = await connect("two", host=network.host, twophase=True)

        async def work():
            await insert(other, "b")
            await insert(two, "a")

        failing = asyncio.create_task(_error_of(work))
        await _executed(network, b"PREPARE TRANSACTION", database.driver)
        between = await ledger.prepared()
        network.cut()
        exc = await failing
        await two.close()

    assert len(between) == 1
    assert committed_connects(exc) == ()
    assert (await ledger.prepared(), await other_database.ledger.prepared()) == ([], [])
    assert (await ledger.names(), await other_database.ledger.names()) == ([], [])


@pytest.mark.postgresql
async def test_prepare_without_an_answer_is_bounded(connect, ledger, database):
    """A server that has prepared and does not answer is given up at ``commit_timeout``, and what it prepared is rolled back (P9)."""
    async with _network(database) as network:
        two = await connect("two", host=network.host, twophase=True, commit_timeout=0.3)

        async def work():
            await insert(two, "a")

        failing = asyncio.create_task(_error_of(work))
        await _executed(network, b"PREPARE TRANSACTION", database.driver)
        between = await ledger.prepared()
        await asyncio.wait_for(failing, 10)
        await two.close()

    assert len(between) == 1
    assert (await ledger.prepared(), await ledger.names()) == ([], [])


@pytest.mark.postgresql
async def test_lost_answer_of_commit_prepared_is_no_failure(connect, ledger, database):
    """COMMIT PREPARED is carried out and its answer lost: the repetition finds it done, and the unit has succeeded (P9)."""
    async with _network(database) as network:
        two = await connect("two", host=network.host, twophase=True)

        async def work():
            async with db_context():
                await insert(two, "a")

        working = asyncio.create_task(work())
        await _executed(network, b"COMMIT PREPARED", database.driver)
        between = (await ledger.prepared(), await ledger.names())
        network.cut()
        await asyncio.wait_for(working, 10)
        await two.close()

    assert between == ([], ["a"])
    assert (await ledger.prepared(), await ledger.names()) == ([], ["a"])


@pytest.mark.postgresql
async def test_prepared_connect_that_cannot_be_rolled_back_is_reported(connect, db, ledger, database, other_database, caplog):
    """A one-phase COMMIT fails while a prepared database is away: the decision ROLLBACK is logged with connect and gid (P9)."""
    async with proxy(Address(other_database.place.host, other_database.place.port)) as network:
        two = await connect("two", database=other_database, host=network.host, twophase=True, commit_timeout=0.3)

        async def work():
            await insert(two, "b")
            await insert_orphan(db)

        async with ledger.lock("parents"):  # the COMMIT of `db` looks for the parent, and waits
            failing = asyncio.create_task(_error_of(work))
            await ledger.waiting("db")
            gids = await other_database.ledger.prepared()
            network.mode = "refuse"
            network.cut()
        exc = await failing
        await two.close()
    errors = [
        record.getMessage() for record in caplog.records if record.name == "context_sqla" and record.levelno == logging.ERROR
    ]
    left = await other_database.ledger.prepared()
    await other_database.ledger.execute(f"ROLLBACK PREPARED '{gids[0]}'")

    assert isinstance(exc, IntegrityError)
    assert left == gids
    assert [line for line in errors if "'two'" in line and repr(gids[0]) in line and "decision: ROLLBACK" in line]


@pytest.mark.postgresql
async def test_commit_in_doubt_of_a_one_phase_connect_rolls_the_prepared_back(connect, ledger, database, other_database):
    """A one-phase COMMIT whose answer is lost fails the unit, in doubt; what was prepared is rolled back (P9)."""
    async with _network(database) as network:
        one = await connect("one", host=network.host)
        two = await connect("two", database=other_database, twophase=True)

        async def work():
            await insert(two, "b")
            await insert(one, "a")

        network.cut_at(b"COMMIT", forward=True)
        exc = await _error_of(work)
        await one.close()

    assert is_in_doubt(exc)
    assert committed_connects(exc) == ()
    assert await other_database.ledger.prepared() == []
    assert (await ledger.names(), await other_database.ledger.names()) == (["a"], [])


@pytest.mark.postgresql
async def test_cancellation_between_prepare_and_commit_prepared_is_carried_through(connect, ledger, database, other_database):
    """A unit that is cancelled once everything is prepared commits all the same: all or nothing (P7, P9)."""
    async with _network(database) as network:
        two = await connect("two", host=network.host, twophase=True)
        other = await connect("other", database=other_database, twophase=True)

        async def work():
            async with db_context():
                await insert(two, "a")
                await insert(other, "b")

        decided = network.hold_at(b"COMMIT PREPARED")
        working = asyncio.create_task(work())
        await asyncio.wait_for(decided.sprung.wait(), 10)
        working.cancel()
        decided.release()
        with pytest.raises(asyncio.CancelledError):
            await working
        await two.close()

    assert (await ledger.prepared(), await other_database.ledger.prepared()) == ([], [])
    assert (await ledger.names(), await other_database.ledger.names()) == (["a"], ["b"])


@pytest.mark.postgresql
async def test_two_phase_unit_that_only_read_prepares_nothing_for_long(connect, ledger):
    """A connect with ``twophase=True`` that was only read from leaves nothing prepared (P9)."""
    two = await connect("two", twophase=True)

    async with db_context():
        await (await db_session(two)).execute(text("SELECT 1"))

    assert await ledger.prepared() == []
