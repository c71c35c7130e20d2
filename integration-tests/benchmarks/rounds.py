"""Measure contenders in turn, in many short rounds: noise of the machine hits all of them, and their ratios stay."""

import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

Run = Callable[[int], Awaitable[None]]
"""Does the work so many times."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a benchmark."""

    name: str
    run: Run
    each: int = 1
    """How many pieces of work are in one."""


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Take the quartiles of the values of all rounds."""
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, middle, high)


@dataclass(frozen=True)
class Result:
    """What one contender took, in microseconds, and beside the first one: as a ratio, and what it adds."""

    name: str
    each: Spread
    ratio: Spread
    added: Spread


async def measure(contenders: Sequence[Contender], *, rounds: int = 41, seconds: float = 0.02) -> list[Result]:
    """Run every contender in every round, each round in another order; the first contender is what the others are compared with.

    The garbage collector runs between the measurements, not in them.

    Args:
        contenders: the ways to do the work.
        rounds: how many times each of them is measured.
        seconds: about how long one measurement takes.
    """
    counts = [await _calibrated(one, seconds) for one in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for step in range(len(contenders)):
                place = (step + number) % len(contenders)
                gc.collect(0)
                begin = time.perf_counter()
                await contenders[place].run(counts[place])
                times[place].append((time.perf_counter() - begin) / counts[place] / contenders[place].each * 1e6)
    finally:
        gc.enable()
    base = times[0]
    return [
        Result(
            contender.name,
            Spread.of(mine),
            Spread.of([one / other for one, other in zip(mine, base, strict=True)]),
            Spread.of([one - other for one, other in zip(mine, base, strict=True)]),
        )
        for contender, mine in zip(contenders, times, strict=True)
    ]


async def _calibrated(contender: Contender, seconds: float) -> int:
    """Find how many times the work fits in; it is warm then."""
    count = 1
    while True:
        begin = time.perf_counter()
        await contender.run(count)
        taken = time.perf_counter() - begin
        if taken >= seconds / 2:
            return max(1, round(count * seconds / taken))
        count *= 2
