"""What is asked of drivers: which package to install, and the state of a connection."""

import asyncio
import queue
import sys
import threading
from types import SimpleNamespace

import pytest
from context_sqla import ContextSqlaError, DBConnect, DriverError
from context_sqla import _drivers as drivers
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine


@pytest.fixture(name="engine")
async def _engine(tmp_path):
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/app.db")
    yield engine
    await engine.dispose()


async def _driver_connection(connection):
    return (await connection.get_raw_connection()).driver_connection


# The package to install


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        ("postgresql+asyncpg://db1/shop", "asyncpg", "asyncpg>=0.32"),
        ("postgresql+psycopg://db1/shop", "psycopg", "psycopg[binary]>=3.3.6"),
        ("postgresql+psycopg_async://db1/shop", "psycopg", "psycopg[binary]>=3.3.6"),
        ("sqlite+aiosqlite:///shop.db", "aiosqlite", "aiosqlite>=0.20"),
        ("mysql+asyncmy://db1/shop", "asyncmy", "asyncmy"),
        ("mysql+aiomysql://db1/shop", "aiomysql", "aiomysql"),
        ("mariadb+asyncmy://db1/shop", "asyncmy", "asyncmy"),
        ("mssql+aioodbc://db1/shop", "aioodbc", "aioodbc"),
        ("oracle+oracledb_async://db1/shop", "oracledb", "oracledb"),
    ],
)
def test_missing_driver_names_its_package(monkeypatch, url, module, package):
    """A driver that is not installed is an error that says what to install, when the connect is made."""
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(DriverError, match="not installed") as caught:
        DBConnect.from_url(url)
    assert f"pip install '{package}'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize(
    ("url", "name", "package"),
    [
        ("postgresql+asyncpgg://db1/shop", "postgresql+asyncpg", "asyncpg>=0.32"),
        ("sqlite+aiosqlit:///shop.db", "sqlite+aiosqlite", "aiosqlite>=0.20"),
        ("mysql+nosuch://db1/shop", "mysql+asyncmy", "asyncmy"),
        ("mariadb+nosuch://db1/shop", "mariadb+asyncmy", "asyncmy"),
        ("mssql+nosuch://db1/shop", "mssql+aioodbc", "aioodbc"),
        ("oracle+nosuch://db1/shop", "oracle+oracledb_async", "oracledb"),
    ],
)
def test_unknown_driver_names_a_known_one(url, name, package):
    """A driver that SQLAlchemy does not know is an error that says what to write and what to install."""
    with pytest.raises(DriverError) as caught:
        DBConnect.from_url(url)

    assert url.partition(":")[0] in str(caught.value)
    assert f"'{name}://...'" in str(caught.value)
    assert f"pip install '{package}'" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "name", "package"),
    [
        ("postgresql+psycopg2://db1/shop", "postgresql+asyncpg", "asyncpg>=0.32"),
        ("sqlite+pysqlite:///shop.db", "sqlite+aiosqlite", "aiosqlite>=0.20"),
        ("mysql+pymysql://db1/shop", "mysql+asyncmy", "asyncmy"),
        ("mssql+pyodbc://db1/shop", "mssql+aioodbc", "aioodbc"),
    ],
)
def test_synchronous_driver_names_an_asynchronous_one(url, name, package):
    """A driver that is not asynchronous is an error that says what to write and what to install."""
    with pytest.raises(DriverError, match="not an asynchronous driver") as caught:
        DBConnect.from_url(url)

    assert f"'{name}://...'" in str(caught.value)
    assert f"pip install '{package}'" in str(caught.value)


def test_unknown_database_is_a_driver_error():
    """A database that SQLAlchemy does not know has no hint, and is an error of ours."""
    with pytest.raises(DriverError, match="nosuchdb"):
        DBConnect.from_url("nosuchdb://db1/shop")


def test_driver_error_is_one_of_ours():
    """``DriverError`` stands in the one tree of errors (P19)."""
    assert issubclass(DriverError, ContextSqlaError)


@pytest.mark.parametrize("url", ["postgresql+asyncpg://db1/shop", "postgresql+psycopg://db1/shop", "sqlite+aiosqlite:///shop.db"])
def test_installed_driver_is_fine(url):
    """The drivers that are installed are accepted; nothing is opened."""
    assert DBConnect.from_url(url).host is not None


# The state of a connection


async def test_open_transaction_is_seen(engine):
    """A transaction on the driver's own connection is seen, whoever began it; a closed connection has none."""
    async with engine.connect() as connection:
        driver = await _driver_connection(connection)
        before = drivers.in_transaction(driver)
        await connection.exec_driver_sql("BEGIN")
        inside = drivers.in_transaction(driver)
        await connection.exec_driver_sql("ROLLBACK")
        after = drivers.in_transaction(driver)
    await engine.dispose()

    assert (before, inside, after) == (False, True, False)
    assert drivers.in_transaction(driver) is False


async def test_cut_ends_what_is_running(engine):
    """A statement that runs on a connection which is cut fails at once, on SQLite too."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    async with engine.connect() as connection:
        driver = await _driver_connection(connection)
        running = asyncio.create_task(connection.execute(text(endless)))
        while not running.done():
            drivers.cut(driver)
            await asyncio.wait((running,), timeout=0.01)
        await connection.invalidate()

    assert "interrupted" in str(running.exception())


class _Unknown:
    """A connection of a driver that nobody has heard of."""


class _Plain:
    """A connection that can only be closed, such as aiomysql's."""

    def __init__(self):
        self.closed = False
        self.calls = 0

    def close(self):
        self.calls += 1
        self.closed = True


class _Asynchronous(_Plain):
    """A connection whose ``close`` is a coroutine function."""

    async def close(self):
        raise AssertionError("nobody awaits it")


class _Status(_Unknown):
    def __init__(self, status):
        self._status = status

    def get_transaction_status(self):
        return self._status


class _Psycopg:
    """A connection of psycopg, in a state of libpq's: idle, active, in a transaction, in a failed one."""

    IDLE, ACTIVE, INTRANS, INERROR = range(4)

    def __init__(self, status, *, closed=False):
        self.pgconn = SimpleNamespace(transaction_status=status)
        self.closed = closed


@pytest.mark.parametrize(("status", "expected"), [(_Psycopg.ACTIVE, False), (_Psycopg.INTRANS, True), (_Psycopg.INERROR, True)])
def test_connection_that_is_still_busy_after_a_cancelled_statement_is_not_kept(status, expected):
    """psycopg before 3.3.9 that is cancelled a second time stops ending its statement: a rollback would be refused (P7)."""
    assert drivers.will_roll_back(_Psycopg(status)) is expected
    assert drivers.will_roll_back(_Psycopg(status, closed=True)) is False


class _Thread(threading.Thread):
    """A connection of aiosqlite before 0.22: a thread, whose ``close`` asks it to close, and to end when that is over."""

    def __init__(self):
        super().__init__(daemon=True)
        self.asked = queue.SimpleQueue()
        self.done = []

    def run(self):
        while (item := self.asked.get()) is not None:
            self.done.append(item)

    async def close(self):
        try:
            self.asked.put("close")
            await asyncio.get_running_loop().create_future()
        finally:
            self.asked.put(None)


@pytest.mark.parametrize("end", [drivers.discard, drivers.drop])
async def test_thread_without_stop_closes_its_file_and_ends(end):
    """What an older aiosqlite has left in a loop that is gone, or opened for nobody, is closed all the same (P15)."""
    connection = _Thread()
    connection.start()
    end(connection)
    await asyncio.to_thread(connection.join, 10)

    assert (connection.done, connection.is_alive()) == (["close"], False)


def test_unknown_driver_loses_a_refinement_only():
    """Of a connection that tells nothing everything is assumed to be well, and nothing raises."""
    connection = _Unknown()
    drivers.cut(connection)
    drivers.drop(connection)

    assert (drivers.in_transaction(connection), drivers.is_closed(connection)) == (False, False)
    assert drivers.survives_cancellation("unheard-of") is False


def test_cut_closes_where_there_is_no_other_way_and_once():
    """A connection with nothing but ``close`` is closed; one that is closed already is left alone."""
    connection = _Plain()
    drivers.cut(connection)
    drivers.cut(connection)

    assert (connection.calls, drivers.is_closed(connection)) == (1, True)


def test_cut_awaits_nothing():
    """A ``close`` that would have to be awaited is given up without a warning."""
    drivers.cut(_Asynchronous())


@pytest.mark.parametrize("status", [True, False])
def test_status_of_mysql_drivers_is_asked(status):
    """Drivers with ``get_transaction_status`` are asked by it."""
    assert drivers.in_transaction(_Status(status)) is status
