"""All examples are one application: over their real servers, started as the README says, they answer alike, word for word."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

EXAMPLES = Path(__file__).parent
FRAMEWORKS = sorted(path.parent.name for path in EXAMPLES.glob("*/app.py"))
REFERENCE = "fastapi"  # the one that the README begins with
DEADLINE = 30


@pytest.fixture(name="reference", scope="module")
def _reference() -> list[Any]:
    return conversation(REFERENCE)


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != REFERENCE])
def test_every_example_answers_as_the_first(framework: str, reference: list[Any]) -> None:
    """Status, media type and body of each answer, and each message of the websocket."""
    assert conversation(framework) == reference


def test_the_first_answers_what_is_written_here(reference: list[Any]) -> None:
    """What all others are compared with is itself compared with what a reader expects."""
    answers = dict(reference)

    assert answers["POST /users?name=Ada"] == (201, "application/json", {"name": "Ada"})
    assert answers["POST /users?name=Ada again"] == (409, "application/json", {"detail": "this name is taken"})
    assert answers["POST /users/nobody/score"] == (404, "application/json", {"detail": "nobody has this name"})
    assert answers["GET /export"] == (200, "text/csv", "name,score\nAda,3\nGr\N{LATIN SMALL LETTER A WITH DIAERESIS}ce,None\n")
    assert answers["GET /users at last"][2][0] == {"name": "Ada", "greeted": True, "score": 3}
    assert answers["GET /outbox"][2][:2] == ["welcome, Ada", "welcome, Gr\N{LATIN SMALL LETTER A WITH DIAERESIS}ce"]
    assert answers["/ws < Ada"] == '{"detail": "this name is taken"}'
    assert answers["GET /health"] == (200, "application/json", {"checked_out": 0})


def test_the_readme_names_every_example() -> None:
    """A newcomer finds each of them, with what has to be installed."""
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")

    assert [name for name in FRAMEWORKS if f"[{name}]({name}/app.py)" not in readme] == []
    assert [name for name in FRAMEWORKS if f"context-sqla-{name} " not in readme] == []


def conversation(framework: str) -> list[Any]:
    """Start an example, ask it the same as all others, and return what it answered."""
    said: list[Any] = []
    with serving(framework) as address, httpx.Client(base_url=address, trust_env=False, timeout=DEADLINE) as client:

        def ask(method: str, path: str, note: str = "") -> tuple[int, str, Any]:
            answer = client.request(method, path)
            kind = answer.headers["content-type"].partition(";")[0]
            content = (answer.status_code, kind, answer.json() if kind == "application/json" else answer.text)
            said.append((f"{method} {path}{note}", content))
            return content

        ask("GET", "/users", " at first")
        ask("POST", "/users?name=Ada")
        ask("POST", "/users?name=Ada", " again")
        ask("POST", "/users?name=Gr%C3%A4ce")
        ask("GET", "/users")
        ask("POST", "/users/Ada/score")
        ask("POST", "/users/nobody/score")
        ask("POST", "/users/nobody/greeting")
        ask("GET", "/export")
        ask("GET", "/stats")
        ask("POST", "/users/Ada/greeting")
        end = time.monotonic() + DEADLINE
        while not client.get("/users").json()[0]["greeted"] and time.monotonic() < end:
            time.sleep(0.02)  # the job runs after the answer, and says nothing when it is done
        ask("GET", "/users", " at last")
        ask("GET", "/stats", " at last")
        said.extend(talk(address, ["Linus", "Ada", "Alan"]))
        ask("GET", "/export", " at last")
        ask("GET", "/outbox")
        ask("GET", "/health")
        said.append(("no such page", client.get("/nowhere").status_code))
    return said


def talk(address: str, names: list[str]) -> Iterator[tuple[str, str]]:
    """Send each name over one websocket; spaces in JSON are the framework's own affair."""
    with connect(f"{address.replace('http', 'ws', 1)}/ws", open_timeout=DEADLINE, proxy=None) as socket:
        for name in names:
            socket.send(name)
            answer = socket.recv(timeout=DEADLINE)
            assert isinstance(answer, str), "JSON is text"
            yield f"/ws < {name}", re.sub(r"([:,])(?=\S)", r"\1 ", answer)


@contextlib.contextmanager
def serving(framework: str) -> Iterator[str]:
    """Run the README's command, on a free port and an SQLite file of its own, until Ctrl-C."""
    command = [sys.executable, f"{framework}/app.py", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    with subprocess.Popen(command, cwd=EXAMPLES, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            first = process.stdout.readline()
            address = re.search(r"http://[\d.]+:\d+", first)
            assert address, f"{framework} said: {first!r}"
            yield address[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == 0, f"{framework} did not end well"
        finally:
            process.kill()
