"""Movement between tiers: what is written down when, what comes up again, for whom, how soon."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.hashing import block_digests, root_of
from kvstore.limits import MIB
from kvstore.store.admission import SecondTouch
from kvstore.tiers.fake import FakeTier, Fault
from kvstore.types import Digest, HeadRange, ReserveOutcome
from tests.support.making import make_digests, make_manifest, make_payload
from tests.support.stores import fill_up
from tests.support.tiers import DISK, REDIS, Slower, Tiers, fake, running
from tests.support.virtual import run

MANIFEST = make_manifest()
ALL = MANIFEST.all_heads


# A quarter of the host tier may wait to be written.
ROOMY = 4 * MIB


def payloads(digests):
    return [make_payload(digest, MANIFEST.chunk_bytes) for digest in digests]


class SlowTier(FakeTier):
    """Takes a second for every call, and notes what is read in which order."""

    def __init__(self, kind=REDIS, capacity_bytes=64 * MIB) -> None:
        super().__init__(capacity_bytes, kind=kind)
        self.read_digests: list[Digest] = []

    async def read(self, shard, place, target, table=None):
        self.read_digests.append(shard.key.digest)
        return await super().read(shard, place, target, table)

    async def _fault(self, key):
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", [DISK, REDIS])
@pytest.mark.parametrize("policy", ["back", "through"])
@pytest.mark.parametrize("checksums", [True, False])
async def test_what_left_the_host_tier_comes_back_byte_by_byte(kind, policy, checksums):
    async with running(Tiers([Slower(fake(kind), policy)], checksums=checksums)) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(10)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        assert tiers.store.residents.count == 0
        assert engine.hits(digests) == 10
        assert await tiers.load(engine, digests) == payloads(digests)
        assert tiers.store.residents.count == 10
        assert tiers.store.counters.promote_chunks == 10
        assert tiers.store.hit_chunks[kind] == 10


async def test_shards_of_several_writers_come_back_as_one_chunk():
    async with running(Tiers([Slower(fake())])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(4)
        for heads in (HeadRange(0, 2), HeadRange(2, 4)):
            engine.put(digests, heads=heads)
        await tiers.settle()
        tiers.evict_all()
        half = MANIFEST.shard_bytes(HeadRange(0, 2))
        assert await tiers.load(engine, digests, HeadRange(2, 4)) == [
            make_payload(digest, half) for digest in digests
        ]
        assert tiers.store.counters.promote_chunks == 4
        assert await tiers.load(engine, digests) == [2 * make_payload(d, half) for d in digests]


def test_a_second_load_joins_the_first():
    async def main() -> None:
        async with running(Tiers([Slower(SlowTier())])) as tiers:
            first, second = tiers.engine(MANIFEST, 1), tiers.engine(MANIFEST, 2)
            digests = make_digests(6)
            first.put(digests)
            await tiers.settle()
            tiers.evict_all()
            got = await asyncio.gather(tiers.load(first, digests), tiers.load(second, digests))
            assert got == [payloads(digests)] * 2
            counters = tiers.store.counters
            assert (counters.promote_chunks, counters.promote_chunks_joined) == (6, 6)
            assert tiers.guards[REDIS].counters.read_chunks == 6

    run(main())


def test_loads_come_up_by_deadline_and_before_prefetches():
    async def main() -> None:
        slow = SlowTier()
        async with running(Tiers([Slower(slow)])) as tiers:
            engine = tiers.engine(MANIFEST)
            first, ahead, late, soon = (make_digests(8, prompt) for prompt in range(4))
            for digests in (first, ahead, late, soon):
                engine.put(digests)
                await tiers.settle()
                tiers.evict_all()
            slow.read_digests.clear()
            # The first fills the width of the tier, so that the others have to wait.
            answers = [tiers.ask(engine, first, deadline=50.0)]
            tiers.mover.prefetch(engine.space, ahead)
            answers += [tiers.ask(engine, late, deadline=90.0)]
            answers += [tiers.ask(engine, soon, deadline=60.0)]
            for loading, _, answered in answers:
                assert await answered == 8
                lease, _ = tiers.store.end_load(loading, 8)
                tiers.store.release(engine.session, [lease])
            await tiers.settle()
            order = [slow.read_digests[n : n + 8] for n in range(0, 32, 8)]
            assert order == [first, soon, late, ahead]

    run(main())


def test_a_load_that_is_given_up_frees_what_it_waited_for():
    async def main() -> None:
        slow = SlowTier()
        async with running(Tiers([Slower(slow)], capacity_bytes=ROOMY)) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(20)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            slow.read_digests.clear()
            loading, pending, _ = tiers.ask(engine, digests)
            await asyncio.sleep(0.05)
            pending.abandon()
            tiers.store.release(engine.session, [loading.lease])
            await tiers.settle()
            # What was under way goes on, and is kept.
            assert slow.read_digests == digests[:8]
            assert tiers.store.counters.promote_chunks_cancelled == 12
            assert tiers.store.index.held == 0

    run(main())


def test_at_its_deadline_a_load_has_what_has_come():
    async def main() -> None:
        async with running(Tiers([Slower(SlowTier())], capacity_bytes=ROOMY)) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(20)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            loading, pending, answered = tiers.ask(engine, digests)
            await asyncio.sleep(0.15)
            pending.give_up()
            lease, chunks = tiers.store.end_load(loading, await answered)
            assert len(chunks) == 8
            tiers.store.release(engine.session, [lease])

    run(main())


@pytest.mark.parametrize("fault", [Fault.CORRUPT, Fault.FORGET, Fault.FAIL])
async def test_a_chunk_that_cannot_be_had_ends_the_prefix(fault):
    # Calls: ten writes, then reads.
    async with running(Tiers([Slower(fake(script=[(13, fault)]))])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(10)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        assert await tiers.load(engine, digests) == payloads(digests[:3])
        # A failure says nothing about what is kept; the rest is known to be gone.
        assert engine.hits(digests) == (10 if fault is Fault.FAIL else 3)


async def test_what_one_tier_cannot_give_another_may():
    disk = fake(DISK, [(5, Fault.FAIL), (6, Fault.CORRUPT)])
    async with running(Tiers([Slower(disk), Slower(fake())])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(5)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        assert await tiers.load(engine, digests) == payloads(digests)
        assert tiers.guards[REDIS].counters.read_chunks == 2


async def test_a_tier_that_lies_about_bytes_is_found_out_here():
    class Liar(FakeTier):
        async def read(self, shard, place, target, table=None):
            target[:] = bytes(len(target))
            return True

    async with running(Tiers([Slower(Liar(MIB))])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(2)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        assert await tiers.load(engine, digests) == []
        assert tiers.store.counters.checksum_failures > 0


# --- writing ----------------------------------------------------------------------------------


async def test_on_evict_writes_what_leaves_and_nothing_before():
    async with running(Tiers([Slower(fake(), "on_evict")])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = fill_up(engine)
        await tiers.settle()
        counters = tiers.store.counters
        # A part of the host tier is kept free ahead of need.
        assert counters.demote_chunks == tiers.store.slower.residents[REDIS].count > 0
        assert counters.demote_chunks_dropped == 0
        assert engine.hits(digests) == len(digests)
        engine.put(make_digests(1, prompt=1))
        assert counters.demote_chunks_dropped == 0


class HalfTier(FakeTier):
    """Has no room for the first heads of any chunk."""

    async def write(self, shard, source):
        return None if shard.key.heads.start == 0 else await super().write(shard, source)


async def test_a_chunk_of_which_a_part_was_not_written_stays():
    async with running(Tiers([Slower(HalfTier(64 * MIB), "on_evict")])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(1)
        for heads in (HeadRange(0, 2), HeadRange(2, 4)):
            engine.put(digests, heads=heads)
        (slot,) = tiers.store.index.leading(engine.space, digests)
        tiers.mover._demote(slot)
        await tiers.settle()
        assert tiers.store.slower.residents[REDIS].count == 1
        assert tiers.store.residents.count == 1
        assert tiers.store.counters.demote_chunks == 0


async def test_room_in_need_does_not_wait_for_a_slow_tier():
    async with running(Tiers([Slower(SlowTier(), "on_evict")])) as tiers:
        engine = tiers.engine(MANIFEST)
        fill_up(engine)
        assert set(engine.put(make_digests(15, prompt=1))) == {ReserveOutcome.RESERVED}
        assert tiers.store.counters.demote_chunks_dropped > 0


async def test_a_clean_chunk_leaves_before_one_that_would_be_lost():
    async with running(Tiers([Slower(fake(), "on_evict")])) as tiers:
        engine = tiers.engine(MANIFEST)
        clean, dirty = make_digests(5), make_digests(15, prompt=1)
        engine.put(clean)
        tiers.mover.spread(engine.space, clean)
        await tiers.settle()
        # Used last, and yet the first to leave.
        engine.put(dirty)
        await tiers.load(engine, clean)
        room = tiers.store.room
        for digest in reversed(clean):
            victim = tiers.store.residents.next_victim(0, 1, room.footprint_of, room.is_wanted)
            assert tiers.store.index.digest(victim) == digest
            room.evict(victim)
        assert tiers.store.counters.demote_chunks_dropped == 0


def told_by(tiers: Tiers, engine, digest: Digest) -> list[bool]:
    told: list[bool] = []
    tiers.mover.when_written(engine.space, digest, ALL, told.append)
    return told


def test_through_tells_the_truth_of_what_is_kept():
    async def main() -> None:
        redis = fake(script=[(1, Fault.FAIL)])
        async with running(Tiers([Slower(redis, "through")])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(2)
            engine.put(digests)
            told = [told_by(tiers, engine, digest) for digest in digests]
            assert told == [[], []]
            await tiers.settle()
            assert told == [[True], [False]]

    run(main())


def test_through_a_tier_that_is_left_alone_is_answered_at_once():
    async def main() -> None:
        redis = fake(script=[(n, Fault.FAIL) for n in range(3)])
        async with running(Tiers([Slower(redis, "through")])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(4)
            engine.put(digests[:3])
            await tiers.settle()
            assert not tiers.guards[REDIS].is_usable
            engine.put(digests[3:])
            assert told_by(tiers, engine, digests[3]) == [False]
            assert engine.hits(digests) == 4

    run(main())


async def test_second_touch_writes_what_is_used_again():
    async with running(Tiers([Slower(fake(), "back", SecondTouch(64 * MIB))])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(4)
        engine.put(digests)
        await tiers.settle()
        assert tiers.store.slower.residents[REDIS].count == 0
        await tiers.load(engine, digests[:2])
        await tiers.settle()
        assert tiers.store.slower.residents[REDIS].count == 2


async def test_a_chunk_that_several_writers_store_is_used_once():
    async with running(Tiers([Slower(fake(), "back", SecondTouch(64 * MIB))])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(4)
        for heads in (HeadRange(0, 1), HeadRange(1, 2), HeadRange(2, 4)):
            engine.put(digests, heads=heads)
        await tiers.settle()
        assert tiers.store.slower.residents[REDIS].count == 0
        await tiers.load(engine, digests[:2])
        await tiers.settle()
        assert tiers.store.slower.residents[REDIS].count == 2


async def test_the_head_of_a_prefix_too_long_for_the_queue_is_what_a_tier_gets():
    async with running(Tiers([Slower(fake())], capacity_bytes=2 * MIB)) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(40)
        engine.put(digests)
        await tiers.settle()
        kept = tiers.store.slower.residents[REDIS].count
        assert tiers.mover.routes[REDIS].lane.dropped_writes == 40 - kept > 0
        tiers.evict_all()
        assert engine.hits(digests) == kept


def test_draining_writes_what_waits_and_gives_up_in_time():
    async def main() -> None:
        async with running(Tiers([Slower(SlowTier())])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(8)
            engine.put(digests)
            started = tiers.clock()
            assert await tiers.mover.drain(0.15) == 0 or tiers.clock() - started <= 0.16
            assert await tiers.mover.drain(10.0) == 0
            assert tiers.store.slower.residents[REDIS].count == 8

    run(main())


async def test_a_disk_that_is_full_evicts_by_its_own_policy_tail_before_head():
    disk = fake(DISK, capacity_bytes=10 * MANIFEST.chunk_bytes)
    async with running(Tiers([Slower(disk)], capacity_bytes=ROOMY)) as tiers:
        engine = tiers.engine(MANIFEST)
        old, new = make_digests(8), make_digests(8, prompt=1)
        engine.put(old)
        await tiers.settle()
        tiers.evict_all()
        engine.put(new)
        await tiers.settle()
        usage = disk.usage()
        assert usage.used_bytes <= usage.capacity_bytes
        assert tiers.store.slower.residents[DISK].count == 10
        assert 0 < engine.hits(old) < 8
        assert tiers.guards[DISK].counters.evict_chunks == 6


async def test_what_is_deleted_leaves_all_tiers():
    redis = fake()
    async with running(Tiers([Slower(redis)])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(3)
        engine.put(digests)
        await tiers.settle()
        assert tiers.store.delete(engine.space, digests) == (3, 0)
        await tiers.settle()
        assert (engine.hits(digests), redis.usage().used_bytes) == (0, 0)


async def test_a_chunk_computed_anew_with_other_bytes_replaces_the_old_copy():
    redis = fake()
    async with running(Tiers([Slower(redis)])) as tiers:
        engine = tiers.engine(MANIFEST)
        (digest,) = digests = make_digests(1)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        tiers.store.index.usable &= ~REDIS
        (granted,) = engine.reserve(digests)
        other = bytes(MANIFEST.chunk_bytes)
        tiers.store.host.view(granted.extent)[:] = other
        blocks = block_digests(other)
        tiers.store.host.seal(granted.extent, blocks)
        tiers.store.commit(engine.session, granted.reservation, root_of(blocks))
        tiers.store.index.usable |= REDIS
        await tiers.settle()
        tiers.evict_all()
        assert await tiers.load(engine, [digest]) == [other]


# --- a tier that fails ------------------------------------------------------------------------


def test_what_is_only_in_a_failing_tier_is_a_miss_until_it_answers():
    async def main() -> None:
        redis = fake(script=[(n, Fault.FAIL) for n in range(6, 12)])
        async with running(Tiers([Slower(redis)])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(6)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            assert await tiers.load(engine, digests) == []
            assert engine.hits(digests) == engine.hits(digests, window=2) == 0
            counters = tiers.store.counters
            assert counters.lookup_chunks_unavailable == 12
            asked = counters.lookup_chunks_ready + counters.lookup_chunks_unavailable
            assert asked + counters.lookup_chunks_miss == 12
            await asyncio.sleep(1.0)
            assert await tiers.load(engine, digests) == payloads(digests)

    run(main())


def test_a_tier_that_fails_is_offered_what_is_used_once_it_answers():
    async def main() -> None:
        redis = fake(script=[(n, Fault.FAIL) for n in range(4)])
        async with running(Tiers([Slower(redis)])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(4)
            engine.put(digests)
            await tiers.settle()
            route = tiers.mover.routes[REDIS]
            assert not route.tier.is_usable
            await tiers.load(engine, digests)
            assert route.lane.write_chunks == 0
            await asyncio.sleep(1.0)
            await tiers.load(engine, digests)
            await tiers.settle()
            assert tiers.store.slower.residents[REDIS].count == 4

    run(main())


def test_what_waits_behind_a_tier_that_starts_to_fail_is_answered_then():
    async def main() -> None:
        redis = fake(script=[(n, Fault.HANG) for n in range(20, 40)])
        async with running(Tiers([Slower(redis)], capacity_bytes=ROOMY)) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(20)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            began = tiers.clock()
            assert await tiers.load(engine, digests) == []
            assert tiers.clock() - began <= 1.1

    run(main())


def test_a_load_that_takes_longer_than_computing_is_declined_and_counted():
    async def main() -> None:
        async with running(Tiers([Slower(SlowTier())])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(4)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            await tiers.load(engine, digests[:2])
            tiers.evict_all()
            looked = tiers.store.lookup
            cheap = looked(1, engine.space, digests, 0.0, recompute_seconds=0.001)
            dear = looked(1, engine.space, digests, 0.0, recompute_seconds=10.0)
            assert (cheap.hits, dear.hits) == (0, 4)
            assert 0.1 <= dear.expected_seconds <= 1.0
            assert tiers.store.counters.lookup_chunks_declined == 4

    run(main())
