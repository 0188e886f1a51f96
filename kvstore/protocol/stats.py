"""What a daemon says of itself: maps, whose fields are only ever added."""

from __future__ import annotations

import msgspec


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one tier holds, and how it does.

    *state* is "ready", or "failing" while it is not asked. *counters* are those of the tier.
    *codec* is what it makes chunks smaller with on their way in; empty: nothing.
    """

    tier: str
    capacity_bytes: int
    used_bytes: int
    largest_free_bytes: int
    chunks: int
    hit_chunks: int = 0
    state: str = "ready"
    write: str = ""
    queued_chunks: int = 0
    queued_bytes: int = 0
    read_bytes_per_second: int = 0
    write_bytes_per_second: int = 0
    read_seconds: float = 0.0
    counters: dict[str, int] = {}
    codec: str = ""


class CodecStats(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes in one tier of all namespaces of one codec, and what they are without any."""

    tier: str
    codec: str
    stored_bytes: int
    raw_bytes: int


class NamespaceStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one namespace holds. *chunk_bytes* are those of a chunk as engines have it."""

    namespace: str
    model: str
    revision: str
    dtype: str
    group: str
    chunk_tokens: int
    chunk_bytes: int
    chunks: int
    codec: str = "raw"


class TenantStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant has in one tier, and may have; no quota is the whole tier."""

    tenant: str
    tier: str
    chunks: int
    used_bytes: int
    quota_bytes: int
    floor_bytes: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine of one open session has counted of its GPU since the session began."""

    session: int
    client: str
    counters: dict[str, int]


class ArenaStats(msgspec.Struct, frozen=True, kw_only=True):
    """How the arena is made."""

    kind: str
    size_bytes: int
    prefaulted_bytes: int
    huge_pages: bool


class DaemonStats(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the whole daemon. Counters only grow; their names are in metrics.py.

    *namespaces* lists those with most chunks, *namespaces_count* counts all. *handoffs* are
    those that are not over, *handoff_chunks* what they hold. *peer_transport* says in words how
    bytes of other hosts' hand-offs come. *engine_gpu* are the counters of all engines with a GPU
    since the start, *engines* the latest sessions of such.
    """

    version: str
    pid: int
    state: str
    socket: str
    uptime_seconds: float
    resident_bytes: int
    sessions: int
    leases: int
    reservations: int
    tiers: list[TierStats]
    namespaces: list[NamespaceStats]
    namespaces_count: int
    arena: ArenaStats
    counters: dict[str, int]
    tenants: list[TenantStats] = []
    handoffs: int = 0
    handoff_chunks: int = 0
    codecs: list[CodecStats] = []
    peer_transport: str = "tcp"
    engine_gpu: dict[str, int] = {}
    engines: list[EngineStats] = []
