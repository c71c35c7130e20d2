"""What a request asks for: the limits in its query, and the form of the answer that it accepts."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias
from urllib.parse import parse_qsl

from ._position import parse_lsn

Combine: TypeAlias = Literal["and", "or"]
_NUMBER = re.compile("[0-9]{1,19}")
_LSN = re.compile("(?:([0-9]{1,10}):)?([0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8})")
_LONGEST_WAIT = 10.0


class QueryError(ValueError):
    """Tell that a query cannot be read; the message is the answer's."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How fresh a replica has to be.

    Args:
        lag: seconds; None: no limit.
        lag_bytes: bytes of the log; None: no limit.
        combine: both limits, or one of them.
        lsn: what it must have replayed.
        timeline: on which timeline, where that was said.
    """

    lag: float | None = None
    lag_bytes: int | None = None
    combine: Combine = "and"
    lsn: int | None = None
    timeline: int | None = None


class Query:
    """The parameters of a request; of two with one name the first counts.

    Raises:
        QueryError: there are too many.
    """

    def __init__(self, text: str) -> None:
        try:
            pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=32)
        except ValueError:
            raise QueryError("Invalid query") from None
        self._values: dict[str, str] = {}
        for name, value in pairs:
            self._values.setdefault(name, value)

    def text(self, name: str) -> str | None:
        """Return a parameter as it is."""
        return self._values.get(name)

    def is_set(self, name: str) -> bool:
        """Return whether a switch is on: "1" or "true"."""
        return self._values.get(name, "").lower() in ("1", "true")

    def whole(self, name: str, default: int | None = None) -> int | None:
        """Return a number, 0 or more.

        Raises:
            QueryError: it is none.
        """
        value = self._values.get(name)
        if value is None:
            return default
        if not _NUMBER.fullmatch(value):
            raise QueryError(f"Invalid {name}")
        return int(value)

    def wait(self) -> float:
        """Return the seconds to wait for what is not there yet."""
        return min((self.whole("wait_ms") or 0) / 1000, _LONGEST_WAIT)

    def limits(self, lag_ms: int | None, lag_bytes: int | None, combine: Combine = "and") -> Limits:
        """Return the limits of this request.

        Args:
            lag_ms: where the request has none.
            lag_bytes: where the request has none.
            combine: both, or one of them.
        """
        found = self.whole("lag_ms", lag_ms)
        return Limits(None if found is None else found / 1000, self.whole("lag_bytes", lag_bytes), combine, *self._position())

    def _position(self) -> tuple[int | None, int | None]:
        value = self._values.get("min_lsn")
        if value is None:
            return None, None
        match = _LSN.fullmatch(value)
        if match is None:
            raise QueryError("Invalid min_lsn")
        return parse_lsn(match[2]), int(match[1]) if match[1] else None


@lru_cache(maxsize=64)
def prefers_json(accept: str) -> bool:
    """Return whether an `Accept` header wants JSON rather than text; where it says neither, it does not."""
    weights: dict[str, float] = {}
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        weights.setdefault(name, _weight(parameters))
    json = _first(weights, "application/json", "application/*", "*/*")
    text = _first(weights, "text/plain", "text/*", "*/*")
    return json > text or (json > 0 and json == text and "application/json" in weights)


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return float(value) if re.fullmatch(r"[01](\.[0-9]{0,3})?", value.strip()) else 0.0
    return 1.0


def _first(weights: dict[str, float], *names: str) -> float:
    return next((weights[name] for name in names if name in weights), 0.0)
