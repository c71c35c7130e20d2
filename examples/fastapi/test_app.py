"""The tests of the application, each both ways: rolled back at its end, and with real commits.

On another database: `DATABASE_URL=... pytest examples/fastapi`.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from context_sqla import (
    db_context,
    db_session,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
)
from context_sqla.testing import (
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
)
from httpx import ASGITransport, AsyncClient
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from .app import Base, User, app, db, outbox


@pytest_asyncio.fixture(name="tables", autouse=True)
async def _tables() -> AsyncIterator[None]:
    async with new_non_ctx_atomic_session(db) as session:
        connection = await session.connection()
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    outbox.clear()
    yield
    await db.close()


@pytest_asyncio.fixture(name="shared")
async def _shared(tables: None) -> AsyncIterator[AsyncSession]:
    """Let the application work in the test's own transaction: fast, and rolled back at the end."""
    async with rollback_session(db) as session:
        async with set_test_context(), put_savepoint_session_in_ctx(db, session):
            yield session


@pytest.fixture(name="both_ways", params=["shared transaction", "real commits"], autouse=True)
def _both_ways(request: pytest.FixtureRequest) -> str:
    if request.param == "shared transaction":
        request.getfixturevalue("shared")
    return request.param


@pytest_asyncio.fixture(name="client")
async def _client(both_ways: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        yield client


async def names() -> list[str]:
    """Look at what is there as the application does: in the shared transaction or outside."""
    async with db_context():
        session = await db_session(db)
        return list(await session.scalars(select(User.name).order_by(User.id)))


async def test_create_and_list(client: AsyncClient) -> None:
    answer = await client.post("/users", params={"name": "Ada"})
    listed = await client.get("/users")

    assert (answer.status_code, answer.json()) == (201, {"name": "Ada"})
    assert listed.json() == [{"name": "Ada", "greeted": False, "score": None}]
    assert await names() == ["Ada"]


async def test_a_name_is_taken_once(client: AsyncClient) -> None:
    await client.post("/users", params={"name": "Ada"})

    answer = await client.post("/users", params={"name": "Ada"})

    assert (answer.status_code, answer.json()) == (409, {"detail": "this name is taken"})
    assert await names() == ["Ada"]
    assert outbox == ["welcome, Ada"]  # on_commit did not run for the second one


async def test_export(client: AsyncClient) -> None:
    for name in ("Ada", "Grace"):
        await client.post("/users", params={"name": name})

    answer = await client.get("/export")

    assert answer.text == "name,score\nAda,None\nGrace,None\n"


async def test_background_job(client: AsyncClient) -> None:
    await client.post("/users", params={"name": "Ada"})

    answer = await client.post("/users/Ada/greeting")  # this client waits for the job too

    assert answer.status_code == 202
    assert (await client.get("/users")).json()[0]["greeted"] is True


async def test_concurrent_queries(client: AsyncClient) -> None:
    await client.post("/users", params={"name": "Ada"})

    answer = await client.get("/stats")

    assert answer.json() == {"users": 1, "greeted": 0}


async def test_early_release(client: AsyncClient) -> None:
    await client.post("/users", params={"name": "Ada"})

    answer = await client.post("/users/Ada/score")

    assert answer.json() == {"name": "Ada", "score": 3}
    assert (await client.post("/users/Grace/score")).status_code == 404


async def test_health(client: AsyncClient) -> None:
    answer = await client.get("/health")

    assert answer.status_code == 200


@pytest.mark.parametrize("both_ways", ["shared transaction"], indirect=True)
async def test_test_and_application_see_each_others_rows(client: AsyncClient, shared: AsyncSession) -> None:
    shared.add(User(name="Ada"))
    await shared.flush()

    await client.post("/users", params={"name": "Grace"})

    assert [user["name"] for user in (await client.get("/users")).json()] == ["Ada", "Grace"]
    assert await shared.scalar(select(func.count()).select_from(User)) == 2


@pytest.mark.parametrize("both_ways", ["real commits"], indirect=True)
async def test_an_answer_means_committed(client: AsyncClient) -> None:
    await client.post("/users", params={"name": "Ada"})

    async with new_non_ctx_session(db) as session:  # another connection
        assert await session.scalar(select(User.name)) == "Ada"


@pytest.mark.parametrize("both_ways", ["real commits"], indirect=True)
async def test_a_shared_transaction_leaves_nothing(client: AsyncClient) -> None:
    async with (
        rollback_session(db) as session,
        set_test_context(),
        put_savepoint_session_in_ctx(db, session),
    ):
        await client.post("/users", params={"name": "Ada"})
        assert await names() == ["Ada"]

    assert await names() == []


@pytest.mark.parametrize("both_ways", ["real commits"], indirect=True)
async def test_over_a_real_port() -> None:
    """What `python app.py --check` sees is what it must be, the websocket included."""
    program = [sys.executable, str(Path(__file__).with_name("app.py")), "--check"]

    done = await asyncio.to_thread(
        subprocess.run,
        program,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stdout + done.stderr
