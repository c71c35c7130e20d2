"""Where a run takes place: PostgreSQL, two proxies in front of it, the server's processes; and one round of it."""

import asyncio
import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract.drivers import FRAMEWORKS
from support.deadline import until
from support.ledger import PostgresLedger
from support.postgres import Postgres
from support.proxy import Proxy, proxy
from support.wire import Address

from .application import TABLES
from .history import Evidence, Outcome, Row, Violation, check
from .injector import Injector
from .load import Clients
from .plan import Plan
from .process import ServerProcess
from .shapes import KEYS

#: For what is there within a second or two, as a rule.
DEADLINE = 30.0
NAIVE = "naive"
#: What SQLAlchemy logs about a connection that nobody has given back.
_DROPPED = "garbage collector is trying to clean up"
_DATABASES = ("first", "second")


@dataclass(frozen=True)
class Stack:
    """What is under test."""

    framework: str
    server: str
    driver: str = "asyncpg"

    @classmethod
    def of(cls, framework: str, server: str | None = None, driver: str | None = None) -> "Stack":
        """Fill in the defaults."""
        known = FRAMEWORKS["starlette" if framework == NAIVE else framework]
        return cls(framework, server or known.servers[0], driver or "asyncpg")


@dataclass
class Round:
    """What came of a round."""

    number: int
    seconds: float
    counts: Counter[str]
    faults: Counter[str]
    violations: list[Violation]
    outcomes: dict[str, Outcome]
    errors: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] | None = None


class Ground:
    """Runs rounds against one server's process, which lives as long as the run."""

    def __init__(self, stack: Stack, postgres: Postgres, proxies: list[Proxy], server: ServerProcess, folder: Path) -> None:
        self.stack = stack
        self.postgres = postgres
        self.proxies = proxies
        self.server = server
        self.log = folder / "server.log"
        #: Seconds to wait for what is there at once as a rule; whoever expects to wait in vain makes it short.
        self.patience = DEADLINE
        self._ledgers = {name: PostgresLedger(postgres, name) for name in _DATABASES}

    async def prepare(self) -> None:
        """Make the tables."""
        for ledger in self._ledgers.values():
            await ledger.execute(TABLES)
            await ledger.execute(f"INSERT INTO counter SELECT key, 0 FROM generate_series(0, {KEYS - 1}) AS key")

    async def close(self) -> None:
        """Close what looks at the database."""
        for ledger in self._ledgers.values():
            await ledger.close()

    async def round(self, plan: Plan, *, memory: bool = False) -> Round:
        """Run a round, look at what is left, and hold what the clients saw against the rows."""
        for ledger in self._ledgers.values():
            await ledger.execute("TRUNCATE wrote, child; UPDATE counter SET value = 0")
        if not plan.ends_the_process:
            return await self._round(plan, self.server, memory=memory)
        async with new_server(self.stack, self.postgres, self.proxies, self.log) as server:
            done = await self._round(plan, server)
            await self._end(server, done.violations)
        return done

    async def _round(self, plan: Plan, server: ServerProcess, *, memory: bool = False) -> Round:
        clients = Clients(lambda: server.address, self.patience)
        injector = Injector(self.postgres, self._ledgers["first"], self.proxies, server)
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(clients.run(plan, over))
            await injector.run(plan)
            over.set()
        violations = [Violation("leak", "", problem) for problem in injector.problems]
        if not await clients.settle(plan.number, self.patience):
            violations.append(Violation("down", "", "the server does not answer normally again"))
        violations += [Violation("leak", "", problem) for problem in await server.ask("rest", deadline=self.patience)]
        violations += [Violation("leak", "", problem) for problem in await self._rest(finish=injector.killed)]
        traces = await server.ask("traces")
        for request in injector.cancelled.union(traces["cancelled"]):
            clients.outcomes[request].cancelled = True
        violations += [
            Violation("leak", "", f"{times} times: {line}") for line, times in traces["errors"].items() if _DROPPED in line
        ]
        verdict = check(await self._evidence(clients.outcomes, frozenset(traces["called"]), whole=not plan.ends_the_process))
        return Round(
            plan.number,
            plan.seconds,
            verdict.counts,
            injector.done,
            violations + verdict.violations,
            clients.outcomes,
            traces["errors"],
            await server.ask("memory") if memory else None,
        )

    async def _end(self, server: ServerProcess, violations: list[Violation]) -> None:
        status = await server.terminate()
        words = server.last_words or {"left": [f"the server ended with status {status}"]}
        violations += [Violation("leak", "", f"at the end: {problem}") for problem in words["left"]]
        if left := await self._none(lambda ledger: ledger.backends(server.name)):
            violations.append(Violation("leak", "", f"connections of a process that has ended: {left}"))

    async def _rest(self, *, finish: bool) -> list[str]:
        """Wait for the database to come to rest.

        Args:
            finish: a process was killed, perhaps between the two phases of a transaction: finish those, as the docs say.
        """
        problems = []
        if left := await self._none(PostgresLedger.idle_in_transaction):
            problems.append(f"idle in transaction: {left}")
            for backend in left:  # or the next round would wait for its locks
                await self._ledgers["first"].execute("SELECT pg_terminate_backend($1)", backend.pid)
        if finish:
            await self._finish_prepared()
        if left := await self._none(PostgresLedger.prepared):
            problems.append(f"prepared transactions: {left}")
            await self._finish_prepared()
        return problems

    async def _none(self, look: Any) -> list[Any]:
        """Wait until neither database has any, and return what is there all the same."""
        seen: list[Any] = []

        async def none() -> bool:
            seen[:] = dict.fromkeys([one for ledger in self._ledgers.values() for one in await look(ledger)])
            return not seen

        with contextlib.suppress(TimeoutError):
            await until(none, deadline=self.patience)
        return seen

    async def _finish_prepared(self) -> None:
        """Decide about what is prepared: committed where the other database has committed its part, otherwise rolled back."""
        first, second = self._ledgers.values()
        for ledger, other, mine, others in ((first, second, "t", "u"), (second, first, "u", "t")):
            for gid in await ledger.prepared():
                await ledger.execute(f"COMMIT PREPARED '{gid}'")
                written = await ledger.rows("SELECT DISTINCT request FROM wrote WHERE name = $1", mine)
                there = {row[0] for row in await other.rows("SELECT DISTINCT request FROM wrote WHERE name = $1", others)}
                for (request,) in written:
                    if request not in there:
                        await ledger.execute("DELETE FROM wrote WHERE request = $1 AND name = $2", request, mine)

    async def _evidence(self, outcomes: dict[str, Outcome], called: frozenset[str], *, whole: bool) -> Evidence:
        rows = [
            Row(name, *row)
            for name, ledger in self._ledgers.items()
            for row in await ledger.rows("SELECT request, name, part, xid FROM wrote")
        ]
        first = self._ledgers["first"]
        counters = dict(await first.rows("SELECT key, value FROM counter"))
        bumps = dict(await first.rows("SELECT key, count(*) FROM wrote WHERE key IS NOT NULL GROUP BY key"))
        return Evidence(outcomes, rows, called, whole and self.stack.framework != NAIVE, counters, bumps)


def new_server(stack: Stack, postgres: Postgres, proxies: list[Proxy], log: Path) -> ServerProcess:
    """Return a process of the application, not yet started."""
    settings = {
        "framework": stack.framework,
        "server": stack.server,
        "driver": stack.driver,
        "hosts": [one.host for one in proxies],
        "user": postgres.user,
        "password": postgres.password,
    }
    return ServerProcess(settings, log)


@contextlib.asynccontextmanager
async def ground(stack: Stack) -> AsyncIterator[Ground]:
    """Make a place to run in, and remove it."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    with contextlib.ExitStack() as first:
        first.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = first.enter_context(Postgres())
        async with AsyncExitStack() as stay:
            target = Address(postgres.host, postgres.port)
            proxies = [await stay.enter_async_context(proxy(target)) for _ in range(2)]
            server = await stay.enter_async_context(new_server(stack, postgres, proxies, folder / "server.log"))
            place = Ground(stack, postgres, proxies, server, folder)
            stay.push_async_callback(place.close)
            await place.prepare()
            yield place
