"""What a cold start costs: the daemon's own, and the first stores into an arena nobody touched."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Final

from kvstore.bench.daemon import BenchDaemon
from kvstore.bench.shapes import SMALL_MODEL, Pool
from kvstore.limits import MIB
from kvstore.types import Digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.bench.report import Figures
    from kvstore.client.sync import Space
    from kvstore.transfer.copies import Runs

_STORED_BYTES: Final = 24 * MIB


def measure_cold_start(arena_bytes: int) -> Figures:
    """Return how long start and prefault of *arena_bytes* take, and stores in three states.

    *cold*: not prefaulted; *prefaulted*: backed by memory, but new to this process; *warm*:
    the same room a second time.
    """
    pool = Pool(_STORED_BYTES)
    runs = pool.chunks(SMALL_MODEL, "contiguous", _STORED_BYTES // SMALL_MODEL.chunk_bytes)
    with BenchDaemon(arena_bytes, checksums=True, prefault=False) as daemon:
        space = daemon.client.attach(SMALL_MODEL.manifest("contiguous"))
        empty_ready, cold = daemon.ready_seconds, _gb_per_s(space, runs)
    with BenchDaemon(arena_bytes, checksums=True, prefault=True) as daemon:
        space = daemon.client.attach(SMALL_MODEL.manifest("contiguous"))
        ready, backed = daemon.ready_seconds, daemon.prefaulted_seconds
        prefaulted, warm = _gb_per_s(space, runs), _gb_per_s(space, runs)
    return {
        "arena_mib": arena_bytes // MIB,
        "ready_without_prefault_seconds": empty_ready,
        "ready_seconds": ready,
        "prefaulted_seconds": backed,
        "store_cold_gb_per_s": cold,
        "store_prefaulted_gb_per_s": prefaulted,
        "store_warm_gb_per_s": warm,
    }


def _gb_per_s(space: Space, runs: Sequence[Runs]) -> float:
    """Store *runs* one by one and delete them again; return the speed of the stores."""
    digests = [Digest(hashlib.sha256(bytes([at])).digest()) for at in range(len(runs))]
    start = time.perf_counter()
    for digest, source in zip(digests, runs, strict=True):
        space.store([digest], [source])
    seconds = time.perf_counter() - start
    space.delete(digests)
    return sum(source.size_bytes for source in runs) / seconds / 1e9
