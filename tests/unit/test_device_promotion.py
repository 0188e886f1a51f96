"""What comes up from the host tier into the pool: which chunks, when, and what never happens.

The device is the stand-in, which does its work in any order that CUDA allows.
"""

from __future__ import annotations

import pytest

from kvstore.gpu.device import wait_for
from kvstore.limits import CHECKSUM_BLOCK_BYTES, KIB, MIB
from kvstore.tiers import device_copies
from kvstore.types import HeadRange
from tests.support.making import make_digests, make_manifest, make_payload
from tests.support.pools import BOTH, DEVICE, HOST, PooledTiers, impatient, until
from tests.support.tiers import running

MANIFEST = make_manifest()
CHUNK = MANIFEST.chunk_bytes


def payloads(digests, size=CHUNK):
    return [make_payload(digest, size) for digest in digests]


def read(tiers, engine, digests, times=1):
    """Load *digests* as an engine does that has the pool; what comes is right."""
    for _ in range(times):
        assert tiers.read(engine, digests) == payloads(digests)


async def test_what_is_loaded_twice_comes_up_and_is_read_in_the_pool():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(6)
        engine.put(digests)
        read(tiers, engine, digests)
        await tiers.settle()
        assert tiers.bits(engine, digests) == [HOST] * 6
        read(tiers, engine, digests)
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH] * 6
        assert tiers.tier.counters.loaded_chunks == 0
        read(tiers, engine, digests)
        assert tiers.tier.counters.loaded_chunks == 6
        assert tiers.tier.counters.promoted_bytes == 6 * CHUNK
        assert tiers.guard.counters.write_chunks == 6
        # It stays a hit, and can be read, when the host tier has dropped it.
        tiers.evict_all()
        assert tiers.bits(engine, digests) == [DEVICE] * 6
        read(tiers, engine, digests)


async def test_loads_that_say_nothing_of_the_pool_bring_nothing_up():
    async with running(PooledTiers(capacity_bytes=4 * MIB, pool_bytes=4 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(3)
        engine.put(digests)
        for _ in range(3):
            # Engines without the pool.
            assert await tiers.load(engine, digests) == payloads(digests)
        for heads in (HeadRange(0, 2), HeadRange(2, 4)):
            # Ranks, and shards that are put together: none of these is in one piece in the pool.
            for _ in range(2):
                loading = tiers.store.begin_load(1, engine.space, digests, heads, 0.0, direct=BOTH)
                lease, _ = tiers.store.end_load(loading, 3)
                tiers.store.release(1, [lease])
        others = make_digests(64, prompt=1)
        engine.put(others)
        read(tiers, engine, digests[:1])
        read(tiers, engine, others)
        # So many others have been loaded since that it would not be in the pool any more.
        read(tiers, engine, digests[:1])
        await tiers.settle()
        # The same digests of another model are other chunks.
        other = tiers.engine(make_manifest(model="another"))
        other.put(digests)
        read(tiers, other, digests[:1])
        await tiers.settle()
        assert tiers.tier.usage().used_bytes == 0
        assert tiers.tier.counters.promote_chunks_dropped == 0


async def test_a_rank_has_its_own_shards_brought_up():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(2)
        halves = [HeadRange(0, 2), HeadRange(2, 4)]
        for heads in halves:
            engine.put(digests, heads=heads)
        for heads in (*halves, halves[0]):
            loading = tiers.store.begin_load(1, engine.space, digests, heads, 0.0, direct=BOTH)
            tiers.store.release(1, [tiers.store.end_load(loading, 2)[0]])
        await tiers.settle()
        # Each rank has loaded it once; only the first of them has come again.
        slots = [engine.space.find(digest) for digest in digests]
        for slot in slots:
            here = {s.heads for s in tiers.store.index.shards(slot) if s.tiers & DEVICE}
            assert here == {halves[0]}


async def test_a_prefix_longer_than_the_pool_keeps_its_head_there_and_does_not_churn():
    async with running(PooledTiers(pool_bytes=4 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(9)
        engine.put(digests)
        for _ in range(8):
            read(tiers, engine, digests)
            await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH] * 4 + [HOST] * 5
        assert tiers.tier.counters.promoted_chunks == 4
        assert tiers.guard.counters.evict_chunks == 0


async def test_what_came_up_leaves_for_stores_without_a_copy_down_and_not_at_once_again():
    async with running(PooledTiers(pool_bytes=4 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(4)
        engine.put(digests)
        read(tiers, engine, digests, times=2)
        await tiers.settle()
        tiers.device.stall()
        others = make_digests(4, prompt=1)
        assert tiers.put(engine, others) == [True] * 4
        assert tiers.bits(engine, digests) == [HOST] * 4
        assert tiers.store.counters.demote_chunks == 0
        tiers.device.resume()
        await tiers.settle()
        read(tiers, engine, digests)
        await tiers.settle()
        assert tiers.bits(engine, digests) == [HOST] * 4
        read(tiers, engine, digests)
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH] * 4


async def test_room_is_not_taken_from_what_is_nowhere_else_nor_from_what_is_read():
    async with running(PooledTiers(pool_bytes=2 * CHUNK)) as tiers:
        engine, alone, used = tiers.engine(MANIFEST), make_digests(1), make_digests(1, prompt=1)
        tiers.put(engine, [*alone])
        tiers.put(engine, [*used])
        await tiers.settle()
        slot = engine.space.find(alone[0])
        tiers.store.room.evict(slot)
        assert tiers.bits(engine, [*alone, *used]) == [DEVICE, BOTH]
        hot = make_digests(2, prompt=2)
        engine.put(hot)
        read(tiers, engine, hot, times=2)
        read(tiers, engine, used)
        await tiers.settle()
        assert tiers.bits(engine, [*alone, *used, *hot]) == [DEVICE, BOTH, HOST, HOST]
        assert tiers.tier.counters.promote_chunks_dropped == 2
        # What nobody reads meanwhile gives its room; what is alone is not even copied down.
        read(tiers, engine, hot, times=2)
        await tiers.settle()
        assert tiers.bits(engine, [*alone, *used, *hot]) == [DEVICE, HOST, BOTH, HOST]


# --- order ------------------------------------------------------------------------------------


async def test_nobody_is_told_of_the_pool_before_the_copy_has_ended():
    async with running(PooledTiers(pool_bytes=2 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(1)
        engine.put(digests)
        tiers.device.stall()
        read(tiers, engine, digests, times=2)
        await until(lambda: tiers.tier.usage().used_bytes)
        read(tiers, engine, digests)
        assert tiers.bits(engine, digests) == [HOST]
        assert tiers.tier.counters.loaded_chunks == 0
        # Its room is its own meanwhile.
        other = make_digests(2, prompt=1)
        assert tiers.put(engine, other) == [True, False]
        tiers.device.resume()
        await tiers.settle()
        assert tiers.bits(engine, [*digests, *other]) == [BOTH, BOTH, HOST]
        read(tiers, engine, digests)
        read(tiers, engine, other)


@pytest.mark.parametrize("leaves", ["deleted", "evicted", "replaced"])
async def test_what_leaves_the_host_tier_under_a_copy_is_dropped_when_that_has_ended(leaves):
    async with running(PooledTiers(pool_bytes=2 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(1)
        engine.put(digests)
        tiers.device.stall()
        read(tiers, engine, digests, times=2)
        await until(lambda: tiers.tier.usage().used_bytes)
        if leaves == "evicted":
            tiers.evict_all()
        else:
            assert tiers.store.delete(engine.space, digests) == (1, 0)
        if leaves == "replaced":
            engine.put(make_digests(1, prompt=1))
            assert tiers.put(engine, digests) == [True]
        tiers.device.resume()
        await tiers.settle()
        assert tiers.tier.counters.promoted_chunks == 0
        assert tiers.tier.counters.promote_chunks_dropped == 1
        assert tiers.store.counters.checksum_failures == 0
        assert tiers.bits(engine, digests) == [BOTH if leaves == "replaced" else 0]
        assert tiers.tier.usage().used_bytes == (CHUNK if leaves == "replaced" else 0)
        read(tiers, engine, digests if leaves == "replaced" else [])


@pytest.mark.parametrize("wait", [impatient, wait_for])
async def test_room_that_a_stuck_copy_may_still_go_to_is_nobodys_until_that_has_ended(wait):
    async with running(PooledTiers(pool_bytes=CHUNK, timeout_seconds=0.1, wait=wait)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(1)
        engine.put(digests)
        tiers.device.stall()
        read(tiers, engine, digests, times=2)
        await until(lambda: tiers.guard.counters.failures)
        assert tiers.tier.allocate(CHUNK) is None
        assert tiers.put(engine, make_digests(1, prompt=1)) == [False]
        read(tiers, engine, digests)
        tiers.be_patient()
        tiers.device.resume()
        await tiers.settle()
        await until(lambda: tiers.guard.is_usable and not tiers.tier.usage().used_bytes)
        assert tiers.bits(engine, digests) == [HOST]
        read(tiers, engine, digests, times=2)
        await until(lambda: tiers.bits(engine, digests) == [BOTH])
        read(tiers, engine, digests)


async def test_room_stays_set_aside_behind_a_copy_that_failed_outside_of_the_device(monkeypatch):
    copy, copied = device_copies.copy_at, []

    def copy_once(*asked, **words):
        if copied:
            raise MemoryError("no room for digests")
        copied.append(asked)
        return copy(*asked, **words)

    monkeypatch.setattr(device_copies, "DEVICE_PIECE_BYTES", CHECKSUM_BLOCK_BYTES)
    manifest = make_manifest(layers=16, kv_heads=8)
    async with running(PooledTiers(pool_bytes=4 * MIB)) as tiers:
        engine, digests = tiers.engine(manifest), make_digests(1)
        engine.put(digests)
        tiers.device.stall()
        monkeypatch.setattr(device_copies, "copy_at", copy_once)
        for _ in range(2):
            tiers.read(engine, digests)
        await until(lambda: tiers.guard.counters.failures)
        # The first piece is on its way still.
        assert tiers.tier.usage().used_bytes == manifest.chunk_bytes
        tiers.device.resume()
        await tiers.settle()
        assert tiers.tier.usage().used_bytes == 0
        assert tiers.bits(engine, digests) == [HOST]


async def test_memory_that_a_piece_is_copied_from_is_filled_again_when_that_has_ended(monkeypatch):
    monkeypatch.setattr(device_copies, "DEVICE_PIECE_BYTES", CHECKSUM_BLOCK_BYTES)
    manifest = make_manifest(layers=16, kv_heads=8)
    assert manifest.chunk_bytes > 3 * CHECKSUM_BLOCK_BYTES

    def last_minute(event):
        # The device has done nothing before somebody insists.
        tiers.device.resume()
        wait_for(event)
        tiers.device.stall()

    tiers = PooledTiers(pool_bytes=4 * MIB, wait=last_minute)
    async with running(tiers):
        engine, digests = tiers.engine(manifest), make_digests(2)
        engine.put(digests)
        tiers.device.stall()
        for _ in range(2):
            assert tiers.read(engine, digests) == payloads(digests, manifest.chunk_bytes)
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH] * 2
        assert tiers.read(engine, digests) == payloads(digests, manifest.chunk_bytes)
        assert tiers.tier.counters.loaded_chunks == 2


# --- what goes wrong --------------------------------------------------------------------------


async def test_bytes_that_are_not_those_of_their_root_do_not_come_up():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(2)
        engine.put(digests)
        read(tiers, engine, digests)
        slot = engine.space.find(digests[1])
        (shard,) = tiers.store.index.shards(slot)
        tiers.store.host.view(shard.extent)[5] ^= 1
        assert len(tiers.read(engine, digests)) == 2
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH, HOST]
        assert tiers.store.counters.checksum_failures == 1
        assert tiers.tier.usage().used_bytes == CHUNK


async def test_a_copy_down_does_not_wait_for_one_up_that_is_stuck():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(1)
        engine.put(digests)
        tiers.device.stall(tiers.tier._up._stream)
        read(tiers, engine, digests, times=2)
        await until(lambda: tiers.tier.usage().used_bytes)
        others = make_digests(4, prompt=1)
        tiers.put(engine, others)
        await until(lambda: tiers.bits(engine, others) == [BOTH] * 4)
        assert tiers.bits(engine, digests) == [HOST]
        tiers.device.resume()
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH]


async def test_a_device_that_refuses_copies_costs_what_was_to_come_up_and_nothing_else():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(6)
        engine.put(digests)
        tiers.device.fail("copy", after=1, times=1000)
        read(tiers, engine, digests, times=2)
        await until(lambda: not tiers.guard.is_usable)
        await tiers.settle()
        assert tiers.tier.counters.promote_chunks_dropped == 6 - tiers.tier.counters.promoted_chunks
        read(tiers, engine, digests, times=4)
        assert tiers.room.promotions.is_idle
        tiers.device.fail("copy", times=0)
        await until(lambda: tiers.guard.is_usable)
        read(tiers, engine, digests, times=2)
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH] * 6


async def test_a_daemon_that_ends_brings_nothing_up():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(3)
        engine.put(digests)
        read(tiers, engine, digests, times=2)
        tiers.room.promotions.stop()
        read(tiers, engine, digests, times=2)
        await tiers.settle()
        assert tiers.bits(engine, digests) == [HOST] * 3
        assert tiers.tier.counters.promote_chunks_dropped == 3


async def test_a_tier_without_room_of_that_kind_takes_no_write():
    async with running(PooledTiers(pool_bytes=4 * KIB)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(2)
        engine.put(digests)
        assert 4 * KIB < CHUNK
        read(tiers, engine, digests, times=2)
        await tiers.settle()
        assert tiers.bits(engine, digests) == [HOST] * 2
        assert tiers.tier.counters.promote_chunks_dropped == 2
