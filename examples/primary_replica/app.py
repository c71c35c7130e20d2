"""FastAPI on a PostgreSQL cluster: writes go to the primary, reads to replicas.

A visitor reads what that visitor wrote. `python cluster.py` starts three servers and this
application, with all of these set:

CONTEXT_SQLA_HOSTS_HOSTS=db1,db2,db3     the servers, in any order; roles are found out
CONTEXT_SQLA_HOSTS_USER, ..._PASSWORD    of the monitor, which needs pg_monitor
DATABASE_URL=postgresql+asyncpg://...    of the application; the host in it is replaced
TOKEN_KEYS=new,old                       16 bytes or more each; the first signs
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from context_sqla import DBConnect, db_context, db_session
from context_sqla_fastapi import setup
from context_sqla_hosts import (
    Hosts,
    ReadYourWrites,
    ReadYourWritesMiddleware,
    StatusApp,
    at_least,
    is_host_failure,
    primary,
)
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# --------------------------------------------------------------------------- the database

hosts = Hosts.from_env()

db = DBConnect.from_url(
    os.environ["DATABASE_URL"],
    name="notes",
    # Seconds for which a request waits for a primary; then it is a 503.
    before_create_session_handler=primary(hosts, wait=5),
)
reads = DBConnect.from_url(
    os.environ["DATABASE_URL"],
    name="notes, reading",
    # What the visitor wrote, and of others what is 10 s old.
    before_create_session_handler=at_least(hosts, max_lag=10),
    idle_host_grace=60,  # replicas take turns: the connections to all of them are kept
)
writes = ReadYourWrites(hosts, db, keys=os.environ["TOKEN_KEYS"].split(","))


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"

    key: Mapped[str] = mapped_column(primary_key=True)
    author: Mapped[str] = mapped_column(index=True)
    text: Mapped[str]


# ------------------------------------------------------------------------ the application


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with hosts:  # the monitor lives in the application's event loop
        async with db_context():
            connection = await (await db_session(db)).connection()
            await connection.run_sync(Base.metadata.create_all)
        yield


app = FastAPI(title="context-sqla with a primary and replicas", lifespan=lifespan)
setup(app, db, reads)  # a unit of work per request; both connects are closed at shutdown
# Last, so that it stands outside of the commit.
app.add_middleware(ReadYourWritesMiddleware, writes=writes)
# A page, /metrics, /hosts; where strangers can reach it, leave it out.
app.mount("/postgres", StatusApp(hosts))


class NoteIn(BaseModel):
    author: str
    text: str


@app.put("/notes/{key}", status_code=201)
async def write(key: str, note: NoteIn, response: Response) -> dict[str, Any]:
    """Write on the primary.

    The client chooses the key, so that it can ask again where the outcome is unknown.
    """
    session = await db_session(db)
    row = insert(Note).values(key=key, author=note.author, text=note.text)
    if await session.scalar(row.on_conflict_do_nothing().returning(Note.key)) is None:
        response.status_code = 200  # it is there already
    return {"key": key, "server": await session.scalar(select(func.inet_server_port()))}


@app.get("/notes/{key}")
async def read(key: str) -> dict[str, Any]:
    """Read on a replica: one that has what this visitor wrote, or else the primary."""
    session = await db_session(reads)
    query = select(Note, func.inet_server_port()).where(Note.key == key)
    found = (await session.execute(query)).one_or_none()
    if found is None:
        raise HTTPException(404, "there is no such note")
    note, server = found
    return {"key": key, "author": note.author, "text": note.text, "server": server}


@app.get("/notes")
async def list_notes(author: str) -> list[str]:
    session = await db_session(reads)
    query = select(Note.key).where(Note.author == author).order_by(Note.key)
    return list(await session.scalars(query))


@app.get("/ready")
async def ready() -> dict[str, Any]:
    """Answer 503 while there is no server to read from; without a primary, reads go on."""
    await reads.ping(timeout=1)
    return {"primary": hosts.snapshot().primary}


@app.exception_handler(DBAPIError)
@app.exception_handler(OSError)
async def server_was_lost(request: Request, exc: Exception) -> JSONResponse:
    """Tell the client to ask again when a server died under its request.

    Whether a write was done is not known: its key helps.
    """
    if not is_host_failure(exc):
        raise exc
    answer = {"detail": "the database was lost; ask again"}
    return JSONResponse(answer, 503, headers={"Retry-After": "1"})


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")), log_level="warning")
