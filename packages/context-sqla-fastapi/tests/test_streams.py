"""Endpoints that are generators: FastAPI starts those of event streams before their head."""

import asyncio
from collections.abc import AsyncIterable, Iterable

import anyio.from_thread
import pytest
from context_sqla_fastapi import add_fastapi_http_db_session_middleware as by_hand
from context_sqla_fastapi import setup
from context_sqla_starlette import setup as starlette_setup
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.routing import Mount

sse = pytest.importorskip("fastapi.sse", reason="this version of FastAPI has no streams of events")


@pytest.fixture(name="streaming")
def _streaming(ledger):
    """An application whose endpoints are generators, with a dependency that writes."""
    app = FastAPI()

    async def dependency():
        await ledger.write("dependency")
        yield

    depends = [Depends(dependency)]

    @app.get("/events", response_class=sse.EventSourceResponse, dependencies=depends)
    async def events() -> AsyncIterable[int]:
        for number in range(2):
            await ledger.write(f"event{number}")
            yield number

    @app.get("/events-in-a-thread", response_class=sse.EventSourceResponse, dependencies=depends)
    def events_in_a_thread() -> Iterable[int]:
        for number in range(2):
            anyio.from_thread.run(ledger.write, f"event{number}")
            yield number

    @app.get("/lines", dependencies=depends)
    async def lines() -> AsyncIterable[int]:
        for number in range(2):
            await ledger.write(f"event{number}")
            yield number

    @app.get("/pieces", response_class=StreamingResponse, dependencies=depends)
    async def pieces():
        for number in range(2):
            await ledger.write(f"event{number}")
            yield str(number)

    @app.get("/failing", response_class=sse.EventSourceResponse, dependencies=depends)
    async def failing() -> AsyncIterable[int]:
        await ledger.write("event")
        yield 1
        raise LookupError

    @app.get("/orphan", response_class=sse.EventSourceResponse, dependencies=depends)
    async def orphan() -> AsyncIterable[int]:
        await ledger.write_orphan("event")
        yield 1

    return app


def behind_a_task(app):
    """Add middleware that runs the rest of the application in a task of its own."""

    @app.middleware("http")
    async def pass_on(request, call_next):
        return await call_next(request)

    setup(app)


def mounted(app):
    """Mount the application in one of Starlette, which knows of no such generators."""
    setup(app)
    whole = Starlette(routes=[Mount("/", app)])
    starlette_setup(whole)
    return whole


@pytest.mark.parametrize("install", [setup, by_hand, behind_a_task, mounted])
@pytest.mark.parametrize("path", ["/events", "/events-in-a-thread", "/lines", "/pieces"])
async def test_generator_endpoint_commits_at_its_end(streaming, ledger, messages_of, install, path):
    """Also where FastAPI starts the generator before the head: it has a session of its own (P5)."""
    app = install(streaming) or streaming

    log = await asyncio.wait_for(messages_of(app, path), 30)

    assert log[0] == "start 200 [dependency]"
    assert log[-1] == "body  [dependency event0 event1]"
    assert all("event" not in message.split("[")[1] for message in log[:-1])


async def test_mounted_application_may_have_middleware_that_asks(streaming, ledger, messages_of):
    """What it is told of the route, which is the mount as yet, is not the last word on who runs ahead (P5)."""

    class Asks:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            await ledger.session()
            await self.app(scope, receive, send)

    streaming.add_middleware(Asks)

    log = await asyncio.wait_for(messages_of(mounted(streaming), "/events"), 30)

    assert log[0] == "start 200 [dependency]"
    assert log[-1] == "body  [dependency event0 event1]"


@pytest.mark.parametrize("path", ["/failing", "/orphan"])
async def test_generator_endpoint_that_fails_is_never_complete(streaming, ledger, messages_of, path):
    """It is rolled back, and broken off for the client (P5)."""
    setup(streaming, ledger.db)
    log = []

    with pytest.raises((LookupError, IntegrityError, ExceptionGroup)):
        await asyncio.wait_for(messages_of(streaming, path, log=log), 30)

    assert all("+" in message for message in log if message.startswith("body"))
    assert ledger.names() == "dependency"
