"""The clients of sanic-testing, in a test that shares its transaction and in one that does not."""

import asyncio

import pytest
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from context_sqla_sanic import setup
from sanic import text
from sanic_testing.testing import SanicASGITestClient, SanicTestClient


@pytest.fixture(name="app")
def _app(app, ledger, monkeypatch):
    """An application that writes what it is told."""
    monkeypatch.setattr(app.__class__, "__call__", app.__class__.__call__)  # the ASGI client replaces it
    setup(app, ledger.db)

    @app.post("/<name>/<status:int>")
    async def handler(request, name, status):
        await ledger.write(name)
        return text("ok", status)

    return app


async def test_asgi_client_joins_the_tests_transaction(app, ledger):
    """It runs the application in the test's loop: the same rules hold on savepoints, and all of it is gone at the end (P12)."""
    async with rollback_session(ledger.db) as session:
        async with set_test_context(), put_savepoint_session_in_ctx(ledger.db, session):
            client = SanicASGITestClient(app)
            statuses = [(await client.post(path))[1].status for path in ("/a/201", "/b/400", "/c/200")]
            await client.aclose()
        rows = (await (await session.connection()).exec_driver_sql("SELECT name FROM item ORDER BY name")).scalars().all()

    assert statuses == [201, 400, 200]
    assert rows == ["a", "c"]
    assert ledger.names() == ""


async def test_asgi_client_commits_without_a_test_context(app, ledger):
    """It starts and stops the application for each request, which closes the connects each time: they open again (P15)."""
    client = SanicASGITestClient(app)
    for path in ("/a/201", "/b/400", "/c/200"):
        await client.post(path)
    await client.aclose()

    assert ledger.names() == "a c"


def test_client_with_a_loop_of_its_own_commits(app, ledger):
    """`app.test_client` runs the whole server for each request, in a loop of its own (P15)."""
    client = SanicTestClient(app)

    statuses = [client.post(path)[1].status for path in ("/a/201", "/b/400", "/c/200")]

    assert (statuses, ledger.names()) == ([201, 400, 200], "a c")


def test_client_with_a_loop_of_its_own_is_refused_in_the_tests_transaction(app, ledger, caplog):
    """The test's connection lives in another loop: each request is a 500, whose log names the remedy (P12)."""
    app.config.MOTD = False

    async def share():
        async with rollback_session(ledger.db) as session:
            async with set_test_context(), put_savepoint_session_in_ctx(ledger.db, session):
                return await asyncio.to_thread(_statuses, app)

    with caplog.at_level("ERROR"):
        statuses = asyncio.run(share())

    assert statuses == [500, 500]
    assert "ASGITransport" in caplog.text
    assert ledger.names() == ""


def _statuses(app):
    with asyncio.Runner() as runner:  # a server in another thread and loop, as the client's is
        return runner.run(_requests(app))


async def _requests(app):
    client = SanicASGITestClient(app)
    answers = [await client.post("/a/201"), await client.get("/nowhere")]
    await client.aclose()
    return [answer.status for _, answer in answers]
