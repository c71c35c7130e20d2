"""Each protection is switched off in turn: then the test that guards it fails, so that it would fail if the protection were lost."""

from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from context_sqla import testing
from context_sqla._unit import Unit
from context_sqla_pytest import _cleaning, _leaks, _modes, _queries

pytest_plugins = ["pytester"]


@dataclass(frozen=True)
class Protection:
    """A protection and its guard.

    Args:
        guard: tests that pass, or that the plugin lets fail, with it.
        outcomes: of the guard.
        off: switches it off.
        without: the outcomes then.
    """

    guard: str
    outcomes: dict
    off: object
    without: dict


@asynccontextmanager
async def committing_session(connect):
    """What `rollback_session` would be if it did not roll back."""
    async with (await connect.session_maker())() as session:
        yield session
        await session.commit()


async def take_at_once(turns, unit):
    """What `Turns.take` would be if units did not wait for each other."""
    turns.stack.append(unit)
    return testing.Place(turns, unit)


async def no_place(unit, connect):
    """What `Unit.take_place` would be if nothing shared."""


async def cleaned(writes, connect, kept):
    """What `Writes.clean` would be if nothing were emptied."""


NEXT = """
        {marker}
        @pytest.mark.parametrize("number", [1, 2])
        async def test_it(client, number):
            assert (await client.post("/users?name=a")).status_code == 201
"""

PROTECTIONS = {
    "the shared transaction is rolled back": Protection(
        NEXT.format(marker="@pytest.mark.context_sqla"),
        {"passed": 2},
        lambda patch: patch.setattr(_modes, "rollback_session", committing_session),
        {"passed": 1, "failed": 1},
    ),
    "real commits are emptied": Protection(
        NEXT.format(marker="@pytest.mark.context_sqla('real')"),
        {"passed": 2},
        lambda patch: patch.setattr(_cleaning.Writes, "clean", cleaned),
        {"passed": 1, "failed": 1},
    ),
    "deferred constraints are checked": Protection(
        """
        @pytest.mark.context_sqla
        async def test_it(client):
            with pytest.raises(Exception, match="violates foreign key"):
                await client.post("/letters?user_id=1")
        """,
        {"passed": 1},
        lambda patch: patch.setattr(testing, "_check_deferred_constraints", lambda session: None),
        {"failed": 1},
    ),
    "units take turns": Protection(
        """
        async def work(number):
            await add(f"{number} a")
            await asyncio.sleep(0)
            await add(f"{number} b", error=ValueError() if number % 3 == 0 else None)

        @pytest.mark.context_sqla(leak_check=False)
        async def test_it():
            results = await asyncio.gather(*(run_in_new_ctx(work, number) for number in range(10)), return_exceptions=True)
            assert [number for number, error in enumerate(results) if error] == [0, 3, 6, 9]
            assert len(await names()) == 12
        """,
        {"passed": 1},
        lambda patch: patch.setattr(testing.Turns, "take", take_at_once),
        {"failed": 1},
    ),
    "a unit does not work in the savepoint of one inside it": Protection(
        """
        @pytest.mark.context_sqla
        async def test_it():
            async with db_context():
                outer = await db_session(db)
                async with db_context():
                    await names()
                    with pytest.raises(SessionBusyError):
                        await outer.execute(text("SELECT 1"))
        """,
        {"passed": 1},
        lambda patch: patch.setattr(testing.Place, "is_taken", lambda place: False),
        {"failed": 1, "errors": 1},
    ),
    "sessions outside of units share": Protection(
        """
        @pytest.mark.context_sqla
        async def test_it():
            await run_in_new_ctx(add, "a")
            async with new_non_ctx_session(db) as session:
                assert await session.scalar(select(User.name)) == "a"
        """,
        {"passed": 1},
        lambda patch: patch.setattr(Unit, "take_place", no_place),
        {"failed": 1},
    ),
    "leaks are found": Protection(
        """
        pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.context_sqla]

        async def test_leaves():
            kept.append(await db.create_session())
            await kept[0].connection()

        async def test_closes():
            await kept.pop().invalidate()
        """,
        {"passed": 2, "errors": 1},
        lambda patch: patch.setattr(_leaks.Leaks, "found", lambda leaks: []),
        {"passed": 2},
    ),
    "statements are counted": Protection(
        """
        @pytest.mark.context_sqla
        async def test_it(client):
            with pytest.raises(AssertionError):
                with assert_query_count(0):
                    await client.get("/users")
        """,
        {"passed": 1},
        lambda patch: patch.setattr(_queries.assert_query_count, "_note", lambda *_: None),
        {"failed": 1},
    ),
    "expiring sessions are told": Protection(
        """
        db = DBConnect.from_url(os.environ["DATABASE_URL"], session_options={"expire_on_commit": True})

        @pytest.fixture(scope="session")
        def context_sqla_connects(): return [db]

        @pytest.mark.context_sqla
        async def test_it(): pass
        """,
        {"errors": 1},
        lambda patch: patch.setattr(_modes.Stage, "_check_expiry", lambda *_: None),
        {"passed": 1},
    ),
    "callbacks are captured": Protection(
        """
        @pytest.mark.context_sqla
        async def test_it(client):
            with capture_on_commit() as callbacks:
                await client.post("/users?name=a")
            assert (len(callbacks), outbox) == (1, [])
        """,
        {"passed": 1},
        lambda patch: patch.setattr("context_sqla._context.is_captured", lambda callback: False),
        {"failed": 1},
    ),
}


@pytest.mark.parametrize("name", PROTECTIONS)
def test_guard_fails_without_its_protection(project, monkeypatch, name):
    """With the protection the guard has its outcome; without it another one."""
    protection = PROTECTIONS[name]
    project.tests(protection.guard)
    quiet = ("-p", "no:unraisableexception", "-p", "no:threadexception")

    project.run(*quiet).assert_outcomes(**protection.outcomes)

    protection.off(monkeypatch)
    project.run(*quiet).assert_outcomes(**protection.without)
