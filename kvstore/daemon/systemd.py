"""What systemd and the daemon tell each other: states, the watchdog, sockets handed over.

The protocols are those of sd_notify(3) and sd_listen_fds(3). Without systemd nothing happens.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

from kvstore.errors import ConfigError

log = logging.getLogger(__name__)

_FIRST_FD: Final = 3
_MICROSECONDS: Final = 1_000_000


def notify(*states: str) -> None:
    """Tell systemd *states*, such as READY=1, in one message."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            messenger.sendto("\n".join(states).encode(), address)
    except OSError as error:
        log.warning("systemd not notified", extra={"state": states[0], "reason": error.strerror})


def notify_reloading() -> None:
    """Tell systemd that the configuration is being read again; READY=1 ends it."""
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    notify("RELOADING=1", f"MONOTONIC_USEC={int(now * _MICROSECONDS)}")


def watchdog_seconds() -> float | None:
    """Return how long the daemon may be silent, or None when nobody watches it."""
    text = os.environ.get("WATCHDOG_USEC", "")
    if not text.isdecimal() or not int(text) or not _is_ours("WATCHDOG_PID"):
        return None
    return int(text) / _MICROSECONDS


def take_sockets(environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """Return the sockets that systemd listens on for this process, and take them over.

    They are non-blocking and not inherited any further. Raises `ConfigError` for a descriptor
    that is no socket.
    """
    count = environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    is_ours = _is_ours("LISTEN_PID", environ)
    environ.pop("LISTEN_PID", None)
    if not count.isdecimal() or not is_ours:
        return []
    return [_take(fd) for fd in range(_FIRST_FD, _FIRST_FD + int(count))]


def _take(fd: int) -> socket.socket:
    try:
        taken = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(
            f"descriptor {fd}, handed over by systemd, is no socket: {error.strerror}"
        ) from None
    taken.set_inheritable(False)
    taken.setblocking(False)
    return taken


def _is_ours(name: str, environ: MutableMapping[str, str] = os.environ) -> bool:
    """Return whether the process named by the variable *name*, if it is set, is this one."""
    return environ.get(name, str(os.getpid())) == str(os.getpid())
