"""What is known of an engine's connections: which are open, which are out, what runs on them and what failed.

It stands on public events, of the pool and of errors, and on the methods of the engine's dialect through which statements, BEGIN
and COMMIT pass. An engine is watched once, however many connects use it.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from greenlet import getcurrent  # type: ignore[import-untyped]
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool, Pool

from . import _drivers
from .errors import ContextClosedError, CursorClosedError

KEY = "context_sqla"


class Line:
    """The state of one connection of the driver, for as long as it is checked out."""

    __slots__ = (
        "__weakref__",
        "cancelled",
        "committing",
        "cursor",
        "driver",
        "ended",
        "expired",
        "failure",
        "keeps_task",
        "running",
        "sending",
    )

    def __init__(self, driver: Any) -> None:
        self.driver: Any = driver
        self.keeps_task: bool = _drivers.keeps_task(driver)
        self.running: dict[Any, Any] = {}  # statements, and what executes them
        self.failure: str | None = None  # a statement failed in this transaction, and how
        self.cancelled: bool = False  # ... because it was cancelled
        self.committing: bool = False  # a COMMIT was sent
        self.sending: bool = False  # ... and is not answered
        self.cursor: bool = False  # a server-side cursor was opened
        self.expired: str | None = None  # it was cut at a limit in time
        self.ended: str | None = None  # the unit cut this connection, and why

    def is_running(self) -> bool:
        """Return whether a statement is running; one whose end was kept from us by another listener's error has failed."""
        for context, executing in list(self.running.items()):
            if executing.dead:
                del self.running[context]
                self.failure = self.failure or "an error that an event listener replaced"
        return bool(self.running)

    def failed(self, error: BaseException) -> bool:
        """Note that a statement has failed in this transaction, and return whether it was cancelled."""
        cancelled = isinstance(error, asyncio.CancelledError)
        self.failure = self.failure or type(error).__name__
        self.cancelled = self.cancelled or cancelled
        return cancelled

    def restart(self) -> None:
        """Forget what happened in the transaction that ended."""
        self.failure = None
        self.cancelled = self.committing = self.sending = self.cursor = False


class Dial:
    """Open connections in tasks that `Watch.abort` can end without cancelling whoever waits for them."""

    def __init__(self, creator: Callable[..., Awaitable[Any]], watch: "Watch") -> None:
        self._creator = creator
        self._watch = watch

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        opening = self._creator(*args, **kwargs)
        thread = _drivers.thread_of(opening)
        if thread is not None:
            thread.daemon = True  # as SQLAlchemy does where it opens the connection itself
            self._watch.threads.add(thread)
        task = asyncio.ensure_future(opening)  # which an eager task begins at once
        self._watch.dialling.add(task)
        try:
            # A thread that is opening a file goes on, whatever is cancelled.
            return await (task if thread is None else asyncio.shield(task))
        except asyncio.CancelledError:
            # Whoever is cancelled takes nothing: what was, or will be, opened all the same has to be closed.
            if task.done():
                _discard_opened(task)
            else:
                self._watch.late.add(task)
                task.add_done_callback(self._watch.late.discard)
                task.add_done_callback(_discard_opened)
            waiting = asyncio.current_task()
            if task.cancelled() and waiting is not None and not waiting.cancelling():
                raise ConnectionAbortedError("the host was aborted while this connection was being opened") from None
            raise
        finally:
            self._watch.dialling.discard(task)


def _discard_opened(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is None:
        _drivers.discard(task.result())


class Watch:
    """The connections of one engine."""

    __slots__ = ("__weakref__", "_open", "_records", "dialling", "late", "retired", "threads")

    def __init__(self) -> None:
        self.threads: WeakSet[threading.Thread] = WeakSet()
        self.dialling: set[asyncio.Task[Any]] = set()  # connections that are being opened
        self.late: set[asyncio.Task[Any]] = set()  # ... for nobody any more
        self._open: dict[int, Any] = {}
        self._records: WeakSet[Any] = WeakSet()  # the pool's, of connections that are or were open
        self.retired: bool = False  # connections are closed as they come back

    def cut_all(self) -> None:
        """Cut every connection, in use or not."""
        for driver in self._drivers():
            _drivers.cut(driver)

    def abort(self) -> int:
        """Cut the connections in use and those being opened, discard the idle ones, and return how many there were."""
        for task in self.dialling:
            task.cancel()
        everything = self._open
        self._open = {id(dbapi): dbapi for record in self._in_use() if (dbapi := record.dbapi_connection) is not None}
        for key, dbapi in everything.items():
            (_drivers.cut if key in self._open else _drivers.discard)(dbapi.driver_connection)
        return len(everything) + len(self.dialling)

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._open)

    @property
    def out(self) -> int:
        """How many connections are in use."""
        return len(self._in_use())

    def forget(self) -> None:
        """Forget the connections, as they are."""
        self._open.clear()
        self._records.clear()

    def _in_use(self) -> list[Any]:
        return [record for record in self._records if record.in_use]

    def is_alive(self) -> bool:
        """Return whether a connection is open or being opened, or one of their threads has something to report."""
        return bool(self._open or self.dialling) or any(thread.is_alive() for thread in self.threads)

    def end(self) -> None:
        """End what is still open while its event loop still runs, threads included: they report to the loop."""
        for driver in self._drivers():
            _drivers.discard(driver)
        for thread in tuple(self.threads):
            if thread.is_alive():  # one whose opening was cancelled at once was never started
                thread.join(1)

    def drop_all(self) -> None:
        """Close every connection of an event loop that is gone."""
        for driver in self._drivers():
            _drivers.drop(driver)

    def _drivers(self) -> list[Any]:
        return [dbapi.driver_connection for dbapi in list(self._open.values())]

    def listen(self, engine: Engine) -> None:
        """Follow the connections of an engine."""
        for name, listener in (
            ("do_connect", self._dial),
            ("connect", self._connected),
            ("close", self._gone),
            ("close_detached", self._gone),
            ("checkin", self._checked_in),
            ("detach", self._gone),
        ):
            event.listen(engine, name, listener)
        if _was_used(engine.pool):  # its connections are noted as they come by
            event.listen(engine, "checkout", self._met)

    def _dial(self, dialect: Any, _record: Any, _cargs: Any, cparams: dict[str, Any]) -> None:
        creator = cparams.get("async_creator_fn") or _drivers.creator(dialect)
        if creator is not None and not isinstance(creator, Dial):
            cparams["async_creator_fn"] = Dial(creator, self)

    def _connected(self, dbapi: Any, record: Any) -> None:
        self._open[id(dbapi)] = dbapi
        self._records.add(record)

    def _met(self, _dbapi: Any, record: Any, _proxy: Any) -> None:
        self._records.add(record)

    def _gone(self, dbapi: Any, *_: Any) -> None:
        self._open.pop(id(dbapi), None)

    def _checked_in(self, dbapi: Any, record: Any) -> None:
        record.info.pop(KEY, None)
        # P7a: whatever went wrong before, an open transaction is never handed to the next request.
        if dbapi is not None and (self.retired or _drivers.in_transaction(dbapi.driver_connection)):
            record.invalidate()


def _was_used(pool: Pool) -> bool:
    """Return whether a pool may have connections already, as that of an application's own engine."""
    idle: Callable[[], int] | None = getattr(pool, "checkedin", None)
    return not isinstance(pool, NullPool) if idle is None else bool(idle() + pool.checkedout())  # type: ignore[attr-defined]


_watches: WeakKeyDictionary[Engine, Watch] = WeakKeyDictionary()
_wrapped: WeakSet[Any] = WeakSet()  # dialects


def watch(engine: AsyncEngine) -> Watch:
    """Return the watch of an engine; the first call begins it."""
    sync_engine = engine.sync_engine
    found = _watches.get(sync_engine)
    if found is None:
        found = _watches[sync_engine] = Watch()
        found.listen(sync_engine)
        _listen_to_connections(sync_engine)
        if sync_engine.dialect.name == "sqlite":
            event.listen(sync_engine, "begin", _begin_for_real)
            event.listen(sync_engine, "before_execute", _starting)
    return found


def line_of(connection: Connection) -> Line | None:
    """Return the state of a connection, None once it is closed, lost, or where its engine is not watched."""
    return None if connection.closed or connection.invalidated else _known(connection)


def line_of_new(connection: Connection) -> Line | None:
    """Return the state of a connection on which a transaction has begun, in two phases perhaps, of which no dialect tells."""
    line = line_of(connection)
    if line is None and connection.dialect in _wrapped and not (connection.closed or connection.invalidated):
        line = _note(connection)
    return line


def _listen_to_connections(engine: Engine) -> None:
    if engine.dialect in _wrapped:  # which is that of an engine with other options too
        return
    _wrapped.add(engine.dialect)
    survives = _drivers.survives_cancellation(engine.dialect.driver)

    def handle_error(context: ExceptionContext) -> Exception | None:
        return _failed(context, survives)

    event.listen(engine, "handle_error", handle_error)
    # No events of the engine: SQLAlchemy would join them to those of each connection, in each transaction anew.
    for name, around in (
        ("do_execute", _executing),
        ("do_executemany", _executing),
        ("do_execute_no_params", _executing),
        ("do_begin", _beginning),
        ("do_commit", _committing),
        ("do_rollback_to_savepoint", _rolling_back),
    ):
        setattr(engine.dialect, name, around(getattr(engine.dialect, name)))


def _starting(conn: Connection, clause: Any, multiparams: Any, params: Any, options: Any) -> None:
    """Note a statement that is on its way: aiosqlite makes its cursor in a thread; no commit may overtake it (P7a)."""
    if (line := _known(conn)) is not None:
        line.running[getcurrent()] = getcurrent()


def _executing(execute: Callable[..., None]) -> Callable[..., None]:
    def executing(*args: Any, **options: Any) -> None:
        context: Any = options.get("context") if options else args[-1]  # by name where a listener for do_execute tries again
        connection = getattr(context, "root_connection", None)
        line = None if connection is None else _note(connection)
        if line is None:
            execute(*args, **options)
            return
        here = getcurrent()
        if line.running:
            line.running.pop(here, None)
        line.running[context] = here
        if context.execution_options.get("stream_results"):
            line.cursor = True
        try:
            execute(*args, **options)
        except BaseException as error:  # noted here, for listeners may keep it from us
            line.failed(error)
            raise
        finally:
            line.running.pop(context, None)

    return executing


def _beginning(begin: Callable[[Any], None]) -> Callable[[Any], None]:
    def beginning(connection: Any) -> None:
        if (line := _known(connection)) is not None:
            line.restart()
        else:
            _note(connection)
        begin(connection)

    return beginning


def _committing(commit: Callable[[Any], None]) -> Callable[[Any], None]:
    def committing(connection: Any) -> None:
        line = _note(connection)
        if line is None:
            commit(connection)
            return
        line.committing = line.sending = not _drivers.is_closed(line.driver)
        try:
            commit(connection)
        finally:
            line.sending = False

    return committing


def _rolling_back(roll_back: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    def rolling_back(connection: Any, name: str) -> None:
        if (line := _note(connection)) is not None:
            line.failure = None
            line.cancelled = False
        roll_back(connection, name)

    return rolling_back


def _known(connection: Any) -> Line | None:
    try:
        line: Line | None = connection.info.get(KEY)
    except NotImplementedError:  # the connection on which SQLAlchemy gets to know the database is none of the pool's yet
        return None
    return line


def _note(connection: Any) -> Line | None:
    """Return the state of a connection on which something begins; the first time in a checkout it is made."""
    try:
        info = connection.info
    except NotImplementedError:
        return None
    line: Line | None = info.get(KEY)
    if line is None:
        pooled = connection.connection if isinstance(connection, Connection) else connection
        line = info[KEY] = Line(pooled.driver_connection)
    return line


def _failed(context: ExceptionContext, survives: bool) -> Exception | None:
    """Remember a failed statement (P4a), keep the connection of a cancelled one (P7), and name what a unit's end did (P10)."""
    connection = context.connection
    if connection is None:
        return None
    line = line_of(connection)
    if line is None:
        fetching = context.statement is None and context.execution_context is not None
        return _cursor_riddle() if fetching else None
    line.running.pop(context.execution_context or getcurrent(), None)
    if line.expired is not None:
        (context.sqlalchemy_exception or context.original_exception).add_note(line.expired)
        return None
    if context.statement is None and context.execution_context is None:
        return None  # BEGIN, COMMIT or ROLLBACK itself
    cancelled = line.failed(context.original_exception)
    if line.ended is not None:
        return None if cancelled else ContextClosedError(line.ended)
    if cancelled and survives and _drivers.will_roll_back(line.driver):
        context.is_disconnect = False
    return None


def _cursor_riddle() -> Exception:
    return CursorClosedError(
        "a server-side cursor was read after its transaction had ended: before the response's head its request commits; "
        "open the cursor in the body's generator, or say 'await keep_transaction(connect)' in the handler"
    )


def _begin_for_real(connection: Connection) -> None:
    """Send the BEGIN that the SQLite driver leaves out, unless the connection is in autocommit or somebody else sent it."""
    dbapi: Any = connection.connection.dbapi_connection
    if dbapi.isolation_level is not None and not _drivers.in_transaction(dbapi.driver_connection):
        connection.exec_driver_sql("BEGIN")
