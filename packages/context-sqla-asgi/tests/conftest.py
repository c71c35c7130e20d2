"""The server's side of a request, message by message."""

import asyncio
from typing import Any

import pytest


class Server:
    """The server's side of one request: what it hands in, and what it is given, each with the rows that are committed by then."""

    def __init__(self, ledger: Any, *messages: dict) -> None:
        self.ledger = ledger
        self.messages = list(messages)
        self.gone = asyncio.Event()
        self.log: list[str] = []

    async def receive(self) -> dict:
        if self.messages:
            return self.messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        kind = message["type"].removeprefix("http.response.")
        what = message.get("status", message.get("body", b""))
        text = what.decode() if isinstance(what, bytes) else str(what)
        self.log.append(f"{kind} {text}{'+' if message.get('more_body') else ''} [{self.ledger.names()}]")

    async def call(self, app, method: str = "GET", path: str = "/", **scope) -> list[str]:
        """Make the request and return the log."""
        scope = {"type": "http", "method": method, "path": path, "headers": [], "asgi": {"version": "3.0"}} | scope
        try:
            await app(scope, self.receive, self.send)
        except BaseException as error:
            self.log.append(f"raised {type(error).__name__} [{self.ledger.names()}]")
            raise
        return self.log


@pytest.fixture(name="server")
def _server(ledger: Any) -> Server:
    return Server(ledger)
