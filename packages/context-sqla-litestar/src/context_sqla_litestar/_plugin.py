"""The plugin: one part around the application, and around each handler one, or two with the route's middleware in between."""

from functools import partial
from types import MethodType
from typing import Any, ClassVar

from context_sqla import DBConnect, db_session
from context_sqla.adapters import AsyncSession, BeforeCommitCallback, check_connects, close_connects, explain, retry_after_header
from context_sqla.errors import ContextSqlaError, SetupError, UnavailableError
from context_sqla_asgi import SCOPE_KEY, ASGIHTTPDBSessionMiddleware, CommitPoint, Rule, Wire
from litestar import Litestar, MediaType, Request, Response
from litestar.config.app import AppConfig
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from litestar.plugins.base import ReceiveRoutePlugin  # Litestar 2.12 does not show it in litestar.plugins
from litestar.routes import ASGIRoute, BaseRoute, HTTPRoute
from litestar.utils.scope.state import ScopeState

# A handler for one of these is the application's own answer; one for every Exception is not.
_ANSWERED = [cls for cls in UnavailableError.__mro__ if issubclass(cls, ContextSqlaError)]
_FAILED = "context_sqla.failed"


def setup(
    app: Litestar | AppConfig,
    *connects: DBConnect[Any],
    should_commit: Rule | None = None,
    before_commit: BeforeCommitCallback | None = None,
) -> None:
    """Do for an application, or the configuration of one, what `ContextSQLAPlugin` does.

    Args:
        app: the application, not started yet; or the configuration that `on_app_init` receives.
        connects: closed after the application's own `on_shutdown`.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.

    Raises:
        SetupError: the application has started, or is set up already.
        TypeError: one of the connects is no `DBConnect`.
    """
    plugin = ContextSQLAPlugin(*connects, should_commit=should_commit, before_commit=before_commit)
    if isinstance(app, AppConfig):
        _refuse_second(any(isinstance(other, ContextSQLAPlugin) for other in app.plugins))
        app.plugins.append(plugin)  # Litestar calls its `on_app_init` when those before it are done
        return
    if getattr(app.event_emitter, "_exit_stack", None) is not None:
        raise SetupError("the application has started: call setup(app, ...) where the application is made")
    _refuse_second(isinstance(app, _Surrounded))
    plugin.surround(app)
    for route in app.routes:
        plugin.receive_route(route)
    app.asgi_router.__init__(app=app)  # type: ignore[misc]  # the stacks of the routes are built once more
    app.asgi_router.construct_routing_trie()


def provide_session(connect: DBConnect[Any]) -> Provide:
    """Return a dependency: the session of the unit of work in which a handler runs.

    Args:
        connect: the database.
    """

    async def session() -> AsyncSession:
        return await db_session(connect)

    return Provide(session)


class ContextSQLAPlugin(ReceiveRoutePlugin):
    """Give each HTTP request of the application a unit of work, and close the connects at its shutdown (P3, P4, P5, P6).

    The unit is opened outside everything, and committed inside all middleware, compression and response caching. Errors of the
    commit go through `exception_handlers` and `after_exception` as if the handler had raised them (P4b). `UnavailableError` is
    answered 503 with `Retry-After` if the application has no handler for it.

    Args:
        connects: closed after the application's own `on_shutdown`.
        should_commit: takes the status; replaces the rule "below 400 commits".
        before_commit: awaited before each session's commit; refuses it by raising.
        session_key: the name under which handlers may ask for the first connect's session; see `provide_session` for others.

    Raises:
        ValueError: a `session_key` without a connect.
        TypeError: one of the connects is no `DBConnect`.
    """

    def __init__(
        self,
        *connects: DBConnect[Any],
        should_commit: Rule | None = None,
        before_commit: BeforeCommitCallback | None = None,
        session_key: str | None = None,
    ) -> None:
        if session_key is not None and not connects:
            raise ValueError("session_key names the session of the first connect, and there is no connect")
        self._connects = check_connects(*connects)
        self._around = partial(ASGIHTTPDBSessionMiddleware, before_commit=before_commit, should_commit=should_commit)
        self._session_key = session_key

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Offer the session to handlers; Litestar calls this.

        Raises:
            SetupError: the application has another plugin of this kind.
        """
        _refuse_second(sum(isinstance(plugin, ContextSQLAPlugin) for plugin in app_config.plugins) > 1)
        if self._session_key is not None:
            app_config.dependencies.setdefault(self._session_key, provide_session(self._connects[0]))
        return app_config

    def receive_route(self, route: BaseRoute) -> None:
        """Put the part that commits around the route's handler; Litestar calls this before it builds the route's middleware."""
        owner: Any = route  # HTTP routes have several handlers, those of websockets and ASGI applications have one
        app = (owner.route_handlers[0] if isinstance(route, HTTPRoute) else owner.route_handler).app
        if not isinstance(app, _Surrounded):
            self.surround(app)
        # A route has slots, and its `handle` is what stands inside all middleware. Litestar asks for it where it builds that.
        if isinstance(route, HTTPRoute):
            route.__class__ = _HTTPRoute
        elif isinstance(route, ASGIRoute):
            route.__class__ = _ASGIRoute

    def surround(self, app: Litestar) -> None:
        """Open the units around the application, and do the rest that takes its final lists; for `setup`."""
        cls = type(app)

        async def close() -> None:
            await close_connects(*self._connects)

        # Nothing that an application may be given stands around its answers to errors and unknown paths, but its own call.
        inner: Any = MethodType(cls.__call__, app)  # Litestar's types of scopes and messages are narrower than ASGI's
        names = {"__slots__": (), "__module__": cls.__module__, "__call__": self._around(inner).__call__}
        app.__class__ = type(cls.__name__, (_Surrounded, cls), names)
        app.middleware.insert(0, DefineMiddleware(_outermost, alone=not app.before_send))  # those see what is committed
        app.exception_handlers.setdefault(UnavailableError, _unavailable)
        app.on_shutdown.append(close)


def _refuse_second(found: bool) -> None:
    if found:
        raise SetupError("the application is set up already: use one ContextSQLAPlugin or setup(app, ...), with all its connects")


def _unavailable(request: Request[Any, Any, Any], exc: Exception) -> Response[Any]:
    """Answer 503 with `Retry-After`, unless the application answers all errors of this library: the default handler."""
    handler: Any = request.scope.get("route_handler")
    own = handler.resolve_exception_handlers() if handler is not None else request.app.exception_handlers
    for cls in _ANSWERED[1:]:
        if cls in own:
            return own[cls](request, exc)
    headers = {"retry-after": retry_after_header(exc)} if isinstance(exc, UnavailableError) else None
    return Response("Service Unavailable", status_code=503, headers=headers, media_type=MediaType.TEXT)


async def _explain(error: Exception, scope: Any, wire: Wire) -> bool:
    explain(error)  # its handlers and its log are next, and nothing is raised to the part around the application
    return False


class _Point(CommitPoint):
    """Decide here; Litestar's own error handling, further out, has not seen the head and answers errors of the commit."""

    answer: "ClassVar[Any]" = staticmethod(_explain)


class _Alone(_Point):
    """The same for a route without middleware, where nothing comes between here and the application's wire: that decides.

    Litestar answers errors this far inside only if there is middleware, which is to see the answers. Errors of the commit and of
    what an exception handler has written need it as well (P4b): who fails comes by what Litestar has built around the route.

    Args:
        app: the route's handler.
        answering: lets the application's exception handlers answer what is in the scope under `_FAILED`.
    """

    def __init__(self, app: Any, answering: Any) -> None:
        super().__init__(app)
        self._answering = _Point(answering)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        wire: Wire | None = scope.get(SCOPE_KEY)
        if wire is None:
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
            if wire.failed is not None:
                raise wire.failed  # noqa: TRY301  # P4: whatever the application made of it
        except Exception as error:
            if wire.unit.phase != "handler":
                _note(wire, error)
                raise
            explain(wire.failed or error)
            scope[_FAILED], wire.failed = wire.failed or error, None
            ScopeState.from_scope(scope).response_started = False  # Litestar has seen the head that the wire has kept back
            await self._answering(scope, receive, send)


def _note(wire: Wire, error: Exception) -> None:
    if wire.unit.phase == "stream":
        wire.failed = wire.failed or error  # P5: whatever Litestar makes of it, this body does not end well
    else:
        wire.late = error  # P6


async def _fail(scope: Any, receive: Any, send: Any) -> None:
    raise scope.pop(_FAILED)


def _outermost(app: Any, *, alone: bool) -> Any:
    """Return what stands around a route's middleware, and in the place of both points if it has none."""
    point = getattr(app, "app", None)
    if not isinstance(point, _Point) or not alone:
        return _Point(app)
    app.app = _fail  # what answers the errors of this route, and from now on nothing else
    return _Alone(point.app, app)


class _HTTPRoute(HTTPRoute):
    __slots__ = ()
    handle: Any = property(lambda self: _Point(MethodType(HTTPRoute.handle, self)))


class _ASGIRoute(ASGIRoute):
    __slots__ = ()
    handle: Any = property(lambda self: _Point(MethodType(ASGIRoute.handle, self)))


class _Surrounded:
    __slots__ = ()
