"""The clients: what they send, how they behave, and what they saw."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from support import wire
from support.wire import Address, BrokenOff, Head
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import WebSocketException

from .history import Outcome
from .plan import LANES, Asked, Plan, Visit
from .shapes import SHAPES


class Clients:
    """The clients of one round; ``outcomes`` grows while they run. What takes longer than ``patience`` has no answer."""

    def __init__(self, address: Callable[[], Address | None], patience: float) -> None:
        self._address = address
        self._patience = patience
        self.outcomes: dict[str, Outcome] = {}

    async def run(self, plan: Plan, over: asyncio.Event) -> None:
        """Let every lane work through its visits until the round is over, and finish the last."""
        async with asyncio.TaskGroup() as group:
            for lane in range(LANES):
                group.create_task(self._lane(plan, lane, over))

    async def settle(self, number: int, deadline: float) -> bool:
        """Send plain requests until ten in a row are served; False if that takes too long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline
        in_a_row = sent = 0
        while in_a_row < 10 and loop.time() < end:
            sent += 1
            asked = Asked(f"{number}.after.{sent}", "small")
            await self._visit(Visit("alone", (asked,)))
            outcome = self.outcomes[asked.request]
            in_a_row = in_a_row + 1 if outcome.accepted and outcome.complete else 0
            if not in_a_row:
                await asyncio.sleep(0.02)
        return in_a_row >= 10

    async def _lane(self, plan: Plan, lane: int, over: asyncio.Event) -> None:
        for visit in plan.visits(lane):
            while self._address() is None:  # its process is being started
                await asyncio.sleep(0.02)
            if over.is_set():
                return
            await self._visit(visit)

    async def _visit(self, visit: Visit) -> None:
        outcomes = [Outcome(asked.request, asked.shape) for asked in visit.requests]
        self.outcomes |= {outcome.request: outcome for outcome in outcomes}
        if (address := self._address()) is None:
            unsent(outcomes)
            await asyncio.sleep(0.02)
            return
        if visit.manner == "socket":
            await _talk(address, visit.requests[0], outcomes[0], self._patience)
            return
        try:
            opened = await asyncio.open_connection(*address)
        except OSError:
            unsent(outcomes)
            await asyncio.sleep(0.02)
            return
        connection = wire.Connection(*opened, deadline=self._patience)
        leaving = [asked for asked in visit.requests if asked.leave is not None]
        try:
            await (_pipelined if visit.manner == "pipelined" else _in_turn)(connection, visit, outcomes)
        finally:
            connection.abort() if leaving else await connection.close()


def unsent(outcomes: Iterable[Outcome]) -> None:
    """Note that these have never left the client."""
    for outcome in outcomes:
        outcome.unsent = True


async def _in_turn(connection: wire.Connection, visit: Visit, outcomes: list[Outcome]) -> None:
    for number, (asked, outcome) in enumerate(zip(visit.requests, outcomes, strict=True)):
        try:
            await _send(connection, asked, slowly=visit.manner == "slow")
            if asked.leave is None:
                await _receive(connection, outcome, slowly=visit.manner == "slow")
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(asked.leave):
                        await _receive(connection, outcome)
                outcome.hung = False
        except (BrokenOff, ConnectionError):
            pass
        if not outcome.complete or visit.manner == "alone":
            unsent(outcomes[number + 1 :])
            return
        await asyncio.sleep(asked.pause)


async def _pipelined(connection: wire.Connection, visit: Visit, outcomes: list[Outcome]) -> None:
    with contextlib.suppress(BrokenOff, ConnectionError):
        for asked in visit.requests:
            await _send(connection, asked)
        for outcome in outcomes:
            await _receive(connection, outcome)
            if not outcome.complete:
                return


async def _send(connection: wire.Connection, asked: Asked, *, slowly: bool = False) -> None:
    target = f"/{asked.shape}?id={asked.request}"
    if not slowly:
        await connection.send("POST", target, body=b"." * asked.body)
        return
    await connection.send_head("POST", target, length=asked.body)
    for _ in range(4):
        await asyncio.sleep(asked.pause)
        await connection.send_body(b"." * (asked.body // 4))


async def _receive(connection: wire.Connection, outcome: Outcome, *, slowly: bool = False) -> None:
    try:
        head = await connection.head()
        _note(outcome, head)
        seen = b""
        while (piece := await connection.chunk()) is not None:
            seen += piece
            if outcome.shape == "events" and outcome.accepted:
                outcome.messages = set(range(seen.count(b"\n\n")))
            if slowly:
                await asyncio.sleep(0.01)
        outcome.complete = True
    except TimeoutError:
        outcome.hung = True


def _note(outcome: Outcome, head: Head) -> None:
    outcome.status = head.status
    outcome.in_doubt = "x-in-doubt" in head.headers
    outcome.committed = frozenset(head.headers.get("x-committed", "").split())


async def _talk(address: Address, asked: Asked, outcome: Outcome, patience: float) -> None:
    """Have messages answered over a websocket, or leave in the middle."""
    host, port = address
    try:
        async with (
            asyncio.timeout(patience),
            connect_websocket(f"ws://{host}:{port}/socket", proxy=None, close_timeout=1) as socket,
        ):
            outcome.status = 101
            for number in range(SHAPES["socket"].messages):
                await socket.send(f"{asked.request}:{number}")
                if asked.leave is not None and number == 2:
                    await asyncio.sleep(asked.leave)
                    socket.transport.abort()
                    return
                _heard(outcome, await socket.recv())
            outcome.complete = True
    except TimeoutError:
        outcome.hung = True
    except (OSError, WebSocketException, EOFError):
        pass


def _heard(outcome: Outcome, answer: Any) -> None:
    if answer[0] == "+":
        outcome.messages.add(int(answer[1:]))
    elif answer[0] == "-":
        outcome.refused_messages.add(int(answer[1:]))
