"""The application under test in a process of its own, and its half of the control channel.

``python -m faults.server`` reads its settings as the first line of standard input and says on standard output where it listens.
Every further line is a command, ``{"do": name, ...}``, answered by one line. SIGTERM shuts it down as a server does; the last
line then says what was left.
"""

import asyncio
import gc
import heapq
import json
import logging
import os
import signal
import sys
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from context_sqla import DBConnect, committed_connects, is_context_initiated, is_in_doubt
from context_sqla.adapters import Unit
from contract.drivers import FRAMEWORKS
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from support.deadline import until
from support.scenario import Application
from support.servers import Running, ServerOptions

from . import application, naive
from .application import Connects, Traces
from .kits import Kit, context_sqla_kit

#: What belongs to a request.
_SHORT_LIVED = (Unit, AsyncSession, Session, AsyncConnection)
#: What servers leave behind by themselves, without a request. hypercorn 0.18 keeps a connection when its client has vanished behind
#: a pipelined request; Sanic 25 waits for a websocket's handler to fetch the next message, also when the handler has ended.
_SERVERS_OWN = {
    *("EventWrapper.wait", "TCPServer._idle_timeout", "worker_serve.<locals>._server_callback"),
    "WebsocketImplProtocol.async_data_received",
}
_POOL = {"pool_size": 5, "max_overflow": 2, "pool_timeout": 2}


class Server:
    """The process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.traces = Traces()
        self.engines: weakref.WeakSet[AsyncEngine] = weakref.WeakSet()
        self.errors: Counter[str] = Counter()
        self.tasks_at_rest: set[asyncio.Task[Any]] = set()
        self.helpers: set[asyncio.Task[Any]] = set()
        self.running: Running

    async def start(self) -> str:
        """Serve, and return the address."""
        hosts = self.settings["hosts"]
        self.connects = Connects(
            self._connect("first", hosts[0]),
            self._connect("second", hosts[0]),
            self._connect("first", hosts[0], name="third", session_options={"twophase": True}),
            self._connect("second", hosts[0], name="fourth", session_options={"twophase": True}),
        )
        app, start = self._build()
        self.running = await start(app, self.settings["server"], ServerOptions())
        return "{}:{}".format(*self.running.address)

    def _connect(self, database: str, host: str, *, name: str | None = None, **options: Any) -> DBConnect[AsyncSession]:
        driver = self.settings["driver"]
        label = self.settings["name"]
        arguments = {"asyncpg": {"server_settings": {"application_name": label}}, "psycopg": {"application_name": label}}
        connect = DBConnect.from_url(
            f"postgresql+{driver}://{self.settings['user']}:{self.settings['password']}@{host}/{database}",
            engine_options={"connect_args": arguments[driver], **_POOL},
            name=name or database,
            cleanup_timeout=2,
            commit_timeout=5,
            drain_timeout=5,
            **options,
        )
        connect.engine_created.append(lambda engine, _: self.engines.add(engine))
        return connect

    def _build(self) -> tuple[Any, Callable[..., Any]]:
        described: Callable[[Kit], Application] = lambda kit: application.application(self.connects, kit, self.traces)  # noqa: E731
        if self.settings["framework"] == "naive":
            return naive.build(described(naive.kit())), FRAMEWORKS["starlette"].driver().start
        driver = FRAMEWORKS[self.settings["framework"]].driver()
        app = driver.build(described(context_sqla_kit()))
        return (_answering(app) if self.settings["framework"] == "asgi" else app), driver.start

    async def command(self, do: str, **arguments: Any) -> Any:
        """Carry out a command."""
        return await getattr(self, f"do_{do}")(**arguments)

    async def do_cancel(self, pick: float, again: float | None = None) -> str | None:
        """Cancel the task of a request, once or twice."""
        running = [(task, request) for task, request in self.traces.tasks.items() if not task.done()]
        if not running:
            return None
        task, request = running[int(pick * len(running))]
        self.traces.cancelled.add(request)
        task.cancel()
        if again is not None:
            which = weakref.ref(task)
            del task, running  # when the server is stopped meanwhile, the error keeps this frame, and would keep their units
            await asyncio.sleep(again)
            if (left := which()) is not None and self.traces.tasks.get(left) == request:
                left.cancel()
        return request

    async def do_exhaust(self, seconds: float) -> None:
        """Take every connection of the first pool that is free, for a while."""
        self._help(self._hold_all(seconds))

    async def _hold_all(self, seconds: float) -> None:
        maker = await self.connects.first.session_maker()
        engine = maker.kw["bind"]

        async def hold() -> None:
            async with engine.connect():
                await asyncio.sleep(seconds)

        await asyncio.gather(*(hold() for _ in range(7)), return_exceptions=True)

    async def do_switch(self, seconds: float) -> None:
        """Change the host of every connect ten times a second."""
        self._help(self._switch(seconds))

    async def _switch(self, seconds: float) -> None:
        hosts = self.settings["hosts"]
        for turn in range(int(seconds * 10)):
            for connect in self.connects.every:
                await connect.change_host(hosts[(turn + 1) % len(hosts)])
            await asyncio.sleep(0.1)

    async def do_traces(self) -> dict[str, Any]:
        """Return what was cancelled and which callbacks have run, since the last time."""
        traces = {"cancelled": sorted(self.traces.cancelled), "called": sorted(self.traces.called), "errors": dict(self.errors)}
        self.traces.cancelled.clear()
        self.traces.called.clear()
        self.errors.clear()
        return traces

    async def do_rest(self, deadline: float) -> list[str]:
        """Wait until nothing is under way, and return what still is."""
        if self.helpers:
            await asyncio.wait(self.helpers)
        problems: list[str] = []

        def at_rest() -> bool:
            problems[:] = self._unrest()
            return not problems

        try:
            await until(at_rest, deadline=deadline)
        except TimeoutError:
            pass
        return problems

    def _unrest(self) -> list[str]:
        _forget_cancelled_timers()
        gc.collect()
        problems = []
        if out := sum(engine.sync_engine.pool.checkedout() for engine in self.engines):  # type: ignore[attr-defined]
            problems.append(f"{out} connections are checked out")
        here = asyncio.current_task()
        others = asyncio.all_tasks() - self.tasks_at_rest - self.helpers
        if tasks := [task for task in others if task is not here and _name(task) not in _SERVERS_OWN]:
            problems.append(f"tasks are left: {', '.join(sorted(map(_name, tasks)))}")
        if is_context_initiated():
            problems.append("the context variable is set")
        if left := self._left():
            problems.append(f"objects are left: {left}")
        return problems

    def _left(self) -> dict[str, int]:
        """Return the short-lived objects that are too many.

        A transport keeps the context in which it was opened, and there some frameworks keep their request, with its error and
        the sessions in the error's traceback: that is as much as there are connections in the pools, and does not grow.
        When the server has stopped the pools are closed, and there is nothing left that could keep any.
        """
        pooled = sum(engine.sync_engine.pool.checkedin() for engine in self.engines)  # type: ignore[attr-defined]
        counts = Counter(type(one).__name__ for one in gc.get_objects() if isinstance(one, _SHORT_LIVED))
        return {name: count for name, count in sorted(counts.items()) if count > 2 * pooled}

    async def do_memory(self) -> dict[str, int]:
        """Return the bytes that Python has allocated; the first call begins to count."""
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        gc.collect()
        return {"traced": tracemalloc.get_traced_memory()[0], "objects": len(gc.get_objects())}

    def _help(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.helpers.add(task)
        task.add_done_callback(self.helpers.discard)


def _forget_cancelled_timers() -> None:
    """Do now what the loop does when many timers were cancelled, or when their time comes: each keeps its context alive."""
    loop: Any = asyncio.get_running_loop()
    loop._scheduled[:] = [timer for timer in loop._scheduled if not timer.cancelled()]
    heapq.heapify(loop._scheduled)
    loop._timer_cancelled_count = 0


def _name(task: "asyncio.Task[Any]") -> str:
    return getattr(task.get_coro(), "__qualname__", task.get_name())


def _answering(app: Any) -> Any:
    """Do for bare ASGI what other frameworks' error handlers do: answer what was raised before the head was out (P4b)."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        begun = False

        async def noting(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await app(scope, receive, noting)
        except Exception as exc:
            if scope["type"] != "http" or begun:
                raise
            said = await application.answer_error(exc)
            headers = [(b"content-length", b"%d" % len(said.payload))]
            headers += [(name.encode(), value.encode()) for name, value in said.fields.items()]
            await send({"type": "http.response.start", "status": said.status, "headers": headers})
            await send({"type": "http.response.body", "body": said.payload})

    return answer


class _Errors(logging.Handler):
    """Counts what is logged as an error, by kind, for the report."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__(logging.WARNING)
        self._counts = counts

    def emit(self, record: logging.LogRecord) -> None:
        exc = record.exc_info[1] if record.exc_info else None
        doubt = " in doubt" if exc is not None and is_in_doubt(exc) else ""
        done = f" committed {committed_connects(exc)}" if exc is not None and committed_connects(exc) else ""
        self._counts[
            f"{record.name}: {type(exc).__name__ if exc else record.getMessage().splitlines()[0][:160]}{doubt}{done}"
        ] += 1


async def main() -> None:
    """Serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=2**24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    server = Server(json.loads(await commands.readline()))
    logging.getLogger().addHandler(_Errors(server.errors))
    told_to_stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, told_to_stop.set)
    address = await server.start()
    stopping = asyncio.create_task(told_to_stop.wait())
    controlling = asyncio.create_task(_control(server, commands))
    server.tasks_at_rest = asyncio.all_tasks()
    _say({"address": address, "pid": os.getpid()})
    await asyncio.wait({stopping, controlling}, return_when=asyncio.FIRST_COMPLETED)
    controlling.cancel()
    stopping.cancel()
    await asyncio.gather(controlling, stopping, return_exceptions=True)
    await server.running.stop(grace=5)
    server.tasks_at_rest = {asyncio.current_task()}  # type: ignore[arg-type]
    _say({"left": await server.do_rest(10), "traces": await server.do_traces()})


async def _control(server: Server, commands: asyncio.StreamReader) -> None:
    while line := await commands.readline():
        asked = json.loads(line)
        number = asked.pop("number")
        try:
            _say({"number": number, "answer": await server.command(**asked)})
        except Exception as exc:
            _say({"number": number, "error": repr(exc)})


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
