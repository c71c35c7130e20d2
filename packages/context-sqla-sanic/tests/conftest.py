"""A database, an observer of it, and an application on Sanic's own server and as an ASGI application."""

import asyncio
import contextlib
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from context_sqla import DBConnect, db_session
from sanic import Sanic
from sanic.application.constants import ServerStage
from sanic.application.state import ApplicationServerInfo
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine


class Ledger:
    """Sees the database over connections of its own, as everybody else does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = DBConnect.from_url(f"sqlite+aiosqlite:///{path}", name="ledger")
        self.db.engine_created.append(_check_foreign_keys)
        with self.connection() as connection:
            connection.execute("CREATE TABLE parent (name TEXT PRIMARY KEY)")
            connection.execute(
                "CREATE TABLE item (name TEXT, parent TEXT REFERENCES parent (name) DEFERRABLE INITIALLY DEFERRED)"
            )

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as connection:
            yield connection

    def names(self) -> str:
        """The names that are committed at this moment."""
        with self.connection() as connection:
            return " ".join(name for (name,) in connection.execute("SELECT name FROM item ORDER BY name"))

    async def until(self, names: str) -> None:
        """Wait until exactly these are committed."""
        async with asyncio.timeout(10):
            while self.names() != names:
                await asyncio.sleep(0.01)

    async def write(self, name: str) -> None:
        """Write a row in the unit of work in which this runs."""
        session = await db_session(self.db)
        await session.execute(text("INSERT INTO item (name) VALUES (:name)"), {"name": name})

    async def write_orphan(self, name: str) -> None:
        """Write a row whose foreign key fails at COMMIT."""
        session = await db_session(self.db)
        await session.execute(text("INSERT INTO item (name, parent) VALUES (:name, 'nobody')"), {"name": name})


class Address:
    """A client of a server, and where it is."""

    def __init__(self, http: httpx.AsyncClient, host: str, port: int) -> None:
        self.http = http
        self.place = host, port

    async def request(self, method: str, path: str = "/", **kwargs) -> httpx.Response:
        """Make a request; those of one test share a connection."""
        return await self.http.request(method, path, **kwargs)

    async def leave(self, path: str, seen: bytes) -> None:
        """Make a request, wait until this has come, and vanish."""
        reader, writer = await asyncio.open_connection(*self.place)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
        if seen:
            await asyncio.wait_for(reader.readuntil(seen), 10)
        writer.transport.abort()


def _check_foreign_keys(engine: AsyncEngine, host: str) -> None:
    event.listen(engine.sync_engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON"))


@pytest.fixture(name="ledger")
async def _ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "app.db")
    yield ledger
    assert ledger.db.pool_status().checked_out == 0
    await ledger.db.close()


@pytest.fixture(name="app")
def _app(monkeypatch: pytest.MonkeyPatch) -> Sanic:
    """An application without anything; many of one name may be made."""
    monkeypatch.setattr(Sanic, "test_mode", True)
    app = Sanic("unit", configure_logging=False)
    app.config.MOTD = app.config.ACCESS_LOG = False
    return app


@asynccontextmanager
async def native(app: Sanic) -> AsyncIterator[Address]:
    """Serve it with Sanic's own server, in this loop."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    host, port = listening.getsockname()
    server = await app.create_server(sock=listening, return_asyncio_server=True, access_log=False)
    assert server is not None
    await server.startup()
    await server.before_start()
    app.state.server_info.append(ApplicationServerInfo({}, ServerStage.SERVING))  # as `run` does, or add_task would wait
    await server.start_serving()
    await server.after_start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", trust_env=False) as http:
            yield Address(http, host, port)
    finally:
        await server.before_stop()
        await server.close()
        for connection in tuple(server.connections):
            connection.abort()
        await server.after_stop()
        app.state.server_info.clear()


@asynccontextmanager
async def asgi(app: Sanic) -> AsyncIterator[Address]:
    """Start it as an ASGI server does, and call it in this loop."""
    received: asyncio.Queue = asyncio.Queue()
    sent: asyncio.Queue = asyncio.Queue()
    serving = asyncio.create_task(app({"type": "lifespan"}, received.get, sent.put))
    await received.put({"type": "lifespan.startup"})
    assert (await asyncio.wait_for(sent.get(), 10))["type"] == "lifespan.startup.complete"
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield Address(http, "test", 80)
    finally:
        await received.put({"type": "lifespan.shutdown"})
        await asyncio.wait_for(serving, 30)


@pytest.fixture(name="serve", params=[native, asgi], ids=["native", "asgi"])
def _serve(request: pytest.FixtureRequest):
    """Both ways."""
    return request.param


@pytest.fixture(name="serve_natively")
def _serve_natively():
    return native


@pytest.fixture(name="serve_as_asgi")
def _serve_as_asgi():
    return asgi
