"""The server's process, seen from the run: start it, ask it, stop it, kill it."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from support.wire import Address

#: For what a busy machine does in seconds.
DEADLINE = 60.0
_ROOT = Path(__file__).parents[1]
_numbers = itertools.count(1)


class ServerError(RuntimeError):
    """The server's process did not start, or did not answer."""


class ServerProcess:
    """One process of ``faults.server``; ``async with`` starts it, and kills it if it is still there at the end."""

    def __init__(self, settings: Mapping[str, Any], log: Path) -> None:
        self.name = f"app-{next(_numbers)}"
        self._settings = {**settings, "name": self.name}
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._up: asyncio.Future[str]
        self.address: Address | None = None
        #: What it said at its end.
        self.last_words: dict[str, Any] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Start it, and return when it listens.

        Raises:
            ServerError: it did not.
        """
        self._up = asyncio.get_running_loop().create_future()
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "faults.server"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=2**24,
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
                start_new_session=True,
            )
        self._reading = asyncio.create_task(self._read())
        self._write(self._settings)
        try:
            async with asyncio.timeout(DEADLINE):
                host, _, port = (await self._up).rpartition(":")
        except (TimeoutError, ServerError):
            await self.kill()
            raise ServerError(f"the server did not start:\n{self._log.read_text(errors='replace')[-4000:]}") from None
        self.address = Address(host, int(port))

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Send a command and return its answer.

        Raises:
            ServerError: the process has ended, or the command failed.
        """
        if self.address is None:
            raise ServerError("the server's process is not up")
        number = next(_numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._write({"number": number, "do": do, **arguments})
        async with asyncio.timeout(DEADLINE):
            return await answer

    async def terminate(self) -> int:
        """Send SIGTERM, and return the exit status."""
        assert self._process is not None
        self.address = None
        self._send(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE):
            return await self._ended()

    async def kill(self) -> None:
        """Send SIGKILL, and return when it is gone."""
        self.address = None
        if self._process is not None:
            self._send(signal.SIGKILL)
            await self._ended()

    def _send(self, number: signal.Signals) -> None:
        """Send a signal past asyncio, which looks for the exit status first, and may take it away from its own watcher."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                os.kill(self._process.pid, number)

    async def _ended(self) -> int:
        assert self._process is not None
        if self._reading is not None:
            await asyncio.wait({self._reading})
        return await self._process.wait()

    def _write(self, value: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if "address" in said:
                self._up.set_result(said["address"])
            elif "left" in said:
                self.last_words = said
            elif (answer := self._answers.pop(said["number"], None)) is not None and not answer.done():
                if "error" in said:
                    answer.set_exception(ServerError(said["error"]))
                else:
                    answer.set_result(said["answer"])
        gone = ServerError("the server's process has ended")
        for waiting in [self._up, *self._answers.values()]:
            if not waiting.done():
                waiting.set_exception(gone)
        self._answers.clear()
