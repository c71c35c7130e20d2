"""Which stacks of framework, server and database driver a test runs on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from .databases import DRIVERS
from .servers import Workers


@dataclass(frozen=True)
class Stack:
    """One combination; ``framework`` and ``server`` are empty for a test that serves nothing.

    ``workers`` is about a server with several worker processes: they take the connections of the test in turn, or one of them
    takes them all, or there is only one.
    """

    framework: str
    server: str
    database: str
    workers: Workers = "in turn"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.framework, self.server, self.database)))

    @property
    def dialect(self) -> str:
        """Which database it is: postgresql or sqlite."""
        return DRIVERS[self.database]


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; None where it does not."""

    servers: Sequence[str] | None = None
    databases: Sequence[str] | None = None
    full: bool = False


#: Positions of (server, database), the default (0, 0) left out; any two in a row differ in both.
_OTHERS = ((1, 1), (2, 2), (0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1))
#: With (0, 0) each is a Latin row: three stacks that have every server and every database.
_ROWS = (((1, 1), (2, 2)), ((1, 2), (2, 1)))


def choose(
    servers: Sequence[str], databases: Sequence[str], *, number: int, wire: bool, selection: Selection
) -> list[tuple[str, str]]:
    """Return the pairs of server and database for one test.

    Every test runs on the first of each. One marked ``wire`` also runs on every other server and database; any other test runs
    on one more pair, which goes round with the ``number`` of the test in its file, so that eight tests see all pairs.

    Args:
        servers: those of the framework, the default one first.
        databases: those that the test can run on, the default one first.
        number: the test's number in its file.
        wire: what the test shows depends on the server.
        selection: from the command line; asking for servers or databases gives their full product, with the defaults of the
            other.
    """
    if selection.full:
        return list(product(_asked(servers, selection.servers), _asked(databases, selection.databases)))
    if selection.servers is not None or selection.databases is not None:
        return list(
            product(_asked(servers, selection.servers or servers[:1]), _asked(databases, selection.databases or databases[:1]))
        )
    default, *others = _pairs(servers, databases, ((0, 0), *(_ROWS[number % 2] if wire else _OTHERS)))
    return [default, *others] if wire or not others else [default, others[number % len(others)]]


def _pairs(servers: Sequence[str], databases: Sequence[str], positions: Iterable[tuple[int, int]]) -> list[tuple[str, str]]:
    """The pairs at the positions, each once; a position beyond the end begins again."""
    return list(dict.fromkeys((servers[s % len(servers)], databases[d % len(databases)]) for s, d in positions))


def _asked(there: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    return [one for one in there if asked is None or one in asked]
