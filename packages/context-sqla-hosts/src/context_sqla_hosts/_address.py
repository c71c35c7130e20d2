"""Names of hosts: "db1", "db1:5433", "[::1]:5432"; and the URLs and options with which they are reached."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any, Literal, NamedTuple, TypeAlias
from urllib.parse import parse_qsl, unquote

Driver: TypeAlias = Literal["asyncpg", "psycopg"]
_PORT = re.compile("[1-9][0-9]{0,4}")
_WITHOUT_GAPS = re.compile(r"[^\x00-\x20\x7f\s]*")


class Address(NamedTuple):
    """Where a host is; two of one name and different ports are two hosts.

    Args:
        name: or an IP address, an IPv6 one without brackets.
        port: of PostgreSQL.
    """

    name: str
    port: int

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


class SecretError(Exception):
    """Tell that the function which returns the password has failed; what it said may have the password in it (P20)."""


@dataclass(frozen=True, slots=True)
class Login:
    """How to reach any of the hosts; its repr shows no password (P20)."""

    user: str | None = None
    password: str | Callable[[], str] | None = field(default=None, repr=False)
    database: str | None = None
    ssl: SSLContext | str | bool | None = field(default=None, repr=False)
    driver: Driver | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def secret(self) -> str | None:
        """Return the password as it is now.

        Raises:
            SecretError: the function failed.
        """
        if not callable(self.password):
            return self.password
        try:
            return self.password()
        except Exception as exc:
            raise SecretError(type(exc).__name__) from None


def parse_host(host: str, port: int = 5432) -> Address:
    """Read the name of a host.

    Args:
        host: a name or an address, with or without a port; IPv6 in brackets where a port follows.
        port: the one that is meant where none is written.

    Raises:
        ValueError: it is something else; a URL is not repeated in the message (P20).
    """
    text = host.strip()
    if "/" in text or "@" in text:
        raise ValueError("a host is 'name' or 'name:port', not a URL or a path")
    if not _WITHOUT_GAPS.fullmatch(text):
        raise ValueError("a host is 'name' or 'name:port', without white space")
    name, separator, number = text.rpartition(":")
    if not separator or text.endswith("]") or (":" in name and not name.startswith("[")):
        name, number = text, str(port)
    if name.startswith("[") is not name.endswith("]") or not name.strip("[]"):
        raise ValueError(f"{text!r} is no host: write 'name' or 'name:port'")
    if not (_PORT.fullmatch(number) and int(number) < 65536):
        raise ValueError(f"{text!r} is no host: its port is not a number below 65536")
    return Address(name.strip("[]"), int(number))


def parse_url(url: str) -> tuple[list[str], Login, int]:
    """Read a URL with several hosts, "postgresql+asyncpg://user:password@db1,db2:5433/app".

    Returns:
        The hosts as they are written, the login, and the port for hosts without one.

    Raises:
        ValueError: it is something else; it is not repeated in the message (P20).
    """
    scheme, separator, rest = url.partition("://")
    backend, _, driver = scheme.partition("+")
    driver = driver.removesuffix("_async")
    if not separator or backend not in ("postgresql", "postgres") or driver not in ("", "asyncpg", "psycopg"):
        raise ValueError("this is not a URL of PostgreSQL hosts; write 'postgresql+asyncpg://user@db1,db2:5433/database'")
    authority, _, path = rest.partition("/")
    account, _, names = authority.rpartition("@")
    user, _, password = account.partition(":")
    database, _, query = path.partition("?")
    options = dict(parse_qsl(query))
    ssl = options.pop("sslmode", None) or options.pop("ssl", None)
    port = options.pop("port", "5432")
    if not (_PORT.fullmatch(port) and int(port) < 65536):
        raise ValueError("the port of the URL is not a number below 65536")
    hosts = [name for name in (names or options.pop("host", "")).split(",") if name]
    if options:
        raise ValueError(f"these options of the URL are not known: {', '.join(sorted(options))}")
    chosen: Driver | None = "asyncpg" if driver == "asyncpg" else "psycopg" if driver == "psycopg" else None
    return hosts, Login(unquote(user) or None, unquote(password) or None, unquote(database) or None, ssl, chosen), int(port)
