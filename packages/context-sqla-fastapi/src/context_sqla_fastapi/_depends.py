"""The unit's session as a dependency."""

from typing import TypeVar

from context_sqla import DBConnect, db_session
from context_sqla.adapters import AsyncSession
from fastapi import params

S = TypeVar("S", bound=AsyncSession)


def session_dependency(connect: DBConnect[S]) -> params.Depends:
    """Return a dependency that gives an endpoint the session of its request's unit of work.

    It is what `await db_session(connect)` returns and changes nothing in its life: the unit commits and closes it (P2).

    Make it a type once, `Session = Annotated[AsyncSession, session_dependency(db)]`, and use it for parameters:
    `async def create_user(name: str, session: Session)`.

    An endpoint that streams server-sent events asks for its session inside the generator instead, because the generator starts
    before the head of the response and the commit that belongs to it (P5).

    Args:
        connect: whose session it is.
    """

    async def session() -> S:
        return await db_session(connect)

    return params.Depends(session)
