"""aiohttp's own test client."""

import asyncio
import contextlib

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer


@pytest.fixture(name="ledger")
async def _ledger(ledger):
    yield ledger
    async with asyncio.timeout(10):  # a unit may end in a task of its own, after its request
        while ledger.db.pool_status().checked_out:
            await asyncio.sleep(0)


@pytest.fixture(name="client_of")
async def _client_of():
    """Serve an application in this loop, and make a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def client_of(app: web.Application) -> TestClient:
            return await stack.enter_async_context(TestClient(TestServer(app)))

        yield client_of
