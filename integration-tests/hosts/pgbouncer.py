"""pgbouncer in front of a server: transaction pooling, its console, and another server behind the same address.

async with pgbouncer(node) as front:
    await front.console("PAUSE")
    await front.lead_to(other)         # and RELOAD
    await front.console("RESUME")
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import psycopg
from support.postgres import LOOPBACK, PASSWORD, USER, _temporary, accounts, free_port

from . import programs
from .cluster import DATABASE, MONITOR, Sql

_POOL = 5  # fewer servers than clients, so that clients share them
_SETTINGS = """
[databases]
{database} = host={host} port={port}
[pgbouncer]
listen_addr = {listen}
listen_port = {own}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users
admin_users = {admin}
pool_mode = transaction
default_pool_size = {pool}
max_client_conn = 300
server_login_retry = 1
ignore_startup_parameters = extra_float_digits
logfile = {folder}/log
"""


class Bouncer(Sql):
    """One pgbouncer; to its clients it is a server."""

    host = LOOPBACK

    def __init__(self, target: Sql) -> None:
        account = accounts()[0]
        self.port = free_port()
        self.folder = _temporary(account)
        self.target = target
        users = self.folder / "users"
        users.write_text("".join(f'"{name}" "{PASSWORD}"\n' for name in (USER, MONITOR)))
        self._configure()
        program = programs.pgbouncer()
        assert program is not None
        command = [program, "--quiet", str(self.folder / "settings")]
        for path in self.folder.iterdir():
            os.chown(path, account.uid, account.gid)
        self.process = subprocess.Popen(command, cwd=self.folder, stderr=subprocess.DEVNULL, **account.popen)

    def __repr__(self) -> str:
        return f"<Bouncer {self.address} to {self.target}>"

    async def console(self, *commands: str) -> list[Any]:
        """Run commands of the administrator's console; return the rows of the last."""
        rows: list[Any] = []
        login = {"user": USER, "password": PASSWORD, "dbname": "pgbouncer"}
        connection = await psycopg.AsyncConnection.connect(host=self.host, port=self.port, autocommit=True, **login)
        async with connection, psycopg.AsyncClientCursor(connection) as cursor:
            for command in commands:
                await cursor.execute(command.encode())
                rows = await cursor.fetchall() if cursor.description else []
        return rows

    async def lead_to(self, target: Sql) -> None:
        """Lead clients to another server from their next transaction on."""
        self.target = target
        self._configure()
        await self.console("RELOAD")

    async def ready(self) -> None:
        """Wait until it takes clients."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(psycopg.OperationalError):
                    await self.console("SHOW VERSION")
                    return
                assert self.process.poll() is None, (self.folder / "log").read_text()
                await asyncio.sleep(0.02)

    def _configure(self) -> None:
        values = {"database": DATABASE, "host": self.target.host, "port": self.target.port, "listen": LOOPBACK}
        values |= {"own": self.port, "folder": self.folder, "admin": USER, "pool": _POOL}
        (self.folder / "settings").write_text(_SETTINGS.format_map(values))


@contextlib.asynccontextmanager
async def pgbouncer(target: Sql) -> AsyncIterator[Bouncer]:
    """Run pgbouncer in front of a server; remove it at the end."""
    front = Bouncer(target)
    try:
        await front.ready()
        yield front
    finally:
        front.process.kill()
        front.process.wait(30)
        shutil.rmtree(front.folder, ignore_errors=True)
