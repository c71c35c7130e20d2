"""Run rounds until the time is up: ``python -m faults.soak --minutes N --seed S --framework X``; see the README."""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from contract.drivers import FRAMEWORKS

from .ground import DEADLINE, NAIVE, Ground, Stack, ground
from .history import Violation
from .plan import plan
from .report import Result, complaints, table, write

ROUND_SECONDS = 8.0
#: What a process may grow by in the second half of a run: pooled connections keep contexts, and that goes up and down by a third
#: of this. A run of some length has thousands of requests in it.
GROWTH = 1024 * 1024


async def soak(
    stack: Stack,
    seed: int,
    *,
    seconds: float = 0,
    round_seconds: float = ROUND_SECONDS,
    rounds: int | None = None,
    patience: float = DEADLINE,
) -> Result:
    """Run the rounds ``seed``, ``seed`` + 1, ... for so long, or so many of them.

    Args:
        stack: what is under test.
        seed: the number of the first round.
        seconds: for how long rounds are begun.
        round_seconds: the length of each.
        rounds: how many there are, whatever time they take.
        patience: seconds to wait for an answer, and for the server to come to rest.
    """
    result = Result(stack, seed)
    begin = time.monotonic()
    async with ground(stack) as place:
        place.patience = patience
        number = seed
        while len(result.rounds) < rounds if rounds is not None else time.monotonic() - begin < seconds:
            await _one(place, result, number, round_seconds)
            number += 1
    result.seconds = time.monotonic() - begin
    _memory(result)
    return result


async def _one(place: Ground, result: Result, number: int, seconds: float) -> None:
    # The first rounds fill caches and pools.
    done = await place.round(plan(number, seconds), memory=len(result.rounds) >= 2)
    result.rounds.append(done)
    said = ", ".join(f"{name} {done.counts[name]}" for name in ("requests", "acknowledged", "in doubt") if done.counts[name])
    print(f"{place.stack.framework} {number}: {said}, faults {done.faults.total()}", file=sys.stderr, flush=True)
    for violation in done.violations:
        print(f"    {violation.kind}: {violation.request} {violation.text}", file=sys.stderr, flush=True)


def _memory(result: Result) -> None:
    """Hold the memory at the end of the run against that at its half."""
    measured = [one for one in result.rounds if one.memory is not None]
    if len(measured) < 8:
        return
    half, last = measured[len(measured) // 2], measured[-1]
    assert half.memory is not None
    assert last.memory is not None
    growth = last.memory["traced"] - half.memory["traced"]
    if growth > GROWTH:
        text = f"memory grew by {growth} bytes from round {half.number} to round {last.number}"
        last.violations.append(Violation("memory", "", text))


def _today() -> int:
    return int(time.time()) // 86_400 * 1_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the report, and say by the exit status whether anything was found."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each framework")
    parser.add_argument("--seed", type=int, default=_today(), help="the first round's number; default: another one every day")
    parser.add_argument("--framework", action="append", choices=[*FRAMEWORKS, NAIVE], help="repeatable; default: all but naive")
    parser.add_argument("--server", help="default: the framework's first")
    parser.add_argument("--driver", choices=("asyncpg", "psycopg"), default="asyncpg")
    parser.add_argument("--rounds", type=int, help="so many rounds in place of minutes")
    parser.add_argument("--round-seconds", type=float, default=ROUND_SECONDS)
    parser.add_argument("--json", type=Path, default=Path("build/soak.json"))
    options = parser.parse_args(arguments)
    results = []
    for framework in options.framework or FRAMEWORKS:
        stack = Stack.of(framework, options.server, options.driver)
        run = soak(
            stack,
            options.seed,
            seconds=options.minutes * 60,
            round_seconds=options.round_seconds,
            rounds=options.rounds,
            patience=5 if framework == NAIVE else DEADLINE,
        )
        results.append(asyncio.run(run))
        write(options.json, results)
    print(table(results))
    found = complaints(results)
    for complaint in found:
        print(complaint)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
