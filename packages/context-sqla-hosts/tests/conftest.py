"""A monitor that is told what servers say, instead of asking them."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from context_sqla_hosts import Hosts
from context_sqla_hosts._tracker import Failure, Observation

CLUSTER = 7_000_000_000


class Listener:
    """What a poller is to its monitor."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.state = "unknown"
        self.doubted = False
        self.asked: list[asyncio.Future[None]] = []

    def wake(self, *, doubt: bool = False, anew: bool = False) -> None:
        self.doubted = self.doubted or doubt

    def probed(self) -> "asyncio.Future[None]":
        self.asked.append(asyncio.get_running_loop().create_future())
        return self.asked[-1]


class Told(Hosts):
    """The monitor without its connections and with a clock that stands still; the rest is the real one."""

    def __init__(self, hosts: list[str], **options: Any) -> None:
        self.time = 1_000.0
        super().__init__(hosts, **options)
        self._watch.clock = lambda: self.time

    def start(self) -> None:
        self._watch.loop = asyncio.get_running_loop()
        self._watch.pollers = {host: Listener(host) for host in self._addresses}  # type: ignore[misc]

    def primary_says(self, host: str, lsn: int = 100, timeline: int = 1, *, ago: float = 0.0, **more: Any) -> None:
        """Let a server say that it is a primary, in answer to a probe that was sent so long ago."""
        self.tell(host, Observation(False, lsn, timeline, CLUSTER, **more), ago)

    def replica_says(self, host: str, lsn: int = 100, timeline: int | None = 1, *, ago: float = 0.0, **more: Any) -> None:
        """Let a server say that it is a replica."""
        self.tell(host, Observation(True, lsn, timeline, CLUSTER, **more), ago)

    def fails(self, host: str, kind: str = "refused", *, hard: bool = True) -> None:
        """Let a probe fail."""
        self.tell(host, Failure(kind, hard))

    def tell(self, host: str, said: Observation | Failure, ago: float = 0.0) -> None:
        """Let a probe come back, and answer who waits for it."""
        poller = self._watch.pollers[self.key(host)]
        poller.doubted = False
        self._watch.answered(poller, said, self.time - ago)
        for future in poller.asked:  # type: ignore[attr-defined]
            if not future.done():
                future.set_result(None)

    def tell_all(self, lsn: int = 100, replayed: int | None = None, timeline: int = 1) -> None:
        """Let the first be the primary and the others its replicas."""
        first, *others = self._addresses
        self.primary_says(first, lsn, timeline)
        for host in others:
            self.replica_says(host, lsn if replayed is None else replayed, timeline)
        self.primary_says(first, lsn, timeline)


@pytest.fixture(name="hosts")
async def _hosts() -> AsyncIterator[Told]:
    """Three hosts, none of which has said anything yet."""
    async with Told(["a", "b", "c"]) as hosts:
        yield hosts


@pytest.fixture(name="told")
def _told() -> type[Told]:
    """What makes a monitor with other options."""
    return Told


@pytest.fixture(name="unused_port")
def _unused_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
