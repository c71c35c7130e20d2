"""For the tests of an application: let it work in a transaction of the test, which is rolled back at the end (P12).

The two fixtures that do it::

    @pytest_asyncio.fixture
    async def session():
        async with rollback_session(db) as session:
            yield session

    @pytest_asyncio.fixture(autouse=True)
    async def shared_transaction(session):
        async with set_test_context(), put_savepoint_session_in_ctx(db, session):
            yield
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from . import _commit
from ._connect import DBConnect
from ._container import Container
from ._context import captures, current, test_units
from ._refusal import REAL_COMMITS
from ._settle import settle
from ._slot import Slot
from ._unit import Unit
from .errors import ContextNotInitiatedError, SessionBusyError

__all__ = ["capture_on_commit", "put_savepoint_session_in_ctx", "rollback_session", "set_test_context", "unit_label"]

S = TypeVar("S", bound=AsyncSession)


@asynccontextmanager
async def rollback_session(connect: DBConnect[S]) -> AsyncIterator[S]:
    """Give a session whose work is always rolled back, also what it commits.

    Args:
        connect: the database.
    """
    host = await connect._choose_host() if connect.before_create_session_handler is not None else None
    member = connect._member(host)
    async with member.engine.connect() as connection:
        outer = await connection.begin()
        session = _savepoint_session(member.maker, connection)
        try:
            yield session
        finally:
            await settle(session.close, again=True)
            if outer.is_active:
                await settle(outer.rollback, again=True)


@asynccontextmanager
async def set_test_context(auto_close: bool = False) -> AsyncIterator[None]:
    """Open a unit of work for a test, which the requests and units of the application join (P12).

    Args:
        auto_close: commit at the end, or roll back on an error: for calling a function that uses `db_session` without a server.
    """
    unit = Unit()
    unit.joinable = True
    unit.loop = asyncio.get_running_loop()
    token = current.set(unit)
    test_units.append(unit)
    try:
        yield
    except BaseException as exc:
        await unit.close(exc)
        raise
    else:
        if not auto_close:
            _hand_back(unit)
        await (unit.finish() if auto_close else unit.close())
    finally:
        test_units.remove(unit)
        with suppress(ValueError):  # a fixture may be torn down in another context than it was set up in
            current.reset(token)


@asynccontextmanager
async def put_savepoint_session_in_ctx(connect: DBConnect[S], session: S) -> AsyncIterator[S]:
    """Let this connect's sessions work on the given session's connection, in savepoints instead of transactions (P12).

    Gives the test's own session in the context. Every unit that the application opens has a session of its own; its commit
    releases its savepoint. Savepoints are a stack: units that run at the same time use the connection one after the other.

    Args:
        connect: the database.
        session: a session in a transaction that will be rolled back, such as that of `rollback_session`.

    Raises:
        ContextNotInitiatedError: there is no `set_test_context` around it.
    """
    unit: Unit | None = current.get()
    if unit is None or not unit.joinable:
        raise ContextNotInitiatedError("put_savepoint_session_in_ctx needs 'async with set_test_context():' around it")
    maker = await connect.session_maker()
    turns = Turns(connect, await session.connection(), maker, unit)
    unit.turns = {**(unit.turns or {}), connect.context_key: turns}
    slot = unit.put(connect, turns.new_session(), host=turns.host)
    place = Place(turns, unit)
    slot.share(place)
    try:
        yield slot.session  # type: ignore[misc]
    finally:
        if place.is_taken() and not await slot.idle(slot.patience):
            await place.clear()  # or the rollback of the test's transaction meets a statement of theirs
        unit.turns.pop(connect.context_key, None)
        if unit.slots.pop(connect.context_key, None) is slot:
            await _commit.end([slot])


@contextmanager
def capture_on_commit(*, execute: bool = False) -> Iterator[list[Callable[[], Any]]]:
    """Collect the `on_commit` callbacks that come due inside the block, instead of running them (P14).

    Gives the list of them, in the order in which they would have run. A rollback drops callbacks as ever: they never come due.

    Args:
        execute: run them as well.
    """
    entry: tuple[list[Any], bool] = ([], execute)
    captures.append(entry)
    try:
        yield entry[0]
    finally:
        captures[:] = [other for other in captures if other is not entry]


def unit_label() -> str | None:
    """Return what the application's unit that is open here is called, such as "POST /users"; None outside and in a test's."""
    unit: Unit | None = current.get()
    if unit is None or unit.joinable:
        return None
    return unit.label()


class Turns:
    """Who may use a test's connection now: a stack of units, each inside the one below it."""

    def __init__(self, connect: DBConnect[Any], connection: AsyncConnection, maker: async_sessionmaker[Any], unit: Unit) -> None:
        self._connect = connect
        self._connection = connection
        self._maker = maker
        self.stack: list[Container] = [unit]
        self._changed = asyncio.Event()

    @property
    def host(self) -> str:
        """The host that the sessions report."""
        return self._connect.host or ""

    def new_session(self) -> AsyncSession:
        """Make a session whose transactions are savepoints."""
        session: AsyncSession = _savepoint_session(self._maker, self._connection)
        return session

    async def take(self, unit: Container) -> "Place":
        """Wait until no unit but this one's own parents has the connection, then have it."""
        try:
            async with asyncio.timeout(self._connect.drain_timeout):
                while not (_is_inside(unit, self.stack[-1]) and await self._flushed()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise SessionBusyError(f"{self._connect!r}: another unit has the test's connection; {REAL_COMMITS}") from None
        self.stack.append(unit)
        return Place(self, unit)

    def slot_of(self, unit: Container) -> Slot | None:
        """Return a unit's session on this connection."""
        return unit.slots.get(self._connect.context_key)

    async def _flushed(self) -> bool:
        """Send what the unit on top has pending, before a savepoint inside its own; False if it lost its place meanwhile."""
        top = self.stack[-1]
        slot = self.slot_of(top)
        if slot is not None and slot.dirty:
            await slot.flush()
        return self.stack[-1] is top

    def remove(self, unit: Container) -> None:
        """Let the next one have the connection."""
        if unit in self.stack[1:]:
            self.stack.remove(unit)
        self._changed.set()


class Place:
    """The place of one unit in the stack."""

    def __init__(self, turns: Turns, unit: Container) -> None:
        self._turns = turns
        self._unit = unit

    def new_session(self) -> AsyncSession:
        """Make a session for this place that is no unit's."""
        return self._turns.new_session()

    def is_taken(self) -> bool:
        """Return whether a unit inside this one has the connection now."""
        return self._turns.stack[-1] is not self._unit

    async def clear(self) -> None:
        """Evict the units inside this one, the innermost first."""
        while self._unit in self._turns.stack and self.is_taken():
            unit = self._turns.stack[-1]
            self._turns.remove(unit)
            if (slot := self._turns.slot_of(unit)) is not None:
                await slot.evict()

    def give_back(self) -> None:
        """Leave the stack."""
        self._turns.remove(self._unit)


def _hand_back(unit: Unit) -> None:
    """Leave the sessions that the test had put into the unit to the test."""
    for key, slot in list(unit.slots.items()):
        if slot.here is None and slot.place is None:
            del unit.slots[key]
            slot.let_go()


def _is_inside(unit: Container, other: Container) -> bool:
    parent = unit.parent
    while parent is not None:
        if parent is other:
            return True
        parent = parent.parent
    return False


def _savepoint_session(maker: async_sessionmaker[Any], connection: AsyncConnection) -> Any:
    """Make a session on this connection, whatever the maker binds its sessions to."""
    binds = dict.fromkeys(maker.kw.get("binds") or (), connection)
    options: dict[str, Any] = {"bind": connection, "join_transaction_mode": "create_savepoint", "twophase": False}
    if binds:
        options["binds"] = binds
    session = maker(**options)
    if connection.dialect.name == "postgresql":
        event.listen(session.sync_session, "before_commit", _check_deferred_constraints)
    return session


def _check_deferred_constraints(session: Session) -> None:
    """Let a deferred constraint fail where the COMMIT would fail that never comes in a test (P4, P12)."""
    if session.in_nested_transaction():
        return
    session.flush()
    connection = session.connection()
    savepoint = connection.begin_nested()
    try:
        connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
    finally:
        # Not SET CONSTRAINTS ALL DEFERRED: that would defer also what is initially immediate.
        savepoint.rollback()
