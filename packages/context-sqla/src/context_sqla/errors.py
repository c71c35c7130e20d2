"""The exceptions of context-sqla, and two questions that a caller may ask of any exception.

Everything that this suite raises by itself is a `ContextSqlaError`, or a `ValueError` / `TypeError` where an argument is wrong.
Errors of SQLAlchemy and of the driver are never replaced: they are raised as they are, with notes.
"""

from collections.abc import Iterator

__all__ = [
    "ContextAlreadyInitiatedError",
    "ContextClosedError",
    "ContextNotInitiatedError",
    "ContextSqlaError",
    "CursorClosedError",
    "DriverError",
    "ForeignLoopError",
    "SessionBusyError",
    "SetupError",
    "UnavailableError",
    "UnsupportedOptionError",
    "committed_connects",
    "is_in_doubt",
]

_OUTCOME = "__context_sqla_outcome__"


class ContextSqlaError(Exception):
    """Be the root of every error that context-sqla raises by itself."""


class ContextNotInitiatedError(ContextSqlaError):
    """Tell that a session was asked for outside every unit of work (P11)."""


class ContextAlreadyInitiatedError(ContextSqlaError):
    """Tell that a unit of work was opened by hand inside another one."""


class ContextClosedError(ContextSqlaError):
    """Tell that a task, or a session that it kept, outlived its unit of work (P10)."""


class SessionBusyError(ContextSqlaError):
    """Tell that a statement was still running, or held the session, when its unit needed it (P7a)."""


class UnavailableError(ContextSqlaError):
    """Tell that no database can serve the request now; every adapter answers 503.

    Args:
        message: what is unavailable and why.
        retry_after: seconds after which a client may try again, sent as `Retry-After`.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after: float | None = retry_after


class CursorClosedError(ContextSqlaError):
    """Tell that a server-side cursor was read after the transaction that it belongs to had ended (P5)."""


class DriverError(ContextSqlaError):
    """Tell that a URL names a driver that is unknown, not asynchronous, or not installed."""


class ForeignLoopError(ContextSqlaError):
    """Tell that something which belongs to one event loop was used in another (P12, P15)."""


class SetupError(ContextSqlaError):
    """Tell that an application cannot be set up: it is set up already, or has started."""


class UnsupportedOptionError(ContextSqlaError):
    """Tell that an option of a transaction cannot be kept here, and so was not ignored (P17)."""


def is_in_doubt(exc: BaseException) -> bool:
    """Return whether nobody can know if the transaction behind this error was committed.

    True where a COMMIT had been sent and the connection died, or was cut at `commit_timeout`, before its answer came (P7), and
    where a prepared transaction is left behind whose commit is decided (P9).
    Chained exceptions and the members of groups are looked at too.
    """
    return any(outcome.in_doubt for outcome in _outcomes(exc))


def committed_connects(exc: BaseException) -> tuple[str, ...]:
    """Return the names of the connects that the commit had committed which this error ended (P9).

    All of them where a cancellation came after the commit, while what waited for it was running (P7).
    """
    return tuple(dict.fromkeys(name for outcome in _outcomes(exc) for name in outcome.committed))


class _Outcome:
    def __init__(self) -> None:
        self.in_doubt = False
        self.complete = False  # everything was committed before it was raised
        self.committed: list[str] = []


def _outcome_of(exc: BaseException) -> _Outcome:
    """Return the record of this exception object, made at the first call."""
    outcome = exc.__dict__.get(_OUTCOME)
    if not isinstance(outcome, _Outcome):
        outcome = exc.__dict__[_OUTCOME] = _Outcome()
    return outcome


def _outcomes(exc: BaseException) -> Iterator[_Outcome]:
    seen: set[int] = set()
    waiting = [exc]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        outcome = current.__dict__.get(_OUTCOME)
        if isinstance(outcome, _Outcome):
            yield outcome
        if isinstance(current, BaseExceptionGroup):
            waiting.extend(current.exceptions)
        waiting.extend(link for link in (current.__cause__, current.__context__) if link is not None)
