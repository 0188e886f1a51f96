"""Where Redis is: the URL of the configuration, read once and refused with a reason.

| form | servers |
|---|---|
| `redis://[user@]host[:port][/database]` | one |
| `unix:///path/of/socket[?db=database]`, `unix://user@/path` | one, on this host |
| `redis+sentinel://[user@]host[:port],host[:port]/service[/database]` | the master of *service* |
| `redis+cluster://[user@]host[:port],host[:port]` | all masters of the cluster |

`rediss` in place of `redis` means TLS. A password never stands in the URL.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from kvstore.errors import ConfigError
from kvstore.limits import REDIS_SEEDS_MAX

URL_FORMS: Final = (
    "redis://host:6379/0, rediss://host:6379/0, unix:///path, "
    "redis+sentinel://host:26379,host:26379/service or redis+cluster://host:6379,host:6379"
)

_REDIS_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_DATABASE_MAX: Final = 2**31 - 1


class Form(Enum):
    """How servers are found."""

    STANDALONE = auto()
    SENTINEL = auto()
    CLUSTER = auto()


class Address(NamedTuple):
    """One server. A Unix socket is its path as *host*, with port 0."""

    host: str
    port: int

    @property
    def is_path(self) -> bool:
        """Whether this is a Unix socket."""
        return self.port == 0

    @property
    def is_local(self) -> bool:
        """Whether this is certainly the same host."""
        return self.is_path or self.host in {"localhost", "::1"} or self.host.startswith("127.")

    def __str__(self) -> str:
        if self.is_path:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class RedisUrl(NamedTuple):
    """What a URL says. *seeds* are the server, the sentinels, or some nodes of the cluster."""

    form: Form
    seeds: tuple[Address, ...]
    tls: bool
    username: str
    service: str
    database: int


def parse_url(text: str) -> RedisUrl:
    """Return what *text* says; raises `ConfigError` that names what is wrong with it."""
    scheme = text.partition("://")[0]
    if "://" not in text or scheme not in _READERS:
        raise ConfigError(f"redis url {_shown(text)!r} is not understood; write {URL_FORMS}")
    try:
        split = urlsplit(text)
        return _READERS[scheme](split, scheme.startswith("rediss"))
    except ValueError as error:
        raise ConfigError(f"redis url {_shown(text)!r}: {error}; write {URL_FORMS}") from None


def _shown(text: str) -> str:
    """Return *text* without anything that could be a password."""
    scheme, mark, rest = text.partition("://")
    user, at, place = rest.rpartition("@")
    return f"{scheme}{mark}{user.partition(':')[0]}{at}{place}"


def _read_unix(split: SplitResult, _tls: bool) -> RedisUrl:  # a table of readers
    username, hosts = _user_of(split)
    path = unquote(split.path)
    if hosts or not path.startswith("/") or len(path) < 2:
        raise ValueError("a Unix socket needs an absolute path, with three slashes")
    queries = parse_qs(split.query, strict_parsing=bool(split.query))
    if set(queries) - {"db"} or split.fragment:
        raise ValueError("only ?db=NUMBER may follow the path")
    database = _database(queries.get("db", ["0"])[-1])
    return RedisUrl(Form.STANDALONE, (Address(path, 0),), False, username, "", database)


def _read_standalone(split: SplitResult, tls: bool) -> RedisUrl:
    username, hosts = _user_of(split)
    _refuse_query(split)
    seeds = _addresses(hosts, _REDIS_PORT)
    if len(seeds) != 1:
        raise ValueError(f"{len(seeds)} hosts, but only sentinel and cluster forms take several")
    return RedisUrl(
        Form.STANDALONE, seeds, tls, username, "", _database(split.path.strip("/") or "0")
    )


def _read_sentinel(split: SplitResult, tls: bool) -> RedisUrl:
    username, hosts = _user_of(split)
    _refuse_query(split)
    service, _, database = split.path.strip("/").partition("/")
    if not service:
        raise ValueError("the name of the sentinels' service is missing")
    seeds = _addresses(hosts, _SENTINEL_PORT)
    return RedisUrl(
        Form.SENTINEL, seeds, tls, username, unquote(service), _database(database or "0")
    )


def _read_cluster(split: SplitResult, tls: bool) -> RedisUrl:
    username, hosts = _user_of(split)
    _refuse_query(split)
    if split.path.strip("/") not in {"", "0"}:
        raise ValueError("a cluster has only database 0")
    return RedisUrl(Form.CLUSTER, _addresses(hosts, _REDIS_PORT), tls, username, "", 0)


_READERS: Final = {
    "unix": _read_unix,
    "redis": _read_standalone,
    "rediss": _read_standalone,
    "redis+sentinel": _read_sentinel,
    "rediss+sentinel": _read_sentinel,
    "redis+cluster": _read_cluster,
    "rediss+cluster": _read_cluster,
}


def _user_of(split: SplitResult) -> tuple[str, str]:
    """Return the user and the rest of what stands before the path."""
    user, _, hosts = split.netloc.rpartition("@")
    if ":" in user:
        raise ValueError("a password does not belong into the URL: name a file in password_file")
    return unquote(user), hosts


def _refuse_query(split: SplitResult) -> None:
    if split.query or split.fragment:
        raise ValueError("nothing may follow the path")


def _addresses(hosts: str, port: int) -> tuple[Address, ...]:
    names = [name for name in hosts.split(",") if name]
    if not 0 < len(names) <= REDIS_SEEDS_MAX:
        raise ValueError(f"{len(names)} hosts; 1 to {REDIS_SEEDS_MAX} are allowed")
    return tuple(_address(name, port) for name in names)


def _address(text: str, default_port: int) -> Address:
    split = urlsplit(f"//{text}")
    port = default_port if split.port is None else split.port
    if not split.hostname or split.path or not 0 < port < 65536:
        raise ValueError(f"{text!r} is no host with a port")
    return Address(split.hostname, port)


def _database(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > _DATABASE_MAX:
        raise ValueError(f"{text!r} is no number of a database")
    return int(text)
