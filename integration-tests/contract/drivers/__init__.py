"""The frameworks of the contract: a driver mounts an ``Application``, serves it, and asserts nothing."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from support.scenario import Application, Feature
from support.servers import Running, ServerOptions

ASGI_SERVERS = ("uvicorn", "hypercorn", "granian")


class Driver(Protocol):
    """What a driver's module offers."""

    def build(self, application: Application) -> Any:
        """Make the framework's application, with the adapter's ``setup`` called on it."""

    async def start(self, app: Any, server: str, options: ServerOptions) -> Running:
        """Serve it on a loopback port."""


@dataclass(frozen=True)
class Framework:
    """One row: the module of the driver, its servers (the default one first), and what the framework lacks, with the reason."""

    module: str
    servers: Sequence[str]
    lacks: Mapping[Feature, str] = field(default_factory=dict)

    def driver(self) -> Driver:
        """Import the driver, and with it the framework.

        Raises:
            ImportError: the framework or its adapter is not installed.
        """
        driver: Driver = importlib.import_module(f"contract.drivers.{self.module}")
        return driver


FRAMEWORKS: Mapping[str, Framework] = {
    "asgi": Framework(
        "asgi",
        ASGI_SERVERS,
        {
            Feature.COMMIT_ERROR_HANDLERS: "the middleware stands outside the application, whose error handling is over by then",
            Feature.SYNC_HANDLERS: "an ASGI application is a coroutine function",
            Feature.GZIP: "bare ASGI has no such middleware",
            Feature.CORS: "bare ASGI has no such middleware",
            Feature.BASE_HTTP: "bare ASGI has no such middleware",
        },
    ),
    "starlette": Framework("starlette", ASGI_SERVERS),
    "fastapi": Framework("fastapi", ASGI_SERVERS),
    "sanic": Framework(
        "sanic",
        ("sanic", "uvicorn", "hypercorn"),
        {
            Feature.BACKGROUND_UNIT: "Sanic runs nothing after a response: `add_task(run_in_new_ctx(...))`, once it is decided",
            Feature.GZIP: "Sanic has no such middleware",
            Feature.CORS: "Sanic has no such middleware; its extension package has",
            Feature.BASE_HTTP: "Sanic has no middleware around the handler",
        },
    ),
}
