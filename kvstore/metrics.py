"""What the daemon counts. Counters only grow; rates are for the reader to make."""

from __future__ import annotations

import msgspec


class Counters(msgspec.Struct, kw_only=True):
    """All counters of one daemon, by the names under which they are published.

    For look-ups, ready + arriving + miss is the number of keys asked.
    """

    lookup_chunks_ready: int = 0
    lookup_chunks_arriving: int = 0
    lookup_chunks_miss: int = 0
    load_chunks: int = 0
    load_bytes: int = 0
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
    lease_expirations: int = 0
    sessions_opened: int = 0
    sessions_refused: int = 0
    session_errors: int = 0
    requests: int = 0
    request_errors: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return name -> value."""
        return msgspec.structs.asdict(self)
