"""Writes that scenarios make over and over."""

from typing import Any

from context_sqla import DBConnect, db_session

from .tables import Child, Item


async def add(connect: DBConnect[Any], name: str) -> None:
    """Add an item to the unit's session; it is written by a flush, which a commit does first."""
    (await db_session(connect)).add(Item(name=name))


async def insert(connect: DBConnect[Any], name: str) -> None:
    """Write an item now: a connection is taken and a transaction is open from here on."""
    session = await db_session(connect)
    session.add(Item(name=name))
    await session.flush()


async def insert_orphan(connect: DBConnect[Any], name: str = "orphan") -> None:
    """Write a child without its parent now: COMMIT, and nothing before it, will fail with an ``IntegrityError``."""
    session = await db_session(connect)
    session.add(Child(name=name, parent_id=4711))
    await session.flush()
