"""Ask one server what it is, over one kept connection: with asyncpg or with psycopg."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Protocol

from ._address import Address, Driver, Login, SecretError
from ._position import end_of_record
from ._tracker import Failure, Observation

# One row, the role evaluated once: a promotion between two of its columns makes none of them fail.
_PROBE = """
WITH me AS MATERIALIZED (SELECT pg_is_in_recovery() AS replica)
SELECT me.replica,
  (CASE WHEN me.replica THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END - '0/0')::bigint,
  CASE WHEN me.replica THEN (SELECT received_tli FROM pg_stat_wal_receiver WHERE status = 'streaming')
    ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END,
  (SELECT system_identifier FROM pg_control_system()),
  current_setting('default_transaction_read_only')::bool,
  (SELECT timeline_id FROM pg_control_checkpoint()),
  has_function_privilege('pg_catalog.pg_ls_waldir()', 'execute'),
  pg_size_bytes(current_setting('wal_segment_size'))
FROM me
"""
# The only figure that still names a timeline whose primary is dead and whose followers receive nothing.
_EVIDENCE = """
SELECT max(('x' || left(name, 8))::bit(32)::int) FROM pg_catalog.pg_ls_waldir()
WHERE name ~ '^[0-9A-F]{8}(\\.history|[0-9A-F]{16}$)'
"""
_APPLICATION = "context-sqla-hosts"
_NOT_THERE = ("08", "57P")
# libpq keeps the SQLSTATE of a refused login to itself, and psycopg has its text only: severity, two spaces, message.
_SEVERITY = ": FATAL:  "
_STATES = (
    ("the database system is", "57P03"),
    ("terminating connection", "57P01"),
    ("too many", "53300"),
    ("connection slots", "53300"),
    ("authentication", "28P01"),
    ("pg_hba.conf", "28000"),
    ("role", "28000"),
    ("database", "3D000"),
)
_KINDS = {"28": "login", "3D": "database", "42": "rights", "53": "full", "55": "busy"}


class Probe(Protocol):
    """One connection to one server. Whoever uses it sets the limits in time, and cuts it at the limit."""

    lost: Callable[[], None] | None

    def is_open(self) -> bool:
        """Return whether there is a connection that is not known to be dead."""
        ...

    async def open(self) -> None:
        """Connect."""
        ...

    async def fetch(self, sql: str) -> tuple[Any, ...]:
        """Return the only row."""
        ...

    def cut(self) -> None:
        """Drop the connection at once, without a word to the server; what runs on it fails."""
        ...


class AsyncpgProbe:
    """A probe with asyncpg."""

    def __init__(self, address: Address, login: Login) -> None:
        self.lost: Callable[[], None] | None = None
        self._address = address
        self._login = login
        self._connection: Any = None

    def is_open(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def open(self) -> None:
        import asyncpg  # type: ignore[import-untyped]

        login = self._login
        # Without a cache of statements it works through pgbouncer's transaction pooling too.
        options: dict[str, Any] = {"statement_cache_size": 0, "server_settings": {"application_name": _APPLICATION}}
        if login.ssl is not None:
            options["ssl"] = login.ssl
        options.update(login.options)
        where = {"host": self._address.name, "port": self._address.port}
        who = {"user": login.user, "password": login.secret(), "database": login.database}
        self._connection = connection = await asyncpg.connect(**where, **who, **options)
        connection.add_termination_listener(self._terminated)

    def _terminated(self, connection: Any) -> None:
        if connection is self._connection and self.lost is not None:
            self.lost()

    async def fetch(self, sql: str) -> tuple[Any, ...]:
        return tuple(await self._connection.fetchrow(sql))

    def cut(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            cut(connection)


class PsycopgProbe:
    """A probe with psycopg; between two statements the loop watches the socket for it."""

    def __init__(self, address: Address, login: Login) -> None:
        self.lost: Callable[[], None] | None = None
        self._address = address
        self._login = login
        self._connection: Any = None
        self._watched: int | None = None

    def is_open(self) -> bool:
        return self._connection is not None and not self._connection.closed

    async def open(self) -> None:
        import psycopg

        login = self._login
        options: dict[str, Any] = {"prepare_threshold": None, "application_name": _APPLICATION, **login.options}
        if login.ssl is not None:
            options["sslmode"] = login.ssl
        options |= {"host": self._address.name, "port": self._address.port}
        options |= {"user": login.user, "password": login.secret(), "dbname": login.database}
        self._connection = await psycopg.AsyncConnection.connect(autocommit=True, **options)
        self._watch()

    async def fetch(self, sql: str) -> tuple[Any, ...]:
        self._ignore()
        row = await (await self._connection.execute(sql)).fetchone()
        if self._connection is not None:
            self._watch()
        return tuple(row)

    def cut(self) -> None:
        connection, self._connection = self._connection, None
        self._ignore()
        if connection is not None:
            cut(connection)

    def _watch(self) -> None:
        descriptor = self._watched = self._connection.pgconn.socket
        asyncio.get_running_loop().add_reader(descriptor, self._readable)

    def _ignore(self) -> None:
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = None

    def _readable(self) -> None:
        self._ignore()  # a server that is idle says nothing, unless it is about to end
        if self.lost is not None:
            self.lost()


def cut(connection: Any) -> None:
    """Drop a connection of either driver: what runs on it fails at once."""
    if hasattr(connection, "terminate"):
        if not connection.is_closed():
            connection.terminate()
        return
    busy = connection.lock.locked()
    with contextlib.suppress(Exception):  # an operation of libpq on a connection that is closed already
        with socket.socket(fileno=os.dup(connection.pgconn.socket)) as copy:
            copy.shutdown(socket.SHUT_RDWR)
    if not busy:
        connection.pgconn.finish()


def make_probe(address: Address, login: Login) -> Probe:
    """Make a probe with the driver that was asked for, or with the one that is installed.

    Raises:
        DriverError: it is not installed, or neither is.
    """
    wanted: tuple[Driver, ...] = ("asyncpg", "psycopg") if login.driver is None else (login.driver,)
    for driver in wanted:
        with contextlib.suppress(ImportError):
            __import__(driver)
            return AsyncpgProbe(address, login) if driver == "asyncpg" else PsycopgProbe(address, login)
    from context_sqla.errors import DriverError  # not before: it brings SQLAlchemy along

    raise DriverError(f"no driver for the monitor: pip install 'context-sqla-hosts[{wanted[0]}]'")


async def observe(probe: Probe, *, look_for_evidence: bool) -> Observation:
    """Connect if need be, and ask the server what it is.

    Args:
        probe: the connection.
        look_for_evidence: ask a replica for the highest timeline among the files of its log.
    """
    if not probe.is_open():
        await probe.open()
    replica, lsn, timeline, identifier, read_only, control, may_look, segment = await probe.fetch(_PROBE)
    evidence = None
    if replica and may_look and look_for_evidence:
        (evidence,) = await probe.fetch(_EVIDENCE)
    if lsn is not None and not replica:
        lsn = end_of_record(lsn, segment)
    return Observation(replica, lsn, timeline, identifier, read_only, control, evidence)


def sqlstate_of(exc: BaseException) -> str:
    """Return the SQLSTATE of a driver's error, "" where it has none."""
    state = getattr(exc, "sqlstate", None)
    if state is None and type(exc).__module__.startswith("psycopg"):
        _, said, reason = str(exc).rpartition(_SEVERITY)  # of a server, which is there
        return next((state for text, state in _STATES if text in reason), "XX000") if said else ""
    return state if isinstance(state, str) else ""


def classify(exc: BaseException) -> Failure:
    """Return what the failure of a probe means."""
    state = sqlstate_of(exc)
    return _by_state(state) if state else _by_type(exc)


def _by_state(state: str) -> Failure:
    if state == "57P03":
        return Failure("starting", hard=True)
    if state.startswith(_NOT_THERE):
        return Failure("closed", hard=True)
    return Failure(_KINDS.get(state[:2], "error"), hard=False)


def _by_type(exc: BaseException) -> Failure:
    if isinstance(exc, TimeoutError):
        return Failure("timeout", hard=False)
    if isinstance(exc, SecretError):
        return Failure("password", hard=False)
    if isinstance(exc, ConnectionRefusedError) or "refused" in str(exc):
        return Failure("refused", hard=True)
    if isinstance(exc, socket.gaierror):
        return Failure("name", hard=False)
    if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
        return Failure("files", hard=False)  # that is our own lack
    if isinstance(exc, OSError) or type(exc).__name__ in ("OperationalError", "InterfaceError", "InternalClientError"):
        return Failure("closed", hard=True)
    return Failure("error", hard=False)
