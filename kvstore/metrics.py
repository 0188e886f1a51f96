"""What the daemon counts. Counters only grow; rates are for the reader to make."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

LATENCY_BOUNDS_SECONDS: Final = (
    *(25e-6, 50e-6, 100e-6, 250e-6, 500e-6),
    *(1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

ENGINE_GPU_COUNTERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "chunks_stored": "Chunks that the device has moved to host memory.",
        "chunks_loaded": "Chunks that the device has moved to pages.",
        "direct_chunks": "Moved by the copy engine page by page, without staging.",
        "bounced_chunks": "Moved through pinned memory: the arena is not registered there.",
        "encoded_chunks": "Encoded by the device while it gathered them.",
        "decoded_chunks": "Decoded by the device while it scattered them.",
        "host_encoded_chunks": "Encoded on the host: there are no kernels, or they are misfits.",
        "host_decoded_chunks": "Put together or decoded on the host: the device cannot.",
        "brought_chunks": "Of those, brought from the pool: the device has no form for them there.",
        "misfit_chunks": "Encoded with more error than is allowed: left to the host.",
        "damaged_chunks": "Loaded, and not what was stored: deleted and computed anew.",
        "pools_refused": "The daemon has device memory that cannot be mapped: host tier instead.",
        "smaller_rings": "Less staging memory than asked for: the device had no more.",
        "registrations_failed": "Windows of the arena not registered: copies bounce from there on.",
        "failed_transfers": "Transfers given up because a call to the device failed.",
        "stuck_transfers": "Transfers given up because the device did not get done in time.",
        "lost_devices": "Contexts that broke for good: nothing is transferred behind that.",
    }
)
"""What engines count of their transfers between pages on a GPU and host memory, or the pool.

They tell the daemon, which needs no GPU to know them.
"""


class Histogram:
    """How often a value fell between two bounds, and the sum of all values."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCY_BOUNDS_SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count *value* under the smallest bound that is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def copy(self) -> Histogram:
        """Return what there is now, apart from what comes."""
        other = Histogram(self.bounds)
        other.counts, other.total = list(self.counts), self.total
        return other

    def since(self, earlier: Histogram) -> Histogram:
        """Return what has come since *earlier*, a copy of this one."""
        other = Histogram(self.bounds)
        other.counts = [now - then for now, then in zip(self.counts, earlier.counts, strict=True)]
        other.total = self.total - earlier.total
        return other

    def quantile(self, share: float) -> float:
        """Return the value that *share* of all values do not exceed; 0 when there are none.

        Between two bounds it is taken to lie in proportion; beyond the last, at the last.
        """
        wanted = share * self.count
        below, lower = 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= wanted:
                return lower + (bound - lower) * (wanted - below) / count
            below, lower = below + count, bound
        return lower if below or self.counts[-1] else 0.0


class Latencies:
    """How long requests took, from their arrival to their answer, by what they asked for."""

    def __init__(self) -> None:
        self.by_op: dict[str, Histogram] = {}

    def observe(self, op: str, seconds: float) -> None:
        """Count one answer to *op*, of which there are as many as the protocol has requests."""
        histogram = self.by_op.get(op)
        if histogram is None:
            histogram = self.by_op[op] = Histogram()
        histogram.observe(seconds)


class Counters(msgspec.Struct, kw_only=True):
    """All counters of one daemon, by the names under which they are published.

    For look-ups, ready + arriving + declined + unavailable + miss is the number of keys asked:
    *declined* ones would take longer to load than to compute, *unavailable* ones are only in
    tiers that do not answer at present. The hits of all tiers together are the ready ones.

    Of chunks on their way to a tier with a codec of its own, *kept* ones go as they are because
    they are as small already, or have lost enough; *failed* ones because they cannot be encoded.
    """

    lookup_chunks_ready: int = 0
    lookup_chunks_arriving: int = 0
    lookup_chunks_declined: int = 0
    lookup_chunks_unavailable: int = 0
    lookup_chunks_miss: int = 0
    load_chunks: int = 0
    load_bytes: int = 0
    load_chunks_declined: int = 0
    load_chunks_late: int = 0
    promote_chunks: int = 0
    promote_bytes: int = 0
    promote_chunks_joined: int = 0
    promote_chunks_failed: int = 0
    promote_chunks_cancelled: int = 0
    prefetch_chunks: int = 0
    demote_chunks: int = 0
    demote_chunks_dropped: int = 0
    transcode_chunks: int = 0
    transcode_bytes_before: int = 0
    transcode_bytes_after: int = 0
    transcode_chunks_kept: int = 0
    transcode_chunks_failed: int = 0
    hints: int = 0
    reserve_chunks_reserved: int = 0
    reserve_chunks_present: int = 0
    reserve_chunks_arriving: int = 0
    reserve_chunks_no_space: int = 0
    commit_chunks: int = 0
    commit_bytes: int = 0
    abort_chunks: int = 0
    delete_chunks: int = 0
    evict_chunks: int = 0
    evict_bytes: int = 0
    checksum_failures: int = 0
    recover_shards: int = 0
    recover_shards_dropped: int = 0
    unrecorded_shards: int = 0
    lease_expirations: int = 0
    handoffs_opened: int = 0
    handoffs_broken: int = 0
    handoffs_expired: int = 0
    handoffs_taken: int = 0
    handoff_chunks_published: int = 0
    handoff_chunks_ready: int = 0
    handoff_chunks_pulled: int = 0
    pull_failures: int = 0
    peer_sent_bytes: int = 0
    peer_received_bytes: int = 0
    peer_nixl_bytes: int = 0
    peer_nixl_fallbacks: int = 0
    peer_sessions_opened: int = 0
    peer_sessions_refused: int = 0
    peer_faults: int = 0
    directory_chunks_told: int = 0
    directory_failures: int = 0
    sessions_opened: int = 0
    sessions_refused: int = 0
    session_errors: int = 0
    requests: int = 0
    request_errors: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return name -> value."""
        return msgspec.structs.asdict(self)
