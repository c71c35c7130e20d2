"""What the processes of one run of pytest share: a folder with a lock, and the embedded server."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from . import _postgres


class Run:
    """One run of pytest, of one process or, under pytest-xdist, of several.

    Args:
        key: what its processes have in common, and no other run has.
    """

    def __init__(self, key: str) -> None:
        self.folder = Path(tempfile.gettempdir(), f"context-sqla-pytest-{os.getuid()}-{key}")
        self._users: int | None = None
        self._pipe: int | None = None

    def join(self) -> None:
        """Enter the run; the folder is there from here on."""
        with self._locked():
            self._users = os.open(self.folder / "users", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._users, fcntl.LOCK_SH)

    @contextlib.contextmanager
    def once(self, name: str) -> Iterator[bool]:
        """Hold the lock of the run, and say whether this is the first time for something."""
        with self._locked():
            done = self.folder / f"done-{name}"
            yield not done.exists()
            done.touch()

    def server(self) -> tuple[int, str]:
        """Return port and password of the server, which need not run yet."""
        with self._locked():
            path = self.folder / "server.json"
            if not path.exists():
                path.write_text(json.dumps([_postgres.free_port(), secrets.token_hex(16)]))
            port, password = json.loads(path.read_text())
            return port, password

    def start_server(self) -> None:
        """Start the server, or have a part in the one that runs.

        Raises:
            PostgresError: it does not start.
        """
        port, password = self.server()
        pipe = self.folder / "pipe"
        with self._locked():
            if self._pipe is not None:
                return
            if not pipe.exists():
                os.mkfifo(pipe, 0o600)
                self._pipe = _open_both_ways(pipe)
                try:
                    _postgres.start(pipe, port, password)
                except BaseException:
                    pipe.unlink()
                    raise
            else:
                try:
                    self._pipe = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                except OSError as exc:
                    raise _postgres.PostgresError("the PostgreSQL server of this run has ended") from exc

    def leave(self, at_last: Callable[[], None] = lambda: None) -> None:
        """Leave the run; the last one to leave waits until the server and the folder are gone.

        Args:
            at_last: called before that by the last one, while the server runs.
        """
        if self._users is None:
            return
        with self._locked():
            fcntl.flock(self._users, fcntl.LOCK_UN)
            last = _is_unused(self._users)
            os.close(self._users)
            self._users = None
            if last:
                at_last()
            if self._pipe is not None:
                os.close(self._pipe)
                self._pipe = None
            if last:
                _postgres.wait_until_gone(self.folder / "pipe")
                shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if self.folder.stat().st_uid != os.getuid():
                raise PermissionError(f"{self.folder} belongs to somebody else")
            with path.open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_the_same(path, lock.fileno()):
                    continue  # the last one to leave has removed it meanwhile
                yield
                return


def _open_both_ways(pipe: Path) -> int:
    """Open the writing end of a pipe that nobody reads yet."""
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.open(pipe, os.O_WRONLY)
    finally:
        os.close(reading)


def _is_the_same(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _is_unused(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
