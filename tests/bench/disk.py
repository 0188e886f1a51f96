"""Stores to and loads from the disk tier, beside direct sequential I/O of the same size.

The floor is what `dd` with direct I/O does: one file, one block after the other, on the same
file system in the same run; its file is written once before, as the tier's slab is after a while.
Stores and loads go through the tier one chunk at a time (`alone`) and four at a time (`four`),
with checksums, headers and records. Loads bypass the page cache, or it is emptied of the file
first: they come from the disk. Rounds are interleaved; medians are shown.

Run: python tests/bench/disk.py [--directory DIR] [--rounds 5] [--total 512MiB] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.hashing import root_of
from kvstore.limits import MIB
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.transfer import copies
from kvstore.types import Digest, HeadRange, NamespaceId, Place
from kvstore.units import format_size, parse_size

SIZES = (MIB, 4 * MIB, 32 * MIB)
NAMESPACE = NamespaceId(b"benchmark" + bytes(7))

Rates = dict[str, list[float]]


class Memory:
    """A warm shared region, as the arena is, filled with bytes that do not compress."""

    def __init__(self, size_bytes: int) -> None:
        self.view = memoryview(mmap.mmap(-1, size_bytes))
        noise = os.urandom(MIB)
        for start in range(0, size_bytes, MIB):
            self.view[start : start + MIB] = noise[: size_bytes - start]


class Sequential:
    """The floor: one file, direct where the file system lets us, block after block."""

    def __init__(self, path: Path, total_bytes: int, *, direct: bool) -> None:
        self._path, self._total_bytes = path, total_bytes
        self._flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
        self._direct = direct

    @contextmanager
    def _opened(self) -> Iterator[int]:
        fd = os.open(self._path, self._flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def write(self, memory: Memory, size_bytes: int) -> None:
        """Fill the file from *memory* in writes of *size_bytes*."""
        with self._opened() as fd:
            for offset in range(0, self._total_bytes, size_bytes):
                assert os.pwrite(fd, memory.view[offset : offset + size_bytes], offset)
            if not self._direct:
                os.fdatasync(fd)

    def read(self, memory: Memory, size_bytes: int) -> None:
        """Read the file into *memory* in reads of *size_bytes*."""
        with self._opened() as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for offset in range(0, self._total_bytes, size_bytes):
                assert os.preadv(fd, [memory.view[offset : offset + size_bytes]], offset)


class Chunks:
    """Chunks of one size, as many as make the total, and where the tier keeps them."""

    def __init__(self, tier: DiskTier, memory: Memory, size_bytes: int, total_bytes: int) -> None:
        self._tier, self._memory, self._size_bytes = tier, memory, size_bytes
        self._kept: dict[int, tuple[Shard, Place]] = {}
        self._starts = range(0, total_bytes, size_bytes)
        self._shards = [self._shard(start) for start in self._starts]

    def _shard(self, start: int) -> Shard:
        view = self._view(start)
        key = ShardKey(NAMESPACE, Digest(start.to_bytes(32, "little")), HeadRange(0, 8))
        return Shard(key, None, len(view), root_of(copies.digest_blocks(view)))

    def _view(self, start: int) -> memoryview:
        return self._memory.view[start : start + self._size_bytes]

    async def store(self, number: int) -> None:
        """Write one chunk."""
        shard = self._shards[number]
        place = await self._tier.write(shard, self._view(self._starts[number]))
        assert place is not None, "the tier has room for all"
        self._kept[number] = shard, place

    async def load(self, number: int) -> None:
        """Read one chunk to where it came from."""
        assert await self._tier.read(*self._kept[number], self._view(self._starts[number]))

    async def clear(self) -> None:
        """Remove all chunks."""
        for shard, place in self._kept.values():
            assert await self._tier.remove(shard, place)
        self._kept.clear()

    async def each(self, act: Callable[[int], Awaitable[None]], lanes: int) -> None:
        """Do *act* with every chunk, *lanes* at a time."""
        numbers = iter(range(len(self._starts)))

        async def lane() -> None:
            for number in numbers:
                await act(number)

        await asyncio.gather(*(lane() for _ in range(lanes)))


async def measure(directory: Path, size_bytes: int, total_bytes: int, rounds: int) -> Rates:
    """Return GB/s of everything in every round."""
    memory = Memory(total_bytes)
    tier = await open_disk_tier(directory / "tier", capacity_bytes=total_bytes * 2)
    floor = Sequential(directory / "floor", total_bytes, direct=tier.is_direct)
    chunks = Chunks(tier, memory, size_bytes, total_bytes)
    rates: Rates = {}

    async def timed(name: str, work: Callable[[], Awaitable[None] | None]) -> None:
        start = time.perf_counter()
        pending = work()
        if pending is not None:
            await pending
        seconds = time.perf_counter() - start
        if name:
            rates.setdefault(name, []).append(total_bytes / seconds / 1e9)

    for number in range(rounds + 1):
        is_warm_up = number == 0
        for lanes, suffix in ((1, "alone"), (4, "four")):
            names = ("",) * 4 if is_warm_up else ("write", "store", "read", "load")
            write, store, read, load = (name and f"{name} {suffix}" for name in names)
            await timed(write, lambda: floor.write(memory, size_bytes))
            await timed(store, lambda n=lanes: chunks.each(chunks.store, n))
            await timed(read, lambda: floor.read(memory, size_bytes))
            await timed(load, lambda n=lanes: chunks.each(chunks.load, n))
            await chunks.clear()
    tier.check()
    tier.close()
    shutil.rmtree(directory / "tier")
    (directory / "floor").unlink()
    return rates


def report(rates: Rates) -> dict[str, float]:
    """Return medians in GB/s, and the median of the ratios of each round to its floor."""
    found = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    for act, floor in (("store", "write"), ("load", "read")):
        for suffix in ("alone", "four"):
            pairs = zip(rates[f"{act} {suffix}"], rates[f"{floor} {suffix}"], strict=True)
            ratio = statistics.median(got / base for got, base in pairs)
            found[f"{act} {suffix} / {floor}"] = round(ratio, 2)
    return found


def main() -> None:
    """Measure every size and print a line each, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=None, help="where to make files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--total", type=parse_size, default=512 * MIB)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="disk-bench-") as directory:
        for size_bytes in SIZES:
            work = measure(Path(directory), size_bytes, options.total, options.rounds)
            found[format_size(size_bytes)] = report(asyncio.run(work))
    if options.json:
        print(json.dumps({"kernel": copies.KERNEL, "disk": found}, indent=2))
        return
    for size, rates in found.items():
        print(f"{size}: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
