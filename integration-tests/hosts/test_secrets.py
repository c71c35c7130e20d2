"""No password in any answer, metric, log line or error (P20), whatever goes wrong."""

import logging
import traceback

import pytest
from context_sqla import DBConnect
from context_sqla_hosts import Hosts, NoHostError, StatusApp, primary, replica
from httpx import ASGITransport, AsyncClient
from support.postgres import free_port

from .cluster import DATABASE, MONITOR, PASSWORD, USER
from .load import watch, writing

WRONG = "hunter2-is-wrong"
PATHS = (
    *("/", "/metrics", "/hosts", "/hosts?detail=1", "/replicas_info", "/status", "/status?host=127.0.0.1:1", "/version", "/live"),
    *("/ready", "/master", "/primary", "/replica", "/replica?lag_ms=x", "/sync_by_time", "/sync_by_bytes", "/nowhere"),
    *("/sync_by_time_or_bytes", "/sync_by_time_and_bytes", "/most_sync_by_bytes", "/health/primary?host=127.0.0.1"),
)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("password", ["right", "wrong", "from a function that fails"])
async def test_no_answer_metric_log_line_or_error_has_the_password(calm, caplog, driver, password):
    """At the lowest level of every logger, with a host that is dead, and where the login itself is what fails."""
    caplog.set_level(logging.DEBUG)
    given = {"right": PASSWORD, "wrong": WRONG}.get(password, fails)
    names = [*(node.address for node in calm), f"127.0.0.1:{free_port()}"]
    said = []
    login = {"user": MONITOR, "password": given, "database": DATABASE}
    async with Hosts(names, driver=driver, interval=0.1, **login) as hosts:
        snapshot = await hosts.ready(primary=False, timeout=30)
        async with AsyncClient(transport=ASGITransport(StatusApp(hosts)), base_url="http://test") as client:
            for path in PATHS:
                for accept in ("*/*", "application/json"):
                    answer = await client.get(path, headers={"Accept": accept})
                    said.append(f"{answer.headers}{answer.text}")
        for choice in (primary(hosts, wait=0.2), replica(hosts, max_lag=0, fallback="error")):
            try:
                await choice.choose()
            except NoHostError as exc:
                said.append("".join(traceback.format_exception(exc)) + repr(exc.snapshot))
        said += [repr(hosts), str(snapshot), *map(repr, hosts.metrics)]
    kinds = {"right": {None, "refused"}, "wrong": {"login", "refused"}}.get(password, {"password"})
    everything = "\n".join([*said, caplog.text])

    assert {status.error for status in snapshot} == kinds
    assert not [secret for secret in (PASSWORD, WRONG) if secret in everything]


def fails():
    raise ValueError(f"the vault said {WRONG}")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_no_error_of_a_session_has_the_password(calm, caplog, driver):
    """Not even if it is the password that was wrong; the monitor, whose own is right, concludes nothing from that."""
    caplog.set_level(logging.DEBUG)
    url = f"postgresql+{driver}://{USER}:{WRONG}@nowhere/{DATABASE}"
    async with watch(calm) as hosts:
        await hosts.ready()
        db = DBConnect.from_url(url, before_create_session_handler=primary(hosts))
        with pytest.raises(Exception) as caught:
            await writing(db)(-1)
        await db.close()
        said = "".join(traceback.format_exception(caught.value)) + repr(list(hosts.metrics)) + str(hosts.snapshot())
        primary_now = hosts.primary_now()

    assert "password authentication failed" in said
    assert WRONG not in said + caplog.text
    assert primary_now == calm[0].address
