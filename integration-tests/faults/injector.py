"""The faults: between application and database, in the database, and in the application's process."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import asyncpg  # type: ignore[import-untyped]
from support.ledger import PostgresLedger
from support.postgres import Postgres, StopMode
from support.proxy import Proxy, Trap

from .plan import Fault, Plan
from .process import ServerError, ServerProcess

_PICK = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'app-%' ORDER BY pid"
#: How many of those that are doing something at this moment.
_PICK_BUSY = f"SELECT pid FROM ({_PICK}) AS every JOIN pg_stat_activity USING (pid) WHERE state <> 'idle'"


class Injector:
    """Carries out the faults of a round, and mends everything at its end."""

    def __init__(self, postgres: Postgres, ledger: PostgresLedger, proxies: Sequence[Proxy], server: ServerProcess) -> None:
        self._postgres = postgres
        self._ledger = ledger
        self._proxies = proxies
        self._server = server
        self._traps: list[Trap] = []
        #: What was done, by kind; a fault that found nothing to do is not counted.
        self.done: Counter[str] = Counter()
        self.killed = False
        self.cancelled: set[str] = set()
        self.problems: list[str] = []
        # A process that is killed takes with it what it knows: no cancellation is under way then.
        self._knowing = asyncio.Lock()
        self._restarting = asyncio.Lock()
        self._ending = asyncio.Lock()

    async def run(self, plan: Plan) -> None:
        """Do what the plan says, when it says it; what takes time does not hold up the next."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        async with asyncio.TaskGroup() as group:
            for fault in plan.faults:
                await asyncio.sleep(max(0.0, begin + fault.at - loop.time()))
                group.create_task(self._inject(fault))
        self.mend()
        await asyncio.sleep(max(0.0, begin + plan.seconds - loop.time()))

    def mend(self) -> None:
        """End everything that would go on."""
        for proxy in self._proxies:
            proxy.mode = "pass"
            proxy.delay = 0.0
            proxy.disarm()

    async def _inject(self, fault: Fault) -> None:
        # The database may be away, or the server's process: then there is nothing to break.
        with contextlib.suppress(
            asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, ServerError
        ):
            if await _FAULTS[fault.kind](self, fault):
                self.done[fault.kind] += 1

    def _proxy(self, fault: Fault) -> Proxy:
        return self._proxies[int(fault.dice * len(self._proxies))]

    async def _backend(self, fault: Fault, query: str) -> int | None:
        rows = await self._ledger.rows(query)
        return rows[int(fault.dice * len(rows))][0] if rows else None

    async def terminate(self, fault: Fault) -> bool:
        """End a backend, whatever it is doing."""
        if (pid := await self._backend(fault, _PICK)) is None:
            return False
        await self._ledger.execute("SELECT pg_terminate_backend($1)", pid)
        return True

    async def cancel_statement(self, fault: Fault) -> bool:
        """Cancel the statement of a backend that works."""
        if (pid := await self._backend(fault, _PICK_BUSY)) is None:
            return False
        await self._ledger.cancel(pid)
        return True

    async def cancel_task(self, fault: Fault) -> bool:
        """Cancel the task of a request, wherever it waits; one in three a second time soon after."""
        again = fault.more * 0.01 if fault.more < 0.33 else None
        async with self._knowing:
            request = await self._server.ask("cancel", pick=fault.dice, again=again)
        if request is None:
            return False
        self.cancelled.add(request)
        return True

    async def cut(self, fault: Fault) -> bool:
        """Reset all connections that go through a proxy."""
        self._proxy(fault).cut()
        return True

    async def cut_commit(self, fault: Fault) -> bool:
        """Reset the next connection that sends a COMMIT, before it reaches the database."""
        return self._trap(fault, b"COMMIT", forward=False)

    async def lose_commit(self, fault: Fault) -> bool:
        """Reset the next connection that sends a COMMIT, when the database has carried it out."""
        return self._trap(fault, b"COMMIT", forward=True)

    async def lose_prepare(self, fault: Fault) -> bool:
        """The same with the first of two phases."""
        return self._trap(fault, b"PREPARE TRANSACTION", forward=fault.more < 0.5)

    def _trap(self, fault: Fault, pattern: bytes, *, forward: bool) -> bool:
        self._proxy(fault).cut_at(pattern, forward=forward)
        return True

    async def delay(self, fault: Fault) -> bool:
        """Slow a proxy down for a while."""
        proxy = self._proxy(fault)
        proxy.delay = 0.002 + fault.more * 0.03
        await asyncio.sleep(0.4)
        proxy.delay = 0.0
        return True

    async def blackhole(self, fault: Fault) -> bool:
        """Let no byte through for a while, then go on as if nothing had been, or reset everything."""
        proxy = self._proxy(fault)
        proxy.mode = "hang"
        await asyncio.sleep(0.2 + fault.more)
        if fault.more < 0.5:
            proxy.cut()
        proxy.mode = "pass"
        return True

    async def refuse(self, fault: Fault) -> bool:
        """Refuse new connections for a while, and reset the open ones."""
        proxy = self._proxy(fault)
        proxy.mode = "refuse"
        proxy.cut()
        await asyncio.sleep(0.1 + fault.more * 0.3)
        proxy.mode = "pass"
        return True

    async def exhaust(self, fault: Fault) -> bool:
        """Take all connections of a pool."""
        await self._server.ask("exhaust", seconds=0.2 + fault.more)
        return True

    async def switch(self, fault: Fault) -> bool:
        """Change the host ten times a second."""
        await self._server.ask("switch", seconds=1 + fault.more * 2)
        return True

    async def restart_fast(self, fault: Fault) -> bool:
        """Restart PostgreSQL, which ends its sessions first."""
        return await self._restart("fast")

    async def restart_immediate(self, fault: Fault) -> bool:
        """Restart PostgreSQL as after a crash."""
        return await self._restart("immediate")

    async def _restart(self, mode: StopMode) -> bool:
        async with self._restarting:
            await asyncio.to_thread(self._postgres.restart, mode)
        return True

    async def sigterm(self, fault: Fault) -> bool:
        """Shut the server down under load, and start another."""
        async with self._ending:
            status = await self._server.terminate()
            words = self._server.last_words
            if status != 0 or words is None:
                self.problems.append(f"after SIGTERM the server ended with status {status}")
            else:
                self.problems += [f"after SIGTERM: {problem}" for problem in words["left"]]
            await self._server.start()
        return True

    async def sigkill(self, fault: Fault) -> bool:
        """Kill the server under load, and start another."""
        async with self._ending:
            async with self._knowing:
                self.killed = True
                await self._server.kill()
            await self._server.start()
        return True


_FAULTS: dict[str, Callable[[Injector, Fault], Awaitable[bool]]] = {
    "terminate": Injector.terminate,
    "cancel-statement": Injector.cancel_statement,
    "cancel-task": Injector.cancel_task,
    "cut": Injector.cut,
    "cut-commit": Injector.cut_commit,
    "lose-commit": Injector.lose_commit,
    "lose-prepare": Injector.lose_prepare,
    "delay": Injector.delay,
    "blackhole": Injector.blackhole,
    "refuse": Injector.refuse,
    "exhaust": Injector.exhaust,
    "switch": Injector.switch,
    "restart-fast": Injector.restart_fast,
    "restart-immediate": Injector.restart_immediate,
    "sigterm": Injector.sigterm,
    "sigkill": Injector.sigkill,
}
