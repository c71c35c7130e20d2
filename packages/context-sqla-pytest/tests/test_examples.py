"""The example of each framework, tested with the plugin in both ways: what a user's tests look like."""

import importlib.util
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

EXAMPLES = Path(__file__).parents[3] / "examples"
# An example whose framework is not installed is not collected: a row appears with the framework.
NAMES = sorted(
    path.parent.name
    for path in EXAMPLES.glob("*/test_app.py")
    if path.parent.name == "asgi" or importlib.util.find_spec(path.parent.name) is not None
)

TESTS = """
import asyncio
import contextlib
import functools
import json
from types import SimpleNamespace

import pytest
import pytest_asyncio
from app import User, db, outbox
from context_sqla_pytest import assert_query_count
from sqlalchemy import select

pytestmark = pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.context_sqla(mode)) for mode in ("shared", "real")]
)


@pytest_asyncio.fixture
async def client():
    outbox.clear()
    async with make_client() as client:
        yield client


async def test_create_and_list(client, context_sqla_session, mode):
    answer = await client.post("/users?name=Ada")
    listed = await client.get("/users")

    assert (answer.status_code, answer.json()) == (201, {"name": "Ada"})
    assert listed.json() == [{"name": "Ada", "greeted": False, "score": None}]
    assert list(await context_sqla_session.scalars(select(User.name))) == ["Ada"]


async def test_a_name_is_taken_once(client, context_sqla_session, mode):
    await client.post("/users?name=Ada")

    answer = await client.post("/users?name=Ada")

    assert (answer.status_code, answer.json()) == (409, {"detail": "this name is taken"})
    assert list(await context_sqla_session.scalars(select(User.name))) == ["Ada"]
    assert outbox == ["welcome, Ada"]


async def test_stream(client, context_sqla_session, mode):
    context_sqla_session.add_all([User(name="Ada", greeted=False), User(name="Grace", greeted=False)])
    await context_sqla_session.commit()

    assert (await client.get("/export")).text == "name,score\\nAda,None\\nGrace,None\\n"


async def test_background_job(client, mode):
    await client.post("/users?name=Ada")

    answer = await client.post("/users/Ada/greeting")

    assert answer.status_code == 202
    async with asyncio.timeout(10):  # some frameworks answer first, and do not wait for the job
        while not (await client.get("/users")).json()[0]["greeted"]:
            await asyncio.sleep(0)


async def test_concurrent_queries(client, mode):
    await client.post("/users?name=Ada")

    with assert_query_count(2):
        assert (await client.get("/stats")).json() == {"users": 1, "greeted": 0}


async def test_early_release(client, mode):
    await client.post("/users?name=Ada")

    assert (await client.post("/users/Ada/score")).json() == {"name": "Ada", "score": 3}
    assert (await client.post("/users/Grace/score")).status_code == 404
"""


ASGI = """

def make_client():
    import httpx
    from app import app

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
"""
# It answers as httpx's does.
AIOHTTP = """

@contextlib.asynccontextmanager
async def make_client():
    from aiohttp.test_utils import TestClient, TestServer
    from app import make_app

    async with TestClient(TestServer(make_app())) as client:

        async def request(method, path):
            answer = await client.request(method, path)
            body = await answer.text()
            return SimpleNamespace(status_code=answer.status, text=body, json=lambda: json.loads(body))

        yield SimpleNamespace(get=functools.partial(request, "GET"), post=functools.partial(request, "POST"))
"""
SANIC = """

@contextlib.asynccontextmanager
async def make_client():
    import httpx
    from app import app
    from sanic import Sanic

    Sanic.test_mode = True  # it may be started again
    received, sent = asyncio.Queue(), asyncio.Queue()
    serving = asyncio.create_task(app({"type": "lifespan"}, received.get, sent.put))
    await received.put({"type": "lifespan.startup"})
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
    await received.put({"type": "lifespan.shutdown"})
    await serving
"""
CLIENTS = {"aiohttp": AIOHTTP, "sanic": SANIC}


@pytest.mark.parametrize("name", NAMES)
def test_example(project, name):
    """Streams, background jobs, concurrent units and early commits work in the shared transaction as with real commits."""
    project.replace("application:db", "app:db")
    project.replace("application:Base", "app:Base")
    project.replace("pythonpath = .", f"pythonpath = {EXAMPLES / name}")
    project.pytester.makepyfile(conftest="", test_it=TESTS + CLIENTS.get(name, ASGI))
    # Frameworks use what others have deprecated.
    project.replace("filterwarnings = error", "filterwarnings = default")

    # In a process of its own: pytester would forget the application's module before it ends, with its temporary folder.
    result = project.pytester.runpytest_subprocess(f"--context-sqla-url={project.url}", timeout=300)

    result.assert_outcomes(passed=12)
