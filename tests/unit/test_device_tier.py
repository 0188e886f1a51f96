"""The device tier: what engines put into the pool, what leaves it, and what its failures cost.

The device is the stand-in. What is loaded is right or it is a miss; what is only in the pool is
never dropped to make room; whatever fails, the host tier goes on.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvstore.errors import ChecksumError, ReservationError
from kvstore.limits import KIB, MIB
from kvstore.store.explanation import explain
from kvstore.store.history import Fate
from kvstore.store.route import shard_of
from kvstore.types import NO_SLOT, HeadRange, Place, ReserveOutcome, Root
from tests.support.making import make_digests, make_manifest, make_payload
from tests.support.pools import BOTH, DEVICE, HOST, PooledTiers, impatient, until
from tests.support.tiers import DISK, Slower, fake, running
from tests.support.waiting import DEADLINE_SECONDS

MANIFEST = make_manifest()
CHUNK = MANIFEST.chunk_bytes


def payloads(digests):
    return [make_payload(digest, CHUNK) for digest in digests]


async def test_what_is_stored_in_the_pool_is_read_there_and_copied_down_behind_it():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(6)
        tiers.device.stall()
        assert tiers.put(engine, digests) == [True] * 6
        assert tiers.bits(engine, digests) == [DEVICE] * 6
        assert engine.hits(digests) == 6
        assert tiers.store.hit_chunks[DEVICE] == 6
        told = explain(tiers.store, engine.space, digests).chunks
        assert {(one.cause, one.tier) for one in told} == {("present", DEVICE)}
        assert tiers.read(engine, digests) == payloads(digests)
        tiers.device.resume()
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH] * 6
        assert await tiers.load(engine, digests) == payloads(digests)
        counters = tiers.store.counters
        assert (counters.demote_chunks, counters.promote_chunks, counters.commit_chunks) == (
            *(6, 0, 6),
        )
        assert tiers.tier.counters.loaded_chunks == 6


async def test_a_chunk_larger_than_a_piece_is_copied_down_whole():
    manifest = make_manifest(layers=64, kv_heads=8, chunk_tokens=256)
    assert manifest.chunk_bytes > 8 * MIB
    pool = PooledTiers(pool_bytes=64 * MIB, capacity_bytes=64 * MIB)
    async with running(pool) as tiers:
        engine, digests = tiers.engine(manifest), make_digests(1)
        tiers.put(engine, digests)
        await tiers.settle()
        assert await tiers.load(engine, digests) == [make_payload(digests[0], manifest.chunk_bytes)]
        assert tiers.bits(engine, digests) == [BOTH]


async def test_what_is_kept_below_makes_room_and_stays_a_hit():
    async with running(PooledTiers(pool_bytes=4 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(12)
        for start in range(0, 12, 2):
            pair = digests[start : start + 2]
            parent = digests[start - 1] if start else None
            assert tiers.put(engine, pair, parent=parent) == [True, True]
            await tiers.settle()
        assert engine.hits(digests) == 12
        bits = tiers.bits(engine, digests)
        assert bits.count(BOTH) == 4
        assert bits.count(HOST) == 8
        assert tiers.guard.counters.evict_chunks == 8
        assert tiers.read(engine, digests) == payloads(digests)
        left = digests[bits.index(HOST)]
        assert tiers.store.history.find(engine.space, left)[:1] == (Fate.EVICTED_FOR_ROOM,)


async def test_what_is_nowhere_else_does_not_leave_and_others_go_to_the_host_tier():
    async with running(PooledTiers(pool_bytes=4 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(7)
        tiers.device.stall()
        assert tiers.put(engine, digests) == [True] * 4 + [False] * 3
        assert tiers.tier.counters.reserve_chunks_no_space == 3
        assert tiers.bits(engine, digests) == [DEVICE] * 4 + [HOST] * 3
        assert tiers.read(engine, digests) == payloads(digests)
        tiers.device.resume()


async def test_what_the_host_tier_has_dropped_is_copied_down_again_when_room_is_needed():
    async with running(PooledTiers(pool_bytes=4 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(4)
        tiers.put(engine, digests)
        await tiers.settle()
        tiers.evict_all()
        assert tiers.bits(engine, digests) == [DEVICE] * 4
        others = make_digests(2, prompt=1)
        assert tiers.put(engine, others) == [False, False]
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH] * 4
        assert tiers.put(engine, make_digests(2, prompt=2)) == [True, True]
        # Who has no device is served from the pool, too, by way of the host tier.
        assert await tiers.load(engine, digests) == payloads(digests)


async def test_a_leased_chunk_stays_and_shards_cut_otherwise_are_put_together_on_the_host():
    async with running(PooledTiers(pool_bytes=2 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(2)
        halves = [HeadRange(0, 2), HeadRange(2, 4)]
        for heads in halves:
            assert tiers.put(engine, digests[:1], heads=heads) == [True]
        tiers.put(engine, digests[1:], parent=digests[0])
        await tiers.settle()
        lease = engine.lease(digests)
        assert tiers.put(engine, make_digests(1, prompt=1)) == [False]
        assert tiers.bits(engine, digests) == [BOTH, BOTH]
        loading = tiers.store.begin_load(
            engine.session, engine.space, digests, MANIFEST.all_heads, 0.0, direct=BOTH
        )
        pooled = [[loading.is_pooled(shard) for shard in chunk] for chunk in loading.chunks]
        assert pooled == [[False, False], [True]]
        tiers.store.end_load(loading, len(loading.slots))
        assert tiers.tier.counters.loaded_chunks == 1
        # A rank has its own shard at hand.
        of_rank = tiers.store.begin_load(
            engine.session, engine.space, digests[:1], halves[1], 0.0, direct=BOTH
        )
        assert [of_rank.is_pooled(shard) for shard in of_rank.chunks[0]] == [True]
        tiers.store.release(engine.session, [lease, loading.lease, of_rank.lease])


async def test_bytes_that_are_not_those_committed_are_dropped_before_anybody_is_given_them():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(3)
        tiers.device.stall()
        tiers.put(engine, digests)
        slot = engine.space.find(digests[1])
        extent = tiers.room.place_of(slot, tiers.store.index.shards(slot)[0])
        tiers.view(extent)[7] ^= 1
        tiers.device.resume()
        await tiers.settle()
        assert tiers.bits(engine, digests) == [BOTH, 0, BOTH]
        assert engine.hits(digests) == 1
        assert tiers.store.counters.checksum_failures == 1
        tiers.put(engine, digests[1:2], parent=digests[0])
        assert engine.hits(digests) == 3


async def test_rooms_are_given_back_by_abort_and_by_the_end_of_their_writer_alone():
    async with running(PooledTiers()) as tiers:
        engine, other = tiers.engine(MANIFEST), tiers.engine(MANIFEST, session=2)
        digests = make_digests(4)
        first, second, *_ = tiers.reserve(engine, digests)
        assert tiers.tier.usage().used_bytes == 4 * CHUNK
        tiers.store.abort(engine.session, [first.reservation])
        tiers.fill(engine, digests[1], second)
        with pytest.raises(ReservationError):
            tiers.store.commit(other.session, second.reservation, Root(1))
        assert tiers.store.end_session(engine.session)
        tiers.store.check()
        # Its process may still write: nobody else gets that room.
        assert tiers.tier.usage().used_bytes == 3 * CHUNK
        tiers.store.bury(engine.session)
        assert tiers.tier.usage().used_bytes == CHUNK
        await tiers.settle()
        assert tiers.store.delete(other.space, digests) == (1, 0)
        assert tiers.tier.usage().used_bytes == 0


async def test_of_two_that_store_one_chunk_cut_otherwise_the_second_gives_its_room_back():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(1)
        (half,) = tiers.reserve(engine, digests, heads=HeadRange(0, 2))
        (whole,) = tiers.reserve(engine, digests)
        tiers.fill(engine, digests[0], whole)
        tiers.fill(engine, digests[0], half)
        assert tiers.tier.usage().used_bytes == CHUNK
        assert tiers.put(engine, digests) == []
        assert tiers.store.counters.reserve_chunks_present == 1


async def test_a_chunk_learns_what_is_before_it_from_a_later_shard():
    async with running(PooledTiers()) as tiers:
        engine, (first, second) = tiers.engine(MANIFEST), make_digests(2)
        tiers.put(engine, [second], heads=HeadRange(0, 2))
        tiers.put(engine, [first])
        slot = engine.space.find(second)
        assert tiers.store.index.tree.parent(slot) == NO_SLOT
        tiers.put(engine, [second], parent=first, heads=HeadRange(2, 4))
        assert tiers.store.index.tree.parent(slot) == engine.space.find(first)


async def test_the_daemon_itself_writes_nothing_there_and_gives_the_pool_back():
    tiers = PooledTiers()
    async with running(tiers):
        engine, digests = tiers.engine(MANIFEST), make_digests(1)
        tiers.put(engine, digests)
        await tiers.settle()
        shard = shard_of(
            tiers.store,
            engine.space.find(digests[0]),
            tiers.store.index.shards(engine.space.find(digests[0]))[0],
        )
        assert await tiers.tier.write(shard, memoryview(bytes(CHUNK))) is None
        assert not await tiers.tier.remove(shard, Place(0))
        await tiers.tier.introduce(shard.key.namespace, b"{}")
        room = bytearray(CHUNK)
        assert await tiers.tier.read(shard, Place(0), memoryview(room))
        assert bytes(room) == make_payload(digests[0], CHUNK)
        gone = shard._replace(key=shard.key._replace(heads=HeadRange(1, 2)))
        assert not await tiers.tier.read(gone, Place(0), memoryview(room))
    tiers.tier.close()
    assert tiers.device.used_bytes == 0


# --- a device that fails ----------------------------------------------------------------------


async def test_a_device_that_fails_is_left_alone_until_it_answers_again():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(5)
        tiers.device.fail("copy", times=1000)
        tiers.put(engine, digests)
        await until(lambda: not tiers.guard.is_usable)
        # What is only there counts as missing, and is computed into the host tier meanwhile.
        assert engine.hits(digests) == 0
        told = explain(tiers.store, engine.space, digests).chunks
        assert {(one.cause, one.tier) for one in told} == {("unavailable", DEVICE)}
        assert tiers.put(engine, make_digests(2, prompt=1)) == [False, False]
        assert tiers.put(engine, digests[:1]) == [False]
        tiers.device.fail("copy", times=0)
        await until(lambda: tiers.guard.is_usable)
        assert engine.hits(digests) == 5
        assert await tiers.load(engine, digests) == payloads(digests)
        assert tiers.put(engine, make_digests(2, prompt=2)) == [True, True]


async def test_a_copy_that_gets_stuck_touches_nothing_of_the_host_tier():
    async with running(PooledTiers(timeout_seconds=0.05, wait=impatient)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(3)
        tiers.device.stall()
        tiers.put(engine, digests)
        await until(lambda: not tiers.guard.is_usable)
        await until(lambda: not tiers.store.host.usage().used_bytes)
        tiers.be_patient()
        tiers.device.resume()
        await until(lambda: tiers.guard.is_usable)
        assert await tiers.load(engine, digests) == payloads(digests)


async def test_a_lost_device_costs_what_was_only_there_and_ends_the_tier():
    async with running(PooledTiers()) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(4)
        tiers.put(engine, digests[:2])
        await tiers.settle()
        tiers.device.lose()
        tiers.put(engine, digests[2:], parent=digests[1])
        slot = engine.space.find(digests[3])
        await until(
            lambda: tiers.mover.bring(slot, MANIFEST.all_heads) and not tiers.guard.is_usable
        )
        assert engine.hits(digests) == 2
        assert await tiers.load(engine, digests) == payloads(digests[:2])
        assert tiers.put(engine, digests[2:], parent=digests[1]) == [False, False]
        assert await tiers.load(engine, digests) == payloads(digests)
    tiers.tier.close()


# --- other tiers ------------------------------------------------------------------------------


async def test_slower_tiers_get_what_was_copied_down_and_the_end_waits_for_both():
    tiers = PooledTiers(slower=[Slower(fake(DISK), "back")])
    async with running(tiers):
        engine, digests = tiers.engine(MANIFEST), make_digests(5)
        tiers.put(engine, digests)
        engine.put(make_digests(2, prompt=1))
        tiers.room.demote_all()
        assert await tiers.mover.drain(DEADLINE_SECONDS) == 0
        assert tiers.bits(engine, digests) == [BOTH | DISK] * 5
        assert tiers.store.delete(engine.space, digests) == (5, 0)
        await tiers.settle()
        assert tiers.tier.usage().used_bytes == 0
        assert tiers.store.delete(engine.space, make_digests(2, prompt=1)) == (2, 0)
        await tiers.settle()
        assert tiers.guards[DISK].usage().used_bytes == 0


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_is_done_the_laws_hold_and_every_byte_is_right(seed):
    rng = np.random.default_rng(seed)
    tiers = PooledTiers(pool_bytes=6 * CHUNK + 4 * KIB, capacity_bytes=MIB)
    prompts = [make_digests(6, prompt=number) for number in range(3)]
    async with running(tiers):
        engines = [tiers.engine(MANIFEST, session=number) for number in (1, 2)]
        for _ in range(120):
            engine = engines[int(rng.integers(2))]
            digests = prompts[int(rng.integers(3))]
            digests = digests[: int(rng.integers(1, 7))]
            match int(rng.integers(10)):
                case 0 | 1 | 2:
                    tiers.put(engine, digests)
                case 3:
                    found = tiers.read(engine, digests)
                    assert found == payloads(digests[: len(found)])
                case 4:
                    tiers.store.delete(engine.space, digests[-1:])
                case 5:
                    tiers.evict_all()
                case 6:
                    places = tiers.reserve(engine, digests)
                    kept = [p.reservation for p in places if p.outcome is ReserveOutcome.RESERVED]
                    tiers.store.abort(engine.session, kept[::2])
                    tiers.store.end_session(engine.session)
                    tiers.store.bury(engine.session)
                case 7:
                    heads = HeadRange(0, 2)
                    tiers.put(engine, digests[:1], heads=heads)
                case 8:
                    # What is copied up or down from now on is under way through what follows.
                    tiers.device.stall()
                case _:
                    tiers.device.resume()
                    await tiers.settle()
            tiers.store.check()
            await asyncio.sleep(0)
        tiers.device.resume()
        for digests in prompts:
            whole = engines[0].hits(digests)
            got = await tiers.load(engines[0], digests)
            assert len(got) == whole
            assert got == payloads(digests[:whole])


async def test_a_commit_is_verified_where_it_lies_in_the_arena_alone():
    async with running(PooledTiers(pool_bytes=2 * CHUNK)) as tiers:
        engine, digests = tiers.engine(MANIFEST), make_digests(3)
        *pooled, plain = tiers.reserve(engine, digests)
        assert [place.is_pooled for place in pooled] == [True, True]
        with pytest.raises(ChecksumError):
            tiers.store.commit(engine.session, plain.reservation, Root(1))
        assert engine.space.find(digests[2]) == NO_SLOT
