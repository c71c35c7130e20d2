"""FastAPI, with ``context_sqla_fastapi.setup``."""

from pathlib import Path
from typing import Any

from context_sqla_fastapi import add_fastapi_http_db_session_middleware, setup
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from support.scenario import Application, Handler, Route

from .asgi import Between, Unfinished
from .starlette import endpoint, finish, lifespan, post, socket_endpoint, start

__all__ = ["build", "file", "mounted", "post", "start", "twice", "unfinished"]


def build(application: Application) -> FastAPI:
    """Make the application."""
    app = FastAPI(lifespan=lifespan(application))
    for route in application.routes:
        if isinstance(route, Route):
            app.add_api_route(route.path, endpoint(route.handler), methods=list(route.methods), response_model=None)
        else:
            app.add_api_websocket_route(route.path, socket_endpoint(route.handler))
    finish(app, application, setup)
    return app


def file(path: Path, work: Any, connect: Any) -> FastAPI:
    """Make an application that does the work and answers with a file."""
    app = FastAPI()

    @app.get("/", response_class=FileResponse)
    async def run() -> Path:
        await work()
        return path

    setup(app, connect)
    return app


def unfinished(write: Any, connect: Any) -> FastAPI:
    """Make an application whose response forgets its last message."""

    class Forgetful(Unfinished, Response):
        pass

    app = FastAPI()

    @app.get("/", response_class=Forgetful)
    async def run() -> Any:
        await write("handler")
        return Forgetful(write)

    setup(app, connect)
    return app


def twice(handler: Handler, write: Any) -> FastAPI:
    """Add the middleware class twice, and no ``setup``."""
    app = FastAPI()
    app.add_api_route("/", endpoint(handler), methods=["POST"], response_model=None)
    add_fastapi_http_db_session_middleware(app)
    app.add_middleware(Between, write=write)
    add_fastapi_http_db_session_middleware(app)
    return app


def mounted(handler: Handler, write: Any) -> FastAPI:
    """Mount an application in another."""
    outer = FastAPI()
    outer.mount("/", Between(build(Application([Route("/", handler)])), write))
    setup(outer)
    return outer
