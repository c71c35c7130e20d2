"""Connects are closed at shutdown, whatever the application thinks of the lifespan protocol."""

import asyncio

import pytest
from context_sqla import DBConnect, db_context
from context_sqla_asgi import closing, setup

FAILED = {"type": "lifespan.shutdown.failed", "message": "ours"}
STARTUP, SHUTDOWN = {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}


class LoudConnect(DBConnect):
    """Tells when it is closed; may fail at it."""

    log: list[str]
    error: Exception | None = None

    async def close(self) -> None:
        self.log.append("close")
        await super().close()
        if self.error is not None:
            raise self.error


@pytest.fixture(name="log")
def _log() -> list[str]:
    return []


@pytest.fixture(name="connect")
def _connect(log) -> LoudConnect:
    connect = LoudConnect.from_url("sqlite+aiosqlite://")
    connect.log = log
    return connect


@pytest.fixture(name="told")
def _told() -> list[str]:
    """The texts that came with the messages."""
    return []


@pytest.fixture(name="serve")
def _serve(log, told):
    """The server's side of a lifespan."""

    async def serve(app):
        waiting = [STARTUP, SHUTDOWN]

        async def receive():
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop(0)

        async def send(message):
            log.append(message["type"].removeprefix("lifespan."))
            if "message" in message:
                told.append(message["message"])

        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)

    return serve


def application(log, **answer):
    async def app(scope, receive, send):
        await receive()
        log.append("up")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        log.append("down")
        await send({"type": "lifespan.shutdown.complete"} | answer)

    return app


async def test_connects_are_closed_after_the_application(log, connect, serve):
    """The application's own shutdown comes first, and the server hears of the end last (P15)."""
    await serve(setup(application(log), connect))

    assert log == ["up", "startup.complete", "down", "close", "shutdown.complete"]


async def test_lifespan_without_connects_passes(log, serve):
    """Nothing is added where there is nothing to close."""
    await serve(setup(application(log)))

    assert log == ["up", "startup.complete", "down", "shutdown.complete"]


async def test_connects_are_closed_when_the_shutdown_failed(log, told, connect, serve):
    """A shutdown that failed is passed on as it is (P8)."""
    await serve(setup(application(log, **FAILED), connect))

    assert log == ["up", "startup.complete", "down", "close", "shutdown.failed"]
    assert told == ["ours"]


async def test_connects_are_closed_when_the_startup_failed(log, told, connect, serve):
    """The server ends after it, and sends no shutdown."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "ours"})

    await serve(setup(app, connect))

    assert log == ["close", "startup.failed"]
    assert told == ["ours"]


async def test_error_of_the_closing_reaches_the_server(log, told, connect, serve):
    """It is told by a message, which servers log, and raised (P8)."""
    connect.error = OSError("cannot close")

    with pytest.raises(OSError, match="cannot close"):
        await serve(setup(application(log), connect))

    assert log == ["up", "startup.complete", "down", "close", "shutdown.failed"]
    assert "OSError: cannot close" in told[0]


async def test_swallowed_error_of_the_closing_was_told(log, told, connect, serve):
    """An application that catches everything cannot lose it (P8)."""
    connect.error = OSError("cannot close")

    async def app(scope, receive, send):
        try:
            await application(log)(scope, receive, send)
        except OSError:
            log.append("swallowed")

    await serve(setup(app, connect))

    assert log == ["up", "startup.complete", "down", "close", "shutdown.failed", "swallowed"]
    assert "OSError: cannot close" in told[0]


async def test_error_of_the_closing_is_told_after_the_applications_own(log, told, connect, serve):
    """Neither failure hides the other (P8)."""
    connect.error = OSError("cannot close")

    with pytest.raises(OSError, match="cannot close"):
        await serve(setup(application(log, **FAILED), connect))

    assert log[-2:] == ["close", "shutdown.failed"]
    assert told[0].startswith("ours\nTraceback")
    assert "OSError: cannot close" in told[0]


@pytest.mark.parametrize("how", ["raises", "returns", "receives", "starts", "http"])
async def test_application_without_a_lifespan(log, connect, serve, how):
    """The wrapper answers what the application does not (P15)."""

    async def app(scope, receive, send):
        if how == "raises":
            assert scope["type"] == "http"
        if how == "http":
            await send({"type": "http.response.start", "status": 200})
        if how in ("receives", "starts"):
            await receive()
        if how == "starts":
            await send({"type": "lifespan.startup.complete"})

    await serve(setup(app, connect))

    assert log == ["startup.complete", "close", "shutdown.complete"]


async def test_application_that_returns_after_the_shutdown(log, connect, serve):
    """One that takes the shutdown and answers nothing is answered for."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    await serve(setup(app, connect))

    assert log == ["startup.complete", "close", "shutdown.complete"]


@pytest.mark.parametrize("error", [LookupError("mine"), asyncio.CancelledError()])
async def test_startup_that_raises_is_no_missing_lifespan(log, connect, serve, error):
    """An application that had received its startup fails as it would alone; its connects are closed."""

    async def app(scope, receive, send):
        await receive()
        raise error

    with pytest.raises(type(error)):
        await serve(setup(app, connect))

    assert log == ["close"]


async def test_errors_after_a_failure_are_its_notes(log, connect, serve):
    """The first error is the one raised (P8)."""
    connect.error = OSError("cannot close")

    async def app(scope, receive, send):
        await receive()
        raise LookupError

    with pytest.raises(LookupError) as caught:
        await serve(setup(app, connect))

    assert "OSError: cannot close" in caught.value.__notes__[0]


async def test_application_that_raises_after_its_answer(log, connect, serve):
    """Connects are closed once."""

    async def app(scope, receive, send):
        await application(log, **FAILED)(scope, receive, send)
        raise LookupError

    with pytest.raises(LookupError):
        await serve(setup(app, connect))

    assert log == ["up", "startup.complete", "down", "close", "shutdown.failed"]


async def test_lifespan_has_no_unit(log, connect, serve):
    """What the application starts with inherits no unit, and may open its own (P11)."""

    async def app(scope, receive, send):
        async with db_context():
            log.append("unit")
        await application(log)(scope, receive, send)

    await serve(setup(app, connect))

    assert log[0] == "unit"


async def test_closing_closes_in_every_case(log, connect):
    """The block's own error wins (P8)."""
    async with closing(connect):
        log.append("in")
    with pytest.raises(LookupError):
        async with closing(connect):
            raise LookupError
    connect.error = OSError("cannot close")
    with pytest.raises(OSError, match="cannot close"):
        async with closing(connect):
            pass

    assert log == ["in", "close", "close", "close"]
