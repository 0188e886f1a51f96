"""What this machine's memory allows, and how close gather, scatter and checksums come.

Prints GB/s: plain copies (memmove, numpy), streaming copies (gather and scatter without
checksums are the floor of a transfer of the same addresses), the same with checksums, and
checksums alone. Sources are random pages of a pool larger than the caches, targets are a warm
shared mapping. Rounds are interleaved, so that a noisy moment hits every row; medians are shown.

Run: python tests/bench/copy_floors.py [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xxhash

from kvstore.limits import CHECKSUM_BLOCK_BYTES, KIB, MIB
from kvstore.transfer import copies
from kvstore.transfer.copies import Runs
from kvstore.transfer.native import address_of

POOL_SIZE_BYTES = 256 * MIB
SHARED_SIZE_BYTES = 128 * MIB

Move = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A shape of runs: *tokens* > 1 means pages that store tokens before heads."""

    name: str
    total_bytes: int
    page_bytes: int
    heads: int = 1
    tokens: int = 1
    pages_per_plane: int = 1


CASES = (
    Case("contiguous 32 MiB", 32 * MIB, 32 * MIB),
    Case("32 KiB pieces, 32 MiB", 32 * MIB, 32 * KIB),
    Case("4 KiB pieces, 32 MiB", 32 * MIB, 4 * KIB),
    Case("4 KiB pieces, 3 MiB", 3 * MIB, 4 * KIB),
    Case("256 B pieces, 32 MiB", 32 * MIB, 32 * KIB, heads=8, tokens=16, pages_per_plane=16),
)


class Memory:
    """A pool of pages to move from and to, and a warm shared mapping on the other side."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        # Filled, so that every page is faulted in before anything is measured.
        self.pool = np.frombuffer(mmap.mmap(-1, POOL_SIZE_BYTES), np.uint8)
        self.pool[:] = rng.integers(0, 256, POOL_SIZE_BYTES, dtype=np.uint8)
        handle = os.memfd_create("copy-floors")
        os.ftruncate(handle, SHARED_SIZE_BYTES)
        self.shared = np.frombuffer(mmap.mmap(handle, SHARED_SIZE_BYTES), np.uint8)
        self.shared[:] = 1
        os.close(handle)
        self._rng = rng
        self._next = 0

    def pages(self, case: Case) -> np.ndarray:
        """Return random page numbers, enough for the case."""
        count = case.total_bytes // case.page_bytes
        return self._rng.permutation(POOL_SIZE_BYTES // case.page_bytes)[:count]

    def runs(self, case: Case, pages: np.ndarray) -> Runs:
        """Return the runs of *pages*, heads outermost within each plane."""
        row = case.page_bytes // (case.heads * case.tokens)
        planes = pages.reshape(-1, 1, case.pages_per_plane)
        offsets = planes * case.page_bytes + np.arange(case.heads)[None, :, None] * row
        addresses = (address_of(self.pool.data) + offsets.ravel()).astype(np.uint64)
        return Runs(addresses, row, case.tokens, row * case.heads, owner=self.pool)

    def room(self, size_bytes: int) -> np.ndarray:
        """Return the next part of the shared mapping: one that the caches no longer hold."""
        if self._next + size_bytes > SHARED_SIZE_BYTES:
            self._next = 0
        start = self._next
        self._next += -(-size_bytes // CHECKSUM_BLOCK_BYTES) * CHECKSUM_BLOCK_BYTES
        return self.shared[start : start + size_bytes]


def python_digests(buffer: np.ndarray) -> list[int]:
    """Digest block by block with python-xxhash, as without the library."""
    step = CHECKSUM_BLOCK_BYTES
    return [xxhash.xxh3_64_intdigest(buffer[at : at + step]) for at in range(0, buffer.size, step)]


def moves_of(memory: Memory, case: Case) -> dict[str, Move]:
    """Return what is timed in one round, each on memory that the one before did not touch."""
    pages, room = memory.pages(case), [memory.room(case.total_bytes) for _ in range(7)]
    runs = [memory.runs(case, memory.pages(case)) for _ in range(5)]
    shape = (-1, case.tokens, case.heads, case.page_bytes // case.tokens // case.heads)
    table = memory.pool.reshape(shape)
    found: dict[str, Move] = {
        "gather": lambda: copies.gather(room[0], runs[0], checksums=False),
        "gather + digests": lambda: copies.gather(room[1], runs[1], checksums=True),
        "scatter": lambda: copies.scatter(runs[2], room[2], checksums=False),
        "scatter + digests": lambda: copies.scatter(runs[3], room[3], checksums=True),
        "digests": lambda: copies.digest_blocks(room[4]),
        "digests, python-xxhash": lambda: python_digests(room[5]),
    }
    if case.tokens == 1:
        target = room[6].reshape(len(pages), 1, 1, -1)
        found["numpy take"] = lambda: np.take(table, pages, axis=0, out=target, mode="clip")
    if len(pages) == 1:
        places = address_of(room[6].data), int(runs[4].addresses[0])
        found["memmove"] = lambda: ctypes.memmove(*places, case.total_bytes)
    return found


def measure(memory: Memory, case: Case, rounds: int) -> dict[str, float]:
    """Return the median GB/s of every move of *case*."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, move in moves_of(memory, case).items():
            start = time.perf_counter()
            move()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {
        name: round(case.total_bytes / statistics.median(values) / 1e9, 2)
        for name, values in seconds.items()
    }


def main() -> None:
    """Measure every case and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    memory = Memory()
    found = {case.name: measure(memory, case, options.rounds) for case in CASES}
    if options.json:
        print(json.dumps({"kernel": copies.KERNEL, "gb_per_s": found}, indent=2))
        return
    print(f"kernel: {copies.KERNEL}; GB/s, median of {options.rounds} rounds")
    for case, rates in found.items():
        print(f"{case}: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
