"""The tree of errors, what each says, and the two questions that can be asked of any exception."""

import asyncio
import inspect

import context_sqla
import pytest
from context_sqla import (
    ContextAlreadyInitiatedError,
    ContextClosedError,
    ContextNotInitiatedError,
    ContextSqlaError,
    DBConnect,
    DriverError,
    ForeignLoopError,
    SessionBusyError,
    UnavailableError,
    UnsupportedOptionError,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    committed_connects,
    db_context,
    db_session,
    errors,
    get_db_session_from_context,
    init_db_session_ctx,
    is_in_doubt,
    keep_transaction,
    on_commit,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
    run_in_new_ctx,
)
from context_sqla.adapters import check_connects
from context_sqla.errors import _outcome_of
from context_sqla.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from support.databases import Databases, no_tasks_left
from support.rows import insert, insert_orphan

CLASSES = [value for name in errors.__all__ if inspect.isclass(value := getattr(errors, name))]


@pytest.fixture(name="databases")
async def _databases(tmp_path):
    """Databases in files; at the end everything is given back, closed and over."""
    async with no_tasks_left() as problems:
        databases = Databases("aiosqlite", tmp_path)
        yield databases
        await databases.whole(problems)
        await databases.gone(problems)
    assert problems == []


@pytest.fixture(name="db")
async def _db(databases):
    return databases.connect(await databases.database("first"), "db")


@pytest.fixture(name="other")
async def _other(databases):
    return databases.connect(await databases.database("second"), "other")


# The tree


@pytest.mark.parametrize("cls", CLASSES)
def test_tree_has_one_root(cls):
    """Who catches ``ContextSqlaError`` catches every error of ours (P19)."""
    assert issubclass(cls, ContextSqlaError)


def test_classes_are_the_named_ones():
    """The contract's classes are all there (P19)."""
    assert {cls.__name__ for cls in CLASSES} >= {
        "ContextSqlaError",
        "ContextNotInitiatedError",
        "ContextAlreadyInitiatedError",
        "ContextClosedError",
        "SessionBusyError",
        "UnavailableError",
        "CursorClosedError",
        "DriverError",
        "ForeignLoopError",
        "UnsupportedOptionError",
        "SetupError",
    }


def test_root_is_a_plain_exception():
    """``except Exception`` catches ours, and no other family does (P19)."""
    assert ContextSqlaError.__bases__ == (Exception,)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_at_the_top_as_well(name):
    """``from context_sqla import ...`` gives the same object as ``context_sqla.errors`` (P19)."""
    assert getattr(context_sqla, name) is getattr(errors, name)


@pytest.mark.parametrize("cls", CLASSES)
def test_error_has_a_docstring(cls):
    """Each class says what it tells (P19)."""
    assert inspect.getdoc(cls)


def test_unavailable_error_says_when_to_come_again():
    """``retry_after`` is a keyword, None where nobody knows (P19)."""
    error = UnavailableError("no master", retry_after=2.5)

    assert (str(error), error.retry_after) == ("no master", 2.5)
    assert UnavailableError("no master").retry_after is None
    with pytest.raises(TypeError):
        UnavailableError("no master", 2.5)  # type: ignore[misc]


# Outside every unit


async def _atomic(db):
    async with atomic_db_session(db):
        pass


async def _on_commit(db):
    on_commit(list, connect=db)


async def _get(db):
    get_db_session_from_context(db)


async def _put(db):
    put_db_session_to_context(db, AsyncSession())


async def _pop(db):
    pop_db_session_from_context(db)


OF_A_CONNECT = [
    db_session,
    commit_db_session,
    rollback_db_session,
    close_db_session,
    keep_transaction,
    _atomic,
    _on_commit,
    _get,
    _put,
    _pop,
]


@pytest.mark.parametrize("ask", OF_A_CONNECT)
async def test_outside_a_unit_there_is_no_session(db, databases, ask):
    """Outside a unit: an error that names the connect and ``db_context()``, and nothing was opened (P11, P19)."""
    with pytest.raises(ContextNotInitiatedError, match=r"'db'.*db_context\(\)"):
        await ask(db)

    assert databases.engines == []


async def _on_commit_of_all():
    on_commit(list)


OF_ALL = [
    commit_all_sessions,
    rollback_all_sessions,
    close_all_sessions,
    lambda: auto_commit_by_status_code(200),
    _on_commit_of_all,
]


@pytest.mark.parametrize("ask", OF_ALL)
async def test_outside_a_unit_there_is_nothing_to_end(ask):
    """Outside a unit: an error that names ``db_context()`` (P11, P19)."""
    with pytest.raises(ContextNotInitiatedError, match=r"db_context\(\)"):
        await ask()


async def test_savepoint_session_needs_a_test_context(db):
    """Outside ``set_test_context`` the helper says what it needs (P19)."""
    async with rollback_session(db) as session:
        with pytest.raises(ContextNotInitiatedError, match="set_test_context"):
            async with put_savepoint_session_in_ctx(db, session):
                pass


# Inside one, and too late


async def test_second_context_by_hand_names_the_remedy():
    """A unit by hand inside another one: an error that names ``force=True`` (P19)."""
    token = init_db_session_ctx()
    with pytest.raises(ContextAlreadyInitiatedError, match="force=True"):
        init_db_session_ctx()
    await reset_db_session_ctx(token)


@pytest.mark.parametrize("ask", [db_session, keep_transaction, _atomic])
async def test_task_that_outlived_its_unit_asks_for_a_session(db, databases, ask):
    """An error that names the connect, ``db_context()`` and ``run_in_new_ctx()`` (P10, P19)."""
    ended = asyncio.Event()

    async def late():
        await asyncio.wait_for(ended.wait(), 10)
        await ask(db)

    async with db_context():
        task = asyncio.create_task(late())
    ended.set()
    with pytest.raises(ContextClosedError, match=r"'db'.*db_context\(\).*run_in_new_ctx\(\)"):
        await task

    assert databases.engines == []


async def test_session_that_outlived_its_unit_says_so(db):
    """A captured session refuses with an error that names the connect and what to do instead (P10, P19)."""
    async with db_context():
        session = await db_session(db)
    with pytest.raises(ContextClosedError, match=r"'db'.*db_session\(\).*db_context\(\).*run_in_new_ctx\(\)"):
        await session.execute(text("SELECT 1"))


async def test_callback_of_a_unit_that_has_ended_is_refused():
    """A task that outlived its unit cannot register a callback that nobody would ever run (P10, P14)."""
    ended = asyncio.Event()

    async def late():
        await asyncio.wait_for(ended.wait(), 10)
        on_commit(list)

    async with db_context():
        task = asyncio.create_task(late())
    ended.set()
    with pytest.raises((ContextClosedError, ContextNotInitiatedError), match="unit of work"):
        await task


async def test_statement_while_the_unit_commits_is_refused(db):
    """A task that uses the session while its unit commits gets an error that names the connect and the remedy (P7a, P19)."""
    committing = asyncio.Event()
    refused = asyncio.Event()
    seen = []

    async def meddle():
        session = await db_session(db)
        await asyncio.wait_for(committing.wait(), 10)
        try:
            await session.execute(text("SELECT 1"))
        except SessionBusyError as exc:
            seen.append(str(exc))
        finally:
            refused.set()

    async def hook(session):
        committing.set()
        await asyncio.wait_for(refused.wait(), 10)

    db.before_commit.append(hook)
    async with db_context():
        await insert(db, "a")
        task = asyncio.create_task(meddle())
    await task

    assert len(seen) == 1
    assert "'db'" in seen[0]
    assert "await the task" in seen[0]


async def test_close_inside_a_unit_of_its_own_names_the_remedy(db):
    """``DBConnect.close()`` would wait for the unit that it is called in: an error that names the connect (P15, P19)."""
    async with db_context():
        await insert(db, "a")
        with pytest.raises(ContextSqlaError, match=r"'db'.*shutdown"):
            await db.close()


# Options, drivers, hosts, loops


async def test_option_that_cannot_be_kept_names_option_and_connect(db):
    """Which option, which connect, which dialect (P17, P19)."""
    async with db_context():
        with pytest.raises(UnsupportedOptionError, match=r"'db'.*read_only.*sqlite"):
            async with atomic_db_session(db, read_only=True):
                pass


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+nosuchdriver://u:secret@h/d", "asyncpg"),
        ("nosuchdatabase://u:secret@h/d", "nosuchdatabase"),
        ("postgresql+psycopg2://u:secret@h/d", "asyncpg"),
        ("sqlite:///d", "aiosqlite"),
        ("mysql+aiomysql://u:secret@h/d", "pip install 'aiomysql'"),
        ("mysql+asyncmy://u:secret@h/d", "pip install 'asyncmy'"),
    ],
)
def test_driver_that_does_not_do_names_the_package(url, message):
    """Unknown, not asynchronous, not installed: the error says what to write or to install, and no password (P19, P20)."""
    with pytest.raises(DriverError, match=message) as caught:
        DBConnect.from_url(url)

    assert "secret" not in str(caught.value)


async def test_connect_without_a_host_is_a_value_error(tmp_path):
    """Without a host the first use is a ``ValueError`` that names the connect and ``change_host`` (SEED, P19)."""
    db = DBConnect(lambda host: create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a"), async_sessionmaker, name="hostless")
    async with db_context():
        with pytest.raises(ValueError, match=r"'hostless'.*change_host"):
            await db_session(db)


@pytest.mark.parametrize("host", ["", "  "])
async def test_empty_host_is_a_value_error(db, host):
    """An empty host is refused wherever one is given, and the connect stays where it is (SEED)."""
    before = db.host
    for point in (db.connect, db.change_host):
        with pytest.raises(ValueError, match="empty"):
            await point(host)
    with pytest.raises(ValueError, match="empty"):
        DBConnect(lambda host: None, lambda engine: None, host)  # type: ignore[arg-type,return-value]

    assert db.host == before


async def test_engine_of_another_loop_names_the_remedy(tmp_path):
    """An adopted engine that another loop uses: an error that names the connect and ``from_url()`` (P15, P19)."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a")
    db = DBConnect.from_sessionmaker(async_sessionmaker(engine), name="adopted")

    async def use():
        async with db_context():
            await (await db_session(db)).execute(text("SELECT 1"))

    await use()
    with pytest.raises(ForeignLoopError, match=r"'adopted'.*from_url\(\)"):
        await asyncio.to_thread(asyncio.run, use())
    await db.close()
    await engine.dispose()


async def test_test_context_of_another_loop_names_the_remedy():
    """An application in another loop cannot join a test's context: an error that names ``httpx.ASGITransport`` (P12, P19)."""

    async def work():
        async with db_context():
            pass

    async with set_test_context():
        with pytest.raises(ForeignLoopError, match=r"httpx\.ASGITransport"):
            await asyncio.to_thread(asyncio.run, work())


async def test_overlapping_units_of_a_test_name_the_remedy(db):
    """A unit that has lost the test's connection to another one: an error that names the connect and real commits (P12, P19)."""
    async with rollback_session(db) as session, set_test_context(), put_savepoint_session_in_ctx(db, session) as mine:
        async with db_context():
            await insert(db, "a")
            with pytest.raises(SessionBusyError, match=r"'db'.*real commits"):
                await mine.execute(text("SELECT 1"))


async def test_two_statements_at_once_get_a_note(db):
    """SQLAlchemy's own complaint passes through the unit with a note that names ``run_in_new_ctx`` (P2)."""
    with pytest.raises(Exception, match="concurrent") as caught:
        async with db_context():
            session = await db_session(db)
            await asyncio.gather(session.execute(text("SELECT 1")), session.execute(text("SELECT 2")))

    assert any("run_in_new_ctx" in note for note in caught.value.__notes__)


# is_in_doubt, committed_connects


def _in_doubt(exc=None):
    exc = exc or RuntimeError("in doubt")
    _outcome_of(exc).in_doubt = True
    return exc


def _chained(cause, *, how):
    try:
        try:
            raise cause
        except RuntimeError as caught:
            if how == "from":
                raise ValueError from caught
            if how == "suppressed":
                raise ValueError from None
            raise ValueError
    except ValueError as exc:
        return exc


def test_ordinary_error_is_not_in_doubt():
    """An exception that no commit has to do with answers no, and names no connect."""
    assert not is_in_doubt(ValueError())
    assert committed_connects(ValueError()) == ()


def test_error_in_doubt_says_so():
    """The exception of the commit itself answers yes (P7)."""
    assert is_in_doubt(_in_doubt())


@pytest.mark.parametrize("how", ["from", "implicitly", "suppressed"])
def test_chained_errors_are_looked_at(how):
    """An application that wraps the error can still be asked (P7)."""
    assert is_in_doubt(_chained(_in_doubt(), how=how))


def test_members_of_groups_are_looked_at():
    """A ``TaskGroup`` wraps errors in groups, also in groups of groups (P7)."""
    group = ExceptionGroup("outer", [ValueError(), ExceptionGroup("inner", [_in_doubt(), KeyError()])])

    assert is_in_doubt(group)
    assert not is_in_doubt(ExceptionGroup("outer", [ValueError()]))


def test_circle_of_causes_ends():
    """Exceptions that name each other as their cause are no endless loop."""
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one

    assert not is_in_doubt(one)


@pytest.mark.parametrize("question", [is_in_doubt, committed_connects])
def test_base_exceptions_can_be_asked(question):
    """A cancellation is an exception too."""
    assert not question(asyncio.CancelledError())


async def test_commit_that_fails_names_who_had_committed(db, other):
    """Two connects, the second fails: its error names the first (P9)."""
    with pytest.raises(IntegrityError) as caught:
        async with db_context():
            await insert(db, "a")
            await insert_orphan(other)

    assert committed_connects(caught.value) == ("db",)
    assert any("already committed: db" in note and "other" in note for note in caught.value.__notes__)
    assert not is_in_doubt(caught.value)


async def test_commit_that_fails_first_names_nobody(db, other):
    """Two connects, the first fails: nobody had committed (P9)."""
    with pytest.raises(IntegrityError) as caught:
        async with db_context():
            await insert_orphan(db)
            await insert(other, "a")

    assert committed_connects(caught.value) == ()


async def test_error_of_a_call_names_who_had_committed(db, other):
    """The question works through ``run_in_new_ctx``, a ``TaskGroup`` and an application's own exception (P9)."""

    async def work():
        await insert(db, "a")
        await insert_orphan(other)

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(run_in_new_ctx(work))

    assert committed_connects(caught.value) == ("db",)


async def test_unit_in_another_loop_is_refused(db):
    """A thread that inherits the unit and runs a loop of its own is told so, before two threads use one connection (P15, P19)."""

    async def elsewhere():
        await db_session(db)

    async with db_context():
        await db_session(db)
        with pytest.raises(ForeignLoopError, match=r"'db'.*another event loop.*db_context"):
            await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
        with pytest.raises(ForeignLoopError, match="another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(commit_db_session(db)))
        await asyncio.to_thread(lambda: asyncio.run(run_in_new_ctx(elsewhere)))


async def test_callback_that_is_no_function_is_refused():
    """A coroutine in the place of a function is told at once: later its error would only be logged (P14, P19)."""

    async def work():
        """Do nothing."""

    coroutine = work()
    async with db_context():
        with pytest.raises(TypeError, match="on_commit takes a function"):
            on_commit(coroutine)
    coroutine.close()


@pytest.mark.parametrize("wrong", [[], "sqlite+aiosqlite://", object()])
def test_setup_takes_connects(wrong):
    """What is no connect is told where the application is set up, not at its shutdown (P19)."""
    with pytest.raises(TypeError, match=r"takes DBConnect objects, not \w+: setup\(app, db, other\)"):
        check_connects(wrong)
