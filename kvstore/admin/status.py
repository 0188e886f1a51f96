"""The whole daemon at one look, made at most a few times a second however often it is asked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal

from kvstore.admin import schema
from kvstore.limits import (
    ADMIN_HISTORY_SAMPLES_MAX,
    ADMIN_HISTORY_SECONDS,
    ADMIN_SNAPSHOT_SECONDS,
    ADMIN_STATUS_EVENTS_MAX,
)
from kvstore.metrics import Histogram
from kvstore.types import TierKind

if TYPE_CHECKING:
    from kvstore.admin.subject import Subject
    from kvstore.protocol.messages import DaemonStats, TierStats

_RECENT_SECONDS: Final = 60.0
_RECENT_STEPS: Final = int(_RECENT_SECONDS / ADMIN_HISTORY_SECONDS)


class Observer:
    """Looks at *subject*, remembers the look for a moment, and how things were before."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._status: schema.Status | None = None
        self._looked_at = 0.0
        self._samples: deque[schema.Sample] = deque(maxlen=ADMIN_HISTORY_SAMPLES_MAX)
        self._earlier: deque[dict[str, Histogram]] = deque(maxlen=_RECENT_STEPS)

    def status(self) -> schema.Status:
        """Return how things are, or were a fraction of a second ago."""
        now = time.monotonic()
        if self._status is None or now - self._looked_at >= ADMIN_SNAPSHOT_SECONDS:
            self._status, self._looked_at = self._look(), now
        return self._status

    def history(self) -> schema.History:
        """Return the samples of the last hour."""
        return schema.History(interval_seconds=ADMIN_HISTORY_SECONDS, samples=list(self._samples))

    def sample(self) -> None:
        """Note how things are. To be called every `ADMIN_HISTORY_SECONDS`."""
        status = self._look()
        latencies = {latency.op: latency for latency in status.latencies}
        load = latencies.get("load")
        self._samples.append(
            schema.Sample(
                at=status.now_at,
                asked=status.lookups.asked,
                ready=status.lookups.ready,
                hits={tier.tier: tier.hit_chunks for tier in status.tiers},
                used_bytes={tier.tier: tier.used_bytes for tier in status.tiers},
                load_bytes=status.counters["load_bytes"],
                commit_bytes=status.counters["commit_bytes"],
                evict_chunks=status.counters["evict_chunks"],
                load_p50_seconds=load.p50_seconds if load else 0.0,
                load_p99_seconds=load.p99_seconds if load else 0.0,
            )
        )
        by_op = self._subject.latencies.by_op
        self._earlier.append({op: histogram.copy() for op, histogram in by_op.items()})

    def _look(self) -> schema.Status:
        subject, stats, now_at = self._subject, self._subject.stats(), time.time()
        return schema.Status(
            version=stats.version,
            pid=stats.pid,
            state="draining" if stats.state == "draining" else "ready",
            now_at=now_at,
            started_at=now_at - stats.uptime_seconds,
            uptime_seconds=stats.uptime_seconds,
            socket=stats.socket,
            resident_bytes=stats.resident_bytes,
            sessions=stats.sessions,
            reservations=stats.reservations,
            handoffs=stats.handoffs,
            handoff_chunks=stats.handoff_chunks,
            leases=self._leases(),
            arena=stats.arena,
            tiers=[_tier(subject, tier) for tier in stats.tiers],
            lookups=_lookups(stats.counters),
            flows=list(flows(stats)),
            latencies=[self._latency(op) for op in sorted(subject.latencies.by_op)],
            tenants=stats.tenants,
            namespaces=[space for space in stats.namespaces if space.chunks],
            namespaces_count=stats.namespaces_count,
            counters=stats.counters,
            engine_gpu=stats.engine_gpu,
            engines=stats.engines,
            events=subject.events.latest(ADMIN_STATUS_EVENTS_MAX),
        )

    def _leases(self) -> schema.LeaseSummary:
        store = self._subject.store
        oldest = next(iter(store.leases), None)
        return schema.LeaseSummary(
            count=len(store.leases),
            chunks=store.index.held,
            next_expiry_seconds=None if oldest is None else oldest.expires_at - time.monotonic(),
            expired=store.counters.lease_expirations,
        )

    def _latency(self, op: str) -> schema.Latency:
        total = self._subject.latencies.by_op[op]
        before = self._earlier[0].get(op) if self._earlier else None
        recent = total if before is None else total.since(before)
        bounds: list[float | None] = [*total.bounds, None]
        return schema.Latency(
            op=op,
            count=total.count,
            total_seconds=total.total,
            recent_count=recent.count,
            p50_seconds=recent.quantile(0.5),
            p90_seconds=recent.quantile(0.9),
            p99_seconds=recent.quantile(0.99),
            buckets=list(zip(bounds, total.counts, strict=True)),
        )


def _tier(subject: Subject, tier: TierStats) -> schema.Tier:
    kind = TierKind[tier.tier.upper()]
    is_ready = tier.state == "ready"
    held = subject.store.holdings(kind)
    return schema.Tier(
        tier=shown_tier(kind),
        state="ready" if is_ready else "failing",
        breaker="closed" if is_ready else "open",
        capacity_bytes=tier.capacity_bytes,
        used_bytes=tier.used_bytes,
        stored_bytes=held.stored_bytes,
        raw_bytes=held.raw_bytes,
        largest_free_bytes=tier.largest_free_bytes,
        chunks=tier.chunks,
        hit_chunks=tier.hit_chunks,
        write=tier.write,
        queued_chunks=tier.queued_chunks,
        queued_bytes=tier.queued_bytes,
        read_bytes_per_second=tier.read_bytes_per_second,
        write_bytes_per_second=tier.write_bytes_per_second,
        read_seconds=tier.read_seconds,
        counters=tier.counters,
    )


def shown_tier(kind: TierKind) -> schema.ShownTier:
    """Return the name of *kind*."""
    names: dict[TierKind, schema.ShownTier] = {
        TierKind.DEVICE: "device",
        TierKind.HOST: "host",
        TierKind.DISK: "disk",
        TierKind.REDIS: "redis",
        TierKind.PEER: "peer",
    }
    return names[kind]


_OUTCOMES: Final[tuple[Literal["ready", "arriving", "declined", "unavailable", "miss"], ...]] = (
    *("ready", "arriving", "declined"),
    *("unavailable", "miss"),
)


def _lookups(counters: dict[str, int]) -> schema.Lookups:
    of = {outcome: counters[f"lookup_chunks_{outcome}"] for outcome in _OUTCOMES}
    return schema.Lookups(asked=sum(of.values()), **of)


def flows(stats: DaemonStats) -> Iterator[schema.Flow]:
    """Yield what has gone where since the start."""
    counters = stats.counters

    def flow(source: str, target: str, name: str) -> schema.Flow:
        return schema.Flow(
            source=source,
            target=target,
            chunks=counters[f"{name}_chunks"],
            bytes=counters[f"{name}_bytes"],
        )

    def tier_flow(source: str, target: str, of: dict[str, int], name: str) -> schema.Flow:
        chunks, size = of[f"{name}_chunks"], of[f"{name}_bytes"]
        return schema.Flow(source=source, target=target, chunks=chunks, bytes=size)

    yield flow("engine", "host", "commit")
    yield flow("host", "engine", "load")
    yield flow("host", "none", "evict")
    for tier in stats.tiers[1:]:
        # What engines themselves move to and from their device is a part of what they commit.
        into, name = ("engine", "stored") if tier.tier == "device" else ("host", "write")
        yield tier_flow(into, tier.tier, tier.counters, name)
        yield tier_flow(tier.tier, "host", tier.counters, "read")
        if tier.tier == "device":
            yield tier_flow("host", tier.tier, tier.counters, "write")
            yield tier_flow(tier.tier, "engine", tier.counters, "loaded")
