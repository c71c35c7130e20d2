"""The command line: what it prints, how it ends, and that no password is anywhere."""

import asyncio
import json
import logging
import re
import signal
import subprocess
import sys
import urllib.request
from importlib.metadata import version

import pytest
from context_sqla_hosts import HostStatus, Snapshot
from context_sqla_hosts._command import _is_loopback, _judge, _log, _render, _serve, main, parse_listen
from context_sqla_hosts._environment import Settings

SECRET = "hunter2"


@pytest.fixture(name="log", autouse=True)
def _restored_log():
    """The command sets up its process's log."""
    root = logging.getLogger("context_sqla")
    before = root.handlers[:], root.propagate, root.level
    yield
    root.handlers[:], root.propagate = before[:2]
    root.setLevel(before[2])


def environ(port):
    return {
        "CONTEXT_SQLA_HOSTS_HOSTS": f"127.0.0.1:{port}",
        "CONTEXT_SQLA_HOSTS_PASSWORD": SECRET,
        "CONTEXT_SQLA_HOSTS_USER": "u",
    }


def test_check_of_hosts_that_are_down_is_critical(unused_port, capsys):
    """2, as Nagios has it, with a table."""
    status = main(["check", "--wait", "5"], environ(unused_port))
    out, err = capsys.readouterr()

    assert status == 2
    assert out.splitlines() == [
        "CRITICAL: there is no primary",
        "host".ljust(len(f"127.0.0.1:{unused_port}")) + "  state  role     timeline  lag  bytes  error",
        f"127.0.0.1:{unused_port}  dead   unknown  -         -    -      refused",
    ]
    assert SECRET not in out + err


def test_primary_of_hosts_that_are_down_is_an_error(unused_port, capsys):
    """Nothing is printed that a script could take for a host."""
    status = main(["primary", "--wait", "0.01"], environ(unused_port))
    out, err = capsys.readouterr()

    assert (status, out) == (2, "")
    assert "there is no primary" in err
    assert SECRET not in err


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["check"], {}, "no hosts"),
        (["check", "--interval", "x"], {}, "CONTEXT_SQLA_HOSTS_INTERVAL"),
        (["check", "--hosts", "postgresql://u:hunter2@db"], {}, "not a URL"),
        (["serve", "--listen", "nowhere"], {"pg_status__hosts": "a"}, "an address to listen on"),
        (["serve", "--max-lag-ms", "hunter2"], {"pg_status__hosts": "a"}, "CONTEXT_SQLA_HOSTS_MAX_LAG_MS"),
    ],
)
def test_settings_that_cannot_be_used_are_3(capsys, arguments, variables, message):
    """Unknown, as Nagios has it; before anything is connected to."""
    hosts = [] if not variables and message == "no hosts" else [("CONTEXT_SQLA_HOSTS_HOSTS", "a")]
    status = main(arguments, {**dict(hosts), **variables})
    err = capsys.readouterr().err

    assert status == 3
    assert message in err
    assert SECRET not in err


def test_a_sidecar_is_small():
    """It needs no SQLAlchemy, which is larger than everything else in it; an application gets all names from the same place."""
    code = """
import sys
import context_sqla_hosts, context_sqla_hosts._command
for name in ("sqlalchemy", "context_sqla", "importlib.metadata"):
    assert name not in sys.modules, name
assert all(hasattr(context_sqla_hosts, name) for name in context_sqla_hosts.__all__)
assert set(context_sqla_hosts.__all__) <= set(dir(context_sqla_hosts))
assert not hasattr(context_sqla_hosts, "nonsense")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_it_tells_its_version():
    """As every command does."""
    done = subprocess.run([sys.executable, "-m", "context_sqla_hosts", "--version"], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (0, f"{version('context-sqla-hosts')}\n")


def test_there_is_no_option_for_a_password(capsys):
    """Every user of a machine can read the arguments of its processes."""
    with pytest.raises(SystemExit):
        main(["serve", "--password", SECRET], {})
    with pytest.raises(SystemExit) as ended:
        main(["--help"], {})

    assert ended.value.code == 0
    assert "CONTEXT_SQLA_HOSTS_PASSWORD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("8000", ("127.0.0.1", 8000)),
        ("[::1]:0", ("::1", 0)),
        ("*:80", (None, 80)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_where_to_listen(text, where):
    """A port alone is one of loopback: others are named."""
    assert parse_listen(text) == where


@pytest.mark.parametrize("text", ["", ":80", "a:b", "a:99999", "a"])
def test_where_nobody_can_listen(text):
    """An error that shows how it is written."""
    with pytest.raises(ValueError, match="looks like"):
        parse_listen(text)


PRIMARY = HostStatus("a:1", state="up", role="primary", timeline=2, lsn=9, lag_bytes=0, fresh_at=10.0, seen_at=10.0)
REPLICA = HostStatus("b:1", state="up", role="replica", timeline=2, lsn=9, lag_bytes=0, fresh_at=9.5, seen_at=10.0)


@pytest.mark.parametrize(
    ("other", "status", "why"),
    [
        (REPLICA, 0, "the primary is a:1"),
        (HostStatus("b:1", state="dead", error="refused"), 1, "b:1 is dead (refused)"),
        (HostStatus("b:1", state="suspect"), 1, "b:1 is suspect"),
        (HostStatus("b:1", state="up", role="replica", foreign=True), 1, "b:1 is of another cluster"),
        (HostStatus("b:1", state="up", role="primary", fenced=True), 1, "b:1 says that it is the primary too"),
        (HostStatus("b:1", state="up", role="replica"), 1, "b:1 has an unknown lag"),
        (HostStatus("b:1", state="up", role="replica", lag_bytes=2_000_000, fresh_at=5.0), 1, "by 2000000 bytes, 5.0 s"),
        (HostStatus("b:1", state="up", role="replica", lag_bytes=2_000_000, fresh_at=9.9), 0, "the primary is a:1"),
    ],
)
def test_the_verdict_of_a_check(other, status, why):
    """What is wrong with which host."""
    found, said = _judge(Snapshot(1, 10.0, (PRIMARY, other), primary="a:1"), Settings(), 10.0)

    assert found == status
    assert why in said


def test_a_split_brain_is_critical():
    """Nobody may write."""
    assert _judge(Snapshot(1, 10.0, (PRIMARY,), split_brain=True), Settings(), 10.0)[0] == 2


def test_a_primary_that_is_not_used_is_marked():
    """In the table of a check."""
    old = HostStatus("b:1", state="up", role="primary", timeline=1, fenced=True, fresh_at=1.0)
    lines = _render(Snapshot(1, 10.0, (PRIMARY, REPLICA, old), primary="a:1"), 10.0).splitlines()

    assert lines[1].split() == ["a:1", "up", "primary", "2", "0.000", "s", "0", "-"]
    assert lines[2].split() == ["b:1", "up", "replica", "2", "0.500", "s", "0", "-"]
    assert lines[3].split() == ["b:1", "up", "primary", "(not", "used)", "1", "-", "-", "-"]


def start(*arguments, variables):
    command = [sys.executable, "-m", "context_sqla_hosts", "serve", *arguments]
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def get(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


@pytest.mark.parametrize("form", ["text", "json"])
def test_it_serves_until_it_is_told_to_end(unused_port, form):
    """As a process of its own: SIGTERM ends it well, and nothing that it says has the password."""
    variables = {**environ(unused_port), "CONTEXT_SQLA_HOSTS_LOG_FORMAT": form}
    with start("--listen", "127.0.0.1:0", variables=variables) as process:
        said = ""
        while not (found := re.search(r"Listening on (http://127\.0\.0\.1:\d+)", said)):
            said += process.stderr.readline()
        while "dead" not in said:
            said += process.stderr.readline()
        answers = [get(found[1] + path) for path in ("/live", "/ready", "/hosts?detail=1", "/metrics", "/")]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)

    assert (process.returncode, out) == (0, "")
    assert answers[:2] == ["OK", "OK"]
    assert SECRET not in said + err + "".join(answers)
    lines = (said + err).splitlines()
    if form == "json":
        assert {"@timestamp", "levelStr", "component", "message"} == set.intersection(*(set(json.loads(line)) for line in lines))
    else:
        assert all(re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z (INFO|WARNING|ERROR) ", line) for line in lines)


def test_a_listener_for_others_is_said_aloud(unused_port):
    """It is asked for by its address, and warned of."""
    with start("--listen", "0.0.0.0:0", variables=environ(unused_port)) as process:
        while "WARNING Everybody who can reach 0.0.0.0:0 sees the names of the hosts" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)

    assert process.returncode == 0


def test_an_address_that_is_taken_is_an_error(unused_port):
    """With its reason, and at once."""
    with start("--listen", "127.0.0.1:0", variables=environ(unused_port)) as first:
        while not (found := re.search(r"http://(127\.0\.0\.1:\d+)", first.stderr.readline())):
            pass
        with start("--listen", found[1], variables=environ(unused_port)) as second:
            err = second.communicate(timeout=20)[1]
        first.terminate()
        first.communicate(timeout=20)

    assert second.returncode == 3
    assert f"Cannot listen on {found[1]}" in err


async def test_serving_ends_with_a_signal_and_leaves_nothing(told, caplog):
    """No task, no socket, no timer; in between it answers."""
    hosts, settings = told(["a"]), Settings(hosts=("a",))
    caplog.set_level("INFO")
    before = asyncio.all_tasks()
    serving = asyncio.ensure_future(_serve(hosts, settings, "127.0.0.1", 0))
    while not (found := re.search(r"http://(127\.0\.0\.1):(\d+)", caplog.text)):
        await asyncio.sleep(0)
    reader, writer = await asyncio.open_connection(found[1], int(found[2]))
    writer.write(b"GET /live HTTP/1.0\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"\r\n\r\nOK")
    writer.close()
    signal.raise_signal(signal.SIGTERM)

    assert await asyncio.wait_for(serving, 20) == 0
    assert asyncio.all_tasks() == before
    assert not hosts.is_watching


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("db1", False),
        (None, False),
    ],
)
def test_what_is_loopback(host, loopback):
    """A name may resolve to anything."""
    assert _is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("log_format", "pattern"), [("text", r".*Z ERROR it failed\nTraceback .*"), ("json", r'\{.*"exception": ".*')]
)
def test_an_error_in_the_log_has_its_trace(capsys, log_format, pattern):
    """In one line where lines are records."""
    _log(Settings(log_format=log_format, log_level="warn"))
    logger = logging.getLogger("context_sqla.hosts")
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        logger.exception("it failed")
    logger.info("this is not said")
    err = capsys.readouterr().err

    assert re.fullmatch(pattern, err, re.DOTALL)
    assert (len(err.splitlines()) == 1) is (log_format == "json")
    assert "not said" not in err
