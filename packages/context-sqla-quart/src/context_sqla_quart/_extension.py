"""The unit of work of a Quart application: opened around it, decided where its own error handlers still can answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from inspect import signature
from typing import Any

from context_sqla import DBConnect, run_in_new_ctx
from context_sqla.adapters import BeforeCommitCallback, check_connects, explain, retry_after_header
from context_sqla.errors import ContextSqlaError, SetupError, UnavailableError
from context_sqla_asgi import SCOPE_KEY, Rule, Wire
from context_sqla_asgi import setup as setup_asgi
from quart import Quart, has_request_context, request
from quart.asgi import ASGIHTTPConnection
from quart.wrappers.response import DataBody, IterableBody

_EXTENSION = "context_sqla"
_AFTERWARDS = "context_sqla.afterwards"
# A handler for one of these is the application's own answer; one for every Exception is not.
_ANSWERED = {cls for cls in UnavailableError.__mro__ if issubclass(cls, ContextSqlaError)}


def setup(
    app: Quart,
    *connects: DBConnect[Any],
    should_commit: Rule | None = None,
    before_commit: BeforeCommitCallback | None = None,
) -> None:
    """Give each HTTP request of the application a unit of work, and close the connects at its shutdown (P3, P4, P5, P6).

    The commit comes after all of the application's hooks for the request, so that they may write as well; the application's
    error handlers answer errors of the commit (P4b). `UnavailableError` is answered 503 with `Retry-After` if the application
    has no handler for it.

    Args:
        app: the application, not started yet.
        connects: closed after the application's own `after_serving` and `while_serving`.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.

    Raises:
        SetupError: the application has started, or is set up already.
        TypeError: one of the connects is no `DBConnect`.
    """
    ContextSQLA(app, *connects, should_commit=should_commit, before_commit=before_commit)


class ContextSQLA:
    """Do what `setup` does, as an extension: `app.extensions["context_sqla"]`.

    Args:
        app: the application; without one, call `init_app` where it is made.
        connects: as in `setup`.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.

    Raises:
        SetupError: the application has started, or is set up already.
        TypeError: one of the connects is no `DBConnect`.
    """

    def __init__(
        self,
        app: Quart | None = None,
        *connects: DBConnect[Any],
        should_commit: Rule | None = None,
        before_commit: BeforeCommitCallback | None = None,
    ) -> None:
        self._connects = check_connects(*connects)
        self._options: Any = {"should_commit": should_commit, "before_commit": before_commit}
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Quart, *connects: DBConnect[Any]) -> None:
        """Set an application up; several may share one extension.

        Args:
            app: the application, not started yet.
            connects: closed at this application's shutdown, beside those of the extension.

        Raises:
            SetupError: the application has started, or is set up already.
            TypeError: one of the connects is no `DBConnect`.
        """
        if hasattr(app, "shutdown_event") or getattr(app, "_got_first_request", False):
            raise SetupError("the application has started: call setup(app, ...) where the application is made")
        if _EXTENSION in app.extensions:
            raise SetupError("the application is set up already: call setup(app, ...) once, with all its connects")
        self._install(app, *connects)
        app.extensions[_EXTENSION] = self

    def _install(self, app: Any, *connects: DBConnect[Any]) -> None:  # Any: what is replaced has other types in every version
        app.asgi_app = _around(setup_asgi(app.asgi_app, *self._connects, *connects, **self._options))
        connection = _Patient if "request_task" in signature(ASGIHTTPConnection.handle_messages).parameters else _Cancelled
        app.asgi_http_class = type("Connection", (connection, app.asgi_http_class), {})
        app.finalize_request = _deciding(app)
        app.add_background_task = _afterwards(app)
        app.preprocess_request = _noting(app.preprocess_request)


class _Afterwards:
    """The background work of one request, which waits until the response is over, or on its way if it is a stream."""

    # Defaults of the class: every request has one of these, and few have work.
    jobs: list[Callable[[], Awaitable[Any]]] | None = None
    event: asyncio.Event | None = None
    over: bool = False

    def end(self) -> None:
        self.over = True
        if self.event is not None:
            self.event.set()

    async def run(self) -> None:
        if not self.over:
            self.event = self.event or asyncio.Event()
            await self.event.wait()
        jobs, self.jobs = self.jobs, None
        await run_in_new_ctx(_run_all, jobs or ())


def _around(whole: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Return what stands around the application and its unit."""

    async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
        afterwards = _Afterwards()
        if scope["type"] == "http":
            scope.setdefault(_AFTERWARDS, afterwards)  # a mounted application is part of the response around it
        try:
            await whole(scope, receive, send)
        finally:
            afterwards.end()

    return asgi_app


class _Cancelled(ASGIHTTPConnection):
    """The connection of one request until Quart 0.23: when a server that shuts down cancels it, its two tasks end with it."""

    async def __call__(self, receive: Any, send: Any) -> None:
        try:
            await super().__call__(receive, send)
        except asyncio.CancelledError:
            for task in (self._listener, self._handler):
                task.cancel()
            await asyncio.gather(self._listener, self._handler, return_exceptions=True)
            raise

    # Quart makes tasks of what these return, and takes and awaits those that are made already.
    def handle_messages(self, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._listener = asyncio.get_running_loop().create_task(super().handle_messages(*args))
        return self._listener

    def handle_request(self, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._handler = asyncio.get_running_loop().create_task(super().handle_request(*args))
        return self._handler


class _Patient(ASGIHTTPConnection):
    """The same since Quart 0.23, where a request whose response was given up would last until the client leaves."""

    async def handle_messages(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        listener: Any = asyncio.current_task()
        if not args[2].done():  # most views are done before this has begun
            args[2].add_done_callback(lambda _: listener.cancel())
            await super().handle_messages(*args)


async def _unavailable(error: UnavailableError) -> tuple[str, int, dict[str, str]]:
    """Answer 503 with `Retry-After`: the default handler of `UnavailableError`."""
    return "Service Unavailable", 503, {"Retry-After": retry_after_header(error), "Content-Type": "text/plain; charset=utf-8"}


def _deciding(app: Any) -> Callable[..., Awaitable[Any]]:
    """Return the application's `finalize_request`, which ends with the decision about the unit.

    After every hook, for they may write and set the status; before the response is given to Quart's ASGI part, where an error
    reaches no handler. `after_request` is no place for it: Quart ignores errors there when it answers 500.
    """
    finalize, handle, handlers = app.finalize_request, app.handle_user_exception, app.error_handler_spec[None][None]
    first = len(signature(handle).parameters) - 1  # Quart 0.23 puts the context before all else

    async def handle_user_exception(*args: Any) -> Any:
        # Late, for the application may add its own after setup.
        if not handlers.keys() & _ANSWERED:
            handlers[UnavailableError] = _unavailable
        explain(args[first])  # the unit never sees an error that is answered here
        return await handle(*args)

    async def finalize_request(*args: Any, **options: Any) -> Any:
        response = await finalize(*args, **options)
        scope = _request_of(*args[1 - first : 2 - first]).scope
        wire: Wire | None = scope.get(SCOPE_KEY)
        if wire is None:
            return response
        try:
            await wire.unit.head(response.status_code)
        except Exception as error:  # noqa: BLE001 - P4b: answered as if the view had raised it, or raised again
            scope[_AFTERWARDS].jobs = None
            result = await app.handle_user_exception(*args[:first], error)
            response = await finalize(*args[:first], result, *args[first + 1 :], **options)
            await wire.unit.head(response.status_code)
        wire.decides = True
        # An abstract class is slow to ask.
        if type(body := response.response) is not DataBody and isinstance(body, IterableBody):
            wire.unit.in_body()
            scope[_AFTERWARDS].end()  # a stream may wait for what its background work makes
        return response

    app.handle_user_exception = handle_user_exception
    return finalize_request


def _request_of(context: Any = None) -> Any:
    """Return the request that Quart names, or else the one in which this runs, of which it takes long to ask anything."""
    return request if context is None else context.request


def _afterwards(app: Any) -> Callable[..., None]:
    """Return the application's `add_background_task`: work that is a unit of its own, after the commit (P6)."""
    add = app.add_background_task

    def add_background_task(func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        afterwards: _Afterwards | None = _request_of().scope.get(_AFTERWARDS) if has_request_context() else None
        if afterwards is None or afterwards.over:
            afterwards = _Afterwards()
            afterwards.over = True
        jobs = afterwards.jobs = afterwards.jobs or []
        jobs.append(partial(app.ensure_async(func), *args, **kwargs))
        if len(jobs) == 1:
            add(afterwards.run)

    return add_background_task


async def _run_all(jobs: Iterable[Callable[[], Awaitable[Any]]]) -> None:
    for job in jobs:
        await job()


def _noting(preprocess: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Put the names of the path's parameters where the unit's label looks for them, before all hooks."""

    def preprocess_request(*args: Any) -> Awaitable[Any]:
        this = _request_of(*args[:1])
        this.scope["path_params"] = this.view_args or this.scope.get("path_params", {})  # a mount has those of its own
        return preprocess(*args)

    return preprocess_request
