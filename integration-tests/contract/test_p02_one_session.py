"""P2: one session per unit and connect, whoever asks for it, and however many ask at once."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from context_sqla import db_session
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from support.deadline import until
from support.rows import add, insert
from support.scenario import Answer, Gate
from support.tables import Item


class Choice:
    """A ``before_create_session_handler`` that lets everybody wait until the test says ``go``."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, connect: Any) -> None:
        self.calls += 1
        self.asked.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error


class Askers:
    """Tasks that ask for a session; ``waiting`` of them have asked and wait."""

    def __init__(self, db: Any) -> None:
        self.waiting = 0
        self._db = db

    def start(self, count: int) -> "list[asyncio.Task[AsyncSession]]":
        return [asyncio.create_task(self._ask()) for _ in range(count)]

    async def _ask(self) -> AsyncSession:
        self.waiting += 1
        return await db_session(self._db)


def counted() -> tuple[type[AsyncSession], list[AsyncSession]]:
    """Return a session class, and the list of the sessions that were made of it."""
    made: list[AsyncSession] = []

    class Counted(AsyncSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    return Counted, made


async def _directly(ask: Callable[[], Awaitable[Any]]) -> Any:
    return await ask()


async def _in_a_task(ask: Callable[[], Awaitable[Any]]) -> Any:
    return await asyncio.create_task(_directly(ask))


async def _in_a_group(ask: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(_directly(ask))
    return task.result()


async def _with_a_deadline(ask: Callable[[], Awaitable[Any]]) -> Any:
    return await asyncio.wait_for(ask(), 10)


async def _in_a_grandchild(ask: Callable[[], Awaitable[Any]]) -> Any:
    return await _in_a_task(lambda: _in_a_task(ask))


async def _from_a_thread(ask: Callable[[], Awaitable[Any]]) -> Any:
    loop = asyncio.get_running_loop()
    return await asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(_directly(ask), loop).result(10))


WAYS = pytest.mark.parametrize("way", [_directly, _in_a_task, _in_a_group, _with_a_deadline, _in_a_grandchild, _from_a_thread])


@WAYS
async def test_session_that_is_there_is_shared(serve, db, ledger, way):
    """Whoever asks after the first gets the same session, and writes in the same transaction (P2)."""
    sessions = []

    async def write():
        await add(db, "other")
        return await db_session(db)

    async def handler(request):
        sessions.append(await db_session(db))
        await insert(db, "handler")
        sessions.append(await way(write))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert sessions[0] is sessions[1]
    assert await ledger.names() == ["handler", "other"]


@WAYS
async def test_session_that_a_child_asked_for_first_is_shared(serve, connect, ledger, way):
    """A session that a child task asked for first is the one of its unit, and the unit commits it (P2)."""
    sessions = []
    session_class, made = counted()
    db = await connect("db", session_class=session_class)

    async def write():
        await insert(db, "child")
        return await db_session(db)

    async def handler(request):
        sessions.append(await way(write))
        sessions.append(await db_session(db))
        await insert(db, "handler")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert sessions[0] is sessions[1]
    assert len(made) == 1
    assert await ledger.names() == ["child", "handler"]


async def test_middleware_handler_and_error_handler_share_the_session(serve, db):
    """All code of a request, middleware and error handler included, gets the same session (P2)."""
    sessions = []

    async def check(request):
        sessions.append(await db_session(db))

    async def handler(request):
        sessions.append(await db_session(db))
        raise KeyError

    async def answer_key(exc):
        sessions.append(await db_session(db))
        return Answer(404)

    answer = await (await serve(handler, middleware=[Gate(check)], error_handlers={KeyError: answer_key})).get()

    assert answer.status == 404
    assert len(sessions) == 3
    assert len(set(sessions)) == 1


async def test_ten_that_ask_at_once_get_one_session(serve, connect, ledger):
    """Ten tasks that ask first at the same moment get one session; the handler runs once, no session is orphaned (P2)."""
    sessions = []
    choice = Choice()
    session_class, made = counted()
    db = await connect("db", handler=choice, session_class=session_class)

    async def handler(request):
        askers = Askers(db)
        tasks = askers.start(10)
        await until(lambda: askers.waiting == 10)
        choice.go.set()
        sessions.extend(await asyncio.gather(*tasks))
        await insert(db, "a")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert len(sessions) == 10
    assert set(sessions) == set(made)
    assert len(made) == 1
    assert choice.calls == 1
    assert await ledger.names() == ["a"]


async def test_ten_that_ask_at_once_without_a_handler_get_one_session(serve, connect):
    """Ten tasks that ask first at the same moment get one session, where no handler delays it either (P2)."""
    sessions = []
    session_class, made = counted()
    db = await connect("db", session_class=session_class)

    async def handler(request):
        sessions.extend(await asyncio.gather(*(db_session(db) for _ in range(10))))
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert len(sessions) == 10
    assert set(sessions) == set(made)
    assert len(made) == 1


async def test_first_asker_may_be_cancelled(serve, connect, ledger):
    """When the first asker is cancelled the others still get the session, of the one call of the handler (P2)."""
    outcomes = []
    choice = Choice()
    session_class, made = counted()
    db = await connect("db", handler=choice, session_class=session_class)

    async def handler(request):
        askers = Askers(db)
        [first] = askers.start(1)
        await choice.asked.wait()
        others = askers.start(9)
        await until(lambda: askers.waiting == 10)
        first.cancel()
        outcomes.extend(await asyncio.gather(first, return_exceptions=True))
        choice.go.set()
        outcomes.extend(await asyncio.gather(*others))
        await insert(db, "a")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == made * 9
    assert len(made) == 1
    assert choice.calls == 1
    assert await ledger.names() == ["a"]


async def test_every_asker_may_be_cancelled(serve, connect, ledger):
    """When all that wait are cancelled, who asks next gets the session that was being made: none is orphaned (P2)."""
    sessions = []
    choice = Choice()
    session_class, made = counted()
    db = await connect("db", handler=choice, session_class=session_class)

    async def handler(request):
        askers = Askers(db)
        tasks = askers.start(10)
        await choice.asked.wait()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        choice.go.set()
        await insert(db, "a")
        sessions.append(await db_session(db))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert sessions == made
    assert choice.calls == 1
    assert await ledger.names() == ["a"]


async def test_cancelled_child_leaves_its_session_to_the_unit(serve, db, ledger):
    """A session outlives the child task that asked for it first and was cancelled, with what it has written (P2)."""
    sessions = []

    async def write(written):
        sessions.append(await db_session(db))
        await insert(db, "child")
        written.set()
        await asyncio.Event().wait()

    async def handler(request):
        written = asyncio.Event()
        child = asyncio.create_task(write(written))
        await written.wait()
        child.cancel()
        await asyncio.wait([child])
        sessions.append(await db_session(db))
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert sessions[0] is sessions[1]
    assert await ledger.names() == ["child"]


async def test_handler_that_raises_fails_all_that_wait(serve, connect):
    """When the handler raises, all that wait get its error, and no session is made (P2)."""
    outcomes = []
    choice = Choice(error=LookupError("no host"))
    session_class, made = counted()
    db = await connect("db", handler=choice, session_class=session_class)

    async def handler(request):
        askers = Askers(db)
        tasks = askers.start(10)
        await until(lambda: askers.waiting == 10)
        choice.go.set()
        outcomes.extend(await asyncio.gather(*tasks, return_exceptions=True))
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert outcomes == [choice.error] * 10
    assert made == []
    assert choice.calls == 1


async def test_handler_that_raises_is_asked_again(serve, connect, ledger):
    """After an error of the handler the next who asks in the same unit has it run again, and gets a session (P2)."""
    failed = []
    choice = Choice(error=LookupError("no host"))
    choice.go.set()
    db = await connect("db", handler=choice)

    async def handler(request):
        failed.extend(await asyncio.gather(db_session(db), return_exceptions=True))
        choice.error = None
        await insert(db, "a")
        return Answer(201)

    answer = await (await serve(handler)).post()

    assert answer.status == 201
    assert isinstance(failed[0], LookupError)
    assert choice.calls == 2
    assert await ledger.names() == ["a"]


async def test_handler_runs_once_for_each_unit(serve, connect):
    """A handler runs for the first who asks in a unit, and for nobody after that (P2)."""
    choice = Choice()
    choice.go.set()
    db = await connect("db", handler=choice)

    async def handler(request):
        for _ in range(5):
            await db_session(db)
        return Answer(200)

    service = await serve(handler)
    calls = []
    for _ in range(3):
        await service.get()
        calls.append(choice.calls)

    assert calls == [1, 2, 3]


@pytest.mark.wire
async def test_requests_side_by_side_have_sessions_of_their_own(serve, connect, ledger):
    """Two requests that ask at the same moment behind one slow handler get a session each (P2)."""
    sessions = []
    choice = Choice()
    db = await connect("db", handler=choice)

    async def handler(request):
        name = request.query["name"]
        sessions.append(await db_session(db))
        await insert(db, name)
        return Answer(201 if name == "good" else 400)

    service = await serve(handler)
    requests = [asyncio.create_task(service.post(f"/?name={name}")) for name in ("good", "bad")]
    await until(lambda: choice.calls == 2)
    choice.go.set()
    answers = await asyncio.gather(*requests)

    assert [answer.status for answer in answers] == [201, 400]
    assert sessions[0] is not sessions[1]
    assert await ledger.names() == ["good"]


async def test_each_connect_has_its_session(serve, connect, bench, ledger):
    """Two connects of one unit have a session and a connection each, on the same database too (P2)."""
    seen = []
    first, second = await connect("first"), await connect("second")

    async def handler(request):
        sessions = await asyncio.gather(*(db_session(one) for one in (first, second, first, second)))
        for session in sessions:
            await session.execute(text("SELECT 1"))
        seen.append((len(set(sessions)), sessions[0] is sessions[2], bench.databases.checked_out()))
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert seen == [(2, True, 2)]


async def test_two_that_connect_at_once_are_told_what_to_do(serve, db):
    """SQLAlchemy's error about two statements on a session that is just connecting stays, with a note on the remedy (P2)."""
    errors = []

    async def handler(request):
        session = await db_session(db)
        outcomes = await asyncio.gather(*(session.execute(text("SELECT 1")) for _ in range(2)), return_exceptions=True)
        errors.extend(one for one in outcomes if isinstance(one, Exception))
        raise errors[0]

    answer = await (await serve(handler)).get()

    assert answer.status == 500
    assert len(errors) == 1
    assert type(errors[0]) is InvalidRequestError
    assert "run_in_new_ctx" in "".join(getattr(errors[0], "__notes__", ()))


async def test_two_that_flush_at_once_are_told_what_to_do(serve, db):
    """SQLAlchemy's error about two flushes of a session at once stays, with a note on the remedy (P2)."""
    errors = []

    async def handler(request):
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        session.add(Item(name="a"))
        outcomes = await asyncio.gather(session.flush(), session.flush(), return_exceptions=True)
        errors.extend(one for one in outcomes if isinstance(one, Exception))
        raise errors[0]

    answer = await (await serve(handler)).get()

    assert answer.status == 500
    assert len(errors) == 1
    assert type(errors[0]) is InvalidRequestError
    assert "run_in_new_ctx" in "".join(getattr(errors[0], "__notes__", ()))


async def test_two_statements_at_once_are_what_sqlalchemy_makes_of_them(serve, db):
    """Two statements at once on a connection that is there run one after the other, as SQLAlchemy has it (P2)."""
    values = []

    async def handler(request):
        session = await db_session(db)
        await session.execute(text("SELECT 0"))
        values.extend(await asyncio.gather(*(session.scalar(text(f"SELECT {number}")) for number in (1, 2))))
        return Answer(200)

    answer = await (await serve(handler)).get()

    assert answer.status == 200
    assert values == [1, 2]


async def test_other_errors_get_no_such_note(serve, db):
    """An error that has nothing to do with two statements at once passes through the unit as it is (P2)."""
    errors = []

    async def handler(request):
        session = await db_session(db)
        try:
            await session.execute(text("SELECT nothing FROM nowhere"))
        except Exception as exc:
            errors.append(exc)
            raise

    answer = await (await serve(handler)).get()

    assert answer.status == 500
    assert not any("run_in_new_ctx" in note for note in getattr(errors[0], "__notes__", ()))
