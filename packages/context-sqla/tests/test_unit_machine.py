"""A machine that makes the calls of an adapter and of an application in any order, and knows what must be in the databases.

What it does not predict it only holds against the unit's own word: a commit that returned well has committed everything, one
that raised says which connects had committed, and nothing that was written before a decision to roll back is ever there.
"""

import asyncio
import contextlib
import itertools
import sqlite3
import tempfile
from contextvars import Context
from pathlib import Path

from context_sqla import (
    ContextClosedError,
    ContextNotInitiatedError,
    ContextSqlaError,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    committed_connects,
    db_context,
    db_session,
    init_db_session_ctx,
    is_context_initiated,
    keep_transaction,
    on_commit,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_db_session,
    run_in_new_ctx,
)
from context_sqla.adapters import Phase, Unit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

INSERT = text("INSERT INTO items (name) VALUES (:name)")
ORPHAN = text("INSERT INTO items (name, parent) VALUES (:name, 4711)")
CREATE = """
    PRAGMA synchronous = OFF;
    PRAGMA journal_mode = WAL;
    CREATE TABLE parents (id INTEGER PRIMARY KEY);
    CREATE TABLE items (name TEXT PRIMARY KEY, parent INTEGER REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED);
"""

# What a program is made of; what is named more often happens more often.
CALLS = (
    ["write"] * 4 + ["head"] * 3 + ["end_of_body"] * 2 + ["close"] * 2 + ["fail", "fail_in_a_savepoint", "write_orphan", "cancel"]
)
CALLS += ["ask", "register", "register", "commit", "rollback", "close_session", "disconnected"]
CALLS += ["keep", "atomic", "atomic", "nested", "put", "pop", "change_host", "close_connect", "end_nothing"]
STATUSES = [200, 404, 303, 500, 201, 400, 204]
steps = st.tuples(st.sampled_from(CALLS), st.sampled_from(["left", "right"]), st.integers(0, len(STATUSES) - 1))


class Side:
    """One connect to a database of its own, and what must be in it."""

    def __init__(self, name: str, folder: str) -> None:
        self.path = Path(folder, f"{name}.sqlite3")
        self.observer = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        self.observer.executescript(CREATE)
        self.connect = DBConnect(
            self._engine, lambda engine: async_sessionmaker(engine, expire_on_commit=False), "local", name=name
        )
        self.engines: list = []
        self.committed: set[str] = set()  # must be there
        self.written: set[str] = set()  # in the open transaction
        self.uncertain: set[str] = set()  # a statement that was cancelled: may be in the open transaction
        self.allowed: set[str] = set()  # may be there
        self.orphaned = False  # COMMIT must fail
        self.callbacks: set[int] = set()  # wait for the next commit of this session
        self.session: AsyncSession | None = None
        self.kept = False  # the open transaction goes on after the head

    def _engine(self, host: str):
        engine = create_async_engine(f"sqlite+aiosqlite:///{self.path}", pool_size=2, max_overflow=0, pool_timeout=10)
        event.listen(engine.sync_engine, "connect", self._prepare)
        self.engines.append(engine)
        return engine

    @staticmethod
    def _prepare(dbapi, record) -> None:
        cursor = dbapi.cursor()  # `dbapi.execute` of SQLAlchemy 2.0 returns aiosqlite's own, whose `close` is to be awaited
        for pragma in ("foreign_keys = ON", "synchronous = OFF"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def names(self) -> set[str]:
        """What everybody else sees."""
        return {name for (name,) in self.observer.execute("SELECT name FROM items")}

    def checked_out(self) -> int:
        return sum(engine.sync_engine.pool.checkedout() for engine in self.engines)

    @property
    def open(self) -> bool:
        """Whether there is something to commit."""
        return self.session is not None and self.session.in_transaction()

    def decided(self, committed: bool, *, was_open: bool = True) -> set[int]:
        """Take over what was decided; return the callbacks that must have run: none without a commit of this session."""
        if committed:
            self.committed |= self.written
            self.allowed |= self.uncertain
        ran = self.callbacks if committed and was_open else set()
        self.callbacks = self.callbacks if committed and not was_open else set()
        self.written, self.uncertain, self.orphaned, self.kept = set(), set(), False, False
        return ran


class UnitMachine:
    """One unit after the other, in one event loop and one context."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.sides = {name: Side(name, self.folder.name) for name in ("left", "right")}
        self.runner = asyncio.Runner()
        self.context = Context()
        self.numbers = itertools.count()
        self.unit: Unit | None = None
        self.status: int | None = None  # of the head, once it is out
        self.left = False  # the client has left in the middle of the body
        self.broken: Exception | None = None  # the error of the body's commit
        self.callbacks: set[int] = set()  # wait for the unit
        self.must_run: set[int] = set()
        self.ran: list[int] = []
        self.were_open: dict[str, bool] = {}

    def run(self, coroutine):
        return self.runner.run(coroutine, context=self.context)

    def attempt(self, coroutine) -> Exception | None:
        """Run what may fail, and return the error."""
        self.were_open = {name: side.open for name, side in self.sides.items()}

        async def quiet():
            try:
                await coroutine
            except Exception as exc:
                return exc
            return None

        return self.run(quiet())

    def all_sides(self) -> list[Side]:
        return list(self.sides.values())

    def decide(self, commits: bool, error: Exception | None, *, keep: bool = False) -> None:
        """Hold a decision about the whole unit against what it said."""
        kept = {name for name, side in self.sides.items() if keep and commits and side.kept and self.were_open[name]}
        orphaned = any(side.orphaned for name, side in self.sides.items() if name not in kept)
        if commits:
            assert (error is not None) >= orphaned, "a commit that must fail returned well"
        else:
            assert error is None, f"a rollback raised {error!r}"
        done = committed_connects(error) if error is not None else ()
        for name, side in self.sides.items():
            if name in kept and error is None:
                continue
            committed = commits and (error is None or name in done)
            self.must_run |= side.decided(committed, was_open=self.were_open[name])
        if kept and error is None:
            return  # and what waits for the unit goes on waiting
        if commits and error is None:
            self.must_run |= self.callbacks
        self.callbacks = set()

    def step(self, call: str, name: str, number: int) -> None:
        """Make one call, in a new unit if there is none, and look at everything."""
        if self.unit is None:
            self.enter()
        side = self.sides[name]
        if call == "head":
            self.head(STATUSES[number])
        elif call == "close":
            self.close(fails=number == 0)
        elif call == "end_of_body":
            self.end_of_body()
        elif call == "disconnected":
            self.disconnected()
        else:
            getattr(self, call)(side, number)
        self.look()

    # The application

    def enter(self):
        async def enter():
            return Unit.enter()

        self.unit = self.run(enter())
        self.status = self.broken = None
        assert self.unit.phase is Phase.HANDLER

    def ask(self, side, number):
        """One session per connect, as long as it is not closed by hand or by the unit's own phases."""
        session = self.run(db_session(side.connect))
        assert side.session in (None, session)
        side.session = session

    def write(self, side, number):
        row = f"row {next(self.numbers)}"
        if self.attempt(self._execute(side, INSERT, row)) is None:
            side.written.add(row)
        else:
            assert side.uncertain, "only after a cancelled statement may a good one fail"

    def write_orphan(self, side, number):
        if self.attempt(self._execute(side, ORPHAN, f"orphan {next(self.numbers)}")) is None:
            side.orphaned = True
        else:
            assert side.uncertain

    def fail(self, side, number):
        """A statement fails and its error is swallowed; on SQLite the transaction goes on."""
        row = f"twice {next(self.numbers)}"
        if self.attempt(self._execute(side, INSERT, row)) is None:
            side.written.add(row)
            assert isinstance(self.attempt(self._execute(side, INSERT, row)), IntegrityError)
        else:
            assert side.uncertain

    def fail_in_a_savepoint(self, side, number):
        """What a savepoint wrote is gone with it."""

        async def nested():
            session = await db_session(side.connect)
            with contextlib.suppress(ZeroDivisionError):
                async with session.begin_nested():
                    await session.execute(INSERT, {"name": f"savepoint {next(self.numbers)}"})
                    raise ZeroDivisionError
            side.session = session

        error = self.attempt(nested())
        assert error is None or side.uncertain

    def cancel(self, side, number):
        """A statement is cancelled somewhere on its way, and the handler goes on."""
        row = f"cancelled {next(self.numbers)}"

        async def cancelled():
            task = asyncio.create_task(self._execute(side, INSERT, row))
            for _ in range(number):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))
            return not task.cancelled() and task.exception() is None

        if self.run(cancelled()):
            side.written.add(row)
        else:
            side.uncertain.add(row)

    def register(self, side, number):
        """A callback that runs once, or never."""
        callback = next(self.numbers)

        async def register():
            on_commit(lambda: self.ran.append(callback), connect=side.connect if number % 2 else None)

        self.run(register())
        (side.callbacks if number % 2 else self.callbacks).add(callback)

    async def _execute(self, side, statement, name):
        session = side.session = await db_session(side.connect)
        await session.execute(statement, {"name": name})

    # By hand

    def commit(self, side, number):
        own = number % 2 and side.session is not None  # SQLAlchemy commits an empty transaction too
        something = own or side.open
        error = self.attempt(side.session.commit() if own else commit_db_session(side.connect))
        if own and error is not None:
            assert self.attempt(side.session.rollback()) is None
        assert (error is not None) >= side.orphaned
        assert error is None or side.orphaned or side.uncertain
        if something:
            self.must_run |= side.decided(error is None)

    def rollback(self, side, number):
        if side.open:
            assert self.attempt(side.session.rollback() if number % 2 else rollback_db_session(side.connect)) is None
            side.decided(False)

    def close_session(self, side, number):
        if number % 2:
            self._reset(side)
            return
        assert self.attempt(close_db_session(side.connect)) is None
        if side.session is not None:
            side.decided(False)
        side.session = None

    def _reset(self, side):
        """``session.close()`` resets the session; it stays the unit's."""
        if side.open:
            assert self.attempt(side.session.close()) is None
            side.decided(False)

    def keep(self, side, number):
        """The transaction goes on until the end of the body, if it is open at the head."""
        self.ask(side, number)
        assert self.attempt(keep_transaction(side.connect)) is None
        side.kept = True

    def atomic(self, side, number):
        """A block of its own, good or bad, whatever is open before it."""
        mode, fails = ["commit", "rollback", "append", "raise"][number % 4], number > 3
        row = f"atomic {next(self.numbers)}"
        before, orphaned, uncertain = side.open, side.orphaned, side.uncertain

        async def block():
            async with atomic_db_session(side.connect, mode) as session:
                side.session = session
                await session.execute(INSERT, {"name": row})
                if fails:
                    raise ZeroDivisionError

        error = self.attempt(block())
        self.run(db_session(side.connect)) if side.session is None else None
        if before and mode == "raise":
            assert isinstance(error, InvalidRequestError)
            return
        if before and mode == "commit":
            ended = not (orphaned or (error is not None and uncertain and not isinstance(error, ZeroDivisionError)))
            self.must_run |= side.decided(ended)
            if not ended:
                assert error is not None
                return
        elif before and mode == "rollback":
            side.decided(False)
        side.written.add(row)
        assert error is not None or not (fails or side.orphaned)
        assert error is None or fails or side.orphaned or side.uncertain, f"a good block raised {error!r}"
        self.must_run |= side.decided(error is None)

    def nested(self, side, number):
        """A unit inside this one: by a block, by a call, by hand; its end is no affair of this one's."""
        if side.open:
            return  # SQLite has one writer
        row = f"nested {next(self.numbers)}"

        async def write():
            await (await db_session(side.connect)).execute(INSERT, {"name": row})

        async def block():
            async with db_context():
                await write()
                if number % 2:
                    raise ZeroDivisionError

        async def by_hand():
            token = init_db_session_ctx(force=True)
            await write()
            if number % 2 == 0:
                await commit_all_sessions()
            await reset_db_session_ctx(token)

        async def call():
            await run_in_new_ctx(write)
            if number % 2:
                raise ZeroDivisionError

        error = self.attempt([block, by_hand, call][number % 3]())
        assert error is None or isinstance(error, ZeroDivisionError)
        if number % 2 == 0 or number % 3 == 2:
            side.committed.add(row)

    def put(self, side, number):
        """A session that exists becomes the unit's, if the unit has none."""

        async def put():
            session = await side.connect.create_session()
            try:
                put_db_session_to_context(side.connect, session)
            except ContextSqlaError:
                await session.close()
                raise
            return session

        error = self.attempt(put())
        assert (error is None) == (side.session is None)
        if error is None:
            self.ask(side, number)

    def pop(self, side, number):
        """The session is the caller's, who closes it."""

        async def pop():
            session = pop_db_session_from_context(side.connect)
            assert session is side.session
            if session is not None:
                await session.close()

        assert self.attempt(pop()) is None
        side.decided(False)
        side.session = None

    def change_host(self, side, number):
        """New sessions go elsewhere; those of this unit stay."""
        assert self.attempt(side.connect.change_host(f"host{number % 3}")) is None

    def close_connect(self, side, number):
        """A connect waits for the units that use it, but not for the one in which it is asked."""
        error = self.attempt(side.connect.close())
        assert isinstance(error, ContextSqlaError) if side.session is not None else error is None

    def end_nothing(self, side, number):
        """A token that opened nothing ends nothing."""
        assert isinstance(self.attempt(reset_db_session_ctx(object())), ContextNotInitiatedError)

    # The adapter

    def head(self, status):
        before = self.unit.phase
        error = self.attempt(self.unit.head(status))
        if before is not Phase.HANDLER:
            assert error is None
            assert self.unit.phase is before
            return
        self.decide(status < 400, error, keep=True)
        assert self.unit.phase is (Phase.STREAM if error is None else Phase.HANDLER)
        if error is None:
            self.status = status

    def end_of_body(self):
        before = self.unit.phase
        error = self.attempt(self.unit.end_of_body())
        if before is not Phase.STREAM:
            assert error is None
            assert self.unit.phase is before
            if before is Phase.BACKGROUND and self.left:  # a body that went on without its client
                self._given_up()
            self.left = False
            return
        if self.broken is not None:  # a body that failed to commit stays broken: nothing is decided again
            assert error is self.broken
            return
        self.broken = error
        self.decide(self.status < 400, error)
        if error is None:
            assert self.unit.phase is Phase.BACKGROUND
            self._forget_sessions()

    def disconnected(self):
        before = self.unit.phase

        async def leave():
            self.unit.disconnected()

        self.run(leave())
        if before is Phase.STREAM and self.broken is None:  # a body that failed to commit is rolled back already
            self._given_up()
            self.left = True
            assert self.unit.phase is Phase.BACKGROUND
        else:
            assert self.unit.phase is before

    def _given_up(self):
        for side in self.all_sides():
            side.decided(False)
        self.callbacks = set()
        self._forget_sessions()

    def close(self, fails):
        unit, before = self.unit, self.unit.phase
        cause = ZeroDivisionError() if fails else None

        async def close():  # here and now, and so in the unit's context
            await unit.close(cause)

        error = self.attempt(close())
        commits = before is Phase.BACKGROUND and not fails
        self.decide(commits, error)
        assert unit.phase is Phase.CLOSED
        assert self.attempt(unit.close()) is None
        assert not self.context.run(is_context_initiated)
        assert self.checked_out() == 0
        self._refused(unit)
        self._forget_sessions()
        self.left = False
        self.unit = None

    def _refused(self, unit: Unit) -> None:
        """Nothing outlives its unit: neither a session that was kept nor a question."""
        for side in self.all_sides():
            if side.session is not None:
                assert isinstance(self.attempt(side.session.execute(text("SELECT 1"))), ContextClosedError)
            assert isinstance(self.attempt(db_session(side.connect)), ContextNotInitiatedError)
            assert isinstance(self.attempt(unit.slot(side.connect)), ContextClosedError)

    def _forget_sessions(self) -> None:
        for side in self.all_sides():
            side.session = None
            side.callbacks = set()  # background work is a unit of its own (P6)

    def checked_out(self) -> int:
        return sum(side.checked_out() for side in self.all_sides())

    # What must be

    def look(self) -> None:
        for side in self.all_sides():
            names = side.names()
            assert side.committed <= names, "a commit that returned well has lost rows"
            assert names <= side.committed | side.allowed, "rows were committed that nobody decided to commit"
        assert sorted(self.ran) == sorted(self.must_run), "a callback ran twice, never, or too early"
        assert self.context.run(is_context_initiated) == (self.unit is not None)
        assert self.unit is not None or self.checked_out() == 0

    def end(self) -> None:
        try:
            if self.unit is not None:
                self.attempt(self.unit.close())
            out = self.checked_out()
            for side in self.all_sides():
                self.run(side.connect.close())
                side.observer.close()
            assert out == 0
        finally:
            self.runner.close()
            self.folder.cleanup()


@settings(max_examples=150, derandomize=True, deadline=None)  # the same programs in every run
@given(st.lists(steps, min_size=12, max_size=30))
@example([("write", "left", 0), ("keep", "left", 0), ("register", "left", 0), ("head", "left", 0), ("end_of_body", "left", 0)])
@example([("write", "left", 0), ("keep", "left", 0), ("register", "left", 0), ("head", "left", 0), ("disconnected", "left", 0)])
def test_unit_keeps_its_word_in_any_order(program):
    """Open, ask, write, fail, cancel, commit, rollback, head, body, disconnect, close in any order over two connects (P3, P8, P9, P14)."""
    machine = UnitMachine()
    try:
        for call, name, number in program:
            machine.step(call, name, number)
    finally:
        machine.end()


# Several tasks of one unit at once


class Crowd:
    """Tasks that work in one unit at the same time, each with a program of its own, and what must be true of any of it.

    Who wins is nobody's business here. But every error is one of ours or of SQLAlchemy's; what was acknowledged is there if
    everything went well; what nobody tried to commit after it was written is not; and nothing is left.
    """

    KNOWN = (ContextSqlaError, SQLAlchemyError, ZeroDivisionError, ConnectionAbortedError)
    DESTROYING = frozenset({"roll_back", "close_session", "reset", "pop", "cancel", "atomic", "disconnected", "abort_host"})

    def __init__(self, sides: dict[str, Side]) -> None:
        self.sides = sides
        self.clock = itertools.count()
        self.written: dict[tuple[str, str], int] = {}  # when a write began
        self.acknowledged: set[tuple[str, str]] = set()
        self.last_commit = -1  # when the last attempt to commit ended
        self.errors: list[Exception] = []
        self.riddles: list[BaseException] = []
        self.destroyed = False
        self.unit: Unit | None = None
        self.popped: list[AsyncSession] = []  # nobody's affair but ours

    async def play(self, own, programs, *, status, waits):
        """Let a request do its steps beside its tasks."""
        self.unit = unit = Unit.enter()
        children = [asyncio.create_task(self.follow(program)) for program in programs]
        error: BaseException | None = None
        try:
            await self.follow(own)
            if waits:
                await asyncio.gather(*children)
            await self.deciding(unit.head(status), status < 400)
            await self.deciding(unit.end_of_body())
        except Exception as exc:
            error = exc
            self.note(exc)
        try:
            await self.deciding(unit.close(error), error is None)
        except Exception as exc:
            self.note(exc)
        self.destroyed = self.destroyed or error is not None or status >= 400
        await asyncio.gather(*children)
        for session in self.popped:
            await session.close()

    async def follow(self, program):
        for call, name, number in program:
            self.destroyed = self.destroyed or call in self.DESTROYING
            try:
                await getattr(self, call)(self.sides[name], name, number)
            except Exception as exc:
                self.note(exc)
            await asyncio.sleep(0)

    def note(self, exc):
        self.errors.append(exc)
        if not isinstance(exc, self.KNOWN):
            self.riddles.append(exc)

    async def deciding(self, step, commits=True):
        """Do what may commit."""
        try:
            return await step
        finally:
            if commits:
                self.last_commit = next(self.clock)

    async def write(self, side, name, number):
        session = await db_session(side.connect)
        await self._insert(session, name)

    async def _insert(self, session, name):
        row = f"row {next(self.clock)}"
        self.written[name, row] = next(self.clock)
        await session.execute(INSERT, {"name": row})
        self.acknowledged.add((name, row))

    async def commit(self, side, name, number):
        await self.deciding(commit_db_session(side.connect))

    async def commit_session(self, side, name, number):
        await self.deciding((await db_session(side.connect)).commit())

    async def commit_all(self, side, name, number):
        await self.deciding(commit_all_sessions())

    async def roll_back(self, side, name, number):
        if number % 2:
            await rollback_db_session(side.connect)
        else:
            await (await db_session(side.connect)).rollback()

    async def close_session(self, side, name, number):
        if number % 2:
            await close_db_session(side.connect)
        else:
            await (await db_session(side.connect)).close()

    async def atomic(self, side, name, number):
        async def block():
            async with atomic_db_session(side.connect, ["commit", "rollback", "append", "raise"][number % 4]) as session:
                await self._insert(session, name)
                if number > 4:
                    raise ZeroDivisionError

        await self.deciding(block())

    async def nested(self, side, name, number):
        await self.deciding(run_in_new_ctx(self.write, side, name, number))

    async def by_hand(self, side, name, number):
        token = init_db_session_ctx(force=True)
        try:
            await self.write(side, name, number)
            await self.deciding(commit_all_sessions())
        finally:
            await reset_db_session_ctx(token)

    async def reset(self, side, name, number):
        """A token that was used, or a unit by hand that is rolled back."""
        token = init_db_session_ctx(force=True)
        try:
            await self.write(side, name, number)
        finally:
            await reset_db_session_ctx(token)
        await reset_db_session_ctx(token)

    async def keep(self, side, name, number):
        await keep_transaction(side.connect)

    async def register(self, side, name, number):
        on_commit(list, connect=side.connect if number % 2 else None)

    async def pop(self, side, name, number):
        session = pop_db_session_from_context(side.connect)
        if session is not None:
            self.popped.append(session)
            await session.close()

    async def put(self, side, name, number):
        session = await side.connect.create_session()
        try:
            put_db_session_to_context(side.connect, session)
        except ContextSqlaError:
            await session.close()
            raise

    async def cancel(self, side, name, number):
        task = asyncio.create_task(self.write(side, name, number))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and task.exception() is not None:
            self.note(task.exception())

    async def change_host(self, side, name, number):
        await side.connect.change_host(f"host{number % 3}")

    async def abort_host(self, side, name, number):
        side.connect.abort_host(side.connect.host)

    async def close_connect(self, side, name, number):
        await side.connect.close()

    async def ping(self, side, name, number):
        await side.connect.ping(10)

    async def head(self, side, name, number):
        status = STATUSES[number]
        self.destroyed = self.destroyed or status >= 400
        await self.deciding(self.unit.head(status), status < 400)

    async def end_of_body(self, side, name, number):
        await self.deciding(self.unit.end_of_body())

    async def disconnected(self, side, name, number):
        self.unit.disconnected()

    def look(self) -> None:
        """Say what must be true when everybody is done."""
        assert self.riddles == [], f"no error of ours, nor of SQLAlchemy: {self.riddles!r}"
        for name, side in self.sides.items():
            names = side.names()
            mine = {row for place, row in self.acknowledged if place == name}
            assert self.destroyed or self.errors or mine <= names, f"{mine - names} were acknowledged and are lost"
            ghosts = {row for (place, row), began in self.written.items() if place == name and began > self.last_commit}
            assert not ghosts & names, f"{ghosts & names} are there, and nobody has committed since"


class Hasty(Side):
    """Who finds the database locked is told so at once."""

    @staticmethod
    def _prepare(dbapi, record) -> None:
        Side._prepare(dbapi, record)
        cursor = dbapi.cursor()
        cursor.execute("PRAGMA busy_timeout = 0")
        cursor.close()


ALONE = ["write"] * 6 + [
    "commit",
    "commit_session",
    "commit_all",
    "roll_back",
    "close_session",
    "atomic",
    "nested",
    "by_hand",
    "reset",
]
ALONE += ["keep", "register", "pop", "put", "cancel", "change_host", "abort_host", "close_connect", "ping"]
calls = st.tuples(st.sampled_from(ALONE), st.sampled_from(["left", "right"]), st.integers(0, 6))
own_calls = st.one_of(
    calls, st.tuples(st.sampled_from(["head", "end_of_body", "disconnected"]), st.just("left"), st.integers(0, 6))
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(own_calls, max_size=8),
    st.lists(st.lists(calls, min_size=1, max_size=6), min_size=1, max_size=3),
    st.sampled_from([200, 200, 404]),
    st.booleans(),
)
def test_tasks_of_a_unit_lose_nothing_and_leave_nothing(own, programs, status, waits):
    """Tasks that write, commit, roll back, close, cancel, nest and switch at once in one unit, in any order (P2, P7a, P8, P10, P19)."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        sides = {name: Hasty(name, folder) for name in ("left", "right")}
        for side in sides.values():
            side.connect.drain_timeout = 0.05
        crowd = Crowd(sides)

        async def check():
            async with asyncio.timeout(60):
                await asyncio.create_task(crowd.play(own, programs, status=status, waits=waits))
                left = asyncio.all_tasks() - {asyncio.current_task()}
                if left:
                    await asyncio.wait(left)  # clean-up that is held
                assert sum(side.checked_out() for side in sides.values()) == 0
                assert not is_context_initiated()
                crowd.look()
                for side in sides.values():
                    await run_in_new_ctx(_insert_afterwards, side)
                    assert "afterwards" in side.names()
                    await side.connect.close()
                    side.observer.close()

        runner.run(check())


async def _insert_afterwards(side):
    await (await db_session(side.connect)).execute(INSERT, {"name": "afterwards"})
