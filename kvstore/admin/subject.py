"""The daemon as the admin API sees it: what it may look at and what it may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvstore.config import Config
from kvstore.events import Events
from kvstore.metrics import Latencies
from kvstore.protocol.messages import DaemonStats
from kvstore.store.mover import Mover
from kvstore.store.namespace import Namespace
from kvstore.store.store import Store
from kvstore.store.tracing import Tracing
from kvstore.types import Digest


class ReloadReport(Protocol):
    """What a reload has changed."""

    @property
    def applied(self) -> list[str]:
        """The settings that hold now."""

    @property
    def waiting(self) -> list[str]:
        """The settings that wait for a restart."""


@dataclass(frozen=True)
class Subject:
    """One running daemon."""

    store: Store
    mover: Mover
    events: Events
    latencies: Latencies
    tracing: Tracing
    socket: Path
    is_reloadable: Callable[[str], bool]
    stats: Callable[[], DaemonStats]
    config: Callable[[], Config]
    reload: Callable[[], ReloadReport]
    """Raises `ConfigError`, and then nothing has changed."""
    prefetch: Callable[[Namespace, list[Digest]], int]
