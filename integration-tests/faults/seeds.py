"""Rounds that have found something once: they are run again by every test command, so that it stays mended."""

from typing import NamedTuple


class Case(NamedTuple):
    """A round on one framework, and what it found."""

    framework: str
    number: int
    seconds: float
    found: str


CASES = (
    Case("starlette", 1, 5, "pooled connections kept the request during which they were opened, with its errors and sessions"),
    Case("sanic", 1, 5, "a commit that failed behind a raised redirect did not reach the application's exception handlers"),
    Case("asgi", 214, 8, "a prepared transaction that was left behind, decided to be committed, was not in doubt"),
    Case("sanic", 4, 3, "a timer kept a cancelled request for as long as its commit might have taken, when that was long over"),
)
