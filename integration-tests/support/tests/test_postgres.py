"""The server of the session."""

import asyncio

import asyncpg
import pytest
from support.postgres import DATABASES, Postgres


async def ask(server: Postgres, password: str, database: str, sql: str):
    connection = await asyncpg.connect(host=server.host, port=server.port, user=server.user, password=password, database=database)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


@pytest.mark.parametrize("database", DATABASES)
async def test_server_has_its_databases(postgres, database):
    """Three databases are there, and transactions can be prepared in them."""
    assert await ask(postgres, postgres.password, database, "SELECT current_database()") == database
    assert int(await ask(postgres, postgres.password, database, "SHOW max_prepared_transactions")) > 0


async def test_password_is_asked_for(postgres):
    """A wrong password is refused, so that the right one is a secret worth hiding."""
    with pytest.raises(asyncpg.InvalidPasswordError):
        await ask(postgres, "wrong", "first", "SELECT 1")


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
async def test_spare_server_can_be_stopped_and_started(spare_postgres, mode):
    """A server that was stopped, or has crashed, comes back on the same port with its data."""
    port = spare_postgres.port
    await asyncio.to_thread(spare_postgres.stop, mode)
    with pytest.raises(OSError):
        await ask(spare_postgres, spare_postgres.password, "first", "SELECT 1")
    await asyncio.to_thread(spare_postgres.start)

    assert spare_postgres.port == port
    assert await ask(spare_postgres, spare_postgres.password, "first", "SELECT 1") == 1
