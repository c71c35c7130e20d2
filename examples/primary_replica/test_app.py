"""The application's tests on a real cluster: in one transaction that is rolled back at the end, and with real commits.

One transaction is on one connection, the primary's; both connects of the application work in it, so that a read sees what a test
or a request has written before. What replicas do is tested with real commits.
"""

import asyncio
import importlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from httpx import ASGITransport, AsyncClient
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from .cluster import Node, cluster, environment

HERE = Path(__file__).parent
NOTE = {"author": "Ada", "text": "hello"}


@pytest.fixture(name="servers", scope="module")
def _servers() -> Iterator[list[Node]]:
    """A primary and two replicas."""
    with asyncio.Runner() as runner:
        whole = cluster(replicas=2)
        yield runner.run(whole.__aenter__())
        runner.run(whole.__aexit__(None, None, None))


@pytest.fixture(name="app", scope="module")
def _app(servers: list[Node]) -> Iterator[Any]:
    """The module of the application, which reads its variables when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(servers).items():
            patch.setenv(name, value)
        yield importlib.import_module(".app", __package__)


@pytest_asyncio.fixture(name="started", autouse=True)
async def _started(app: Any, servers: list[Node]) -> AsyncIterator[None]:
    primary, *replicas = servers
    async with app.lifespan(app.app):
        await primary.execute("TRUNCATE notes")
        await primary.caught_up(*replicas)
        await app.hosts.ready(replicas=2)
        yield
        await app.db.close()
        await app.reads.close()


@pytest_asyncio.fixture(name="shared")
async def _shared(app: Any, started: None) -> AsyncIterator[AsyncSession]:
    """Let both connects of the application work in the test's own transaction."""
    async with rollback_session(app.db) as session:
        async with set_test_context(), put_savepoint_session_in_ctx(app.db, session):
            async with put_savepoint_session_in_ctx(app.reads, session):
                yield session


@pytest.fixture(name="both_ways", params=["shared transaction", "real commits"], autouse=True)
def _both_ways(request: pytest.FixtureRequest) -> str:
    if request.param == "shared transaction":
        request.getfixturevalue("shared")
    return request.param


@pytest_asyncio.fixture(name="client")
async def _client(app: Any, both_ways: str) -> AsyncIterator[AsyncClient]:
    async with new_client(app) as client:
        yield client


def new_client(app: Any) -> AsyncClient:
    """Return a visitor with cookies of its own."""
    return AsyncClient(transport=ASGITransport(app.app, raise_app_exceptions=False), base_url="https://test", timeout=60)


real_commits = pytest.mark.parametrize("both_ways", ["real commits"], indirect=True)


async def test_write_and_read(client: AsyncClient) -> None:
    written = await client.put("/notes/1", json=NOTE)
    answer = await client.get("/notes/1")
    listed = await client.get("/notes", params={"author": "Ada"})

    assert written.status_code == 201
    assert (answer.status_code, answer.json()["text"]) == (200, "hello")
    assert listed.json() == ["1"]
    assert (await client.get("/notes/2")).status_code == 404


async def test_the_same_write_twice_is_one(client: AsyncClient) -> None:
    """A client that does not know what became of its write asks again."""
    await client.put("/notes/1", json=NOTE)

    again = await client.put("/notes/1", json=NOTE)

    assert again.status_code == 200
    assert (await client.get("/notes", params={"author": "Ada"})).json() == ["1"]


async def test_ready(client: AsyncClient, servers: list[Node]) -> None:
    answer = await client.get("/ready")

    assert (answer.status_code, answer.json()) == (200, {"primary": servers[0].address})


@pytest.mark.parametrize("both_ways", ["shared transaction"], indirect=True)
async def test_test_and_application_see_each_others_rows(app: Any, client: AsyncClient, shared: AsyncSession) -> None:
    shared.add(app.Note(key="1", author="Ada", text="hello"))
    await shared.flush()

    await client.put("/notes/2", json=NOTE)

    assert (await client.get("/notes", params={"author": "Ada"})).json() == ["1", "2"]
    assert await shared.scalar(select(func.count()).select_from(app.Note)) == 2


@real_commits
async def test_a_shared_transaction_leaves_nothing(app: Any, client: AsyncClient, servers: list[Node]) -> None:
    async with rollback_session(app.db) as session, set_test_context(), put_savepoint_session_in_ctx(app.db, session):
        await client.put("/notes/1", json=NOTE)
        assert await session.scalar(select(func.count()).select_from(app.Note)) == 1

    assert await servers[0].fetchval("SELECT count(*) FROM notes") == 0


@real_commits
async def test_writes_go_to_the_primary_and_reads_to_replicas(app: Any, client: AsyncClient, servers: list[Node]) -> None:
    primary, *replicas = servers
    written = await client.put("/notes/1", json=NOTE)
    await primary.caught_up(*replicas)

    async with new_client(app) as somebody_else:
        read = {(await somebody_else.get("/notes/1")).json()["server"] for _ in range(10)}

    assert written.json()["server"] == primary.port
    assert read == {node.port for node in replicas}


@real_commits
async def test_a_visitor_reads_what_it_wrote_while_others_may_not(app: Any, client: AsyncClient, servers: list[Node]) -> None:
    """With replicas that do not replay, only the primary has it; the visitor's cookie leads there."""
    primary, *replicas = servers
    for node in replicas:
        await node.pause_replay()
    try:
        written = await client.put("/notes/1", json=NOTE)
        read = await client.get("/notes/1")
        async with new_client(app) as somebody_else:
            missing = await somebody_else.get("/notes/1")
    finally:
        for node in replicas:
            await node.resume_replay()

    assert "context-sqla-lsn=" in written.headers["set-cookie"]
    assert (read.status_code, read.json()["server"]) == (200, primary.port)
    assert missing.status_code == 404


@real_commits
async def test_without_a_primary_writes_are_503_and_reads_go_on(client: AsyncClient, servers: list[Node]) -> None:
    await client.put("/notes/1", json=NOTE)
    await servers[0].caught_up(*servers[1:])
    await asyncio.to_thread(servers[0].stop, "fast")
    try:
        refused = await client.put("/notes/2", json=NOTE)
        read = await client.get("/notes/1")
        ready = await client.get("/ready")
    finally:
        await asyncio.to_thread(servers[0].start)

    assert (refused.status_code, int(refused.headers["retry-after"])) == (503, 1)
    assert (read.status_code, ready.status_code) == (200, 200)
    assert ready.json() == {"primary": None}


@real_commits
async def test_a_session_that_is_ended_is_a_503_too(app: Any, client: AsyncClient, servers: list[Node]) -> None:
    """What is in flight on a server that is lost fails once, with an answer that says: ask again."""
    async with servers[0].session() as blocker:
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE notes")
            waiting = asyncio.ensure_future(client.put("/notes/1", json=NOTE))
            ended = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted AND relation = 'notes'::regclass"
            while await blocker.fetchval(ended) is None:
                await asyncio.sleep(0.01)
        refused = await waiting
    again = await client.put("/notes/1", json=NOTE)

    assert (refused.status_code, refused.json()) == (503, {"detail": "the database was lost; ask again"})
    assert again.status_code == 201


@real_commits
async def test_the_status_page_is_mounted(client: AsyncClient, servers: list[Node]) -> None:
    answer = await client.get("/postgres/master", params={"port": "1"})

    assert answer.text == servers[0].address
    assert "PostgreSQL hosts" in (await client.get("/postgres/")).text


@real_commits
@pytest.mark.parametrize("command", ["cluster.py --check", "cluster.py + failover.py"])
async def test_a_failover_under_load(command: str) -> None:
    """The README's commands: nothing stale, nothing lost, no more errors than there were requests on the dead server."""
    run = one_command if command == "cluster.py --check" else two_commands

    status, said = await asyncio.to_thread(run)
    print(said)

    assert status == 0, said
    assert "stale reads                                          0\n" in said
    assert "acknowledged writes that are lost                    0\n" in said


def one_command() -> tuple[int, str]:
    program = [sys.executable, str(HERE / "cluster.py"), "--check", "--port", "0", "--control", "0"]
    done = subprocess.run(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
    return done.returncode, done.stdout


def two_commands() -> tuple[int, str]:
    program = [sys.executable, str(HERE / "cluster.py"), "--port", "0", "--control", "0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as serving:
        try:
            assert serving.stdout is not None
            said = ""
            while "failover.py" not in said:
                line = serving.stdout.readline()
                assert line, said
                said += line
            other = [sys.executable, *said.splitlines()[-1].split()[1:], "--seconds", "4", "--clients", "10"]
            done = subprocess.run(other, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
            serving.send_signal(signal.SIGINT)
            assert serving.wait(60) == 0
        finally:
            serving.terminate()
    return done.returncode, done.stdout


@real_commits
async def test_it_says_what_is_missing() -> None:
    """`failover.py` alone names the other command."""
    program = [sys.executable, str(HERE / "failover.py"), "--port", "1", "--control", "1", "--seconds", "0.1", "--clients", "1"]

    done = await asyncio.to_thread(subprocess.run, program, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert "start 'python cluster.py' first" in done.stderr
