"""Store and load through the Redis tier, beside a raw socket and redis-py in the same run.

`python -m tests.bench.redis_tier [--rounds N] [--sizes 4,8,32] [--url URL]`

The floor is one blocking socket with sendmsg and recv_into: SET and GET of bare 4 MiB values,
without labels, checksums or meta records. Without a URL, a server is started for the run and
measured over its Unix socket and over TCP. Rounds of all ways are interleaved, so that all see
the same machine; each way shows its median round, and its ratio is to the floor's median.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import redis
import uvloop

from kvstore.hashing import root_of
from kvstore.limits import MIB
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.redis import RedisTier, open_redis_tier
from kvstore.tiers.redis_url import Address, parse_url
from kvstore.transfer import copies
from kvstore.transfer.arena import Arena
from kvstore.types import Digest, HeadRange, NamespaceId, Place
from tests.support.redis import RedisServer

STRIPE_BYTES = 4 * MIB
BATCH_BYTES = 64 * MIB


class RawSocket:
    """The floor: one connection, bare commands, nothing checked but lengths."""

    def __init__(self, address: Address) -> None:
        if address.is_path:
            self.socket = socket.socket(socket.AF_UNIX)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                self.socket.setsockopt(socket.SOL_SOCKET, option, STRIPE_BYTES)
            self.socket.connect(address.host)
        else:
            self.socket = socket.create_connection((address.host, address.port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def store(self, name: bytes, source: memoryview) -> None:
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(source))
        parts = [memoryview(head), source, memoryview(b"\r\n")]
        while parts:
            sent = self.socket.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]
        assert self.socket.recv(64) == b"+OK\r\n"

    def load(self, name: bytes, target: memoryview) -> None:
        self.socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
        first = self.socket.recv(64)
        line = first.index(b"\r\n") + 2
        assert int(first[1 : line - 2]) == len(target)
        got = len(first) - line
        target[:got] = first[line:]
        while got < len(target):
            got += self.socket.recv_into(target[got:])
        ending = b""
        while len(ending) < 2:
            ending += self.socket.recv(2 - len(ending))


class Way(NamedTuple):
    """One way to store and to load a batch of chunks."""

    name: str
    store: Callable[[], Coroutine[None, None, None]]
    load: Callable[[], Coroutine[None, None, None]]


class Batch:
    """Chunks of one size in an arena, and room to load them."""

    def __init__(self, arena: Arena, size_bytes: int) -> None:
        self.count = max(1, BATCH_BYTES // size_bytes)
        self.size_bytes = size_bytes
        self.sources = [arena.view[n * size_bytes :][:size_bytes] for n in range(self.count)]
        first = BATCH_BYTES // size_bytes * size_bytes
        self.targets = [
            arena.view[first + n * size_bytes :][:size_bytes] for n in range(self.count)
        ]
        self.shards = [
            Shard(
                ShardKey(NamespaceId(b"b" * 16), Digest(os.urandom(32)), HeadRange(0, 8)),
                None,
                size_bytes,
                root_of(copies.digest_blocks(source)),
            )
            for source in self.sources
        ]

    @property
    def bytes(self) -> int:
        return self.count * self.size_bytes


def ways_of(batch: Batch, raw: RawSocket, tier: RedisTier, client: redis.Redis) -> list[Way]:
    return [
        raw_way(batch, raw),
        tier_way(batch, tier),
        tier_way(batch, tier, at_once=4),
        library_way(batch, client),
    ]


def pieces(batch: Batch, views: Sequence[memoryview]) -> Iterator[tuple[bytes, memoryview]]:
    for number, view in enumerate(views):
        for start in range(0, batch.size_bytes, STRIPE_BYTES):
            yield b"raw:%d:%d" % (number, start), view[start : start + STRIPE_BYTES]


def raw_way(batch: Batch, raw: RawSocket) -> Way:
    async def store() -> None:
        for name, view in pieces(batch, batch.sources):
            raw.store(name, view)

    async def load() -> None:
        for name, view in pieces(batch, batch.targets):
            raw.load(name, view)

    return Way("raw socket", store, load)


def tier_way(batch: Batch, tier: RedisTier, *, at_once: int = 1) -> Way:
    async def store() -> None:
        await over(batch.sources, write)

    async def load() -> None:
        await over(batch.targets, read)

    async def over(
        views: Sequence[memoryview],
        move: Callable[[Shard, memoryview], Coroutine[None, None, None]],
    ) -> None:
        chunks = iter(zip(batch.shards, views, strict=True))

        async def work() -> None:
            for shard, view in chunks:
                await move(shard, view)

        await asyncio.gather(*(work() for _ in range(at_once)))

    async def write(shard: Shard, view: memoryview) -> None:
        assert await tier.write(shard, view) is not None

    async def read(shard: Shard, view: memoryview) -> None:
        assert await tier.read(shard, Place(0), view)

    return Way("tier" if at_once == 1 else f"tier, {at_once} at once", store, load)


def library_way(batch: Batch, client: redis.Redis) -> Way:
    async def store() -> None:
        for name, view in pieces(batch, batch.sources):
            client.set(name, view)

    async def load() -> None:
        for name, view in pieces(batch, batch.targets):
            view[:] = client.get(name)

    return Way("redis-py", store, load)


async def measure(url: str, sizes: Sequence[int], rounds: int) -> None:
    address = parse_url(url).seeds[0]
    options = (
        {"unix_socket_path": address.host}
        if address.is_path
        else {"host": address.host, "port": address.port}
    )
    arena = Arena.create(2 * BATCH_BYTES)
    raw, client = RawSocket(address), redis.Redis(**options)
    tier = await open_redis_tier(url, timeout_seconds=10.0)
    for size in sizes:
        batch = Batch(arena, size * MIB)
        for view in batch.sources:
            view[:] = os.urandom(batch.size_bytes)
        batch = Batch(arena, size * MIB)
        await compare(batch, ways_of(batch, raw, tier, client), rounds, client)
    tier.close()
    client.close()
    raw.socket.close()


async def compare(batch: Batch, ways: Sequence[Way], rounds: int, client: redis.Redis) -> None:
    stored: dict[str, list[float]] = {way.name: [] for way in ways}
    loaded: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds + 1):
        for way in ways:
            client.flushdb()
            stored[way.name].append(await timed(way.store))
            loaded[way.name].append(await timed(way.load))
    floor = ways[0].name
    for way in ways:
        shown = [
            f"{name} {batch.bytes / middle(times[way.name]) / 1e9:5.2f} GB/s "
            f"({middle(times[floor]) / middle(times[way.name]):4.2f})"
            for name, times in (("store", stored), ("load", loaded))
        ]
        print(f"{batch.size_bytes // MIB:3d} MiB  {way.name:16s} {'   '.join(shown)}", flush=True)


def middle(times: Sequence[float]) -> float:
    """Return the median round; the first one warms everything up and does not count."""
    return statistics.median(times[1:])


async def timed(action: Callable[[], Coroutine[None, None, None]]) -> float:
    began = time.perf_counter()
    await action()
    return time.perf_counter() - began


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="redis_tier")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", default="4,8,32", help="MiB, with commas")
    parser.add_argument("--url", default="", help="a server to measure, without a password")
    chosen = parser.parse_args(words)
    sizes = [int(size) for size in chosen.sizes.split(",")]
    if chosen.url:
        uvloop.run(measure(chosen.url, sizes, chosen.rounds))
        return
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)) as server:
        for name, url in (("Unix socket", server.unix_url), ("TCP", server.url)):
            print(f"{name}; in brackets, the ratio to the raw socket")
            uvloop.run(measure(url, sizes, chosen.rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
