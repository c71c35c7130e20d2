"""Read your own writes: note where a commit has left the log, and let the visitor's next reads be at least there."""

import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from context_sqla import DBConnect
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from ._floor import Floor, Visit, current, later, visit_of
from ._monitor import Hosts
from ._position import Position, end_of_record
from ._token import Tokens

logger = logging.getLogger("context_sqla.hosts")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAME, _PATH, _SITES, _SECONDS = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", r"[!-:<-~]+", "lax|strict|none", "[0-9]+"
_WROTE = "context_sqla_hosts.wrote"
_HAS_WRITTEN = text("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
# The insert position, and after the commit: the write position and the flush position may lie before the commit's own record.
_POSITION = text(
    "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint,"
    " ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int,"
    " pg_size_bytes(current_setting('wal_segment_size'))"
)


class ReadYourWrites:
    """Let what a visitor has written be visible to that visitor's later reads, on whichever replica they land.

    After each commit that wrote, the position in the log goes to the visitor as a signed cookie and header. With the next request
    it comes back, and `at_least(hosts)` chooses a replica that is there already.

    Args:
        hosts: the monitor.
        connects: the connects for writing, whose commits count.
        keys: secrets of 16 bytes or more; the first signs, all are accepted.
        max_age: seconds for which a position is remembered. Replicas that are further behind show old data after that.
        cookie: its name, None for no cookie.
        header: the name of the header, in both directions; None for no header.
        secure: send the cookie over HTTPS only.
        same_site: the cookie's attribute.
        path: the cookie's attribute.

    Raises:
        ValueError: something that cannot stand in a header, or a weak key.
    """

    def __init__(
        self,
        hosts: Hosts,
        *connects: DBConnect[Any],
        keys: Sequence[str | bytes],
        max_age: int = 60,
        cookie: str | None = "context-sqla-lsn",
        header: str | None = "X-Context-SQLA-LSN",
        secure: bool = True,
        same_site: Literal["lax", "strict", "none"] = "lax",
        path: str = "/",
    ) -> None:
        self.hosts: Hosts = hosts
        self.cookie: str | None = cookie
        self.header: str | None = header
        self._tokens = Tokens(keys, max_age)
        for option, value, allowed in (
            ("cookie", cookie or "-", _NAME),
            ("header", header or "-", _NAME),
            ("path", path, _PATH),
            ("same_site", same_site, _SITES),
            ("max_age", max_age, _SECONDS),
        ):
            if not re.fullmatch(allowed, str(value)):
                raise ValueError(f"{option}={value!r} cannot stand in a header")
        site = same_site.capitalize()
        self._attributes = f"; Max-Age={max_age}; Path={path}; HttpOnly; SameSite={site}" + ("; Secure" if secure else "")
        for connect in connects:
            connect.before_commit.append(self._before_commit)
            connect.committed.append(self._committed)

    @contextmanager
    def visit(self, *, cookie: str | None = None, header: str | None = None) -> Iterator[Visit]:
        """Make everything in a block one visit: for frameworks without ASGI, and for workers.

        Args:
            cookie: the request's whole `Cookie` header.
            header: the request's header of the name `header`, or a token that came another way.
        """
        tokens = _cookies(cookie, self.cookie) if cookie and self.cookie else []
        if header:
            tokens.append(header.strip())
        floor: Floor | None = None
        for token in tokens:
            found = self._read(token)
            floor = later(floor, found) if found is not None else floor
        visit = Visit(self.hosts, floor, current.get())
        reset = current.set(visit)
        try:
            yield visit
        finally:
            current.reset(reset)

    def token(self, visit: Visit) -> str | None:
        """Return the token that tells what this visit wrote, None where it wrote nothing."""
        floor = None if visit.wrote is None else visit.needs()
        return None if floor is None else self._tokens.sign(floor, self.hosts.snapshot().system_identifier, time.time())

    def headers(self, visit: Visit) -> list[tuple[str, str]]:
        """Return the headers to add to the response: after the commit, before the head leaves."""
        token = self.token(visit)
        found: list[tuple[str, str]] = []
        if token is not None and self.cookie is not None:
            found.append(("Set-Cookie", f"{self.cookie}={token}{self._attributes}"))
        if token is not None and self.header is not None:
            found.append((self.header, token))
        return found

    def _read(self, token: str) -> Floor | None:
        cluster = self.hosts.snapshot().system_identifier
        if cluster is None:  # just started: nothing can be verified, and nothing be promised of any replica
            return "primary"
        floor, verdict = self._tokens.read(token, cluster, time.time())
        self.hosts.metrics.add("tokens_total", verdict=verdict)
        return floor

    async def _before_commit(self, session: AsyncSession) -> None:
        """Note whether this transaction has written; what is pending is sent first."""
        if visit_of(self.hosts) is None or not session.in_transaction():
            return
        try:
            await session.flush()
            session.info[_WROTE] = (await session.execute(_HAS_WRITTEN)).scalar_one()
        except Exception:
            session.info[_WROTE] = True  # the commit will tell; if it succeeds, assume that there was something to commit
            raise

    async def _committed(self, session: AsyncSession, host: str) -> None:
        """Take the position after the commit; where that fails, the visitor's reads go to the primary for a while."""
        visit = visit_of(self.hosts)
        if not session.info.pop(_WROTE, False) or visit is None:
            return
        floor: Floor = "primary"
        try:
            lsn, timeline, segment = (await session.execute(_POSITION)).one()
            floor = Position(timeline, end_of_record(lsn, segment))
        except Exception as exc:
            logger.warning("The position after a commit on %s is unknown: %s", host, type(exc).__name__)
        self.hosts.metrics.add("positions_total", outcome="unknown" if floor == "primary" else "taken")
        visit.raise_to(floor)


class ReadYourWritesMiddleware:
    """Carry the positions of a `ReadYourWrites` in the cookies and headers of an ASGI application.

    It stands outside of the adapter's middleware, so that the commit comes before the head: add it last.

    Args:
        app: the application.
        writes: what to carry.
    """

    def __init__(self, app: ASGIApp, writes: ReadYourWrites) -> None:
        self.app: ASGIApp = app
        self.writes: ReadYourWrites = writes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        cookie = "; ".join(_fields(scope, "cookie"))
        header = next(iter(_fields(scope, self.writes.header or "")), None)
        with self.writes.visit(cookie=cookie, header=header) as visit:

            async def send_with_token(message: Message) -> None:
                if message["type"] == "http.response.start" and message["status"] >= 200:
                    added = [
                        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.writes.headers(visit)
                    ]
                    if added:
                        message = {**message, "headers": [*message.get("headers", ()), *added]}
                await send(message)

            await self.app(scope, receive, send_with_token)


def _fields(scope: Scope, name: str) -> list[str]:
    wanted = name.lower().encode("latin-1")
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == wanted]


def _cookies(header: str, name: str) -> list[str]:
    pairs = (pair.partition("=") for pair in header.split(";"))
    return [value.strip().strip('"') for key, _, value in pairs if key.strip() == name]
