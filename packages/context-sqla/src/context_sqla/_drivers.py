"""What SQLAlchemy leaves to the driver: cut a connection, ask for its state, name the package to install.

Everything takes the driver's own connection object and asks it only for what it has: an unknown driver loses a refinement, never
correctness.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from operator import attrgetter
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from .errors import DriverError

# With the lowest versions that are tested (the test group of the workspace), where there are such.
_PACKAGES = {
    "aiomysql": "aiomysql",
    "aioodbc": "aioodbc",
    "aiosqlite": "aiosqlite>=0.20",
    "asyncmy": "asyncmy",
    "asyncpg": "asyncpg>=0.32",
    "oracledb": "oracledb",
    "psycopg": "psycopg[binary]>=3.3.6",
}
_ASYNC_DRIVERS = {
    "mariadb": "mariadb+asyncmy",
    "mssql": "mssql+aioodbc",
    "mysql": "mysql+asyncmy",
    "oracle": "oracle+oracledb_async",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
}
_PSYCOPG = "psycopg.AsyncConnection.connect"
_CONNECT = {"aiosqlite": "aiosqlite.connect", "asyncpg": "asyncpg.connect", "psycopg": _PSYCOPG, "psycopg_async": _PSYCOPG}
# After a cancelled statement these leave a connection whose transaction can be rolled back (ran); others do not.
_SURVIVORS = frozenset({"aiosqlite", "asyncpg", "psycopg", "psycopg_async"})
# These await the answer to a COMMIT without a timeout of their own (read in their code).
_KEEPS_TASK = frozenset({"aiosqlite.core", "asyncpg.connection"})


def parse(given: str | URL) -> URL:
    """Parse a URL and import its driver, or raise a `DriverError` that says what to install or to write."""
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        # P20: SQLAlchemy quotes the whole string, password and all.
        raise ValueError("this is not a database URL; write for example 'postgresql+asyncpg://user@host/database'") from None
    _load(url)
    return url


def _load(url: URL) -> None:
    backend = url.get_backend_name()
    try:
        dialect = url.get_dialect().get_async_dialect_cls(url)
    except (NoSuchModuleError, ArgumentError, ValueError) as exc:
        raise DriverError(f"{url.drivername!r} is not a driver that SQLAlchemy knows{_hint(backend)}") from exc
    if not dialect.is_async:
        raise DriverError(f"{url.drivername!r} is not an asynchronous driver{_hint(backend)}")
    try:
        dialect.import_dbapi()
    except ImportError as exc:
        driver = str(dialect.driver)
        package = _PACKAGES.get(driver.removesuffix("_async"), exc.name or driver)
        raise DriverError(f"the driver of {url.drivername!r} is not installed: pip install '{package}'") from exc


def survives_cancellation(driver: str) -> bool:
    """Return whether a connection of this driver can be rolled back after a statement was cancelled (P7)."""
    return driver in _SURVIVORS


def keeps_task(connection: Any) -> bool:
    """Return whether a driver is known never to cancel the task that awaits its COMMIT, as a timeout of asyncio would."""
    return type(connection).__module__ in _KEEPS_TASK


def creator(dialect: Any) -> Callable[..., Awaitable[Any]] | None:
    """Return the function with which this dialect opens connections, None where it is not known."""
    path = _CONNECT.get(dialect.driver)
    found: Callable[..., Awaitable[Any]] | None = None if path is None else attrgetter(path)(dialect.loaded_dbapi)
    return found


def thread_of(connection: Any) -> threading.Thread | None:
    """Return the thread in which an aiosqlite connection works."""
    thread = getattr(connection, "_thread", connection)
    return thread if isinstance(thread, threading.Thread) else None


def in_transaction(connection: Any) -> bool:
    """Return whether the server has a transaction open on this connection, as far as the driver knows."""
    ask = getattr(connection, "is_in_transaction", None)  # asyncpg
    if ask is not None:
        try:
            return bool(ask())
        except AttributeError:  # it was cut, and has no protocol any more to ask: nobody may have it
            return True
    if hasattr(connection, "pgconn"):  # psycopg
        return int(connection.pgconn.transaction_status) in (1, 2, 3)
    if hasattr(connection, "get_transaction_status"):  # aiomysql, asyncmy
        return bool(connection.get_transaction_status())
    try:
        return bool(getattr(connection, "in_transaction", False))  # aiosqlite
    except ValueError:
        return False


def will_roll_back(connection: Any) -> bool:
    """Return whether a rollback would reach the server after a cancelled statement."""
    if is_closed(connection):
        return False
    if hasattr(connection, "pgconn"):
        # psycopg before 3.3.9: cancelled again while it was ending the statement, it leaves the connection busy (1).
        return int(connection.pgconn.transaction_status) != 1
    # asyncpg: a BEGIN that was cancelled may still be carried out, and SQLAlchemy sends no rollback for it.
    return not hasattr(connection, "is_in_transaction") or in_transaction(connection)


def is_locked(connection: Any) -> bool:
    """Return whether the driver itself tells that something is running on this connection: psycopg does."""
    lock = getattr(connection, "lock", None)
    return lock is not None and bool(lock.locked())


async def is_fetching(connection: Any) -> bool:
    """Ask an asyncpg connection whether rows of a cursor are on their way; it has no word for it but a refusal."""
    if is_closed(connection) or not hasattr(connection, "is_in_transaction"):
        return False
    try:
        await connection.execute("SELECT 1")
    except Exception as exc:  # every other error is met again by whoever uses the connection next
        return "another operation is in progress" in str(exc)
    return False


def backend_pid(connection: Any) -> int:
    """Return the number of the server process behind this connection, 0 where the driver does not know."""
    if hasattr(connection, "get_server_pid"):  # asyncpg
        return int(connection.get_server_pid())
    return int(getattr(getattr(connection, "pgconn", None), "backend_pid", 0))


def is_closed(connection: Any) -> bool:
    """Return whether the driver knows that this connection is dead."""
    closed = getattr(connection, "is_closed", None) or getattr(connection, "closed", False)
    return bool(closed() if callable(closed) else closed)


def leaves_doubt(exc: BaseException) -> bool:
    """Return whether this error leaves open what became of a COMMIT that had been sent."""
    if not isinstance(exc, DBAPIError):
        return True
    state = getattr(exc.orig, "sqlstate", None) or getattr(exc.orig, "pgcode", None)
    if isinstance(state, str):
        return state.startswith(("08", "57P")) or state == "40003"
    return exc.connection_invalidated


def cut(connection: Any) -> bool:
    """End this connection now, without a word to the server: what runs on it fails at once.

    Never a cancel request: a cancelled wait for a synchronous replica is acknowledged without being replicated (P7).

    Returns:
        Whether the connection is dead; False where there is no socket to cut and only the statement was interrupted.
    """
    if is_closed(connection):
        return True
    if hasattr(connection, "terminate"):  # asyncpg
        connection.terminate()
    elif hasattr(connection, "pgconn"):  # psycopg
        with contextlib.suppress(OSError):
            _shut(connection.pgconn.socket)
    elif hasattr(connection, "interrupt"):  # aiosqlite; its interrupt() never awaits
        with contextlib.suppress(StopIteration, ValueError):
            connection.interrupt().send(None)
        return False
    elif hasattr(connection, "close"):  # aiomysql, asyncmy: close() drops the transport
        closing = connection.close()
        if closing is not None:
            closing.close()
    return True


def discard(connection: Any) -> None:
    """End a connection that nobody uses, and free what it holds."""
    if hasattr(connection, "pgconn"):
        connection.pgconn.finish()
    elif thread_of(connection) is not None:
        _stop(connection)
    else:
        cut(connection)


def drop(connection: Any) -> None:
    """Close a connection whose event loop is gone: nothing may be awaited any more (P15)."""
    if hasattr(connection, "pgconn"):
        connection.pgconn.finish()
    elif hasattr(connection, "terminate"):
        with contextlib.suppress(RuntimeError):
            connection.terminate()
        transport = getattr(connection, "_transport", None)
        if (sock := getattr(transport, "_sock", None)) is not None:
            sock.close()
            with contextlib.suppress(AttributeError):
                transport._sock = None  # type: ignore[union-attr]
    elif (thread := thread_of(connection)) is not None:
        _stop(connection)
        thread.join()


def _stop(connection: Any) -> None:
    """Let the thread of an aiosqlite connection close its file and end, without awaiting it."""
    if hasattr(connection, "stop"):
        connection.stop()
        return
    # aiosqlite before 0.22: close() asks the thread to close before it awaits the answer, and to end once it is given up.
    closing = connection.close()
    with contextlib.suppress(StopIteration, ValueError, RuntimeError):
        closing.send(None)
    closing.close()


def _shut(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        copy.shutdown(socket.SHUT_RDWR)


def _hint(backend: str) -> str:
    name = _ASYNC_DRIVERS.get(backend)
    if name is None:
        return ""
    return f": write '{name}://...' and pip install '{_PACKAGES[name.partition('+')[2].removesuffix('_async')]}'"
