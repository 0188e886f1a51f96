"""The configuration, read again while the daemon serves: what can change does, the rest waits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from kvstore import logs
from kvstore.config import Config, plain
from kvstore.daemon.peers import Admission

if TYPE_CHECKING:
    from kvstore.daemon.server import Server

log = logging.getLogger(__name__)

RELOADABLE: Final = (
    "server.allowed_uids",
    "server.allowed_gids",
    "server.sessions_max",
    "server.drain_timeout",
    "leases.orphan_grace",
    "log.level",
    "log.format",
)
"""What takes effect at once: for sessions that begin, and log events that happen, from then on."""


class Reloaded(NamedTuple):
    """The settings that differ: those that hold now, and those that wait for a restart."""

    applied: list[str]
    waiting: list[str]


class Reloader:
    """Owns the configuration that holds, and replaces what can be replaced."""

    def __init__(self, server: Server, config: Config, reread: Callable[[], Config]) -> None:
        """Begin with *config*; *reread* returns it anew, or raises `ConfigError`."""
        self.config = config
        self._server = server
        self._reread = reread

    def reload(self) -> Reloaded:
        """Read the configuration again and apply what can be applied; say so in the log.

        Raises `ConfigError`, and then nothing has changed.
        """
        wanted = self._reread()
        before, after = plain(self.config), plain(wanted)
        changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        applied = [path for path in changed if path in RELOADABLE]
        waiting = [path for path in changed if path not in RELOADABLE]
        self._apply(wanted)
        log.info(
            "configuration reloaded",
            extra={
                "applied": ", ".join(applied) or "none",
                "needs_restart": ", ".join(waiting) or "none",
            },
        )
        return Reloaded(applied, waiting)

    def _apply(self, wanted: Config) -> None:
        server, log_config = wanted.server, wanted.log
        self._server.reconfigure(
            Admission(server.allowed_uids, server.allowed_gids),
            sessions_max=server.sessions_max,
            orphan_grace_seconds=wanted.leases.orphan_grace_seconds,
        )
        if log_config != self.config.log:
            logs.configure(log_config.level, log_config.format)
        self.config = _merged(self.config, wanted)


def _merged(held: Config, wanted: Config) -> Config:
    """Return *held* with the settings of *wanted* that take effect at once."""
    server = replace(
        held.server,
        allowed_uids=wanted.server.allowed_uids,
        allowed_gids=wanted.server.allowed_gids,
        sessions_max=wanted.server.sessions_max,
        drain_timeout_seconds=wanted.server.drain_timeout_seconds,
    )
    leases = replace(held.leases, orphan_grace_seconds=wanted.leases.orphan_grace_seconds)
    return replace(held, server=server, leases=leases, log=wanted.log)
