"""Engines that follow the monitor: their errors reach it, and their connections end where the host's role does."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeAlias
from weakref import WeakKeyDictionary, ref

from context_sqla import DBConnect
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine

from ._failures import is_host_failure, is_read_only
from ._monitor import Hosts
from ._probe import cut
from .errors import NoHostError

Creator: TypeAlias = Callable[..., Awaitable[Any]]

_HOST = "context_sqla_hosts.host"
_NEW = "context_sqla_hosts.new"
_PAUSE = 0.05  # between two attempts to connect where the monitor has not noticed yet


class Following:
    """A connect whose connections are cut where their host is dead or fenced; the connect is kept weakly.

    Args:
        connect: whose connections they are.
        writes: they are for writing, so that those to a demoted host are cut as well.
    """

    def __init__(self, connect: DBConnect[Any], *, writes: bool) -> None:
        self.writes: bool = writes
        self._connect = ref(connect)

    def abort(self, host: str) -> int:
        """Cut the connections to a host, and return how many there were."""
        connect = self._connect()
        return 0 if connect is None else connect.abort_host(host)


class Chooses(Protocol):
    """What a bound engine asks of a choice."""

    hosts: Hosts
    writes: bool

    async def choose(self) -> str:
        """Return a host."""
        ...

    def allows(self, host: str) -> bool:
        """Return whether a connection to it may still be used."""
        ...


def watch_engine(engine: AsyncEngine, hosts: Hosts, host: str, *, writes: bool) -> None:
    """Let the errors of an engine with one host reach the monitor."""

    def handle_error(context: ExceptionContext) -> None:
        _report(hosts, host, context, writes)

    def reporting(creator: Creator) -> Creator:
        async def dial(*args: Any, **kwargs: Any) -> Any:
            try:
                return await creator(*args, **kwargs)
            except Exception as exc:
                hosts.report(host, exc)
                raise

        return dial

    event.listen(engine.sync_engine, "handle_error", handle_error)
    _intercept(engine, reporting)


def bind_engine(engine: AsyncEngine, choice: Chooses, *, attempts_for: float = 5.0) -> AsyncEngine:
    """Let an engine of plain SQLAlchemy connect to the host that a choice names, and leave hosts that it no longer allows.

    New connections go to the chosen host; one that the pool has kept is checked when it is taken out, and replaced where its host
    does not qualify any more. The host in the engine's URL is not used. Bind it before it is used; asyncpg and psycopg.

    Args:
        engine: from `create_async_engine`; it is returned.
        choice: `primary(hosts)` or `replica(hosts, ...)`.
        attempts_for: seconds for which connecting is tried again; nothing was sent by then.
    """
    bound = _Bound(engine, choice, attempts_for)
    _bound[engine] = bound
    choice.hosts.attach(bound)
    return engine


class _Bound:
    """The connections of one bound engine, and to which host each of them goes."""

    def __init__(self, engine: AsyncEngine, choice: Chooses, attempts_for: float) -> None:
        self.writes: bool = choice.writes
        self._choice = choice
        self._attempts_for = attempts_for
        self._hosts_of: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        _intercept(engine, lambda creator: partial(self._dial, creator))
        for name, listener in (
            ("connect", self._connected),
            ("checkout", self._checked_out),
            ("handle_error", self._failed),
        ):
            event.listen(engine.sync_engine, name, listener)

    def abort(self, host: str) -> int:
        """Cut every connection to a host."""
        found = [connection for connection, its_host in list(self._hosts_of.items()) if its_host == host]
        for connection in found:
            self._hosts_of.pop(connection, None)
            cut(connection)
        return len(found)

    async def _dial(self, creator: Creator, *args: Any, **kwargs: Any) -> Any:
        """Connect to the chosen host, and again where that fails or the host was changed meanwhile: nothing was sent yet."""
        hosts = self._choice.hosts
        deadline = hosts.clock() + self._attempts_for
        while True:
            host = await self._choice.choose()
            name, port = hosts.address(host)
            limit = asyncio.timeout(max(4 * hosts.timeout, 1.0))
            try:
                async with limit:
                    connection = await creator(*args, **{**kwargs, "host": name, "port": port})
            except Exception as exc:
                hosts.report(host, exc)
                if not is_host_failure(exc) or hosts.clock() >= deadline:
                    raise
                await asyncio.sleep(_PAUSE)
                continue
            self._hosts_of[connection] = host
            if self._choice.allows(host) or hosts.clock() >= deadline:
                return connection
            cut(connection)

    def _connected(self, dbapi: Any, record: Any) -> None:
        record.info[_HOST] = self._hosts_of.get(dbapi.driver_connection)
        record.info[_NEW] = True

    def _checked_out(self, _dbapi: Any, record: Any, _proxy: Any) -> None:
        host = record.info.get(_HOST)
        # A new one was checked when it was made, and is cut if its host has died since: SQLAlchemy tries only twice.
        if not record.info.pop(_NEW, False) and (host is None or not self._choice.allows(host)):
            raise DisconnectionError(f"{host} no longer qualifies")

    def _failed(self, context: ExceptionContext) -> None:
        connection = context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        if (host := connection.info.get(_HOST)) is not None:
            _report(self._choice.hosts, host, context, self.writes)


def _report(hosts: Hosts, host: str, context: ExceptionContext, writes: bool) -> None:
    if isinstance(context.original_exception, NoHostError | asyncio.CancelledError):
        return
    error = context.sqlalchemy_exception or context.original_exception
    if context.is_disconnect or is_host_failure(error) or is_host_failure(context.original_exception):
        hosts.report(host, ConnectionError() if context.is_disconnect else context.original_exception)
    if writes and is_read_only(context.original_exception):
        context.is_disconnect = True  # it was demoted behind a proxy: this connection and the pool's others are of no use


def _intercept(engine: AsyncEngine, wrap: Callable[[Creator], Creator]) -> None:
    """Put something around what opens an engine's connections; once, for SQLAlchemy passes the same parameters every time."""
    wrapped: list[Creator] = []

    def do_connect(dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
        if not wrapped:
            wrapped.append(wrap(_creator(dialect, parameters)))
        parameters["async_creator_fn"] = wrapped[0]

    event.listen(engine.sync_engine, "do_connect", do_connect)


def _creator(dialect: Any, parameters: dict[str, Any]) -> Creator:
    """Return what opens the driver's connections: another listener's, or the driver itself."""
    found: Creator | None = parameters.get("async_creator_fn")
    if found is not None:
        return found
    dbapi = dialect.loaded_dbapi
    opens: Creator = dbapi.asyncpg.connect if dialect.driver == "asyncpg" else dbapi.psycopg.AsyncConnection.connect
    return opens


_bound: WeakKeyDictionary[AsyncEngine, _Bound] = WeakKeyDictionary()
