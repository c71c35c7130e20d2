"""FastAPI, with ``context_sqla_fastapi.setup``."""

from context_sqla_fastapi import setup
from fastapi import FastAPI
from support.scenario import Application, Route

from .starlette import endpoint, finish, lifespan, socket_endpoint, start

__all__ = ["build", "start"]


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
