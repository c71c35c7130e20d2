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
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

INSERT = text("INSERT INTO items (name) VALUES (:name)")
ORPHAN = text("INSERT INTO items (name, parent) VALUES (:name, 4711)")
CREATE = """
    CREATE TABLE parents (id INTEGER PRIMARY KEY);
    CREATE TABLE items (name TEXT PRIMARY KEY, parent INTEGER REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED);
    PRAGMA journal_mode = WAL;
"""

sides = st.sampled_from(["left", "right"])


class Side:
    """One connect to a database of its own, and what must be in it."""

    def __init__(self, name: str, folder: str) -> None:
        self.path = Path(folder, f"{name}.sqlite3")
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.executescript(CREATE)
        self.connect = DBConnect(self._engine, lambda engine: async_sessionmaker(engine, expire_on_commit=False), "local", name=name)
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
        event.listen(engine.sync_engine, "connect", lambda dbapi, record: dbapi.execute("PRAGMA foreign_keys = ON"))
        self.engines.append(engine)
        return engine

    def names(self) -> set[str]:
        """What everybody else sees."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM items")}

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


class UnitMachine(RuleBasedStateMachine):
    """One unit after the other, in one event loop and one context."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.sides = {name: Side(name, self.folder.name) for name in ("left", "right")}
        self.runner = asyncio.Runner()
        self.context = Context()
        self.numbers = itertools.count()
        self.unit: Unit | None = None
        self.status: int | None = None  # of the head, once it is out
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

    # The application

    @precondition(lambda self: self.unit is None)
    @rule()
    def enter(self):
        async def enter():
            return Unit.enter()

        self.unit = self.run(enter())
        self.status = None
        assert self.unit.phase is Phase.HANDLER

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides)
    def ask(self, name):
        """One session per connect, as long as it is not closed by hand or by the unit's own phases."""
        side = self.sides[name]
        session = self.run(db_session(side.connect))
        assert side.session in (None, session)
        side.session = session

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides)
    def write(self, name):
        side = self.sides[name]
        row = f"row {next(self.numbers)}"
        if self.attempt(self._execute(side, INSERT, row)) is None:
            side.written.add(row)
        else:
            assert side.uncertain, "only after a cancelled statement may a good one fail"

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides)
    def write_orphan(self, name):
        side = self.sides[name]
        if self.attempt(self._execute(side, ORPHAN, f"orphan {next(self.numbers)}")) is None:
            side.orphaned = True
        else:
            assert side.uncertain

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides)
    def fail(self, name):
        """A statement fails and its error is swallowed; on SQLite the transaction goes on."""
        side = self.sides[name]
        row = f"twice {next(self.numbers)}"
        if self.attempt(self._execute(side, INSERT, row)) is None:
            side.written.add(row)
            assert isinstance(self.attempt(self._execute(side, INSERT, row)), IntegrityError)
        else:
            assert side.uncertain

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides)
    def fail_in_a_savepoint(self, name):
        """What a savepoint wrote is gone with it."""
        side = self.sides[name]

        async def nested():
            session = await db_session(side.connect)
            with contextlib.suppress(ZeroDivisionError):
                async with session.begin_nested():
                    await session.execute(INSERT, {"name": f"savepoint {next(self.numbers)}"})
                    raise ZeroDivisionError
            side.session = session

        error = self.attempt(nested())
        assert error is None or side.uncertain

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides, turns=st.integers(0, 6))
    def cancel(self, name, turns):
        """A statement is cancelled somewhere on its way, and the handler goes on."""
        side = self.sides[name]
        row = f"cancelled {next(self.numbers)}"

        async def cancelled():
            task = asyncio.create_task(self._execute(side, INSERT, row))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))
            return not task.cancelled() and task.exception() is None

        if self.run(cancelled()):
            side.written.add(row)
        else:
            side.uncertain.add(row)

    @precondition(lambda self: self.unit is not None)
    @rule(name=st.one_of(st.none(), sides))
    def register(self, name):
        """A callback that runs once, or never."""
        number = next(self.numbers)

        async def register():
            on_commit(lambda: self.ran.append(number), connect=self.sides[name].connect if name else None)

        self.run(register())
        (self.sides[name].callbacks if name else self.callbacks).add(number)

    async def _execute(self, side, statement, name):
        session = side.session = await db_session(side.connect)
        await session.execute(statement, {"name": name})

    # By hand

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides, own=st.booleans())
    def commit(self, name, own):
        side = self.sides[name]
        own = own and side.session is not None  # SQLAlchemy commits an empty transaction too
        something = own or side.open
        error = self.attempt(side.session.commit() if own else commit_db_session(side.connect))
        if own and error is not None:
            assert self.attempt(side.session.rollback()) is None
        assert (error is not None) >= side.orphaned
        assert error is None or side.orphaned or side.uncertain
        if something:
            self.must_run |= side.decided(error is None)

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides, own=st.booleans())
    def rollback(self, name, own):
        side = self.sides[name]
        if side.open:
            assert self.attempt(side.session.rollback() if own else rollback_db_session(side.connect)) is None
            side.decided(False)

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides)
    def close_session(self, name):
        side = self.sides[name]
        assert self.attempt(close_db_session(side.connect)) is None
        if side.session is not None:
            side.decided(False)
        side.session = None

    @precondition(lambda self: self.unit is not None)
    @rule(name=sides)
    def plain_close(self, name):
        """``session.close()`` resets the session; it stays the unit's."""
        side = self.sides[name]
        if side.open:
            assert self.attempt(side.session.close()) is None
            side.decided(False)

    # The adapter

    @precondition(lambda self: self.unit is not None)
    @rule(status=st.sampled_from([200, 303, 404, 500]))
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

    @precondition(lambda self: self.unit is not None)
    @rule()
    def end_of_body(self):
        before = self.unit.phase
        error = self.attempt(self.unit.end_of_body())
        if before is not Phase.STREAM:
            assert error is None
            assert self.unit.phase is before
            return
        self.decide(self.status < 400, error)
        if error is None:
            assert self.unit.phase is Phase.BACKGROUND
            self._forget_sessions()

    @precondition(lambda self: self.unit is not None)
    @rule()
    def disconnected(self):
        before = self.unit.phase

        async def leave():
            self.unit.disconnected()

        self.run(leave())
        if before is Phase.STREAM:
            for side in self.all_sides():
                side.decided(False)
            self.callbacks = set()
            assert self.unit.phase is Phase.BACKGROUND
            self._forget_sessions()
        else:
            assert self.unit.phase is before

    @precondition(lambda self: self.unit is not None)
    @rule(fails=st.booleans())
    def close(self, fails):
        unit, before = self.unit, self.unit.phase
        cause = ZeroDivisionError() if fails else None
        error = self.attempt(unit.close(cause))
        commits = before is Phase.BACKGROUND and not fails
        self.decide(commits, error)
        assert unit.phase is Phase.CLOSED
        assert self.attempt(unit.close()) is None
        assert not self.context.run(is_context_initiated)
        assert self.checked_out() == 0
        self._refused(unit)
        self._forget_sessions()
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
            if side.session is not None:
                side.callbacks = set()
            side.session = None

    def checked_out(self) -> int:
        return sum(side.checked_out() for side in self.all_sides())

    # What must be

    @invariant()
    def databases_have_what_was_decided(self):
        for side in self.all_sides():
            names = side.names()
            assert side.committed <= names, "a commit that returned well has lost rows"
            assert names <= side.committed | side.allowed, "rows were committed that nobody decided to commit"

    @invariant()
    def callbacks_have_run_once(self):
        assert sorted(self.ran) == sorted(self.must_run)

    @invariant()
    def context_is_that_of_the_unit(self):
        assert self.context.run(is_context_initiated) == (self.unit is not None)

    @invariant()
    def no_connection_without_a_unit(self):
        if self.unit is None:
            assert self.checked_out() == 0

    def teardown(self):
        try:
            if self.unit is not None:
                self.attempt(self.unit.close())
            out = self.checked_out()
            for side in self.all_sides():
                self.run(side.connect.close())
            assert out == 0
        finally:
            self.runner.close()
            self.folder.cleanup()


UnitMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    derandomize=True,  # the same programs in every run
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestUnitMachine = UnitMachine.TestCase
