"""Which errors tell that the server is lost: real ones, of both drivers, as SQLAlchemy wraps them."""

import asyncio

import pytest
from context_sqla_hosts import is_host_failure
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from support.postgres import free_port

from .cluster import DATABASE, PASSWORD, USER

_INSERT = "INSERT INTO item (id) VALUES (-1)"
_END_ME = "SELECT pg_terminate_backend(pg_backend_pid())"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    ("what", "lost"),
    [
        ("no server", True),
        ("killed while a client connects", True),
        ("ended by an administrator", True),
        ("a write on a replica", True),
        ("a password that is wrong", False),
        ("a database that is not there", False),
        ("a role that is not there", False),
        ("a role with too many connections", False),
        ("a row that exists", False),
        ("wrong SQL", False),
        ("a statement that takes too long", False),
    ],
)
async def test_an_error_tells_whether_the_server_is_lost(calm, driver, what, lost):
    """`is_host_failure` is true where asking again may meet another server, and false where the statement is to blame."""
    statements = {
        "ended by an administrator": [_END_ME],
        "a row that exists": [_INSERT, _INSERT],
        "wrong SQL": ["SELEKT"],
        "a statement that takes too long": ["SET statement_timeout = 10", "SELECT pg_sleep(10)"],
    }.get(what, [_INSERT])
    user, password, database = {
        "a password that is wrong": (USER, "wrong", DATABASE),
        "a database that is not there": (USER, PASSWORD, "nowhere"),
        "a role that is not there": ("nobody_at_all", PASSWORD, DATABASE),
        "a role with too many connections": ("full_role", PASSWORD, DATABASE),
    }.get(what, (USER, PASSWORD, DATABASE))
    if user == "full_role":
        await calm[0].execute(
            "DROP ROLE IF EXISTS full_role", f"CREATE ROLE full_role LOGIN PASSWORD '{PASSWORD}' CONNECTION LIMIT 0"
        )
    async with hangs_up() as mute:
        address = {
            "no server": f"127.0.0.1:{free_port()}",
            "killed while a client connects": mute,
            "a write on a replica": calm[1].address,
        }.get(what, calm[0].address)
        engine = create_async_engine(f"postgresql+{driver}://{user}:{password}@{address}/{database}")
        with pytest.raises(Exception) as caught:
            async with engine.connect() as connection:
                for statement in statements:
                    await connection.execute(text(statement))
        await engine.dispose()

    assert is_host_failure(caught.value) is lost, repr(caught.value)


class hangs_up:
    """A listener that closes every connection at its first byte, as a server does that is killed while a client connects."""

    async def __aenter__(self):
        async def answer(reader, writer):
            await reader.read(1)
            writer.close()

        self.server = await asyncio.start_server(answer, "127.0.0.1", 0)
        return f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *exc_info):
        self.server.close()
        await self.server.wait_closed()
