"""The command line: `python -m context_sqla_hosts serve | check | primary`."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address

from ._environment import Settings, read_environment
from ._history import shown_lag
from ._monitor import Hosts
from ._server import Server
from ._snapshot import HostStatus, Snapshot
from ._table import Table, own_version

logger = logging.getLogger("context_sqla.hosts")

_OK, _WARNING, _CRITICAL, _UNKNOWN = range(4)  # as Nagios has it
_NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
_OPTIONS = {
    "hosts": "HOSTS",
    "user": "USER",
    "database": "DATABASE",
    "port": "PORT",
    "driver": "DRIVER",
    "password_file": "PASSWORD_FILE",
    "interval": "INTERVAL",
    "timeout": "TIMEOUT",
    "max_fails": "MAX_FAILS",
    "split_brain": "SPLIT_BRAIN",
    "max_lag_ms": "MAX_LAG_MS",
    "max_lag_bytes": "MAX_LAG_BYTES",
    "locality": "LOCALITY",
    "localities": "LOCALITIES",
    "patroni": "PATRONI",
    "listen": "LISTEN",
    "log_level": "LOG_LEVEL",
    "log_format": "LOG_FORMAT",
}


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run a command, and return its exit status.

    Args:
        arguments: those of the command line; None: the process's.
        environ: the environment variables; None: the process's.
    """
    given = _parser().parse_args(arguments)
    try:
        settings = _settings(given, os.environ if environ is None else environ)
        hosts = Hosts(settings.hosts, **settings.options)
        where = parse_listen(settings.listen)
    except ValueError as exc:
        sys.stderr.write(f"{exc}\n")
        return _UNKNOWN
    _log(settings)
    if given.command == "serve":
        return asyncio.run(_serve(hosts, settings, *where))
    if given.command == "check":
        return asyncio.run(_check(hosts, settings, given.wait))
    return asyncio.run(_primary(hosts, given.wait))


def parse_listen(text: str) -> tuple[str | None, int]:
    """Read where to listen: "127.0.0.1:8000", "[::1]:8000", "8000" for loopback, "*:8000" for every address.

    Raises:
        ValueError: it is something else.
    """
    name, colon, port = text.rpartition(":")
    name = name.strip("[]") if colon else "127.0.0.1"
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535 or not name:
        raise ValueError("an address to listen on looks like '127.0.0.1:8000', '[::1]:8000' or '*:8000'")
    return (None if name == "*" else name), int(port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m context_sqla_hosts",
        allow_abbrev=False,
        description="Which PostgreSQL host is the primary, and which replica is fresh enough.",
        epilog="Every option has an environment variable: CONTEXT_SQLA_HOSTS_MAX_LAG_MS for --max-lag-ms. Those of pg-status "
        "(pg_status__*) are read too. Passwords: CONTEXT_SQLA_HOSTS_PASSWORD, --password-file, PGPASSWORD, or ~/.pgpass.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print it, and end")
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve | check | primary")
    common = _common()
    serve = commands.add_parser("serve", allow_abbrev=False, parents=[common], help="answer over HTTP, as pg-status does")
    serve.add_argument(
        "--listen", metavar="ADDRESS:PORT", help="default 127.0.0.1:8000; another address lets others see the names of the hosts"
    )
    serve.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    serve.add_argument("--log-format", metavar="FORMAT", help="text or json")
    check = commands.add_parser(
        "check", allow_abbrev=False, parents=[common], help="probe, print a table, and exit with 0, 1 or 2 as Nagios has it"
    )
    check.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="for the first answers; default 5")
    primary = commands.add_parser("primary", allow_abbrev=False, parents=[common], help="print the primary as host:port")
    primary.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="for a primary; default 5")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        sys.stdout.write(f"{own_version()}\n")
        parser.exit()


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--hosts", metavar="HOSTS", help="db1,db2:5433")
    common.add_argument("--user", metavar="NAME", help="with pg_monitor, timelines of replicas are seen")
    common.add_argument("--password-file", metavar="PATH", help="read anew for each connection; there is no --password")
    common.add_argument("--database", metavar="NAME", help="any one of the cluster")
    common.add_argument("--port", metavar="PORT", help="of hosts without one; or one for each: 5432,5433")
    common.add_argument("--driver", metavar="DRIVER", help="asyncpg or psycopg")
    common.add_argument("--interval", metavar="SECONDS", help="between two probes; default a quarter of the limit of the lag")
    common.add_argument("--timeout", metavar="SECONDS", help="for one probe")
    common.add_argument("--max-fails", metavar="NUMBER", help="probes that may time out until a host is dead")
    common.add_argument("--split-brain", metavar="RULE", help="fence (default), refuse, or first as pg-status has it")
    common.add_argument("--max-lag-ms", metavar="MS", help="of a replica that counts as in time; default 1000")
    common.add_argument("--max-lag-bytes", metavar="BYTES", help="the same; default 1000000")
    common.add_argument("--locality", metavar="NAME", help="where this is: replicas of the same place are preferred")
    common.add_argument("--localities", metavar="NAMES", help="where the hosts are, one name for each")
    common.add_argument("--patroni", metavar="URLS", help="of Patroni's REST interfaces, one for each host: a second opinion")
    return common


def _settings(given: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Join both: what is given on the command line stands for a variable of ours."""
    values = {name: getattr(given, option, None) for option, name in _OPTIONS.items()}
    chosen = {f"CONTEXT_SQLA_HOSTS_{name}": str(value) for name, value in values.items() if value is not None}
    settings = read_environment({**environ, **chosen})
    return replace(settings, log_level=settings.log_level if given.command == "serve" else "error")


# serve


async def _serve(hosts: Hosts, settings: Settings, host: str | None, port: int) -> int:
    limits = {"max_lag_ms": settings.max_lag_ms, "max_lag_bytes": settings.max_lag_bytes}
    table = Table(hosts, **limits, geo=settings.geo, geos=settings.geos)
    server, ended = Server(table), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows; there the process just ends
            loop.add_signal_handler(number, ended.set)
    async with hosts:
        try:
            addresses = await server.start(host, port)
        except OSError as exc:
            logger.error("Cannot listen on %s: %s", settings.listen, exc.strerror)
            return _UNKNOWN
        table.history.start()
        logger.info("Listening on %s; watching %s", ", ".join(f"http://{one}" for one in addresses), ", ".join(settings.hosts))
        if not _is_loopback(host):
            logger.warning("Everybody who can reach %s sees the names of the hosts", settings.listen)
        await ended.wait()
        table.history.stop()
        await server.aclose()
    return _OK


def _is_loopback(host: str | None) -> bool:
    try:
        return host is not None and ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log(settings: Settings) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_JSONFormatter() if settings.log_format == "json" else _TextFormatter())
    root = logging.getLogger("context_sqla")
    root.handlers[:] = [handler]
    root.propagate = False
    level = {"warn": "warning", "fatal": "critical"}.get(settings.log_level, settings.log_level)
    root.setLevel(level.upper())


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return f"{_time(record)} {record.levelname} {record.getMessage()}{trace}"


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "@timestamp": _time(record),
            "levelStr": record.levelname,
            "component": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


# check and primary


async def _check(hosts: Hosts, settings: Settings, wait: float) -> int:
    async with hosts:
        deadline = hosts.clock() + wait
        while not hosts.snapshot().decided and await hosts.changed(deadline - hosts.clock()):
            pass  # of who has not answered by then, the table says so
        # Where a replica answered before the primary did, its lag is not known yet: ask the primary, then all of them.
        if (primary := hosts.snapshot().primary) is not None:
            await hosts.refresh(primary)
        snapshot, now = await hosts.refresh(), hosts.clock()
    found, why = _judge(snapshot, settings, now)
    sys.stdout.write(f"{_NAMES[found]}: {why}\n{_render(snapshot, now)}")
    return found


def _judge(snapshot: Snapshot, settings: Settings, now: float) -> tuple[int, str]:
    if snapshot.primary is None:
        return _CRITICAL, "several hosts say that they are the primary" if snapshot.split_brain else "there is no primary"
    wrong = [f"{s.host} {what}" for s in snapshot if (what := _what_is_wrong(s, snapshot, settings, now))]
    primary = f"the primary is {snapshot.primary}"
    return (_WARNING, f"{primary}, but {', '.join(wrong)}") if wrong else (_OK, primary)


def _what_is_wrong(status: HostStatus, snapshot: Snapshot, settings: Settings, now: float) -> str | None:
    if status.state != "up":
        return f"is {status.state}" + (f" ({status.error})" if status.error else "")
    if status.foreign:
        return "is of another cluster"
    if status.role == "primary":
        return None if status.host == snapshot.primary else "says that it is the primary too"
    lag = status.lag(now)
    if lag is None or status.lag_bytes is None:
        return "has an unknown lag"
    behind = status.lag_bytes > settings.max_lag_bytes and lag * 1000 > settings.max_lag_ms
    return f"is behind by {status.lag_bytes} bytes, {lag:.1f} s" if behind else None


def _render(snapshot: Snapshot, now: float) -> str:
    rows: list[tuple[str, ...]] = [("host", "state", "role", "timeline", "lag", "bytes", "error")]
    for status in snapshot:
        primary = status.host == snapshot.primary
        lag = shown_lag(status, snapshot, now)
        role = f"{status.role}{'' if primary or status.role != 'primary' else ' (not used)'}"
        figures = (status.timeline, None if lag is None else f"{lag:.3f} s", status.lag_bytes, status.error)
        rows.append((status.host, status.state, role, *("-" if figure is None else str(figure) for figure in figures)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


async def _primary(hosts: Hosts, wait: float) -> int:
    async with hosts:
        try:
            host = await hosts.primary(wait=wait)
        except Exception as exc:
            from .errors import NoHostError  # not before: it brings SQLAlchemy along

            if not isinstance(exc, NoHostError):
                raise
            sys.stderr.write(f"{exc}\n")
            return _CRITICAL
    sys.stdout.write(f"{host}\n")
    return _OK
