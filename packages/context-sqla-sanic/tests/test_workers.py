"""Sanic as it is run: a process that manages two workers."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

SERVED = Path(__file__).with_name("served.py")


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.02)


def notes(folder: Path, what: str) -> set[str]:
    """Return the pids of the workers that have left such a note."""
    return {path.name.split()[-1] for path in folder.glob(f"{what} *")}


async def post(url: str) -> httpx.Response:
    """Post over a connection of its own."""
    async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
        return await http.post(url)


async def serving(url: str, number: int, *, besides: Collection[str] = ()) -> set[str]:
    """Post until so many workers have answered, apart from those that are known; return their pids."""
    served: set[str] = set()
    async with asyncio.timeout(120):
        while len(served) < number:
            served |= {(await post(f"{url}/quick")).text} - set(besides)
    return served


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run the application; both workers have started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(sys.executable, SERVED, str(port), folder)
    try:
        await until(lambda: len(notes(folder, "started")) == 2)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def test_each_worker_commits_and_closes_its_connects_when_its_requests_are_done(ledger, tmp_path):
    """Two workers, each with its own engine: a request that is out at the stop commits, then each worker closes (P4, P15)."""
    noted = partial(notes, tmp_path)
    async with running(tmp_path) as (process, url):
        served = await serving(url, 2)
        rows = ledger.names().split()
        async with asyncio.timeout(120):
            slow = asyncio.create_task(post(f"{url}/slow"))
            await until(lambda: noted("arrived"))
            process.send_signal(signal.SIGTERM)
            await until(lambda: noted("stopping") >= noted("arrived"))
            still_open = noted("arrived") - noted("closed")
            (tmp_path / "go on").touch()
            answer = await slow
            await process.wait()

    assert served == noted("started")
    assert set(rows) == {"quick"}
    assert (answer.status_code, still_open) == (200, {answer.text})
    assert "slow again" in ledger.names()
    assert noted("closed") == noted("started")


async def test_killed_worker_takes_along_only_its_own_transaction(ledger, tmp_path):
    """A worker is killed in a request: what that wrote is gone, the other worker serves on, and so does one in its place (P7)."""
    async with running(tmp_path) as (process, url):
        before = await serving(url, 2)
        lost = asyncio.create_task(post(f"{url}/open"))
        await until(lambda: notes(tmp_path, "open"))
        [note] = tmp_path.glob("open *")
        _, worker, killed = note.name.split()
        os.kill(int(killed), signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await asyncio.wait_for(lost, 120)
        [other] = before - {killed}
        answer = await post(f"{url}/after")
        await post(f"{url}/restart/{worker}")
        [fresh] = await serving(url, 1, besides=before)
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 120)

    assert answer.text == other
    assert set(ledger.names().split()) == {"quick", "after"}
    assert notes(tmp_path, "closed") == {other, fresh}
