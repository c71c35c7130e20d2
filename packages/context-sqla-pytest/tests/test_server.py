"""The PostgreSQL of a run: started once, shared by all workers, as root or not, and gone at the end however that came."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from context_sqla_pytest import _postgres
from context_sqla_pytest._run import Run

pytest_plugins = ["pytester"]

TESTS = """
    import pathlib
    from sqlalchemy import text

    @pytest.mark.context_sqla
    @pytest.mark.parametrize("number", range(4))
    async def test_it(client, number, worker_id, context_sqla_session):
        assert (await client.post("/users?name=a")).status_code == 201
        name, folder = (await context_sqla_session.execute(text("SELECT current_database(), current_setting('data_directory')"))).one()
        pathlib.Path(f"seen-{worker_id}-{number}").write_text(f"{name} {pathlib.Path(folder).parent}")
"""


def seen(project):
    """Return the databases and the folders of servers that the tests have seen."""
    places = [path.read_text().split() for path in project.pytester.path.glob("seen-*")]
    return {name for name, _ in places}, {folder for _, folder in places}


@pytest.mark.parametrize("workers", [0, 2])
def test_embedded_server(own, workers, tmp_path, monkeypatch):
    """One server for all workers, a database for each, and nothing of it is left."""
    own.tests(TESTS)
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    result = own.pytester.runpytest_subprocess(f"-n{workers}", "--dist=each" if workers else "-v", timeout=300)

    result.assert_outcomes(passed=4 * max(1, workers))
    databases, folders = seen(own)
    assert databases == ({"test_gw0", "test_gw1"} if workers else {"test"})
    assert len(folders) == 1
    assert not Path(folders.pop()).exists()
    assert list(tmp_path.glob("context-sqla-pytest-*")) == []


def test_killed_run_leaves_no_server(own):
    """The server ends, and its folder goes, when the last process that uses it is gone: SIGKILL asks nobody."""
    own.tests(TESTS + "        os.kill(os.getpid(), 9)\n")

    result = own.pytester.runpytest_subprocess(timeout=300)

    _, folders = seen(own)
    folder = Path(folders.pop())
    end = time.monotonic() + 60
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert result.ret == -signal.SIGKILL
    assert not folder.exists()


def test_workers_have_databases_on_a_given_server(project):
    """A worker's database is made from a template with the tables, and dropped at the end."""
    project.tests(TESTS)
    script = [sys.executable, "-m", "pytest", "-n2", "--dist=each", f"--context-sqla-url={project.url}"]

    done = subprocess.run(script, cwd=project.pytester.path, capture_output=True, text=True, timeout=300, check=False)

    databases, _ = seen(project)
    assert "8 passed" in done.stdout, done.stdout
    assert sorted(name.rpartition("_")[2] for name in databases) == ["gw0", "gw1"]
    project.tests("""
        async def test_dropped(context_sqla_session):
            names = list(await context_sqla_session.scalars(text("SELECT datname FROM pg_database WHERE datname LIKE 'inner_%gw_' OR datname LIKE 'inner_%template'")))
            assert names == []
    """)
    project.run().assert_outcomes(passed=1)


def test_who_runs_the_server():
    """PostgreSQL refuses to run as root: another account does then, and we ourselves otherwise."""
    accounts = _postgres._accounts()

    if os.geteuid() == 0:
        assert all(account.name for account in accounts)
    else:
        assert accounts == [_postgres._Account()]


def test_server_that_does_not_start(monkeypatch, tmp_path):
    """Its log is in the message, and nothing is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    run = Run("broken")
    run.join()
    monkeypatch.setitem(_postgres._SETTINGS, "shared_buffers", "nonsense")

    with pytest.raises(_postgres.PostgresError, match="nonsense"):
        run.start_server()
    run.leave()

    assert list(tmp_path.iterdir()) == []


def test_last_one_to_leave_removes_the_run(monkeypatch, tmp_path):
    """Others still have their server and their folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = Run("shared"), Run("shared")
    first.join()
    second.join()

    assert first.server() == second.server()
    first.leave()
    assert second.folder.exists()
    second.leave()
    assert not second.folder.exists()
    second.leave()


def test_no_programs(monkeypatch):
    """It says how to get some."""
    monkeypatch.setattr(_postgres, "_bindirs", lambda: iter(()))

    assert not _postgres.is_installed()
    with pytest.raises(_postgres.PostgresError, match=r"context-sqla-pytest\[postgres\]"):
        _postgres._find()
