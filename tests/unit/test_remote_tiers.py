"""What every remote tier promises (tiers/base.py), held against each implementation."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import TierError
from kvstore.hashing import block_count, block_digests, root_of
from kvstore.tiers.base import RemoteTier, Shard, ShardKey
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.tiers.fake import FakeTier, Fault
from kvstore.types import Digest, HeadRange, NamespaceId, Place

PAYLOAD = bytes(range(256)) * 1024
ROOT = root_of(block_digests(PAYLOAD))
KEY = ShardKey(NamespaceId(b"n" * 16), Digest(b"d" * 32), HeadRange(0, 8))
SHARD = Shard(KEY, None, len(PAYLOAD), ROOT)


@pytest.fixture(params=["fake", "disk", "disk, buffered"])
async def tier(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RemoteTier]:
    capacity_bytes = 4 * len(PAYLOAD)
    made: RemoteTier = FakeTier(capacity_bytes)
    if request.param.startswith("disk"):
        direct = "buffered" not in request.param
        made = await open_disk_tier(tmp_path, capacity_bytes=capacity_bytes, direct=direct)
    yield made
    made.close()


def chunk(number: int) -> Shard:
    return SHARD._replace(key=KEY._replace(digest=Digest(bytes([number]) * 32)))


async def write(tier: RemoteTier, shard: Shard = SHARD) -> Place:
    place = await tier.write(shard, memoryview(PAYLOAD))
    assert place is not None
    return place


async def read(tier: RemoteTier, place: Place, shard: Shard = SHARD) -> bytes | None:
    target = bytearray(shard.size_bytes)
    return bytes(target) if await tier.read(shard, place, memoryview(target)) else None


async def test_what_was_written_is_read(tier: RemoteTier) -> None:
    assert await read(tier, await write(tier)) == PAYLOAD


async def test_who_reads_gets_the_digests_that_the_bytes_were_checked_by(tier: RemoteTier) -> None:
    place, target = await write(tier), bytearray(len(PAYLOAD))
    table = np.zeros(block_count(len(PAYLOAD)), np.uint64)
    assert await tier.read(SHARD, place, memoryview(target), table)
    assert table.tolist() == block_digests(PAYLOAD).tolist()


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(namespace=NamespaceId(b"m" * 16)),
        KEY._replace(digest=Digest(b"e" * 32)),
        KEY._replace(heads=HeadRange(0, 4)),
    ],
)
async def test_another_key_never_gets_these_bytes(tier: RemoteTier, other: ShardKey) -> None:
    place = await write(tier)
    assert await read(tier, place, SHARD._replace(key=other)) is None


async def test_a_removed_shard_is_a_miss(tier: RemoteTier) -> None:
    place = await write(tier)
    assert await tier.remove(SHARD, place)
    assert await read(tier, place) is None
    assert not await tier.remove(SHARD, place)


async def test_capacity_holds_and_a_full_tier_says_no(tier: RemoteTier) -> None:
    places = [await tier.write(chunk(n), memoryview(PAYLOAD)) for n in range(6)]
    usage = tier.usage()
    assert usage.used_bytes <= usage.capacity_bytes
    for number, place in enumerate(places):
        assert place is None or await read(tier, place, chunk(number)) == PAYLOAD
    assert None in places


async def test_writing_a_key_again_replaces_it_and_takes_no_more_room(tier: RemoteTier) -> None:
    await write(tier)
    used = tier.usage().used_bytes
    place = await write(tier)
    assert tier.usage().used_bytes == used
    assert await read(tier, place) == PAYLOAD


async def test_a_root_that_does_not_match_is_a_miss(tier: RemoteTier) -> None:
    place = await write(tier)
    assert await read(tier, place, SHARD._replace(root=ROOT ^ 1)) is None


async def test_a_shard_of_another_size_is_a_miss(tier: RemoteTier) -> None:
    place = await write(tier)
    assert await read(tier, place, SHARD._replace(size_bytes=10)) is None


@pytest.mark.parametrize("fault", [Fault.CORRUPT, Fault.FORGET])
async def test_what_is_damaged_or_lost_is_a_miss_never_wrong_bytes(fault: Fault) -> None:
    tier = FakeTier(len(PAYLOAD), [(1, fault)])
    place = await write(tier)
    assert await read(tier, place) is None


async def test_a_medium_that_fails_says_so_and_keeps_what_it_has() -> None:
    tier = FakeTier(len(PAYLOAD), [(0, Fault.FAIL), (2, Fault.FAIL), (3, Fault.FAIL)])
    with pytest.raises(TierError):
        await tier.write(SHARD, memoryview(PAYLOAD))
    assert tier.usage().used_bytes == 0
    place = await write(tier)
    with pytest.raises(TierError):
        await read(tier, place)
    with pytest.raises(TierError):
        await tier.remove(SHARD, place)
    assert await read(tier, place) == PAYLOAD


async def test_a_hanging_call_can_be_given_up() -> None:
    tier = FakeTier(len(PAYLOAD), [(0, Fault.HANG)])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(tier.write(SHARD, memoryview(PAYLOAD)), timeout=0.01)
    assert tier.usage().used_bytes == 0


async def test_what_others_wrote_is_found_with_all_its_shards() -> None:
    tier = FakeTier(4 * len(PAYLOAD))
    halves = [
        SHARD._replace(key=KEY._replace(heads=heads))
        for heads in (HeadRange(0, 4), HeadRange(4, 8))
    ]
    for half in halves:
        await write(tier, half)
    found = await tier.find(KEY.namespace, [KEY.digest, Digest(b"e" * 32)])
    assert [[shard for shard, _ in shards] for shards in found] == [halves, []]


async def test_what_was_kept_is_recovered_oldest_first() -> None:
    tier = FakeTier(4 * len(PAYLOAD))
    await tier.introduce(KEY.namespace, b"manifest")
    for number in (2, 1, 3):
        await write(tier, chunk(number))
    found = [one.shard for run in tier.recover() for one in run.each()]
    assert found == [chunk(2), chunk(1), chunk(3)]
    assert tier.manifests() == {KEY.namespace: b"manifest"}
