"""What strangers send and what nobody should write: names, URLs, variables, options, tokens, cookies, heads and queries."""

import asyncio
import io
import math
import string
from contextlib import redirect_stderr

import pytest
from context_sqla_hosts import Hosts, ReadYourWrites, ReadYourWritesMiddleware
from context_sqla_hosts._address import parse_host, parse_url
from context_sqla_hosts._app import StatusApp
from context_sqla_hosts._command import main, parse_listen
from context_sqla_hosts._environment import read_environment
from context_sqla_hosts._query import Query, QueryError, prefers_json
from context_sqla_hosts._reply import Reply
from context_sqla_hosts._server import _parse, _RefusedError
from context_sqla_hosts._table import Table
from context_sqla_hosts._token import Tokens
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

SECRET = "hunter2"
KEY = "a key that nobody can guess"
CLUSTER = 7_000_000_000
PIECES = [
    "db1",
    ":",
    "5432",
    "/",
    "@",
    "[",
    "]",
    "::1",
    ",",
    "?",
    "&",
    "=",
    "%",
    " ",
    "\0",
    "\n",
    "é",
    "²",
    "٣",
    "-1",
    "0",
    "99999",
]
garbage = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
common = settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Names, URLs and addresses


@common
@given(garbage)
@example("db1:²")
@example("db1:٣")
@example("db1:" + "9" * 5000)
@example("db 1")
@example("db1\0:5432")
def test_a_host_is_one_or_an_error(host):
    """A name without white space and a port, or an error that says how to write one."""
    try:
        found = parse_host(host)
    except ValueError as error:
        assert "host" in str(error)
        return
    assert found.name
    assert not any(character.isspace() or character in "/@\0" for character in found.name)
    assert 0 < found.port < 65536
    assert parse_host(str(found)) == found


@common
@given(st.lists(st.sampled_from([*PIECES, "postgresql", "://", "+asyncpg", "app", "sslmode", "port="]), max_size=12).map("".join))
@example("postgresql://db1/shop?port=x")
@example("postgresql://db1/shop?port=²")
def test_a_url_is_a_monitor_or_an_error(url):
    """Whatever it is; and what it is not is said in words of ours."""
    try:
        hosts, _, port = parse_url(url)
        Hosts(hosts, port=port)
    except ValueError as error:
        assert not str(error).startswith("invalid literal"), "an error of Python's, not ours"


@common
@given(garbage)
@example("?port=")
@example("/shop?port=x")
def test_a_url_in_an_error_has_no_password(rest):
    """P20."""
    try:
        hosts, _, port = parse_url(f"postgresql://app:{SECRET}@db1:x{rest}")
        Hosts(hosts, port=port)
    except ValueError as error:
        assert SECRET not in str(error)


@common
@given(garbage)
@example(":²")
def test_an_address_to_listen_on_is_one_or_an_error(text):
    """In words of ours."""
    try:
        _, port = parse_listen(text)
    except ValueError as error:
        assert "address to listen on" in str(error)
    else:
        assert 0 <= port < 65536


# Options


@common
@given(
    st.sampled_from(["interval", "timeout", "max_fails", "jitter", "stale_after"]),
    st.one_of(st.floats(), st.integers(-3, 3), st.text(max_size=3), st.none()),
)
@example("interval", math.nan)
@example("timeout", "1")
@example("max_fails", 1.5)
@example("stale_after", -1)
def test_an_option_that_cannot_work_is_told_at_once(option, value):
    """And not in the middle of the night, by the first probe that takes too long."""
    try:
        hosts = Hosts(["db1"], **{option: value})
    except (TypeError, ValueError):
        return
    assert not math.isnan(getattr(hosts, option, 0))
    assert hosts.stale_after > 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("same_site", "loose"),
        ("cookie", "a b"),
        ("cookie", "a;b"),
        ("cookie", "a\r\nSet-Cookie: b"),
        ("header", "X Y"),
        ("header", "X\r\nY"),
        ("path", "/\r\nSet-Cookie: a=b"),
        ("path", "/; Domain=example.org"),
        ("max_age", -1),
        ("max_age", 1.5),
    ],
)
async def test_a_cookie_that_cannot_be_is_told_at_once(hosts, option, value):
    """A header that is none would be every answer's."""
    with pytest.raises(ValueError, match=option):
        ReadYourWrites(hosts, keys=[KEY], **{option: value})


# Environment variables and the command line

VARIABLES = [
    "CONTEXT_SQLA_HOSTS_" + name
    for name in (
        "HOSTS", "PORT", "USER", "DATABASE", "DRIVER", "INTERVAL", "TIMEOUT", "MAX_FAILS", "SPLIT_BRAIN", "MAX_LAG_MS", "MAX_LAG_BYTES",
        "LOCALITY", "LOCALITIES", "GEO", "GEOS", "LISTEN", "LOG_LEVEL", "LOG_FORMAT", "REQUIRE_TIMELINE_EVIDENCE", "PASSWORD",
        "PATRONI",
    )
] + [
    "pg_status__" + name
    for name in ("hosts", "delimiter", "port", "pg_port", "sleep", "sleep_ms", "max_fails", "connect_timeout", "query_timeout_ms")
]  # fmt: skip


@common
@given(
    st.dictionaries(
        st.sampled_from(VARIABLES), st.one_of(garbage, st.sampled_from(["db1", "1", "0", "true", "nan", "1e9"])), max_size=6
    )
)
@example({"CONTEXT_SQLA_HOSTS_HOSTS": "db1", "CONTEXT_SQLA_HOSTS_PORT": "²"})
@example({"CONTEXT_SQLA_HOSTS_HOSTS": "db1:²"})
@example({"CONTEXT_SQLA_HOSTS_HOSTS": "db1", "CONTEXT_SQLA_HOSTS_PORT": "9" * 5000})
@example({"pg_status__hosts": "db1", "pg_status__delimiter": "\0"})
def test_an_environment_is_a_monitor_or_an_error(variables):
    """Whatever stands in it: a monitor, or a ``ValueError`` in words of ours."""
    variables = {name: value.replace("\0", "") for name, value in variables.items()}
    try:
        found = read_environment({"pg_status__hosts": "db1", **variables})
        Hosts(found.hosts, **found.options)
        parse_listen(found.listen)
    except ValueError as error:
        assert not str(error).startswith(("invalid literal", "could not convert", "Exceeds"))


@common
@given(
    st.lists(
        st.sampled_from(["check", "serve", "--hosts", "db1", "--wait", "x", "--port", "²", "--interval", "-1", "--nothing", ""]),
        max_size=6,
    )
)
def test_a_command_line_that_cannot_be_ends_with_a_line(arguments):
    """A status that is not 0, a line on stderr, and no traceback; nothing is started."""
    if "--hosts" in arguments:
        arguments = [*arguments, "--interval", "nonsense"]  # or it would run
    said = io.StringIO()
    with redirect_stderr(said):
        try:
            status = main(arguments, {})
        except SystemExit as end:
            status = end.code

    assert status not in (0, None)
    assert said.getvalue().strip()
    assert "Traceback" not in said.getvalue()


# Tokens and cookies


@common
@given(
    st.one_of(
        garbage, st.text(string.hexdigits + "v1.-_=", max_size=80), st.binary(max_size=40).map(lambda raw: raw.decode("latin-1"))
    )
)
@example("v1.1.²." + "1" * 20)
@example("v1.." + "." * 100)
@example("v1.1.A.9e9.x")
def test_a_token_of_a_stranger_says_nothing(token):
    """Nothing that was not signed here counts, nor is an error."""
    assert Tokens([KEY], 60).read(token, CLUSTER, 1_800_000_000)[0] is None


@common
@given(
    cookie=st.one_of(
        garbage, st.lists(st.sampled_from(["context-sqla-lsn", "=", ";", '"', " ", "v1.1.A.1.x", ","]), max_size=9).map("".join)
    ),
    header=st.one_of(garbage, st.none()),
)
def test_a_visit_with_garbage_is_a_visit(told, cookie, header):
    """Cookies and headers of a stranger ask for nothing, whatever they are."""

    async def run():
        async with told(["a"]) as hosts:
            hosts.tell_all()
            writes = ReadYourWrites(hosts, keys=[KEY])
            with writes.visit(cookie=cookie, header=header) as visit:
                assert visit.needs() is None
                assert writes.headers(visit) == []

    asyncio.run(run())


@common
@given(
    st.lists(
        st.tuples(st.sampled_from([b"cookie", b"Cookie", b"x-context-sqla-lsn", b"\xff"]), st.binary(max_size=40)), max_size=4
    )
)
def test_headers_of_bytes_are_read(told, fields):
    """Bytes that are no text of any kind pass through the middleware."""

    async def run():
        async with told(["a"]) as hosts:
            hosts.tell_all()
            sent = []

            async def app(scope, receive, send):
                await send({"type": "http.response.start", "status": 200, "headers": []})

            async def send(message):
                sent.append(message)

            middleware = ReadYourWritesMiddleware(app, ReadYourWrites(hosts, keys=[KEY]))
            await middleware({"type": "http", "headers": fields}, None, send)
            assert sent == [{"type": "http.response.start", "status": 200, "headers": []}]

    asyncio.run(run())


# Heads, paths and queries

PATHS = [
    "/master",
    "/replica",
    "/sync_by_time",
    "/sync_by_bytes",
    "/status",
    "/hosts",
    "/metrics",
    "/",
    "/live",
    "*",
    "//",
    "/..",
    "/é",
]
NAMES = ["lag_ms", "lag_bytes", "min_lsn", "wait_ms", "port", "host", "json", "x"]
VALUES = ["", "1", "-1", "²", "1e9", "nan", "9" * 30, "0/0", "16/B374D848", "1:16/B3", "x/y", "%00", "%", "+", "true", "db1"]
queries = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)).map("=".join), max_size=4).map("&".join)


@common
@given(st.one_of(garbage, queries))
def test_a_query_is_read_or_refused(text):
    """An answer of 400, and no other error."""
    try:
        query = Query(text)
        query.wait()
        query.limits(1, 1)
    except QueryError:
        pass


@common
@given(
    st.one_of(
        garbage,
        st.lists(
            st.sampled_from(["application/json", "text/plain", "*/*", ",", ";", "q=", "1", "0.5", "²", "nan"]), max_size=8
        ).map("".join),
    )
)
def test_an_accept_header_is_read(accept):
    """It prefers one or the other."""
    assert prefers_json(accept) in (True, False)


heads = st.builds(
    lambda method, target, version, lines: "\r\n".join([f"{method} {target} {version}", *lines]),
    st.sampled_from(["GET", "HEAD", "OPTIONS", "POST", "get", "", "G\0T", "GET "]),
    st.one_of(st.sampled_from(PATHS), garbage, st.tuples(st.sampled_from(PATHS), queries).map("?".join)),
    st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/1.²", "", "HTTP/1.1 "]),
    st.lists(
        st.one_of(garbage, st.sampled_from(["Host: x", "Host: y", "Content-Length: 0", "Content-Length: ²", "Transfer-Encoding: chunked"])),
        max_size=4,
    ),
)  # fmt: skip


@common
@given(heads)
@example("GET /master HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 5")
@example("GET http://x/master HTTP/1.1\r\nHost: x\r\n folded: y")
def test_a_head_is_answered_or_refused(told, head):
    """With an answer of HTTP; what could be read in two ways is refused."""

    async def run():
        async with told(["a"]) as hosts:
            hosts.tell_all()
            try:
                request = _parse(head.encode("latin-1", "replace"), Table(hosts))
            except _RefusedError as refused:
                assert 400 <= refused.reply.status < 600
                return
            found = request.answer()
            reply = found if isinstance(found, Reply) else await asyncio.wait_for(_now(found), 20)
            assert 200 <= reply.status < 600
            assert reply.head.count(b"\r\n\r\n") == 0
            assert head.count("Host: ") <= 1

    asyncio.run(run())


async def _now(answer):
    task = asyncio.ensure_future(answer())
    await asyncio.sleep(0)
    if not task.done():
        task.cancel()  # it waits for what will not come
        return Reply(204)
    return task.result()


@common
@given(
    st.one_of(st.sampled_from(PATHS), garbage), st.one_of(queries.map(str.encode), st.binary(max_size=30)), st.binary(max_size=30)
)
def test_a_request_to_the_mounted_application_is_answered(told, path, query, accept):
    """Whatever a server lets through."""

    async def run():
        async with told(["a"]) as hosts:
            hosts.tell_all()
            sent = []

            async def send(message):
                sent.append(message)

            scope = {"type": "http", "method": "GET", "path": path, "query_string": query, "headers": [(b"accept", accept)]}
            app = StatusApp(hosts)
            try:
                await asyncio.wait_for(app(scope, None, send), 20 if b"wait" not in query else 0.05)
            except TimeoutError:
                return
            finally:
                app._table.history.stop()
            assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
            assert 200 <= sent[0]["status"] < 600

    asyncio.run(run())
