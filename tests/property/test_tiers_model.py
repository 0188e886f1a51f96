"""The store over three tiers against a dict, step by step, with all laws checked after each.

Shards are copied down, come up, leave a tier by its own order, are found in a tier that others
write to; tiers fail and answer again; chunks are leased meanwhile, and vanish from all tiers
under a lease. The bytes are moved by the test, as the mover would. What the store may do that
the dict cannot foresee is evict from the host tier: only what was free to leave, and counted.
"""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.hashing import chunk_digests
from kvstore.limits import MIB
from kvstore.metrics import Counters
from kvstore.store.quota import Share, Shares
from kvstore.store.shards import covers
from kvstore.store.shelves import SlowTier
from kvstore.store.store import NO_LEASE, Store
from kvstore.tiers.base import Recovered, Shard, ShardKey
from kvstore.tiers.host import HostTier
from kvstore.transfer.arena import Arena
from kvstore.types import NO_SLOT, Digest, HeadRange, LeaseId, Place, ReserveOutcome, TierKind
from tests.support.making import make_manifest, make_payload, make_root
from tests.support.stores import LEASE_TTL_SECONDS, write_chunk

HOST, DISK, REDIS = TierKind.HOST, TierKind.DISK, TierKind.REDIS
MANIFEST = make_manifest(head_dim=192)
ALL = MANIFEST.all_heads
HEADS = [ALL, ALL, HeadRange(0, 2), HeadRange(2, 4)]
# Room for less than half of all chunks.
CAPACITY_BYTES = MIB
CHUNKS_PER_PROMPT = 10
# Prompts share their first three chunks.
DIGESTS = [chunk_digests([0] * 3 + [prompt] * (CHUNKS_PER_PROMPT - 3), 1) for prompt in range(3)]
PARENT = {
    digest: prompt[at - 1] if at else None for prompt in DIGESTS for at, digest in enumerate(prompt)
}
SESSION = 1

prompts = st.integers(0, len(DIGESTS) - 1)
positions = st.integers(0, CHUNKS_PER_PROMPT - 1)
counts = st.integers(1, CHUNKS_PER_PROMPT)
picks = st.integers(0, 1000)
kinds = st.sampled_from([DISK, REDIS])


class Still:
    """A mover that moves nothing, and notes what slower tiers are to forget."""

    def __init__(self) -> None:
        self.removed_shards: list[HeadRange] = []

    def published(self, slot, heads):
        pass

    def used(self, slots):
        pass

    def pressed(self):
        pass

    def removed(self, slot, shards):
        self.removed_shards += [shard.heads for shard in shards]

    def is_wanted(self, slot):
        return False

    def expected_seconds(self, tiers, chunks, chunk_bytes):
        return 0.0


class TiersModel(RuleBasedStateMachine):
    """Every rule does the same to the store and to a dict: digest -> heads -> bits of tiers."""

    @initialize(eviction=st.sampled_from(["lru", "s3fifo"]))
    def open(self, eviction):
        self.store = Store(
            HostTier(Arena.create(CAPACITY_BYTES)),
            eviction=eviction,
            lease_ttl_seconds=LEASE_TTL_SECONDS,
            counters=Counters(),
            slower=[
                SlowTier(kind, eviction, Shares(kind.name, 64 * MIB, [Share("")]))
                for kind in (DISK, REDIS)
            ],
        )
        self.movement = Still()
        self.store.attach_movement(self.movement)
        self.space = self.store.enter(MANIFEST)
        self.chunks: dict[Digest, dict[HeadRange, int]] = {}
        self.leases: dict[LeaseId, tuple[list[Digest], float]] = {}
        self.usable = HOST | DISK | REDIS
        self.now = 100.0
        self.asked = self.evicted = self.places = 0

    def teardown(self):
        if hasattr(self, "store"):
            self.store.host.close()

    # --- writing ------------------------------------------------------------------------

    @rule(prompt=prompts, at=positions, count=counts, cut=picks)
    def put(self, prompt, at, count, cut):
        digests, heads = DIGESTS[prompt][at : at + count], HEADS[cut % len(HEADS)]
        parent = DIGESTS[prompt][at - 1] if at else None
        there = {digest for digest in digests if self.has(digest, heads, self.usable)}
        places = self.store.reserve(SESSION, self.space, digests, parent=parent, heads=heads)
        self.forget_evicted()
        for digest, place in zip(digests, places, strict=True):
            # One that was there may have left for those before it.
            assert place.outcome is not ReserveOutcome.PRESENT or digest in there
            if place.outcome is not ReserveOutcome.RESERVED:
                continue
            root = write_chunk(self.store, place.extent, self.payload(digest, heads))
            self.store.commit(SESSION, place.reservation, root)
            if not self.has(digest, heads, HOST):
                self.note(digest, heads, HOST)

    @rule(prompt=prompts, at=positions, count=counts)
    def delete(self, prompt, at, count):
        digests = DIGESTS[prompt][at : at + count]
        held, self.movement.removed_shards = self.held(), []
        gone, busy = self.store.delete(self.space, digests)
        wanted = [digest for digest in digests if digest in self.chunks and digest not in held]
        assert gone == len(wanted)
        assert busy == sum(digest in held for digest in digests)
        below = [bits for digest in wanted for bits in self.chunks[digest].values() if bits & ~HOST]
        assert len(self.movement.removed_shards) == len(below)
        for digest in wanted:
            del self.chunks[digest]

    # --- between tiers ------------------------------------------------------------------

    @rule(kind=kinds, pick=picks, count=counts)
    def copy_down(self, kind, pick, count):
        """Let a tier have what the host tier has and it has not."""
        for digest, heads in self.those(HOST, kind)[pick % 7 :][:count]:
            slot = self.space.find(digest)
            self.places += 1
            record = self.store.index.shard(slot, heads, HOST)
            self.store.slower.entered(slot, record, kind, Place(self.places))
            self.note(digest, heads, kind)

    @rule(pick=picks, count=counts)
    def bring_up(self, pick, count):
        """Read into the host tier what is only in tiers that answer."""
        below = [one for kind in (DISK, REDIS) for one in self.those(kind & self.usable, HOST)]
        for digest, heads in below[pick % 7 :][:count]:
            slot = self.space.find(digest)
            record = None if slot == NO_SLOT else self.store.index.shard(slot, heads)
            if record is None or record.is_in_host:
                continue
            self.store.hold(slot)
            extent = self.store.take_room(slot, record.size_bytes)
            self.forget_evicted(spared=digest)
            if extent is not None:
                write_chunk(self.store, extent, self.payload(digest, heads))
                assert self.store.promoted(slot, record, extent, PARENT[digest])
                self.note(digest, heads, HOST)
            self.store.let_go(slot)

    @precondition(lambda self: self.chunks)
    @rule(kind=kinds, pick=picks, evicted=st.booleans())
    def vanish(self, kind, pick, evicted):
        """Let a chunk be gone from a tier, whoever holds it."""
        digest = sorted(self.chunks)[pick % len(self.chunks)]
        slot = self.space.find(digest)
        left = self.store.slower.left(slot, kind, evicted=evicted)
        lost = [heads for heads, bits in self.chunks[digest].items() if bits & kind]
        assert {shard.heads for shard in left} == set(lost)
        for heads in lost:
            self.drop(digest, heads, kind)

    @rule(count=counts)
    def leave_by_turn(self, count):
        """Let the disk tier give chunks in its own order: ends of prefixes that nobody holds."""
        for _ in range(count):
            slot = self.store.slower.next_victim(DISK, 0, 1)
            free = [
                digest
                for digest, shards in self.chunks.items()
                if digest not in self.held() and any(bits & DISK for bits in shards.values())
            ]
            if slot == NO_SLOT:
                # An end that is held keeps its whole prefix.
                assert not free or self.leases
                return
            digest = self.store.index.digest(slot)
            assert digest in free
            assert not self.store.index.tree.children(slot, DISK)
            self.store.slower.left(slot, DISK, evicted=True)
            for heads in list(self.chunks[digest]):
                self.drop(digest, heads, DISK)

    @rule(prompt=prompts, at=positions, count=counts, cut=picks)
    def find(self, prompt, at, count, cut):
        """Learn what others have put into a tier."""
        heads = HEADS[cut % len(HEADS)]
        for digest in DIGESTS[prompt][at : at + count]:
            payload = self.payload(digest, heads)
            key = ShardKey(self.space.id, digest, heads)
            shard = Shard(key, PARENT[digest], len(payload), make_root(payload))
            slot = self.store.slower.learn(self.space, REDIS, Recovered(shard, Place(0)), tenant=0)
            assert slot == self.space.find(digest)
            self.note(digest, heads, REDIS)

    @rule(kind=kinds)
    def fail_or_answer(self, kind):
        self.usable ^= kind
        self.store.index.usable ^= kind

    # --- reading ------------------------------------------------------------------------

    @rule(prompt=prompts, at=positions, count=counts, lease=st.booleans())
    def look_up(self, prompt, at, count, lease):
        digests = DIGESTS[prompt][at : at + count]
        found = self.store.lookup(SESSION, self.space, digests, self.now, lease=lease)
        self.asked += len(digests)
        hits = self.leading(digests)
        assert found.hits == hits
        bits = [tiers for tiers, chunks in found.tiers for _ in range(chunks)]
        assert bits == [self.tiers_of(digest) for digest in digests[:hits]]
        if lease and hits:
            self.leases[found.lease] = (digests[:hits], self.now + LEASE_TTL_SECONDS)
        else:
            assert found.lease == NO_LEASE

    @rule(prompt=prompts, count=counts, cut=picks)
    def load(self, prompt, count, cut):
        """Load what is in the host tier; nothing is brought up meanwhile."""
        digests, heads = DIGESTS[prompt][:count], HEADS[cut % len(HEADS)]
        lease, chunks = self.store.load(SESSION, self.space, digests, heads, self.now)
        ready = digests[: self.leading(digests)]
        here = [self.has(digest, heads, HOST) for digest in ready]
        assert len(chunks) == (here.index(False) if False in here else len(here))
        for digest, shards in zip(digests, chunks, strict=False):
            assert covers([shard.heads for shard in shards], heads)
            for shard in shards:
                assert self.store.host.view(shard.extent) == self.payload(digest, shard.heads)
        if chunks:
            self.leases[lease] = (digests[: len(chunks)], self.now + LEASE_TTL_SECONDS)

    @precondition(lambda self: self.leases)
    @rule(pick=picks)
    def release(self, pick):
        lease = sorted(self.leases)[pick % len(self.leases)]
        del self.leases[lease]
        assert self.store.release(SESSION, [lease]) == 1
        self.sweep()

    @rule(seconds=st.sampled_from([1.0, LEASE_TTL_SECONDS]))
    def pass_time(self, seconds):
        self.now += seconds
        over = [lease for lease, (_, end) in self.leases.items() if end <= self.now]
        assert self.store.expire(self.now) == len(over)
        for lease in over:
            del self.leases[lease]
        self.sweep()

    # --- the laws -----------------------------------------------------------------------

    @invariant()
    def the_store_agrees_with_itself(self):
        self.store.check()

    @invariant()
    def every_shard_is_where_the_dict_says_and_whole(self):
        index = self.store.index
        assert len(index) == len(self.chunks)
        for digest, shards in self.chunks.items():
            kept = index.shards(self.space.find(digest))
            assert {shard.heads: shard.tiers for shard in kept} == shards
            for shard in kept:
                if shard.is_in_host:
                    assert self.store.host.view(shard.extent) == self.payload(digest, shard.heads)

    @invariant()
    def counters_add_up(self):
        c = self.store.counters
        ready = c.lookup_chunks_ready
        misses = c.lookup_chunks_miss + c.lookup_chunks_unavailable
        assert ready + misses + c.lookup_chunks_declined == self.asked
        assert sum(self.store.hit_chunks.values()) == ready

    # --- inside -------------------------------------------------------------------------

    def payload(self, digest: Digest, heads: HeadRange) -> bytes:
        return make_payload(digest, MANIFEST.shard_bytes(heads))

    def those(self, having: int, lacking: int) -> list[tuple[Digest, HeadRange]]:
        """Return the shards that are in one tier and not in another."""
        return [
            (digest, heads)
            for digest, shards in sorted(self.chunks.items())
            for heads, bits in sorted(shards.items())
            if bits & having and not bits & lacking
        ]

    def has(self, digest: Digest, heads: HeadRange, tiers: int) -> bool:
        shards = self.chunks.get(digest, {})
        return covers([one for one, bits in shards.items() if bits & tiers], heads)

    def tiers_of(self, digest: Digest) -> int:
        together = 0
        for bits in self.chunks[digest].values():
            together |= bits
        return together

    def leading(self, digests: list[Digest]) -> int:
        whole = [self.has(digest, ALL, self.usable) for digest in digests]
        return whole.index(False) if False in whole else len(whole)

    def held(self) -> set[Digest]:
        return {digest for digests, _ in self.leases.values() for digest in digests}

    def note(self, digest: Digest, heads: HeadRange, kind: int) -> None:
        shards = self.chunks.setdefault(digest, {})
        shards[heads] = shards.get(heads, 0) | kind

    def drop(self, digest: Digest, heads: HeadRange, kind: int) -> None:
        shards = self.chunks[digest]
        shards[heads] &= ~kind
        if not shards[heads]:
            del shards[heads]
        self.sweep()

    def sweep(self) -> None:
        """Forget chunks that are in no tier, unless somebody holds what they were."""
        held = self.held()
        for digest in [digest for digest, shards in self.chunks.items() if not shards]:
            if digest not in held:
                del self.chunks[digest]

    def forget_evicted(self, spared: Digest | None = None) -> None:
        """Take out what has left the host tier: it was free to, and was counted."""
        index, held = self.store.index, self.held() | {spared}
        for digest, heads in self.those(HOST, 0):
            slot = self.space.find(digest)
            if slot == NO_SLOT or index.shard(slot, heads, HOST) is None:
                assert digest not in held, "what is held stays"
                # All shards of a chunk leave together.
                self.evicted += all(not bits & HOST for bits in self.others(digest, heads))
                self.drop(digest, heads, HOST)
        assert self.store.counters.evict_chunks == self.evicted

    def others(self, digest: Digest, heads: HeadRange) -> list[int]:
        return [bits for one, bits in self.chunks[digest].items() if one != heads]


TestTiersModel = TiersModel.TestCase
TestTiersModel.settings = settings(max_examples=25, stateful_step_count=40)


def test_the_model_reaches_what_it_is_for():
    """A walk by hand: down, out, up again, gone under a lease."""
    model = TiersModel()
    model.open("lru")
    model.put(0, 0, 10, 0)
    model.copy_down(DISK, 0, 10)
    model.put(1, 0, 10, 0)
    model.put(2, 0, 10, 0)
    assert model.evicted > 0
    assert model.those(DISK, HOST)
    model.bring_up(0, 10)
    model.look_up(0, 0, 10, lease=True)
    for _ in range(30):
        model.vanish(DISK, 0, evicted=False)
    model.the_store_agrees_with_itself()
    model.every_shard_is_where_the_dict_says_and_whole()
    model.pass_time(LEASE_TTL_SECONDS)
    model.counters_add_up()
    model.teardown()
    model.chunks[DIGESTS[0][0]] = {ALL: 0}
    with pytest.raises(AssertionError):
        model.every_shard_is_where_the_dict_says_and_whole()
