"""Shards to put on disk, the files they lie in, and ways to damage them."""

from __future__ import annotations

import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvstore.hashing import block_digests, root_of
from kvstore.limits import KIB, MIB
from kvstore.tiers.base import Recovered, Shard, ShardKey
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.types import Digest, HeadRange, NamespaceId, Place

NAMESPACE = NamespaceId(b"n" * 16)
CAPACITY = 4 * MIB
SIZE = 192 * KIB + 700


def payload_of(number: int, size_bytes: int = SIZE) -> bytes:
    """Return bytes that no other number has, in any of their pages."""
    page = number.to_bytes(8, "little") * 512
    return (page * (size_bytes // len(page) + 1))[:size_bytes]


def shard_of(number: int, size_bytes: int = SIZE, *, namespace: bytes = NAMESPACE) -> Shard:
    """Return the shard whose bytes are `payload_of` the same number."""
    digest = Digest(number.to_bytes(32, "big"))
    parent = Digest((number - 1).to_bytes(32, "big")) if number else None
    root = root_of(block_digests(payload_of(number, size_bytes)))
    key = ShardKey(NamespaceId(namespace), digest, HeadRange(0, 8))
    return Shard(key, parent, size_bytes, root)


def number_of(shard: Shard) -> int:
    """Return the number that a shard was made of."""
    return int.from_bytes(shard.key.digest, "big")


@asynccontextmanager
async def disk_tier(
    path: Path, capacity_bytes: int = CAPACITY, *, direct: bool = True
) -> AsyncIterator[DiskTier]:
    """Open the tier in *path*; at the end check it, when nothing failed, and close it."""
    tier = await open_disk_tier(path, capacity_bytes=capacity_bytes, direct=direct)
    try:
        yield tier
        tier.check()
    finally:
        tier.close()


async def put(tier: DiskTier, *numbers: int, size_bytes: int = SIZE) -> list[Place]:
    """Write the shards of *numbers*, all of which fit."""
    places = []
    for number in numbers:
        source = memoryview(payload_of(number, size_bytes))
        place = await tier.write(shard_of(number, size_bytes), source)
        assert place is not None
        places.append(place)
    return places


async def get(tier: DiskTier, shard: Shard, place: Place) -> bytes | None:
    """Return what the tier reads for *shard*."""
    target = memoryview(mmap.mmap(-1, shard.size_bytes))
    return bytes(target) if await tier.read(shard, place, target) else None


async def served(tier: DiskTier) -> list[int]:
    """Return the numbers that a start has found and that are read; each is read right."""
    numbers = []
    for shard, place in recovered(tier):
        found = await get(tier, shard, place)
        if found is not None:
            assert found == payload_of(number_of(shard), shard.size_bytes)
            numbers.append(number_of(shard))
    return numbers


def recovered(tier: DiskTier) -> list[Recovered]:
    """Return what a start has found, oldest first."""
    return [one for run in tier.recover() for one in run.each()]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def overwrite(path: Path, offset: int, written: bytes) -> None:
    """Put bytes into a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(written)


def peek(path: Path, offset: int, size_bytes: int) -> bytes:
    """Return bytes of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size_bytes)
