"""Engine memory to Redis and back: kvstore's path beside LMCache's standalone server.

`python -m tests.bench.redis_peers --lmcache PATH/TO/bin/lmcache [--rounds 3]`

Both move the same paged KV (4 chunks of 256 tokens, 32 layers, 8 heads of 128, bfloat16: 32 MiB a
chunk, in pages of 16 tokens) between the memory of an engine process and one redis-server, over
TCP. Rounds alternate; medians are shown.

- kvstore: pages are gathered into the arena with checksums, and the tier writes them; the tier
  reads into the arena, and pages are filled and verified from there. Look-up included.
- LMCache: its own `bench server` drives its server over shared memory (`lmcache_driven`, its
  fastest way on CPU tensors) with its `resp` tier. A store counts until all its keys are in Redis;
  a load is look-up (which prefetches) and retrieve of a server that has just been started.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import redis
import uvloop

from kvstore.hashing import root_of
from kvstore.limits import MIB
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.redis import RedisTier, open_redis_tier
from kvstore.transfer import copies
from kvstore.transfer.arena import Arena
from kvstore.transfer.copies import Runs
from kvstore.types import Digest, HeadRange, NamespaceId, Place
from tests.bench.lmcache_server import Ports, environment, lmcache_server
from tests.support.redis import RedisServer
from tests.support.waiting import wait_until

CHUNKS, CHUNK_TOKENS, PAGE_TOKENS = 4, 256, 16
LAYERS, HEADS, HEAD_DIM, DTYPE_BYTES, BLOCKS = 32, 8, 128, 2, 256
PAGE_BYTES = PAGE_TOKENS * HEADS * HEAD_DIM * DTYPE_BYTES
CHUNK_PAGES = CHUNK_TOKENS // PAGE_TOKENS
CHUNK_BYTES = 2 * LAYERS * CHUNK_PAGES * PAGE_BYTES
TOTAL_BYTES = CHUNKS * CHUNK_BYTES

assert CHUNK_BYTES == 32 * MIB


class Engine:
    """Paged KV as an engine holds it: planes of K and V for every layer, pages shuffled."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (2 * LAYERS, BLOCKS, PAGE_BYTES)
        self.planes = rng.integers(0, 256, shape, dtype=np.uint8)
        self._pages = rng.permutation(BLOCKS)[: CHUNKS * CHUNK_PAGES]

    def runs(self, chunk: int) -> Runs:
        pages = self._pages[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES]
        start = self.planes.__array_interface__["data"][0]
        bases = [start + plane * BLOCKS * PAGE_BYTES for plane in range(2 * LAYERS)]
        return Runs.of_pages(
            bases, pages, page_stride_bytes=PAGE_BYTES, piece_bytes=PAGE_BYTES, owner=self.planes
        )


class Ours:
    """The client's copy and the tier."""

    def __init__(self, tier: RedisTier) -> None:
        self._tier = tier
        self._arena = Arena.create(TOTAL_BYTES)
        self._arena.view[:] = bytes(TOTAL_BYTES)
        views = [self._arena.view[n * CHUNK_BYTES :][:CHUNK_BYTES] for n in range(CHUNKS)]
        self._views = views

    async def round(self, number: int) -> tuple[float, float]:
        """Return the seconds of one store and of one load."""
        engine, namespace = Engine(number), NamespaceId(os.urandom(16))
        digests = [Digest(os.urandom(32)) for _ in range(CHUNKS)]
        began = time.perf_counter()
        await asyncio.gather(
            *(self._store(engine, n, namespace, digests[n]) for n in range(CHUNKS))
        )
        stored = time.perf_counter() - began
        before = engine.planes.copy()
        engine.planes[:] = 0
        began = time.perf_counter()
        found = await self._tier.find(namespace, digests)
        await asyncio.gather(
            *(self._load(engine, n, shards[0].shard) for n, shards in enumerate(found))
        )
        loaded = time.perf_counter() - began
        pages = engine._pages
        assert np.array_equal(engine.planes[:, pages], before[:, pages])
        return stored, loaded

    async def _store(
        self, engine: Engine, chunk: int, namespace: NamespaceId, digest: Digest
    ) -> None:
        view = self._views[chunk]
        blocks = await asyncio.to_thread(copies.gather, view, engine.runs(chunk), checksums=True)
        assert blocks is not None
        key = ShardKey(namespace, digest, HeadRange(0, HEADS))
        shard = Shard(key, None, CHUNK_BYTES, root_of(blocks))
        assert await self._tier.write(shard, view) is not None

    async def _load(self, engine: Engine, chunk: int, shard: Shard) -> None:
        view = self._views[chunk]
        assert await self._tier.read(shard, Place(0), view)
        blocks = await asyncio.to_thread(copies.scatter, engine.runs(chunk), view, checksums=True)
        assert blocks is not None
        assert root_of(blocks) == shard.root


class Theirs:
    """LMCache's server and its own driver, in processes of their own."""

    def __init__(self, program: Path, port: int, directory: Path) -> None:
        self._program = str(program)
        self._redis_port = port
        self._log = directory / "lmcache.log"
        self._env = environment(threads=1)

    def round(self, number: int) -> tuple[float, float]:
        """Return the seconds of one store and of one load."""
        with redis.Redis(port=self._redis_port) as client:
            client.flushdb()
            with self._server() as ports:
                stored = self._store(number, client, ports)
        with self._server() as ports:
            lines = list(self._drive(number, ports))
        look_up = _milliseconds(lines, rf"/cold\] LOOKUP: {CHUNKS}/{CHUNKS} .*\(([\d.]+) ms")
        retrieve = _milliseconds(lines, r"/cold\] RETRIEVE: retrieved .*?([\d.]+) ms")
        return stored, look_up + retrieve

    def _store(self, number: int, client: redis.Redis, ports: Ports) -> float:
        for line in self._drive(number, ports):
            if "STORE: stored" in line:
                ended = time.perf_counter()
                wait_until(lambda: client.dbsize() >= CHUNKS, what="all keys are in Redis")
                drained = time.perf_counter() - ended
                return drained + _milliseconds([line], r"([\d.]+) ms")
        raise AssertionError(f"LMCache stored nothing; {self._log}")

    def _drive(self, number: int, ports: Ports) -> Iterator[str]:
        shape = f"(2,{BLOCKS},{PAGE_TOKENS},{HEADS},{HEAD_DIM}):bfloat16:{LAYERS}"
        command = [
            *(self._program, "bench", "server", "--mode", "cpu"),
            *("--transfer-mode", "lmcache_driven", "--kvcache-shape-spec", shape),
            *("--rpc-url", f"tcp://127.0.0.1:{ports.engines}"),
            *("--url", f"http://localhost:{ports.http}"),
            *("--num-tokens", str(CHUNKS * CHUNK_TOKENS), "--interval", "0.1"),
            *("--start", str(number), "--end", str(number + 1)),
        ]
        with (
            self._log.open("a") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._env
            ) as driver,
        ):
            assert driver.stdout is not None
            yield from driver.stdout

    @contextlib.contextmanager
    def _server(self) -> Iterator[Ports]:
        tier = f'{{"type":"resp","host":"127.0.0.1","port":{self._redis_port},"num_workers":2}}'
        more = ("--l2-adapter", tier)
        program = Path(self._program)
        with lmcache_server(program, self._log, self._env, l1_gib=1, more=more) as (ports, _):
            yield ports


def _milliseconds(lines: Sequence[str], pattern: str) -> float:
    """Return in seconds the first figure that *pattern* finds."""
    for line in lines:
        if match := re.search(pattern, line):
            return float(match[1]) / 1e3
    raise AssertionError(f"no line matches {pattern!r}: {lines}")


async def compare(program: Path, rounds: int, directory: Path) -> None:
    with RedisServer(directory / "redis") as server:
        ours = Ours(await open_redis_tier(server.url, timeout_seconds=10.0))
        theirs = Theirs(program, server.port, directory)
        await ours.round(rounds)  # warms everything up
        figures: dict[str, list[tuple[float, float]]] = {"kvstore": [], "LMCache": []}
        for number in range(rounds):
            server.do("FLUSHALL")
            figures["kvstore"].append(await ours.round(number))
            figures["LMCache"].append(await asyncio.to_thread(theirs.round, number))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    speeds = {
        name: [TOTAL_BYTES / statistics.median(times) / 1e9 for times in zip(*rows, strict=True)]
        for name, rows in figures.items()
    }
    for name, (stored, loaded) in speeds.items():
        print(f"{name:8s} engine to Redis {stored:5.2f} GB/s, Redis to engine {loaded:5.2f} GB/s")
    ratios = [a / b for a, b in zip(speeds["kvstore"], speeds["LMCache"], strict=True)]
    print(f"ratio    engine to Redis {ratios[0]:5.2f}       Redis to engine {ratios[1]:5.2f}")


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="redis_peers")
    parser.add_argument("--lmcache", type=Path, required=True, help="its program, 0.5.6")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as directory:
        uvloop.run(compare(chosen.lmcache.absolute(), chosen.rounds, Path(directory)))


if __name__ == "__main__":
    main(sys.argv[1:])
