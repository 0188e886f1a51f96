"""Every message of the wire with its plain form: what its MessagePack array must hold.

A test keeps both equal to the bytes in tests/protocol/golden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from kvstore.protocol import messages as m
from kvstore.protocol.stats import CodecStats, EngineStats
from kvstore.types import HandoffState, HintKind

GOLDEN_DIRECTORY: Final = Path(__file__).parents[1] / "protocol" / "golden"

A, B = bytes(range(32)), bytes(range(32, 64))
_MANIFEST = b'{"model":"m"}'
_PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

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
_TIER_2 = {
    "hit_chunks": 3,
    "state": "failing",
    "write": "back",
    "queued_chunks": 2,
    "queued_bytes": 65_536,
    "read_bytes_per_second": 1_000_000,
    "write_bytes_per_second": 500_000,
    "read_seconds": 0.25,
    "counters": {"timeouts": 1},
}
_TENANT = {
    "tenant": "blue",
    "tier": "host",
    "chunks": 1,
    "used_bytes": 36_864,
    "quota_bytes": 65_536,
    "floor_bytes": 0,
}
_STATS_2 = _STATS | {"tiers": [_STATS["tiers"][0] | _TIER_2], "tenants": [_TENANT]}
_CODEC = {"tier": "host", "codec": "int4kv", "stored_bytes": 9_216, "raw_bytes": 32_768}
_STATS_3 = _STATS_2 | {
    "tiers": [_STATS_2["tiers"][0] | {"codec": "hq3"}],
    "namespaces": [_STATS["namespaces"][0] | {"codec": "int4kv"}],
    "handoffs": 3,
    "handoff_chunks": 12,
    "codecs": [_CODEC],
}
_STATS_4 = _STATS_3 | {"peer_transport": "nixl (UCX over rc_mlx5/mlx5_0:1)"}
_ENGINE = {"session": 7, "client": "vllm", "counters": {"chunks_loaded": 9}}
_STATS_5 = _STATS_4 | {"engine_gpu": {"chunks_loaded": 12}, "engines": [_ENGINE]}


def _stats(plain: dict[str, object]) -> m.DaemonStats:
    nested = {
        "tiers": [m.TierStats(**plain["tiers"][0])],
        "namespaces": [m.NamespaceStats(**plain["namespaces"][0])],
        "arena": m.ArenaStats(**plain["arena"]),
        "tenants": [m.TenantStats(**tenant) for tenant in plain.get("tenants", ())],
        "codecs": [CodecStats(**codec) for codec in plain.get("codecs", ())],
        "engines": [EngineStats(**engine) for engine in plain.get("engines", ())],
    }
    return m.DaemonStats(**(plain | nested))


class Golden(NamedTuple):
    """A message, and the list that MessagePack must make of it."""

    message: m.Message
    plain: list[object]


REQUESTS: Final = {
    "hello_2": Golden(m.Hello(1, 5000, 2, "engine", "blue"), [1, 1, 5000, 2, "engine", "blue"]),
    "attach_2": Golden(
        m.Attach(2, 5000, _MANIFEST, 32_768, pool=True), [2, 2, 5000, _MANIFEST, 32_768, True]
    ),
    "lookup_4": Golden(
        m.Lookup(
            3,
            50,
            0,
            [A, B],
            2,
            wait=True,
            lease=True,
            recompute_us=70_000,
            name="cmpl-7",
            traceparent=_PARENT,
        ),
        [3, 3, 50, 0, [A, B], 2, True, True, 70_000, "cmpl-7", _PARENT],
    ),
    "load_3": Golden(m.Load(4, 50, 0, [A], 2, 4, 9, _PARENT), [4, 4, 50, 0, [A], 2, 4, 9, _PARENT]),
    "reserve_2": Golden(
        m.Reserve(5, 50, 1, [B], A, 0, 4, [70_000], _PARENT),
        [5, 5, 50, 1, [B], A, 0, 4, [70_000], _PARENT],
    ),
    "commit_2": Golden(
        m.Commit(6, 50, [m.Filled(9, 2**64 - 1), m.Filled(10, 0)], _PARENT),
        [6, 6, 50, [[9, 2**64 - 1], [10, 0]], _PARENT],
    ),
    "abort": Golden(m.Abort(7, 50, [9, 10]), [7, 7, 50, [9, 10]]),
    "release": Golden(m.Release(8, 50, [300]), [8, 8, 50, [300]]),
    "pin": Golden(m.Pin(9, 50, 0, [A], hard=True), [9, 9, 50, 0, [A], True]),
    "unpin": Golden(m.Unpin(10, 50, 0, [A]), [10, 10, 50, 0, [A]]),
    "delete_2": Golden(m.Delete(11, 50, 0, [A, B], damaged=True), [11, 11, 50, 0, [A, B], True]),
    "stats": Golden(m.Stats(12, 600_000), [12, 12, 600_000]),
    "ping_2": Golden(
        m.Ping(2**63 - 1, 50, b"\x00payload", {"chunks_loaded": 7, "lost_devices": 0}),
        [13, 2**63 - 1, 50, b"\x00payload", {"chunks_loaded": 7, "lost_devices": 0}],
    ),
    "prefetch": Golden(m.Prefetch(14, 50, 0, [A, B]), [14, 14, 50, 0, [A, B]]),
    "hint": Golden(
        m.Hint(15, 50, 0, [A], HintKind.GOES_TO, 30, "node-7"),
        [15, 15, 50, 0, [A], 1, 30, "node-7"],
    ),
    "handoff_open": Golden(
        m.HandoffOpen(16, 50, 0, "request-1", 2, 30_000), [16, 16, 50, 0, "request-1", 2, 30_000]
    ),
    "handoff_publish": Golden(
        m.HandoffPublish(17, 50, 0, "request-1", 4, [A, B]),
        [17, 17, 50, 0, "request-1", 4, [A, B]],
    ),
    "handoff_close": Golden(
        m.HandoffClose(18, 50, 0, "request-1", b"token 7"),
        [18, 18, 50, 0, "request-1", b"token 7"],
    ),
    "handoff_abort": Golden(m.HandoffAbort(19, 50, 0, "request-1"), [19, 19, 50, 0, "request-1"]),
    "handoff_await_2": Golden(
        m.HandoffAwait(20, 50, 0, "request-1", 5, "node-7", early=True, traceparent=_PARENT),
        [20, 20, 50, 0, "request-1", 5, "node-7", True, _PARENT],
    ),
    "handoff_leave": Golden(
        m.HandoffLeave(21, 50, 0, "request-1", "node-7"), [21, 21, 50, 0, "request-1", "node-7"]
    ),
}

REPLIES: Final = {
    "welcome": Golden(m.Welcome(1, 1, "kvstore 0.1.0"), [65, 1, 1, "kvstore 0.1.0"]),
    "attached_4": Golden(
        m.Attached(
            2,
            0,
            A[:16],
            2**32,
            60_000,
            checksums=True,
            verify_loads=False,
            prefaulted=True,
            through=True,
            traced=True,
            pool_bytes=2**31,
            pool_device="GPU-7",
            pool_handle=b"\x07",
        ),
        [66, 2, 0, A[:16], 2**32, 60_000, True, False, True, True, True, 2**31, "GPU-7", b"\x07"],
    ),
    "found_2": Golden(
        m.Found(3, 5, 1, [(2, 4), (4, 1)], 77, 1500), [67, 3, 5, 1, [[2, 4], [4, 1]], 77, 1500]
    ),
    "loaded": Golden(
        m.Loaded(4, 77, [[m.Shard(0, 2, 4096, 16_384, 2**64 - 1), m.Shard(2, 4, 0, 1, 0)], []]),
        [68, 4, 77, [[[0, 2, 4096, 16_384, 2**64 - 1], [2, 4, 0, 1, 0]], []]],
    ),
    "reserved": Golden(
        m.Reserved(5, [m.Slot(0, 9, 2**40), m.Slot(1)]), [69, 5, [[0, 9, 2**40], [1, 0, 0]]]
    ),
    "committed_2": Golden(
        m.Committed(6, [m.Failure(9, 32, "wrong bytes")], [10]),
        [70, 6, [[9, 32, "wrong bytes"]], [10]],
    ),
    "done": Golden(m.Done(7, 2, 1), [71, 7, 2, 1]),
    "pong": Golden(m.Pong(8, b"\x00payload"), [72, 8, b"\x00payload"]),
    "stats_reply_5": Golden(m.StatsReply(9, _stats(_STATS_5)), [73, 9, _STATS_5]),
    "handoff_opened": Golden(m.HandoffOpened(10, "node-7"), [74, 10, "node-7"]),
    "handoff_ready": Golden(
        m.HandoffReady(11, HandoffState.CLOSED, [A, B], True, 7, b"token 7"),
        [75, 11, 2, [A, B], True, 7, b"token 7"],
    ),
    "error": Golden(m.Error(0, 20, "no space", retryable=True), [127, 0, 20, "no space", True]),
}

ALL: Final = REQUESTS | REPLIES

# Written by peers of older versions, and read by all: what was appended since has its default.
OLDER: Final = {
    "hello": m.Hello(1, 5000, 1, "engine"),
    "attach": m.Attach(2, 5000, _MANIFEST, 32_768),
    "lookup": m.Lookup(3, 50, 0, [A, B], 2, wait=True, lease=True),
    "lookup_2": m.Lookup(3, 50, 0, [A, B], 2, wait=True, lease=True, recompute_us=70_000),
    "lookup_3": m.Lookup(
        3, 50, 0, [A, B], 2, wait=True, lease=True, recompute_us=70_000, name="cmpl-7"
    ),
    "delete": m.Delete(11, 50, 0, [A, B]),
    "load": m.Load(4, 50, 0, [A], 2, 4),
    "load_2": m.Load(4, 50, 0, [A], 2, 4, 9),
    "reserve": m.Reserve(5, 50, 1, [B], A, 0, 4, [70_000]),
    "commit": m.Commit(6, 50, [m.Filled(9, 2**64 - 1), m.Filled(10, 0)]),
    "handoff_await": m.HandoffAwait(20, 50, 0, "request-1", 5, "node-7", early=True),
    "ping": m.Ping(2**63 - 1, 50, b"\x00payload"),
    "attached": m.Attached(
        2, 0, A[:16], 2**32, 60_000, checksums=True, verify_loads=False, prefaulted=True
    ),
    "attached_2": m.Attached(
        2,
        0,
        A[:16],
        2**32,
        60_000,
        checksums=True,
        verify_loads=False,
        prefaulted=True,
        through=True,
    ),
    "attached_3": m.Attached(
        2,
        0,
        A[:16],
        2**32,
        60_000,
        checksums=True,
        verify_loads=False,
        prefaulted=True,
        through=True,
        traced=True,
    ),
    "found": m.Found(3, 5, 1, [(2, 4), (4, 1)], 77),
    "committed": m.Committed(6, [m.Failure(9, 32, "wrong bytes")]),
    "stats_reply": m.StatsReply(9, _stats(_STATS)),
    "stats_reply_2": m.StatsReply(9, _stats(_STATS_2)),
    "stats_reply_3": m.StatsReply(9, _stats(_STATS_3)),
    "stats_reply_4": m.StatsReply(9, _stats(_STATS_4)),
}


def golden_bytes(name: str) -> bytes:
    """Return the golden body of message *name*."""
    return bytes.fromhex((GOLDEN_DIRECTORY / f"{name}.hex").read_text())
