"""Names of hosts and URLs with several of them."""

import pytest
from context_sqla_hosts import Hosts
from context_sqla_hosts._address import parse_host, parse_url


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("db1", "db1:5432"),
        (" db1:6432 ", "db1:6432"),
        ("10.0.0.1", "10.0.0.1:5432"),
        ("::1", "[::1]:5432"),
        ("[::1]:6432", "[::1]:6432"),
    ],
)
def test_a_host_is_its_name_and_its_port(host, key):
    """Two of one name and different ports are two hosts."""
    assert str(parse_host(host)) == key


@pytest.mark.parametrize(
    "host", ["", ":5432", "db1:", "db1:x", "db1:0", "db1:70000", "[::1", "user:hunter2@db1", "/run/pg", "[]"]
)
def test_what_is_no_host_is_refused_without_repeating_a_secret(host):
    """A URL in the wrong place may have a password (P20)."""
    with pytest.raises(ValueError) as caught:
        parse_host(host)

    assert "hunter2" not in str(caught.value)


def test_a_url_names_several_hosts():
    """As asyncpg and libpq write it, with the driver of SQLAlchemy."""
    hosts, login, port = parse_url("postgresql+psycopg_async://app:p%40ss@db1,db2:6432,[::1]:7432/shop?sslmode=require&port=5555")

    assert hosts == ["db1", "db2:6432", "[::1]:7432"]
    assert (login.user, login.secret(), login.database, login.ssl, login.driver) == ("app", "p@ss", "shop", "require", "psycopg")
    assert port == 5555
    assert "p@ss" not in repr(login)


@pytest.mark.parametrize("url", ["db1,db2", "mysql://app:hunter2@db1/x", "postgresql+pg8000://app:hunter2@db1/x"])
def test_another_url_is_refused_without_repeating_it(url):
    """P20."""
    with pytest.raises(ValueError) as caught:
        parse_url(url)

    assert "hunter2" not in str(caught.value)


def test_options_that_are_not_known_are_not_ignored():
    """A misspelt option is no option."""
    with pytest.raises(ValueError, match="sslmoed"):
        parse_url("postgresql://db1/x?sslmoed=require")


def test_a_password_may_be_a_function_and_is_never_shown():
    """Passwords change; no repr has one."""
    hosts = Hosts(["db1"], user="app", password=lambda: "hunter2")

    assert hosts._login.secret() == "hunter2"
    assert "hunter2" not in repr(hosts) + repr(hosts._login)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["a", "a:5432"], {}),
        (["a"], {"interval": 0}),
        (["a"], {"max_fails": 0}),
        (["a"], {"jitter": 1}),
        (["a"], {"split_brain": "guess"}),
        (["a"], {"weights": {"b": 1}}),
    ],
)
def test_options_that_cannot_work_are_told_at_once(arguments, options):
    """A wrong option is an error where it is written."""
    with pytest.raises(ValueError):
        Hosts(arguments, **options)


def test_one_string_is_no_list_of_hosts():
    """`Hosts("db1")` would watch the hosts d, b and 1."""
    with pytest.raises(TypeError, match="from_url"):
        Hosts("db1")


def test_from_url_takes_the_other_options():
    """The URL and the options make the same monitor."""
    hosts = Hosts.from_url("postgresql+asyncpg://app:hunter2@db1,db2:6432/shop", interval=3, weights={"db2:6432": 5})

    assert hosts.address("db2:6432") == ("db2", 6432)
    assert hosts.stale_after == 9.5
