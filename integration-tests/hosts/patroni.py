"""A real Patroni cluster for the tests: etcd and PostgreSQL nodes on loopback, with the faults that such clusters have.

async with patroni() as cluster:
    leader = await cluster.leader()
    leader.kill()                          # as a power cut
    leader.agent.kill()                    # Patroni alone: its PostgreSQL writes on
    leader.etcd.mode = "hang"              # cut off from etcd
    leader.suspend(); leader.resume()      # a machine that stands still
    new = await cluster.leader(other_than=leader)
    leader.start()
    await cluster.whole()
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from support.postgres import LOOPBACK, PASSWORD, USER, Installation, _reachable, _temporary, find, free_port
from support.proxy import Proxy
from support.wire import Address

from . import programs
from .cluster import DATABASE, MONITOR, SETTINGS, Sql
from .load import TABLE

#: Seconds of Patroni: how long the leader's lock lasts, between two rounds, and until a request to etcd is given up. The first is
#: the least that Patroni takes. A busy machine must not cost a leader its lock, and no test waits so long: see `Patroni.expire`.
TTL, LOOP_WAIT, RETRY = 20, 1, 3

# Waits until its standard input ends. Without a word before, our process was killed: then everything in the folder ends too.
_GUARD = """
read -r word
[ -n "$word" ] && exit
for turn in 1 2 3; do
  for entry in /proc/[0-9]*; do
    case "$(readlink "$entry/cwd" 2>/dev/null)" in "$1"*) kill -KILL "${entry#/proc/}" 2>/dev/null ;; esac
  done
done
rm -rf "$1"
"""
_PARAMETERS = {
    **SETTINGS,
    "fsync": "off",
    "autovacuum": "off",
    "jit": "off",
    "unix_socket_directories": "",
    "wal_retrieve_retry_interval": "500ms",
    "log_min_messages": "warning",
}
_BY_THE_CLUSTER = ("max_connections", "max_wal_senders", "wal_level", "wal_log_hints", "hot_standby", "wal_keep_size")


def _coded(text: str) -> str:
    """Text as etcd takes it over HTTP."""
    return base64.b64encode(text.encode()).decode()


_LOCK = _coded("/service/tests/leader")


class Member(Sql):
    """A node: Patroni, called the agent here, and the PostgreSQL that it runs."""

    host = LOOPBACK

    def __init__(self, cluster: "Patroni", name: str, etcd: Proxy) -> None:
        self.name = name
        self.etcd = etcd  # its way to etcd
        self.port, self.rest_port = free_port(), free_port()
        self.folder = cluster.folder / name
        self._cluster = cluster
        self._agent: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Member {self.name} {self.address}>"

    @property
    def rest(self) -> str:
        """The URL of its REST interface."""
        return f"http://{LOOPBACK}:{self.rest_port}"

    @property
    def agent(self) -> subprocess.Popen[bytes]:
        """The process of Patroni."""
        assert self._agent is not None
        return self._agent

    def start(self) -> None:
        """Start Patroni, which starts PostgreSQL."""
        settings = self.folder / "patroni.json"
        if not settings.exists():
            self._cluster.make(self.folder)
            settings.write_text(json.dumps(self._settings()))  # which is YAML too
        self._agent = self._cluster.run(self.folder, *self._cluster.program, str(settings))

    def log(self) -> str:
        """What Patroni has said."""
        return (self.folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        """End Patroni and PostgreSQL at once with SIGKILL."""
        self.agent.kill()  # first, or it would start the other again
        self.agent.wait(30)
        _kill_all(self.folder)

    def suspend(self) -> None:
        """Stop everything with SIGSTOP."""
        stopped: set[int] = set()
        while fresh := _processes(self.folder) - stopped:
            _signal(fresh, signal.SIGSTOP)
            stopped |= fresh

    def resume(self) -> None:
        """Undo `suspend`."""
        _signal(_processes(self.folder), signal.SIGCONT)

    async def says(self, path: str) -> int:
        """Return the status that its REST interface answers with, 0 where it does not answer."""
        try:
            return (await self._cluster.client.get(f"{self.rest}{path}", timeout=2)).status_code
        except httpx.HTTPError:
            return 0

    async def is_primary(self) -> bool:
        """Return whether PostgreSQL itself says that it takes writes."""
        with contextlib.suppress(Exception):  # not there
            return not await asyncio.wait_for(self.ask("SELECT pg_is_in_recovery()"), 10)
        return False

    async def ask(self, sql: str, *args: Any) -> Any:
        """Return the only value of a query about the server, which may have no database of ours yet."""
        async with self.session("postgres") as connection:
            return await connection.fetchval(sql, *args)

    def _settings(self) -> dict[str, Any]:
        cluster, rest = self._cluster, f"{LOOPBACK}:{self.rest_port}"
        role = {"username": USER, "password": PASSWORD}
        common = {name: value for name, value in _PARAMETERS.items() if name in _BY_THE_CLUSTER}
        own = {name: value for name, value in _PARAMETERS.items() if name not in _BY_THE_CLUSTER}
        hba = [f"host {database} all {LOOPBACK}/32 scram-sha-256" for database in ("all", "replication")]
        postgresql = {
            "listen": self.address,
            "connect_address": self.address,
            "data_dir": str(self.folder / "data"),
            "bin_dir": str(cluster.installation.bindir),
            "pgpass": str(self.folder / "pgpass"),
            "basebackup": [{"checkpoint": "fast"}, "no-sync"],
            "authentication": dict.fromkeys(("superuser", "replication", "rewind"), role),
            "pg_hba": hba,
            "parameters": own,
        }
        dcs = {
            "ttl": TTL,
            "loop_wait": LOOP_WAIT,
            "retry_timeout": RETRY,
            "maximum_lag_on_failover": 1 << 24,
            "primary_start_timeout": 0,
            "check_timeline": True,
            "postgresql": {"use_pg_rewind": True, "use_slots": True, "parameters": common},
        }
        return {
            "scope": "tests",
            "name": self.name,
            "restapi": {"listen": rest, "connect_address": rest},
            # As proxies: else Patroni asks etcd for its own address, and goes round the fault.
            "etcd3": {"hosts": [self.etcd.host], "use_proxies": True},
            "bootstrap": {"dcs": dcs, "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums", "no-sync"]},
            "postgresql": postgresql,
        }


class Patroni:
    """The cluster; in `async with patroni()`."""

    installation: Installation

    def __init__(self, version: str) -> None:
        python, packages = programs.python(), programs.patroni(version)
        assert python is not None and packages is not None
        self.program = (python, "-m", "patroni")
        self.members: list[Member] = []
        self.client = httpx.AsyncClient()
        self.etcd = Address(LOOPBACK, free_port())
        self._packages = packages

    def make(self, folder: Path) -> None:
        """Make a folder of the account that runs everything."""
        folder.mkdir()
        if (account := self.installation.account).name is not None:
            os.chown(folder, account.uid, account.gid)

    def run(self, folder: Path, *command: str) -> subprocess.Popen[bytes]:
        """Start a program whose processes are found by the folder in which they work."""
        environ = {"PATH": f"{self.installation.bindir}:/usr/bin:/bin", "HOME": str(folder), "LC_ALL": "C.UTF-8"}
        environ |= {"PYTHONPATH": str(self._packages), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.installation.account.popen,
            )

    async def leader(self, *, other_than: Member | None = None) -> Member:
        """Wait for the member whose Patroni holds the lock and whose PostgreSQL takes writes."""
        async with self.patience():
            while True:
                for member in self.members:
                    if member is not other_than and await member.says("/primary") == 200 and await member.is_primary():
                        return member
                await asyncio.sleep(0.05)

    async def whole(self) -> Member:
        """Wait until there is a leader, and all others stream from it; return the leader."""
        async with self.patience():
            while not await self._is_whole(leader := await self.leader()):
                await asyncio.sleep(0.1)
        return leader

    async def switch_over(self, leader: Member, candidate: Member) -> None:
        """Let another member lead, as planned."""
        body = {"leader": leader.name, "candidate": candidate.name}
        answer = await self.client.post(f"{leader.rest}/switchover", json=body, timeout=60)
        assert answer.status_code == 200, answer.text

    async def expire(self) -> None:
        """End the leader's lock in etcd now, as it ends by itself when its time is over and nobody has renewed it."""
        (lock,) = (await self._etcd("kv/range", key=_LOCK))["kvs"]
        await self._etcd("lease/revoke", ID=lock["lease"])

    async def give_lock(self, member: Member) -> None:
        """Write a member into the leader's key, as Patroni 3.0.2 does to itself when it thaws with an old view of the cluster."""
        await self._etcd("kv/put", key=_LOCK, value=_coded(member.name))

    async def promotion(self, *, other_than: Member) -> tuple[Member, float]:
        """Wait until another member takes writes; return it, and when it first said so."""
        others = [member for member in self.members if member is not other_than]
        tasks = [asyncio.create_task(_promoted(member)) for member in others]
        try:
            async with self.patience():
                (done, *_), _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _etcd(self, what: str, **body: str) -> Any:
        answer = await self.client.post(f"http://{self.etcd.host}:{self.etcd.port}/v3/{what}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @contextlib.asynccontextmanager
    async def patience(self) -> AsyncIterator[None]:
        """Bound what is waited for, and tell what the members have said where it does not come."""
        try:
            async with asyncio.timeout(90):
                yield
        except TimeoutError:
            logs = "\n".join(f"{member}:\n{member.log()[-3000:]}" for member in self.members)
            raise AssertionError(f"the cluster did not get there:\n{logs}") from None

    async def _is_whole(self, leader: Member) -> bool:
        rest = [member for member in self.members if member is not leader]
        # Where a replica is made, pg_basebackup streams as well: only the member itself knows that it runs.
        if not all([await member.says("/replica") == 200 for member in rest]):
            return False
        count = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND application_name = ANY($1)"
        return bool(await leader.ask(count, [member.name for member in rest]) == len(rest))


@contextlib.asynccontextmanager
async def patroni(version: str = programs.NEWEST, *, size: int = 3) -> AsyncIterator[Patroni]:
    """Make a leader and its replicas, with the table for the load; kill and remove everything at the end."""
    cluster = Patroni(version)
    found = find()
    cluster.folder = folder = _temporary(found.account)
    guard = subprocess.Popen(["/bin/sh", "-c", _GUARD, "sh", str(folder)], cwd="/", stdin=subprocess.PIPE, start_new_session=True)
    started: list[subprocess.Popen[bytes]] = []
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(cluster.client)
        stack.callback(_end, guard)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_reap, folder, cluster, started)
        cluster.installation = _reachable(found, folder)
        await _start_etcd(cluster, started)
        for number in range(size):
            way = Proxy(cluster.etcd)
            await way.start()
            stack.push_async_callback(way.stop)
            cluster.members.append(Member(cluster, f"member{number + 1}", way))
        for member in cluster.members:
            member.start()
        leader = await cluster.whole()
        await _fill(leader)
        yield cluster


async def _start_etcd(cluster: Patroni, started: list[subprocess.Popen[bytes]]) -> None:
    program = programs.etcd()
    assert program is not None
    folder = cluster.folder / "etcd"
    cluster.make(folder)
    url, peers = f"http://{cluster.etcd.host}:{cluster.etcd.port}", f"http://{LOOPBACK}:{free_port()}"
    urls = ("--listen-client-urls", url, "--advertise-client-urls", url)
    urls += ("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"one={peers}")
    process = cluster.run(folder, program, "--name", "one", "--data-dir", str(folder / "data"), *urls)
    started.append(process)
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await cluster.client.get(f"{url}/health")).status_code == 200:
                    return
            assert process.poll() is None, (folder / "log").read_text()
            await asyncio.sleep(0.02)


async def _fill(leader: Member) -> None:
    async with leader.session("postgres") as connection:
        await connection.execute(f"CREATE DATABASE {DATABASE}")
    await leader.execute(TABLE, f"CREATE ROLE {MONITOR} LOGIN PASSWORD '{PASSWORD}'", f"GRANT pg_monitor TO {MONITOR}")


async def _promoted(member: Member) -> tuple[Member, float]:
    while True:
        with contextlib.suppress(Exception):  # it restarts, or is rewound
            async with member.session() as connection:
                while await connection.fetchval("SELECT pg_is_in_recovery()"):
                    await asyncio.sleep(0.003)
                return member, time.monotonic()
        await asyncio.sleep(0.02)


def _reap(folder: Path, cluster: Patroni, started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in (*started, *(member._agent for member in cluster.members if member._agent is not None)):
        process.kill()
        process.wait(30)
    _kill_all(folder)


def _end(guard: subprocess.Popen[bytes]) -> None:
    guard.communicate(b"done\n", timeout=30)


def _processes(folder: Path) -> set[int]:
    """The processes that work in a folder or below; PostgreSQL's do in its data, and outlive a Patroni that was killed."""
    found, wanted = set(), str(folder.resolve())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                where = str((entry / "cwd").readlink())
                if where == wanted or where.startswith((f"{wanted}/", f"{wanted} ")):
                    found.add(int(entry.name))
    return found


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill_all(folder: Path) -> None:
    until = time.monotonic() + 30
    while pids := _processes(folder):
        assert time.monotonic() < until, f"these do not end: {pids}"
        _signal(pids, signal.SIGKILL)
        time.sleep(0.01)
