"""How long the event loop is silent while the disk tier takes what it is given.

A task wakes every millisecond, without the tier at work and then while it writes; the longest
waits are shown, and what the loop's thread did in them by the kernel's account: *ran*, or *was
ready* and was not given a processor. What is neither, it waited for another thread of its own
process, that is for the interpreter's lock. With --busy, so many processes copy memory meanwhile;
with --nice, the disk's threads have that much less priority than the loop.

What it shows on two processors: nothing above some milliseconds with up to two busy processes.
With four and more the loop waits for its turn like everybody else, and giving the disk's threads
less priority makes it worse: one that is not let on holds the lock.

Run: python -m tests.bench.disk_silence [--busy 2] [--nice 0] [--rounds 5] [--directory DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvstore.hashing import root_of
from kvstore.limits import MIB
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.transfer.arena import Arena
from kvstore.transfer.copies import digest_blocks
from kvstore.types import Digest, HeadRange, NamespaceId

CHUNK_BYTES = 4 * MIB
CHUNKS = 64
AT_ONCE = 4
TICK_SECONDS = 0.001
COPY = (
    "import numpy as np\na, b = np.ones(1 << 26, 'u1'), np.zeros(1 << 26, 'u1')\nwhile 1: b[:] = a"
)

Chunk = tuple[Shard, memoryview]


class Silence(NamedTuple):
    """One wait of the loop, in ms."""

    lasted: float
    ran: float
    was_ready: float


def thread_times() -> tuple[float, float]:
    """Return for how many ms this thread has run, and has waited for a processor."""
    ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return int(ran) / 1e6, int(waited) / 1e6


async def listen(found: list[Silence]) -> None:
    """Note every wait, until cancelled."""
    while True:
        before, began = thread_times(), time.perf_counter()
        await asyncio.sleep(TICK_SECONDS)
        lasted = (time.perf_counter() - began - TICK_SECONDS) * 1e3
        ran, waited = thread_times()
        found.append(Silence(lasted, ran - before[0], waited - before[1]))


async def write_all(tier: DiskTier, chunks: Sequence[Chunk]) -> None:
    """Write all *chunks*, some at once."""
    left = iter(chunks)

    async def work() -> None:
        for shard, source in left:
            assert await tier.write(shard, source) is not None

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


def make_chunks(arena: Arena) -> list[Chunk]:
    """Return chunks that fill *arena*, all different."""
    chunks: list[Chunk] = []
    for number in range(CHUNKS):
        source = arena.view[number * CHUNK_BYTES :][:CHUNK_BYTES]
        source[:8] = number.to_bytes(8, "little")
        key = ShardKey(
            NamespaceId(b"b" * 16), Digest(number.to_bytes(32, "little")), HeadRange(0, 1)
        )
        chunks.append((Shard(key, None, CHUNK_BYTES, root_of(digest_blocks(source))), source))
    return chunks


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Let *count* processes copy memory."""
    running = [subprocess.Popen([sys.executable, "-c", COPY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


async def measure(directory: Path, arguments: argparse.Namespace) -> None:
    """Print the longest waits of every round."""
    arena = Arena.create(CHUNKS * CHUNK_BYTES)
    while arena.prefault_step():
        pass
    chunks = make_chunks(arena)
    tier = await open_disk_tier(directory, capacity_bytes=2 * CHUNKS * CHUNK_BYTES)
    await write_all(tier, chunks)
    for thread in threading.enumerate():
        if arguments.nice and thread.name.startswith("kvstore-disk") and thread.native_id:
            os.setpriority(os.PRIO_PROCESS, thread.native_id, arguments.nice)
    with busy(arguments.busy):
        for _ in range(arguments.rounds):
            ways = {"idle": asyncio.sleep(0.3), "writing": write_all(tier, chunks)}
            for name, work in ways.items():
                found: list[Silence] = []
                listening = asyncio.create_task(listen(found))
                began = time.perf_counter()
                await work
                seconds = time.perf_counter() - began
                listening.cancel()
                worst = ", ".join(
                    f"{one.lasted:.0f} ({one.ran:.0f} ran, {one.was_ready:.0f} was ready)"
                    for one in sorted(found, reverse=True)[:3]
                )
                print(f"{name:8} {seconds:5.2f} s, longest waits in ms: {worst}", flush=True)
    tier.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None, help="where to make files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="disk-silence-") as directory:
        asyncio.run(measure(Path(directory), arguments))


if __name__ == "__main__":
    main()
