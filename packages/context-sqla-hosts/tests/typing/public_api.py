"""What type checkers know of the public names; checked, never run."""

from typing import assert_type

from context_sqla import DBConnect
from context_sqla_hosts import (
    Choice,
    Floor,
    Hosts,
    HostStatus,
    Position,
    ReadYourWrites,
    Role,
    Snapshot,
    State,
    StatusApp,
    at_least,
    bind_engine,
    is_host_failure,
    patroni_members,
    primary,
    replica,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

hosts = Hosts(["db1", "db2"], user="app", password=lambda: "secret", weights={"db1": 2})
assert_type(hosts, Hosts)
assert_type(Hosts.from_url("postgresql://db1,db2/app", interval=2.0), Hosts)
assert_type(Hosts(["db1"], patroni={"db1": "http://db1:8008"}), Hosts)
assert_type(Hosts.from_env({"CONTEXT_SQLA_HOSTS_HOSTS": "db1"}, max_fails=3), Hosts)
assert_type(StatusApp(hosts, max_lag_ms=500, geos={"db1": "north"}), StatusApp)
assert_type(primary(hosts, wait=1), Choice)
assert_type(is_host_failure(ValueError()), bool)
assert_type(at_least(hosts, lsn=Position(1, 2)), Choice)


class Session(AsyncSession):
    """A user's own."""


db = DBConnect.from_url("postgresql+asyncpg://db1/app", before_create_session_handler=primary(hosts))
assert_type(db, DBConnect[AsyncSession])
own = DBConnect.from_url(
    "postgresql+asyncpg://db1/app",
    session_class=Session,
    before_create_session_handler=replica(hosts, max_lag=1, balance="nearest"),
)
assert_type(own, DBConnect[Session])
writes = ReadYourWrites(hosts, db, own, keys=["secret"])


async def find() -> None:
    """Patroni's members are the hosts, and the second opinion."""
    assert_type(await patroni_members("http://db1:8008", timeout=1), dict[str, str])


async def use(engine: AsyncEngine) -> None:
    """Use it."""
    async with hosts as entered:
        assert_type(entered, Hosts)
    assert_type(await hosts.ready(replicas=1), Snapshot)
    assert_type(await hosts.primary(), str)
    assert_type(hosts.primary_now(), str | None)
    assert_type(hosts.is_watching, bool)
    assert_type(bind_engine(engine, primary(hosts)), AsyncEngine)
    for status in hosts.snapshot():
        assert_type(status, HostStatus)
        assert_type(status.state, State)
        assert_type(status.role, Role)
        assert_type(status.lag(), float | None)
        assert_type(status.position, Position | None)
    with writes.visit(cookie="a=b") as visit:
        assert_type(visit.needs(), Floor | None)
    assert_type(writes.headers(visit), list[tuple[str, str]])
