"""A real browser for the tests of a page: headless Chromium, told what to do over its debugging protocol."""

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OPTIONS = ("--headless=new", "--disable-gpu", "--no-first-run", "--no-sandbox", "--remote-debugging-port=0", "about:blank")


def find() -> str | None:
    """Return the browser of this machine, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.problems: list[str] = []
        """What the browser complained of, and every request that was not for the page itself."""
        self.requests: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._numbers)
        await self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = await self._receive()
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    async def open(self, url: str) -> None:
        """Load a page."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        while (await self._receive()).get("method") != "Page.loadEventFired":
            pass

    async def show(self, *, width: int, scheme: str) -> None:
        """Take the size of a screen and a colour scheme."""
        mobile = width < 600
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile)
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def evaluate(self, expression: str) -> Any:
        """Return what an expression of JavaScript is worth on the page."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def screenshot(self) -> bytes:
        """Return the picture as a PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", captureBeyondViewport=True))["data"])

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await asyncio.wait_for(self._socket.recv(), 30))
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.problems.append(params["entry"]["text"])
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        return message


@contextlib.asynccontextmanager
async def browser(path: str) -> AsyncIterator[Page]:
    """Start a browser, and give its tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = (f"--user-data-dir={profile}", *_OPTIONS)
        process = await asyncio.create_subprocess_exec(path, *options, stderr=asyncio.subprocess.PIPE)
        assert process.stderr is not None
        try:
            said = ""
            while not (found := re.search(r"ws://([^/]+)/devtools", said)):
                line = (await asyncio.wait_for(process.stderr.readline(), 60)).decode()
                assert line, said
                said += line
            reading = asyncio.ensure_future(process.stderr.read())
            async with connect(await _tab(found[1]), max_size=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            await process.wait()
        await reading


async def _tab(address: str) -> str:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /json/list HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().rpartition(b"content-length:")[2].split(b"\r\n")[0])
        tabs = json.loads(await reader.readexactly(length))
    finally:
        writer.close()
    return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
