"""Every message of the wire with its plain form: what its MessagePack array must hold.

A test keeps both equal to the bytes in tests/protocol/golden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from kvstore.protocol import messages as m

GOLDEN_DIRECTORY: Final = Path(__file__).parents[1] / "protocol" / "golden"

A, B = bytes(range(32)), bytes(range(32, 64))
_MANIFEST = b'{"model":"m"}'

_STATS = {
    "version": "0.1.0",
    "pid": 4242,
    "state": "ready",
    "socket": "/run/kvstore/kvstore.sock",
    "uptime_seconds": 1.5,
    "resident_bytes": 50_000_000,
    "sessions": 2,
    "leases": 1,
    "reservations": 0,
    "tiers": [
        {
            "tier": "host",
            "capacity_bytes": 4_294_967_296,
            "used_bytes": 36_864,
            "largest_free_bytes": 4_294_930_432,
            "chunks": 1,
        }
    ],
    "namespaces": [
        {
            "namespace": "61648425e75b93c389523e3b417f176f",
            "model": "llama",
            "revision": "1",
            "dtype": "bfloat16",
            "group": "",
            "chunk_tokens": 256,
            "chunk_bytes": 32_768,
            "chunks": 1,
        }
    ],
    "namespaces_count": 1,
    "arena": {
        "kind": "memfd",
        "size_bytes": 4_294_967_296,
        "prefaulted_bytes": 67_108_864,
        "huge_pages": False,
    },
    "counters": {"commit_chunks": 1, "requests": 7},
}


def _stats() -> m.DaemonStats:
    nested = {
        "tiers": [m.TierStats(**_STATS["tiers"][0])],
        "namespaces": [m.NamespaceStats(**_STATS["namespaces"][0])],
        "arena": m.ArenaStats(**_STATS["arena"]),
    }
    return m.DaemonStats(**(_STATS | nested))


class Golden(NamedTuple):
    """A message, and the list that MessagePack must make of it."""

    message: m.Message
    plain: list[object]


REQUESTS: Final = {
    "hello": Golden(m.Hello(1, 5000, 1, "engine"), [1, 1, 5000, 1, "engine"]),
    "attach": Golden(m.Attach(2, 5000, _MANIFEST, 32_768), [2, 2, 5000, _MANIFEST, 32_768]),
    "lookup": Golden(
        m.Lookup(3, 50, 0, [A, B], 2, wait=True, lease=True), [3, 3, 50, 0, [A, B], 2, True, True]
    ),
    "load": Golden(m.Load(4, 50, 0, [A], 2, 4), [4, 4, 50, 0, [A], 2, 4]),
    "reserve": Golden(
        m.Reserve(5, 50, 1, [B], A, 0, 4, [70_000]), [5, 5, 50, 1, [B], A, 0, 4, [70_000]]
    ),
    "commit": Golden(
        m.Commit(6, 50, [m.Filled(9, 2**64 - 1), m.Filled(10, 0)]),
        [6, 6, 50, [[9, 2**64 - 1], [10, 0]]],
    ),
    "abort": Golden(m.Abort(7, 50, [9, 10]), [7, 7, 50, [9, 10]]),
    "release": Golden(m.Release(8, 50, [300]), [8, 8, 50, [300]]),
    "pin": Golden(m.Pin(9, 50, 0, [A], hard=True), [9, 9, 50, 0, [A], True]),
    "unpin": Golden(m.Unpin(10, 50, 0, [A]), [10, 10, 50, 0, [A]]),
    "delete": Golden(m.Delete(11, 50, 0, [A, B]), [11, 11, 50, 0, [A, B]]),
    "stats": Golden(m.Stats(12, 600_000), [12, 12, 600_000]),
    "ping": Golden(m.Ping(2**63 - 1, 50, b"\x00payload"), [13, 2**63 - 1, 50, b"\x00payload"]),
}

REPLIES: Final = {
    "welcome": Golden(m.Welcome(1, 1, "kvstore 0.1.0"), [65, 1, 1, "kvstore 0.1.0"]),
    "attached": Golden(
        m.Attached(
            2, 0, A[:16], 2**32, 60_000, checksums=True, verify_loads=False, prefaulted=True
        ),
        [66, 2, 0, A[:16], 2**32, 60_000, True, False, True],
    ),
    "found": Golden(m.Found(3, 5, 1, [(2, 4), (4, 1)], 77), [67, 3, 5, 1, [[2, 4], [4, 1]], 77]),
    "loaded": Golden(
        m.Loaded(4, 77, [[m.Shard(0, 2, 4096, 16_384, 2**64 - 1), m.Shard(2, 4, 0, 1, 0)], []]),
        [68, 4, 77, [[[0, 2, 4096, 16_384, 2**64 - 1], [2, 4, 0, 1, 0]], []]],
    ),
    "reserved": Golden(
        m.Reserved(5, [m.Slot(0, 9, 2**40), m.Slot(1)]), [69, 5, [[0, 9, 2**40], [1, 0, 0]]]
    ),
    "committed": Golden(
        m.Committed(6, [m.Failure(9, 32, "wrong bytes")]), [70, 6, [[9, 32, "wrong bytes"]]]
    ),
    "done": Golden(m.Done(7, 2, 1), [71, 7, 2, 1]),
    "pong": Golden(m.Pong(8, b"\x00payload"), [72, 8, b"\x00payload"]),
    "stats_reply": Golden(m.StatsReply(9, _stats()), [73, 9, _STATS]),
    "error": Golden(m.Error(0, 20, "no space", retryable=True), [127, 0, 20, "no space", True]),
}

ALL: Final = REQUESTS | REPLIES


def golden_bytes(name: str) -> bytes:
    """Return the golden body of message *name*."""
    return bytes.fromhex((GOLDEN_DIRECTORY / f"{name}.hex").read_text())
