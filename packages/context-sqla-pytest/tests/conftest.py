"""Projects whose tests the plugin runs: an application with its models, on a database of their own."""

import itertools
import os
import textwrap

# pytester forgets what was imported in a run: import here what cannot, or should not, be imported anew in each of them.
import aiosqlite  # noqa: F401
import asyncpg  # noqa: F401
import fastapi  # noqa: F401
import httpx  # noqa: F401
import pytest
from context_sqla_pytest._databases import _execute, run_apart
from sqlalchemy import make_url

CONFIGURATION = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
addopts = -p no:cacheprovider --strict-markers --strict-config
pythonpath = .
filterwarnings = error
context_sqla_connects =
    application:db
context_sqla_url_env = DATABASE_URL
context_sqla_metadata = application:Base
"""

APPLICATION = """
import asyncio
import os
from context_sqla import *
from context_sqla_fastapi import setup
from fastapi import BackgroundTasks, FastAPI, HTTPException
from sqlalchemy import ForeignKey, func, select, text
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
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", deferrable=True, initially="DEFERRED"))


class Kind(Base):
    __tablename__ = "kinds"
    name: Mapped[str] = mapped_column(primary_key=True)


app = FastAPI()
setup(app, db)
outbox = []
kept = []


async def add(name, error=None):
    session = await db_session(db)
    session.add(User(name=name))
    await session.flush()
    on_commit(lambda: outbox.append(name))
    if error is not None:
        raise error


async def names(connect=db):
    return list(await (await db_session(connect)).scalars(select(User.name).order_by(User.name)))


@app.post("/users", status_code=201)
async def create(name: str):
    await add(name)


@app.post("/fail")
async def fail(name: str):
    await add(name)
    raise HTTPException(409)


@app.get("/users")
async def listed():
    return await names()


@app.post("/later")
async def later(name: str, tasks: BackgroundTasks):
    tasks.add_task(add, name)


@app.post("/letters")
async def letter(user_id: int):
    (await db_session(db)).add(Letter(user_id=user_id))


@app.post("/leak")
async def leak():
    session = await db.create_session()
    await session.connection()
    kept.append(session)


async def never():
    await names()
    await asyncio.Event().wait()


@app.post("/stray")
async def stray():
    kept.append(asyncio.create_task(run_in_new_ctx(never)))
    for _ in range(100):
        await asyncio.sleep(0)
"""

CONFTEST = """
import httpx
import pytest
import pytest_asyncio
from application import app, outbox


@pytest_asyncio.fixture
async def client():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
    outbox.clear()
"""

TEST = """
import asyncio
import pytest
from application import *
from context_sqla_pytest import assert_query_count, capture_on_commit
"""

_numbers = itertools.count(1)


class Project:
    """A project with an application and tests, which `run` runs in this process."""

    def __init__(self, pytester, url):
        self.pytester = pytester
        self.url = url
        pytester.makefile(".ini", pytest=CONFIGURATION)
        pytester.makepyfile(application=APPLICATION, conftest=CONFTEST)

    def configure(self, *lines):
        """Add lines to the configuration."""
        path = self.pytester.path / "pytest.ini"
        path.write_text("\n".join([path.read_text(), *lines, ""]))

    def replace(self, old, new):
        """Change a line of the configuration."""
        path = self.pytester.path / "pytest.ini"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def add(self, name, source):
        """Add to the application or to the conftest."""
        path = self.pytester.path / f"{name}.py"
        path.write_text(path.read_text() + textwrap.dedent(source))

    def tests(self, source):
        """Write the tests."""
        self.pytester.makepyfile(test_it=TEST + textwrap.dedent(source))

    def run(self, *arguments):
        """Run them and return the result; what they printed is in `result.stdout`."""
        return self.pytester.runpytest_inprocess(f"--context-sqla-url={self.url}", *arguments)

    def run_apart(self, *arguments):
        """Run them in a process of their own: what they leave open would disturb the next run in this one."""
        return self.pytester.runpytest_subprocess(f"--context-sqla-url={self.url}", *arguments, timeout=300)


@pytest.fixture(name="alone", autouse=True)
def _alone(monkeypatch):
    """The runs below are no workers of pytest-xdist, also where this test is one's."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(name="postgresql")
def _postgresql(context_sqla_url):
    """A database without tables, on the server that the plugin starts for our own tests."""
    server = make_url(context_sqla_url)
    name = f"inner_{os.getpid()}_{next(_numbers)}"
    run_apart(lambda: _execute(server, f"CREATE DATABASE {name}"))
    yield server.set(database=name).render_as_string(hide_password=False)
    run_apart(lambda: _execute(server, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(name="url", params=["postgresql", "sqlite"])
def _url(request):
    """A database on each server."""
    return "sqlite+aiosqlite://" if request.param == "sqlite" else request.getfixturevalue(request.param)


@pytest.fixture(name="project")
def _project(pytester, postgresql):
    """A project whose tests run on PostgreSQL."""
    return Project(pytester, postgresql)


@pytest.fixture(name="each_project")
def _each_project(pytester, url):
    """A project whose tests run on each database."""
    return Project(pytester, url)


@pytest.fixture(name="own")
def _own(pytester, monkeypatch):
    """A project without a URL: its tests, which run in a process of their own, get a server of their own."""
    monkeypatch.delenv("CONTEXT_SQLA_URL", raising=False)
    return Project(pytester, None)
