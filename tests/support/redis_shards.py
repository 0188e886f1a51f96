"""Shards for tests of the Redis tier: their bytes follow from their number."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable

from kvstore.errors import TierError
from kvstore.limits import REDIS_STRIPE_BYTES
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.redis import RedisTier
from kvstore.types import HeadRange, NamespaceId, Place
from tests.support.making import loose_digest, make_payload, make_root
from tests.support.waiting import DEADLINE_SECONDS

NAMESPACE = NamespaceId(b"n" * 16)
PLACE = Place(0)
SIZE_BYTES = 200_000
"""One stripe."""

LARGE_BYTES = 2 * REDIS_STRIPE_BYTES + 100_001
"""Three stripes, the last of them short."""


@functools.lru_cache(maxsize=64)
def payload_of(number: int, size_bytes: int = SIZE_BYTES) -> bytes:
    return make_payload(loose_digest(number), size_bytes)


@functools.lru_cache(maxsize=1024)
def shard_of(number: int, size_bytes: int = SIZE_BYTES) -> Shard:
    key = ShardKey(NAMESPACE, loose_digest(number), HeadRange(0, 8))
    root = make_root(payload_of(number, size_bytes))
    return Shard(key, None, size_bytes, root)


async def write(tier: RedisTier, number: int, size_bytes: int = SIZE_BYTES) -> bool:
    """Write shard *number*; return whether it was kept."""
    source = memoryview(payload_of(number, size_bytes))
    return await tier.write(shard_of(number, size_bytes), source) is not None


async def read(tier: RedisTier, number: int, size_bytes: int = SIZE_BYTES) -> bool:
    """Read shard *number*; return whether it was there. Fails the test on a wrong byte."""
    target = bytearray(size_bytes)
    is_here = await tier.read(shard_of(number, size_bytes), PLACE, memoryview(target))
    assert not is_here or target == payload_of(number, size_bytes), "wrong bytes"
    return is_here


async def found(tier: RedisTier, numbers: Iterable[int], size_bytes: int = SIZE_BYTES) -> list[int]:
    """Return those of *numbers* whose shards a look-up finds."""
    wanted = [shard_of(number, size_bytes) for number in numbers]
    hits = await tier.find(NAMESPACE, [shard.key.digest for shard in wanted])
    for shard, shards in zip(wanted, hits, strict=True):
        assert [it.shard for it in shards] in ([shard], [])
    return [number for number, shards in zip(numbers, hits, strict=True) if shards]


async def attempt(call: Awaitable[bool]) -> bool | None:
    """Return what *call* returns, or None when the tier said that its medium failed."""
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await call
    except TierError:
        return None


async def until(call: Callable[[], Awaitable[bool | None]]) -> None:
    """Repeat *call* until it is true: the tier has recovered by itself."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await attempt(call()):  # noqa: ASYNC110  # nothing announces it
            await asyncio.sleep(0.01)
