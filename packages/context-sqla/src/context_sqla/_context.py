"""Which unit of work a piece of code belongs to: the context variable, and the marked context of a test (P12)."""

from contextvars import Context, ContextVar
from typing import Any

current: ContextVar[Any] = ContextVar("context_sqla_unit", default=None)

# A timer that was cancelled stays in the loop's heap until its time comes: it must not keep a request's context, and its unit.
TIMERS = Context()

# F8: servers and clients that copy their context when they start never see a variable that a test sets later.
test_units: list[Any] = []


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


def set_test_unit(unit: Any) -> None:
    """Let units opened from now on join this one."""
    test_units.append(unit)


def clear_test_context(unit: Any) -> None:
    """Let no unit join this one any more."""
    test_units.remove(unit)
