"""A test and the worker processes of its server: what the one changes, the others see.

The workers are forked when the server is started, so that the handlers, which are closures of the test, travel with them. From
then on each is a process of its own, with a connection to the test. ``settle`` makes all of them agree about the objects that
they share; it is called wherever a test looks (a byte that came, a row, a condition) and before it sends, so that what a handler
did before it answered is there when its answer is. An event that is set anywhere is set everywhere at once.
"""

import asyncio
import contextlib
import contextvars
import inspect
import itertools
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from context_sqla import DBConnect
from sqlalchemy.ext.asyncio import AsyncEngine

from .mirror import Change, Mirror, TaskThere, cannot_ask

_LIMIT = 20.0
_groups: list["Group"] = []


def settle() -> None:
    """Make the test and its workers agree; without workers it does nothing."""
    for group in _groups:
        group.settle()


class Channel:
    """One end of a connection that carries whole messages."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._buffer = b""

    def send(self, data: bytes) -> None:
        """Send a message; the other end always reads."""
        data = struct.pack("!I", len(data)) + data
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while data:
                select.select([], [self.sock], [])
                data = data[self.sock.send(data) :]

    def receive(self, timeout: float) -> list[bytes] | None:
        """Return the messages that have come, after a wait for the first bytes; None at the end of the connection."""
        if not select.select([self.sock], [], [], timeout)[0]:
            return []
        try:
            came = self.sock.recv(1 << 20)
        except ConnectionResetError:
            came = b""
        if not came:
            return None
        self._buffer += came
        messages = []
        while len(self._buffer) >= 4:
            end = 4 + struct.unpack("!I", self._buffer[:4])[0]
            if len(self._buffer) < end:
                break
            messages.append(self._buffer[4:end])
            self._buffer = self._buffer[end:]
        return messages


class Member:
    """A worker, as the test sees it."""

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.channel = Channel(sock)
        self.pid = 0
        self.is_serving = False
        self.is_over = False
        self.behind: list[Change] = []  # what the others have changed


class Group:
    """The workers of one server, as the test sees them.

    Args:
        roots: what leads to the objects that are shared: handlers, connects.
        number: of workers.
    """

    def __init__(self, roots: Iterable[object], number: int) -> None:
        self.mirror = Mirror(roots)
        self.mirror.ask = lambda where: partial(self._ask_about, where)
        self.mirror.follow = self._follow
        self.mirror.over = lambda where: self.members[where].is_over
        pairs = [socket.socketpair() for _ in range(number)]
        self.members = [Member(index, ours) for index, (ours, _) in enumerate(pairs)]
        self.ends = [theirs for _, theirs in pairs]
        self.problems: list[str] = []
        self.changed = asyncio.Event()  # a worker serves, or is over
        self._numbers = itertools.count(1)
        self._answers: dict[int, tuple[bool, Any]] = {}
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._turn = 0
        self._admission = asyncio.Lock()

    def forked(self) -> None:
        """Begin to talk with the workers; the processes that own the other ends have been started."""
        for end in self.ends:
            end.close()
        loop = asyncio.get_running_loop()
        for member in self.members:
            loop.add_reader(member.channel.sock, self._read, member)
        for event in self.mirror.of(asyncio.Event):
            event.set = partial(self._set, event)
        for queue in self.mirror.of(asyncio.Queue):
            queue.put_nowait = partial(self._put, queue)
        for connect in self.mirror.of(DBConnect):
            for name in ("change_host", "connect", "close"):
                setattr(connect, name, partial(self._everywhere, connect, name))
            connect.pool_status = partial(self._pool_status, connect)
            connect.abort_host = partial(self._abort_host, connect)
        _groups.append(self)

    def close(self) -> None:
        """End the talk."""
        loop = asyncio.get_running_loop()
        for member in self.members:
            self._end(member)
            loop.remove_reader(member.channel.sock)
            member.channel.sock.close()
        if self in _groups:
            _groups.remove(self)

    def settle(self) -> None:
        """Agree with each worker about what is shared."""
        self._note_own()
        for wait in [self._asked(member, "nothing") for member in self._living()]:
            wait()
        for member in self._living():
            if member.behind:
                self._tell(member, None, "nothing")

    def ask(self, member: Member, what: str, *args: Any) -> Any:
        """Let a worker do something, and wait for it: the loop of the test stands still, the worker's does not."""
        return self._asked(member, what, *args)()

    def _asked(self, member: Member, what: str, *args: Any) -> Callable[[], Any]:
        """Ask, and return what waits for the answer."""
        number = next(self._numbers)
        self._tell(member, number, what, *args)
        return partial(self._answer, member, number, what)

    def _answer(self, member: Member, number: int, what: str) -> Any:
        end = time.monotonic() + _LIMIT
        while number not in self._answers:
            if member.is_over:
                return None
            if time.monotonic() > end:
                raise TimeoutError(f"worker {member.number} did not answer: {what}")
            self._read(member, timeout=1)
        fine, value = self._answers.pop(number)
        if not fine:
            raise value
        return value

    async def do(self, member: Member, what: str, *args: Any) -> Any:
        """Let a worker do what takes its time."""
        number = next(self._numbers)
        self._futures[number] = asyncio.get_running_loop().create_future()
        self._tell(member, number, what, *args)
        return await self._futures[number]

    @contextlib.asynccontextmanager
    async def admission(self, *, together: bool = False) -> Any:
        """Let the next worker in turn, or always the first, take the connection that the block opens."""
        async with self._admission:
            living = self._living()
            chosen = living[0 if together else self._turn % len(living)] if living else None
            self._turn += 1
            for wait in [self._asked(member, "hold") for member in living if member is not chosen]:
                wait()
            before = self.ask(chosen, "accepted") if chosen is not None else None
            try:
                yield
                end = time.monotonic() + _LIMIT
                while chosen is not None and before is not None and not chosen.is_over and self.ask(chosen, "accepted") == before:
                    if time.monotonic() > end:
                        raise TimeoutError(f"worker {chosen.number} does not accept the connection")
                    await asyncio.sleep(0)
            finally:
                for member in living:
                    if member is not chosen:
                        self._tell(member, None, "go_on")

    def _follow(self, task: TaskThere) -> None:
        number = next(self._numbers)
        self._futures[number] = task
        self._tell(self.members[task.there.where], number, "wait", task)

    def _living(self) -> list[Member]:
        return [member for member in self.members if member.is_serving and not member.is_over]

    def _note_own(self) -> None:
        changes = self.mirror.changes()
        for member in self.members:
            member.behind += changes

    def _tell(self, member: Member, number: int | None, what: str, *args: Any) -> None:
        changes, member.behind = member.behind, []
        member.channel.send(self.mirror.dumps((number, what, changes, args)))

    def _ask_about(self, where: int, what: str, *args: Any) -> Any:
        return (self.do if what == "wait" else self.ask)(self.members[where], what, *args)

    def _read(self, member: Member, timeout: float = 0) -> None:
        messages = member.channel.receive(timeout)
        if messages is None:
            asyncio.get_running_loop().remove_reader(member.channel.sock)
            self._end(member)
            return
        for data in messages:
            self._take(member, *self.mirror.loads(data))

    def _take(self, member: Member, number: int | None, said: str, changes: list[Change], logged: list[Any], value: Any) -> None:
        self._note_own()
        self.mirror.apply(changes)
        for other in self.members:
            if other is not member:
                other.behind += changes
        for attributes in logged:
            record = logging.makeLogRecord(attributes)
            if record.exc_info and record.exc_info[1] is not None:
                record.exc_info = _raised(record.exc_info[1])  # exc_text has the real traceback
            logging.getLogger(record.name).handle(record)
        if number is None:
            getattr(self, f"_on_{said}")(member, value)
        elif number in self._futures:
            future = self._futures.pop(number)
            if isinstance(future, TaskThere):
                future.ended(fine=said == "done", value=value)
            elif not future.done():
                (future.set_result if said == "done" else future.set_exception)(value)
        else:
            self._answers[number] = (said == "done", value)
        if number is None and changes:  # an event was set: the others wait for it
            for other in self._living():
                if other is not member:
                    self._tell(other, None, "nothing")

    def _on_changed(self, member: Member, value: Any) -> None:
        """Something is new that nobody has asked for."""

    def _on_put(self, member: Member, value: Any) -> None:
        queue, item = value
        type(queue).put_nowait(queue, item)
        for other in self._living():
            if other is not member:
                self._tell(other, None, "put", queue, item)

    def _on_serving(self, member: Member, pid: int) -> None:
        member.pid, member.is_serving, member.is_over = pid, True, False
        self.changed.set()

    def _on_over(self, member: Member, problems: list[str]) -> None:
        self.problems += [f"worker {member.number}: {problem}" for problem in problems]
        member.is_serving, member.is_over = False, True
        self.changed.set()

    def _end(self, member: Member) -> None:
        member.is_over = True
        self.changed.set()
        for number in tuple(self._futures):
            future = self._futures.pop(number)
            if not future.done():
                future.set_exception(ConnectionError("the worker has ended"))

    def _set(self, event: asyncio.Event) -> None:
        type(event).set(event)
        self._note_own()
        for member in self._living():
            self._tell(member, None, "nothing")

    def _put(self, queue: "asyncio.Queue[Any]", item: Any) -> None:
        """Everybody gets it: the test and its handlers do not take from the same queue."""
        type(queue).put_nowait(queue, item)
        self._note_own()
        for member in self._living():
            self._tell(member, None, "put", queue, item)

    async def _everywhere(self, connect: DBConnect[Any], name: str, *args: Any, **kwargs: Any) -> None:
        """Each process has its own engines."""
        await getattr(DBConnect, name)(connect, *args, **kwargs)
        await asyncio.gather(*(self.do(member, "call", connect, name, args, kwargs) for member in self._living()))
        self.settle()

    def _abort_host(self, connect: DBConnect[Any], host: str) -> int:
        there = sum(self.ask(member, "call", connect, "abort_host", (host,), {}) for member in self._living())
        return DBConnect.abort_host(connect, host) + int(there)

    def _pool_status(self, connect: DBConnect[Any]) -> Any:
        """The pools of all together: the size of one, what is out of all."""
        found = [self.ask(member, "call", connect, "pool_status", (), {}) for member in self._living()]
        found.append(DBConnect.pool_status(connect))
        first = max(found, key=lambda one: (one.size, one.checked_out))
        waiting = [one.waiting for one in found if one.waiting is not None]
        return type(first)(
            first.host,
            first.size,
            sum(one.checked_out for one in found),
            sum(one.overflow for one in found),
            sum(waiting) if waiting else None,
        )


class Worker:
    """The other side, in a worker's process.

    Args:
        group: the test's, as it was when this process was forked.
        number: which one this is.
        sock: the listening socket that all workers share.
    """

    def __init__(self, group: Group, number: int, sock: socket.socket) -> None:
        _groups.clear()
        self.number = number
        self._manager = os.getppid()
        self._mirror = group.mirror
        self._mirror.where = number
        self._mirror.ask = cannot_ask
        self._mirror.follow = None
        self._mirror.over = lambda where: True  # what another process has is none of ours: each counts its own engines
        self._channel = Channel(group.ends[number])
        self._listening = sock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepted: int | None = None
        self._records: list[dict[str, Any]] = []
        self.grace: Callable[[float], object] = float
        logging.getLogger().addHandler(_Keeper(self._records))
        self._before: set[int] = set()
        self._before.update(map(id, self._engines()))  # of the test, used before the server was started
        self._mirror.changes()  # what happened before it was forked is known
        for event in self._mirror.of(asyncio.Event):
            event._waiters.clear()  # of the test's loop
            event._loop = None
            event.set = partial(self._set, event)
        for queue in self._mirror.of(asyncio.Queue):
            queue._getters.clear()
            queue._loop = None
            queue.put_nowait = partial(self._put, queue)

    async def attach(self) -> None:
        """Listen to the test in the running loop."""
        self._loop = asyncio.get_running_loop()
        contextvars.Context().run(self._loop.add_reader, self._channel.sock, self._read)

    async def serving(self) -> None:
        """Tell the test that requests are answered."""
        self._watch()
        self._say(None, "serving", os.getpid())

    def over(self) -> None:
        """Tell the test, as the last thing, what this process leaves behind."""
        problems = [f"connections are still open: {engine!r}" for engine in self._engines() if _is_open(engine)]
        tasks = asyncio.all_tasks(self._loop) if self._loop is not None else set()
        problems += [f"a task was left: {task!r}" for task in tasks]
        self._say(None, "over", problems)

    def _engines(self) -> list[AsyncEngine]:
        found = {id(one): one for some in self._mirror.of(list) for one in some if isinstance(one, AsyncEngine)}
        return [one for number, one in found.items() if number not in self._before]

    def _set(self, event: asyncio.Event) -> None:
        type(event).set(event)
        self._say(None, "changed", None)

    def _put(self, queue: "asyncio.Queue[Any]", item: Any) -> None:
        type(queue).put_nowait(queue, item)
        self._say(None, "put", (queue, item))

    def _do_put(self, queue: "asyncio.Queue[Any]", item: Any) -> None:
        type(queue).put_nowait(queue, item)

    def _read(self) -> None:
        messages = self._channel.receive(0)
        if messages is None:  # the test is gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._manager, signal.SIGKILL)
            os._exit(1)
        for data in messages:
            number, what, changes, args = self._mirror.loads(data)
            self._mirror.apply(changes)
            self._do(number, getattr(self, f"_do_{what}"), args)

    def _do(self, number: int | None, what: Callable[..., Any], args: Any) -> None:
        try:
            result = what(*args)
        except Exception as exc:
            self._say(number, "failed", exc)
            return
        if inspect.isawaitable(result):
            assert self._loop is not None
            self._loop.create_task(self._later(number, result), context=contextvars.Context())
        elif number is not None:
            self._say(number, "done", result)

    async def _later(self, number: int | None, result: Awaitable[Any]) -> None:
        try:
            value = await result
        except BaseException as exc:  # of a task that was cancelled, too
            self._say(number, "failed", exc)
        else:
            self._say(number, "done", value)

    def _say(self, number: int | None, said: str, value: Any) -> None:
        records, self._records[:] = list(self._records), []
        self._channel.send(self._mirror.dumps((number, said, self._mirror.changes(), records, value)))

    def _do_nothing(self) -> None:
        """The changes that come and go with each message are all."""

    def _do_get(self, target: Any, name: str) -> Any:
        return getattr(target, name)

    def _do_call(self, target: Any, name: str, args: Any, kwargs: Any) -> Any:
        return getattr(target, name)(*args, **kwargs)

    def _do_wait(self, target: Any) -> Any:
        return target

    def _do_grace(self, seconds: float) -> None:
        self.grace(seconds)

    def _watch(self) -> None:
        """Count connections: what the loop calls for the listening socket is called by us."""
        selector = getattr(self._loop, "_selector", None)
        if selector is None:
            return  # uvloop: the kernel alone says who accepts
        assert self._loop is not None
        handle = selector.get_key(self._listening.fileno()).data[0]
        self._accepted = 0
        self._accept = partial(handle._callback, *handle._args)
        self._loop.add_reader(self._listening.fileno(), self._count)

    _accept: Callable[[], None]

    def _count(self) -> None:
        self._accept()
        assert self._accepted is not None
        self._accepted += 1

    def _do_accepted(self) -> int | None:
        return self._accepted

    def _do_hold(self) -> None:
        if self._accepted is not None and self._loop is not None and self._listening.fileno() >= 0:
            self._loop.remove_reader(self._listening.fileno())

    def _do_go_on(self) -> None:
        if self._accepted is not None and self._loop is not None and self._listening.fileno() >= 0:
            self._loop.add_reader(self._listening.fileno(), self._count)


def _raised(exc: BaseException) -> Any:
    """Give an exception a traceback."""
    try:
        raise exc
    except BaseException:
        return sys.exc_info()


def _is_open(engine: AsyncEngine) -> bool:
    pool: Any = engine.sync_engine.pool
    return (
        bool(pool.checkedout() + (pool.checkedin() if hasattr(pool, "checkedin") else 0))
        if hasattr(pool, "checkedout")
        else False
    )


class _Keeper(logging.Handler):
    """Keeps records for the test's log."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        super().__init__()
        self._records_kept = records

    def emit(self, record: logging.LogRecord) -> None:
        attributes = dict(vars(record))
        attributes["msg"], attributes["args"] = record.getMessage(), None
        if record.exc_info and record.exc_info[1] is not None:
            kind, exc, trace = record.exc_info
            attributes["exc_text"] = "".join(traceback.format_exception(kind, exc, trace)).rstrip()
            attributes["exc_info"] = (kind, exc, None)
        self._records_kept.append(attributes)
