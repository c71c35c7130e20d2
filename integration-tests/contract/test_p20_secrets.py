"""P20: no password in a repr, a log line, an error or a metric."""

import asyncio
import logging
import traceback
from urllib.parse import quote, quote_plus

import pytest
from context_sqla import (
    DBConnect,
    committed_connects,
    db_context,
    db_session,
    is_in_doubt,
    new_non_ctx_session,
    on_commit,
    run_in_new_ctx,
)
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import create_async_engine
from support.deadline import until
from support.proxy import proxy
from support.rows import add, insert, insert_orphan
from support.scenario import Answer, Route
from support.wire import Address

ROLE = "secretive"
#: Everything that has a meaning in a URL, a connection string or a format; each piece is looked for as well.
PLAIN = "Xq7:wZ:k9/Vb"
SECRET = "Xq7@wZ:k9/Vb#%41?=& +'\"\\{}%sJ"
FORMS = (
    SECRET,
    quote(SECRET),
    quote(SECRET, safe=""),
    quote_plus(SECRET),
    SECRET.encode("unicode_escape").decode(),
    "Xq7",
    "wZ:k9",
    "k9/Vb",
)


class Ear:
    """Everything that could be read by somebody: log records with their tracebacks, exceptions with notes and causes."""

    def __init__(self, caplog):
        self._caplog = caplog
        self._heard = []

    def hear(self, *things):
        """Take texts, objects (by repr and str) and exceptions (as they would be printed)."""
        for one in things:
            if isinstance(one, BaseException):
                self._heard += ["".join(traceback.format_exception(one)), repr(one), *getattr(one, "__notes__", ())]
            else:
                self._heard += [repr(one), str(one)]

    @property
    def text(self):
        """All that was said."""
        formatter = logging.Formatter("%(levelname)s %(name)s %(message)s")
        ours = [record for record in self._caplog.records if record.name.startswith("context_sqla")]
        return "\n".join([*self._heard, *(formatter.format(record) for record in ours), *(repr(record.args) for record in ours)])

    @property
    def secrets(self):
        """The forms of the password that were said."""
        said = self.text
        return [form for form in FORMS if form in said]


@pytest.fixture(autouse=True)
def _contract(bench):
    """What serves nothing runs once per database, not once per framework."""


@pytest.fixture(name="ear")
def _ear(caplog):
    caplog.set_level(logging.DEBUG, logger="context_sqla")
    return Ear(caplog)


@pytest.fixture(name="secretive")
async def _secretive(bench, database):
    """Make connects whose password is a secret; the role exists."""
    literal = SECRET.replace("'", "''")
    await database.ledger.execute(
        f"DO $do$ BEGIN CREATE ROLE {ROLE} SUPERUSER LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $do$"
    )
    await database.ledger.execute(f"ALTER ROLE {ROLE} PASSWORD '{literal}'")

    def make(where=database, **options):
        url = URL.create(
            f"postgresql+{where.driver}", ROLE, SECRET, host=where.place.host, port=where.place.port, database=where.name
        )
        made = DBConnect.from_url(url.render_as_string(hide_password=False), **options)
        bench.databases.connects.append(made)
        return made

    return make


async def _error_of(work):
    with pytest.raises(Exception) as caught:
        async with db_context():
            await work()
    return caught.value


def test_ear_hears_the_secret(ear, caplog):
    """The listener of this file notices a secret in a message, its arguments, a traceback or a note (P20)."""
    exc = ValueError("x")
    exc.add_note(quote(SECRET))
    ear.hear(exc)
    by_note = ear.secrets
    logging.getLogger("context_sqla").debug("%s", SECRET)

    assert by_note
    assert SECRET in ear.secrets


# What a connect says of itself


@pytest.mark.postgresql
async def test_connect_says_no_password(secretive, ear):
    """``repr`` and ``str`` of a connect, its status, engine and session maker have no password, before and after its use (P20)."""
    db = secretive(name="db")
    ear.hear(db, db.pool_status(), db.name, db.host, db.context_key)
    async with db_context():
        session = await db_session(db)
        await session.execute(text("SELECT 1"))
        ear.hear(db, db.pool_status(), db.host, session, session.get_bind(), await db.session_maker(), vars(db))

    assert ear.secrets == []
    assert "'db'" in ear.text


@pytest.mark.postgresql
async def test_default_name_is_no_url(secretive, ear):
    """A connect without a name is called after its database, not after its URL (P20)."""
    db = secretive()
    ear.hear(db, db.name)

    assert ear.secrets == []
    assert db.name == "first"


@pytest.mark.postgresql
async def test_url_as_a_host_is_masked(database, ear):
    """Factories that take a whole URL for a host: the password in it is in no repr, status or error (P20)."""
    url = URL.create(f"postgresql+{database.driver}", ROLE, SECRET, "nowhere.invalid", 1, "first").render_as_string(
        hide_password=False
    )
    db = DBConnect(create_async_engine, lambda engine: None, url, name="db")
    ear.hear(db, db.pool_status())
    with pytest.raises(Exception) as caught:
        await db.ping(timeout=10)
    ear.hear(caught.value)
    await db.close()

    assert ear.secrets == []


async def test_url_given_for_a_host_by_mistake_is_not_repeated(ear):
    """``change_host`` with a whole URL, where a host is wanted, is refused without repeating it (P20)."""
    db = DBConnect.from_url("postgresql+asyncpg://app@db1/app", name="db")
    with pytest.raises(ValueError) as caught:
        await db.change_host(f"postgresql+asyncpg://app:{quote(SECRET, safe='')}@db2:x/app")
    ear.hear(caught.value, db)

    assert ear.secrets == []


@pytest.mark.parametrize("secret", [quote(SECRET, safe=""), PLAIN], ids=["quoted", "raw"])
@pytest.mark.parametrize(
    "url",
    [
        pytest.param("postgresql+nosuchdriver://app:{}@db1/app", id="unknown-driver"),
        pytest.param("nosuchdatabase://app:{}@db1/app", id="unknown-database"),
        pytest.param("postgresql+psycopg2://app:{}@db1/app", id="sync-driver"),
        pytest.param("postgresql+asyncpg://app:{}@db1:port/app", id="port"),
        pytest.param("postgresql+asyncpg//app:{}@db1/app", id="colon"),
        pytest.param("app:{}@db1/app", id="scheme"),
    ],
)
async def test_url_that_cannot_be_used_is_not_repeated(ear, url, secret):
    """A URL with a mistake in it is refused by an error that does not have the password (P20)."""
    with pytest.raises(Exception) as caught:
        DBConnect.from_url(url.format(secret))
    ear.hear(caught.value)

    assert ear.secrets == []


async def test_slash_in_the_user_is_not_the_name(ear):
    """A URL that is read otherwise than it was meant does not put the password into the connect's name (P20)."""
    db = DBConnect.from_url(f"postgresql+asyncpg://us/er:{quote(SECRET, safe='')}@db1/app")
    ear.hear(db)

    assert ear.secrets == []


# Failure paths


@pytest.mark.postgresql
async def test_failed_statement_and_commit_say_no_password(serve, secretive, ear):
    """Errors of a statement, a flush and a COMMIT (P20)."""
    db = secretive(name="db")

    async def handler(request):
        await insert(db, "a")
        if request.path == "/statement":
            await (await db_session(db)).execute(text("SELECT nonsense"))
        elif request.path == "/flush":
            await add(db, "a")
        else:
            await insert_orphan(db)
        return Answer(201)

    seen = []

    async def remember(exc):
        seen.append(exc)
        return Answer(409)

    paths = ("/statement", "/flush", "/commit")
    service = await serve(*(Route(path, handler) for path in paths), error_handlers={Exception: remember})
    answers = [await service.post(path) for path in paths]
    ear.hear(*seen, *(answer.text for answer in answers), *(answer.headers for answer in answers))

    assert {answer.status for answer in answers} <= {409, 500}
    assert ear.secrets == []


@pytest.mark.postgresql
async def test_errors_of_several_connects_say_no_password(secretive, other_database, ear):
    """The note of a commit that failed half-way, and what it can be asked (P9, P20)."""
    db, other = secretive(name="db"), secretive(other_database, name="other")

    async def work():
        await insert(db, "a")
        await insert_orphan(other)

    exc = await _error_of(work)
    ear.hear(exc, committed_connects(exc))

    assert "already committed: db" in ear.text
    assert ear.secrets == []


@pytest.mark.postgresql
async def test_wrong_password_is_not_repeated(database, ear):
    """A password that the server refuses, and a database that it does not have (P20)."""
    for options in ({"password": SECRET}, {"password": database.place.password, "database": "no-such-database"}):
        url = database.url().set(**options)
        db = DBConnect.from_url(url, name="db")

        async def work(db=db):
            await insert(db, "a")

        ear.hear(await _error_of(work))
        with pytest.raises(Exception) as caught:
            await db.ping(timeout=10)
        ear.hear(caught.value)
        await db.close()

    assert ear.secrets == []
    assert database.place.password not in ear.text


@pytest.mark.postgresql
async def test_unreachable_host_says_no_password(secretive, database, ear):
    """A host that refuses, hangs or does not exist: statement, ping and abort (P20)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = secretive(name="db", host=network.host, engine_options={"pool_size": 1})

        async def work():
            await insert(db, "a")

        network.mode = "refuse"
        ear.hear(await _error_of(work))
        with pytest.raises(Exception) as caught:
            await db.ping(timeout=10)
        ear.hear(caught.value)
        network.mode = "hang"
        with pytest.raises(Exception) as caught:
            await db.ping(timeout=0.02)
        ear.hear(caught.value, db.pool_status())
        network.mode = "pass"
        trap = network.hold_at(b"INSERT")
        failing = asyncio.create_task(_error_of(work))
        await asyncio.wait_for(trap.sprung.wait(), 10)
        db.abort_host(network.host)
        ear.hear(await failing)
        await db.close()

    assert ear.secrets == []


@pytest.mark.postgresql
async def test_commit_in_doubt_says_no_password(secretive, database, ear):
    """A COMMIT whose answer is lost, and one that is cut at its limit (P7, P20)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = secretive(name="db", host=network.host, commit_timeout=0.05)

        async def work():
            async with db_context():
                await insert(db, str(len(errors)))

        errors = []
        for trap in (network.cut_at, network.hold_at):
            trap(b"COMMIT", forward=True)
            errors.append(await _error_of(work))
        ear.hear(*errors)
        await db.close()

    assert [is_in_doubt(exc) for exc in errors] == [True, True]
    assert ear.secrets == []


@pytest.mark.postgresql
async def test_terminated_backend_says_no_password(secretive, ledger, ear):
    """A backend that the server ends before the statement, and before the rollback (P20)."""
    db = secretive(name="db", engine_options={"pool_size": 1})

    async def kill():
        pid = (await (await db_session(db)).execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await ledger.terminate(pid)

    async def statement():
        await insert(db, "a")
        await kill()
        await insert(db, "b")

    async def rollback():
        await insert(db, "a")
        await kill()
        raise LookupError("the application's own")

    ear.hear(await _error_of(statement), await _error_of(rollback))

    assert ear.secrets == []


@pytest.mark.postgresql
async def test_prepared_transaction_that_stays_says_no_password(secretive, database, ear):
    """The ERROR line and the note of a COMMIT PREPARED that could not be carried out (P9, P20)."""
    async with proxy(Address(database.place.host, database.place.port)) as network:
        db = secretive(name="db", host=network.host, commit_timeout=0.1, session_options={"twophase": True})

        async def work():
            await insert(db, "a")

        trap = network.hold_at(b"COMMIT PREPARED")
        failing = asyncio.create_task(_error_of(work))
        await asyncio.wait_for(trap.sprung.wait(), 10)
        network.mode = "refuse"
        network.cut()
        ear.hear(await failing)
        await db.close()
    for gid in await database.ledger.prepared():
        await database.ledger.execute(f"ROLLBACK PREPARED '{gid}'")

    assert "decision: COMMIT" in ear.text
    assert ear.secrets == []


@pytest.mark.postgresql
async def test_misuse_says_no_password(secretive, ear, ledger):
    """Every error for a use that is not allowed names the connect, and no password (P19, P20)."""
    db = secretive(name="db", engine_options={"pool_size": 1}, cleanup_timeout=0.02, handler_timeout=0.02)
    errors = []
    tasks = []

    async def attempt(work):
        try:
            await work()
        except Exception as exc:
            errors.append(exc)

    async def busy():
        async with ledger.lock(), db_context():
            task = asyncio.create_task(attempt(lambda: insert(db, "b")))
            await ledger.waiting()
            tasks.append(task)
            raise LookupError("while a statement is running")

    async def outlived():
        async with db_context():
            session = await db_session(db)
        await session.execute(text("SELECT 1"))

    async def close():
        async with db_context():
            await insert(db, "c")
            await db.close()

    async def never(connect):
        await asyncio.Event().wait()

    await attempt(lambda: db_session(db))
    await attempt(outlived)
    await attempt(busy)
    await asyncio.wait(tasks)
    await attempt(close)
    await attempt(lambda: db.change_host(" "))
    db.before_create_session_handler = never
    await attempt(lambda: run_in_new_ctx(insert, db, "d"))
    db.before_create_session_handler = None
    ear.hear(*errors)

    assert len(errors) >= 6
    assert ear.secrets == []


@pytest.mark.postgresql
async def test_log_lines_say_no_password(secretive, ear):
    """The lines about held connections, late units, failing hooks and callbacks (P16, P15, P14, P20)."""
    db = secretive(name="db", warn_held_after=0.01, drain_timeout=0.01, engine_options={"echo": False})
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def fails(*_):
        raise LookupError("a hook")

    async def work():
        async with db_context():
            on_commit(fails)
            on_commit(fails, connect=db)
            await insert(db, "a")
            begun.set()
            await go_on.wait()

    db.committed.append(fails)
    working = asyncio.create_task(work())
    await begun.wait()
    await until(lambda: "holds a connection" in ear.text)
    await db.close()
    go_on.set()
    await working

    assert "still running" in ear.text
    assert ear.text.count("a hook") >= 3
    assert ear.secrets == []


@pytest.mark.postgresql
async def test_ordinary_work_says_no_password(serve, secretive, ear):
    """Ordinary requests and sessions, with everything logged (P20)."""
    db = secretive(name="db")

    async def handler(request):
        await insert(db, request.query["name"])
        return Answer(int(request.query["status"]))

    service = await serve(handler)
    for status in (201, 404, 500):
        answer = await service.post(f"/?name=n{status}&status={status}")
        ear.hear(answer.text, answer.headers)
    async with new_non_ctx_session(db) as session:
        await session.execute(text("SELECT 1"))
    await db.connect(db.host)
    await service.stop()

    assert ear.secrets == []
