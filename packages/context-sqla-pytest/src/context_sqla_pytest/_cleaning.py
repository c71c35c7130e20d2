"""Real commits: which tables a test has written to, and how they are emptied."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from context_sqla import DBConnect
from sqlalchemy import ARRAY, URL, Text, bindparam, inspect, text
from sqlalchemy import event as events
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

_NAME = r'(?:"[^"]+"|`[^`]+`|[\w$]+)'
# The text that is sent tells it for the ORM, for Core and for SQL by hand alike. What is no table is sorted out by the database.
_WRITES = re.compile(
    rf"\b(?:insert\s+(?:or\s+\w+\s+)?into|replace\s+into|update(?:\s+only)?|delete\s+from(?:\s+only)?|merge\s+into|copy|"
    rf"truncate(?:\s+table)?(?:\s+only)?)\s+({_NAME}(?:\.{_NAME})*)",
    re.IGNORECASE,
)
_EXISTING = text(
    "SELECT DISTINCT c.oid::regclass::text FROM unnest(:names) AS name JOIN pg_class c ON c.oid = to_regclass(name)"
    " WHERE c.relkind IN ('r', 'p') AND NOT c.oid::regclass::text = ANY(:kept)"
).bindparams(bindparam("names", type_=ARRAY(Text)), bindparam("kept", type_=ARRAY(Text)))
_LOCK_TIMEOUT = "SET LOCAL lock_timeout = '10s'"


class Writes:
    """The tables that were written to, by database; one for the process."""

    def __init__(self) -> None:
        self._touched: dict[URL, set[str]] = {}

    @contextmanager
    def watching(self) -> Iterator["Writes"]:
        """Listen to every engine of the process."""
        events.listen(Engine, "before_cursor_execute", self._before)
        try:
            yield self
        finally:
            events.remove(Engine, "before_cursor_execute", self._before)

    def begin(self) -> None:
        """Forget what was written so far: it is not the test's."""
        self._touched.clear()

    async def clean(self, connect: DBConnect[Any], kept: Collection[str]) -> None:
        """Empty the tables of a connect's database that were written to.

        Args:
            connect: the database.
            kept: tables that are left as they are.
        """
        engine = await _engine_of(connect)
        names = self._touched.pop(engine.url, None)
        if names is None:
            return
        async with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                await connection.run_sync(_truncate, names, list(kept))
            else:
                await connection.run_sync(_delete, names, set(kept))

    def _before(self, conn: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if names := _WRITES.findall(statement):
            self._touched.setdefault(conn.engine.url, set()).update(names)


def _truncate(connection: Connection, names: Collection[str], kept: list[str]) -> None:
    tables = connection.scalars(_EXISTING, {"names": list(names), "kept": kept}).all()
    if tables:
        connection.exec_driver_sql(_LOCK_TIMEOUT)
        connection.exec_driver_sql(f"TRUNCATE {', '.join(sorted(tables))} RESTART IDENTITY CASCADE")


def _delete(connection: Connection, names: Collection[str], kept: Collection[str]) -> None:
    """Delete children before their parents, and the children of what was written to as CASCADE would."""
    inspector = inspect(connection)
    wanted = {name.rpartition(".")[2].strip('"`') for name in names}
    order = [table for table, _ in inspector.get_sorted_table_and_fkc_names() if table is not None]
    for table in order:
        if any(key["referred_table"] in wanted for key in inspector.get_foreign_keys(table)):
            wanted.add(table)
    quote = connection.dialect.identifier_preparer.quote
    for table in reversed(order):
        if table in wanted and table not in kept:
            connection.exec_driver_sql(f"DELETE FROM {quote(table)}")  # noqa: S608  # a name from the database itself
    if connection.dialect.name == "sqlite" and inspector.has_table("sqlite_sequence"):
        names_of = ", ".join("'" + table.replace("'", "''") + "'" for table in order if table in wanted and table not in kept)
        connection.exec_driver_sql(f"DELETE FROM sqlite_sequence WHERE name IN ({names_of})")  # noqa: S608


async def _engine_of(connect: DBConnect[Any]) -> AsyncEngine:
    options = (await connect.session_maker()).kw
    bind = options.get("bind") or next(iter(options.get("binds", {}).values()), None)
    if not isinstance(bind, AsyncEngine):
        raise TypeError(f"{connect!r}: real commits can be cleaned up only where the session maker is bound to an AsyncEngine")
    return bind
