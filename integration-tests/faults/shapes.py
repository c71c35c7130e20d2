"""The shapes of requests that applications have, and what each may leave in the database.

A request writes **groups** of rows; a group is what one transaction writes, all of it or nothing. Its ``when`` says on whose
word it is committed:

* ``head``: a status < 400 means that it is there, any other that it is not;
* ``body``: a body that came to its end means that it is there; a status >= 400 that it is not;
* ``own``: committed by the request on its own account (``run_in_new_ctx``, a commit by hand): a status < 400 means that it is
  there; a failed request may have been through it already;
* ``message``: as ``own``, on the word of an answer to one message of a websocket or an event of a stream;
* ``after``: background work: the answer says nothing about it;
* ``loose``: written by a task that nobody waits for: any part of it may be there;
* ``never``: rolled back whatever happens.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

When = Literal["head", "body", "own", "message", "after", "loose", "never"]

#: Keys of the counters: few, so that requests meet.
KEYS = 4


@dataclass(frozen=True)
class Group:
    """What one transaction writes: so many rows, and counters if it ``bumps`` them; ``calls``: it has an ``on_commit``."""

    name: str
    parts: int
    when: When = "head"
    database: str = "first"
    #: What ``committed_connects`` calls it, if not as the database.
    connect: str = ""
    bumps: bool = False
    calls: bool = False


@dataclass(frozen=True)
class Shape:
    """A kind of request; ``weight`` is how often it comes."""

    name: str
    groups: Sequence[Group]
    weight: int = 4
    socket: bool = False
    #: A numbered group for each message: "m0", "m1", ...
    messages: int = 0


def _shape(name: str, *groups: Group, **options: int) -> Shape:
    return Shape(name, groups, **options)  # type: ignore[arg-type]


_ALL = (
    _shape("small", Group("h", 3, calls=True), weight=8),
    _shape("read"),
    _shape("redirect", Group("h", 1)),
    _shape("bump", Group("h", 2, bumps=True), weight=8),
    _shape("lock", Group("h", 2, bumps=True), weight=6),
    _shape("serial", Group("h", 1), Group("n", 1, "own", bumps=True)),
    _shape("two", Group("h", 2, calls=True), Group("x", 2, database="second"), weight=6),
    _shape("twophase", Group("t", 2, calls=True, connect="third"), Group("u", 2, database="second", connect="fourth"), weight=6),
    _shape("gather", Group("h", 1), Group("n0", 2, "own", calls=True), Group("n1", 2, "own", calls=True), weight=6),
    _shape("early", Group("e", 2, "own"), Group("h", 2), weight=6),
    _shape("stream", Group("h", 2), Group("b", 4, "body", calls=True), weight=8),
    _shape("read-stream", Group("h", 1)),
    _shape("background", Group("h", 2), Group("g", 2, "after"), weight=6),
    _shape("events", Group("h", 1), messages=4),
    _shape("boom", Group("v", 2, "never")),
    _shape("refused", Group("v", 2, "never")),
    _shape("invalid", Group("v", 2, "never")),
    _shape("refused-late", Group("v", 2, "never"), Group("n", 1, "own")),
    _shape("swallowed", Group("h", 2)),  # is refused, or it is lost
    _shape("savepoint", Group("h", 2), Group("v", 1, "never")),
    _shape("timeout", Group("h", 2)),
    _shape("statement-timeout", Group("h", 2)),
    _shape("orphan", Group("h", 2)),  # the same
    _shape("left-behind", Group("h", 2), Group("c", 3, "loose")),
    _shape("gather-fails", Group("v", 2, "never")),
    _shape("socket", socket=True, messages=4, weight=6),
)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _ALL}


def keys_of(request: str) -> list[int]:
    """Return the two counters that a request bumps, in its own order: requests that meet may lock each other out."""
    number = zlib.crc32(request.encode())
    first = number % KEYS
    return [first, (first + 1 + number // KEYS % (KEYS - 1)) % KEYS]
