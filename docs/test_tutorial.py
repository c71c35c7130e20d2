"""Whoever follows the tutorial has an application and tests that pass: its files, made of its pages, in a folder of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent


def _blocks(page: str, language: str) -> list[str]:
    text = (DOCS / "tutorial" / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_steps_of_the_first_page(tmp_path: Path) -> None:
    """Its test passes in the folder in which its application has answered as the page says."""
    application, test = _blocks("first-application.md", "python")
    users = (DOCS.parent / "examples" / "tutorial" / "users.py").read_text("utf-8")
    requests = """
from fastapi.testclient import TestClient
from main import app
with TestClient(app) as client:
    assert [client.post("/users?name=Ada").status_code for _ in range(2)] == [201, 409]
    assert client.get("/users").json() == ["Ada"]
"""
    files = {"users.py": users, "main.py": application, "test_main.py": test, "requests_of_the_page.py": requests}
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")

    _run(tmp_path, "requests_of_the_page.py")
    output = _run(tmp_path, "-m", "pytest", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto")

    assert re.search(r"=+ 1 passed in [\d.]+s =+$", output), output


def test_the_steps_of_the_second_page(tmp_path: Path) -> None:
    """The application of the first page, under the tests of the second."""
    application = _blocks("first-application.md", "python")[0]
    connect, client, *tests = _blocks("first-test.md", "python")
    users = (DOCS.parent / "examples" / "tutorial" / "users.py").read_text("utf-8")
    files = {
        "users.py": re.sub(r"^db = .*$", connect.replace("\\", r"\\"), users, flags=re.MULTILINE),
        "main.py": application,
        "conftest.py": client,
        "test_users.py": "\n".join(tests),
        "pyproject.toml": _blocks("first-test.md", "toml")[0],
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")

    output = _run(tmp_path, "-m", "pytest", "-p", "no:cacheprovider")

    assert re.search(r"=+ 3 passed in [\d.]+s =+$", output), output


def _run(folder: Path, *arguments: str) -> str:
    """Run Python and return what it printed."""
    command = [sys.executable, *arguments]
    apart = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # this may be a worker of xdist
    run = subprocess.run(command, cwd=folder, env=apart, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    output = (run.stderr + run.stdout).strip()
    assert run.returncode == 0, output
    return output
