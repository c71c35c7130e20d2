"""URLs, hosts, options and arguments that nobody should write: each is told where it is written, and no password is repeated."""

import asyncio
import math

import pytest
from context_sqla import (
    ContextNotInitiatedError,
    DBConnect,
    DriverError,
    db_context,
    db_session,
    init_db_session_ctx,
    is_context_initiated,
    on_commit,
    put_db_session_to_context,
    reset_db_session_ctx,
    run_in_new_ctx,
    unit_of_work,
)
from context_sqla.adapters import Policy, Unit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

SECRET = "hunter2"
TOLD = (ValueError, TypeError, DriverError)  # what an argument that cannot work is answered with
# What URLs and hosts are made of, and what breaks who reads them.
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
    "+",
    " ",
    "\0",
    "\n",
    "é",
    "²",
    "٣",
    "-1",
    "0",
    ".",
]
garbage = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
numbers = st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=5), st.booleans())
common = settings(derandomize=True, deadline=None, max_examples=300)  # the same in every run


def connect_of(url: object = "postgresql+asyncpg://app@db1/shop", **options) -> DBConnect:
    return DBConnect.from_url(url, **options)  # type: ignore[arg-type]


def host_of(connect: DBConnect, host: str) -> URL:
    """Return the URL of the engine that the connect makes for a host."""
    return connect._engine_creator(host).url


# URLs


@common
@given(
    st.lists(st.sampled_from([*PIECES, "postgresql", "sqlite", "://", "asyncpg", "aiosqlite", "app"]), max_size=10).map("".join)
)
@example("postgresql+asyncpg+x://db1/shop")
@example("postgresql+asyncpg://db1:-1/shop")
@example("postgresql+asyncpg://db1:99999/shop")
@example("postgresql+asyncpg://db1:²/shop")
@example("a b://")
@example("+://")
def test_url_is_a_connect_or_an_error(url):
    """Whatever stands there: a connect whose engine can be made, or an error that says so at once (P19)."""
    try:
        connect = connect_of(url)
    except TOLD as error:
        assert any(told in str(error) for told in ("database URL", "driver", "a host is")), f"{error!r} is not ours"
        return
    assert host_of(connect, connect.host).drivername


@common
@given(garbage, garbage)
@example("", ":²")
@example("/", "@db1")
def test_url_in_an_error_has_no_password(before, after):
    """P20: a URL that cannot be read may have a password in it."""
    with pytest.raises(TOLD) as caught:
        connect_of(f"nothing-that-is-known://{before}app:{SECRET}{after}@db1:x/shop")

    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize("url", [None, 5, b"sqlite+aiosqlite://", "", "db1", "://", object()])
def test_url_that_is_none_says_what_to_write(url):
    """The error names the form of a URL (P19)."""
    with pytest.raises(ValueError, match="postgresql\\+asyncpg://user@host/database"):
        connect_of(url)


# Hosts


@common
@given(garbage)
@example("db1:0")
@example("db1:²")
@example("db1:" + "9" * 5000)
@example("db1:99999")
@example("db 1")
@example("db1\0")
@example("[::1")
@example("[]:5432")
def test_host_is_one_or_an_error(host):
    """A host that is accepted is a name and perhaps a port; every other is told, with the connect, where it is given (P13, P19)."""
    connect = connect_of(name="shop")
    try:
        connect_of(host=host)
        url = host_of(connect, host)
    except ValueError as error:
        assert str(error).startswith(("'shop'", "DBConnect"))
        return
    assert url.host
    assert not any(character.isspace() or character in "/@\0" for character in url.host)
    assert url.port is None or 0 < url.port < 65536


@common
@given(st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True), st.integers(1, 65535))
def test_good_hosts_stay_what_they_are(name, port):
    """A name, with a port or without (P13)."""
    connect = connect_of()

    assert (host_of(connect, name).host, host_of(connect, name).port) == (name, None)
    assert (host_of(connect, f"{name}:{port}").host, host_of(connect, f"{name}:{port}").port) == (name, port)


@common
@given(st.ip_addresses(v=6).map(str), st.integers(1, 65535))
def test_addresses_of_ipv6_stay_what_they_are(address, port):
    """In brackets where a port follows (P13)."""
    connect = connect_of()

    assert host_of(connect, address).host == address
    assert (host_of(connect, f"[{address}]:{port}").host, host_of(connect, f"[{address}]:{port}").port) == (address, port)


@pytest.mark.parametrize("call", ["connect", "change_host", "abort_host"])
@pytest.mark.parametrize("host", [None, 5, b"db1", "", " ", ["db1"]])
async def test_host_of_another_type_names_the_connect(call, host):
    """Every call that takes a host says whose it is, and stays where it was (P19)."""
    connect = connect_of(name="shop")
    with pytest.raises((TypeError, ValueError), match="'shop'.*host"):
        result = getattr(connect, call)(host)
        if call != "abort_host":
            await result

    assert connect.host == "db1"


# Options


@common
@given(
    st.sampled_from(
        ["cleanup_timeout", "commit_timeout", "drain_timeout", "idle_host_grace", "handler_timeout", "warn_held_after"]
    ),
    numbers,
)
@example("cleanup_timeout", None)
@example("commit_timeout", math.nan)
@example("drain_timeout", "5")
@example("idle_host_grace", -1)
def test_limit_is_a_number_of_seconds(option, value):
    """A limit that is none would only be met in the middle of a clean-up: it is told when the connect is made (P7, P19)."""
    good = value is None if option in ("handler_timeout", "warn_held_after") else False
    good = good or (isinstance(value, int | float) and value >= 0)
    try:
        connect_of(name="shop", **{option: value})
    except ValueError as error:
        assert not good
        assert "'shop'" in str(error)
        assert option in str(error)
    else:
        assert good


@pytest.mark.parametrize("place", range(3))
def test_function_that_is_none_is_told(place):
    """An engine in the place of what makes engines; and what it is, not its text: that may be a URL (P19, P20)."""
    functions = [create_async_engine, async_sessionmaker, None]
    functions[place] = f"postgresql+asyncpg://app:{SECRET}@db1/shop"
    with pytest.raises(TypeError, match="'shop'.*functions, not str") as caught:
        DBConnect(functions[0], functions[1], "db1", functions[2], name="shop")  # type: ignore[arg-type]

    assert SECRET not in str(caught.value)


def test_name_is_text():
    """What stands in messages is text, whatever was given (P19)."""
    assert connect_of(name=5).name == "5"


@pytest.mark.parametrize("engine", [None, "sqlite+aiosqlite://", object()])
@pytest.mark.parametrize("which", ["engine_creator", "session_maker_creator"])
async def test_creator_that_returns_nonsense_names_the_connect(which, engine, tmp_path):
    """What a creator returned is told with the connect, and the unit ends well (P19)."""
    creators = {"engine_creator": lambda host: create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a")}
    creators["session_maker_creator"] = async_sessionmaker
    connect = DBConnect(**{**creators, which: lambda given: engine}, host="db1", name="shop")
    with pytest.raises(TypeError, match=f"'shop'.*{which} must return"):
        async with db_context():
            await db_session(connect)

    assert not is_context_initiated()
    await connect.close()


# Arguments of functions


@pytest.mark.parametrize("callback", [None, 5, "function", object()])
async def test_callback_that_is_no_function_is_told(callback):
    """At once: later its error would only be logged (P14)."""
    async with db_context():
        with pytest.raises(TypeError, match="on_commit takes a function"):
            on_commit(callback)


@pytest.mark.parametrize("fn", [None, 5, "function", lambda: 5])
async def test_function_that_is_not_asynchronous_is_a_type_error(fn):
    """Python's own error, out of a unit that has ended (P18)."""
    with pytest.raises(TypeError):
        await run_in_new_ctx(fn)
    with pytest.raises(TypeError):
        await unit_of_work()(fn)

    assert not is_context_initiated()


@pytest.mark.parametrize("retry", ["3", -1, object()])
def test_retry_is_a_number(retry):
    """Told where it is written (P18)."""
    with pytest.raises((TypeError, ValueError)):
        unit_of_work(retry=retry)


@pytest.mark.parametrize("session", [None, 5, "session", AsyncSession])
async def test_session_that_is_none_is_not_put_into_a_unit(session):
    """The error names the connect (P19)."""
    async with db_context():
        with pytest.raises(TypeError, match="'shop'.*AsyncSession"):
            put_db_session_to_context(connect_of(name="shop"), session)


# Tokens of units by hand


@pytest.mark.parametrize("token", [None, 5, "token", object()])
async def test_token_of_nothing_ends_no_unit(token):
    """What is no token is told, and the unit around goes on (P19)."""
    async with db_context():
        with pytest.raises(ContextNotInitiatedError, match="token"):
            await reset_db_session_ctx(token)

        assert is_context_initiated()


async def test_token_counts_once():
    """A token that was used ends nothing more: neither the unit around it nor another one that was opened since (P8)."""
    async with db_context():
        used = init_db_session_ctx(force=True)
        await reset_db_session_ctx(used)
        other = init_db_session_ctx(force=True)
        with pytest.raises(ContextNotInitiatedError, match="token"):
            await reset_db_session_ctx(used)

        assert is_context_initiated()
        await reset_db_session_ctx(other)
        assert is_context_initiated()


async def test_token_of_another_task_ends_nothing_here():
    """A unit is ended where it was opened, or in a task of that place (P8)."""
    tokens = []

    async def opened():
        tokens.append(init_db_session_ctx())

    await asyncio.create_task(opened())
    async with db_context():
        with pytest.raises(ContextNotInitiatedError, match="token"):
            await reset_db_session_ctx(tokens[0])

        assert is_context_initiated()


# Rules


@pytest.mark.parametrize("answer", [None, asyncio.sleep])
async def test_rule_without_an_answer_decides_nothing(answer):
    """None would lose what a good answer has written, and a coroutine is as good as True, for every error (P3)."""
    unit = Unit.enter(Policy(should_commit=lambda status: answer and answer(0)))
    with pytest.raises(TypeError, match=r"should_commit\(500\) must return True or False"):
        await unit.head(500)
    await unit.close()
