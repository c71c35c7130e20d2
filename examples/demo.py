"""What the examples share: serve an application, or make its requests over real HTTP and compare the answers."""

import argparse
import asyncio
import contextlib
import json
import secrets
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

HOST = "127.0.0.1"


def main(app: Any) -> None:
    """Serve the application until Ctrl-C; with `--check` only as long as the requests take."""
    parser = argparse.ArgumentParser(description="Serve the example.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--check", action="store_true", help="make the requests, print what came, exit 0 or 1")
    options = parser.parse_args()
    if options.check:
        sys.exit(check(app))
    listening = bind(options.port)
    address = f"http://{HOST}:{listening.getsockname()[1]}"
    print(f"Serving on {address}; Ctrl-C ends it. Try, in another terminal:\n")
    print(f"  curl -i -X POST '{address}/users?name=Ada'   # 201; the second time 409")
    print(f"  curl '{address}/users'")
    print(f"  curl '{address}/stats'\n", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        _server(app).run(sockets=[listening])


def _server(app: Any) -> Any:
    if isinstance(app, AiohttpServer):
        return app
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="warning"))


class AiohttpServer:
    """aiohttp's own server, with the two things of uvicorn's that are needed here."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.should_exit = False

    def run(self, sockets: list[socket.socket]) -> None:
        """Serve until `should_exit`."""
        asyncio.run(self._run(sockets[0]))

    async def _run(self, listening: socket.socket) -> None:
        from aiohttp import web

        runner = web.AppRunner(self.app, access_log=None)
        await runner.setup()
        try:
            await web.SockSite(runner, listening).start()
            while not self.should_exit:
                await asyncio.sleep(0.05)
        finally:
            await runner.cleanup()


def check(app: Any) -> int:
    """Serve the application on a free port, make its requests, and return 0 if every answer was the one expected."""
    listening = bind(0)
    server = _server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    client = Client(HOST, listening.getsockname()[1])
    try:
        make_requests(client)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
    if thread.is_alive():
        client.mismatches.append("the server did not end")
    print(f"\n{client.seen} answers, {len(client.mismatches)} of them unexpected", *client.mismatches, sep="\n  ")
    return 1 if client.mismatches else 0


def make_requests(client: "Client") -> None:
    """Make each kind of request; every answer is compared with what it must be."""
    ada, grace, edsger = (f"{name}-{secrets.token_hex(3)}" for name in ("ada", "grace", "edsger"))
    client.request("POST", f"/users?name={ada}", 201, {"name": ada})
    client.request("POST", f"/users?name={ada}", 409, {"detail": "this name is taken"})
    client.request("GET", "/users", 200, lambda users: [user["name"] for user in users].count(ada) == 1)
    client.request("GET", "/outbox", 200, lambda outbox: outbox.count(f"welcome, {ada}") == 1)
    client.request("POST", f"/users/{ada}/greeting", 202, {"name": ada})
    client.eventually("GET", "/users", lambda users: {"name": ada, "greeted": True, "score": None} in users)
    client.request("POST", f"/users/{ada}/score", 200, {"name": ada, "score": len(ada)})
    client.request("POST", f"/users/{grace}/score", 404, {"detail": "nobody has this name"})
    client.request("GET", "/stats", 200, lambda stats: stats["users"] >= stats["greeted"] >= 1)
    client.request("GET", "/export", 200, lambda text: f"{ada},{len(ada)}\n" in text)
    client.websocket("/ws", [(grace, {"name": grace}), (ada, {"detail": "this name is taken"}), (edsger, {"name": edsger})])
    client.request("GET", "/health", 200, lambda health: health["checked_out"] == 0)


class Client:
    """Makes requests, prints them with their answers, and remembers what was not as expected."""

    def __init__(self, host: str, port: int) -> None:
        self.address = f"{host}:{port}"
        self.seen = 0
        self.mismatches: list[str] = []

    def request(self, method: str, path: str, status: int, expected: Any) -> None:
        """Make one request; `expected` is the answer, or a function that says whether an answer will do."""
        self._compare(f"{method} {path}", self._send(method, path), (status, expected))

    def eventually(self, method: str, path: str, expected: Any) -> None:
        """Repeat a request until its answer will do: what a background job writes comes after the response."""
        end = time.monotonic() + 10
        while not _matches(answer := self._send(method, path), (200, expected)) and time.monotonic() < end:
            time.sleep(0.02)
        self._compare(f"{method} {path}", answer, (200, expected))

    def websocket(self, path: str, messages: list[tuple[str, Any]]) -> None:
        """Send messages over one websocket and compare the answer to each."""
        try:
            from websockets.sync.client import connect
        except ImportError:
            print(f"  --  {path}: not tried, because the package 'websockets' is not installed")
            return
        with connect(f"ws://{self.address}{path}", open_timeout=10, proxy=None) as socket:
            for message, expected in messages:
                socket.send(message)
                self._compare(f"{path} < {message}", ("ws", json.loads(socket.recv(timeout=10))), ("ws", expected))

    def _send(self, method: str, path: str) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://{self.address}{path}", method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as response:
                return response.status, _content(response)
        except urllib.error.HTTPError as response:
            with response:
                return response.code, _content(response)

    def _compare(self, what: str, answer: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
        self.seen += 1
        fits = _matches(answer, wanted)
        line = f"{what} -> {answer[0]} {answer[1]!r}"
        print(f"  {'ok' if fits else 'NO'}  {line}")
        if not fits:
            self.mismatches.append(line)


def bind(port: int) -> socket.socket:
    """Return a socket that listens on this port."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as exc:
        sys.exit(f"port {port} cannot be used ({exc.strerror}): choose another with --port, 0 takes a free one")
    listening.listen()
    return listening


def _content(response: Any) -> Any:
    text = response.read().decode()
    return json.loads(text) if response.headers.get_content_type() == "application/json" else text


def _matches(answer: tuple[Any, Any], wanted: tuple[Any, Any]) -> bool:
    status, expected = wanted
    return bool(answer[0] == status and (expected(answer[1]) if callable(expected) else answer[1] == expected))
