"""`DBConnect`: how it is made, what it makes, and how it ends."""

import asyncio
import gc
import logging
import sqlite3
import sys
import threading

import context_sqla
import pytest
import sqlalchemy
from context_sqla import (
    ContextSqlaError,
    DBConnect,
    ForeignLoopError,
    PoolStatus,
    UnavailableError,
    db_context,
    db_session,
    new_non_ctx_session,
    run_in_new_ctx,
)
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool
from support.databases import no_tasks_left
from support.deadline import until

POSTGRES = "postgresql+asyncpg://app:secret@db1:5433/shop"


class OwnSession(AsyncSession):
    """A session class of the application's."""


@pytest.fixture(autouse=True)
async def _nothing_left():
    async with no_tasks_left() as tasks:
        yield
    assert tasks == []


@pytest.fixture(name="url")
def _url(tmp_path):
    return f"sqlite+aiosqlite:///{tmp_path}/app.db"


@pytest.fixture(name="db")
async def _db(url):
    connect = DBConnect.from_url(url, name="db")
    yield connect
    await connect.close()


async def _engine_url(connect):
    return (await connect.session_maker()).kw["bind"].url


async def _select(connect):
    async with db_context():
        return (await (await db_session(connect)).execute(text("SELECT 1"))).scalar_one()


# Two factories


async def test_factories_are_called_lazily_and_once(url):
    """Neither factory is called before the first use; then each once, with the host and with the engine."""
    calls = []

    def create_engine(host):
        calls.append(host)
        return create_async_engine(url)

    def create_maker(engine):
        calls.append(engine)
        return async_sessionmaker(engine)

    connect = DBConnect(create_engine, create_maker, "db1")
    before = list(calls)
    for _ in range(2):
        await _select(connect)
    maker = await connect.session_maker()
    await connect.close()

    assert before == []
    assert calls == ["db1", maker.kw["bind"]]


async def test_positional_arguments_are_the_four_of_the_seed(url):
    """Factories, host and handler are positional; everything else is by keyword."""
    seen = []

    async def choose(connect):
        seen.append(connect)

    connect = DBConnect(lambda host: create_async_engine(url), async_sessionmaker, "db1", choose)
    await _select(connect)
    await connect.close()

    assert seen == [connect]
    with pytest.raises(TypeError):
        DBConnect(lambda host: create_async_engine(url), async_sessionmaker, "db1", choose, "name")


@pytest.mark.parametrize("use", [DBConnect.session_maker, DBConnect.create_session, _select])
async def test_no_host_is_an_error_at_the_first_use(url, use):
    """A connect may be made without a host, and says at its first use what is missing."""
    connect = DBConnect(lambda host: create_async_engine(url), async_sessionmaker, name="shop")

    with pytest.raises(ValueError, match="'shop'.*has no host.*change_host"):
        await use(connect)


async def test_host_can_be_given_later(url):
    """``change_host`` gives the first host, and so does a handler."""
    asked = []

    def create_engine(host):
        asked.append(host)
        return create_async_engine(url)

    async def choose(connect):
        return "db2"

    first = DBConnect(create_engine, async_sessionmaker)
    await first.change_host("db1")
    second = DBConnect(create_engine, async_sessionmaker, before_create_session_handler=choose)
    for connect in (first, second):
        await _select(connect)
        await connect.close()

    assert asked == ["db1", "db2"]
    assert (first.host, second.host) == ("db1", None)


@pytest.mark.parametrize("host", ["", " ", "\t"])
async def test_empty_host_is_a_value_error(db, url, host):
    """An empty host is refused wherever one can be given, and changes nothing."""

    async def choose(connect):
        return host

    with pytest.raises(ValueError, match="must not be empty"):
        DBConnect(lambda _: create_async_engine(url), async_sessionmaker, host)
    with pytest.raises(ValueError, match="must not be empty"):
        DBConnect.from_url(POSTGRES, host=host)
    for method in (db.connect, db.change_host):
        with pytest.raises(ValueError, match="must not be empty"):
            await method(host)
    with pytest.raises(ValueError, match="must not be empty"):
        db.abort_host(host)
    db.before_create_session_handler = choose
    with pytest.raises(ValueError, match="must not be empty"):
        await _select(db)
    db.before_create_session_handler = None

    assert await _select(db) == 1


@pytest.mark.parametrize("host", [5432, None, b"db1", make_url(POSTGRES)])
async def test_host_that_is_no_string_is_a_type_error(db, host):
    """What is no string is refused, and named by its type."""
    for method in (db.connect, db.change_host):
        with pytest.raises(TypeError, match=type(host).__name__):
            await method(host)


async def test_forgotten_await_is_a_type_error(db):
    """A coroutine in place of a host says that an ``await`` is missing."""

    async def find_host():
        return "db1"

    coroutine = find_host()
    with pytest.raises(TypeError, match="await"):
        await db.change_host(coroutine)
    coroutine.close()


async def test_every_connect_has_a_key_of_its_own(url):
    """Connects are told apart by ``context_key``, a unique string, also with the same URL."""
    keys = [DBConnect.from_url(url).context_key for _ in range(3)]

    assert len(set(keys)) == 3
    assert all(isinstance(key, str) for key in keys)


async def test_repr_has_name_and_host(url):
    """``repr`` says which connect it is, and no URL."""
    named = DBConnect.from_url(POSTGRES, name="orders")
    unnamed = DBConnect(lambda host: create_async_engine(url), async_sessionmaker)

    assert repr(named) == "<DBConnect 'orders' host='db1:5433'>"
    assert repr(unnamed) == f"<DBConnect {unnamed.name!r} host=None>"
    assert unnamed.name.startswith("db")


# from_url


async def test_url_is_the_engines(db, url):
    """``from_url`` makes an engine of exactly this URL."""
    assert (await _engine_url(db)).render_as_string(hide_password=False) == url
    assert await _select(db) == 1


async def test_url_object_is_a_url(url):
    """A SQLAlchemy ``URL`` is as good as its text."""
    connect = DBConnect.from_url(make_url(url))

    assert await _select(connect) == 1
    await connect.close()


@pytest.mark.parametrize(
    ("url", "host"),
    [
        (POSTGRES, "db1:5433"),
        ("postgresql+asyncpg://app@db1/shop", "db1"),
        ("postgresql+asyncpg://app@127.0.0.1/shop", "127.0.0.1"),
        ("postgresql+asyncpg://app@[::1]:5433/shop", "[::1]:5433"),
        ("postgresql+asyncpg://app@[::1]/shop", "::1"),
    ],
)
def test_host_is_that_of_the_url(url, host):
    """Without ``host=`` the connect's host is that of the URL, with its port if it has one."""
    assert DBConnect.from_url(url).host == host


@pytest.mark.parametrize(
    ("wanted", "host", "port"),
    [
        ("db2", "db2", 5433),
        ("db2:6000", "db2", 6000),
        ("10.0.0.2", "10.0.0.2", 5433),
        ("10.0.0.2:6000", "10.0.0.2", 6000),
        ("::1", "::1", 5433),
        ("[::1]", "::1", 5433),
        ("[::1]:6000", "::1", 6000),
        ("[fe80::1%eth0]:6000", "fe80::1%eth0", 6000),
        ("db1:5433", "db1", 5433),
        ("db1", "db1", 5433),
    ],
)
async def test_host_replaces_that_of_the_url(wanted, host, port):
    """``host=`` and ``change_host`` replace host and port of the URL; everything else stays."""
    given = DBConnect.from_url(POSTGRES, host=wanted)
    changed = DBConnect.from_url(POSTGRES)
    await changed.change_host(wanted)
    urls = [await _engine_url(connect) for connect in (given, changed)]

    assert [connect.host for connect in (given, changed)] == [wanted, wanted]
    assert urls == [make_url(POSTGRES).set(host=host, port=port)] * 2


@pytest.mark.parametrize("address", ["[::1]:5433", "[::1]", "db2:6000", "db2"])
async def test_host_of_one_connect_fits_another(address):
    """The host that one connect reads from its URL leads another one to the same address."""
    url = make_url(f"postgresql+asyncpg://app@{address}/shop")
    host = DBConnect.from_url(url).host
    other = DBConnect.from_url("postgresql+asyncpg://app@db1/shop", host=host)

    assert await _engine_url(other) == url


@pytest.mark.parametrize("host", ["db2:", "db2:port", "db2:54 32"])
async def test_port_that_is_no_number_is_a_value_error(host):
    """A port that is no number is refused at the first use, and leaves the old host in place."""
    connect = DBConnect.from_url(POSTGRES)
    await connect.session_maker()

    with pytest.raises(ValueError, match="name:port"):
        await connect.change_host(host)
    assert connect.host == "db1:5433"


async def test_sqlite_has_no_host_to_replace(db):
    """A host for an SQLite file is a mistake and is refused."""
    with pytest.raises(ValueError, match="SQLite"):
        await db.change_host("db2")

    assert await _select(db) == 1


@pytest.mark.parametrize(("options", "expire"), [({}, False), ({"session_options": {"expire_on_commit": True}}, True)])
async def test_objects_do_not_expire_unless_told(url, options, expire):
    """``expire_on_commit`` is False by default and can be set."""
    connect = DBConnect.from_url(url, **options)
    session = await connect.create_session()

    assert session.sync_session.expire_on_commit is expire
    await session.close()
    await connect.close()


async def test_engine_and_session_options_are_passed_on(url):
    """``engine_options`` go to the engine and ``session_options`` to the session maker; the mappings are left as they are."""
    engine_options = {"pool_size": 3, "max_overflow": 0}
    session_options = {"autoflush": False, "info": {"who": "me"}}
    connect = DBConnect.from_url(url, engine_options=engine_options, session_options=session_options)
    session = await connect.create_session()

    assert connect.pool_status() == PoolStatus("local", 3, 0, 0, 0)
    assert session.sync_session.autoflush is False
    assert session.info["who"] == "me"
    assert (engine_options, session_options) == ({"pool_size": 3, "max_overflow": 0}, {"autoflush": False, "info": {"who": "me"}})
    await session.close()
    await connect.close()


async def test_session_class_is_kept(url):
    """``session_class`` is what ``db_session`` and its like give; ``class_`` in ``session_options`` says the same."""
    for options in ({"session_class": OwnSession}, {"session_options": {"class_": OwnSession}}):
        connect = DBConnect.from_url(url, **options)
        async with db_context():
            inside = await db_session(connect)
        async with new_non_ctx_session(connect) as outside:
            pass
        await connect.close()

        assert (type(inside), type(outside)) == (OwnSession, OwnSession)


async def test_sqlmodel_session_is_kept(url):
    """SQLModel's session keeps its type and its ``exec``."""
    sqlmodel_session = pytest.importorskip("sqlmodel.ext.asyncio.session")
    connect = DBConnect.from_url(url, session_class=sqlmodel_session.AsyncSession)
    async with db_context():
        session = await db_session(connect)
        answer = (await session.exec(sqlalchemy.select(sqlalchemy.literal(1)))).one()

    assert type(session) is sqlmodel_session.AsyncSession
    assert tuple(answer) == (1,)
    await connect.close()


async def test_name_is_the_database_unless_given():
    """A connect is called after its database; ``name=`` calls it otherwise."""
    assert DBConnect.from_url(POSTGRES).name == "shop"
    assert DBConnect.from_url(POSTGRES, name="orders").name == "orders"


async def test_options_of_the_connect_go_through(url):
    """All options of ``DBConnect`` can be given to ``from_url`` and ``from_sessionmaker`` by keyword."""
    options = {
        "name": "n",
        "check_failed_transaction": False,
        "cleanup_timeout": 1,
        "commit_timeout": 2,
        "drain_timeout": 3,
        "idle_host_grace": 4,
        "handler_timeout": 5,
        "warn_held_after": 6,
    }
    engine = create_async_engine(url)
    for connect in (DBConnect.from_url(url, **options), DBConnect.from_sessionmaker(async_sessionmaker(engine), **options)):
        assert {name: getattr(connect, name) for name in options} == options


@pytest.mark.parametrize(
    "make", [lambda url, **options: DBConnect.from_url(url, **options), lambda url, **options: DBConnect(print, print, **options)]
)
def test_unknown_option_is_a_type_error(url, make):
    """A misspelt option is refused."""
    with pytest.raises(TypeError, match="drain_timeuot"):
        make(url, drain_timeuot=3)


def test_defaults_are_those_of_the_contract(url):
    """The limits have the defaults that the contract names."""
    connect = DBConnect.from_url(url)

    assert connect.check_failed_transaction is True
    assert (connect.cleanup_timeout, connect.commit_timeout, connect.idle_host_grace) == (5, 30, 1)
    assert (connect.handler_timeout, connect.warn_held_after) == (None, None)


# from_sessionmaker


async def test_adopted_engine_is_used_and_left_open(url):
    """``from_sessionmaker`` works on the application's own engine, and ``close`` leaves its connections open."""
    engine = create_async_engine(url)
    maker = async_sessionmaker(engine, class_=OwnSession)
    connect = DBConnect.from_sessionmaker(maker)
    async with db_context():
        session = await db_session(connect)
        raw = (await (await session.connection()).get_raw_connection()).driver_connection
    await connect.close()
    async with engine.connect() as connection:
        again = (await connection.get_raw_connection()).driver_connection
    await engine.dispose()

    assert type(session) is OwnSession
    assert raw is again
    assert await connect.session_maker() is maker
    await connect.close()


async def test_adopted_engine_is_used_again_after_close(url):
    """A connect over an adopted engine works after its ``close`` like any other."""
    engine = create_async_engine(url)
    connect = DBConnect.from_sessionmaker(async_sessionmaker(engine))
    for _ in range(2):
        assert await _select(connect) == 1
        await connect.close()
    await engine.dispose()


async def test_two_connects_may_adopt_one_engine(url):
    """Two connects over one engine give two sessions in one unit."""
    engine = create_async_engine(url)
    maker = async_sessionmaker(engine)
    first, second = DBConnect.from_sessionmaker(maker), DBConnect.from_sessionmaker(maker)
    async with db_context():
        sessions = [await db_session(first), await db_session(second)]
        for session in sessions:
            await session.execute(text("SELECT 1"))
    await first.close()
    assert await _select(second) == 1
    await second.close()
    await engine.dispose()

    assert sessions[0] is not sessions[1]


@pytest.mark.parametrize("bind", [None, sqlalchemy.create_engine("sqlite://")], ids=["unbound", "sync"])
def test_session_maker_without_an_async_engine_is_a_value_error(bind):
    """A session maker must be bound to an ``AsyncEngine``."""
    with pytest.raises(ValueError, match="AsyncEngine"):
        DBConnect.from_sessionmaker(async_sessionmaker(bind))


async def test_adopted_engine_belongs_to_one_loop(url):
    """An adopted engine that is in use in one event loop is refused in another, with the remedy; the first goes on."""
    engine = create_async_engine(url)
    connect = DBConnect.from_sessionmaker(async_sessionmaker(engine), name="mine")
    await _select(connect)

    with pytest.raises(ForeignLoopError, match=r"'mine'.*another event loop.*from_url"):
        await asyncio.get_running_loop().run_in_executor(None, asyncio.run, _select(connect))
    assert await _select(connect) == 1
    await connect.close()
    await engine.dispose()


def test_adopted_engine_in_two_runs(url):
    """An adopted engine works in two runs, one after the other."""
    connect = DBConnect.from_sessionmaker(async_sessionmaker(create_async_engine(url)))

    assert [asyncio.run(_select(connect)) for _ in range(2)] == [1, 1]


@pytest.fixture(name="slow_file")
def _slow_file():
    """A file whose opening takes until `go_on`, and may then fail."""

    class SlowFile(sqlite3.Connection):
        opening, go_on = threading.Event(), threading.Event()
        fails = False
        closed = 0

        def __init__(self, *args, **kwargs):
            SlowFile.opening.set()
            SlowFile.go_on.wait(10)
            if SlowFile.fails:
                raise sqlite3.OperationalError("unable to open database file")
            super().__init__(*args, **kwargs)

        def close(self):
            SlowFile.closed += 1
            super().close()

    yield SlowFile
    SlowFile.go_on.set()


async def _cancel_while_opening(connect, slow_file):
    task = asyncio.create_task(_select(connect))
    await until(slow_file.opening.is_set)
    task.cancel()
    await asyncio.wait((task,))


async def test_file_that_was_being_opened_at_the_close_is_closed(url, slow_file):
    """`close()` waits for a file that is being opened for a task that was cancelled: nobody else would close it (P15)."""
    connect = DBConnect.from_url(url, engine_options={"connect_args": {"factory": slow_file}})
    await _cancel_while_opening(connect, slow_file)
    closing = asyncio.create_task(connect.close())
    for _ in range(100):
        await asyncio.sleep(0)
    early = closing.done()
    slow_file.go_on.set()
    await closing

    assert not early
    await until(lambda: slow_file.closed == 1)


def test_file_that_was_being_opened_at_the_end_is_waited_for(url, slow_file, monkeypatch):
    """A thread that takes longer than `close()` waits reports to its loop before that ends (P15)."""
    slow_file.fails = True
    join = threading.Thread.join

    def join_and_go_on(thread, timeout=None):
        slow_file.go_on.set()
        join(thread, timeout)

    async def run():
        connect = DBConnect.from_url(url, cleanup_timeout=0.05, engine_options={"connect_args": {"factory": slow_file}})
        await _cancel_while_opening(connect, slow_file)
        await connect.close()

    monkeypatch.setattr(threading.Thread, "join", join_and_go_on)
    asyncio.run(run())

    assert slow_file.go_on.is_set()


def test_connect_that_is_dropped_is_closed_while_its_loop_runs(url):
    """A connect that is collected without close() is closed, and the end of its loop waits for that (P15)."""
    before = set(threading.enumerate())
    for _ in range(20):
        with asyncio.Runner() as runner:
            connect = DBConnect.from_url(url)
            runner.run(_select(connect))
            del connect
            gc.collect()
        left = set(threading.enumerate()) - before

        assert left == set()


async def test_connect_that_is_dropped_is_closed_at_once(url):
    """Its connections do not stay open until its loop ends (P15)."""
    before = set(threading.enumerate())
    connect = DBConnect.from_url(url)
    await _select(connect)
    opened = set(threading.enumerate()) - before
    del connect
    gc.collect()
    await until(lambda: not any(thread.is_alive() for thread in opened))

    assert len(opened) == 1


# The handler


async def test_handler_is_asked_before_every_session(db):
    """The handler runs once per session, in a unit and outside, and is given the connect."""
    asked = []

    async def choose(connect):
        asked.append(connect)

    db.before_create_session_handler = choose
    async with db_context():
        await db_session(db)
        await db_session(db)
    async with new_non_ctx_session(db):
        pass
    await (await db.create_session()).close()

    assert asked == [db, db, db]


async def test_error_of_the_handler_is_the_callers(db):
    """What the handler raises comes out as it is, and the next session asks again."""
    boom = LookupError("no primary")
    answers = [boom, None]

    async def choose(connect):
        if (answer := answers.pop(0)) is not None:
            raise answer

    db.before_create_session_handler = choose
    async with db_context():
        with pytest.raises(LookupError) as caught:
            await db_session(db)
        await db_session(db)

    assert caught.value is boom


async def test_handler_that_takes_too_long_is_unavailable(url):
    """``handler_timeout`` bounds the handler: an ``UnavailableError`` that says when to come back."""

    async def choose(connect):
        await asyncio.Event().wait()

    connect = DBConnect.from_url(url, name="shop", before_create_session_handler=choose, handler_timeout=0.01)
    with pytest.raises(UnavailableError, match=r"'shop'.*handler.*0\.01 s") as caught:
        await connect.create_session()
    await connect.close()

    assert caught.value.retry_after == 1


async def test_timeout_of_the_handlers_own_is_no_handler_timeout(url):
    """A ``TimeoutError`` that the handler itself raises is not taken for the limit."""

    async def choose(connect):
        raise TimeoutError("mine")

    connect = DBConnect.from_url(url, before_create_session_handler=choose, handler_timeout=60)
    with pytest.raises(TimeoutError, match="mine"):
        await connect.create_session()
    await connect.close()


async def test_handler_that_asks_for_its_own_session_is_told(db):
    """A handler that needs the very session for which it chooses gets an error instead of waiting for itself."""

    async def choose(connect):
        await db_session(connect)

    db.before_create_session_handler = choose
    async with db_context():
        with pytest.raises(ContextSqlaError, match="before_create_session_handler"):
            await asyncio.wait_for(db_session(db), 5)


async def test_handler_may_open_a_unit_of_another_connect(db, url):
    """A handler may ask another database, in a unit of its own."""
    directory = DBConnect.from_url(url)

    async def choose(connect):
        assert await _select(directory) == 1

    db.before_create_session_handler = choose

    assert await _select(db) == 1
    await directory.close()


# Hooks


def test_hooks_are_lists(db):
    """Several parties can add their hooks; nobody's are there at first."""
    assert (db.engine_created, db.before_commit, db.committed) == ([], [], [])


async def test_engine_created_gets_every_engine(db):
    """``engine_created`` is called with each engine and its host, before anything connects."""
    seen = []

    def look(engine, host):
        seen.append((engine, host, engine.sync_engine.pool.checkedin()))

    db.engine_created += [look, look]
    await _select(db)
    first = (await db.session_maker()).kw["bind"]
    await db.close()
    await _select(db)
    second = (await db.session_maker()).kw["bind"]

    assert seen == [(first, "local", 0)] * 2 + [(second, "local", 0)] * 2
    assert first is not second


@pytest.mark.parametrize("kind", ["context", "function"])
async def test_commit_hooks_run_in_every_kind_of_unit(db, kind):
    """``before_commit`` and ``committed`` run in the order of their lists, around the commit."""
    seen = []

    def note(what):
        async def hook(session, *host):
            seen.append((what, *host))

        return hook

    db.before_commit += [note("first"), note("second")]
    db.committed += [note("third"), note("fourth")]
    if kind == "context":
        await _select(db)
    else:

        async def work():
            await (await db_session(db)).execute(text("SELECT 1"))

        await run_in_new_ctx(work)

    assert seen == [("first",), ("second",), ("third", "local"), ("fourth", "local")]


async def test_commit_hooks_do_not_run_without_a_commit(db):
    """A unit that is rolled back, and one that used no connection, asks and tells nobody."""
    seen = []

    async def hook(*args):
        seen.append(args)

    db.before_commit.append(hook)
    db.committed.append(hook)
    with pytest.raises(LookupError):
        async with db_context():
            await (await db_session(db)).execute(text("SELECT 1"))
            raise LookupError
    async with db_context():
        await db_session(db)

    assert seen == []


async def test_error_in_a_committed_hook_is_logged(db, caplog):
    """What a ``committed`` hook raises changes nothing for the unit or the other hooks, and is logged with its traceback."""
    told = []

    async def fails(session, host):
        raise LookupError("no news")

    async def tell(session, host):
        told.append(host)

    db.committed += [fails, tell]
    await _select(db)
    records = [record for record in caplog.records if record.name == "context_sqla"]

    assert told == ["local"]
    assert [(record.levelno, "'db'" in record.getMessage(), bool(record.exc_info)) for record in records] == [
        (logging.ERROR, True, True)
    ]


async def test_connection_that_is_older_than_the_connect_is_in_use_like_any_other(url):
    """An application may have used its engine before the connect first does; ``pool_status`` counts all the same (P13, P16)."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("SELECT 1"))
    connect = DBConnect.from_sessionmaker(async_sessionmaker(engine))
    async with db_context():
        await (await db_session(connect)).execute(text("SELECT 1"))
        during = connect.pool_status().checked_out

    assert (during, connect.pool_status().checked_out) == (1, 0)
    await connect.close()
    await engine.dispose()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in Python 3.12")
async def test_eager_task_opens_a_connection(db):
    """A task factory may begin a task at once, and with it the thread of a connection."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    try:
        assert await _select(db) == 1
    finally:
        loop.set_task_factory(None)


# close


async def test_close_and_use_again(db):
    """``close`` may come at any time and any number of times; the connect is usable after each."""
    await db.close()
    for _ in range(3):
        assert await _select(db) == 1
        await db.close()
        assert db.pool_status() == PoolStatus("local", 0, 0, 0, None)
    await db.close()


async def test_close_outside_every_loop_is_no_business_of_the_connect(db):
    """``pool_status`` and ``abort_host`` are plain functions and work where no loop is running."""
    await _select(db)

    status, count = await asyncio.to_thread(lambda: (db.pool_status(), db.abort_host("elsewhere")))

    assert (status, count) == (PoolStatus("local", 0, 0, 0, None), 0)


@pytest.mark.parametrize("host", [":5432", "[::1", "::1]", "db:", "db:x", "db:65536", "[]:5432"])
def test_wrong_host_is_told_where_the_connect_is_made(host):
    """A host without a name, or with a port that is none, is a ValueError at once, not in the first request (P19)."""
    with pytest.raises(ValueError, match="host"):
        DBConnect.from_url("postgresql+asyncpg://app@db1/shop", host=host)


async def test_factories_that_return_something_else_are_named():
    """A factory that returns no asynchronous engine or session maker is named, with what it returned (P19)."""
    synchronous = DBConnect(lambda host: create_engine("sqlite://"), async_sessionmaker, host="db1", name="db")
    with pytest.raises(TypeError, match="'db'.*engine_creator must return an AsyncEngine, not Engine"):
        await synchronous.session_maker()
    wrong = DBConnect(lambda host: create_async_engine("sqlite+aiosqlite://"), sessionmaker, host="db1", name="db")
    with pytest.raises(TypeError, match="'db'.*session_maker_creator must return an async_sessionmaker, not sessionmaker"):
        await wrong.session_maker()


def test_postgres_is_told_apart_from_postgresql():
    """The scheme that hosting companies hand out is answered with the one that SQLAlchemy knows (P19)."""
    with pytest.raises(context_sqla.DriverError, match=r"postgresql\+asyncpg"):
        DBConnect.from_url("postgres://app@db1/shop")


# Engines that are watched


async def test_listener_that_executes_by_itself_names_the_context(url):
    """As a listener does that tries a statement again: its statements run, and are known to the unit that commits them."""

    def executing(cursor, statement, parameters, context):
        context.dialect.do_execute(cursor, statement, parameters, context=context)
        return True

    def executing_without(cursor, statement, context):
        context.dialect.do_execute_no_params(cursor, statement)
        return True

    def create(host):
        engine = create_async_engine(url)
        event.listen(engine.sync_engine, "do_execute", executing)
        event.listen(engine.sync_engine, "do_execute_no_params", executing_without)
        return engine

    connect = DBConnect(create, async_sessionmaker, "local")
    async with db_context():
        session = await db_session(connect)
        connection = await session.connection(execution_options={"no_parameters": True})
        await connection.exec_driver_sql("CREATE TABLE items (name TEXT)")
        await session.execute(text("INSERT INTO items VALUES (:name)"), {"name": "a"})
    async with db_context():
        assert list(await (await db_session(connect)).scalars(text("SELECT name FROM items"))) == ["a"]
    await connect.close()


async def test_engines_with_options_are_watched_through_one_dialect(url):
    """Each of them is a new engine on the same dialect: whose methods are wrapped once, however many there were."""
    base = create_async_engine(url, poolclass=NullPool)
    connect = DBConnect(lambda host: base.execution_options(), async_sessionmaker, "local")
    await _select(connect)
    wrapped = base.sync_engine.dialect.do_execute
    await connect.close()

    await _select(connect)
    await connect.close()

    assert base.sync_engine.dialect.do_execute == wrapped
