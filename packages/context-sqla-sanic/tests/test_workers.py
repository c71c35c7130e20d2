"""Sanic as it is run: a process that manages two workers."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import httpx

SERVED = Path(__file__).with_name("served.py")


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.02)


async def test_each_worker_commits_and_closes_its_connects_when_its_requests_are_done(ledger, tmp_path):
    """Two workers, each with its own engine: a request that is out at the stop commits, then each worker closes (P4, P15)."""

    def noted(what: str) -> set[str]:
        return {path.name.split()[1] for path in tmp_path.glob(f"{what} *")}

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(sys.executable, SERVED, str(port), tmp_path)
    try:
        await until(lambda: len(noted("started")) == 2)
        served = set()
        async with asyncio.timeout(120), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            while len(served) < 2:
                async with httpx.AsyncClient(base_url=http.base_url, trust_env=False) as other:  # a connection of its own
                    served.add((await other.post("/quick")).text)
            rows = ledger.names().split()
            slow = asyncio.create_task(http.post("/slow", timeout=120))
            await until(lambda: noted("arrived"))
            process.send_signal(signal.SIGTERM)
            await until(lambda: noted("stopping") >= noted("arrived"))
            still_open = noted("arrived") - noted("closed")
            (tmp_path / "go on").touch()
            answer = await slow
        await asyncio.wait_for(process.wait(), 120)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()

    assert served == noted("started")
    assert set(rows) == {"quick"}
    assert (answer.status_code, still_open) == (200, {answer.text})
    assert "slow again" in ledger.names()
    assert noted("closed") == noted("started")
