"""What comes up ahead of need: from other hosts, by prefetch, by what engines expect."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.daemon.hints import Hints
from kvstore.tiers.base import Recovered, Shard, ShardKey
from kvstore.types import HeadRange, HintKind, Place, Root
from tests.support.making import make_digests, make_manifest, make_payload, make_root
from tests.support.tiers import REDIS, Slower, Tiers, fake, running
from tests.support.virtual import run

MANIFEST = make_manifest()
ALL = MANIFEST.all_heads


def payloads(digests):
    return [make_payload(digest, MANIFEST.chunk_bytes) for digest in digests]


async def test_what_another_host_has_written_is_found_and_loaded():
    redis = fake()
    digests = make_digests(5)
    for number, digest in enumerate(digests):
        payload = make_payload(digest, MANIFEST.chunk_bytes)
        parent = digests[number - 1] if number else None
        key = ShardKey(MANIFEST.namespace_id(), digest, ALL)
        shard = Shard(key, parent, len(payload), make_root(payload))
        await redis.write(shard, memoryview(payload))
    async with running(Tiers([Slower(redis)])) as tiers:
        engine = tiers.engine(MANIFEST)
        assert engine.hits(digests) == 0
        found = asyncio.Event()
        assert tiers.mover.find(engine.space, digests, found.set)
        await found.wait()
        assert engine.hits(digests) == 5
        assert await tiers.load(engine, digests) == payloads(digests)


@pytest.mark.parametrize(
    ("heads", "size"), [(HeadRange(0, 5), 100), (HeadRange(3, 3), 100), (ALL, 0), (ALL, 2**31)]
)
async def test_what_a_tier_claims_and_no_manifest_allows_is_refused(heads, size):
    async with running(Tiers([Slower(fake())])) as tiers:
        engine = tiers.engine(MANIFEST)
        (digest,) = make_digests(1)
        shard = Shard(ShardKey(engine.space.id, digest, heads), None, size, Root(1))
        claimed = Recovered(shard, Place(0))
        assert tiers.store.slower.learn(engine.space, REDIS, claimed, tenant=0) == -1


async def test_a_prefetch_brings_chunks_up_before_anybody_loads_them():
    async with running(Tiers([Slower(fake())])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(5)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        hints = Hints(tiers.store, tiers.mover, asyncio.get_running_loop())
        assert hints.prefetch(engine.space, digests) == 5
        await tiers.settle()
        assert tiers.store.residents.count == 5
        assert hints.prefetch(engine.space, digests) == 0


def test_a_conversation_that_returns_later_is_brought_up_in_time_and_then_kept():
    async def main() -> None:
        async with running(Tiers([Slower(fake())])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(5)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            hints = Hints(tiers.store, tiers.mover, asyncio.get_running_loop())
            took = hints.take(engine.space, digests, HintKind.RETURNS_IN, 300, "")
            assert took == 5
            await asyncio.sleep(290)
            assert tiers.store.residents.count == 0
            await asyncio.sleep(9.5)
            slots = tiers.store.index.leading(engine.space, digests)
            assert tiers.store.residents.count == 5
            assert all(map(tiers.store.index.is_soft_pinned, slots))
            await asyncio.sleep(60)
            assert not any(map(tiers.store.index.is_soft_pinned, slots))

    run(main())


async def test_a_finished_conversation_leaves_first_but_not_what_others_share():
    async with running(Tiers([Slower(fake())])) as tiers:
        engine = tiers.engine(MANIFEST)
        shared = make_digests(3)
        ended = [*shared, *make_digests(4, prompt=1)]
        other = [*shared, *make_digests(4, prompt=2)]
        engine.put(ended)
        engine.put(other)
        hints = Hints(tiers.store, tiers.mover, asyncio.get_running_loop())
        hints.take(engine.space, ended, HintKind.FINISHED, 0, "")
        room, index = tiers.store.room, tiers.store.index
        leaving = []
        for _ in range(4):
            victim = room.next_victim(0, 1)
            leaving.append(index.digest(victim))
            room.evict(victim)
        assert leaving == ended[:2:-1]


async def test_a_conversation_that_goes_to_another_host_is_written_for_it():
    async with running(Tiers([Slower(fake(), "on_evict")])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(3)
        engine.put(digests)
        hints = Hints(tiers.store, tiers.mover, asyncio.get_running_loop(), host_name="here")
        hints.take(engine.space, digests, HintKind.GOES_TO, 5, "there")
        await tiers.settle()
        assert tiers.store.slower.residents[REDIS].count == 3
