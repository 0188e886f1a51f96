"""What the Redis tier counts."""

from __future__ import annotations

import msgspec


class RedisCounters(msgspec.Struct):
    """What has happened since the start. All only grow."""

    connections: int = 0
    failures: int = 0
    """Calls that ended because a server was unreachable, broke off or answered nonsense."""

    timeouts: int = 0
    """Those of them that ended for want of an answer in time."""

    refusals: int = 0
    """Calls that a server refused: loading, read-only, no rights."""

    redirects: int = 0
    full: int = 0
    """Shards not kept because the server had no memory left."""

    already_there: int = 0
    """Shards that were asked to be written and that another writer had put there before."""

    vanished: int = 0
    """Shards that were evicted or expired between look-up and load."""

    quarantined: int = 0
    """Shards and records removed because their bytes were not what they should be."""

    foreign: int = 0
    """Keys of other programs met under our names, and left alone."""

    newer: int = 0
    """Records of a newer format met, and left alone."""
