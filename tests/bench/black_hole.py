"""What a Redis that swallows everything costs the host tier: nothing, that is the goal.

Three daemons take turns: one without Redis, one whose Redis accepts connections and never says
a word, and a second one without, which shows what the machine alone makes of it. All store and
load the same chunks, which stay in the host tier; what differs is what the one makes of the
silence. It is greeted at the start, so its breaker is open before the first call: every round
therefore has new chunks, which are offered to it, and look-ups of chunks that nobody has, which
would ask it.

A block is so many calls to each daemon in turn, the order changing from block to block. Of each
block the p99 is taken, and its ratio to that of the first daemon in the same block; what is
shown are medians over all blocks.

Run: python -m tests.bench.black_hole [--blocks 20] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
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
ROUNDS_PER_BLOCK = 8
WITHOUT, HOLE, AGAIN = "without", "with", "without again"
MANIFEST = Manifest(
    model="black-hole",
    revision="1",
    dtype="bfloat16",
    layers=4,
    kv_heads=4,
    head_dim=64,
    chunk_tokens=64,
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as hole:
        # Connections are completed by the kernel and never taken.
        url = f"redis://127.0.0.1:{hole.getsockname()[1]}"
        found = measure(Path(folder), url, arguments.blocks)
    print(json.dumps(found) if arguments.json else as_text(found))


def measure(folder: Path, url: str, blocks: int) -> dict[str, float]:
    """Return medians of p50 and p99 of a call in ms, and of the ratios of p99s."""
    settings = {"tiers.host.capacity": "256MiB"}
    calls: dict[str, list[list[float]]] = {WITHOUT: [], HOLE: [], AGAIN: []}
    with contextlib.ExitStack() as running:
        spaces: dict[str, Space] = {}
        for name in calls:
            home = folder / name
            home.mkdir()
            more = {"tiers.redis.url": url} if name == HOLE else {}
            daemon = running.enter_context(Daemon(home, settings | more))
            spaces[name] = running.enter_context(daemon.connect()).attach(MANIFEST)
            if name == HOLE:
                swallowed = daemon
        for block in range(blocks + 1):
            turn = block % len(spaces)
            for name in [*spaces, *spaces][turn : turn + len(spaces)]:
                calls[name].append(one_block(spaces[name], block))
        redis = next(tier for tier in swallowed.stats().tiers if tier.tier == "redis")
    found: dict[str, float] = {"breaker open": float(redis.state != "ready")}
    # The first block warms everything up.
    p99s = {name: np.percentile(times[1:], 99, axis=1) for name, times in calls.items()}
    for name, times in calls.items():
        found[f"{name} p50"] = float(np.median(np.median(times[1:], axis=1)))
        found[f"{name} p99"] = float(np.median(p99s[name]))
    for name in (HOLE, AGAIN):
        found[f"p99 ratio, {name}"] = float(np.median(p99s[name] / p99s[WITHOUT]))
    return found


def one_block(space: Space, number: int) -> list[float]:
    """Return ms a call of all rounds of one block."""
    first = number * ROUNDS_PER_BLOCK
    rounds = [one_round(space, first + number) for number in range(ROUNDS_PER_BLOCK)]
    return [time for times in rounds for time in times]


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
    return "\n".join(f"{name:25s} {value:8.3f}" for name, value in found.items())


if __name__ == "__main__":
    main()
