"""One look at the whole daemon, for people and for dashboards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from kvstore import __version__
from kvstore.limits import STATS_NAME_MAX_CHARS, STATS_NAMESPACES_MAX
from kvstore.protocol import messages as m
from kvstore.protocol.stats import CodecStats
from kvstore.types import TierKind

if TYPE_CHECKING:
    from kvstore.daemon.server import Server
    from kvstore.store.residence import Residents
    from kvstore.store.route import Route
    from kvstore.store.store import Store


def daemon_stats(server: Server) -> m.DaemonStats:
    """Return what *server* holds and has done."""
    store, arena = server.store, server.store.host.arena
    routes = server.mover.routes
    return m.DaemonStats(
        version=__version__,
        pid=os.getpid(),
        state="draining" if server.draining else "ready",
        socket=str(server.address.path),
        uptime_seconds=time.monotonic() - server.started_at,
        resident_bytes=_resident_bytes(),
        sessions=server.session_count,
        leases=len(store.leases),
        reservations=len(store.reservations),
        handoffs=server.handoffs.open_count,
        handoff_chunks=server.handoffs.held_chunks,
        tiers=[_host(store), *(_slower(store, routes[kind]) for kind in sorted(routes))],
        namespaces=_namespaces(store),
        namespaces_count=len(store.index.namespaces),
        arena=m.ArenaStats(
            kind=arena.kind,
            size_bytes=arena.size_bytes,
            prefaulted_bytes=arena.prefaulted_bytes,
            huge_pages=arena.huge_pages,
        ),
        counters=_counters(store),
        tenants=list(_tenants(store)) if len(store.tenants) > 1 else [],
        codecs=list(_codecs(store)),
        peer_transport="tcp" if server.nixl is None else server.nixl.in_words(),
        engine_gpu=server.engines.totals(),
        engines=list(server.engines.latest(server.client_names)),
    )


def _codecs(store: Store) -> Iterator[CodecStats]:
    """Yield what each tier has of the namespaces of each codec."""
    for residents in (store.residents, *store.slower.residents.values()):
        for codec, (stored_bytes, raw_bytes) in sorted(residents.by_codec.items()):
            yield CodecStats(
                tier=residents.kind.name.lower(),
                codec=codec,
                stored_bytes=stored_bytes,
                raw_bytes=raw_bytes,
            )


def _counters(store: Store) -> dict[str, int]:
    records = store.host.records
    store.counters.unrecorded_shards = 0 if records is None else records.unrecorded
    return store.counters.as_dict()


def _host(store: Store) -> m.TierStats:
    usage = store.host.usage()
    return m.TierStats(
        tier="host",
        capacity_bytes=usage.capacity_bytes,
        used_bytes=usage.used_bytes,
        largest_free_bytes=usage.largest_free_bytes,
        chunks=store.residents.count,
        hit_chunks=store.hit_chunks[TierKind.HOST],
    )


def _slower(store: Store, route: Route) -> m.TierStats:
    usage, tier, lane = route.tier.usage(), route.tier, route.lane
    residents = store.slower.residents[tier.kind]
    counters = msgspec.structs.asdict(tier.counters) | {"dropped_writes": lane.dropped_writes}
    own = getattr(tier.tier, "counters", None)
    if isinstance(own, msgspec.Struct):
        counters |= msgspec.structs.asdict(own)
    return m.TierStats(
        tier=tier.kind.name.lower(),
        capacity_bytes=usage.capacity_bytes,
        # How full a server is, is not ours to know: what this daemon put or found there is.
        used_bytes=usage.used_bytes if usage.capacity_bytes else residents.shares.sum_bytes,
        largest_free_bytes=usage.largest_free_bytes,
        chunks=residents.count,
        hit_chunks=store.hit_chunks[tier.kind],
        state="ready" if tier.is_usable else "failing",
        write=route.policy,
        queued_chunks=lane.write_chunks,
        queued_bytes=lane.write_bytes,
        read_bytes_per_second=round(tier.reads.bytes_per_second),
        write_bytes_per_second=round(tier.writes.bytes_per_second),
        read_seconds=tier.reads.call_seconds,
        counters=counters,
        codec=route.codec,
    )


def _tenants(store: Store) -> Iterator[m.TenantStats]:
    """Yield what each tenant has in each tier whose room is ours to share out."""
    tiers: list[Residents] = [store.residents, *store.slower.residents.values()]
    for number, name in enumerate(store.tenants):
        for residents in tiers:
            shares = residents.shares
            if residents.kind in {TierKind.HOST, TierKind.DISK}:
                yield m.TenantStats(
                    tenant=name,
                    tier=residents.kind.name.lower(),
                    chunks=residents.chunks_of(number),
                    used_bytes=shares.used_bytes(number),
                    quota_bytes=shares.quota_bytes(number),
                    floor_bytes=shares.shares[number].floor_bytes,
                )


def _namespaces(store: Store) -> list[m.NamespaceStats]:
    largest = sorted(store.index.namespaces, key=lambda space: -len(space.ready))
    return [
        m.NamespaceStats(
            namespace=space.id.hex(),
            model=space.manifest.model[:STATS_NAME_MAX_CHARS],
            revision=space.manifest.revision[:STATS_NAME_MAX_CHARS],
            dtype=space.manifest.dtype,
            group=space.manifest.group[:STATS_NAME_MAX_CHARS],
            chunk_tokens=space.manifest.chunk_tokens,
            chunk_bytes=space.manifest.plain_bytes(space.manifest.all_heads),
            chunks=len(space.ready),
            codec=space.manifest.codec,
        )
        for space in largest[:STATS_NAMESPACES_MAX]
    ]


def _resident_bytes() -> int:
    """Return the daemon's own memory: resident, but for the pages it shares (the arena)."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123  # read at every look, and hot
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
