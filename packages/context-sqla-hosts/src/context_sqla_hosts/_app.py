"""The same endpoints as an ASGI application, to be mounted in another one."""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from ._monitor import Hosts
from ._reply import Reply
from ._table import Table

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class StatusApp:
    """Answer the sidecar's endpoints inside an application: `app.mount("/postgres", StatusApp(hosts))`.

    It says which hosts there are to everybody who can ask: mount it where only your own can. Mounted, it answers from the monitor
    that the application has started; served alone, it starts the monitor itself.

    Args:
        hosts: the monitor.
        max_lag_ms: the limit of `/sync_by_*` where a request has none.
        max_lag_bytes: the same for bytes.
        geo: the region of this process.
        geos: the regions of the hosts.
    """

    def __init__(
        self,
        hosts: Hosts,
        *,
        max_lag_ms: int = 1000,
        max_lag_bytes: int = 1_000_000,
        geo: str | None = None,
        geos: Mapping[str, str] | None = None,
    ) -> None:
        self.hosts: Hosts = hosts
        self._table = Table(hosts, max_lag_ms=max_lag_ms, max_lag_bytes=max_lag_bytes, geo=geo, geos=geos)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        else:
            self._table.history.start()
            await self._answer(scope, send)

    async def _answer(self, scope: Scope, send: Send) -> None:
        accept = b", ".join(value for name, value in scope["headers"] if name.lower() == b"accept")
        query = scope.get("query_string", b"").decode("latin-1")
        found = self._table.find(scope["method"], _path(scope), query, accept.decode("latin-1"))()
        reply = found if isinstance(found, Reply) else await found()
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        started = not self.hosts.is_watching
        try:
            if started:
                self.hosts.start()
        except Exception as exc:  # a server takes an error without this message for an application that has no lifespan
            await send({"type": "lifespan.startup.failed", "message": str(exc)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._table.history.stop()
        if started:
            await self.hosts.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def _path(scope: Scope) -> str:
    """Return the path below the place where this is mounted: with and without a slash at its end, and whoever cuts it off."""
    path: str = scope["path"]
    root = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    return path or "/"
