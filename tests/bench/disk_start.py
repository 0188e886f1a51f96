"""How long a disk tier of many small chunks takes until it is ready, and what it costs in memory.

Writes the index of so many chunks of one page as the tier would have, in prefixes of 512, without
payloads: a start reads none. Then, in a fresh process: opens the tier, and takes all of it into the
index of a store, as the daemon does before it serves. Prints both times and the processor's share
of them, beside the allowance of 2 s and 1 s for each 100,000 chunks, a floor (reading the index
file alone), and the memory that stays, for each chunk, in tier and store.

Run: python -m tests.bench.disk_start [--chunks 1000000] [--directory DIR] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from kvstore.limits import MIB
from kvstore.metrics import Counters
from kvstore.protocol.manifest import Manifest, encode_namespace
from kvstore.store.quota import Share, Shares
from kvstore.store.shelves import SlowTier
from kvstore.store.stock import take_stock
from kvstore.store.store import Store
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_layout import RECORD_BYTES, fingerprint_of, footprint, pack_record
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.tiers.host import HostTier
from kvstore.transfer.arena import Arena
from kvstore.types import Digest, Root, TierKind

SIZE_BYTES = 4096
PREFIX_CHUNKS = 512
MANIFEST = Manifest(
    model="benchmark", revision="1", dtype="opaque", layers=1, kv_heads=1, head_dim=1,
    chunk_tokens=1, layout="opaque", opaque_bytes=SIZE_BYTES,
)  # fmt: skip
NAMESPACE = MANIFEST.namespace_id()
ROOT = Root(1)


def capacity_for(chunks: int) -> int:
    """Return a capacity with room for so many chunks."""
    return chunks * footprint(SIZE_BYTES) * 64 // 62 + MIB


def write_index(path: Path, chunks: int, seed: int) -> None:
    """Write the records of *chunks* chunks, as they would lie after stores and removals."""
    digest = None
    with (path / "index").open("wb") as file:
        for number in range(chunks):
            parent = digest if number % PREFIX_CHUNKS else None
            digest = Digest(sha256(b"%d" % number).digest())
            shard = Shard(ShardKey(NAMESPACE, digest, MANIFEST.all_heads), parent, SIZE_BYTES, ROOT)
            # The order of extents is not that of age.
            page = 2 * (number * 7919 % chunks)
            fingerprint = fingerprint_of(shard.key, seed)
            file.write(pack_record(shard, sequence=number + 1, page=page, fingerprint=fingerprint))


def resident_bytes() -> int:
    """Return how much memory this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_store(tier: DiskTier) -> Store:
    """Return a store over *tier* and a host tier of next to nothing."""
    shares = Shares("disk", tier.usage().capacity_bytes, [Share("")])
    return Store(
        HostTier(Arena.create(MIB)),
        eviction="s3fifo",
        lease_ttl_seconds=60.0,
        counters=Counters(),
        slower=[SlowTier(TierKind.DISK, "s3fifo", shares)],
    )


async def start(path: Path, chunks: int) -> dict[str, float]:
    """Open the tier and take stock of it once; return what that took."""
    before = resident_bytes()
    began = time.perf_counter()
    text = (path / "index").read_bytes()
    floor = time.perf_counter() - began
    assert len(text) == chunks * RECORD_BYTES
    del text
    cpu_began, began = time.process_time(), time.perf_counter()
    tier = await open_disk_tier(path, capacity_bytes=capacity_for(chunks))
    opened = time.perf_counter() - began
    store = make_store(tier)
    stock = take_stock(store, tier)
    ready = time.perf_counter() - began
    assert stock.shards == chunks, f"{stock} of {chunks}"
    figures = {
        "read_index_seconds": floor,
        "open_seconds": opened,
        "ready_seconds": ready,
        "ready_cpu_seconds": time.process_time() - cpu_began,
        "allowed_seconds": 2 + chunks / 100_000,
        "bytes_a_chunk": (resident_bytes() - before) / chunks,
    }
    tier.close()
    store.host.close()
    return figures


async def prepare(path: Path, chunks: int) -> None:
    """Make a tier in *path*, then give it its index."""
    tier = await open_disk_tier(path, capacity_bytes=capacity_for(chunks))
    await tier.introduce(NAMESPACE, encode_namespace(MANIFEST, ""))
    seed = tier._directory.seed
    tier.close()
    write_index(path, chunks, seed)


def main() -> None:
    """Measure some starts, each in a process of its own, and print a line or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, default=None, help="where to make files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(asyncio.run(start(options.once, options.chunks))))
        return
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="disk-start-") as directory:
        asyncio.run(prepare(Path(directory), options.chunks))
        command = [sys.executable, "-m", "tests.bench.disk_start"]
        command += ["--once", directory, "--chunks", str(options.chunks)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            for _ in range(options.rounds)
        ]
    figures = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
    if options.json:
        print(json.dumps({"chunks": options.chunks, **figures}, indent=2))
        return
    print(f"{options.chunks} chunks: " + ", ".join(f"{k} {v}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
