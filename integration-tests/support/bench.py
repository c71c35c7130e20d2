"""What one test works with: its databases, its connects, the applications that it serves; and the proof at its end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from context_sqla import DBConnect
from contract.drivers import FRAMEWORKS

from .databases import Database, Databases, no_tasks_left
from .postgres import Postgres
from .scenario import Application, Handler, Route, SocketRoute
from .servers import ServerOptions
from .service import Service
from .stacks import Stack


class Bench:
    """A test's workbench; every fixture is a view of it."""

    def __init__(self, stack: Stack, place: Postgres | Path) -> None:
        self.stack = stack
        self.databases = Databases(stack.database, place)
        self._services: list[Service] = []

    async def serve(
        self, *routes: Route | SocketRoute | Handler, options: ServerOptions | None = None, **application: Any
    ) -> Service:
        """Mount routes in the stack's framework and serve them with its server until the test ends.

        Args:
            routes: a handler alone is a route at "/".
            options: what the server is told, where it knows that option.
            application: the other fields of ``Application``; ``connects`` are all that the test has made, unless told otherwise.
        """
        app = self.build(*routes, **application)
        driver = FRAMEWORKS[self.stack.framework].driver()
        told = replace(options or ServerOptions(), workers=self.stack.workers)
        service = Service(app, await driver.start(app, self.stack.server, told))
        self._services.append(service)
        return service

    def build(self, *routes: Route | SocketRoute | Handler, **application: Any) -> Any:
        """Mount routes as ``serve`` does, and return the framework's application without serving it."""
        described = Application(
            [route if isinstance(route, Route | SocketRoute) else Route("/", route) for route in routes],
            **{"connects": tuple(self.databases.connects), **application},
        )
        return FRAMEWORKS[self.stack.framework].driver().build(described)

    async def connect(self, name: str = "db", *, database: Database | None = None, **options: Any) -> DBConnect[Any]:
        """Make a connect, to the first database unless told otherwise; see ``Databases.connect``."""
        return self.databases.connect(database or await self.databases.database(), name, **options)

    async def finish(self, problems: list[str]) -> None:
        """Stop and close everything, and add what was not as it should be to the problems."""
        await self.databases.whole(problems)
        for service in reversed(self._services):
            try:
                async with asyncio.timeout(60):
                    await service.stop()
            except Exception as exc:
                problems.append(f"the server did not stop: {exc!r}")
        await self.databases.gone(problems)


@contextlib.asynccontextmanager
async def bench(stack: Stack, place: Postgres | Path) -> AsyncIterator[Bench]:
    """Run a workbench for the length of the block.

    Raises:
        AssertionError: something was left behind: a connection checked out, a transaction, a task, the context variable.
    """
    work = Bench(stack, place)
    async with no_tasks_left() as problems:
        yield work
        await work.finish(problems)
    if problems:
        raise AssertionError("left behind: " + "; ".join(problems))
