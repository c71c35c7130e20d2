"""What happens in a round: the load of every lane and the schedule of faults, made of one number."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from .shapes import SHAPES

LANES = 12
#: One round in so many ends the server's process, by SIGTERM and by SIGKILL.
PROCESS_ROUNDS = 5

Manner = Literal["alone", "keep-alive", "pipelined", "slow", "leaving", "socket"]
_MANNERS: dict[Manner, int] = {"alone": 3, "keep-alive": 6, "pipelined": 3, "slow": 2, "leaving": 4, "socket": 2}


@dataclass(frozen=True)
class Asked:
    """A request to send; ``leave`` is after how many seconds the client vanishes, None if it stays."""

    request: str
    shape: str
    body: int = 0
    leave: float | None = None
    pause: float = 0.0


@dataclass(frozen=True)
class Visit:
    """What a client does on one connection."""

    manner: Manner
    requests: tuple[Asked, ...]


#: Faults that may come any number of times in a round, and how often a second when they do.
FREQUENT: dict[str, float] = {
    "terminate": 4,
    "cancel-statement": 10,
    "cancel-task": 6,
    "cut": 1,
    "cut-commit": 4,
    "lose-commit": 4,
    "lose-prepare": 2,
    "delay": 1,
    "blackhole": 0.6,
    "refuse": 0.6,
    "exhaust": 0.5,
}
#: Faults that come once in a round, if they come.
RARE = ("restart-fast", "restart-immediate", "switch")


@dataclass(frozen=True)
class Fault:
    """A fault, so many seconds after the beginning; ``dice`` are for whatever it has to choose."""

    at: float
    kind: str
    dice: float = 0.0
    more: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A round: ``number`` reproduces it, for the same length."""

    number: int
    seconds: float
    faults: tuple[Fault, ...]
    #: The server's process is ended in this round: it gets one of its own.
    ends_the_process: bool = field(default=False)

    @property
    def kinds(self) -> set[str]:
        """The kinds of faults that come."""
        return {fault.kind for fault in self.faults}

    def visits(self, lane: int) -> Iterator[Visit]:
        """Yield what the client in a lane does, without end; the same for the same number and lane."""
        dice = random.Random(f"{self.number}/{lane}")
        numbers = itertools.count()
        plain = [shape for shape in SHAPES.values() if not shape.socket]
        while True:
            manner = dice.choices(list(_MANNERS), list(_MANNERS.values()))[0]
            count = {"keep-alive": dice.randint(2, 8), "pipelined": dice.randint(2, 4), "leaving": dice.randint(1, 3)}.get(
                manner, 1
            )
            asked = []
            for place in range(count):
                shape = "socket" if manner == "socket" else dice.choices(plain, [shape.weight for shape in plain])[0].name
                leaves = (manner == "leaving" and place == count - 1) or (manner == "socket" and dice.random() < 0.3)
                asked.append(
                    Asked(
                        f"{self.number}.{lane}.{next(numbers)}",
                        shape,
                        body=dice.choice([0, 0, 20, 2000]) if manner != "slow" else 200,
                        leave=dice.random() ** 2 * 0.1 if leaves else None,
                        pause=dice.random() * 0.03,
                    )
                )
            yield Visit(manner, tuple(asked))


def plan(number: int, seconds: float) -> Plan:
    """Make the round with this number."""
    dice = random.Random(f"{number}/faults")
    ends = number % PROCESS_ROUNDS == PROCESS_ROUNDS - 1
    chosen = dice.sample(sorted(FREQUENT), dice.randint(3, 6))
    faults = [
        Fault(at, kind, dice.random(), dice.random())
        for kind in chosen
        for at in sorted(dice.random() * seconds for _ in range(max(1, round(FREQUENT[kind] * seconds))))
    ]
    if ends:
        faults += [Fault(seconds * 0.3, "sigterm"), Fault(seconds * 0.7, "sigkill")]
    else:
        rare = dice.sample(RARE, dice.randint(0, 2))
        faults += [Fault(seconds * (0.2 + 0.5 * dice.random()), kind, dice.random(), dice.random()) for kind in rare]
    return Plan(number, seconds, tuple(sorted(faults, key=lambda fault: fault.at)), ends)
