"""The monitor: its life, who waits for it, who is told, and what it counts."""

import asyncio
import gc
import logging
import os
import weakref

import pytest
from context_sqla import DriverError
from context_sqla_hosts import Hosts, MonitorError, NoPrimaryError, NoReplicaError
from context_sqla_hosts._address import Address, Login, SecretError
from context_sqla_hosts._probe import classify, make_probe
from psycopg import OperationalError


async def test_it_runs_once_and_can_run_again(unused_port):
    """No task is left; a second start at the same time is an error."""
    before, hosts = asyncio.all_tasks(), Hosts([f"127.0.0.1:{unused_port}"])
    for _ in range(2):
        async with hosts:
            with pytest.raises(MonitorError, match="started already"):
                hosts.start()
            with pytest.raises(NoPrimaryError):
                await hosts.ready(timeout=0.01)
    await hosts.aclose()

    assert asyncio.all_tasks() == before


async def test_a_host_that_refuses_is_dead(unused_port):
    """Over a real socket; `ready(primary=False)` waits until every host was tried."""
    async with Hosts([f"127.0.0.1:{unused_port}"], driver="asyncpg", user="x", password="hunter2") as hosts:
        snapshot = await hosts.ready(primary=False)

    assert (snapshot.hosts[0].state, snapshot.hosts[0].error) == ("dead", "refused")
    assert hosts.metrics.get("probe_failures_total", host=snapshot.hosts[0].host, kind="refused") >= 1
    assert "hunter2" not in f"{hosts!r}{snapshot!r}{list(hosts.metrics)}"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_host_that_says_nothing_times_out(driver):
    """And it is given up without a task or a socket left behind."""
    taken = asyncio.Event()

    async def say_nothing(reader, writer):
        taken.set()
        await reader.read()
        writer.close()

    before = asyncio.all_tasks()
    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Hosts([f"127.0.0.1:{port}"], driver=driver, user="x", timeout=0.05, max_fails=1) as hosts:
        await taken.wait()
        snapshot = await hosts.ready(primary=False)
    server.close()
    await server.wait_closed()
    async with asyncio.timeout(10):
        while asyncio.all_tasks() != before:
            await asyncio.sleep(0)

    assert (snapshot.hosts[0].state, snapshot.hosts[0].error) == ("dead", "timeout")


async def test_an_error_of_our_own_does_not_end_the_watch(unused_port, caplog):
    """It is logged with its traceback, and the next probe comes."""
    hosts = Hosts([f"127.0.0.1:{unused_port}"], interval=0.01)
    errors, answered = [ZeroDivisionError()], hosts._watch.answered

    def faulty(*args):
        if errors:
            raise errors.pop()
        answered(*args)

    hosts._watch.answered = faulty
    async with hosts:
        await hosts.ready(primary=False, timeout=30)

    assert "ZeroDivisionError" in caplog.text


async def test_a_doubt_ends_with_a_probe_that_began_after_it(unused_port):
    """However many ask for probes meanwhile."""
    async with Hosts([f"127.0.0.1:{unused_port}"], interval=60) as hosts:
        await hosts.ready(primary=False, timeout=30)
        (host,) = [status.host for status in hosts.snapshot()]
        hosts.report(host, ConnectionResetError())
        assert hosts.in_doubt(host)
        asking = [asyncio.ensure_future(hosts.refresh()) for _ in range(3)]
        await asyncio.gather(*asking)

        assert not hosts.in_doubt(host)


async def test_a_doubt_does_not_end_with_a_probe_that_was_not_answered():
    """As behind a proxy that takes connections although its server is gone: whoever waits must not be sent there again."""

    async def say_nothing(reader, writer):
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    name = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with Hosts([name], driver="asyncpg", user="x", timeout=0.05, max_fails=1000, interval=60) as hosts:
        hosts.report(name, ConnectionResetError())
        for _ in range(2):
            await hosts.refresh()
            assert hosts.in_doubt(name)
        server.close()
        await server.wait_closed()
        async with asyncio.timeout(10):
            while hosts.in_doubt(name):
                await hosts.refresh()

    assert hosts.snapshot().hosts[0].error == "refused"


async def test_it_starts_with_the_application(unused_port):
    """As its lifespan."""
    hosts = Hosts([f"127.0.0.1:{unused_port}"])
    async with hosts.lifespan(object()):
        assert hosts.primary_now() is None
    with pytest.raises(MonitorError):
        hosts.primary_now()


async def test_ready_waits_for_what_is_needed(hosts):
    """And says what is missing."""
    with pytest.raises(NoPrimaryError):
        await hosts.ready(timeout=0)
    hosts.tell_all()
    hosts.fails("c")

    assert (await hosts.ready(replicas=1)).primary == "a:5432"
    with pytest.raises(NoReplicaError, match="2 replicas"):
        await hosts.ready(replicas=2, timeout=0)


async def test_whoever_waits_when_it_ends_is_told(hosts):
    """Nobody waits for ever."""
    waiting = asyncio.ensure_future(hosts.primary(wait=60))
    await asyncio.sleep(0)
    await hosts.aclose()

    with pytest.raises(MonitorError):
        await waiting


async def test_subscribers_are_told_of_changes_only(hosts, caplog):
    """An answer like the one before is none; an error in a subscriber ends nothing."""
    seen = []
    unsubscribe = hosts.subscribe(seen.append)
    hosts.subscribe(lambda snapshot: 1 / 0)
    hosts.tell_all()
    count = len(seen)
    hosts.tell_all(lsn=200)
    assert len(seen) == count
    hosts.fails("b")
    assert seen[-1].host("b:5432").state == "dead"
    unsubscribe()
    unsubscribe()
    hosts.fails("c")

    assert len(seen) == count + 1
    assert "ZeroDivisionError" in caplog.text


async def test_refresh_waits_for_probes_that_begin_now(hosts):
    """For the first with a limit, for all without one."""
    hosts.tell_all()
    refreshing = asyncio.ensure_future(hosts.refresh())
    one = asyncio.ensure_future(hosts.refresh("b", "c", timeout=60))
    await asyncio.sleep(0)
    hosts.replica_says("b", lsn=300)
    assert (await one).host("b:5432").lsn == 300
    assert not refreshing.done()
    hosts.tell_all()

    assert (await refreshing).primary == "a:5432"


async def test_what_happens_is_logged_without_secrets(hosts, caplog):
    """Loudly, where a person has to know."""
    caplog.set_level(logging.INFO, "context_sqla.hosts")
    hosts.tell_all()
    hosts.fails("a")
    hosts.primary_says("b", timeline=2)
    hosts.primary_says("a")
    hosts.reset_fence()
    levels = {record.levelname for record in caplog.records}

    assert levels == {"INFO", "WARNING", "ERROR"}
    assert "Several hosts say that they are the primary; used is b:5432" in caplog.text
    assert hosts.metrics.get("primary_changes_total") == 2
    assert hosts.metrics.get("split_brains_total") == 1


async def test_only_connections_for_writing_end_with_a_demotion(hosts):
    """Behind a proxy a server may change its role while connections live; readers may stay."""

    class Connections:
        def __init__(self, writes):
            self.writes, self.aborted = writes, []

        def abort(self, host):
            self.aborted.append(host)
            return 1

    writers, readers = Connections(True), Connections(False)
    hosts.attach(writers)
    hosts.attach(readers)
    hosts.tell_all()
    hosts.replica_says("a")
    assert (writers.aborted, readers.aborted) == (["a:5432"], [])
    hosts.fails("a")

    assert (writers.aborted, readers.aborted) == (["a:5432"] * 2, ["a:5432"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_forked_process_does_not_watch(hosts):
    """Tasks and sockets belong to the parent."""
    hosts.tell_all()
    pid = os.fork()
    if not pid:
        try:
            hosts.primary_now()
        except MonitorError:
            os._exit(0)
        finally:
            os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert hosts.primary_now() == "a:5432"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_forked_process_does_not_watch_what_nobody_keeps_either(unused_port):
    """The tasks keep what watches; an application may only have subscribed, and let the monitor itself go."""
    hosts = Hosts([f"127.0.0.1:{unused_port}"], driver="asyncpg")
    hosts.start()
    watch, monitor = hosts._watch, weakref.ref(hosts)
    del hosts
    gc.collect()
    assert monitor() is None
    pid = os.fork()
    if not pid:
        os._exit(0 if watch.loop is None and not watch.pollers else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    await watch.stop()

    assert status == 0


def refused(reason):
    """What psycopg raises where a server refuses a login: it has no SQLSTATE."""
    return OperationalError(f'connection failed: connection to server at "127.0.0.1", port 5432 failed: FATAL:  {reason}')


class Told(Exception):
    """What a driver raises."""

    def __init__(self, sqlstate):
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("error", "kind", "hard"),
    [
        (Told("57P03"), "starting", True),
        (Told("57P01"), "closed", True),
        (Told("08006"), "closed", True),
        (Told("28P01"), "login", False),
        (Told("3D000"), "database", False),
        (Told("53300"), "full", False),
        (Told("42501"), "rights", False),
        (Told("XX000"), "error", False),
        (TimeoutError(), "timeout", False),
        (ConnectionRefusedError(), "refused", True),
        (ConnectionResetError(), "closed", True),
        (OSError(24, "too many open files"), "files", False),
        (ValueError(), "error", False),
        (SecretError(), "password", False),
        (refused('password authentication failed for user "the_database"'), "login", False),
        (refused('no pg_hba.conf entry for host "::1", user "app", database "first", no encryption'), "login", False),
        (refused('role "app" does not exist'), "login", False),
        (refused('database "first" does not exist'), "database", False),
        (refused("sorry, too many clients already"), "full", False),
        (refused('remaining connection slots are reserved for roles with privileges of the "x" role'), "full", False),
        (refused("the database system is starting up"), "starting", True),
        (refused("the database system is not yet accepting connections"), "starting", True),
        (refused("terminating connection due to administrator command"), "closed", True),
        (refused("something new"), "error", False),
        (OperationalError("consuming input failed: server closed the connection unexpectedly"), "closed", True),
        (OperationalError("connection is bad: connection to server at ... failed: Connection refused"), "refused", True),
    ],
)
def test_a_failure_is_one_word(error, kind, hard):
    """Never the driver's text; what is certainly not there is dead at once."""
    assert classify(error) == (kind, hard)


def test_a_driver_that_is_missing_is_told_with_the_remedy(monkeypatch):
    """The extra names it."""
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("asyncpg", "psycopg"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DriverError, match=r"context-sqla-hosts\[asyncpg\]"):
        make_probe(Address("a", 1), Login())
