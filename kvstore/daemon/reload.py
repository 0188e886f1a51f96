"""The configuration, read again while the daemon serves: what can change does, the rest waits."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from kvstore import logs
from kvstore.config import Config, TenantConfig, plain
from kvstore.daemon.peers import Admission
from kvstore.daemon.tenants import Tenants
from kvstore.types import TierKind

if TYPE_CHECKING:
    from kvstore.daemon.server import Server
    from kvstore.store.quota import Share, Shares

log = logging.getLogger(__name__)

RELOADABLE: Final = (
    "server.allowed_uids",
    "server.allowed_gids",
    "server.sessions_max",
    "server.drain_timeout",
    "leases.orphan_grace",
    "log.level",
    "log.format",
    "tenants.*.uids",
    "tenants.*.quota",
    "tenants.*.floor",
    "tenants.*.disk_quota",
    "tenants.*.disk_floor",
)
"""What takes effect at once: for sessions that begin, and log events that happen, from then on.

A new tenant waits, and one that is not configured any more stays until the restart.
"""

_OF_A_TENANT: Final = re.compile(r"tenants\.([^.]+)\.")


def is_reloadable(path: str) -> bool:
    """Return whether a change of the setting at *path* takes effect at once."""
    return _OF_A_TENANT.sub("tenants.*.", path) in RELOADABLE


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
        # What comes or goes with its tenant waits like the tenant.
        applied = [
            path for path in changed if is_reloadable(path) and path in before and path in after
        ]
        waiting = [path for path in changed if path not in applied]
        merged, shares = _merged(self.config, wanted), list(self._shares(wanted, applied))
        for accounts, new in shares:
            accounts.judge(new)
        self._apply(merged)
        for accounts, new in shares:
            accounts.replace(new)
        log.info(
            "configuration reloaded",
            extra={
                "applied": ", ".join(applied) or "none",
                "needs_restart": ", ".join(waiting) or "none",
            },
        )
        return Reloaded(applied, waiting)

    def _shares(self, wanted: Config, applied: list[str]) -> Iterator[tuple[Shares, list[Share]]]:
        """Yield the accounts of each tier, and what tenants are to have there.

        What has not changed in the configuration stays as an operator may have set it since.
        """
        store = self._server.store
        disk = store.slower.residents.get(TierKind.DISK)
        tiers = [("", store.residents.shares)]
        if disk is not None:
            tiers.append(("disk_", disk.shares))
        for prefix, accounts in tiers:
            new = list(accounts.shares)
            for number, name in enumerate(self._server.tenants.names):
                if f"tenants.{name}.{prefix}quota" in applied:
                    quota = getattr(wanted.tenants[name], f"{prefix}quota_bytes") or None
                    new[number] = new[number]._replace(quota_bytes=quota)
                if f"tenants.{name}.{prefix}floor" in applied:
                    floor = getattr(wanted.tenants[name], f"{prefix}floor_bytes")
                    new[number] = new[number]._replace(floor_bytes=floor)
            yield accounts, new

    def _apply(self, merged: Config) -> None:
        server, log_config = merged.server, merged.log
        self._server.reconfigure(
            Admission(server.allowed_uids, server.allowed_gids),
            Tenants.of(merged),
            sessions_max=server.sessions_max,
            orphan_grace_seconds=merged.leases.orphan_grace_seconds,
        )
        if log_config != self.config.log:
            logs.configure(log_config.level, log_config.format)
        self.config = merged


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
    tenants: dict[str, TenantConfig] = {
        name: replace(wanted.tenants.get(name, of), shared=of.shared)
        for name, of in held.tenants.items()
    }
    return replace(held, server=server, leases=leases, log=wanted.log, tenants=tenants)
