"""Ways to lay chunks out on disk, measured: the reason why the disk tier is a slab.

Direct I/O of one size, one call after the other: into one file at places written before (a slab),
into new room at the end of a file (a segment), into room set aside but never written, and into a
file of its own for each chunk (made, written, renamed; later removed). Prints GB/s; removal of
files counts the bytes that they hold. Segments would also have to copy what is left of them
together again, since the store evicts chunk by chunk: that is not in these figures.

Run: python tests/bench/disk_layouts.py [--directory DIR] [--rounds 3] [--total 256MiB] [--json]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvstore.limits import KIB, MIB
from kvstore.units import format_size, parse_size

SIZES = (64 * KIB, MIB, 4 * MIB, 32 * MIB)
FLAGS = os.O_RDWR | os.O_CREAT | os.O_DIRECT


class Layouts:
    """Writes and reads *total_bytes* in chunks of *size_bytes* below *directory*."""

    def __init__(self, directory: Path, size_bytes: int, total_bytes: int) -> None:
        self._directory, self._size_bytes, self._total_bytes = directory, size_bytes, total_bytes
        self._memory = memoryview(mmap.mmap(-1, size_bytes))
        self._memory[:] = os.urandom(min(size_bytes, MIB)) * max(1, size_bytes // MIB)
        self._starts = range(0, total_bytes, size_bytes)
        self.rates: dict[str, list[float]] = {}

    def one_round(self) -> None:
        """Measure all ways once, each on files of its own."""
        path = self._directory / "file"
        self._in_one_file(path, "write segment", self._write_all)
        self._in_one_file(path, "write slab", self._write_all)
        self._in_one_file(path, "read slab", self._read_all)
        path.unlink()
        fd = os.open(path, FLAGS)
        os.posix_fallocate(fd, 0, self._total_bytes)
        os.close(fd)
        self._in_one_file(path, "write room set aside", self._write_all)
        path.unlink()
        self._timed("write files", self._write_files)
        self._timed("read files", self._read_files)
        self._timed("remove files", self._remove_files)

    def _in_one_file(self, path: Path, name: str, act: Callable[[int], None]) -> None:
        fd = os.open(path, FLAGS, 0o600)
        self._timed(name, lambda: act(fd))
        os.close(fd)

    def _timed(self, name: str, act: Callable[[], None]) -> None:
        began = time.perf_counter()
        act()
        seconds = time.perf_counter() - began
        self.rates.setdefault(name, []).append(self._total_bytes / seconds / 1e9)

    def _write_all(self, fd: int) -> None:
        for start in self._starts:
            assert os.pwrite(fd, self._memory, start) == self._size_bytes

    def _read_all(self, fd: int) -> None:
        for start in self._starts:
            assert os.preadv(fd, [self._memory], start) == self._size_bytes

    def _write_files(self) -> None:
        for start in self._starts:
            fd = os.open(self._directory / "new", FLAGS, 0o600)
            assert os.pwrite(fd, self._memory, 0) == self._size_bytes
            os.close(fd)
            (self._directory / "new").rename(self._directory / f"chunk-{start}")

    def _read_files(self) -> None:
        for start in self._starts:
            fd = os.open(self._directory / f"chunk-{start}", os.O_RDONLY | os.O_DIRECT)
            assert os.preadv(fd, [self._memory], 0) == self._size_bytes
            os.close(fd)

    def _remove_files(self) -> None:
        for start in self._starts:
            (self._directory / f"chunk-{start}").unlink()


def main() -> None:
    """Measure every size and print a line each, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=None, help="where to make files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--total", type=parse_size, default=256 * MIB)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    for size_bytes in SIZES:
        with tempfile.TemporaryDirectory(dir=options.directory, prefix="layouts-") as directory:
            layouts = Layouts(Path(directory), size_bytes, options.total)
            for _ in range(options.rounds):
                layouts.one_round()
        found[format_size(size_bytes)] = {
            name: round(statistics.median(rates), 2) for name, rates in layouts.rates.items()
        }
    if options.json:
        print(json.dumps({"gb_per_s": found}, indent=2))
        return
    for size, rates in found.items():
        print(f"{size}: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
