"""Which unit of work a piece of code belongs to: the context variable, and the marked context of a test (P12)."""

from contextvars import ContextVar
from typing import Any

current: ContextVar[Any] = ContextVar("context_sqla_unit", default=None)

# What makes the body of a response has the mark of its unit here: background work has not (P5, P6).
body: ContextVar[Any] = ContextVar("context_sqla_body", default=None)

# F8: servers and clients that copy their context when they start never see a variable that a test sets later.
test_units: list[Any] = []

# What tests capture of the on-commit callbacks, and whether these run all the same.
captures: list[tuple[list[Any], bool]] = []


def is_captured(callback: Any) -> bool:
    """Give a callback that is due to the tests that capture, and return whether it shall not run."""
    for captured, _ in captures:
        captured.append(callback)
    return not all(execute for _, execute in captures)


def test_unit() -> Any:
    """Return the innermost unit that a test has opened to be joined, or None (always, in production)."""
    if not test_units:
        return None
    here = current.get()
    while here is not None:
        if here.joinable:
            return here
        here = here.parent
    return test_units[-1]
