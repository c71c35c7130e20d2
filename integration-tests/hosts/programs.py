"""What the tests run that is no Python package of theirs: which of it is there, and how the rest is installed.

`python -m hosts.programs` installs what needs no rights (Patroni, into `build/`), and says what is missing.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from support.postgres import Account, accounts

from . import browser

#: The newest, for the figures; and one that may go back to an older timeline, with what it needs to run at all.
PATRONI = {"4.1.5": (), "3.0.2": ("urllib3<2",)}
NEWEST, OLD = PATRONI
_BUILD = Path(__file__).parents[2] / "build" / "patroni"
_INSTALL = {
    "etcd": "apt-get install etcd-server",
    "pgbouncer": "apt-get install pgbouncer",
    "chromium": "apt-get install chromium",
    "patroni": "nox -s hosts, with uv beside nox",
}


def etcd() -> str | None:
    """Return the program of etcd, None where there is none."""
    return shutil.which("etcd")


def pgbouncer() -> str | None:
    """Return pgbouncer, None where there is none; Debian has it where only administrators look."""
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")


@functools.cache
def python() -> str | None:
    """Return a Python that the account of the servers can run: a root user's own often lies where nobody else may look."""
    account = accounts()[0]
    return next((path for path in _pythons() if _runs(account, path, "-c", "import ssl")), None)


@functools.cache
def patroni(version: str) -> Path | None:
    """Return the folder with a version of Patroni and what it imports, None where it is not installed."""
    folder = _BUILD / version
    if not (folder / "patroni").is_dir():
        return None
    account = accounts()[0]
    if _runs(account, "ls", str(folder)):
        return folder
    copy = Path(tempfile.mkdtemp(prefix="patroni-"))  # a checkout in root's home: for the life of this process
    copy.chmod(0o755)
    shutil.copytree(folder, copy / version)
    return copy / version


def missing() -> dict[str, str]:
    """Return what is not there, and how it is installed."""
    found = {
        "etcd": etcd(),
        "patroni": python() and all(map(patroni, PATRONI)),
        "pgbouncer": pgbouncer(),
        "chromium": browser.find(),
    }
    return {name: _INSTALL[name] for name, there in found.items() if not there}


def install() -> None:
    """Install every version of Patroni that is not there yet, with uv, unless there is no etcd for it."""
    uv, chosen = shutil.which("uv"), python()
    if uv is None or chosen is None or etcd() is None:
        return
    for version, more in PATRONI.items():
        folder = _BUILD / version
        if not (folder / "patroni").is_dir():
            wanted = [f"patroni[etcd3,psycopg3]=={version}", "psycopg[binary]>=3.2", *more]
            command = [uv, "pip", "install", "--quiet", "--python", chosen, "--target", str(folder), *wanted]
            subprocess.run(command, check=False)


def _pythons() -> Sequence[str]:
    others = [shutil.which(name, path="/usr/bin:/usr/local/bin") for name in ("python3", "python")]
    return [os.path.realpath(sys.executable), *filter(None, others)]


def _runs(account: Account, *command: str) -> bool:
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, check=False, **account.popen)
    except OSError:
        return False
    return done.returncode == 0


if __name__ == "__main__":
    install()
    patroni.cache_clear()
    for name, how in missing().items():
        print(f"{name} is missing, and its tests cannot run: {how}")
