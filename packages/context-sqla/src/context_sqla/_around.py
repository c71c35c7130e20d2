"""What a session asks of what is around it: its unit, and in tests its place in a transaction that it shares."""

import asyncio
from typing import Any, Protocol

from ._callbacks import Callback
from ._connect import DBConnect
from ._policy import Policy


class Owner(Protocol):
    """What a session asks of its unit."""

    policy: Policy
    committed: tuple[str, ...]
    loop: asyncio.AbstractEventLoop | None

    def is_at_home(self) -> bool:
        """Return whether the loop that runs here is the unit's."""
        ...

    def label(self) -> str:
        """Return what log lines call the unit."""
        ...

    def check_open(self, connect: DBConnect[Any] | None) -> None:
        """Raise if the unit has ended, or belongs to another event loop."""

    async def run_callback(self, callback: Callback) -> None:
        """Run one on-commit callback in a unit of its own."""


class Place(Protocol):
    """A unit's place in the transaction of a test, which is a stack of savepoints (P12)."""

    def is_taken(self) -> bool:
        """Return whether a unit inside this one has the connection now."""
        ...

    async def clear(self) -> None:
        """Evict the units inside this one."""

    def give_back(self) -> None:
        """Leave the stack."""
