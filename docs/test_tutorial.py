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


def test_the_steps_of_the_tutorial(tmp_path: Path) -> None:
    """The application of the first page, under the tests of the second."""
    application = _blocks("first-application.md", "python")[0]
    connect, client, *tests = _blocks("first-test.md", "python")
    users = (DOCS.parent / "examples" / "tutorial" / "users.py").read_text("utf-8")
    files = {
        "users.py": re.sub(r"^db = .*$", connect.replace("\\", r"\\"), users, flags=re.MULTILINE),
        "main.py": application.replace("# from users import", "from users import"),
        "conftest.py": client,
        "test_users.py": "\n".join(tests),
        "pyproject.toml": _blocks("first-test.md", "toml")[0],
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    apart = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # this may be a worker of xdist
    run = subprocess.run(command, cwd=tmp_path, env=apart, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603

    assert re.search(r"=+ 3 passed in [\d.]+s =+$", run.stdout.strip()), run.stdout + run.stderr
