"""Connecting to a server: redis-py makes the connection, a lane takes it over."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, NamedTuple, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.limits import MIB
from kvstore.tiers.redis_url import Address
from kvstore.tiers.redis_wire import Connection, Lane

_BUFFER_BYTES: Final = 4 * MIB
_KEEPALIVE: Final = {
    socket.TCP_KEEPIDLE: 10,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
}


class Access(NamedTuple):
    """What a server wants to know, and how long it may take."""

    username: str = ""
    password: str = ""
    database: int = 0
    tls: bool = False
    ca_file: str | None = None
    timeout_seconds: float = 1.0


class _Taken:
    """Mixed into redis-py's connections: keeps their socket."""

    bulk: socket.socket

    def _connect(self) -> socket.socket:
        self.bulk = super()._connect()  # type: ignore[misc]
        return self.bulk


class _Tcp(_Taken, redis.Connection):
    pass


class _Tls(_Taken, redis.SSLConnection):
    pass


class _Path(_Taken, redis.UnixDomainSocketConnection):
    pass


_MakeConnection = Callable[..., Connection]


def connect(address: Address, access: Access) -> Lane:
    """Return a lane to *address*, authenticated, with its database selected.

    Blocking. Raises `redis.RedisError` or `OSError`.
    """
    options: dict[str, object] = {
        "db": access.database,
        "username": access.username or None,
        "password": access.password or None,
        "socket_timeout": access.timeout_seconds,
        "socket_connect_timeout": access.timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
    }
    if address.is_path:
        make = cast(_MakeConnection, _Path)
        options["path"] = address.host
    else:
        make = cast(_MakeConnection, _Tls if access.tls else _Tcp)
        options |= {"host": address.host, "port": address.port}
        options |= {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
        if access.tls:
            options["ssl_ca_certs"] = access.ca_file
    connection = make(**options)
    connection.connect()
    if address.is_path:
        # The kernel's default of 208 KiB costs a third of the speed. TCP sizes its own.
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.bulk.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    return Lane(connection, access.timeout_seconds)
