"""A real PostgreSQL cluster for the tests: a primary and its replicas on loopback, with the faults that clusters have.

async with cluster(replicas=2) as nodes:
    first, second, third = nodes
    await second.pause_replay()          # lag
    first.kill()                         # SIGKILL for every process, as a power cut
    await second.promote()
    await third.follow(second)
    await first.rejoin(second)           # pg_rewind, and start as a replica
"""

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
from support.postgres import PASSWORD, USER, Postgres, PostgresError

DATABASE = "first"
MONITOR = "watcher"  # has pg_monitor
PLAIN = "nobody_special"  # has no rights but to connect

#: On top of those of every test server. A killed server loses nothing: the page cache belongs to the kernel.
SETTINGS: Mapping[str, str] = {
    "full_page_writes": "on",  # pg_rewind needs it
    "wal_log_hints": "on",  # and this, without checksums
    "wal_level": "replica",
    "wal_keep_size": "256MB",
    "max_wal_senders": "16",
    "hot_standby": "on",
    "hot_standby_feedback": "on",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "100ms",
    "wal_receiver_timeout": "5s",
    "wal_sender_timeout": "5s",
    "shared_buffers": "16MB",
    "max_connections": "120",
}


_template: list[tuple[Mapping[str, str], Path]] = []


class Sql:
    """A server that one can ask."""

    host: str
    port: int

    @property
    def address(self) -> str:
        """Host and port, as a monitor takes them."""
        return f"{self.host}:{self.port}"

    @contextlib.asynccontextmanager
    async def session(self, database: str = DATABASE) -> AsyncIterator[Any]:
        """Give a connection of asyncpg, as the superuser."""
        login = {"user": USER, "password": PASSWORD, "database": database}
        connection = await asyncpg.connect(host=self.host, port=self.port, timeout=10, **login)
        try:
            yield connection
        finally:
            await connection.close(timeout=10)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        """Return the only value of a query."""
        async with self.session() as connection:
            return await connection.fetchval(sql, *args)

    async def execute(self, *statements: str) -> None:
        """Run statements, each in a transaction of its own."""
        async with self.session() as connection:
            for statement in statements:
                await connection.execute(statement)


class Node(Sql, Postgres):
    """One server of a cluster. Lower-level methods block for milliseconds; those that talk SQL are asynchronous."""

    def __init__(self, name: str, source: "Node | None" = None, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(settings={**SETTINGS, **(settings or {})})
        self.name = name
        self._source = source

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.address} running={self.running}>"

    @property
    def conninfo(self) -> str:
        """How a replica connects to this node."""
        return f"host={self.host} port={self.port} user={USER} password={PASSWORD} dbname={DATABASE} connect_timeout=3"

    def url(self, user: str = USER, driver: str = "asyncpg") -> str:
        """SQLAlchemy's URL of this node."""
        return f"postgresql+{driver}://{user}:{PASSWORD}@{self.address}/{DATABASE}"

    # SQL

    async def configure(self, **settings: str) -> None:
        """Change settings, and reload."""
        quoted = {name: value.replace("'", "''") for name, value in settings.items()}
        await self.execute(*(f"ALTER SYSTEM SET {name} = '{value}'" for name, value in quoted.items()), "SELECT pg_reload_conf()")

    # Processes

    def kill(self) -> None:
        """End every process of the server at once with SIGKILL."""
        if (process := self._process) is None:
            return
        for pid in reversed(self.suspend()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(30)
        self.stop("immediate")

    def suspend(self) -> list[int]:
        """Stop every process with SIGSTOP: the server hangs, its kernel still accepts connections. The postmaster comes first."""
        postmaster = self._postmaster()
        assert postmaster is not None
        stopped = [postmaster]
        os.kill(postmaster, signal.SIGSTOP)
        while fresh := set(_children(postmaster)).difference(stopped):
            for pid in fresh:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
        return stopped

    def resume(self) -> None:
        """Undo `suspend`."""
        postmaster = self._postmaster()
        assert postmaster is not None
        for pid in (*_children(postmaster), postmaster):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    # Replication

    async def promote(self) -> None:
        """Make a replica the primary; returns when it takes writes."""
        if not await self.fetchval("SELECT pg_promote(true, 30)"):
            raise PostgresError(f"{self.name} was not promoted")

    async def follow(self, primary: "Node") -> None:
        """Point a running replica to another primary."""
        await self.configure(primary_conninfo=primary.conninfo)

    async def cut_off(self) -> None:
        """Let a replica lose its primary for good."""
        await self.configure(primary_conninfo="")

    async def pause_replay(self) -> None:
        """Let a replica receive the log and not replay it."""
        async with self.session() as connection:
            await connection.execute("SELECT pg_wal_replay_pause()")
            while await connection.fetchval("SELECT pg_get_wal_replay_pause_state()") != "paused":
                await asyncio.sleep(0.005)

    async def resume_replay(self) -> None:
        """Undo `pause_replay`."""
        await self.execute("SELECT pg_wal_replay_resume()")

    async def rejoin(self, primary: "Node") -> None:
        """Make an old primary a replica of the new one, without what it wrote since they parted."""
        await asyncio.to_thread(self.stop, "fast")
        # Until its first checkpoint the new primary's control file names the old timeline, and pg_rewind would do nothing.
        await primary.execute("CHECKPOINT")
        await asyncio.to_thread(self._rewind, primary)
        await asyncio.to_thread(self.start)

    async def caught_up(self, *replicas: "Node") -> None:
        """Wait until replicas have replayed all that is written here."""
        lsn = await self.fetchval("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint")
        for replica in replicas:
            async with replica.session() as connection:
                while not await connection.fetchval("SELECT (pg_last_wal_replay_lsn() - '0/0')::bigint >= $1", lsn):
                    await asyncio.sleep(0.005)

    async def streaming(self, count: int) -> None:
        """Wait until so many replicas stream from here."""
        async with self.session() as connection:
            while await connection.fetchval("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") < count:
                await asyncio.sleep(0.01)

    def _initialise(self) -> None:
        if self._source is None:
            self._initialise_from_the_first()
            return
        backup = ("-D", self._data, "-d", self._source.conninfo, "-X", "stream", "-c", "fast", "-R", "--no-sync")
        self._run("pg_basebackup", *backup)

    def _initialise_from_the_first(self) -> None:
        """Copy what the first cluster of this process was made from: initdb is slow."""
        if _template:
            (settings, folder) = _template[0]
            shutil.copytree(folder, self._data)
            for path in (self._data, *self._data.rglob("*")):
                os.chown(path, self.installation.account.uid, self.installation.account.gid)
            assert settings == self.settings
            return
        super()._initialise()
        folder = Path(tempfile.mkdtemp(prefix="postgres-template-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        shutil.copytree(self._data, folder / "data")
        _template.append((self.settings, folder / "data"))

    def _rewind(self, primary: "Node") -> None:
        self._run("pg_rewind", "-D", self._data, "--source-server", primary.conninfo, "-R", "--no-sync")


@contextlib.asynccontextmanager
async def cluster(replicas: int = 2, *, settings: Mapping[str, str] | None = None) -> AsyncIterator[list[Node]]:
    """Make a primary and its replicas, streaming; kill and remove them at the end."""
    async with contextlib.AsyncExitStack() as stack:
        primary = Node("node1", settings=settings)
        nodes = [primary, *(Node(f"node{number + 2}", primary, settings=settings) for number in range(replicas))]
        await stack.enter_async_context(_started(primary))
        roles = [f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'" for role in (MONITOR, PLAIN)]
        await primary.execute(*roles, f"GRANT pg_monitor TO {MONITOR}")
        for node in nodes[1:]:
            await stack.enter_async_context(_started(node))
        await primary.streaming(replicas)
        yield nodes


@contextlib.asynccontextmanager
async def _started(node: Node) -> AsyncIterator[None]:
    await asyncio.to_thread(node.__enter__)
    try:
        yield
    finally:
        _kill(node)
        await asyncio.to_thread(node.__exit__)


def _kill(node: Node) -> None:
    with contextlib.suppress(ProcessLookupError):
        node.kill()


def _children(pid: int) -> list[int]:
    """The child processes; every backend is a session of its own, so that a signal to the group would not reach them."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found
