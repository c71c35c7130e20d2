"""A TCP proxy: the network between a client and a server, with the faults that networks have."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from .wire import Address

Mode = Literal["pass", "refuse", "hang"]


@dataclass
class Trap:
    """What happens once, to the connection on which the client sends ``pattern``."""

    pattern: bytes
    action: Literal["cut", "hold"]
    forward: bool
    #: Set when the pattern has come by (and, with ``forward``, the server has answered it).
    sprung: asyncio.Event = field(default_factory=asyncio.Event)
    #: Ends a "hold".
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Let the bytes that were held go on."""
        self.released.set()


class Proxy:
    """Forwards connections to ``target``; ``mode`` decides over what is forwarded from now on.

    ``pass``: everything. ``refuse``: new connections are reset. ``hang``: connections are accepted and kept, no byte moves,
    as behind a firewall that drops packets. ``delay`` holds up every piece, in either direction, by so many seconds.
    """

    def __init__(self, target: Address) -> None:
        self.target = target
        self.delay = 0.0
        self._mode: Mode = "pass"
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._traps: list[Trap] = []
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> Address:
        """Where clients connect to."""
        assert self._server is not None, "the proxy runs in `async with proxy(target)`"
        host, port = self._server.sockets[0].getsockname()[:2]
        return Address(host, port)

    @property
    def host(self) -> str:
        """The same as "host:port", as a ``DBConnect`` takes it."""
        return "{}:{}".format(*self.address)

    @property
    def mode(self) -> Mode:
        """What happens to the bytes."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "hang":
            self._flowing.clear()
        else:
            self._flowing.set()

    def cut(self) -> None:
        """Reset every connection that is open now."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    def cut_at(self, pattern: bytes, *, forward: bool = False) -> Trap:
        """Reset the first connection on which ``pattern`` (say, ``b"COMMIT"``) is sent.

        With ``forward`` the server receives and answers it first, and the answer is lost: the client is in doubt.
        """
        return self._set(Trap(pattern, "cut", forward))

    def hold_at(self, pattern: bytes, *, forward: bool = False) -> Trap:
        """Hold ``pattern``, or with ``forward`` the answer to it, until ``release()`` of the trap is called."""
        return self._set(Trap(pattern, "hold", forward))

    def disarm(self) -> None:
        """Forget the traps that nobody has stepped into."""
        self._traps.clear()

    def _set(self, trap: Trap) -> Trap:
        self._traps.append(trap)
        return trap

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, self.target.host, 0)

    async def stop(self) -> None:
        """Reset what is open and stop listening."""
        assert self._server is not None
        # What asyncio has accepted already, and hands to a task only now, would wait with nobody to cancel it.
        self._mode = "refuse"
        self._server.close()
        self.cut()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        upstream: asyncio.StreamWriter | None = None
        # A cancelled connection task ends quietly: asyncio would log its exception.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if self._mode != "refuse":
                await self._flowing.wait()
                source, upstream = await asyncio.open_connection(*self.target)
                self._writers.add(upstream)
                await self._pump_both(reader, writer, source, upstream)
        for end in filter(None, (writer, upstream)):
            self._writers.discard(end)
            end.transport.abort()
        self._tasks.discard(task)

    async def _pump_both(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        source: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        sprung: list[Trap] = []
        pumps = {
            asyncio.create_task(self._requests(reader, upstream, sprung)),
            asyncio.create_task(self._answers(source, writer, sprung)),
        }
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _requests(self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, sprung: list[Trap]) -> None:
        while data := await reader.read(65536):
            await self._pass()
            trap = next((trap for trap in self._traps if trap.pattern in data), None)
            if trap is not None:
                self._traps.remove(trap)
                if trap.forward:
                    sprung.append(trap)
                elif not await self._spring(trap):
                    return
            upstream.write(data)
            await upstream.drain()

    async def _answers(self, source: asyncio.StreamReader, writer: asyncio.StreamWriter, sprung: list[Trap]) -> None:
        while data := await source.read(65536):
            await self._pass()
            if sprung and not await self._spring(sprung.pop()):
                return
            writer.write(data)
            await writer.drain()

    async def _pass(self) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)
        await self._flowing.wait()

    async def _spring(self, trap: Trap) -> bool:
        """Do what the trap says; False if the connection is to be cut."""
        trap.sprung.set()
        if trap.action == "cut":
            return False
        await trap.released.wait()
        return True


@contextlib.asynccontextmanager
async def proxy(target: Address) -> AsyncIterator[Proxy]:
    """Run a proxy in front of ``target`` for the length of the block."""
    running = Proxy(target)
    await running.start()
    try:
        yield running
    finally:
        await running.stop()
