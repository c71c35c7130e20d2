"""What Patroni says, as a second opinion: it may forbid a primary, and never names one."""

import asyncio
import contextlib
import json
import logging
import random
import re
import ssl
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

from ._address import Address
from ._tracker import Claim

logger = logging.getLogger("context_sqla.hosts")

_LIMIT = 256 * 1024  # bytes of an answer
_OK = 200
_IDENTIFIER = re.compile("[0-9]{1,20}")
_NO_ANSWER = (OSError, ValueError, IndexError, RecursionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)


class Told(Protocol):
    """What is told, and how often; a monitor."""

    interval: float
    timeout: float
    stale_after: float
    jitter: float

    def clock(self) -> float:
        """Return the time."""
        ...

    def advised(self, claims: Mapping[str, Claim]) -> None:
        """Take what Patroni says."""
        ...


class Hint:
    """Ask the members of a Patroni cluster, again and again, which of them leads.

    Args:
        members: the URL of each host's REST interface.
    """

    def __init__(self, members: Mapping[str, str]) -> None:
        self._members = {host: _parse(url) for host, url in members.items()}
        self._claims: dict[str, tuple[Claim, float]] = {}

    async def run(self, told: Told) -> None:
        """Ask for ever. Whatever goes wrong is no opinion; who gives none is logged."""
        silent: list[str] = []
        while True:
            before, silent_before = set(self._claims), silent
            answered = await asyncio.gather(*(self._ask(host, url, told) for host, url in self._members.items()))
            silent = [host for host, answers in zip(self._members, answered, strict=True) if not answers]
            if silent != silent_before:
                logger.warning("Patroni does not answer for these: %s", ", ".join(silent) or "none any more")
            if before != set(self._claims):
                logger.info("Patroni says that these lead: %s", ", ".join(self._claims) or "none")
            told.advised({host: claim for host, (claim, _) in self._claims.items()})
            await asyncio.sleep(told.interval * random.uniform(1 - told.jitter, 1 + told.jitter))  # noqa: S311  # no secret

    async def _ask(self, host: str, url: SplitResult, told: Told) -> bool:
        answer = await _get(url, "/primary", told.timeout)
        if answer is None:  # what it said last holds for a while: a leader that is dead had a lower timeline than the next one
            if host in self._claims and told.clock() - self._claims[host][1] > told.stale_after:
                del self._claims[host]
            return False
        status, body = answer
        self._claims.pop(host, None)
        timeline, identifier = body.get("timeline"), str(body.get("database_system_identifier", ""))
        if status == _OK and isinstance(timeline, int) and _IDENTIFIER.fullmatch(identifier):
            self._claims[host] = (Claim(timeline, int(identifier)), told.clock())
        return True


async def patroni_members(*urls: str, timeout: float = 2.0) -> dict[str, str]:
    """Ask Patroni for the members of its cluster: each host, "address:port", and the URL of its REST interface.

    `members = await patroni_members("http://db1:8008")`, then `Hosts(list(members), patroni=members, ...)`.

    Args:
        urls: of the REST interfaces of some members; the first that answers is believed.
        timeout: seconds for each.

    Raises:
        MonitorError: none of them answers.
    """
    for url in map(_parse, urls):
        status, body = await _get(url, "/cluster", timeout) or (0, {})
        members, found = body.get("members"), dict[str, str]()
        for member in members if status == _OK and isinstance(members, list) else ():
            with contextlib.suppress(KeyError, TypeError, ValueError):  # one that is only starting says less
                at = urlsplit(str(member["api_url"]))
                found[str(Address(str(member["host"]), int(member["port"])))] = f"{at.scheme}://{at.netloc}"
        if found:
            return found
    from .errors import MonitorError  # not before: it brings SQLAlchemy along

    raise MonitorError("no member of the Patroni cluster says who its members are; name the hosts yourself, or try again")


def _parse(url: str) -> SplitResult:
    with contextlib.suppress(ValueError):  # its text may have the password
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0:
            return parts
    raise ValueError("a URL of Patroni's REST interface is 'http://host:8008', without a password: nothing asked needs one")


async def _get(url: SplitResult, path: str, timeout: float) -> tuple[int, dict[str, Any]] | None:
    """Return status and body of an answer, None where there is no whole one in time."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            secure = ssl.create_default_context() if url.scheme == "https" else None
            reader, writer = await asyncio.open_connection(url.hostname, url.port or 8008, ssl=secure, limit=_LIMIT)
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {url.netloc}\r\nConnection: close\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            body = await _rest(reader)
        found = json.loads(body)
        return int(head.split(None, 2)[1]), found if isinstance(found, dict) else {}
    except _NO_ANSWER:
        return None
    finally:
        if writer is not None:
            writer.transport.abort()


async def _rest(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while (piece := await reader.read(_LIMIT)) and len(body) <= _LIMIT:
        body += piece
    return body
