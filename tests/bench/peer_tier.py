"""Loads from another daemon's host tier over TCP on loopback, and what looking there costs.

`python -m tests.bench.peer_tier [--rounds N] [--sizes 1,8,32] [--total MIB]`

Loads are beside the raw stream of `peer_stream`, in the same rounds: the same bytes over as many
connections, nothing checked. Each shows its median, and the ratio is of the medians. What is
timed is a load, from its request to the lease on all chunks; they have been found before.

Look-ups are of 16 digests, by two daemons that ask the same Redis: one that shares, one that does
not. What nobody has, both ask Redis for; the first asks the directory, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kvstore.client.sync import Space
from kvstore.limits import MIB
from kvstore.types import Digest
from tests.bench.peer_stream import RawStream
from tests.support.hosts import called, caller, free_port
from tests.support.making import make_digests, make_manifest, opaque_manifest, sources_of
from tests.support.redis import RedisServer
from tests.support.waiting import wait_until

_STORE_AT_ONCE = 8
_LOOKUPS = 200
_LOOKUP_CHUNKS = 16


def store(space: Space, digests: Sequence[Digest]) -> None:
    for start in range(0, len(digests), _STORE_AT_ONCE):
        some = digests[start : start + _STORE_AT_ONCE]
        parent = digests[start - 1] if start else None
        space.store(some, sources_of(space.manifest, some), parent=parent)


def find(space: Space, digests: Sequence[Digest]) -> None:
    """Wait until all of *digests* are known to be at a peer."""
    wait_until(lambda: space.lookup(digests).hits == len(digests), what="the peer has all")


def forget(space: Space, digests: Sequence[Digest]) -> None:
    """Let this host have none of them again."""
    while space.delete(digests).busy:
        pass


def load(space: Space, digests: Sequence[Digest]) -> float:
    """Return the bytes per second of one load of what a peer has."""
    find(space, digests)
    started = time.perf_counter()
    with space.load(digests) as loaded:
        seconds = time.perf_counter() - started
        assert len(loaded) == len(digests), f"{len(loaded)} of {len(digests)} chunks came"
    forget(space, digests)
    return len(digests) * space.manifest.chunk_bytes / seconds


def lookup_seconds(space: Space, prompts: range, hits: int) -> float:
    """Return the median of look-ups of which each is of another prompt."""
    times = []
    for prompt in prompts:
        digests = make_digests(_LOOKUP_CHUNKS, prompt)
        started = time.perf_counter()
        found = space.lookup(digests)
        times.append(time.perf_counter() - started)
        assert found.hits <= hits, "nobody has it"
    return statistics.median(times)


def compare_loads(holder: Space, asker: Space, chunks: int, rounds: int) -> None:
    size = holder.manifest.chunk_bytes
    raw = RawStream(size, chunks)
    digests = make_digests(chunks)
    store(holder, digests)
    load(asker, digests)
    pairs = [(raw.run(), load(asker, digests)) for _ in range(rounds)]
    raw.close()
    forget(holder, digests)
    floor, found = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{size // MIB:3} MiB x {chunks:3}: peer tier {found / 1e9:.2f} GB/s, raw stream "
        f"{floor / 1e9:.2f} GB/s, ratio {found / floor:.2f}"
    )


def compare_lookups(holder: Space, asker: Space, alone: Space) -> None:
    prompts = range(1000, 1000 + _LOOKUPS)
    known = range(5000, 5000 + _LOOKUPS // 10)
    for prompt in known:
        store(holder, make_digests(_LOOKUP_CHUNKS, prompt))
    find(asker, make_digests(_LOOKUP_CHUNKS, known[-1]))
    ways = {
        "nobody has it, Redis alone": (alone, prompts, 0),
        "nobody has it, Redis and peers": (asker, prompts, 0),
        "a peer has it": (asker, known[:-1], _LOOKUP_CHUNKS),
        "a peer has it, and that is known": (asker, known[:-1], _LOOKUP_CHUNKS),
    }
    for name, (space, some, hits) in ways.items():
        print(f"look-up, {name}: {lookup_seconds(space, some, hits) * 1e3:.2f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="1,8,32", help="MiB a chunk")
    parser.add_argument("--total", type=int, default=256, help="MiB a load")
    chosen = parser.parse_args()
    sizes = [int(word) for word in chosen.sizes.split(",")]
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), free_port()
        with RedisServer(directory / "redis") as redis:
            settings = {
                "tiers.host.capacity": f"{chosen.total * 5 // 4 + 128}MiB",
                "tiers.redis.url": redis.unix_url,
                "tiers.redis.write": "never",
            }
            sharing = settings | {"peer.share": "true"}
            with (
                called(directory / "holder", port, sharing) as one,
                caller(directory / "asker", port, sharing) as two,
                caller(directory / "alone", port, settings) as three,
                one.connect() as holder,
                two.connect() as asker,
                three.connect() as alone,
            ):
                for size in sizes:
                    manifest = opaque_manifest(size * MIB, model=f"tier {size}")
                    spaces = holder.attach(manifest), asker.attach(manifest)
                    compare_loads(*spaces, max(1, chosen.total // size), chosen.rounds)
                small = make_manifest(model="look-ups")
                compare_lookups(holder.attach(small), asker.attach(small), alone.attach(small))
    return 0


if __name__ == "__main__":
    sys.exit(main())
