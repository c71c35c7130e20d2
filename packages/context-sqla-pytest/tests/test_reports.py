"""What the plugin tells: leaks, statements, sessions that expire, and wrong configurations."""

import pytest

pytest_plugins = ["pytester"]

LEAKS = {
    "POST /leak": (
        "a connection is checked out",
        "opened by POST /leak at application.py:*in leak",
        "*await session.connection()",
    ),
    "POST /stray": ("is *", "opened by a unit of work at application.py:*in names", "*await (await db_session(*"),
}


@pytest.mark.parametrize("mode", ["shared", "real"])
@pytest.mark.parametrize("request_line", LEAKS)
def test_leak_names_the_request_and_the_line(project, mode, request_line):
    """A test that leaves a connection or a transaction open fails, and the next one works again."""
    path = request_line.split()[1]
    project.tests(f"""
        @pytest.mark.context_sqla({mode!r})
        async def test_leaves(client):
            await client.post("/users?name=a")
            await client.post({path!r})

        @pytest.mark.context_sqla({mode!r})
        async def test_next(client):
            assert (await client.post("/users?name=a")).status_code == 201
    """)

    result = project.run_apart("-p", "no:unraisableexception", "-p", "no:threadexception")

    result.assert_outcomes(passed=2, errors=1)
    what, where, source = LEAKS[request_line]
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_leaves*", "this test has left something open:", f"*{what}*{where}", source]
    )


def test_what_is_closed_in_time_is_no_leak(project):
    """Neither is what a fixture of a wider scope holds, nor what the test's own session has open."""
    project.add(
        "conftest",
        """
        @pytest_asyncio.fixture(scope="module", loop_scope="module")
        async def held(context_sqla_url):
            from application import db
            async with (await db.session_maker())() as session:
                yield await session.connection()
    """,
    )
    project.tests("""
        pytestmark = pytest.mark.asyncio(loop_scope="module")

        @pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.context_sqla(mode)) for mode in ("shared", "real")])
        async def test_it(held, client, context_sqla_session, mode):
            await context_sqla_session.scalar(select(User))
            session = await db.create_session()
            await session.connection()
            asyncio.get_running_loop().call_later(0.05, lambda: kept.append(asyncio.create_task(session.close())))
    """)

    project.run().assert_outcomes(passed=2)


def test_leak_check_can_be_switched_off(project):
    """By the ini option for all tests, by the marker for one."""
    project.configure("context_sqla_leak_check = false")
    project.tests("""
        @pytest.mark.context_sqla
        async def test_off(client):
            await client.post("/leak")

        @pytest.mark.context_sqla(leak_check=True)
        async def test_on(client):
            await client.post("/leak")

        @pytest.mark.context_sqla("real", leak_check=False)
        async def test_off_too(client):
            await client.post("/leak")
            await asyncio.sleep(0)
            await kept.pop().close()
    """)

    project.run_apart("-p", "no:unraisableexception").assert_outcomes(passed=3, errors=1)


def test_query_count_lists_the_statements(project):
    """Begin, commit and savepoints do not count, so that both modes have the same number; the report names lines and requests."""
    project.tests("""
        @pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.context_sqla(mode)) for mode in ("shared", "real")])
        async def test_right(client, mode):
            with assert_query_count(3) as queries:
                await client.post("/users?name=a")
                await client.post("/fail?name=b")
                await client.get("/users")
            assert [query.statement.split()[0] for query in queries] == ["INSERT", "INSERT", "SELECT"]
            with assert_query_count(0):
                assert await asyncio.sleep(0, "nothing")

        @pytest.mark.context_sqla
        async def test_wrong(client):
            with assert_query_count(1):
                await client.post("/users?name=a")
                await client.get("/users")

        @pytest.mark.context_sqla
        async def test_error_wins(client):
            with assert_query_count(1):
                raise LookupError("of the test")
    """)

    result = project.run()

    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "E*AssertionError: expected 1 query, sent 2",
            "E*1. application.py:*in add, for POST /users",
            "E*INSERT INTO users (name) VALUES*",
            "E*('a',)",
            "E*2. application.py:*in names, for GET /users",
            "E*SELECT users.name*",
            "E*LookupError: of the test",
        ]
    )
    result.stdout.no_fnmatch_line("*_queries.py*")


def test_sessions_that_expire_are_warned_about(project):
    """``expire_on_commit=True`` is explained before it ends in MissingGreenlet: once, and an error where warnings are errors."""
    project.add(
        "application",
        """
        db = DBConnect.from_url(os.environ["DATABASE_URL"], name="users", session_options={"expire_on_commit": True})
    """,
    )
    project.tests("""
        @pytest.mark.context_sqla
        async def test_shared(): pass

        @pytest.mark.context_sqla("real")
        async def test_real(): pass
    """)

    strict = project.run()
    lenient = project.run("-W", "default::context_sqla_pytest.ExpireOnCommitWarning")

    strict.assert_outcomes(errors=2)
    lenient.assert_outcomes(passed=2, warnings=1)
    lenient.stdout.fnmatch_lines(["*ExpireOnCommitWarning: <DBConnect 'users'*expire_on_commit=True*MissingGreenlet*"])


@pytest.mark.parametrize("scope", ["@pytest.mark.context_sqla", "@pytest.mark.context_sqla('shared')", ""])
def test_synchronous_test_cannot_share(project, scope):
    """It is told what to do instead."""
    project.tests(f"""
        {scope}
        def test_it(context_sqla_session): pass
    """)

    result = project.run()

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*make it 'async def', or test with real commits: @pytest.mark.context_sqla('real')"])


def test_asynchronous_test_that_nothing_runs(project):
    """It is told which plugins run it."""
    project.replace("asyncio_mode = auto", "asyncio_mode = strict")
    project.tests("""
        async def test_it(context_sqla_session): pass
    """)

    result = project.run()

    result.stdout.fnmatch_lines(["*mark it @pytest.mark.asyncio (pytest-asyncio) or @pytest.mark.anyio"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "context_sqla_connects =\n    application:db\n",
            "",
            "*name the application's DBConnect in the ini option context_sqla_connects*",
        ),
        (
            "application:db",
            "application:nothing",
            "*'application:nothing' in context_sqla_connects is not 'package.module:name'*",
        ),
        ("application:db", "application:app", "*application:app in context_sqla_connects is no DBConnect but FastAPI*"),
        ("application:Base", "application:none", "*'application:none' in context_sqla_metadata is not*"),
        ("[pytest]", "[pytest]\ncontext_sqla_mode = commit", "*context_sqla_mode is shared, real or off, not 'commit'*"),
    ],
)
def test_wrong_configuration(project, old, new, message):
    """It is named by its option."""
    project.replace(old, new)
    project.tests("""
        async def test_it(context_sqla_session): pass
    """)

    result = project.run()

    assert result.ret != 0
    (result.stderr if "mode" in new else result.stdout).fnmatch_lines([message])


def test_wrong_marker(project):
    """A mode that does not exist is told with those that do."""
    project.tests("""
        @pytest.mark.context_sqla("commit")
        async def test_it(): pass
    """)

    result = project.run()

    result.stdout.fnmatch_lines(["*takes a mode ('shared', 'real' or 'off') and leak_check=True or False: 'commit' is not*"])


def test_no_database_at_all(project, monkeypatch):
    """Without a URL and without programs of PostgreSQL it says how to get either."""
    monkeypatch.setattr("context_sqla_pytest._postgres.is_installed", lambda: False)
    project.tests("def test_it(): pass")

    result = project.pytester.runpytest_inprocess()

    result.stderr.fnmatch_lines(
        ["*pass --context-sqla-url, set CONTEXT_SQLA_URL, or pip install 'context-sqla-pytest?postgres?'*"]
    )


def test_what_there_is_can_be_asked_for(project):
    """``pytest --markers`` and ``--fixtures`` document the plugin; the header of a run names the database without its password (P20)."""
    markers = project.run("--markers")
    fixtures = project.run("--fixtures")
    header = project.run("--help")
    run = project.run()

    markers.stdout.fnmatch_lines(["@pytest.mark.context_sqla(mode='shared', leak_check=None): run the test in one transaction *"])
    fixtures.stdout.fnmatch_lines_random(
        ["context_sqla_session -- *", "context_sqla_sessions -- *", "context_sqla_connects *", "context_sqla_url *"]
    )
    header.stdout.fnmatch_lines_random(["*--context-sqla-url=URL*", "*context_sqla_connects (linelist):*"])
    run.stdout.fnmatch_lines(["context-sqla: postgresql, as given"])
    assert project.url.split(":")[2].split("@")[0] not in run.stdout.str()


def test_old_pytest_asyncio(project, monkeypatch):
    """One whose tests do not see what fixtures set is refused, and told the version that does."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.24.0")

    result = project.run()

    result.stderr.fnmatch_lines(["*needs pytest-asyncio 0.25 or newer, this is 0.24.0"])
