"""Every server starts with the lifespan, stops with it, and leaves no task behind."""

import asyncio

import pytest
from contract.drivers import ASGI_SERVERS
from support.servers import ServerOptions, StartupError, start
from support.wire import BrokenOff, connect


class App:
    """Answers at once, or at "/slow" never; notes what happens."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.seen: list[str] = []
        self.busy = asyncio.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            self.seen.append("startup")
            if self.fails:
                await send({"type": "lifespan.startup.failed", "message": "not today"})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.seen.append("shutdown")
            await send({"type": "lifespan.shutdown.complete"})
            return
        try:
            if scope["path"] == "/slow":
                self.busy.set()
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})
        self.seen.append("answered")


@pytest.fixture(name="server", params=ASGI_SERVERS)
def _server(request):
    return request.param


@pytest.fixture(autouse=True)
async def _no_tasks_left():
    before = asyncio.all_tasks()
    yield
    assert {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()} == set()


async def test_server_stops_when_its_requests_have_ended(server):
    """A graceful shutdown comes after the requests and ends with the lifespan."""
    app = App()
    running = await start(app, server, ServerOptions())
    async with connect(running.address) as connection:
        answer = await connection.request("GET", "/")
    await running.stop()

    assert (answer.status, answer.complete) == (200, True)
    assert app.seen == ["startup", "answered", "shutdown"]


async def test_forced_shutdown_cancels_what_is_late(server):
    """Past the grace a request is cancelled, and the lifespan ends."""
    app = App()
    running = await start(app, server, ServerOptions())
    async with connect(running.address) as connection:
        await connection.send("GET", "/slow")
        await asyncio.wait_for(app.busy.wait(), 10)
        await running.stop(grace=0.05)
        try:
            status = (await connection.response()).status
        except BrokenOff:
            status = None

    assert sorted(app.seen) == ["cancelled", "shutdown", "startup"]
    assert status in (None, 500)


async def test_failed_lifespan_is_an_error(server):
    """A server whose application does not start is an error, with no server left."""
    app = App(fails=True)

    with pytest.raises(StartupError):
        await start(app, server, ServerOptions())
