"""aiohttp's own test client."""

import contextlib

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer


@pytest.fixture(name="client_of")
async def _client_of():
    """Serve an application in this loop, and make a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def client_of(app: web.Application) -> TestClient:
            return await stack.enter_async_context(TestClient(TestServer(app)))

        yield client_of
