"""Sanic's traps, on its own server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from context_sqla import DBConnect, db_session, is_context_initiated
from context_sqla.errors import SetupError, UnavailableError
from context_sqla_sanic import setup
from sanic import Request, Sanic, json, text
from sqlalchemy import text as sql
from sqlalchemy.exc import IntegrityError

Sanic.test_mode = True


@pytest.fixture(name="db")
async def _db(tmp_path: Any) -> AsyncIterator[DBConnect[Any]]:
    db = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    engine = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    from context_sqla import new_non_ctx_atomic_session

    async with new_non_ctx_atomic_session(engine) as session:
        await session.execute(sql("CREATE TABLE parents (id INTEGER PRIMARY KEY)"))
        await session.execute(
            sql("CREATE TABLE items (name TEXT, parent INTEGER REFERENCES parents DEFERRABLE INITIALLY DEFERRED)")
        )
    await engine.close()
    yield db
    await db.close()


@contextlib.asynccontextmanager
async def serve(app: "Sanic[Any, Any]") -> AsyncIterator[httpx.AsyncClient]:
    import socket

    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    url = "http://{}:{}".format(*sock.getsockname())
    server = await app.create_server(sock=sock, return_asyncio_server=True, access_log=False)
    assert server is not None
    await server.startup()
    await server.before_start()
    await server.start_serving()
    try:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            yield http
    finally:
        await server.before_stop()
        await server.close()
        await server.after_stop()


async def insert(db: DBConnect[Any], name: str, parent: int | None = None) -> None:
    session = await db_session(db)
    await session.execute(sql("PRAGMA foreign_keys = ON"))
    await session.execute(sql("INSERT INTO items VALUES (:name, :parent)"), {"name": name, "parent": parent})


async def names(db: DBConnect[Any]) -> list[str]:
    from context_sqla import new_non_ctx_session

    async with new_non_ctx_session(db) as session:
        return list(await session.scalars(sql("SELECT name FROM items ORDER BY rowid")))


def make(**options: Any) -> "Sanic[Any, Any]":
    return Sanic("unit", configure_logging=False, **options)


async def test_refused_commit_is_no_200_although_response_middleware_swallows_errors(db):
    """What Sanic swallows in response middleware, it does not swallow here (P4)."""
    app = make()

    async def refuse(session):
        raise ZeroDivisionError

    setup(app, db, before_commit=refuse)

    @app.post("/")
    async def handler(request):
        await insert(db, "a")
        return text("ok")

    async with serve(app) as http:
        answer = await http.post("/")

    assert answer.status_code == 500


async def test_response_middleware_runs_for_the_answer_to_a_failed_commit(db):
    """The application's handler answers, and its middleware stands around that answer (P4b)."""
    app = make()

    async def refuse(session):
        raise IntegrityError("x", {}, Exception("x"))

    setup(app, db, before_commit=refuse)

    @app.exception(IntegrityError)
    async def conflict(request, exc):
        return json({"initiated": is_context_initiated()}, 409)

    @app.on_response
    async def mark(request, response):
        response.headers["x-mark"] = "1"

    @app.post("/")
    async def handler(request):
        await insert(db, "a")
        return text("ok")

    async with serve(app) as http:
        answer = await http.post("/")

    assert (answer.status_code, answer.json(), answer.headers["x-mark"]) == (409, {"initiated": True}, "1")


async def test_refused_commit_of_an_exception_handlers_answer_is_no_success(db):
    """Sanic would send the answer all the same: it is replaced (P4)."""
    app = make()

    async def refuse(session):
        raise ZeroDivisionError

    setup(app, db, before_commit=refuse)

    @app.exception(KeyError)
    async def answer_key(request, exc):
        await insert(db, "a")
        return text("fine")

    @app.get("/")
    async def handler(request):
        raise KeyError

    async with serve(app) as http:
        answer = await http.get("/")

    assert answer.status_code == 500


async def test_requests_of_one_connection_have_units_of_their_own(db):
    """One task serves a connection: each request commits by itself (P12)."""
    app = make()
    setup(app, db)
    sessions = []

    @app.post("/<name>")
    async def handler(request, name):
        sessions.append(await db_session(db))
        await insert(db, name)
        return text("ok", 404 if name == "b" else 200)

    async with serve(app) as http:
        for name in "abc":
            await http.post(f"/{name}")

    assert len({id(session) for session in sessions}) == 3
    assert await names(db) == ["a", "c"]


async def test_upgrade_header_alone_makes_no_websocket(db):
    """The route decides, not a header that any client can send (P11)."""
    app = make()
    setup(app, db)

    @app.post("/")
    async def handler(request):
        await insert(db, "a")
        return text("ok")

    async with serve(app) as http:
        answer = await http.post("/", headers={"upgrade": "websocket"})

    assert (answer.status_code, await names(db)) == (200, ["a"])


async def test_failed_stream_does_not_look_complete(db):
    """Sanic would end the chunked body well (P5)."""
    app = make()
    setup(app, db)

    @app.get("/")
    async def handler(request):
        response = await request.respond(content_type="text/plain")
        await response.send("one")
        await insert(db, "a")
        raise ZeroDivisionError

    async with serve(app) as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get("/")

    assert await names(db) == []


async def test_body_commits_before_its_end_by_hand(db):
    """`eof` in the handler is the last byte: what comes after it is background work (P5, P6)."""
    app = make()
    setup(app, db)
    seen = []
    looked = asyncio.Event()

    @app.get("/")
    async def handler(request):
        response = await request.respond(content_type="text/plain")
        await response.send("one")
        await insert(db, "a")
        await response.eof()
        seen.extend(await names(db))
        looked.set()

    async with serve(app) as http:
        assert (await http.get("/")).text == "one"
        await asyncio.wait_for(looked.wait(), 10)

    assert seen == ["a"]


async def test_unavailable_is_503_with_retry_after(db):
    """The default answer, unless the application has one of its own."""
    app = make()
    setup(app, db)

    @app.get("/")
    async def handler(request):
        raise UnavailableError("away")

    async with serve(app) as http:
        answer = await http.get("/")

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_setup_twice_is_refused(db):
    """Once, with all its connects."""
    app = make()
    setup(app, db)

    with pytest.raises(SetupError, match="already"):
        setup(app, db)


async def test_own_request_class_is_kept(db):
    """The application's request class stays the base, slots and all."""

    class Own(Request):
        __slots__ = ("own",)

    app = make(request_class=Own)
    setup(app, db)

    assert app.request_class is not None
    assert issubclass(app.request_class, Own)


async def test_connects_are_closed_after_the_applications_listeners(db):
    """An `after_server_stop` listener of the application may still use the database, whenever it was registered."""
    app = make()
    closed = []
    close = db.close

    async def note():
        closed.append("connect")
        await close()

    db.close = note
    app.after_server_stop(lambda app: closed.append("before setup"))
    setup(app, db)
    app.after_server_stop(lambda app: closed.append("after setup"))

    async with serve(app):
        pass

    assert closed[-1] == "connect"
    assert len(closed) == 3
