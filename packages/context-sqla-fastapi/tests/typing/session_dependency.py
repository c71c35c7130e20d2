"""What type checkers know; checked, never run."""

from typing import Annotated, assert_type

from context_sqla import DBConnect
from context_sqla.adapters import AsyncSession
from context_sqla_fastapi import session_dependency, setup
from fastapi import FastAPI, params


class OwnSession(AsyncSession):
    """A session class of the application's own."""


db = DBConnect.from_url("sqlite+aiosqlite://")
own = DBConnect.from_url("sqlite+aiosqlite://", session_class=OwnSession)
Session = Annotated[AsyncSession, session_dependency(db)]
Own = Annotated[OwnSession, session_dependency(own)]
app = FastAPI()
setup(app, db, own)


@app.get("/")
async def endpoint(session: Session, other: Own) -> None:
    assert_type(session, AsyncSession)
    assert_type(other, OwnSession)


assert_type(session_dependency(own), params.Depends)
