"""What a session asks of what is around it: its unit, and in tests its place in a transaction that it shares."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ._callbacks import Callback
from ._connect import DBConnect
from ._policy import Policy


class Owner(Protocol):
    """What a session asks of its unit."""

    policy: Policy
    label: Callable[[], str] | None
    committed: Mapping[str, bool]
    loop: asyncio.AbstractEventLoop | None

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
