"""How many requests the sidecar answers in a second of CPU time, beside a trivial application on uvicorn, in the same run.

    python integration-tests/hosts/throughput.py

It needs Linux, a PostgreSQL (`PG_BINDIR`, or the wheel), and for the comparison uvicorn, uvloop and httptools. What is counted is
the time of the server's process, so that other work on the machine disturbs it little; the rounds are interleaved.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.postgres import free_port

from hosts.cluster import DATABASE, MONITOR, PASSWORD, Node, cluster

CONNECTIONS = 32
_TICKS = os.sysconf("SC_CLK_TCK")
_TRIVIAL = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"node1"})
"""


class Server(NamedTuple):
    """A process that serves.

    Args:
        process: the one.
        port: where.
    """

    process: asyncio.subprocess.Process
    port: int

    def cpu(self) -> float:
        """Return the seconds of CPU time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def megabytes(self) -> float:
        """Return how much memory it has."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


class _Client(asyncio.Protocol):
    """One connection that asks again as soon as it has an answer."""

    def __init__(self, request: bytes) -> None:
        self.request, self.count, self.wrong = request, 0, 0
        self.transport: asyncio.Transport | None = None
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        data = self._rest = self._rest + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = data[:end].lower()
        length = int(head.rpartition(b"content-length: ")[2].split(b"\r\n")[0])
        if len(data) < end + 4 + length:
            return
        self._rest = b""
        self.count += 1
        self.wrong += not data.startswith(b"HTTP/1.1 200")
        if self.transport is not None:
            self.transport.write(self.request)


async def requests_per_cpu_second(server: Server, path: str, seconds: float) -> float:
    """Ask a server over many connections, and return the figure.

    Raises:
        AssertionError: an answer was not 200.
    """
    loop = asyncio.get_running_loop()
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode()
    clients = [(await loop.create_connection(lambda: _Client(request), "127.0.0.1", server.port))[1] for _ in range(CONNECTIONS)]
    await asyncio.sleep(0.2)
    counted, used, until = sum(client.count for client in clients), server.cpu(), time.monotonic() + seconds
    await asyncio.sleep(until - time.monotonic())
    figure = (sum(client.count for client in clients) - counted) / max(server.cpu() - used, 1 / _TICKS)
    for client in clients:
        assert client.transport is not None
        client.transport.abort()
    assert not any(client.wrong for client in clients)
    return figure


@contextlib.asynccontextmanager
async def sidecar(nodes: Sequence[Node], *arguments: str, variables: Mapping[str, str] | None = None) -> AsyncIterator[Server]:
    """Start the sidecar for some nodes, as people do, and wait until it is ready."""
    environ = {
        **os.environ,
        "pg_status__hosts": ",".join(node.host for node in nodes),
        "pg_status__pg_port": ",".join(str(node.port) for node in nodes),
        "pg_status__pg_user": MONITOR,
        "pg_status__pg_password": PASSWORD,
        "pg_status__pg_database": DATABASE,
        "pg_status__log_level": "info",
        **(variables or {}),
    }
    command = [sys.executable, "-m", "context_sqla_hosts", "serve", "--listen", "127.0.0.1:0", *arguments]
    process = await asyncio.create_subprocess_exec(*command, env=environ, stderr=asyncio.subprocess.PIPE)
    async with _ended(process):
        assert process.stderr is not None
        said = b""
        while not (found := re.search(rb"http://127\.0\.0\.1:(\d+)", said)):
            line = await process.stderr.readline()
            assert line, said
            said += line
        reading = asyncio.ensure_future(process.stderr.read())
        yield Server(process, int(found[1]))
        process.send_signal(signal.SIGTERM)
        said += await reading
        assert PASSWORD.encode() not in said


@contextlib.asynccontextmanager
async def uvicorn(code: str, *arguments: str) -> AsyncIterator[Server]:
    """Serve an application on uvicorn."""
    port = free_port()
    program = f"{code}\nimport sys, uvicorn\nuvicorn.main(sys.argv[1:])"
    options = ["--port", str(port), "--log-level", "warning", "--no-access-log", *arguments, "__main__:app"]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, *options)
    async with _ended(process):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            await asyncio.sleep(0.05)
        yield Server(process, port)
        process.send_signal(signal.SIGTERM)


@contextlib.asynccontextmanager
async def _ended(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    try:
        yield
        await asyncio.wait_for(process.wait(), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def compare(nodes: Sequence[Node], *, rounds: int, seconds: float, everything: bool = True) -> dict[str, float]:
    """Return the median figure of each server and path, and the memory of the servers."""
    async with contextlib.AsyncExitStack() as stack:
        ours = await stack.enter_async_context(sidecar(nodes))
        fast = await stack.enter_async_context(uvicorn(_TRIVIAL, "--loop", "uvloop", "--http", "httptools"))
        cases = {"sidecar, /master": (ours, "/master"), "uvicorn (uvloop, httptools), trivial": (fast, "/")}
        if everything:
            plain = await stack.enter_async_context(uvicorn(_TRIVIAL, "--loop", "asyncio", "--http", "h11"))
            paths = ("/replica", "/replica?lag_ms=60000&min_lsn=0/1", "/hosts", "/metrics", "/")
            cases |= {f"sidecar, {path}": (ours, path) for path in paths}
            cases |= {"uvicorn (asyncio, h11), trivial": (plain, "/")}
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, (server, path) in cases.items():
                found[name].append(await requests_per_cpu_second(server, path, seconds))
        memory = {f"{name.rsplit(',', 1)[0]}, MB": server.megabytes() for name, (server, _) in cases.items()}
        return {name: median(figures) for name, figures in found.items()} | memory


async def main() -> None:
    """Print the table."""
    async with cluster(replicas=2) as nodes:
        for name, figure in (await compare(nodes, rounds=3, seconds=2)).items():
            print(f"{name:<44} {figure:>10,.0f}")


if __name__ == "__main__":
    asyncio.run(main())
