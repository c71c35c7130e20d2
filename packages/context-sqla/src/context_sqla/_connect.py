"""DBConnect: one database and role, its engines (one per host and event loop) and its session makers."""

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar, Unpack, cast, overload

from sqlalchemy import select
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from . import _context, _drivers
from ._callbacks import awaited
from ._loops import Loops, LoopState, Member
from ._settle import hold, logger
from .errors import ContextSqlaError, ForeignLoopError, UnavailableError

S = TypeVar("S", bound=AsyncSession)
_HOSTLESS = "local"
_MAY_BE_NONE = ("handler_timeout", "warn_held_after")
_numbers = itertools.count(1)
# A name, an IPv6 address in brackets or without; a port where that is clear. Compiled where it is needed: imports pay for it.
_PART = r"[^\x00-\x20\x7f/@:\[\]]"
_HOST = rf"({_PART}+|\[(?:{_PART}|:)+\]|{_PART}*:{_PART}*:(?:{_PART}|:)*)(?::([1-9][0-9]{{0,4}}))?"
_choosing: ContextVar[tuple[set[Any], ...]] = ContextVar("context_sqla_choosing", default=())  # whose handlers are running here


class PoolStatus(NamedTuple):
    """The pool of a connect's current host, in the running event loop.

    Args:
        host: the host; None before the first one is known.
        size: connections that the pool keeps, 0 where it keeps none.
        checked_out: connections in use.
        overflow: connections open beyond `size`.
        waiting: tasks that wait for a connection, None where the pool does not tell.
    """

    host: str | None
    size: int
    checked_out: int
    overflow: int
    waiting: int | None


class ConnectOptions(TypedDict, total=False):
    """The keyword options of `DBConnect`."""

    name: str | None
    check_failed_transaction: bool
    cleanup_timeout: float
    commit_timeout: float
    drain_timeout: float
    idle_host_grace: float
    handler_timeout: float | None
    warn_held_after: float | None


class DBConnect(Generic[S]):
    """One database in one role: makes its engines lazily, keeps them per host and event loop, makes its sessions.

    Args:
        engine_creator: takes a host, returns an `AsyncEngine`; called lazily.
        session_maker_creator: takes that engine, returns an `async_sessionmaker`.
        host: the host of new sessions until `change_host`.
        before_create_session_handler: `async (connect) -> host | None`, awaited before every session. The host that it returns
            serves that one session; None means `host`, which it may have changed (P13).
        name: what errors and log lines call this connect; never a URL (P20).
        check_failed_transaction: look, before a commit, whether a statement whose error was swallowed has aborted the
            transaction (P4a).
        cleanup_timeout: seconds for a rollback or close, and for statements that are still running when their unit ends.
        commit_timeout: seconds for a COMMIT that was sent; then its connection is cut and the outcome is in doubt (P7).
        drain_timeout: seconds that `close()` waits for units that are still running.
        idle_host_grace: seconds after its last use for which the engine of a host that is not current is kept.
        handler_timeout: seconds for the handler, then `UnavailableError`.
        warn_held_after: seconds after which a transaction that is still open is logged with its request (P16).
    """

    def __init__(
        self,
        engine_creator: Callable[[str], AsyncEngine],
        session_maker_creator: Callable[[AsyncEngine], async_sessionmaker[S]],
        host: str | None = None,
        before_create_session_handler: Callable[["DBConnect[S]"], Awaitable[str | None]] | None = None,
        *,
        name: str | None = None,
        check_failed_transaction: bool = True,
        cleanup_timeout: float = 5,
        commit_timeout: float = 30,
        drain_timeout: float = 30,
        idle_host_grace: float = 1,
        handler_timeout: float | None = None,
        warn_held_after: float | None = None,
    ) -> None:
        self.host: str | None = host
        number = next(_numbers)
        self.context_key: str = f"context_sqla:{number}"
        self.name: str = str(name or f"db{number}")
        self.before_create_session_handler: Callable[[DBConnect[S]], Awaitable[str | None]] | None = before_create_session_handler
        self.check_failed_transaction: bool = check_failed_transaction
        self.cleanup_timeout: float = cleanup_timeout
        self.commit_timeout: float = commit_timeout
        self.drain_timeout: float = drain_timeout
        self.idle_host_grace: float = idle_host_grace
        self.handler_timeout: float | None = handler_timeout
        self.warn_held_after: float | None = warn_held_after
        self.engine_created: list[Callable[[AsyncEngine, str], None]] = []
        self.before_commit: list[Callable[[S], Awaitable[Any]]] = []
        self.committed: list[Callable[[S, str], Awaitable[Any]]] = []
        self._engine_creator = engine_creator
        self._session_maker_creator = session_maker_creator
        self._adopted: async_sessionmaker[S] | None = None
        self._loops = Loops()
        _check(self)

    def __repr__(self) -> str:
        return f"<DBConnect {self.name!r} host={_shown(self.host)!r}>"

    @overload
    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        session_class: type[S],
        host: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        before_create_session_handler: "Callable[[DBConnect[S]], Awaitable[str | None]] | None" = None,
        **options: Unpack[ConnectOptions],
    ) -> "DBConnect[S]": ...

    @overload
    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        host: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        before_create_session_handler: "Callable[[DBConnect[AsyncSession]], Awaitable[str | None]] | None" = None,
        **options: Unpack[ConnectOptions],
    ) -> "DBConnect[AsyncSession]": ...

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        session_class: type[Any] = AsyncSession,
        host: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        before_create_session_handler: Any = None,
        **options: Unpack[ConnectOptions],
    ) -> "DBConnect[Any]":
        """Make a connect from a database URL, with `expire_on_commit=False` unless told otherwise.

        Args:
            url: for example `postgresql+asyncpg://user:password@db1/app` or `sqlite+aiosqlite:///app.db`.
            session_class: the user's own subclass of `AsyncSession`.
            host: "name" or "name:port"; replaces that of the URL.
            engine_options: for `create_async_engine`.
            session_options: for `async_sessionmaker`.
            before_create_session_handler: see `DBConnect`.
            options: the keyword options of `DBConnect`.

        Raises:
            DriverError: the driver is unknown, not asynchronous or not installed.
            ValueError: the host is empty.
        """
        parsed = _drivers.parse(url)
        own = _host_of(parsed)
        name = options.setdefault("name", _name_of(parsed))
        if host is not None or parsed.host:
            _check_host(own if host is None else host, repr(name))
            _with_host(parsed, host or own, name)  # a wrong one is told here, and not by the first request
        settings = dict(session_options or {})
        settings.setdefault("expire_on_commit", False)
        settings.setdefault("class_", session_class)

        def create_engine(wanted: str) -> AsyncEngine:
            target = parsed if wanted == own else _with_host(parsed, wanted, name)
            return create_async_engine(target, **dict(engine_options or {}))

        def create_maker(engine: AsyncEngine) -> async_sessionmaker[Any]:
            return async_sessionmaker(engine, **settings)

        return cls(create_engine, create_maker, own if host is None else host, before_create_session_handler, **options)

    @classmethod
    def from_sessionmaker(cls, maker: async_sessionmaker[S], **options: Unpack[ConnectOptions]) -> "DBConnect[S]":
        """Make a connect over an engine that the application already has; `close()` leaves that engine open.

        Args:
            maker: its session maker, bound to an `AsyncEngine`.
            options: the keyword options of `DBConnect`.

        Raises:
            ValueError: the session maker is not bound to an `AsyncEngine`.
        """
        engine = getattr(maker, "kw", {}).get("bind")
        if not isinstance(engine, AsyncEngine):
            raise ValueError("from_sessionmaker needs an async_sessionmaker that is bound to an AsyncEngine")
        options.setdefault("name", _name_of(engine.url))
        connect = cls(lambda _: engine, lambda _: maker, _host_of(engine.url), **options)
        connect._adopted = maker
        return connect

    async def connect(self, host: str) -> None:
        """Point to a host with a new engine and session maker; what is in flight finishes on the old ones (P13).

        Raises:
            ValueError: the host is empty.
        """
        _check_host(host, self)
        here = self._here()
        fresh = self._make(host)
        if (old := here.members.get(host)) is not None:
            here.retire(old, self.cleanup_timeout)
        self._point(here, fresh)

    async def change_host(self, host: str) -> None:
        """Let new sessions go to another host; those in flight finish where they are (P13).

        A host that was in use within `idle_host_grace` keeps its engine and its connections. An engine that cannot be made
        leaves the old host in place.

        Raises:
            ValueError: the host is empty.
        """
        _check_host(host, self)
        here = self._here()
        if host == self.host and host in here.members:
            return
        self._point(here, here.members.get(host) or self._make(host))

    async def session_maker(self) -> async_sessionmaker[S]:
        """Return the session maker of the current host, made at the first call.

        Raises:
            ValueError: there is no host.
        """
        return cast("async_sessionmaker[S]", self._member().maker)

    async def create_session(self) -> S:
        """Ask the handler for a host and return a new session, which belongs to the caller.

        Raises:
            ValueError: there is no host.
            UnavailableError: the handler took longer than `handler_timeout`.
        """
        host = await self._choose_host() if self.before_create_session_handler is not None else None
        session: S = self._member(host).maker()
        return session

    async def close(self) -> None:
        """Wait for the units that are still running, then close every connection; the connect can be used again (P15).

        Units have `drain_timeout` to end. Connections that are out after that, or that a test holds, are closed when they
        come back.

        Raises:
            ContextSqlaError: called inside a unit that has a session of this connect.
        """
        unit = _context.current.get()
        while unit is not None:
            if not unit.joinable and unit.holds(self.context_key):
                raise ContextSqlaError(f"{self!r}: close() inside a unit that uses it would wait for itself; call it at shutdown")
            unit = unit.outer
        here = self._loops.find()
        if here is None:
            return
        if not await here.drained(self.drain_timeout):
            logger.warning("%r: closed while %d units were still running", self, len(here.active))
        await here.shut(self.cleanup_timeout)

    async def ping(self, timeout: float = 1.0) -> None:
        """Ask the database for an answer, for a readiness probe (P16).

        Args:
            timeout: seconds for connecting and answering.

        Raises:
            UnavailableError: no answer in time, or an error, which is the cause.
            ValueError: there is no host.
        """
        reached: list[Any] = []

        async def probe() -> None:
            member = self._member(await self._choose_host())
            async with member.engine.connect() as connection:
                reached.append((await connection.get_raw_connection()).driver_connection)
                await connection.execute(select(1))

        task = hold(_quietly(probe()))
        try:
            await asyncio.wait((task,), timeout=timeout)
        finally:
            if not task.done():
                for driver in reached:
                    _drivers.cut(driver)
                if not reached:
                    task.cancel()
        if not task.done():
            raise UnavailableError(f"{self!r}: no answer within {timeout:g} s", retry_after=1)
        error = task.result()
        if isinstance(error, (ValueError, TypeError, ContextSqlaError)):
            raise error
        if error is not None:
            raise UnavailableError(f"{self!r}: {type(error).__name__}", retry_after=1) from error

    def pool_status(self) -> PoolStatus:
        """Return the state of the current host's pool (P16); nothing is opened for it."""
        here = self._loops.find()
        member = here.members.get(self.host) if here is not None and self.host is not None else None
        if member is None:
            return PoolStatus(_shown(self.host), 0, 0, 0, None)
        pool: Any = member.engine.sync_engine.pool
        size = pool.size() if hasattr(pool, "size") else 0
        overflow = max(0, pool.overflow()) if hasattr(pool, "overflow") else 0
        queue = getattr(getattr(pool, "_pool", None), "_queue", None)
        getters = getattr(queue, "_getters", None)
        waiting = None if getters is None else sum(not getter.done() for getter in getters)
        return PoolStatus(_shown(self.host), size, member.watch.out, overflow, waiting)

    def abort_host(self, host: str) -> int:
        """Cut every connection to a host that is dead or hung, and return how many there were (P13).

        What runs on them fails at once instead of waiting for an answer that will not come.
        """
        _check_host(host, self)
        return self._loops.abort(host)

    # For the rest of the core

    async def _choose_host(self) -> str | None:
        """Ask the handler which host the next session shall have."""
        handler = self.before_create_session_handler
        if handler is None:
            return None
        self._refuse_own_handler()
        mine: set[Any] = {self}  # emptied at the end: a task that the handler has started may ask later
        token = _choosing.set((*_choosing.get(), mine))
        limit = asyncio.timeout(self.handler_timeout)
        try:
            async with limit:
                host: str | None = await awaited(handler(self), f"{self!r}: before_create_session_handler")
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise UnavailableError(f"{self!r}: its handler took longer than {self.handler_timeout:g} s", retry_after=1) from exc
        finally:
            _choosing.reset(token)
            mine.clear()
        if host is not None:
            _check_host(host, f"{self!r}: its before_create_session_handler")
        return host

    def _refuse_own_handler(self) -> None:
        """Raise where this runs inside the handler: its session would wait for itself, or ask for the next one without end."""
        if any(self in connects for connects in _choosing.get()):
            raise ContextSqlaError(f"{self!r}: its before_create_session_handler asked for a session of the connect itself")

    def _member(self, host: str | None = None, here: LoopState | None = None) -> Member:
        """Return the engine of a host, by default the current one, in the running loop; never awaits (P13)."""
        here = here or self._here()
        host = host or self.host
        if host is None:
            raise ValueError(f"{self!r} has no host: pass host= or call 'await connect.change_host(host)'")
        member = here.members.get(host)
        if member is None:
            member = self._make(host)
            here.add(member)
        if len(here.members) > 1:
            member.chosen = here.loop.time()
            here.sweep_later(self)
        return member

    def _here(self, loop: asyncio.AbstractEventLoop | None = None) -> LoopState:
        return self._loops.here(self.cleanup_timeout, loop)

    def _make(self, host: str) -> Member:
        """Make engine and maker of a host; nothing is registered yet, so an error leaves everything as it was."""
        if self._adopted is not None and self._loops.elsewhere():
            raise ForeignLoopError(
                f"{self!r}: its engine was adopted and is in use in another event loop; make the connect with from_url() or "
                "with two factories, which make an engine per loop"
            )
        engine = self._engine_creator(host)
        if not isinstance(engine, AsyncEngine):
            raise TypeError(f"{self!r}: engine_creator must return an AsyncEngine, not {type(engine).__name__}")
        maker = self._session_maker_creator(engine)
        if not isinstance(maker, async_sessionmaker):
            raise TypeError(f"{self!r}: session_maker_creator must return an async_sessionmaker, not {type(maker).__name__}")
        member = Member(host, engine, maker, adopted=self._adopted is not None)
        for hook in tuple(self.engine_created):
            hook(engine, host)
        return member

    def _point(self, here: LoopState, member: Member) -> None:
        here.add(member)
        member.chosen = here.loop.time()
        if (old := here.members.get(self.host or "")) is not None:
            old.chosen = here.loop.time()
        self.host = member.host
        here.sweep_later(self)


async def _quietly(probe: Any) -> Exception | None:
    try:
        await probe
    except Exception as exc:
        return exc
    return None


def _check(connect: DBConnect[Any]) -> None:
    """Tell what cannot work where it is written, and not in the first request."""
    for function in (connect._engine_creator, connect._session_maker_creator, connect.before_create_session_handler or repr):
        if not callable(function):
            raise TypeError(f"{connect!r}: the creators and the handler are functions, not {type(function).__name__}")
    for option in ("cleanup_timeout", "commit_timeout", "drain_timeout", "idle_host_grace", "handler_timeout", "warn_held_after"):
        seconds = getattr(connect, option)
        if not ((isinstance(seconds, int | float) and seconds >= 0) or (seconds is None and option in _MAY_BE_NONE)):
            raise ValueError(f"{connect!r}: {option} is a number of seconds, not {seconds!r}")
    if connect.host is not None:
        _check_host(connect.host, connect)


def _check_host(host: object, whose: object) -> None:
    if not isinstance(host, str):
        raise TypeError(f"{whose}: a host is a string, not {type(host).__name__} (is an 'await' missing?)")
    if not host.strip():
        raise ValueError(f"{whose}: a host must not be empty")


def _shown(host: str | None) -> str | None:
    """Return a host as it may be shown: one that is a URL without its password (P20)."""
    return host if host is None else re.sub(r"//.*@", "//***@", host)


def _name_of(url: URL) -> str | None:
    """Return the database, unless the URL was parsed at the wrong "/" and it holds a part of the password (P20)."""
    return url.database if url.database and "@" not in url.database else None


def _host_of(url: URL) -> str:
    if not url.host:
        return _HOSTLESS
    if not url.port:
        return url.host
    return f"[{url.host}]:{url.port}" if ":" in url.host else f"{url.host}:{url.port}"


def _with_host(url: URL, host: str, name: str | None) -> URL:
    """Replace the host of a URL by "name", "name:port", "[v6]" or "[v6]:port"."""
    if url.get_backend_name() == "sqlite":
        raise ValueError(f"{name!r}: an SQLite database has no host that another could replace")
    found = re.fullmatch(_HOST, host)
    port = int(found[2] or 0) if found is not None else 0
    if found is None or port > 65535:
        given = "a URL" if "/" in host or "@" in host else repr(host)  # P20: a URL is not repeated
        raise ValueError(f"{name!r}: a host is 'name' or 'name:port', not {given}")
    target = url.set(host=found[1].strip("[]"))
    return target.set(port=port) if port else target
