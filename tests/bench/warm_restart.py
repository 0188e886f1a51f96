"""How long a host tier takes to come back after kill -9, beside the start of an empty daemon.

A daemon over a kept arena is filled, killed and started again; the clock runs from the start of
the process until a client has looked up every chunk, and until it has loaded some of them. The
floor is the same daemon with an arena that is empty, in the same run.

Run: python tests/bench/warm_restart.py [--capacity 4GiB] [--chunk 1MiB] [--rounds 3]
     [--directory /dev/shm] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvstore.client.sync import Client, Space
from kvstore.errors import KVStoreError
from kvstore.hashing import chunk_digests, stored_size
from kvstore.limits import CHUNKS_PER_TRANSFER_MAX, KEYS_PER_REQUEST_MAX
from kvstore.protocol.manifest import Manifest
from kvstore.transfer.copies import Runs
from kvstore.types import Digest
from kvstore.units import format_size, parse_size

PREFIX_CHUNKS = 512
LOADED_CHUNKS = 64
READY_SECONDS_MAX = 60.0

Prefixes = list[list[Digest]]


class Daemon:
    """`kvstore serve` over a kept arena in *directory*."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self._socket = directory / "kvstore.sock"
        settings = {
            "server.socket": self._socket,
            "tiers.host.arena": directory / "arena",
            "tiers.host.capacity": capacity_bytes,
            "tiers.host.prefault": "false",
        }
        flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        self._command = [sys.executable, "-m", "kvstore", "serve", *flags]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Client:
        """Start the process and return a session with it, as soon as there can be one."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        ends_at = time.monotonic() + READY_SECONDS_MAX
        while time.monotonic() < ends_at:
            with contextlib.suppress(KVStoreError):
                return Client.connect(self._socket, timeout_seconds=READY_SECONDS_MAX)
            time.sleep(0.002)
        raise SystemExit("the daemon did not start")

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def manifest_of(chunk_bytes: int) -> Manifest:
    return Manifest(
        model="bench", revision="1", dtype="opaque", layers=1, kv_heads=1, head_dim=1,
        chunk_tokens=1, layout="opaque", opaque_bytes=chunk_bytes,
    )  # fmt: skip


def prefixes_of(count: int) -> Prefixes:
    """Return the digests of *count* chunks, in prefixes."""
    starts = range(0, count, PREFIX_CHUNKS)
    return [chunk_digests([at, *range(min(PREFIX_CHUNKS, count - at) - 1)], 1) for at in starts]


def fill(space: Space, prefixes: Prefixes, chunk_bytes: int) -> None:
    """Store everything."""
    payload = bytearray(os.urandom(chunk_bytes))
    sources = [Runs.of_buffer(payload)] * CHUNKS_PER_TRANSFER_MAX
    for digests in prefixes:
        for at in range(0, len(digests), CHUNKS_PER_TRANSFER_MAX):
            part = digests[at : at + CHUNKS_PER_TRANSFER_MAX]
            parent = digests[at - 1] if at else None
            report = space.store(part, sources[: len(part)], parent=parent)
            assert report.stored == len(part), "the arena has room for all"


def look_up(space: Space, prefixes: Prefixes) -> int:
    """Return how many chunks there are."""
    assert PREFIX_CHUNKS <= KEYS_PER_REQUEST_MAX
    return sum(space.lookup(digests).hits for digests in prefixes)


def load(space: Space, prefixes: Prefixes, chunk_bytes: int) -> None:
    """Load the start of the last prefix, verifying it."""
    digests = prefixes[-1][:LOADED_CHUNKS]
    targets = [Runs.of_buffer(bytearray(chunk_bytes)) for _ in digests]
    with space.load(digests) as loaded:
        assert len(loaded) == len(digests), "what was stored is there"
        loaded.copy_to(targets)


def one_start(
    daemon: Daemon, manifest: Manifest, prefixes: Prefixes, chunk_bytes: int
) -> dict[str, float]:
    """Start *daemon* and return when it was ready, had been asked for all, had given some."""
    started_at = time.perf_counter()
    with daemon.start() as client:
        times = {"ready": time.perf_counter() - started_at}
        space = client.attach(manifest)
        hits = look_up(space, prefixes)
        times["all looked up"] = time.perf_counter() - started_at
        if hits:
            load(space, prefixes, chunk_bytes)
            times["some loaded"] = time.perf_counter() - started_at
        times["hits"] = hits
    return times


@contextlib.contextmanager
def daemon_in(directory: Path, capacity_bytes: int) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvstore-bench-") as own:
        daemon = Daemon(Path(own), capacity_bytes)
        try:
            yield daemon
        finally:
            daemon.kill()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Return medians of all rounds."""
    capacity, chunk = parse_size(options.capacity), parse_size(options.chunk)
    manifest = manifest_of(chunk)
    footprint = -(-stored_size(chunk) // 4096) * 4096
    prefixes = prefixes_of(capacity // footprint)
    rounds: list[dict[str, float]] = []
    empty: list[float] = []
    with (
        daemon_in(options.directory, capacity) as daemon,
        daemon_in(options.directory, capacity) as floor,
    ):
        with daemon.start() as client:
            fill(client.attach(manifest), prefixes, chunk)
        for _ in range(options.rounds):
            # One at a time: a warm daemon goes on verifying behind what is measured.
            daemon.kill()
            empty.append(one_start(floor, manifest, prefixes, chunk)["ready"])
            floor.kill()
            rounds.append(one_start(daemon, manifest, prefixes, chunk))
    chunks = sum(map(len, prefixes))
    assert {round_["hits"] for round_ in rounds} == {chunks}, "every chunk came back"
    names = ("ready", "all looked up", "some loaded")
    return {
        "capacity": format_size(capacity),
        "chunk": format_size(chunk),
        "chunks": chunks,
        "empty ready": round(statistics.median(empty), 3),
        **{name: round(statistics.median(r[name] for r in rounds), 3) for name in names},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity", default="4GiB")
    parser.add_argument("--chunk", default="1MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure(options)
    if options.json:
        print(json.dumps(report))
        return
    print(f"{report['chunks']} chunks of {report['chunk']} in {report['capacity']}; seconds:")
    print(f"  empty daemon ready   {report['empty ready']:8.3f}")
    for name in ("ready", "all looked up", "some loaded"):
        print(f"  {name:20} {report[name]:8.3f}")


if __name__ == "__main__":
    main()
