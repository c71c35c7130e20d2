"""The report of a run: one row a stack for people, and everything as JSON."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ground import Round, Stack
from .plan import FREQUENT, RARE

FAULTS = (*FREQUENT, *RARE, "sigterm", "sigkill")
COUNTS = ("requests", "acknowledged", "refused", "broken off", "unsent", "in doubt", "in doubt, and there")
#: What a violation counts as in the table; "leak" is everything that is left behind, "wrong" what must not happen at all.
COLUMNS = {
    "lost": "lost",
    "lost update": "lost",
    "uncalled": "lost",
    "ghost": "ghosts",
    "stray": "ghosts",
    "bleeding": "bleeding",
    "torn": "torn",
    "twice": "torn",
    "leak": "leaks",
    "memory": "leaks",
    "hung": "hung",
    "down": "hung",
}
VERDICTS = tuple(dict.fromkeys(COLUMNS.values()))


@dataclass
class Result:
    """A run of one stack."""

    stack: Stack
    seed: int
    rounds: list[Round] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        """Requests, by how they ended."""
        return sum((one.counts for one in self.rounds), Counter())

    @property
    def faults(self) -> Counter[str]:
        """Faults that were carried out, by kind."""
        return sum((one.faults for one in self.rounds), Counter())

    @property
    def verdicts(self) -> Counter[str]:
        """Violations, by column."""
        return Counter(COLUMNS[violation.kind] for one in self.rounds for violation in one.violations)

    @property
    def violating(self) -> list[int]:
        """The numbers of the rounds that found something."""
        return [one.number for one in self.rounds if one.violations]

    def data(self) -> dict[str, Any]:
        """Return everything that JSON can hold."""
        return {
            "framework": self.stack.framework,
            "server": self.stack.server,
            "driver": self.stack.driver,
            "seed": self.seed,
            "minutes": round(self.seconds / 60, 2),
            "counts": self.counts,
            "faults": self.faults,
            "verdicts": {name: self.verdicts[name] for name in VERDICTS},
            "rounds": [
                {
                    "number": one.number,
                    "seconds": one.seconds,
                    "counts": one.counts,
                    "faults": one.faults,
                    "violations": [violation._asdict() for violation in one.violations],
                    "errors logged": one.errors,
                    "memory": one.memory,
                }
                for one in self.rounds
            ],
        }


def table(results: Sequence[Result]) -> str:
    """Return the runs as a Markdown table, and below it the faults by kind."""
    header = ["framework", "server", "driver", "seeds", "minutes", *COUNTS, "faults", *VERDICTS]
    rows = [
        [
            *(result.stack.framework, result.stack.server, result.stack.driver),
            _seeds(result),
            f"{result.seconds / 60:.1f}",
            *(str(result.counts[name]) for name in COUNTS),
            str(result.faults.total()),
            *(str(result.verdicts[name]) for name in VERDICTS),
        ]
        for result in results
    ]
    faults = sum((result.faults for result in results), Counter[str]())
    kinds = ["fault", "times"], *([name, str(faults[name])] for name in FAULTS)
    return f"{_markdown([header, *rows])}\n\n{_markdown(kinds)}"


def _seeds(result: Result) -> str:
    numbers = [one.number for one in result.rounds]
    return f"{numbers[0]}-{numbers[-1]}" if numbers else str(result.seed)


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    header, *rows = lines
    every = [header, ["---"] * len(header), *rows]
    widths = [max(len(line[column]) for line in every) for column in range(len(header))]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in every)


def complaints(results: Sequence[Result]) -> list[str]:
    """Return every violation, with what reproduces its round."""
    return [
        f"{violation.kind}: {violation.request} {violation.text}\n    {again(result.stack, one)}"
        for result in results
        for one in result.rounds
        for violation in one.violations
    ]


def again(stack: Stack, one: Round) -> str:
    """Return the command that runs a round once more."""
    where = f"--framework {stack.framework} --server {stack.server} --driver {stack.driver}"
    return f"nox -s soak -- {where} --seed {one.number} --round-seconds {one.seconds:g} --rounds 1"


def write(path: Path, results: Sequence[Result]) -> None:
    """Write the runs as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([result.data() for result in results], indent=1) + "\n", encoding="utf-8")
