"""What every remote tier promises (tiers/base.py), held against each implementation."""

import asyncio

import pytest

from kvstore.hashing import block_digests, root_of
from kvstore.tiers.base import RemoteTier, ShardKey
from kvstore.tiers.fake import FakeTier, Fault
from kvstore.types import Digest, HeadRange, NamespaceId

PAYLOAD = bytes(range(256)) * 1024
ROOT = root_of(block_digests(PAYLOAD))
KEY = ShardKey(NamespaceId(b"n" * 16), Digest(b"d" * 32), HeadRange(0, 8))


@pytest.fixture(params=[FakeTier])
def tier(request: pytest.FixtureRequest) -> RemoteTier:
    return request.param(4 * len(PAYLOAD))


async def read(tier: RemoteTier, key: ShardKey = KEY) -> bytes | None:
    target = bytearray(len(PAYLOAD))
    root = await tier.read(key, memoryview(target))
    return None if root is None else bytes(target)


async def test_what_was_written_is_read_with_its_root(tier: RemoteTier) -> None:
    assert await tier.write(KEY, memoryview(PAYLOAD), ROOT)
    target = bytearray(len(PAYLOAD))
    assert await tier.read(KEY, memoryview(target)) == ROOT
    assert target == PAYLOAD


async def test_what_was_never_written_is_a_miss(tier: RemoteTier) -> None:
    assert await read(tier) is None
    assert not await tier.remove(KEY)


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(namespace=NamespaceId(b"m" * 16)),
        KEY._replace(digest=Digest(b"e" * 32)),
        KEY._replace(heads=HeadRange(0, 4)),
    ],
)
async def test_another_key_never_gets_these_bytes(tier: RemoteTier, other: ShardKey) -> None:
    await tier.write(KEY, memoryview(PAYLOAD), ROOT)
    assert await read(tier, other) is None


async def test_a_removed_shard_is_a_miss(tier: RemoteTier) -> None:
    await tier.write(KEY, memoryview(PAYLOAD), ROOT)
    assert await tier.remove(KEY)
    assert await read(tier) is None


async def test_capacity_holds_and_a_full_tier_says_no(tier: RemoteTier) -> None:
    keys = [KEY._replace(digest=Digest(bytes([n]) * 32)) for n in range(6)]
    kept = [await tier.write(key, memoryview(PAYLOAD), ROOT) for key in keys]
    usage = tier.usage()
    assert usage.used_bytes <= usage.capacity_bytes
    assert [await read(tier, key) is not None for key in keys] == kept
    assert not all(kept)


async def test_writing_a_key_again_replaces_it_and_takes_no_more_room(tier: RemoteTier) -> None:
    await tier.write(KEY, memoryview(PAYLOAD), ROOT)
    used = tier.usage().used_bytes
    assert await tier.write(KEY, memoryview(PAYLOAD), ROOT)
    assert tier.usage().used_bytes == used


async def test_a_target_of_another_size_is_a_miss_and_stays_as_it_was(tier: RemoteTier) -> None:
    await tier.write(KEY, memoryview(PAYLOAD), ROOT)
    short = bytearray(10)
    assert await tier.read(KEY, memoryview(short)) is None
    assert short == bytes(10)


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.CORRUPT, Fault.FORGET])
async def test_a_fault_while_reading_is_a_miss_never_wrong_bytes(fault: Fault) -> None:
    tier = FakeTier(len(PAYLOAD), [(1, fault)])
    await tier.write(KEY, memoryview(PAYLOAD), ROOT)
    assert await read(tier) is None


async def test_a_failed_write_keeps_nothing_and_a_failed_remove_says_so() -> None:
    tier = FakeTier(len(PAYLOAD), [(0, Fault.FAIL), (2, Fault.FAIL)])
    assert not await tier.write(KEY, memoryview(PAYLOAD), ROOT)
    assert await read(tier) is None
    assert not await tier.remove(KEY)


async def test_a_hanging_call_can_be_given_up() -> None:
    tier = FakeTier(len(PAYLOAD), [(0, Fault.HANG)])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(tier.write(KEY, memoryview(PAYLOAD), ROOT), timeout=0.01)
    assert tier.usage().used_bytes == 0
    tier.close()
