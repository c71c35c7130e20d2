"""Install each wheel alone, in its newest and in its lowest versions, and use what it has.

`python integration-tests/packaging/installs.py DIST [--only NEWEST|LOWEST] [PACKAGE ...]`; `nox -s installs` does it.

Every line of the table at the end is an environment of its own:

1. the wheel and what it declares, nothing else; the siblings come from DIST. All its public names are imported.
2. what a user adds to it, a driver and for an adapter a server. It is put to use: an adapter's example is served and asked over
   HTTP, the others run the lines in SMOKE.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml"))
RESOLUTIONS = {"newest": "highest", "lowest": "lowest-direct"}

IMPORTS = "import {0}; [getattr({0}, name) for name in {0}.__all__]"
SMOKE = {
    "context-sqla": """
import asyncio
from context_sqla import DBConnect, db_context, db_session
from sqlalchemy import text

async def main():
    db = DBConnect.from_url("sqlite+aiosqlite:///app.db")
    async with db_context():
        await (await db_session(db)).execute(text("create table kept as select 1 as value"))
    async with db_context():
        assert await (await db_session(db)).scalar(text("select value from kept")) == 1
    await db.close()

asyncio.run(main())
""",
    "context-sqla-hosts": """
import asyncio
from context_sqla_hosts import Hosts, NoPrimaryError, primary

async def main():
    async with Hosts(["127.0.0.1:9"], user="nobody", database="none") as hosts:
        await hosts.refresh(timeout=10)
        assert hosts.primary_now() is None
        try:
            await primary(hosts, wait=0).choose()
        except NoPrimaryError:
            return
    raise AssertionError("a host that nobody serves is no primary")

asyncio.run(main())
""",
    # Its example is written as Litestar is today; this works in all of its versions.
    "context-sqla-litestar, lowest": """
from context_sqla import DBConnect, db_session
from context_sqla_litestar import setup
from litestar import Litestar, get
from litestar.testing import TestClient
from sqlalchemy import text

db = DBConnect.from_url("sqlite+aiosqlite:///app.db")

@get("/write")
async def write() -> str:
    await (await db_session(db)).execute(text("create table kept as select 1 as value"))
    return "done"

@get("/read")
async def read() -> int:
    return await (await db_session(db)).scalar(text("select value from kept"))

app = Litestar([write, read])
setup(app, db)
with TestClient(app) as client:
    assert client.get("/write").text == "done"
    assert client.get("/read").text == "1"
""",
    "context-sqla-pytest": """
import pathlib, pytest, sys
pathlib.Path("app.py").write_text("from context_sqla import DBConnect; db = DBConnect.from_url('sqlite+aiosqlite:///app.db')")
pathlib.Path("test_app.py").write_text('''
from sqlalchemy import text

async def test_session(context_sqla_session):
    assert await context_sqla_session.scalar(text("select 1")) == 1
''')
pathlib.Path("pytest.ini").write_text("[pytest]\\nasyncio_mode = auto\\ncontext_sqla_connects = app:db\\npythonpath = .\\n")
sys.exit(pytest.main(["-q"]))
""",
}


class Line(NamedTuple):
    """What became of one wheel in one environment."""

    package: str
    resolution: str
    python: str
    versions: str
    others: int
    used: str
    seconds: float


def main() -> None:
    """Do what the command line says, and end with 1 if a wheel could not be installed or used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", default=PACKAGES)
    parser.add_argument("--only", choices=RESOLUTIONS)
    options = parser.parse_args()
    kinds = [options.only] if options.only else list(RESOLUTIONS)
    lines, failures = [], []
    for package in options.packages:
        for kind in kinds:
            try:
                lines.append(one(options.dist.resolve(), package, kind))
                print("ok   ", package, kind, flush=True)
            except subprocess.CalledProcessError as exc:
                failures.append(f"{package}, {kind}: {' '.join(map(str, exc.cmd))}\n{exc.stdout}")
                print("FAILS", package, kind, flush=True)
    print("\n| distribution | versions | Python | of what it declares | others | used | seconds |", "| --- " * 7 + "|", sep="\n")
    for line in lines:
        print("|", " | ".join([*map(str, line[:-1]), f"{line.seconds:.1f}"]), "|")
    print(f"\n{len(lines)} passed, {len(failures)} failed", *failures, sep="\n\n")
    sys.exit(1 if failures else 0)


def one(dist: Path, package: str, kind: str) -> Line:
    """Install one wheel alone, import it, and use it."""
    begin = time.monotonic()
    wheel = the_wheel(dist, package)
    with tempfile.TemporaryDirectory(prefix="installs-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        environment = Environment(folder, dist, kind)
        environment.install(str(wheel), *third_parties(dist, package))
        environment.python("-I", *environment.warnings, "-c", IMPORTS.format(package.replace("-", "_")))
        alone = environment.versions()
        use, additions = smoke(package, kind)
        environment.install(f"{wheel}{additions.pop(0)}", *third_parties(dist, package), *additions)
        environment.python(*use)
    declared = {requirement.name: alone.pop(requirement.name) for requirement in map(Requirement, third_parties(dist, package))}
    siblings = [alone.pop(name) for name in list(alone) if name.startswith("context-sqla")]
    assert len(set(siblings)) == 1, "siblings of several releases"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = ", ".join(f"{name} {version}" for name, version in declared.items())
    what = "example, over HTTP" if "-c" not in use else "lines of SMOKE"
    return Line(package, kind, python, versions, len(alone), what, time.monotonic() - begin)


def smoke(package: str, kind: str) -> tuple[list[str], list[str]]:
    """Return how a package is put to use, and what a user adds to it: first its extra, then others."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    test = {Requirement(text).name: text for text in groups["test"]}
    lines = SMOKE.get(f"{package}, {kind}") or SMOKE.get(package)
    if lines is None:
        name = package.removeprefix("context-sqla-")
        return [str(ROOT / "examples" / name / "app.py"), "--check"], ["", *groups["demo"]]
    additions = {
        "context-sqla-hosts": ["[asyncpg]"],
        "context-sqla-pytest": ["", test["aiosqlite"], test["pytest-asyncio"]],
    }
    return ["-I", "-c", lines], additions.get(package, ["", test["aiosqlite"]])


class Environment:
    """A fresh environment, in which uv installs."""

    def __init__(self, folder: Path, dist: Path, kind: str) -> None:
        self._folder, self._dist, self._kind = folder, dist, kind
        self._path = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # Old frameworks use what newer Pythons deprecate.
        self.warnings = ["-W", "error"] if kind == "newest" else []
        run(find_uv_bin(), "venv", "--quiet", "--python", sys.executable, folder / "venv")

    def install(self, *requirements: str) -> None:
        """Install, and see that what is there fits together."""
        # uv remembers the siblings of an earlier build, which have the same version.
        fresh = ["--find-links", self._dist, *(f"--refresh-package={name}" for name in PACKAGES)]
        where = ["--python", self._path]
        resolution = f"--resolution={RESOLUTIONS[self._kind]}"
        run(find_uv_bin(), "pip", "install", "--quiet", *where, *fresh, resolution, *requirements)
        run(find_uv_bin(), "pip", "check", "--quiet", *where)

    def python(self, *arguments: str) -> None:
        """Run Python in a folder that has nothing of this repository."""
        run(self._path, *arguments, cwd=self._folder)

    def versions(self) -> dict[str, str]:
        """Return the version of each distribution that is installed."""
        listed = run(find_uv_bin(), "pip", "list", "--quiet", "--format=json", "--python", self._path)
        return {one["name"]: one["version"] for one in json.loads(listed)}


def third_parties(dist: Path, package: str) -> list[str]:
    """Return what a package and its siblings need of others: for lowest versions, uv has to be told."""
    return list(dict.fromkeys(_third_parties(dist, package)))


def _third_parties(dist: Path, package: str) -> Iterator[str]:
    with zipfile.ZipFile(the_wheel(dist, package)) as wheel:
        raw = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")))
    for requirement in Metadata.from_email(raw).requires_dist or []:
        if requirement.marker is not None:
            continue  # an extra's
        if requirement.name in PACKAGES:
            yield from _third_parties(dist, requirement.name)
        else:
            yield str(requirement)


def the_wheel(dist: Path, package: str) -> Path:
    """Return the wheel of a package."""
    (found,) = dist.glob(f"{package.replace('-', '_')}-[0-9]*.whl")
    return found


def run(*command: object, cwd: Path = ROOT) -> str:
    """Run a command and return what it prints; what it prints when it fails is in the error."""
    arguments = list(map(str, command))
    done = subprocess.run(
        arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, arguments, done.stdout)
    return done.stdout


if __name__ == "__main__":
    main()
