"""The two ways of testing, on each database: what tests and application see of each other, and what is left."""

pytest_plugins = ["pytester"]


def test_shared_transaction(each_project):
    """Test and application see each other's rows, requests each other's commits, and the next test nothing of it (P12)."""
    each_project.tests("""
        async def test_both(client, context_sqla_session):
            context_sqla_session.add(User(name="test"))
            assert (await client.post("/users?name=a")).status_code == 201
            assert (await client.post("/users?name=b")).status_code == 201
            assert (await client.get("/users")).json() == ["a", "b", "test"]
            assert list(await context_sqla_session.scalars(select(User.name).order_by(User.name))) == ["a", "b", "test"]

        @pytest.mark.context_sqla
        async def test_by_marker(client):
            assert (await client.get("/users")).json() == []
            assert await names() == []
    """)

    each_project.run().assert_outcomes(passed=2)


def test_commits_and_rollbacks_are_those_of_savepoints(each_project):
    """An error takes back what its request wrote and no more; ``on_commit`` runs when the application has committed (P12, P14)."""
    each_project.tests("""
        async def test_it(client, context_sqla_session):
            await client.post("/users?name=a")
            assert (await client.post("/fail?name=b")).status_code == 409
            assert outbox == ["a"]
            assert await names() == ["a"]
            await context_sqla_session.commit()
            await add("c")
            await context_sqla_session.rollback()
            assert await names() == ["a"]
    """)

    each_project.run().assert_outcomes(passed=1)


def test_every_kind_of_unit_joins(each_project):
    """``run_in_new_ctx``, ``db_context``, ``new_non_ctx_session`` and background tasks share the transaction too (P12)."""
    each_project.tests("""
        async def test_all(client, context_sqla_session):
            await run_in_new_ctx(add, "new ctx")
            async with db_context():
                await add("db_context")
            async with new_non_ctx_session(db) as session:
                assert await session.scalar(select(func.count()).select_from(User)) == 2
                session.add(User(name="non ctx"))
                await session.commit()
            async with new_non_ctx_atomic_session(db) as session:
                session.add(User(name="atomic"))
            await client.post("/later?name=later")
            assert await names() == ["atomic", "db_context", "later", "new ctx", "non ctx"]

        async def test_nothing_is_left(context_sqla_session):
            assert await names() == []
    """)

    each_project.run().assert_outcomes(passed=2)


def test_ten_units_at_once(each_project):
    """Each of ten units under ``gather`` is all or nothing, and those that fail take no neighbour's rows with them (P12)."""
    each_project.tests("""
        async def work(number):
            await add(f"{number} a")
            await asyncio.sleep(0)
            await add(f"{number} b", error=ValueError(number) if number % 3 == 0 else None)

        async def test_gather(context_sqla_session):
            results = await asyncio.gather(*(run_in_new_ctx(work, number) for number in range(10)), return_exceptions=True)
            assert [error.args for error in results if error] == [(0,), (3,), (6,), (9,)]
            assert await names() == [f"{number} {half}" for number in (1, 2, 4, 5, 7, 8) for half in "ab"]
    """)

    each_project.run().assert_outcomes(passed=1)


def test_overlapping_units_are_told_to_commit_for_real(project):
    """A statement of a unit while one inside it has the connection names the other mode (P12)."""
    project.tests("""
        @pytest.mark.context_sqla
        async def test_overlap():
            async with db_context():
                outer = await db_session(db)
                async with db_context():
                    await names()
                    with pytest.raises(SessionBusyError, match="needs real commits"):
                        await outer.execute(text("SELECT 1"))
    """)

    project.run().assert_outcomes(passed=1)


def test_fixtures_write_in_the_transaction(each_project):
    """What the test's own fixtures write is there for the application, and gone for the next test (P12)."""
    each_project.add(
        "conftest",
        """
        from context_sqla import db_session
        from application import User, db

        @pytest_asyncio.fixture
        async def ada(context_sqla_session):
            context_sqla_session.add(User(name="Ada"))
            await context_sqla_session.commit()

        @pytest_asyncio.fixture(autouse=True)
        async def bob():
            (await db_session(db)).add(User(name="Bob"))
    """,
    )
    each_project.tests("""
        async def test_with(ada, client):
            assert (await client.get("/users")).json() == ["Ada", "Bob"]

        @pytest.mark.context_sqla
        async def test_without(client):
            assert (await client.get("/users")).json() == ["Bob"]
    """)

    each_project.run().assert_outcomes(passed=2)


def test_real_commits(each_project):
    """Others see what the application commits; the next test finds empty tables, and numbers begin anew."""
    each_project.tests("""
        @pytest.mark.context_sqla("real")
        @pytest.mark.parametrize("number", [1, 2, 3])
        async def test_commits(number, client, context_sqla_session):
            assert (await client.post(f"/users?name={number}")).status_code == 201
            await client.post("/letters?user_id=1")
            async with new_non_ctx_session(db) as other:
                assert (await other.execute(select(User.id, User.name))).all() == [(1, str(number))]
            assert await context_sqla_session.scalar(select(User.name)) == str(number)
            context_sqla_session.add(User(name="mine"))
            await context_sqla_session.commit()
            assert (await client.get("/users")).json() == [str(number), "mine"]
    """)

    each_project.run().assert_outcomes(passed=3)


def test_real_commits_empty_what_was_written_to(each_project):
    """SQL by hand counts too, and so do children of what is emptied; other tables, and those to keep, stay as they are."""
    each_project.configure("context_sqla_keep_tables =", "    kinds")
    each_project.tests("""
        async def count(what):
            async with new_non_ctx_session(db) as session:
                return await session.scalar(select(func.count()).select_from(what))

        async def execute(*statements):
            async with new_non_ctx_atomic_session(db) as session:
                for statement in statements:
                    await session.execute(text(statement))

        @pytest.mark.context_sqla("off")
        async def test_before(context_sqla_url):
            await execute("INSERT INTO users (id, name) VALUES (1, 'before')", "INSERT INTO letters VALUES (1, 1)")

        @pytest.mark.context_sqla("real")
        async def test_reads(client):
            assert (await client.get("/users")).json() == ["before"]
            await execute("INSERT INTO kinds VALUES ('a')", "SELECT name FROM users -- an update of letters")

        @pytest.mark.context_sqla("real")
        async def test_writes():
            assert [await count(table) for table in (User, Letter, Kind)] == [1, 1, 1]
            await execute('WITH x AS (SELECT 1)\\n Update "users" SET name = \\'b\\'')

        @pytest.mark.context_sqla("off")
        async def test_after():
            assert [await count(table) for table in (User, Letter, Kind)] == [0, 0, 1]
    """)

    each_project.run().assert_outcomes(passed=4)


def test_several_connects(each_project):
    """Each connect has its shared transaction, or its tables emptied; the fixture gives a session of each (P9, P12)."""
    each_project.replace("application:db", "application:db\n    application:other")
    each_project.add(
        "application",
        """
        other = DBConnect.from_url(os.environ["DATABASE_URL"].replace("test.db", "other.db"), name="other")
    """,
    )
    each_project.add(
        "conftest",
        """
        @pytest_asyncio.fixture(autouse=True)
        async def tables_of_the_other(context_sqla_url):
            from application import Base, other
            async with (await other.session_maker()).kw["bind"].begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
    """,
    )
    each_project.tests("""
        async def both():
            (await db_session(db)).add(User(name="in db"))
            (await db_session(other)).add(Kind(name="in other"))

        async def test_shared(context_sqla_sessions):
            await run_in_new_ctx(both)
            assert await context_sqla_sessions[db].scalar(select(User.name)) == "in db"
            assert await context_sqla_sessions[other].scalar(select(Kind.name)) == "in other"
            assert await (await db_session(other)).scalar(select(Kind.name)) == "in other"

        @pytest.mark.context_sqla("real")
        @pytest.mark.parametrize("number", [1, 2])
        async def test_real(context_sqla_sessions, number):
            for connect, what in ((db, User.name), (other, Kind.name)):
                assert await context_sqla_sessions[connect].scalar(select(what)) is None
                await context_sqla_sessions[connect].rollback()
            await run_in_new_ctx(both)
    """)

    each_project.run().assert_outcomes(passed=3)


def test_deferred_constraint_fails_where_production_fails(project):
    """It is checked at each commit of the application, although nothing is committed; and goes on being deferred (P4, P12)."""
    project.tests("""
        from sqlalchemy.exc import IntegrityError

        @pytest.mark.context_sqla
        @pytest.mark.parametrize("way", ["request", "unit", "by hand", "non ctx"])
        async def test_orphan(client, way):
            if way == "request":
                with pytest.raises(IntegrityError, match="letters"):
                    await client.post("/letters?user_id=5")
                return
            with pytest.raises(IntegrityError, match="letters"):
                if way == "non ctx":
                    async with new_non_ctx_session(db) as session:
                        session.add(Letter(user_id=5))
                        await session.commit()
                async with db_context():
                    (await db_session(db)).add(Letter(user_id=5))
                    if way == "by hand":
                        await (await db_session(db)).commit()
            async with db_context():
                assert await (await db_session(db)).scalar(select(Letter.id)) is None

        @pytest.mark.context_sqla
        async def test_parent_after_its_child():
            async with db_context():
                session = await db_session(db)
                await session.execute(text("INSERT INTO letters (id, user_id) VALUES (1, 5)"))
                await session.execute(text("INSERT INTO users (id, name) VALUES (5, 'a')"))
            async with db_context():
                await (await db_session(db)).execute(text("INSERT INTO letters (id, user_id) VALUES (2, 6)"))
                await (await db_session(db)).execute(text("INSERT INTO users (id, name) VALUES (6, 'b')"))
    """)

    project.run().assert_outcomes(passed=5)


def test_captured_callbacks(project):
    """``capture_on_commit`` keeps them from running, or only lists them with ``execute=True`` (P14)."""
    project.tests("""
        @pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.context_sqla(mode)) for mode in ("shared", "real")])
        async def test_capture(client, mode):
            with capture_on_commit() as callbacks:
                await client.post("/users?name=a")
                await client.post("/fail?name=b")
            assert (len(callbacks), outbox) == (1, [])
            callbacks[0]()
            with capture_on_commit(execute=True) as callbacks:
                await client.post("/users?name=c")
            assert (len(callbacks), outbox) == (1, ["a", "c"])
    """)

    project.run().assert_outcomes(passed=2)


def test_mode_of_the_ini_option(project):
    """It holds for tests without a marker; synchronous ones, which cannot share, commit for real."""
    project.configure("context_sqla_mode = shared")
    project.tests("""
        async def test_shared(client):
            await client.post("/users?name=a")
            assert await names() == ["a"]

        def test_synchronous():
            async def work():
                async with db_context():
                    await add("b")
            asyncio.run(work())

        @pytest.mark.context_sqla("real")
        async def test_real(client):
            assert (await client.get("/users")).json() == []

        @pytest.mark.context_sqla("off")
        async def test_off():
            with pytest.raises(ContextNotInitiatedError):
                await db_session(db)
    """)

    project.run().assert_outcomes(passed=4)


def test_mode_of_a_module_and_of_a_class(project):
    """The closest marker counts."""
    project.tests("""
        pytestmark = pytest.mark.context_sqla("real")

        async def committed():
            async with new_non_ctx_session(db) as session:
                return await session.scalar(select(func.count()).select_from(User))

        async def test_module(client):
            await client.post("/users?name=a")
            assert not is_context_initiated()

        @pytest.mark.context_sqla("shared")
        class TestShared:
            async def test_class(self, client):
                assert is_context_initiated()
    """)

    project.run().assert_outcomes(passed=2)


def test_tests_that_ask_for_nothing_are_left_alone(project):
    """Neither is a database made nor a module of the application imported for them."""
    project.replace("application:db", "nowhere:db")
    project.url = "postgresql+asyncpg://nobody@127.0.0.1:1/nothing"
    project.pytester.makepyfile(conftest="", test_it="def test_plain(): pass\n\n\nasync def test_async(): pass\n")

    project.run().assert_outcomes(passed=2)


def test_connects_of_a_fixture(project):
    """A project may make its connects in a fixture of its own, from the URL of the tests' database."""
    project.replace("context_sqla_connects =\n    application:db\n", "")
    project.add(
        "conftest",
        """
        from context_sqla import DBConnect

        @pytest.fixture(scope="session")
        def own(context_sqla_url):
            return DBConnect.from_url(context_sqla_url, name="own")

        @pytest.fixture(scope="session")
        def context_sqla_connects(own):
            return [own]
    """,
    )
    project.tests("""
        async def test_it(own, context_sqla_session):
            context_sqla_session.add(User(name="a"))
            await context_sqla_session.flush()
            assert await run_in_new_ctx(names, own) == ["a"]
    """)

    project.run().assert_outcomes(passed=1)


def test_schema_of_a_hook(project):
    """A hook makes the tables, once, outside of event loops: Alembic's ``command.upgrade`` works in it."""
    project.add(
        "conftest",
        """
        import asyncio
        import pathlib
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import create_async_engine

        def pytest_context_sqla_create_schema(config, url):
            async def upgrade():
                engine = create_async_engine(url)
                async with engine.begin() as connection:
                    await connection.execute(text("CREATE TABLE users (id serial PRIMARY KEY, name text)"))
                await engine.dispose()

            asyncio.run(upgrade())
            return True
    """,
    )
    project.tests("""
        @pytest.mark.parametrize("number", [1, 2])
        async def test_it(context_sqla_session, number):
            await add("a")
            assert await context_sqla_session.scalar(text("SELECT to_regclass('letters')")) is None
    """)

    project.run().assert_outcomes(passed=2)


def test_psycopg(project):
    """Both ways work with the other driver of PostgreSQL too."""
    project.url = project.url.replace("+asyncpg", "+psycopg")
    project.tests("""
        @pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.context_sqla(mode)) for mode in ("shared", "real") * 2])
        async def test_it(client, context_sqla_session, mode):
            assert (await client.post("/users?name=a")).status_code == 201
            with pytest.raises(Exception, match="violates foreign key"):
                await client.post("/letters?user_id=500")
            assert await context_sqla_session.scalar(select(User.name)) == "a"
    """)

    project.run().assert_outcomes(passed=4)
