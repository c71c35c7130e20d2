"""The matrix of test clients: which of them run the application in the loop of the test, and what those get that do not.

A row is a framework's application and its client. To add one: its name, the modules that it needs, `make`, which gives `app`
with a handler for `POST /users` that awaits `add("a")`, and `use`, which sends that request and gives its status as `status`.
"""

import importlib.util
import textwrap
from dataclasses import dataclass

import pytest

pytest_plugins = ["pytester"]


@dataclass(frozen=True)
class Row:
    """One client with one framework.

    Args:
        name: what the documentation calls it.
        needs: modules that must be installed.
        make: makes the application.
        use: uses it.
        shares: whether it runs the application in the loop of the test.
        plain: whether it cannot be called in an event loop, so that only tests without one have it.
    """

    name: str
    needs: tuple[str, ...]
    make: str
    use: str
    shares: bool = True
    plain: bool = False


HTTPX = """
async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
    status = (await client.post("/users")).status_code
"""
ASGI = """
from context_sqla_asgi import setup

async def plain(scope, receive, send):
    await add("a")
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": b""})

app = setup(plain)
"""
STARLETTE = """
from context_sqla_starlette import setup
from starlette.applications import Starlette
from starlette.responses import Response

app = Starlette()
setup(app)

async def create(request):
    await add("a")
    return Response(status_code=201)

app.add_route("/users", create, methods=["POST"])
"""
FASTAPI = """
from context_sqla_fastapi import setup
from fastapi import FastAPI

app = FastAPI()
setup(app)

@app.post("/users", status_code=201)
async def create():
    await add("a")
"""
TEST_CLIENT = """
from starlette.testclient import TestClient

status = TestClient(app).post("/users").status_code
"""
LITESTAR = """
from context_sqla_litestar import ContextSQLAPlugin
from litestar import Litestar, post

@post("/users")
async def create() -> None:
    await add("a")

app = Litestar([create], plugins=[ContextSQLAPlugin()], debug=True)
"""
LITESTAR_CLIENT = """
from litestar.testing import AsyncTestClient

async with AsyncTestClient(app) as client:
    status = (await client.post("/users")).status_code
"""
QUART = """
from context_sqla_quart import setup
from quart import Quart

app = Quart("application")
setup(app)

@app.post("/users")
async def create():
    await add("a")
    return "", 201
"""
QUART_CLIENT = """
status = (await app.test_client().post("/users")).status_code
"""
FALCON = """
import falcon.asgi
from context_sqla_falcon import setup

class Users:
    async def on_post(self, req, resp):
        await add("a")
        resp.status = falcon.HTTP_201

app = falcon.asgi.App()
app.add_route("/users", Users())
setup(app)
"""
FALCON_CLIENT = """
from falcon.testing import ASGIConductor

async with ASGIConductor(app) as conductor:
    status = (await conductor.simulate_post("/users")).status_code
"""
FALCON_TEST_CLIENT = """
from falcon.testing import TestClient

status = TestClient(app).simulate_post("/users").status_code
"""
AIOHTTP = """
from aiohttp import web
from context_sqla_aiohttp import setup

async def create(request):
    await add("a")
    return web.Response(status=201)

def build():
    app = web.Application()
    app.router.add_post("/users", create)
    setup(app)
    return app
"""
AIOHTTP_CLIENT = """
from aiohttp.test_utils import TestClient, TestServer

async with TestClient(TestServer(build())) as client:
    status = (await client.post("/users")).status
"""
SANIC = """
from context_sqla_sanic import setup
from sanic import Sanic, response

Sanic.test_mode = True
Sanic._app_registry.clear()
app = Sanic("application", configure_logging=False)
setup(app)

@app.post("/users")
async def create(request):
    await add("a")
    return response.empty(201)
"""
SANIC_CLIENT = """
_, answer = await app.asgi_client.post("/users")
status = answer.status_code
"""

ROWS = [
    Row("httpx.ASGITransport, bare ASGI", ("context_sqla_asgi",), ASGI, HTTPX),
    Row("httpx.ASGITransport, Starlette", ("context_sqla_starlette",), STARLETTE, HTTPX),
    Row("httpx.ASGITransport, FastAPI", ("context_sqla_fastapi",), FASTAPI, HTTPX),
    Row("TestClient, Starlette", ("context_sqla_starlette",), STARLETTE, TEST_CLIENT, shares=False),
    Row("TestClient, FastAPI", ("context_sqla_fastapi",), FASTAPI, TEST_CLIENT, shares=False),
    Row("httpx.ASGITransport, Litestar", ("context_sqla_litestar",), LITESTAR, HTTPX),
    Row("AsyncTestClient, Litestar", ("context_sqla_litestar",), LITESTAR, LITESTAR_CLIENT, shares=False),
    Row("test_client(), Quart", ("context_sqla_quart",), QUART, QUART_CLIENT),
    Row("httpx.ASGITransport, Falcon", ("context_sqla_falcon",), FALCON, HTTPX),
    Row("ASGIConductor, Falcon", ("context_sqla_falcon",), FALCON, FALCON_CLIENT),
    Row("TestClient, Falcon", ("context_sqla_falcon",), FALCON, FALCON_TEST_CLIENT, shares=False, plain=True),
    Row("TestClient, aiohttp", ("context_sqla_aiohttp",), AIOHTTP, AIOHTTP_CLIENT),
    Row("asgi_client, Sanic", ("context_sqla_sanic", "sanic_testing"), SANIC, SANIC_CLIENT),
]
INSTALLED = [row for row in ROWS if all(importlib.util.find_spec(module) for module in row.needs)]

pytestmark = pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in INSTALLED])

MODELS = """
import os
from context_sqla import *
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ["DATABASE_URL"], name="users")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


async def add(name):
    (await db_session(db)).add(User(name=name))
"""


def source_of(row, mode):
    """Two tests: each finds an empty table, sends a request and sees its row; without a session, the name is unique."""
    begin = (
        f"import httpx\nimport pytest\nfrom application import *\n{row.make}\n"
        f"@pytest.mark.context_sqla({mode!r})\n"
        "@pytest.mark.parametrize('number', [1, 2])\n"
    )
    if row.plain:
        return f"{begin}def test_it(number):\n{textwrap.indent(row.use, '    ')}\n    assert status == 201\n"
    return (
        f"{begin}"
        "async def test_it(context_sqla_session, number):\n"
        "    assert await context_sqla_session.scalar(select(User.name)) is None\n"
        "    await context_sqla_session.rollback()\n"
        f"{textwrap.indent(row.use, '    ')}\n"
        "    assert status == 201\n"
        "    assert await context_sqla_session.scalar(select(User.name)) == 'a'\n"
    )


def prepare(project, row, mode):
    project.pytester.makepyfile(application=MODELS, conftest="", test_it=source_of(row, mode))
    # Frameworks use what others have deprecated.
    project.replace("filterwarnings = error", "filterwarnings = default")


def test_real_commits(project, row):
    """Every client works with real commits, in whatever loop it runs the application."""
    prepare(project, row, "real")

    project.run().assert_outcomes(passed=2)


def test_shared_transaction(project, row):
    """The clients that run the application in the test's loop share its transaction; the others are told what to use instead."""
    prepare(project, row, "shared")

    result = project.run()

    if row.shares:
        result.assert_outcomes(passed=2)
    elif row.plain:
        result.assert_outcomes(errors=2)
        result.stdout.fnmatch_lines(["*make it 'async def', or test with real commits*"])
    else:
        result.assert_outcomes(failed=2)
        result.stdout.fnmatch_lines(
            ["*call it through httpx.ASGITransport(app) in the test's own loop, or test with real commits*"]
        )
