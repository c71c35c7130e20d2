"""An application for two workers: python served.py PORT FOLDER; each worker leaves notes in the folder."""

import asyncio
import os
import sys
from pathlib import Path

from context_sqla import DBConnect, db_session
from context_sqla_sanic import setup
from sanic import Request, Sanic, text
from sanic.response import HTTPResponse
from sqlalchemy import text as sql

PORT, FOLDER = int(sys.argv[1]), Path(sys.argv[2])


class Noted(DBConnect):
    """Says when it is closed, and by which worker."""

    async def close(self, **options: float) -> None:
        """Close it."""
        await super().close(**options)
        note("closed")


def note(what: str) -> None:
    """Leave a note."""
    (FOLDER / f"{what} {os.getpid()}").touch()


db = Noted.from_url(f"sqlite+aiosqlite:///{FOLDER}/app.db", name="db")
app = Sanic("served", configure_logging=False)
setup(app, db)
app.after_server_start(lambda app: note("started"))
app.before_server_stop(lambda app: note("stopping"))


@app.post("/restart/<name>")
async def restart(request: Request, name: str) -> HTTPResponse:
    """Let the managing process start the worker of this name again."""
    request.app.m.restart(name)
    return text("asked")


@app.post("/<name>")
async def create(request: Request, name: str) -> HTTPResponse:
    session = await db_session(db)
    await session.execute(sql("INSERT INTO item (name) VALUES (:name)"), {"name": name})
    if name == "slow":
        await session.commit()  # SQLite has one writer at a time
        note("arrived")
        while not (FOLDER / "go on").exists():
            await asyncio.sleep(0.01)
        await session.execute(sql("INSERT INTO item (name) VALUES ('slow again')"))
    if name == "open":
        note(f"open {os.environ['SANIC_WORKER_NAME']}")
        await asyncio.Event().wait()
    return text(str(os.getpid()))


if __name__ == "__main__":
    app.run(host="127.0.0.1", port=PORT, workers=2, access_log=False, motd=False)
