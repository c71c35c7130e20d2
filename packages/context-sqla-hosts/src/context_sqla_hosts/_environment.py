"""The settings that come from environment variables: our own, and those of pg-status 1.0.0 and 2.2.0."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_OURS = "CONTEXT_SQLA_HOSTS_"
_THEIRS = "pg_status__"
_SPLIT_BRAIN = ("fence", "refuse", "first")
_LEVELS = ("debug", "info", "warning", "warn", "error", "fatal")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says; its repr shows no password (P20).

    Args:
        hosts: each with its port, where one is given.
        options: the keyword arguments of `Hosts`.
        listen: where the sidecar listens.
        max_lag_ms: of the endpoints that are asked without a limit.
        max_lag_bytes: the same.
        geo: the region of this process.
        geos: the regions of the hosts.
        log_level: the least severe that is logged.
        log_format: "text" or "json".
    """

    hosts: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    listen: str = "127.0.0.1:8000"
    max_lag_ms: int = 1000
    max_lag_bytes: int = 1_000_000
    geo: str | None = None
    geos: Mapping[str, str] = field(default_factory=dict)
    log_level: str = "info"
    log_format: str = "text"


def read_environment(environ: Mapping[str, str]) -> Settings:
    """Read the variables; ours, `CONTEXT_SQLA_HOSTS_*`, win over those of pg-status, `pg_status__*`.

    Raises:
        ValueError: one of them cannot be used; it is named, its value is not repeated (P20).
    """
    reader = _Reader(environ)
    hosts = _hosts(reader)
    max_lag_ms = reader.whole("MAX_LAG_MS", "sync_max_lag_ms", default=1000)
    options = {**_login(reader), **_pace(reader, max_lag_ms)}
    if (current := reader.place("dc")) and (places := reader.places("dc", hosts)):
        options |= {"locality": current, "localities": places}
    elif places := reader.places("dc", hosts):
        options["localities"] = places
    if urls := [url.strip() for url in (reader.text("PATRONI") or "").split(",") if url.strip()]:
        if len(urls) != len(hosts):
            raise ValueError(f"{_OURS}PATRONI has one URL for each host, in their order")
        options["patroni"] = dict(zip(hosts, urls, strict=True))
    return Settings(
        hosts=tuple(hosts),
        options=options,
        listen=_listen(reader),
        max_lag_ms=max_lag_ms,
        max_lag_bytes=reader.whole("MAX_LAG_BYTES", "sync_max_lag_bytes", default=1_000_000),
        geo=reader.place("geo"),
        geos=reader.places("geo", hosts),
        log_level=reader.one_of(_LEVELS, "LOG_LEVEL", "log_level") or "info",
        log_format=reader.one_of(("text", "json"), "LOG_FORMAT", "log_format") or "text",
    )


class _Reader:
    """Finds variables: the first name is one of ours, the others are pg-status's."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.drop_in = bool(environ.get(f"{_THEIRS}hosts"))  # then pg-status's defaults are meant

    def find(self, *names: str, strip: bool = True) -> tuple[str, str] | None:
        """Return the first variable of these that is there and not empty, with its value."""
        for index, name in enumerate(names):
            full = f"{_THEIRS if index else _OURS}{name}"
            value = self.environ.get(full, "") if name else ""
            if value := value.strip() if strip else value:
                return full, value
        return None

    def text(self, *names: str) -> str | None:
        found = self.find(*names)
        return found[1] if found else None

    def one_of(self, allowed: Sequence[str], *names: str) -> str | None:
        found = self.find(*names)
        if found and found[1].lower() not in allowed:
            raise ValueError(f"{found[0]} is one of: {', '.join(allowed)}")
        return found[1].lower() if found else None

    def whole(self, *names: str, default: int) -> int:
        found = self.find(*names)
        if found and not re.fullmatch("[0-9]{1,18}", found[1]):
            raise ValueError(f"{found[0]} is a whole number, 0 or more")
        return int(found[1]) if found else default

    def seconds(self, name: str) -> float | None:
        found = self.find(name)
        if found and not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", found[1]):
            raise ValueError(f"{found[0]} is a number of seconds, such as 0.5")
        return float(found[1]) if found else None

    def place(self, kind: str) -> str | None:
        """Return where this process is: said directly, or by the name of another variable."""
        ours = {"dc": "LOCALITY", "geo": "GEO"}[kind]
        if direct := self.text(ours, f"current_{kind}"):
            return direct
        other = self.text("", f"current_{kind}_env")
        return (self.environ.get(other, "").strip() or None) if other else None

    def places(self, kind: str, hosts: Sequence[str]) -> dict[str, str]:
        """Return where the hosts are; nothing, where not each of them has a place."""
        ours = {"dc": "LOCALITIES", "geo": "GEOS"}[kind]
        named = [part.strip() for part in (self.text(ours, f"hosts_{kind}") or "").split(",")]
        return dict(zip(hosts, named, strict=True)) if len(named) == len(hosts) and all(named) else {}


def _hosts(reader: _Reader) -> list[str]:
    found = reader.find("HOSTS", "hosts")
    if found is None:
        raise ValueError(f"no hosts: set {_OURS}HOSTS (or {_THEIRS}hosts) to 'db1,db2:5433'")
    delimiter = reader.text("", "delimiter") or ","
    hosts = [part.strip() for part in found[1].split(delimiter) if part.strip()]
    ports = [part.strip() for part in (reader.text("PORT", "pg_port", "port") or "").split(",") if part.strip()]
    if not all(re.fullmatch("[0-9]{1,5}", port) for port in ports) or len(ports) not in (0, 1, len(hosts)):
        raise ValueError("the port is one number, or one for each host")
    if not ports:
        return hosts
    return [_with_port(host, port) for host, port in zip(hosts, ports * (len(hosts) // len(ports)), strict=True)]


def _with_port(host: str, port: str) -> str:
    """Add a port to a host that has none."""
    if host.endswith("]") or host.count(":") == 0:
        return f"{host}:{port}"
    return host if host.count(":") == 1 or host.startswith("[") else f"[{host}]:{port}"


def _login(reader: _Reader) -> dict[str, Any]:
    """Return who asks; a password that is not given is the driver's affair: PGPASSWORD, the password file."""
    default = "postgres" if reader.drop_in else None
    file, password = reader.text("PASSWORD_FILE"), reader.find("PASSWORD", "pg_password", strip=False)
    options: dict[str, Any] = {
        "user": reader.text("USER", "pg_user") or default,
        "database": reader.text("DATABASE", "pg_database") or default,
        "password": _from_file(file) if file else password[1] if password else None,
    }
    if driver := reader.one_of(("asyncpg", "psycopg"), "DRIVER"):
        options["driver"] = driver
    return options


def _from_file(path: str) -> Callable[[], str]:
    """Return what reads a password anew for each connection: mounted secrets change."""
    return lambda: Path(path).read_text(encoding="utf-8").rstrip("\r\n")


def _pace(reader: _Reader, max_lag_ms: int) -> dict[str, Any]:
    options: dict[str, Any] = {"interval": reader.seconds("INTERVAL") or _interval(reader, max_lag_ms)}
    timeout = reader.seconds("TIMEOUT") or _timeout(reader)
    if timeout:
        options["timeout"] = timeout
    if fails := reader.whole("MAX_FAILS", "max_fails", default=3 if reader.drop_in else 0):
        options["max_fails"] = fails
    if split_brain := reader.one_of(_SPLIT_BRAIN, "SPLIT_BRAIN"):
        options["split_brain"] = split_brain
    if evidence := reader.one_of(("true", "false"), "REQUIRE_TIMELINE_EVIDENCE"):
        options["require_timeline_evidence"] = evidence == "true"
    return options


def _interval(reader: _Reader, max_lag_ms: int) -> float:
    """Return seconds between probes: four in the limit of the lag, which is an upper bound and has the age of a probe in it."""
    wanted = reader.whole("", "sleep_ms", default=1000 * reader.whole("", "sleep", default=1)) / 1000
    return max(0.05, min(wanted, max_lag_ms / 4000)) if max_lag_ms else max(0.05, wanted)


def _timeout(reader: _Reader) -> float | None:
    connecting = reader.whole("", "connect_timeout", default=1 if reader.drop_in else 0)
    return reader.whole("", "query_timeout_ms", default=1000 * connecting) / 1000 or None


def _listen(reader: _Reader) -> str:
    if ours := reader.text("LISTEN"):
        return ours
    address, port = reader.text("", "http_listen_address") or "127.0.0.1", reader.text("", "http_port") or "8000"
    return f"[{address}]:{port}" if ":" in address and not address.startswith("[") else f"{address}:{port}"
