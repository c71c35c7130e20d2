"""The database of the tutorial; the other pages use it too."""

from context_sqla import DBConnect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# or "postgresql+asyncpg://user:secret@host/users"
db = DBConnect.from_url("sqlite+aiosqlite:///users.db")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    score: Mapped[int | None]
