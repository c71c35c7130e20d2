"""The application under test, written once for all frameworks: a handler for every shape of ``shapes``."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from context_sqla import ContextSqlaError, DBConnect, committed_connects, is_in_doubt
from sqlalchemy import FetchedValue, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from support.scenario import Answer, Application, Exchange, Fail, Redirect, Result, Route, Socket, SocketGone, SocketRoute

from .kits import Kit
from .shapes import SHAPES, keys_of

#: Made in both databases; the transaction of a row is written by the database itself.
TABLES = """
CREATE TABLE wrote (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, request text NOT NULL, name text NOT NULL, part int NOT NULL, key int,
    xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint
);
CREATE TABLE counter (key int PRIMARY KEY, value int NOT NULL);
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (parent int NOT NULL REFERENCES parent DEFERRABLE INITIALLY DEFERRED)
"""

_WRITE = text("INSERT INTO wrote (request, name, part, key) VALUES (:request, :name, :part, :key)")
_READ = text("SELECT value FROM counter WHERE key = :key")
_SET = text("UPDATE counter SET value = :value + 1 WHERE key = :key AND value = :value")
_BUMP = text("UPDATE counter SET value = value + 1 WHERE key = :key")
_ORPHAN = text("INSERT INTO child (parent) VALUES (4711)")
_ROWS = text("SELECT request FROM wrote ORDER BY id DESC LIMIT 20")


class _Base(DeclarativeBase):
    pass


class Wrote(_Base):
    """A row of a group, for writes that wait for a flush."""

    __tablename__ = "wrote"

    id: Mapped[int] = mapped_column(primary_key=True)
    request: Mapped[str]
    name: Mapped[str]
    part: Mapped[int]
    xid: Mapped[int] = mapped_column(server_default=FetchedValue())


class Boom(Exception):
    """An application's own error."""


@dataclass(frozen=True)
class Connects:
    """What the application is connected to; ``third`` and ``fourth`` are the same databases in two phases."""

    first: DBConnect[AsyncSession]
    second: DBConnect[AsyncSession]
    third: DBConnect[AsyncSession]
    fourth: DBConnect[AsyncSession]

    @property
    def every(self) -> tuple[DBConnect[AsyncSession], ...]:
        """All of them."""
        return (self.first, self.second, self.third, self.fourth)


@dataclass
class Traces:
    """What the server's process knows of its requests; the injector cancels by it, the checker reads it."""

    tasks: dict["asyncio.Task[Any]", str] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)


Work = Callable[["Request"], Awaitable[Result]]


@dataclass
class Request:
    """One request: its number, its dice, and its writes."""

    id: str
    connects: Connects
    kit: Kit
    traces: Traces
    exchange: Exchange
    dice: random.Random

    async def write(
        self, group: str, *parts: int, key: int | None = None, connect: DBConnect[AsyncSession] | None = None
    ) -> None:
        """Write rows of a group in the unit's session."""
        for part in parts:
            session = await self.kit.session(connect or self.connects.first)
            await session.execute(_WRITE, {"request": self.id, "name": group, "part": part, "key": key})

    async def nap(self) -> None:
        """Give others a chance, as an application does that waits for something else."""
        if self.dice.random() < 0.6:
            await asyncio.sleep(self.dice.random() * 0.02)

    def expect(self, group: str) -> None:
        """Note when the unit says that it has committed."""
        self.kit.on_commit(lambda: self.traces.called.add(f"{self.id}/{group}"))

    async def unit(self, group: str, parts: int) -> None:
        """Write a group, slowly."""
        self.expect(group)
        for part in range(parts):
            await self.write(group, part)
            await self.nap()

    async def statement(self, sql: str) -> None:
        """Run a statement on the first database."""
        await (await self.kit.session(self.connects.first)).execute(text(sql))


async def small(request: Request) -> Result:
    request.expect("h")
    await request.write("h", 0)
    await request.nap()
    await request.write("h", 1)
    (await request.kit.session(request.connects.first)).add(Wrote(request=request.id, name="h", part=2))
    return Answer(201, request.id)


async def read(request: Request) -> Result:
    session = await request.kit.session(request.connects.first)
    rows = await session.execute(_ROWS)
    return Answer(200, "\n".join(rows.scalars()))


async def redirect(request: Request) -> Result:
    await request.write("h", 0)
    if request.dice.random() < 0.5:
        raise Redirect("/elsewhere")
    return Redirect("/elsewhere")


async def bump(request: Request) -> Result:
    """Read, wait, modify, write: and refuse if somebody else was faster."""
    session = await request.kit.session(request.connects.first)
    key = keys_of(request.id)[0]
    value = (await session.execute(_READ, {"key": key})).scalar_one()
    await request.write("h", 0, key=key)
    await request.nap()
    changed: Any = await session.execute(_SET, {"key": key, "value": value})
    if changed.rowcount != 1:
        raise Fail(409)
    await request.write("h", 1)
    return Answer(200, request.id)


async def lock(request: Request) -> Result:
    """Lock two rows, in an order of its own: some requests lock each other out."""
    session = await request.kit.session(request.connects.first)
    for part, key in enumerate(keys_of(request.id)):
        await session.execute(_BUMP, {"key": key})
        await request.write("h", part, key=key)
        await request.nap()
    return Answer(200, request.id)


async def serial(request: Request) -> Result:
    async def transfer() -> None:
        session = await request.kit.session(request.connects.first)
        key = keys_of(request.id)[0]
        value = (await session.execute(_READ, {"key": key})).scalar_one()
        await request.nap()
        await session.execute(_SET, {"key": key, "value": value})
        await request.write("n", 0, key=key)

    await request.kit.serializable(transfer)
    await request.write("h", 0)
    return Answer(200, request.id)


async def two(request: Request) -> Result:
    request.expect("h")
    second = request.connects.second
    await request.write("h", 0)
    await request.write("x", 0, connect=second)
    await request.nap()
    await request.write("x", 1, connect=second)
    await request.write("h", 1)
    return Answer(200, request.id)


async def twophase(request: Request) -> Result:
    request.expect("t")
    await request.write("t", 0, 1, connect=request.connects.third)
    await request.nap()
    await request.write("u", 0, 1, connect=request.connects.fourth)
    return Answer(200, request.id)


async def gather(request: Request) -> Result:
    await request.write("h", 0)
    await asyncio.gather(*(request.kit.in_new_ctx(request.unit, name, 2) for name in ("n0", "n1")))
    return Answer(200, request.id)


async def early(request: Request) -> Result:
    await request.write("e", 0, 1)
    await request.kit.commit(request.connects.first)
    request.traces.called.add(f"{request.id}/e")
    if request.dice.random() < 0.5:
        await request.kit.close(request.connects.first)
    await request.nap()
    await request.write("h", 0, 1)
    return Answer(200, request.id)


async def stream(request: Request) -> Result:
    await request.write("h", 0, 1)

    async def body() -> AsyncIterator[bytes]:
        for part in range(4):
            await request.write("b", part)
            yield b"x" * 100
            await request.nap()
        request.expect("b")

    return Answer(200, stream=body())


async def read_stream(request: Request) -> Result:
    await request.write("h", 0)

    async def body() -> AsyncIterator[bytes]:
        session = await request.kit.session(request.connects.first)
        for name in (await session.execute(_ROWS)).scalars():
            yield name.encode() + b"\n"
            await request.nap()

    return Answer(200, stream=body())


async def background(request: Request) -> Result:
    await request.write("h", 0, 1)

    async def work() -> None:
        await request.unit("g", 2)

    return Answer(200, request.id, background=[work])


async def events(request: Request) -> Result:
    """Server-sent events, held open; each is sent when what it tells of is committed."""
    await request.write("h", 0)

    async def body() -> AsyncIterator[bytes]:
        for number in range(4):
            async with request.kit.block():
                await request.write(f"m{number}", 0, 1)
            yield f"data: {number}\n\n".encode()
            await asyncio.sleep(request.dice.random() * 0.1)

    return Answer(200, headers={"content-type": "text/event-stream"}, stream=body())


async def boom(request: Request) -> Result:
    await request.write("v", 0)
    await request.nap()
    await request.write("v", 1)
    raise Boom(request.id)


async def refused(request: Request) -> Result:
    await request.write("v", 0, 1)
    await request.nap()
    return Answer(404, "no")


async def invalid(request: Request) -> Result:
    """Raise as validation does, when something was written already."""
    await request.write("v", 0, 1)
    await request.nap()
    raise Fail(422, "invalid")


async def refused_late(request: Request) -> Result:
    """Keep what a unit of its own has written, and nothing else."""
    await request.write("v", 0)
    await request.kit.in_new_ctx(request.unit, "n", 1)
    await request.write("v", 1)
    return Answer(409, "no")


async def swallowed(request: Request) -> Result:
    """Go on after a failed statement: PostgreSQL answers COMMIT by a silent rollback (P4a)."""
    await request.write("h", 0, 1)
    with contextlib.suppress(SQLAlchemyError):
        await request.statement("SELECT 1 / 0")
    return Answer(200, request.id)


async def savepoint(request: Request) -> Result:
    await request.write("h", 0)
    session = await request.kit.session(request.connects.first)
    try:
        async with session.begin_nested():
            await request.write("v", 0)
            raise Boom
    except Boom:
        await request.write("h", 1)
    return Answer(200, request.id)


async def timeout(request: Request) -> Result:
    """Give up on a statement, and go on."""
    await request.write("h", 0)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(request.dice.random() * 0.02):
            await request.statement("SELECT pg_sleep(0.01)")
    await request.write("h", 1)
    return Answer(200, request.id)


async def statement_timeout(request: Request) -> Result:
    await request.statement("SET LOCAL statement_timeout = 20")
    await request.write("h", 0)
    await request.statement(f"SELECT pg_sleep({request.dice.choice([0.001, 0.04])})")
    await request.write("h", 1)
    return Answer(200, request.id)


async def orphan(request: Request) -> Result:
    """Write what only COMMIT refuses."""
    await request.write("h", 0, 1)
    session = await request.kit.session(request.connects.first)
    await session.execute(_ORPHAN)
    return Answer(201, request.id)


async def left_behind(request: Request) -> Result:
    """Start a task that is still at work when the request ends (P10)."""
    await request.write("h", 0, 1)

    async def child() -> None:
        for part in range(3):
            await request.nap()
            await request.write("c", part)

    task = asyncio.create_task(child())
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await request.nap()
    return Answer(200, request.id)


async def gather_fails(request: Request) -> Result:
    """Fail while a statement of the same session is under way (P7a)."""
    await request.write("v", 0, 1)

    async def fail() -> None:
        await asyncio.sleep(0.003)
        raise Boom

    await asyncio.gather(request.statement("SELECT pg_sleep(0.02)"), fail())
    return Answer(200, request.id)


HANDLERS: dict[str, Work] = {
    "small": small,
    "read": read,
    "redirect": redirect,
    "bump": bump,
    "lock": lock,
    "serial": serial,
    "two": two,
    "twophase": twophase,
    "gather": gather,
    "early": early,
    "stream": stream,
    "read-stream": read_stream,
    "background": background,
    "events": events,
    "boom": boom,
    "refused": refused,
    "invalid": invalid,
    "refused-late": refused_late,
    "swallowed": swallowed,
    "savepoint": savepoint,
    "timeout": timeout,
    "statement-timeout": statement_timeout,
    "orphan": orphan,
    "left-behind": left_behind,
    "gather-fails": gather_fails,
}
assert {*HANDLERS, "socket"} == set(SHAPES)


def application(connects: Connects, kit: Kit, traces: Traces) -> Application:
    """Describe the application."""

    def route(shape: str, work: Work) -> Route:
        async def handle(exchange: Exchange) -> Result:
            request_id = exchange.query["id"]
            request = Request(request_id, connects, kit, traces, exchange, random.Random(request_id))
            task = asyncio.current_task()
            assert task is not None
            traces.tasks[task] = request_id
            try:
                if exchange.headers.get("content-length", "0") != "0":
                    await exchange.body()
                return await work(request)
            finally:
                # A task may serve request after request, and it goes on with the commit when the handler has returned.
                asyncio.get_running_loop().call_later(0.05, _forget, traces, task, request_id)

        return Route(f"/{shape}", handle)

    async def socket(native: Socket) -> None:
        await native.accept()
        with contextlib.suppress(SocketGone):
            while True:
                await native.send(await _message(await native.receive(), connects, kit, traces))

    return Application(
        routes=[*(route(shape, work) for shape, work in HANDLERS.items()), SocketRoute("/socket", socket)],
        connects=connects.every,
        error_handlers=dict.fromkeys((SQLAlchemyError, ContextSqlaError, OSError, Boom, ExceptionGroup), answer_error),
    )


async def answer_error(exc: Exception) -> Answer:
    """Answer an error, and say what is known of the transaction: the client must not guess."""
    fields = {"x-in-doubt": "yes"} if is_in_doubt(exc) else {}
    if committed := committed_connects(exc):
        fields["x-committed"] = " ".join(committed)
    return Answer(500, type(exc).__name__, fields)


async def _message(message: str, connects: Connects, kit: Kit, traces: Traces) -> str:
    """Do what a message asks for in a unit of its own; the answer is "+", "-" (refused) or "?" (in doubt), and its number."""
    request_id, _, number = message.rpartition(":")
    try:
        async with kit.block():
            kit.on_commit(lambda: traces.called.add(f"{request_id}/m{number}"))
            for part in range(2):
                session = await kit.session(connects.first)
                await session.execute(_WRITE, {"request": request_id, "name": f"m{number}", "part": part, "key": None})
    except Exception as exc:
        return ("?" if is_in_doubt(exc) else "-") + number
    return "+" + number


def _forget(traces: Traces, task: "asyncio.Task[Any]", request_id: str) -> None:
    if traces.tasks.get(task) == request_id:
        del traces.tasks[task]
