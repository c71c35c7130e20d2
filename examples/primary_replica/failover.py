"""Kill the primary while clients write and read, and print what they saw: `python cluster.py` runs in another terminal.

python failover.py                     20 clients for 8 seconds; the primary is killed after 2
python failover.py --clients 50        and so on
"""

import argparse
import http.client
import itertools
import json
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

LOOPBACK = "127.0.0.1"
TOKEN = "X-Context-SQLA-LSN"
PATIENCE = 30.0  # seconds
THINKS_FOR = 0.05  # seconds between a read and the next write; an answer that is missing is asked for again sooner


class Client(threading.Thread):
    """A visitor: writes a note until that is acknowledged, reads it back, and so on."""

    def __init__(self, port: int, until: float) -> None:
        super().__init__(daemon=True)
        self.author = secrets.token_hex(8)
        self.acknowledged: dict[str, tuple[float, int]] = {}  # when, and by which server
        self.reads: list[tuple[float, int]] = []
        self.errors: Counter[str] = Counter()
        self.requests = self.stale = self.in_doubt = 0
        self._port = port
        self._until = until
        self._token: str | None = None  # what a browser would keep as a cookie
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        for number in itertools.count():
            if time.monotonic() > self._until:
                break
            self.visit(f"{self.author}-{number}")
            time.sleep(THINKS_FOR)

    def visit(self, key: str) -> None:
        errors = self.errors.total()
        status, said = self.insist("PUT", f"/notes/{key}", {"author": self.author, "text": "hello"})
        self.acknowledged[key] = (time.monotonic(), said["server"])
        self.in_doubt += status == 200 and self.errors.total() > errors  # what had failed for us was written all the same
        status, said = self.insist("GET", f"/notes/{key}")
        if status == 404:
            self.stale += 1
        else:
            self.reads.append((time.monotonic(), said["server"]))

    def insist(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Ask until there is an answer: every request here may be repeated."""
        while (answer := self.ask(method, path, body)) is None:
            if time.monotonic() > self._until + PATIENCE:
                raise TimeoutError(f"{method} {path}: {dict(self.errors)}")
            time.sleep(0.02)
        return answer

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any] | None:
        """Make a request; None if it failed."""
        self.requests += 1
        headers = {"Content-Type": "application/json"} | ({TOKEN: self._token} if self._token else {})
        try:
            connection = self._connection = self._connection or http.client.HTTPConnection(LOOPBACK, self._port, timeout=20)
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as exc:
            self._connection = None
            self.errors[type(exc).__name__] += 1
            return None
        self._token = response.headers.get(TOKEN, self._token)
        if response.status >= 400 and response.status != 404:
            self.errors[f"{response.status} {response.reason}"] += 1
            return None
        return response.status, json.loads(content)

    def lost(self) -> int:
        """Count the acknowledged notes that are not there."""
        _, keys = self.insist("GET", f"/notes?author={self.author}")
        return len(self.acknowledged.keys() - set(keys))


def fail_over(port: int, kill: Callable[[], str], *, clients: int, seconds: float) -> bool:
    """Let clients work, kill the primary a quarter of the time in, print what they saw; return whether it was as it should be."""
    print(f"{clients} clients write a note, read it back, and so on, for {seconds:g} s\n", flush=True)
    crowd = [Client(port, time.monotonic() + seconds) for _ in range(clients)]
    for client in crowd:
        client.start()
    time.sleep(seconds / 4)
    killed_at = time.monotonic()
    killed = kill()
    print(f"  killed {killed}, the primary, with SIGKILL", flush=True)
    for client in crowd:
        client.join(seconds + 2 * PATIENCE)
    hanging = sum(client.is_alive() for client in crowd)
    lost = sum(client.lost() for client in crowd if not client.is_alive())
    return report(crowd, int(killed.rpartition(":")[2]), killed_at, lost, hanging)


def report(crowd: list[Client], killed: int, killed_at: float, lost: int, hanging: int) -> bool:
    writes = sorted(one for client in crowd for one in client.acknowledged.values())
    reads = [one for client in crowd for one in client.reads]
    errors = sum((client.errors for client in crowd), Counter[str]())
    stale = sum(client.stale for client in crowd)
    again = [at - killed_at for at, server in writes if server != killed]
    zombie = sum(server == killed and at > killed_at + 1 for at, server in writes)
    lines = {
        "requests": f"{sum(client.requests for client in crowd):,}",
        "errors": " ".join([f"{errors.total()}", *(f"({kind}: {count})" for kind, count in errors.items())]),
        "... of a write that was done all the same": sum(client.in_doubt for client in crowd),
        "writes acknowledged": f"{len(writes):,}: {_by_server(writes)}",
        "writes flow again after": f"{again[0]:.2f} s" if again else "never",
        "reads": f"{len(reads):,}: {_by_server(reads)}",
        "stale reads": stale,
        "acknowledged writes that are lost": lost,
        "acknowledged by the old primary, since it came back": zombie,
        "clients that hang": hanging,
    }
    print("\nwhat the clients saw\n")
    for what, figure in lines.items():
        print(f"  {what:<52} {figure}")
    return bool(again) and not (stale or lost or zombie or hanging) and errors.total() <= len(crowd)


def _by_server(seen: list[tuple[float, int]]) -> str:
    return ", ".join(f"{count:,} by {server}" for server, count in sorted(Counter(server for _, server in seen).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill the primary under load.")
    parser.add_argument("--port", type=int, default=8000, help="of the application (default: 8000)")
    parser.add_argument("--control", type=int, default=8001, help="of the cluster (default: 8001)")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()

    try:
        control = socket.create_connection((LOOPBACK, options.control))
    except ConnectionRefusedError:
        sys.exit(f"nobody listens on port {options.control}: start 'python cluster.py' first, in another terminal")

    def kill() -> str:
        control.sendall(b"kill\n")
        return control.makefile().readline().strip()

    with control:
        well = fail_over(options.port, kill, clients=options.clients, seconds=options.seconds)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
