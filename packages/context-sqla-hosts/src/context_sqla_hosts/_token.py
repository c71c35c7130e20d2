"""Signed tokens: a position in the log that a visitor carries, and that nobody else can make."""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from typing import Literal, TypeAlias

from ._floor import Floor
from ._position import Position

_VERSION = "v1"
_MAC_BYTES = 16
_SHORTEST_KEY = 16
_LONGEST_TOKEN = 128
_SKEW = 5  # seconds by which the clocks of two servers of the application may differ
Verdict: TypeAlias = Literal["ok", "garbled", "forged", "expired"]


class Tokens:
    """Sign and read tokens "v1.<timeline>.<LSN in hex>.<unix time>.<MAC>"; timeline 0 stands for "primary".

    Args:
        keys: the first one signs, all of them are accepted: put a new key in front, and drop the old one `max_age` later.
        max_age: seconds for which a token counts.

    Raises:
        ValueError: there is no key, or one is shorter than 16 bytes.
    """

    def __init__(self, keys: Sequence[str | bytes], max_age: int) -> None:
        if isinstance(keys, str | bytes):
            raise TypeError("keys is a list: [new_key, old_key]")
        self._keys = [key.encode() if isinstance(key, str) else bytes(key) for key in keys]
        if not self._keys or min(map(len, self._keys)) < _SHORTEST_KEY:
            raise ValueError(f"tokens need at least one key, of {_SHORTEST_KEY} bytes or more: secrets.token_urlsafe()")
        self.max_age: int = max_age

    def sign(self, floor: Floor, cluster: int | None, now: float) -> str:
        """Return a token.

        Args:
            floor: what it says.
            cluster: the system identifier; a token of another cluster with the same keys is none here.
            now: unix time.
        """
        timeline, lsn = (0, 0) if floor == "primary" else floor
        text = f"{_VERSION}.{timeline}.{lsn:X}.{int(now)}"
        return f"{text}.{self._mac(self._keys[0], text, cluster)}"

    def read(self, token: str, cluster: int | None, now: float) -> tuple[Floor | None, Verdict]:
        """Return what a token says, None where it says nothing that counts, and the reason.

        Args:
            token: as it came in.
            cluster: the system identifier.
            now: unix time.
        """
        text, _, mac = token.rpartition(".")
        parts = text.split(".")
        if len(token) > _LONGEST_TOKEN or not token.isascii() or len(parts) != 4 or parts[0] != _VERSION:
            return None, "garbled"
        # Every key is tried: which one fits must not show in the time it takes.
        if not sum(hmac.compare_digest(mac, self._mac(key, text, cluster)) for key in self._keys):
            return None, "forged"
        timeline, lsn, signed_at = int(parts[1]), int(parts[2], 16), int(parts[3])
        if not now - self.max_age <= signed_at <= now + _SKEW:
            return None, "expired"
        return (Position(timeline, lsn) if timeline else "primary"), "ok"

    def _mac(self, key: bytes, text: str, cluster: int | None) -> str:
        digest = hmac.new(key, f"{cluster}|{text}".encode(), hashlib.sha256).digest()[:_MAC_BYTES]
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
