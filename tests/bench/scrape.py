"""What scraping costs engines: chunks stored and loaded with and without somebody who looks.

An engine stores and loads prefixes through a daemon of its own. In every other round another
process asks for /metrics and /v1/status ten times a second. Prints the throughput of both, by
medians over rounds that take turns, and their ratio.

Run: python -m tests.bench.scrape [--rounds 10] [--seconds 2] [--chunk 4MiB] [--json]
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvstore.client.sync import Space
from kvstore.types import Digest
from kvstore.units import parse_size, round_size
from tests.support.admin import port_of
from tests.support.daemon import Daemon
from tests.support.making import empty_targets, loose_digest, opaque_manifest, sources_of
from tests.support.waiting import wait_until

SCRAPES_PER_SECOND = 10
PREFIX_CHUNKS = 8
PATHS = ("/metrics", "/v1/status")


def scrape(port: int) -> None:
    """Ask until standard input ends; then say how often that was."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    count = 0
    print("ready", flush=True)
    due = time.monotonic()
    # Whoever started this writes a line to end it.
    import select

    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        for path in PATHS:
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200, response.status
            response.read()
        count += 1
        due += 1 / SCRAPES_PER_SECOND
    print(count, flush=True)


class Scraper:
    """Another process that looks, inside the block."""

    def __init__(self, port: int) -> None:
        self.count = 0
        command = [sys.executable, "-m", "tests.bench.scrape", "--scrape", str(port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def end(self) -> int:
        """Stop; return how often it looked."""
        out, _ = self._process.communicate("end\n")
        return int(out)


def move(space: Space, seconds: float, number: int) -> tuple[float, int]:
    """Store and load prefixes for a while; return bytes a second, and the next number."""
    size = space.manifest.chunk_bytes * PREFIX_CHUNKS
    digests = [Digest(loose_digest(at)) for at in range(PREFIX_CHUNKS)]
    sources = sources_of(space.manifest, digests)
    _, targets = empty_targets(space.manifest, PREFIX_CHUNKS)
    moved, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        fresh = [loose_digest(number + at) for at in range(PREFIX_CHUNKS)]
        number += PREFIX_CHUNKS
        space.store(fresh, sources)
        with space.load(fresh) as loaded:
            loaded.copy_to(targets)
        moved += 2 * size
    return moved / taken, number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--chunk", type=parse_size, default=parse_size("4MiB"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scrape", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scrape:
        scrape(arguments.scrape)
        return
    alone: list[float] = []
    watched: list[float] = []
    scrapes, number = 0, 10_000
    capacity = 16 * PREFIX_CHUNKS * arguments.chunk
    settings = {"admin.listen": "127.0.0.1:0", "tiers.host.capacity": capacity}
    with tempfile.TemporaryDirectory() as folder, Daemon(Path(folder), settings) as daemon:
        port = port_of(daemon)
        with daemon.connect("bench") as client:
            arena = client.stats().arena
            wait_until(lambda: client.stats().arena.prefaulted_bytes == arena.size_bytes)
            space = client.attach(opaque_manifest(arguments.chunk))
            _, number = move(space, arguments.seconds, number)
            for _ in range(arguments.rounds):
                speed, number = move(space, arguments.seconds, number)
                alone.append(speed)
                scraper = Scraper(port)
                speed, number = move(space, arguments.seconds, number)
                scrapes += scraper.end()
                watched.append(speed)
    ratio = statistics.median(watched) / statistics.median(alone)
    if arguments.json:
        print(json.dumps({"alone": alone, "watched": watched, "scrapes": scrapes, "ratio": ratio}))
        return
    print(f"alone    {round_size(int(statistics.median(alone)))}/s")
    print(f"watched  {round_size(int(statistics.median(watched)))}/s, {scrapes} looks at each page")
    print(f"ratio    {ratio:.3f}")


if __name__ == "__main__":
    main()
