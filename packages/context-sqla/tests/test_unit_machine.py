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
    DBConnect,
    close_db_session,
    commit_db_session,
    committed_connects,
    db_session,
    is_context_initiated,
    on_commit,
    rollback_db_session,
)
from context_sqla.adapters import Phase, Unit
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
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
        self.written, self.uncertain, self.orphaned = set(), set(), False
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

    def decide(self, commits: bool, error: Exception | None) -> None:
        """Hold a decision about the whole unit against what it said."""
        orphaned = any(side.orphaned for side in self.all_sides())
        if commits:
            assert (error is not None) >= orphaned, "a commit that must fail returned well"
        else:
            assert error is None, f"a rollback raised {error!r}"
        done = committed_connects(error) if error is not None else ()
        for name, side in self.sides.items():
            committed = commits and (error is None or name in done)
            self.must_run |= side.decided(committed, was_open=self.were_open[name])
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

    # The adapter

    def head(self, status):
        before = self.unit.phase
        error = self.attempt(self.unit.head(status))
        if before is not Phase.HANDLER:
            assert error is None
            assert self.unit.phase is before
            return
        self.decide(status < 400, error)
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
            assert isinstance(self.attempt(unit.session(side.connect)), ContextClosedError)

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
def test_unit_keeps_its_word_in_any_order(program):
    """Open, ask, write, fail, cancel, commit, rollback, head, body, disconnect, close in any order over two connects (P3, P8, P9, P14)."""
    machine = UnitMachine()
    try:
        for call, name, number in program:
            machine.step(call, name, number)
    finally:
        machine.end()
