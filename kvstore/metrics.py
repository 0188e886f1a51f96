"""What the daemon counts. Counters only grow; rates are for the reader to make."""

from __future__ import annotations

import msgspec


class Counters(msgspec.Struct, kw_only=True):
    """All counters of one daemon, by the names under which they are published.

    For look-ups, ready + arriving + declined + unavailable + miss is the number of keys asked:
    *declined* ones would take longer to load than to compute, *unavailable* ones are only in
    tiers that do not answer at present. The hits of all tiers together are the ready ones.
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
    sessions_opened: int = 0
    sessions_refused: int = 0
    session_errors: int = 0
    requests: int = 0
    request_errors: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return name -> value."""
        return msgspec.structs.asdict(self)
