"""What does not vary with the machine: what a request calls, and what it holds, on each framework.

Counted is what the suite's own functions do: how often one of them is entered or resumed, and how often one of them calls a
function of anybody else. What the framework and SQLAlchemy do by themselves is not counted.
"""

import asyncio
import gc
import json
import platform
import sys
import sysconfig
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import context_sqla
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from .contenders import NO_DB, OURS, dispose, drive

FILE = Path(__file__).with_name("counts.json")
PATHS = ("no database", "one query")
UPDATE = "nox -s bench -- counts --write"
_SELECT = text("SELECT 1")
_WARM = 5  # requests; after them everything that is kept for good is there
_HERE = str(Path(__file__).parent)
_LIBRARIES = {"asgi": "context-sqla-asgi"}


@dataclass(frozen=True)
class Counts:
    """What one request does and holds."""

    calls: int
    """Entries of the suite's own functions, resumed coroutines included, and calls made by them."""
    blocks: int
    """Pieces of memory that the suite has allocated and still holds while the endpoint runs."""
    bytes: int
    """Their size."""


def key() -> str:
    """Return the name under which this Python's numbers are kept."""
    return ".".join(platform.python_version_tuple()[:2])


def committed() -> dict[str, Any]:
    """Return the committed numbers of this Python."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")).get(key(), {})
    return found


def library(framework: str) -> str:
    """Return a framework and its version, on which the numbers depend where it calls the adapter."""
    name = _LIBRARIES.get(framework, framework)
    return "no library" if framework == "asgi" else f"{name} {version(name)}"


async def count(framework: str, path: str) -> Counts:
    """Count one request of one framework."""
    engine = create_async_engine("sqlite+aiosqlite://")
    held: list[tuple[int, int]] = []
    make, _ = NO_DB[framework][OURS]

    async def work(session: Any) -> None:
        if session is not None:
            await session.execute(_SELECT)
        if tracemalloc.is_tracing():
            held.append(_held())

    work.asks = path == PATHS[1]  # type: ignore[attr-defined]
    try:
        request = await drive(framework, make(engine, work))
        await request(_WARM)
        calls = sum((await calls_of(request)).values())
        blocks, size = min(await _held_by(request, held))
        return Counts(calls, blocks, size)
    finally:
        await dispose(engine)


async def calls_of(request: Callable[[int], Awaitable[None]], *, every: bool = False) -> Counter[str]:
    """Count the calls in one request by function: the suite's own and those that it makes; or every call there is."""
    calls: Counter[str] = Counter()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call":
            caller = frame.f_back
            if every or _is_own(code) or (caller is not None and _is_own(caller.f_code)):
                calls[f"{_place(code.co_filename)}:{code.co_name}"] += 1
        elif event == "c_call" and (every or _is_own(code)):
            calls[f"{getattr(argument, '__qualname__', argument)} ({_place(code.co_filename)}:{code.co_name})"] += 1

    sys.setprofile(look)
    try:
        await request(1)
    finally:
        sys.setprofile(None)
    return calls


_own: dict[Any, bool] = {}
_PACKAGES = str(Path(context_sqla.__file__).parents[1])


def _is_own(code: Any) -> bool:
    known = _own.get(code)
    if known is None:
        known = _own[code] = "/context_sqla" in code.co_filename.replace("\\", "/")
    return known


def _place(name: str) -> str:
    """Return a file's name from its package on."""
    for folder in ("site-packages", "src", Path(sysconfig.get_path("stdlib")).name):
        _, found, rest = name.replace("\\", "/").rpartition(f"/{folder}/")
        if found:
            return rest
    return name


def _held() -> tuple[int, int]:
    """Return how many pieces of memory the suite's own lines have allocated and hold, and their size."""
    snapshot = tracemalloc.take_snapshot().filter_traces((tracemalloc.Filter(True, "*/context_sqla*/*"),))
    return len(snapshot.traces), sum(trace.size for trace in snapshot.traces)


async def _held_by(request: Callable[[int], Awaitable[None]], held: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what several requests hold, each beside what was held before it."""
    found = []
    tracemalloc.start(1)
    try:
        await request(_WARM)
        for _ in range(2):
            for _ in range(5):
                await asyncio.sleep(0)  # what the request before has left to the loop has ended
            gc.collect()  # and with it the free lists, from which the next objects would come unseen
            before = _held()
            held.clear()
            await request(1)
            found.append((held[0][0] - before[0], held[0][1] - before[1]))
    finally:
        tracemalloc.stop()
    return found


async def everything() -> dict[str, Any]:
    """Count all frameworks and paths."""
    found: dict[str, Any] = {}
    for framework in NO_DB:
        found[framework] = {"library": library(framework)}
        for path in PATHS:
            found[framework][path] = asdict(await count(framework, path))
    return found


def write() -> None:
    """Write the numbers of this Python."""
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    known[key()] = asyncio.run(everything())
    FILE.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


async def added(framework: str) -> dict[str, int]:
    """Return every call that a request without database makes more, or less, often than one of the bare framework."""
    engine = create_async_engine("sqlite+aiosqlite://")
    found = []
    try:
        for make, _ in list(NO_DB[framework].values())[1::-1]:
            request = await drive(framework, make(engine, None))
            await request(_WARM)
            found.append(await calls_of(request, every=True))
    finally:
        await dispose(engine)
    ours, bare = found
    ours.subtract(bare)
    return {name: number for name, number in ours.most_common() if number}
