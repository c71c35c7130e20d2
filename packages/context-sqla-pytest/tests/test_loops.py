"""Event loops of every scope, of pytest-asyncio and of anyio: one connect of a module serves them all (P15)."""

import pytest

pytest_plugins = ["pytester"]

SCOPES = ["function", "class", "module", "package", "session"]

WORK = """
        for_each_mode = pytest.mark.parametrize(
            "mode", [pytest.param(mode, marks=pytest.mark.context_sqla(mode)) for mode in ("shared", "real", "shared", "real")]
        )

        async def check(client, session):
            assert (await client.get("/users")).json() == []
            assert (await client.post("/users?name=a")).status_code == 201
            await run_in_new_ctx(add, "b")
            assert list(await session.scalars(select(User.name).order_by(User.name))) == ["a", "b"]
"""


@pytest.mark.parametrize(("scope", "how"), [*((scope, "marker") for scope in SCOPES), ("session", "ini")])
def test_loop_of_pytest_asyncio(each_project, scope, how):
    """Both modes, one after the other, in a loop of each scope: nothing is attached to a different loop."""
    if how == "ini":
        each_project.configure(f"asyncio_default_test_loop_scope = {scope}")
    marker = f"@pytest.mark.asyncio(loop_scope={scope!r})" if how == "marker" else ""
    each_project.tests(
        WORK
        + f"""
        {marker}
        class TestScope:
            @for_each_mode
            async def test_it(self, client, context_sqla_session, mode):
                await check(client, context_sqla_session)

        async def test_in_the_default_loop(client, context_sqla_session):
            await check(client, context_sqla_session)
        """
    )
    if how == "marker":  # pytest-asyncio runs a fixture in one loop, whatever the test's
        each_project.add(
            "conftest",
            """
            @pytest_asyncio.fixture
            def client():
                return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        """,
        )
    else:
        each_project.replace("asyncio_default_fixture_loop_scope = function", f"asyncio_default_fixture_loop_scope = {scope}")

    each_project.run().assert_outcomes(passed=5)


def test_strict_mode(project):
    """Fixtures of the plugin are pytest-asyncio's own where it asks for that."""
    project.replace("asyncio_mode = auto", "asyncio_mode = strict")
    project.tests(
        WORK
        + """
        @pytest.mark.asyncio
        @for_each_mode
        async def test_it(client, context_sqla_session, mode):
            await check(client, context_sqla_session)
        """
    )

    project.run().assert_outcomes(passed=4)


@pytest.mark.parametrize("way", ["with pytest-asyncio", "alone"])
def test_loop_of_anyio(each_project, way):
    """The same under anyio's plugin, beside pytest-asyncio in strict mode and without it."""
    if way == "alone":
        for line in ("asyncio_mode = auto\n", "asyncio_default_fixture_loop_scope = function\n"):
            each_project.replace(line, "")
        each_project.replace("-p no:cacheprovider", "-p no:cacheprovider -p no:asyncio")
    else:
        each_project.replace("asyncio_mode = auto", "asyncio_mode = strict")
    each_project.pytester.makepyfile(
        conftest="""
        import httpx
        import pytest
        from application import app

        @pytest.fixture(scope="module")
        def anyio_backend():
            return "asyncio"

        @pytest.fixture
        async def client():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                yield client
        """
    )
    each_project.tests(
        WORK
        + """
        pytestmark = pytest.mark.anyio

        @for_each_mode
        async def test_it(client, context_sqla_session, mode):
            await check(client, context_sqla_session)
        """
    )

    each_project.run().assert_outcomes(passed=4)
