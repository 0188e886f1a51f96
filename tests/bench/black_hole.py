"""What a Redis that swallows everything costs the host tier: nothing, that is the goal.

Two daemons take turns: one without Redis, one whose Redis accepts connections and never says a
word. Both store and load the same chunks, which stay in the host tier; what differs is what the
second daemon makes of the silence. It is greeted at the start, so its breaker is open before
the first call: every round therefore has new chunks, which are offered to it, and look-ups of
chunks that nobody has, which would ask it.

Run: python -m tests.bench.black_hole [--rounds 40] [--json]
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from kvstore.client.sync import Space
from kvstore.hashing import chunk_digests
from kvstore.protocol.manifest import Manifest
from kvstore.transfer.copies import Runs
from tests.support.daemon import Daemon

CHUNKS = 16
CALLS_PER_ROUND = 50
MANIFEST = Manifest(
    model="black-hole",
    revision="1",
    dtype="bfloat16",
    layers=4,
    kv_heads=4,
    head_dim=64,
    chunk_tokens=256,
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as hole:
        # Connections are completed by the kernel and never taken.
        url = f"redis://127.0.0.1:{hole.getsockname()[1]}"
        found = measure(Path(folder), url, arguments.rounds)
    print(json.dumps(found) if arguments.json else as_text(found))


def measure(folder: Path, url: str, rounds: int) -> dict[str, float]:
    """Return p50 and p99 of a call in ms, with and without the hole, and what the breaker did."""
    settings = {"tiers.host.capacity": "256MiB"}
    homes = [folder / "without", folder / "with"]
    for home in homes:
        home.mkdir()
    with (
        Daemon(homes[0], settings) as without,
        Daemon(homes[1], settings | {"tiers.redis.url": url}) as swallowed,
        without.connect() as first,
        swallowed.connect() as second,
    ):
        spaces = {"without": first.attach(MANIFEST), "with": second.attach(MANIFEST)}
        calls: dict[str, list[float]] = {name: [] for name in spaces}
        for number in range(rounds):
            for name, space in spaces.items():
                calls[name] += one_round(space, number)
        redis = next(tier for tier in swallowed.stats().tiers if tier.tier == "redis")
    found: dict[str, float] = {"breaker open": float(redis.state != "ready")}
    for name, times in calls.items():
        found[f"{name} p50"] = statistics.median(times)
        found[f"{name} p99"] = float(np.percentile(times, 99))
    found["p99 ratio"] = found["with p99"] / found["without p99"]
    return found


def one_round(space: Space, number: int) -> list[float]:
    """Store new chunks, then look them up and load them again and again; return ms a call."""
    tokens = np.arange(MANIFEST.chunk_tokens * CHUNKS, dtype=np.uint32) + number * 1_000_000
    digests = chunk_digests(tokens, MANIFEST.chunk_tokens)
    strangers = chunk_digests(tokens + 500_000, MANIFEST.chunk_tokens)
    memory = np.full((CHUNKS, MANIFEST.chunk_bytes), number % 256, np.uint8)
    chunks = [Runs.of_buffer(row) for row in memory]
    space.store(digests, chunks)
    times = []
    for _ in range(CALLS_PER_ROUND):
        began_at = time.perf_counter()
        space.lookup(strangers)
        with space.load(digests) as loaded:
            loaded.copy_to(chunks)
        times.append((time.perf_counter() - began_at) * 1e3)
    return times


def as_text(found: dict[str, float]) -> str:
    """Return one line a figure."""
    return "\n".join(f"{name:14s} {value:8.3f}" for name, value in found.items())


if __name__ == "__main__":
    main()
