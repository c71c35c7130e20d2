"""Options of one transaction: what SQLAlchemy calls them, and where they cannot be kept (P17)."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from ._connect import DBConnect
from .errors import UnsupportedOptionError


def transaction_options(*, isolation_level: str | None, read_only: bool) -> dict[str, Any]:
    """Return the execution options of a transaction."""
    options = {"isolation_level": isolation_level, "postgresql_readonly": True if read_only else None}
    return {name: value for name, value in options.items() if value is not None}


def check_options(connect: DBConnect[Any], session: AsyncSession, options: Mapping[str, Any]) -> None:
    """Raise if the database cannot keep an option; SQLAlchemy itself checks the isolation level."""
    dialect = session.get_bind().dialect.name
    if "postgresql_readonly" in options and dialect not in ("postgresql", "cockroachdb"):
        raise UnsupportedOptionError(f"{connect!r}: read_only is not known to {dialect}")
