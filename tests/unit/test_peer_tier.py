"""What peers hold: found through the directory, by their own word, and never believed blindly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from kvstore.errors import ProtocolError, TierError
from kvstore.hashing import block_digests, root_of
from kvstore.limits import (
    BREAKER_PAUSE_MAX_SECONDS,
    PEER_ASK_SECONDS,
    PEER_LANES,
    PULL_BATCH_CHUNKS_MAX,
)
from kvstore.protocol import peering as p
from kvstore.tiers import peer, peer_reads
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.peer import PeerTier
from kvstore.tiers.peer_reads import PEER_TIER_SECONDS
from kvstore.types import Digest, HeadRange, NamespaceId, Place, ReserveOutcome, TierKind
from tests.support.making import make_digests, make_manifest, make_payload
from tests.support.stores import Engine
from tests.support.tiers import Slower, Tiers, running
from tests.support.virtual import run

MANIFEST = make_manifest(model="peers")
SPACE = MANIFEST.namespace_id()
DIGESTS = make_digests(4)
SIZE = MANIFEST.chunk_bytes


def held(digest: Digest, parent: bytes = b"", size: int = SIZE, heads=(0, 4)) -> p.HeldChunk:
    root = root_of(block_digests(make_payload(digest, SIZE)))
    return p.HeldChunk(parent, [p.OfferedShard(*heads, size, root)])


class Line:
    """One peer that holds *digests*; *spoil* is what happens to whoever asks."""

    def __init__(self, digests: Sequence[Digest], spoil: Callable[[], object] | None = None):
        self.digests = list(digests)
        self.spoil = spoil
        self.questions: list[list[Digest]] = []
        self.wants: list[p.Want] = []
        self.batches: list[int] = []
        self.under_way = 0
        self.chunks: Callable[[Digest], p.HeldChunk] = held

    async def have(self, request: p.Have) -> p.Holding:
        self.questions.append(list(request.digests))
        await self._spoiled()
        nothing = p.HeldChunk(b"", [])
        of = [self.chunks(d) if d in self.digests else nothing for d in request.digests]
        return p.Holding(of)

    async def take(self, wanted, arrived) -> None:
        self.batches.append(len(wanted))
        self.under_way += 1
        assert self.under_way <= PEER_LANES
        try:
            for number, (want, target) in enumerate(wanted):
                self.wants.append(want)
                await self._spoiled()
                arrived(number, self._sent(want, target))
        finally:
            self.under_way -= 1

    def _sent(self, want: p.Want, target: memoryview):
        if want.digest not in self.digests:
            return p.Gone()
        target[:] = make_payload(Digest(want.digest), len(target))
        return block_digests(target)

    async def _spoiled(self) -> None:
        await asyncio.sleep(0)
        if self.spoil is not None:
            answer = self.spoil()
            if isinstance(answer, float):
                await asyncio.sleep(answer)


def fails() -> None:
    raise TierError("it has gone")


def lies() -> None:
    raise ProtocolError("it sends what it may not")


class Names:
    """A directory in memory: name -> what stands there of it, true or not."""

    def __init__(self, **said: Sequence[Digest]) -> None:
        self.said = said
        self.asked: list[list[str]] = []
        self.is_away = False

    async def holders(self, namespace, digests, names) -> list[list[bool]]:
        self.asked.append(list(names))
        if self.is_away:
            raise TierError("directory: no answer in time")
        return [
            [namespace == SPACE and digest in self.said.get(name, ()) for digest in digests]
            for name in names
        ]

    async def probe(self) -> None:
        if self.is_away:
            raise TierError("directory: no answer in time")

    def close(self) -> None:
        pass


def tier_of(directory: Names, **lines: Line) -> PeerTier:
    tier = PeerTier(directory, asyncio.get_running_loop().time)
    tier.connect(lines, lambda namespace: MANIFEST if namespace == SPACE else None)
    return tier


async def found(tier: PeerTier, digests: Sequence[Digest] = DIGESTS) -> list[Digest]:
    """Return which of *digests* peers hold, by what they say now."""
    answers = await tier.find(SPACE, digests)
    return [digest for digest, shards in zip(digests, answers, strict=True) if shards]


async def read(tier: PeerTier, digest: Digest, namespace: NamespaceId = SPACE) -> bool:
    payload = make_payload(digest, SIZE)
    shard = Shard(
        ShardKey(namespace, digest, HeadRange(0, 4)), None, SIZE, root_of(block_digests(payload))
    )
    target = memoryview(bytearray(SIZE))
    here = await tier.read(shard, Place(0), target)
    assert not here or target == payload
    return here


def test_a_chunk_is_found_with_its_parent_and_read_from_who_has_it():
    async def main() -> None:
        near, far = Line(DIGESTS[:2]), Line(DIGESTS[2:])
        near.chunks = lambda digest: held(digest, parent=bytes(32))
        tier = tier_of(Names(near=DIGESTS[:2], far=DIGESTS[2:]), near=near, far=far)
        answers = await tier.find(SPACE, DIGESTS)
        assert [shards[0].shard.parent for shards in answers] == [bytes(32)] * 2 + [None] * 2
        assert (near.questions, far.questions) == ([DIGESTS[:2]], [DIGESTS[2:]])
        assert all([await read(tier, digest) for digest in DIGESTS])
        assert all(want.spare for want in near.wants + far.wants)
        assert len(near.wants) == len(far.wants) == 2
        # Nobody has said that it holds these.
        assert not await read(tier, make_digests(1, 7)[0])
        assert not await read(tier, DIGESTS[0], NamespaceId(bytes(16)))
        tier.close()

    run(main())


def test_only_configured_peers_are_looked_up_and_asked():
    async def main() -> None:
        directory = Names(far=[], evil=DIGESTS, **{"tcp://192.0.2.1:9": DIGESTS})
        far = Line(DIGESTS)
        tier = tier_of(directory, far=far)
        assert await found(tier) == []
        assert (directory.asked, far.questions) == ([["far"]], [])
        assert await tier.find(NamespaceId(b"another manifest"), DIGESTS) == [[]] * 4

    run(main())


def test_several_that_have_the_same_get_their_turns_and_stand_in_for_one_another():
    async def main() -> None:
        one, other = Line(DIGESTS), Line(DIGESTS)
        tier = tier_of(Names(one=DIGESTS, other=DIGESTS), one=one, other=other)
        for _ in range(4):
            assert await found(tier) == DIGESTS
        assert len(one.questions) == len(other.questions) == 2
        one.digests.clear()
        for _ in range(2):
            assert await found(tier) == DIGESTS
        other.spoil = fails
        one.digests += DIGESTS
        for _ in range(2):
            assert await found(tier) == DIGESTS

    run(main())


def test_a_stale_entry_is_a_miss_and_is_forgotten():
    async def main() -> None:
        line = Line(DIGESTS[1:])
        tier = tier_of(Names(far=DIGESTS), far=line)
        assert await found(tier) == DIGESTS[1:]
        assert tier.counters.stale == 1
        line.digests.clear()
        assert not await read(tier, DIGESTS[1])
        assert tier.counters.stale == 2
        wants = len(line.wants)
        assert not await read(tier, DIGESTS[1])
        assert len(line.wants) == wants, "it is not asked for again"

    run(main())


def test_a_busy_peer_fails_the_call_and_is_asked_again():
    async def main() -> None:
        line = Line(DIGESTS)
        tier = tier_of(Names(far=DIGESTS), far=line)
        assert await found(tier) == DIGESTS
        sent, line._sent = line._sent, lambda *_: p.Busy()
        with pytest.raises(TierError, match="peer far has no time now"):
            await read(tier, DIGESTS[0])
        line._sent = sent
        assert await read(tier, DIGESTS[0])
        assert (tier.counters.busy, tier.counters.peer_failures) == (1, 0)

    run(main())


def test_what_waits_together_is_asked_for_together_within_bounds(monkeypatch):
    digests = make_digests(3 * PULL_BATCH_CHUNKS_MAX * PEER_LANES)

    async def main() -> None:
        line = Line(digests)
        tier = tier_of(Names(far=digests), far=line)
        for limit_bytes, largest in ((1, 1), (3 * SIZE + 1, 3), (1 << 30, PULL_BATCH_CHUNKS_MAX)):
            monkeypatch.setattr(peer_reads, "PULL_BATCH_BYTES", limit_bytes)
            line.batches.clear()
            assert await found(tier, digests) == digests
            assert all(await asyncio.gather(*(read(tier, digest) for digest in digests)))
            assert line.batches[:PEER_LANES] == [largest] * PEER_LANES
            assert max(line.batches) == largest
            assert sum(line.batches) == len(digests), "each is asked for once"
        # Few are spread, so that every way has some.
        line.batches.clear()
        assert await found(tier, digests[:6]) == digests[:6]
        assert all(await asyncio.gather(*(read(tier, digest) for digest in digests[:6])))
        assert line.batches == [2, 2, 2]

    run(main())


def test_what_has_come_counts_whatever_becomes_of_the_rest(monkeypatch):
    monkeypatch.setattr(peer_reads, "PEER_LANES", 1)

    async def main() -> None:
        line = Line([*DIGESTS[:1], *DIGESTS[2:]])
        tier = tier_of(Names(far=DIGESTS), far=line)
        line.digests.append(DIGESTS[1])
        assert await found(tier) == DIGESTS
        line.digests.remove(DIGESTS[1])
        line.spoil = lambda: lies() if len(line.wants) == 3 else None
        got = await asyncio.gather(*(read(tier, digest) for digest in DIGESTS))
        assert (got, line.batches) == ([True, False, False, False], [4])
        counted = tier.counters
        assert (counted.stale, counted.peer_failures, counted.lies) == (1, 1, 1)
        # What waited behind it is not asked for: that peer is left alone.
        assert await found(tier) == []

    run(main())


def test_a_read_that_is_given_up_ends_its_batch_and_no_other(monkeypatch):
    monkeypatch.setattr(peer_reads, "PEER_LANES", 1)
    monkeypatch.setattr(peer_reads, "PULL_BATCH_CHUNKS_MAX", 2)

    async def main() -> None:
        line = Line(DIGESTS)
        tier = tier_of(Names(far=DIGESTS), far=line)
        assert await found(tier) == DIGESTS
        line.spoil = lambda: 1e6 if len(line.wants) == 2 else None
        reads = [asyncio.create_task(read(tier, digest)) for digest in DIGESTS]
        await asyncio.sleep(0.1)
        assert len(line.wants) == 2
        reads[3].cancel()
        reads[1].cancel()
        came = await asyncio.gather(*reads, return_exceptions=True)
        assert came[:1] + came[2:3] == [True, True]
        assert [type(one) for one in came[1::2]] == [asyncio.CancelledError] * 2
        assert line.batches == [2, 1], "what was given up before is not asked for"
        assert (line.under_way, tier.counters.peer_failures) == (0, 1)
        # One that is given up as soon as it has begun.
        assert await found(tier) == DIGESTS
        line.spoil = None
        early = asyncio.create_task(read(tier, DIGESTS[0]))
        await asyncio.sleep(0)
        early.cancel()
        await asyncio.wait([early])
        assert early.cancelled()
        assert await read(tier, DIGESTS[1])
        tier.close()

    run(main())


def test_when_it_is_closed_all_that_waits_is_a_miss():
    async def main() -> None:
        line = Line(DIGESTS, lambda: 1e6)
        tier = tier_of(Names(far=DIGESTS), far=line)
        line.spoil = None
        assert await found(tier) == DIGESTS
        line.spoil = lambda: 1e6
        reads = [asyncio.create_task(read(tier, digest)) for digest in DIGESTS]
        await asyncio.sleep(1)
        assert line.under_way == 4
        tier.close()
        assert await asyncio.gather(*reads) == [False] * 4
        assert line.under_way == 0

    run(main())


def test_what_is_deleted_here_can_be_found_again_at_once():
    async def main() -> None:
        tier = tier_of(Names(far=DIGESTS), far=Line(DIGESTS))
        for _ in range(2):
            ((one,), *_) = await tier.find(SPACE, DIGESTS[:1])
            # The tier is told later than it is deleted, and maybe later than it is found.
            assert not await tier.remove(one.shard, one.place)
            assert await read(tier, DIGESTS[0])

    run(main())


def test_a_peer_that_fails_is_left_alone_while_others_are_asked():
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        dead, alive = Line(DIGESTS, fails), Line(DIGESTS[2:])
        tier = tier_of(Names(dead=DIGESTS, alive=DIGESTS[2:]), dead=dead, alive=alive)
        for _ in range(6):
            assert await found(tier) == DIGESTS[2:]
        assert len(dead.questions) == 3, "three failures in a row are enough"
        assert clock() < PEER_ASK_SECONDS
        for _ in range(3):
            await asyncio.sleep(BREAKER_PAUSE_MAX_SECONDS)
            before = len(dead.questions)
            for _ in range(4):
                await found(tier)
            assert len(dead.questions) == before + 1, "it is tried once after each pause"
        dead.spoil = None
        await asyncio.sleep(BREAKER_PAUSE_MAX_SECONDS)
        assert await found(tier) == DIGESTS
        assert tier.counters.lies == 0

    run(main())


def test_a_silent_peer_holds_up_a_question_for_its_time_and_no_longer():
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        silent, alive = Line(DIGESTS, lambda: 1e6), Line(DIGESTS[2:])
        tier = tier_of(Names(silent=DIGESTS, alive=DIGESTS[2:]), silent=silent, alive=alive)
        began_at = clock()
        for _ in range(4):
            assert await found(tier) == DIGESTS[2:]
        assert clock() - began_at <= 3 * PEER_ASK_SECONDS
        # A read of what it had promised ends, too, and is a miss.
        silent.spoil, alive.digests = None, []
        await asyncio.sleep(BREAKER_PAUSE_MAX_SECONDS)
        assert await found(tier) == DIGESTS
        silent.spoil = lambda: 1e6
        began_at = clock()
        got = await asyncio.gather(*(read(tier, digest) for digest in DIGESTS * 3))
        assert got == [False] * 12
        assert clock() - began_at < 1.1 * PEER_TIER_SECONDS, "those that wait fail with the first"
        tier.close()

    run(main())


ABSURD = {
    "a chunk of another size": lambda digest: held(digest, size=SIZE - 1),
    "a head missing": lambda digest: held(digest, size=SIZE // 4 * 3, heads=(0, 3)),
    "too many heads": lambda digest: held(digest, size=SIZE // 4 * 5, heads=(0, 5)),
    "heads the wrong way round": lambda digest: held(digest, heads=(4, 0)),
}


@pytest.mark.parametrize("what", [*ABSURD, "fewer answers", "more answers", "a broken protocol"])
def test_a_peer_that_lies_is_not_believed_and_left_alone_at_once(what):
    async def main() -> None:
        liar = Line(DIGESTS, lies if what == "a broken protocol" else None)
        liar.chunks = ABSURD.get(what, held)
        if what.endswith("answers"):
            count = 3 if what == "fewer answers" else 5

            async def have(request: p.Have) -> p.Holding:
                liar.questions.append(list(request.digests))
                return p.Holding([held(DIGESTS[0])] * count)

            liar.have = have
        honest = Line(DIGESTS[:2])
        tier = tier_of(Names(liar=DIGESTS, honest=DIGESTS[:2]), liar=liar, honest=honest)
        for _ in range(5):
            assert await found(tier) == DIGESTS[:2]
        assert len(liar.questions) == 1
        assert tier.counters.lies == 1

    run(main())


def test_what_is_remembered_of_holders_has_a_bound(monkeypatch):
    monkeypatch.setattr(peer, "PEER_HOLDERS_MAX", 2)

    async def main() -> None:
        line = Line(DIGESTS)
        tier = tier_of(Names(far=DIGESTS), far=line)
        assert await found(tier) == DIGESTS
        assert [await read(tier, digest) for digest in DIGESTS] == [False, False, True, True]

    run(main())


def test_a_directory_that_is_away_fails_the_call_and_the_probe():
    async def main() -> None:
        directory = Names(far=DIGESTS)
        tier = tier_of(directory, far=Line(DIGESTS))
        await tier.probe()
        directory.is_away = True
        with pytest.raises(TierError, match="directory"):
            await tier.find(SPACE, DIGESTS)
        with pytest.raises(TierError, match="directory"):
            await tier.probe()

    run(main())


# --- below a store ------------------------------------------------------------------------


async def discover(tiers: Tiers, engine: Engine) -> None:
    """Let the store ask its shared tiers about all digests, and find all there."""
    done = asyncio.Event()
    assert tiers.mover.find(engine.space, DIGESTS, done.set)
    await done.wait()
    assert engine.hits(DIGESTS) == len(DIGESTS)


def test_the_store_reads_from_peers_joins_loads_and_never_writes_there():
    async def main() -> None:
        line = Line(DIGESTS)
        tier = tier_of(Names(far=DIGESTS), far=line)
        async with running(Tiers([Slower(tier, "never")])) as tiers:
            one, two = tiers.engine(MANIFEST, 1), tiers.engine(MANIFEST, 2)
            await discover(tiers, one)
            assert tiers.store.hit_chunks[TierKind.PEER] == 4
            got = await asyncio.gather(tiers.load(one, DIGESTS), tiers.load(two, DIGESTS))
            assert got == [[make_payload(digest, SIZE) for digest in DIGESTS]] * 2
            assert len(line.wants) == 4, "the same chunk asked for twice comes once"
            others = make_digests(3, 1)
            one.put(others)
            tiers.mover.spread(one.space, others)
            await tiers.settle()
            tiers.evict_all()
            assert one.hits(others) == 0
            assert one.hits(DIGESTS) == 4, "it is still there, as far as we know"
            guard = tiers.guards[TierKind.PEER].counters
            assert (guard.write_chunks, guard.write_chunks_refused, guard.failures) == (0, 0, 0)
            assert tiers.store.delete(one.space, DIGESTS) == (4, 0)
            await tiers.settle()

    run(main())


def test_what_only_a_peer_holds_is_stored_here_when_it_was_computed():
    async def main() -> None:
        tier = tier_of(Names(far=DIGESTS), far=Line(DIGESTS))
        async with running(Tiers([Slower(tier, "never")])) as tiers:
            engine = tiers.engine(MANIFEST)
            await discover(tiers, engine)
            assert engine.put(DIGESTS) == [ReserveOutcome.RESERVED] * 4
            assert engine.put(DIGESTS) == [ReserveOutcome.PRESENT] * 4
            assert tiers.store.residents.count == 4

    run(main())


def test_a_peer_that_dies_costs_a_load_and_is_forgotten():
    async def main() -> None:
        line = Line(DIGESTS)
        tier = tier_of(Names(far=DIGESTS), far=line)
        async with running(Tiers([Slower(tier, "never")])) as tiers:
            engine = tiers.engine(MANIFEST)
            await discover(tiers, engine)
            line.spoil = fails
            assert await tiers.load(engine, DIGESTS) == []
            await tiers.settle()
            assert engine.hits(DIGESTS) == 0
            assert tiers.guards[TierKind.PEER].is_usable, "others may be asked on"

    run(main())
