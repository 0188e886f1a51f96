"""How much more memory would help, tier by tier and tenant by tenant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from kvstore.admin.schema import Curve, CurvePoint
from kvstore.admin.status import shown_tier
from kvstore.limits import REUSE_REFERENCES_MIN
from kvstore.store.reuse import points
from kvstore.types import TierKind

if TYPE_CHECKING:
    from kvstore.store.residence import Residents
    from kvstore.store.reuse import Stack
    from kvstore.store.store import Store

_TIMES: Final = (0.5, 1.0, 2.0, 4.0, 8.0)


def curves(store: Store) -> Iterator[Curve]:
    """Yield a curve for each tenant and each tier whose size is ours to choose."""
    disk = store.slower.residents.get(TierKind.DISK)
    tiers = [store.residents, *([] if disk is None else [disk])]
    for number, tenant in enumerate(store.tenants):
        stack = store.reuse.stack(number)
        if stack is None or stack.references < REUSE_REFERENCES_MIN:
            continue
        for residents in tiers:
            yield _curve(store, tenant, stack, residents, number)


def _curve(store: Store, tenant: str, stack: Stack, residents: Residents, number: int) -> Curve:
    host_bytes = store.residents.shares.quota_bytes(number)
    capacity_bytes = residents.shares.quota_bytes(number)

    def also(size_bytes: int) -> int:
        """Return what host tier and disk keep together: on disk is what the host tier has, too."""
        is_host = residents.kind is TierKind.HOST
        return size_bytes if is_host else max(size_bytes, host_bytes)

    return Curve(
        tenant=tenant,
        tier=shown_tier(residents.kind),
        capacity_bytes=capacity_bytes,
        asked=stack.asked,
        references=stack.references,
        sampled_chunks=len(stack),
        sampling_rate=stack.rate,
        measured_hit_rate=_measured(store, residents.kind),
        points=[
            CurvePoint(times=times, capacity_bytes=size_bytes, hit_rate=rate)
            for times, size_bytes, rate in points(stack, capacity_bytes, _TIMES, also)
        ],
    )


def _measured(store: Store, kind: TierKind) -> float | None:
    """Return the share of chunks asked for that were in the tier *kind* or above it."""
    counters = store.counters
    asked = (
        counters.lookup_chunks_ready
        + counters.lookup_chunks_arriving
        + counters.lookup_chunks_declined
        + counters.lookup_chunks_unavailable
        + counters.lookup_chunks_miss
    )
    if len(store.tenants) > 1 or not asked:
        return None
    return sum(hits for tier, hits in store.hit_chunks.items() if tier <= kind) / asked
