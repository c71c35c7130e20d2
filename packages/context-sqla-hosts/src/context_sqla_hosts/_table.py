"""The endpoints: those of pg-status 1.0.0 and 2.2.0, and ours. The server and the ASGI application ask here."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from ._exposition import CONTENT_TYPE, expose
from ._history import History, shown_lag
from ._monitor import Hosts
from ._page import render
from ._position import format_lsn
from ._query import Limits, Query, QueryError, prefers_json
from ._reply import NO_METHOD, NOT_FOUND, NOT_READY, OPTIONS, Later, Reply, error_reply, json_reply, text_reply
from ._selection import Pick, Picker, Selection, pick_primary
from ._snapshot import HostStatus, Snapshot

Answer: TypeAlias = Callable[[], Reply | Later]
"""Answers one form of a request. It may be kept, and called again for the same request."""

_KNOWN = 1024  # answers that are kept
_CSP = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_PAGE_HEADERS = (("Content-Security-Policy", _CSP), ("Referrer-Policy", "no-referrer"))
_BY_ACCEPT = (("Vary", "Accept"),)


class Table:
    """What is answered to which request.

    Args:
        hosts: the monitor.
        max_lag_ms: the limit of `/sync_by_*` where a request has none, and of `sync_by_time`.
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
        self.history: History = History(hosts)
        self._max_lag_ms = max_lag_ms
        self._max_lag_bytes = max_lag_bytes
        self._geos = {hosts.key(host): place for host, place in (geos or {}).items()}
        self._picker = Picker(hosts, geo, self._geos)
        self._names = _names(hosts)
        self._replies: dict[tuple[str | None, bool, bool], Reply] = {}
        self._turns: dict[str, int] = {}
        self._known: dict[tuple[str, str, bool], Answer] = {}
        self._one: dict[str, Callable[[Query, bool], Answer]] = {  # host, as text or JSON
            "/master": self._primary,
            "/primary": self._primary,
            "/replica": self._replica,
            "/sync_by_time": self._by_time,
            "/sync_by_bytes": self._by_bytes,
            "/sync_by_time_or_bytes": self._by_time_or_bytes,
            "/sync_by_time_and_bytes": self._by_time_and_bytes,
            "/most_sync_by_bytes": self._closest,
        }
        self._known_hosts: dict[str, Callable[[Query], Reply]] = {  # what needs a first look at each of them
            "/replicas_info": self._replicas_info,
            "/hosts": self._hosts,
            "/status": self._status,
            "/health/primary": self._healthy_primary,
            "/health/replica": self._healthy_replica,
            "/ready": _ok,
        }
        self._always: dict[str, Callable[[Query], Reply]] = {
            "/": self._page,
            "/live": _ok,
            "/metrics": self._metrics,
            "/version": _version,
        }

    def find(self, method: str, path: str, query: str, accept: str) -> Answer:
        """Return what answers a request.

        Args:
            method: GET, HEAD or OPTIONS.
            path: decoded or not; none of ours has anything to decode.
            query: what follows the question mark, as it came.
            accept: the header, "" where there is none.
        """
        if method not in ("GET", "HEAD"):
            return lambda: OPTIONS if method == "OPTIONS" else NO_METHOD
        key = (path, query, prefers_json(accept))
        answer = self._known.get(key)
        if answer is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            answer = self._known[key] = self._find(*key)
        return answer

    def _find(self, path: str, query: str, json: bool) -> Answer:
        try:
            asked = Query(query)
            if (select := self._one.get(path)) is not None:
                return select(asked, json)
        except QueryError as exc:
            reply = error_reply(str(exc), 400)
            return self._ready(lambda: reply)
        if (always := self._always.get(path)) is not None:
            return lambda: always(asked)
        if (described := self._known_hosts.get(path)) is not None:
            return self._ready(lambda: described(asked))
        return lambda: NOT_FOUND

    def _ready(self, answer: Callable[[], Reply]) -> Answer:
        """Answer as soon as each host was tried once; before that nothing is known, and no query is looked at."""
        return lambda: answer() if self.hosts.snapshot().decided else NOT_READY

    # One host

    def _primary(self, query: Query, json: bool) -> Answer:
        return self._select(query, json, "master", pick_primary, wanted="primary")

    def _replica(self, query: Query, json: bool) -> Answer:
        return self._select(query, json, "replica", self._picker.replica(query.limits(None, None)))

    def _by_time(self, query: Query, json: bool) -> Answer:
        asked = query.limits(self._max_lag_ms, None)
        limits = Limits(lag=asked.lag, lsn=asked.lsn, timeline=asked.timeline)
        return self._select(query, json, "sync_by_time", self._picker.replica(limits))

    def _by_bytes(self, query: Query, json: bool) -> Answer:
        return self._select(query, json, "sync_by_bytes", self._picker.replica(self._limits_in_bytes(query)))

    def _by_time_or_bytes(self, query: Query, json: bool) -> Answer:
        limits = query.limits(self._max_lag_ms, self._max_lag_bytes, "or")
        return self._select(query, json, "sync_by_time_or_bytes", self._picker.replica(limits))

    def _by_time_and_bytes(self, query: Query, json: bool) -> Answer:
        limits = query.limits(self._max_lag_ms, self._max_lag_bytes)
        return self._select(query, json, "sync_by_time_and_bytes", self._picker.replica(limits))

    def _closest(self, query: Query, json: bool) -> Answer:
        return self._select(query, json, "most_sync_by_bytes", self._picker.closest(self._limits_in_bytes(query)))

    def _limits_in_bytes(self, query: Query) -> Limits:
        asked = query.limits(None, self._max_lag_bytes)
        return Limits(lag_bytes=asked.lag_bytes, lsn=asked.lsn, timeline=asked.timeline)

    def _select(self, query: Query, json: bool, policy: str, pick: Pick, *, wanted: str = "replica") -> Answer:
        port, wait = query.is_set("port"), query.wait()
        reply = partial(self._reply, json, port)
        return Selection(self.hosts, pick, reply, wanted=wanted, wait=wait, policy=policy, turns=self._turns)

    def _reply(self, json: bool, port: bool, host: str | None) -> Reply:
        key = (host, json, port)
        if key not in self._replies:
            status = 404 if host is None else 200
            name = host if port or host is None else self._names[host]
            made = json_reply({"host": name}, status, headers=_BY_ACCEPT) if json else None
            self._replies[key] = made or text_reply(name or "", status, headers=_BY_ACCEPT)
        return self._replies[key]

    # All hosts

    def _replicas_info(self, _query: Query) -> Reply:
        return json_reply([{"host": self._names[status.host]} for status in self.hosts.snapshot().replicas])

    def _hosts(self, query: Query) -> Reply:
        detail = query.is_set("detail")
        snapshot, now = self.hosts.snapshot(), self.hosts.clock()
        return json_reply([{"host": self._names[s.host], **self._describe(s, snapshot, now, detail=detail)} for s in snapshot])

    def _status(self, query: Query) -> Reply:
        snapshot, wanted = self.hosts.snapshot(), query.text("host")
        if wanted is None:
            return error_reply("Get parameter 'host' wasn't passed", 400)
        status = self._named(wanted, snapshot)
        if status is None:
            return NOT_FOUND
        return json_reply(self._describe(status, snapshot, self.hosts.clock(), detail=query.is_set("detail")))

    def _named(self, name: str, snapshot: Snapshot) -> HostStatus | None:
        for status in snapshot:
            if name in (status.host, self._names[status.host], self.hosts.address(status.host).name):
                return status
        return None

    def _describe(self, status: HostStatus, snapshot: Snapshot, now: float, *, detail: bool) -> dict[str, Any]:
        alive, master = status.state in ("up", "suspect"), status.host == snapshot.primary
        lag = shown_lag(status, snapshot, now)
        described: dict[str, Any] = {
            **self._places(status),
            "master": master,
            "alive": alive,
            "lag_ms": None if lag is None else math.ceil(lag * 1000),
            "sync_by_time": master or (lag is not None and self._picker.is_within_time(status, self._max_lag_ms / 1000, now)),
            "lag_bytes": status.lag_bytes if alive else None,
            "sync_by_bytes": master or (lag is not None and self._picker.is_within_bytes(status, self._max_lag_bytes, now)),
            "lsn": format_lsn(status.lsn) if alive and status.lsn is not None else None,
        }
        return described | (_details(status, now) if detail else {})

    def _places(self, status: HostStatus) -> dict[str, Any]:
        """Return where a host is, as pg-status 2.3 has it; where nobody said it of any host, 2.2.0 is what is answered."""
        if not self._geos and all(other.locality is None for other in self.hosts.snapshot()):
            return {}
        return {"dc": status.locality, "geo": self._geos.get(status.host)}

    def _healthy_primary(self, query: Query) -> Reply:
        return self._health(query, primary=True)

    def _healthy_replica(self, query: Query) -> Reply:
        return self._health(query, primary=False)

    def _health(self, query: Query, *, primary: bool) -> Reply:
        """Answer by the status alone, for load balancers: 200 or 503."""
        snapshot, wanted = self.hosts.snapshot(), query.text("host")
        if wanted is None:
            return error_reply("Get parameter 'host' wasn't passed", 400)
        status = self._named(wanted, snapshot)
        if status is None:
            return NOT_FOUND
        try:
            limits = query.limits(None, None)
        except QueryError as exc:
            return error_reply(str(exc), 400)
        replica = self._picker.qualifies(status, limits, snapshot, self.hosts.clock())
        return text_reply("OK") if (status.host == snapshot.primary if primary else replica) else Reply(503)

    # For people and for Prometheus

    def _metrics(self, _query: Query) -> Reply:
        return Reply(200, expose(self.hosts.snapshot(), self.hosts.metrics, self.hosts.clock()).encode(), CONTENT_TYPE)

    def _page(self, _query: Query) -> Reply:
        self.history.start()
        page = render(self.hosts.snapshot(), self.history.moments(), self.hosts.clock())
        return Reply(200, page.encode(), "text/html; charset=utf-8", _PAGE_HEADERS)


def _ok(_query: Query) -> Reply:
    return text_reply("OK")


def own_version() -> str:
    """Return the version of this distribution."""
    from importlib.metadata import version  # a few megabytes that hardly anybody asks for

    return version("context-sqla-hosts")


def _version(_query: Query) -> Reply:
    return text_reply(own_version())


def _details(status: HostStatus, now: float) -> dict[str, Any]:
    age = status.age(now)
    return {
        "address": status.host,
        "state": status.state,
        "role": status.role,
        "timeline": status.timeline,
        "fenced": status.fenced,
        "foreign": status.foreign,
        "age_ms": None if age is None else round(age * 1000),
        "error": status.error,
    }


def _names(hosts: Hosts) -> dict[str, str]:
    """Return how hosts are called in answers: as they were written, with the port only where two have one name."""
    plain = {status.host: hosts.address(status.host).name for status in hosts.snapshot()}
    every = list(plain.values())
    return {host: name if every.count(name) == 1 else host for host, name in plain.items()}
