"""How long a disk tier of many small chunks takes until it is ready, and what it costs in memory.

Writes the index of so many chunks of one page as the tier would have, without payloads: a start
reads none. Then, in a fresh process: opens the tier, and goes through all that was recovered, as
the store does. Prints both times and the processor's share of them, beside the allowance of 2 s
and 1 s for each 100,000 chunks, a floor (reading the index file alone), and the memory that stays,
for each chunk.

Run: python tests/bench/disk_start.py [--chunks 1000000] [--directory DIR] [--rounds 3] [--json]
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
from pathlib import Path

from kvstore.limits import MIB
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.disk_layout import RECORD_BYTES, fingerprint_of, footprint, pack_record
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.types import Digest, HeadRange, NamespaceId, Root

SIZE_BYTES = 4096
NAMESPACE = NamespaceId(b"benchmark" + bytes(7))


def capacity_for(chunks: int) -> int:
    """Return a capacity with room for so many chunks."""
    return chunks * footprint(SIZE_BYTES) * 64 // 62 + MIB


def write_index(path: Path, chunks: int, seed: int) -> None:
    """Write the records of *chunks* chunks, as they would lie after stores and removals."""
    order = list(range(chunks))
    with (path / "index").open("wb") as file:
        for number in order:
            digest = Digest((number * 0x9E3779B97F4A7C15 % 2**256).to_bytes(32, "little"))
            shard = Shard(ShardKey(NAMESPACE, digest, HeadRange(0, 8)), None, SIZE_BYTES, Root(1))
            # The order of extents is not that of age.
            page = 2 * (number * 7919 % chunks)
            fingerprint = fingerprint_of(shard.key, seed)
            file.write(pack_record(shard, sequence=number + 1, page=page, fingerprint=fingerprint))


def resident_bytes() -> int:
    """Return how much memory this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def start(path: Path, chunks: int) -> dict[str, float]:
    """Open the tier once and return what it took."""
    before = resident_bytes()
    began = time.perf_counter()
    text = (path / "index").read_bytes()
    floor = time.perf_counter() - began
    assert len(text) == chunks * RECORD_BYTES
    del text
    cpu_began, began = time.process_time(), time.perf_counter()
    tier = await open_disk_tier(path, capacity_bytes=capacity_for(chunks))
    opened = time.perf_counter() - began
    found = sum(1 for _ in tier.recover())
    recovered = time.perf_counter() - began
    assert found == chunks, f"{found} of {chunks}"
    figures = {
        "read_index_seconds": floor,
        "open_seconds": opened,
        "ready_seconds": recovered,
        "ready_cpu_seconds": time.process_time() - cpu_began,
        "allowed_seconds": 2 + chunks / 100_000,
        "bytes_a_chunk": (resident_bytes() - before) / chunks,
    }
    tier.close()
    return figures


async def prepare(path: Path, chunks: int) -> None:
    """Make a tier in *path*, then give it its index."""
    tier = await open_disk_tier(path, capacity_bytes=capacity_for(chunks))
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
        command = [sys.executable, __file__, "--once", directory, "--chunks", str(options.chunks)]
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
