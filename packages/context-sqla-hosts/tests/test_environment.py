"""The environment variables: pg-status's and ours."""

import pytest
from context_sqla_hosts import Hosts
from context_sqla_hosts._environment import read_environment

PLAIN = {"pg_status__hosts": "db1,db2"}


def read(**variables):
    return read_environment({**PLAIN, **variables})


def test_the_variables_of_pg_status_1_0_0():
    """Seconds, one port, another delimiter."""
    settings = read_environment(
        {
            "pg_status__hosts": "db1; db2",
            "pg_status__delimiter": ";",
            "pg_status__port": "5433",
            "pg_status__pg_user": "u",
            "pg_status__pg_password": " p ",
            "pg_status__pg_database": "d",
            "pg_status__sleep": "2",
            "pg_status__connect_timeout": "3",
            "pg_status__max_fails": "4",
            "pg_status__sync_max_lag_ms": "20000",
            "pg_status__sync_max_lag_bytes": "5",
        }
    )

    assert settings.hosts == ("db1:5433", "db2:5433")
    assert settings.options == {
        "user": "u", "password": " p ", "database": "d", "interval": 2.0, "timeout": 3.0, "max_fails": 4
    }  # fmt: skip
    assert (settings.max_lag_ms, settings.max_lag_bytes, settings.listen) == (20_000, 5, "127.0.0.1:8000")


def test_the_variables_of_pg_status_2():
    """Milliseconds, a port for each host, places, the listener, the log."""
    settings = read_environment(
        {
            "pg_status__hosts": "db1,::1,db3:7",
            "pg_status__pg_port": "1,2,3",
            "pg_status__sleep_ms": "200",
            "pg_status__query_timeout_ms": "1500",
            "pg_status__connect_timeout": "9",
            "pg_status__conn_max_age_ms": "1",
            "pg_status__hosts_dc": "x,y,x",
            "pg_status__current_dc": "x",
            "pg_status__hosts_geo": "n,s,n",
            "pg_status__current_geo_env": "PLATFORM_GEO",
            "PLATFORM_GEO": "n",
            "pg_status__http_listen_address": "::",
            "pg_status__http_port": "9000",
            "pg_status__log_level": "WARN",
            "pg_status__log_format": "json",
        }
    )

    assert settings.hosts == ("db1:1", "[::1]:2", "db3:7")
    assert (settings.options["interval"], settings.options["timeout"]) == (0.2, 1.5)
    assert settings.options["locality"] == "x"
    assert settings.options["localities"] == {"db1:1": "x", "[::1]:2": "y", "db3:7": "x"}
    assert (settings.geo, settings.geos["[::1]:2"]) == ("n", "s")
    assert (settings.listen, settings.log_level, settings.log_format) == ("[::]:9000", "warn", "json")


def test_the_defaults_are_those_of_pg_status_where_its_hosts_are_given():
    """But for the password, which may stand in the password file, the listener, and the interval."""
    settings = read()

    assert settings.options == {
        "user": "postgres", "password": None, "database": "postgres", "interval": 0.25, "timeout": 1.0, "max_fails": 3
    }  # fmt: skip
    assert settings.listen == "127.0.0.1:8000"
    assert (settings.max_lag_ms, settings.max_lag_bytes) == (1000, 1_000_000)


def test_ours_win():
    """And have the defaults of Hosts."""
    ours = {
        "HOSTS": "a,b", "USER": "u", "PASSWORD": "p", "DATABASE": "d", "PORT": "6", "DRIVER": "psycopg", "INTERVAL": "0.5",
        "TIMEOUT": "0.2", "MAX_FAILS": "1", "SPLIT_BRAIN": "refuse", "REQUIRE_TIMELINE_EVIDENCE": "true", "MAX_LAG_MS": "7",
        "MAX_LAG_BYTES": "8", "LOCALITY": "x", "LOCALITIES": "x,y", "GEO": "n", "GEOS": "n,n", "LISTEN": "*:1",
        "LOG_LEVEL": "debug", "LOG_FORMAT": "text", "PATRONI": "http://a:8008, http://b:8008",
    }  # fmt: skip
    named = {f"CONTEXT_SQLA_HOSTS_{name}": value for name, value in ours.items()}
    settings = read(**named, pg_status__sync_max_lag_ms="1", pg_status__current_dc="z", pg_status__pg_user="z")

    assert settings.hosts == ("a:6", "b:6")
    assert settings.options == {
        "user": "u", "password": "p", "database": "d", "driver": "psycopg", "interval": 0.5, "timeout": 0.2, "max_fails": 1,
        "split_brain": "refuse", "require_timeline_evidence": True, "locality": "x", "localities": {"a:6": "x", "b:6": "y"},
        "patroni": {"a:6": "http://a:8008", "b:6": "http://b:8008"},
    }  # fmt: skip
    assert (settings.max_lag_ms, settings.max_lag_bytes, settings.listen) == (7, 8, "*:1")
    assert read_environment({"CONTEXT_SQLA_HOSTS_HOSTS": "a"}).options == {
        "user": None, "password": None, "database": None, "interval": 0.25
    }  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({}, 0.25),
        ({"pg_status__sync_max_lag_ms": "400"}, 0.1),
        ({"pg_status__sync_max_lag_ms": "1"}, 0.05),
        ({"pg_status__sync_max_lag_ms": "0"}, 1.0),
        ({"pg_status__sync_max_lag_ms": "60000"}, 1.0),
        ({"pg_status__sleep_ms": "100"}, 0.1),
        ({"CONTEXT_SQLA_HOSTS_INTERVAL": "3"}, 3.0),
    ],
)
def test_probes_come_often_enough_for_the_limit(variables, interval):
    """The age of a probe is in the lag: with one a second, a limit of a second would be missed by replicas that are well."""
    assert read(**variables).options["interval"] == interval


def test_a_place_counts_where_every_host_has_one():
    """Half of it would send all reads to a few."""
    assert "locality" not in read(pg_status__hosts_dc="x", pg_status__current_dc="x").options
    assert "locality" not in read(pg_status__hosts_dc="x,", pg_status__current_dc="x").options
    assert read(pg_status__hosts_geo="n", pg_status__current_geo="n").geos == {}
    only_shown = read(pg_status__hosts_dc="x,y").options
    assert "locality" not in only_shown
    assert only_shown["localities"] == {"db1": "x", "db2": "y"}


def test_a_password_file_is_read_for_each_connection(tmp_path):
    """A mounted secret changes."""
    file = tmp_path / "password"
    file.write_text("one\n")
    password = read(CONTEXT_SQLA_HOSTS_PASSWORD_FILE=str(file)).options["password"]
    assert password() == "one"
    file.write_text("two")

    assert password() == "two"


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"pg_status__hosts": ""}, "CONTEXT_SQLA_HOSTS_HOSTS"),
        ({"pg_status__sleep_ms": "hunter2"}, "pg_status__sleep_ms"),
        ({"pg_status__max_fails": "-1"}, "pg_status__max_fails"),
        ({"pg_status__sync_max_lag_ms": "1.5"}, "pg_status__sync_max_lag_ms"),
        ({"pg_status__pg_port": "1,2,3"}, "port"),
        ({"pg_status__pg_port": "hunter2"}, "port"),
        ({"pg_status__log_level": "hunter2"}, "pg_status__log_level"),
        ({"CONTEXT_SQLA_HOSTS_INTERVAL": "hunter2"}, "CONTEXT_SQLA_HOSTS_INTERVAL"),
        ({"CONTEXT_SQLA_HOSTS_SPLIT_BRAIN": "hunter2"}, "CONTEXT_SQLA_HOSTS_SPLIT_BRAIN"),
        ({"CONTEXT_SQLA_HOSTS_PATRONI": "http://hunter2:8008"}, "CONTEXT_SQLA_HOSTS_PATRONI"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(variables, named):
    """Its value is not repeated: somebody may have mixed up two of them."""
    with pytest.raises(ValueError, match=named) as caught:
        read(**variables)

    assert "hunter2" not in str(caught.value)


def test_a_monitor_is_made_of_the_environment(monkeypatch):
    """In an application too; what is said there wins."""
    hosts = Hosts.from_env({**PLAIN, "pg_status__pg_password": "hunter2"}, max_fails=7)
    monkeypatch.setenv("CONTEXT_SQLA_HOSTS_HOSTS", "db9")

    assert [status.host for status in hosts.snapshot()] == ["db1:5432", "db2:5432"]
    assert hosts.interval == 0.25
    assert [status.host for status in Hosts.from_env().snapshot()] == ["db9:5432"]
    assert "hunter2" not in repr(hosts) + repr(read(pg_status__pg_password="hunter2"))
