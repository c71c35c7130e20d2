"""The tables that every database of the suite has."""

from sqlalchemy import ForeignKey, MetaData, String
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable


class Base(DeclarativeBase):
    """The base of the models."""

    metadata = MetaData()


class Item(Base):
    """Something with a unique name: a second one of the same name fails at once."""

    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String, unique=True)


class Parent(Base):
    """What a child points to."""

    __tablename__ = "parents"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String)


class Child(Base):
    """A child without its parent is refused by COMMIT, not before."""

    __tablename__ = "children"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String)
    parent_id: Mapped[int] = mapped_column(ForeignKey("parents.id", deferrable=True, initially="DEFERRED"))


_DIALECTS: dict[str, Dialect] = {"postgresql": postgresql.dialect(), "sqlite": sqlite.dialect()}  # type: ignore[no-untyped-call]


def definitions(dialect: str) -> list[str]:
    """Return the statements that make the tables."""
    return [str(CreateTable(table).compile(dialect=_DIALECTS[dialect])) for table in Base.metadata.sorted_tables]
