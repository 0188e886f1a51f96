"""The store against a dict, step by step, with the conservation laws checked after each.

Sessions, two namespaces with chunks of different sizes, tensor-parallel shards, leases, pins,
eviction under pressure and a clock that only moves when told to. What the store may do that
the dict cannot foresee is evict; every chunk that goes missing must have been free to leave
and must have been counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.errors import ChecksumError, LeaseError, ReservationError
from kvstore.hashing import chunk_digests
from kvstore.limits import MIB
from kvstore.store.shards import covers
from kvstore.store.store import NO_LEASE, Granted
from kvstore.types import Digest, HeadRange, LeaseId, ReserveOutcome, Root, SessionId
from tests.support.making import make_manifest, make_payload, opaque_manifest
from tests.support.stores import LEASE_TTL_SECONDS, make_store, write_chunk

MANIFESTS = [make_manifest(), opaque_manifest(150_000)]
HEADS = [HeadRange(0, 4), HeadRange(0, 2), HeadRange(2, 4)]
PROMPTS = 3
CHUNKS_PER_PROMPT = 10
# Prompts share their first three chunks.
DIGESTS = [
    chunk_digests([0] * 3 + [prompt] * (CHUNKS_PER_PROMPT - 3), 1) for prompt in range(PROMPTS)
]

Key = tuple[int, Digest]

prompts = st.integers(0, PROMPTS - 1)
spaces = st.integers(0, len(MANIFESTS) - 1)
positions = st.integers(0, CHUNKS_PER_PROMPT - 1)
counts = st.integers(1, CHUNKS_PER_PROMPT)
picks = st.integers(0, 1000)
sessions = st.integers(0, 1)


@dataclass
class Chunk:
    """What the dict knows of one stored chunk."""

    shards: dict[HeadRange, bytes] = field(default_factory=dict)
    is_hard_pinned: bool = False


@dataclass
class Room:
    """A reservation that has not ended."""

    session: SessionId
    key: Key
    heads: HeadRange
    place: Granted


class StoreModel(RuleBasedStateMachine):
    """Every rule does the same to the store and to the dict."""

    @initialize(
        eviction=st.sampled_from(["lru", "s3fifo"]),
        verification=st.sampled_from(["root", "sample", "full"]),
        checksums=st.booleans(),
    )
    def open(self, eviction, verification, checksums):
        self.store = make_store(
            capacity_bytes=MIB, eviction=eviction, verification=verification, checksums=checksums
        )
        self.now = 100.0
        self.last_session = 2
        self.sessions = [SessionId(1), SessionId(2)]
        self.spaces = [self.store.enter(manifest) for manifest in MANIFESTS]
        self.chunks: dict[Key, Chunk] = {}
        self.rooms: list[Room] = []
        self.leases: dict[LeaseId, tuple[SessionId, list[Key], float]] = {}
        self.orphans: dict[SessionId, list[Room]] = {}
        self.asked = self.reserved = self.evicted = 0

    def teardown(self):
        if hasattr(self, "store"):
            self.store.host.close()

    # --- writing ------------------------------------------------------------------------

    @rule(who=sessions, where=spaces, prompt=prompts, at=positions, count=counts, cut=picks)
    def reserve(self, who, where, prompt, at, count, cut):
        self.make_room(who, where, prompt, at, count, cut)

    @rule(who=sessions, where=spaces, prompt=prompts, cut=st.integers(0, 2))
    def put(self, who, where, prompt, cut):
        before = len(self.rooms)
        self.make_room(who, where, prompt, 0, CHUNKS_PER_PROMPT, cut)
        while len(self.rooms) > before:
            self.commit(before)

    @rule(who=sessions, where=spaces, prompt=prompts, cut=st.integers(0, 2))
    def put_another(self, who, where, prompt, cut):
        """Writing is what moves a store: it is drawn twice as often as the rest."""
        self.put(who, where, prompt, cut)

    def make_room(self, who, where, prompt, at, count, cut):
        digests = DIGESTS[prompt][at : at + count]
        heads = HeadRange(0, 1) if where else HEADS[cut % 3]
        parent = DIGESTS[prompt][at - 1] if at else None
        keys = [(where, digest) for digest in digests]
        covered = [key for key in keys if self.is_covered(key, heads)]
        arriving = self.arriving(heads)
        places = self.store.reserve(
            self.sessions[who], self.spaces[where], digests, parent=parent, heads=heads
        )
        self.reserved += len(digests)
        self.forget_evicted()
        for key, place in zip(keys, places, strict=True):
            # A chunk that was there may have left for those before it in the same request.
            assert place.outcome is not ReserveOutcome.PRESENT or key in covered
            assert place.outcome is not ReserveOutcome.ARRIVING or key in arriving
            if place.outcome is ReserveOutcome.RESERVED:
                assert key not in arriving
                self.rooms.append(Room(self.sessions[who], key, heads, place))

    @precondition(lambda self: self.rooms)
    @rule(pick=picks)
    def commit(self, pick):
        room = self.rooms.pop(pick % len(self.rooms))
        payload = make_payload(room.key[1], room.place.extent.size_bytes)
        root = write_chunk(self.store, room.place.extent, payload)
        self.store.commit(room.session, room.place.reservation, root)
        shards = self.chunks.setdefault(room.key, Chunk()).shards
        if not covers(shards, room.heads):
            shards[room.heads] = payload
        with pytest.raises(ReservationError):
            self.store.commit(room.session, room.place.reservation, root)

    @precondition(lambda self: self.rooms and self.store.host.checksums)
    @rule(pick=picks)
    def commit_wrong_bytes(self, pick):
        room = self.rooms.pop(pick % len(self.rooms))
        payload = make_payload(room.key[1], room.place.extent.size_bytes)
        root = write_chunk(self.store, room.place.extent, payload)
        with pytest.raises(ChecksumError):
            self.store.commit(room.session, room.place.reservation, Root(root ^ 1))

    @precondition(lambda self: self.rooms)
    @rule(pick=picks)
    def commit_for_another(self, pick):
        room = self.rooms[pick % len(self.rooms)]
        stranger = SessionId(10_000)
        with pytest.raises(ReservationError):
            self.store.commit(stranger, room.place.reservation, Root(0))
        with pytest.raises(ReservationError):
            self.store.abort(stranger, [room.place.reservation])

    @precondition(lambda self: self.rooms)
    @rule(pick=picks)
    def abort(self, pick):
        session = self.rooms[pick % len(self.rooms)].session
        ended = [room for room in self.rooms if room.session == session][: pick % 3 + 1]
        freed = self.store.abort(session, [room.place.reservation for room in ended])
        assert freed == len(ended)
        self.rooms = [room for room in self.rooms if room not in ended]

    # --- reading ------------------------------------------------------------------------

    @rule(
        who=sessions, where=spaces, prompt=prompts, at=positions, count=counts, lease=st.booleans()
    )
    def lookup(self, who, where, prompt, at, count, lease):
        digests = DIGESTS[prompt][at : at + count]
        found = self.store.lookup(
            self.sessions[who], self.spaces[where], digests, self.now, lease=lease
        )
        self.asked += len(digests)
        hits = self.leading(where, digests)
        assert found.hits == hits
        assert sum(chunks for _, chunks in found.tiers) == hits
        assert found.hits + found.arriving <= len(digests)
        if lease and hits:
            self.remember_lease(found.lease, who, where, digests[:hits])
        else:
            assert found.lease == NO_LEASE

    @rule(who=sessions, where=spaces, prompt=prompts, window=counts)
    def lookup_window(self, who, where, prompt, window):
        digests = DIGESTS[prompt]
        found = self.store.lookup(
            self.sessions[who], self.spaces[where], digests, self.now, window=window
        )
        self.asked += len(digests)
        whole = [self.is_ready((where, digest)) for digest in digests]
        lengths = range(len(digests) + 1)
        assert found.hits == max(n for n in lengths if all(whole[max(0, n - window) : n]))

    @rule(who=sessions, where=spaces, prompt=prompts, count=counts, cut=picks)
    def load(self, who, where, prompt, count, cut):
        digests = DIGESTS[prompt][:count]
        heads = HeadRange(0, 1) if where else HEADS[cut % 3]
        lease, chunks = self.store.load(
            self.sessions[who], self.spaces[where], digests, heads, self.now
        )
        hits = self.leading(where, digests)
        assert len(chunks) == hits
        for digest, shards in zip(digests, chunks, strict=False):
            assert covers([shard.heads for shard in shards], heads)
            for shard in shards:
                held = self.chunks[where, digest].shards[shard.heads]
                assert bytes(self.store.host.view(shard.extent)) == held
        if hits:
            self.remember_lease(lease, who, where, digests[:hits])

    # --- holding ------------------------------------------------------------------------

    @precondition(lambda self: self.leases)
    @rule(pick=picks)
    def release(self, pick):
        lease = sorted(self.leases)[pick % len(self.leases)]
        session, _, _ = self.leases.pop(lease)
        with pytest.raises(LeaseError):
            self.store.release(SessionId(10_000), [lease])
        assert self.store.release(session, [lease]) == 1
        with pytest.raises(LeaseError):
            self.store.release(session, [lease])

    @rule(seconds=st.sampled_from([0.0, 1.0, LEASE_TTL_SECONDS / 2, LEASE_TTL_SECONDS]))
    def pass_time(self, seconds):
        self.now += seconds
        over = [lease for lease, (_, _, end) in self.leases.items() if end <= self.now]
        assert self.store.expire(self.now) == len(over)
        for lease in over:
            del self.leases[lease]

    @rule(where=spaces, prompt=prompts, at=positions, count=counts, hard=st.booleans())
    def pin(self, where, prompt, at, count, hard):
        digests = DIGESTS[prompt][at : at + count][:3]
        present = [digest for digest in digests if (where, digest) in self.chunks]
        assert self.store.pin(self.spaces[where], digests, hard=hard) == len(present)
        for digest in present:
            self.chunks[where, digest].is_hard_pinned |= hard

    @rule(where=spaces, prompt=prompts)
    def unpin(self, where, prompt):
        self.store.unpin(self.spaces[where], DIGESTS[prompt])
        for digest in DIGESTS[prompt]:
            if (where, digest) in self.chunks:
                self.chunks[where, digest].is_hard_pinned = False

    @rule(where=spaces, prompt=prompts, at=positions, count=counts)
    def delete(self, where, prompt, at, count):
        keys = [(where, digest) for digest in DIGESTS[prompt][at : at + count]]
        held = self.held()
        gone, busy = self.store.delete(self.spaces[where], [digest for _, digest in keys])
        wanted = [key for key in keys if key in self.chunks and key not in held]
        arriving = {room.key for room in self.rooms}
        assert gone == len(wanted)
        assert busy == sum(
            key in held or (key not in self.chunks and key in arriving) for key in keys
        )
        for key in wanted:
            del self.chunks[key]

    # --- the end of a session -------------------------------------------------------------

    @rule(who=sessions, chance=st.integers(0, 3))
    def end_session(self, who, chance):
        if chance:
            return
        session = self.sessions[who]
        ended = [room for room in self.rooms if room.session == session]
        assert self.store.end_session(session) == bool(ended)
        self.rooms = [room for room in self.rooms if room.session != session]
        self.leases = {key: value for key, value in self.leases.items() if value[0] != session}
        if ended:
            self.orphans[session] = ended
        self.last_session += 1
        self.sessions[who] = SessionId(self.last_session)

    @precondition(lambda self: self.orphans)
    @rule(pick=picks)
    def bury(self, pick):
        session = sorted(self.orphans)[pick % len(self.orphans)]
        del self.orphans[session]
        self.store.bury(session)

    # --- the laws -----------------------------------------------------------------------

    @invariant()
    def the_store_agrees_with_itself(self):
        self.store.check()

    @invariant()
    def all_that_was_acknowledged_is_there_to_the_byte(self):
        assert len(self.store.index) == len(self.chunks)
        for (where, digest), chunk in self.chunks.items():
            slot = self.spaces[where].find(digest)
            shards = self.store.index.shards(slot)
            assert {shard.heads for shard in shards} == set(chunk.shards)
            for shard in shards:
                assert self.store.host.view(shard.extent) == chunk.shards[shard.heads]
            assert self.is_ready((where, digest)) == (digest in self.spaces[where].ready)

    @invariant()
    def no_byte_is_lost_and_none_is_used_twice(self):
        host, usage = self.store.host, self.store.host.usage()
        stored = [len(p) for chunk in self.chunks.values() for p in chunk.shards.values()]
        rooms = [*self.rooms, *(room for rooms in self.orphans.values() for room in rooms)]
        sizes = stored + [room.place.extent.size_bytes for room in rooms]
        assert usage.used_bytes == sum(map(host.footprint, sizes)) <= usage.capacity_bytes
        assert usage.largest_free_bytes <= usage.capacity_bytes - usage.used_bytes

    @invariant()
    def leases_and_reservations_are_those_of_the_dict(self):
        assert len(self.store.leases) == len(self.leases)
        assert len(self.store.reservations) == len(self.rooms)
        assert self.held() <= set(self.chunks)
        assert self.store.index.held == len(self.held())

    @invariant()
    def counters_add_up(self):
        c = self.store.counters
        looked = c.lookup_chunks_ready + c.lookup_chunks_arriving + c.lookup_chunks_miss
        assert looked == self.asked
        reserved = c.reserve_chunks_reserved
        others = c.reserve_chunks_present + c.reserve_chunks_arriving + c.reserve_chunks_no_space
        assert reserved + others == self.reserved
        assert reserved == c.commit_chunks + c.abort_chunks + len(self.rooms)

    # --- inside -------------------------------------------------------------------------

    def is_covered(self, key: Key, heads: HeadRange) -> bool:
        return key in self.chunks and covers(self.chunks[key].shards, heads)

    def is_ready(self, key: Key) -> bool:
        return self.is_covered(key, MANIFESTS[key[0]].all_heads)

    def leading(self, where: int, digests: list[Digest]) -> int:
        whole = [self.is_ready((where, digest)) for digest in digests]
        return whole.index(False) if False in whole else len(whole)

    def arriving(self, heads: HeadRange) -> set[Key]:
        return {room.key for room in self.rooms if room.heads == heads}

    def held(self) -> set[Key]:
        leased = {key for _, keys, _ in self.leases.values() for key in keys}
        return leased | {key for key, chunk in self.chunks.items() if chunk.is_hard_pinned}

    def remember_lease(self, lease, who, where, digests):
        assert lease not in self.leases
        keys = [(where, digest) for digest in digests]
        self.leases[lease] = (self.sessions[who], keys, self.now + LEASE_TTL_SECONDS)

    def forget_evicted(self):
        """Take out what the store has evicted; all of it was free to leave, and was counted."""
        gone = [
            (where, digest)
            for where, digest in self.chunks
            if self.spaces[where].find(digest) == -1
        ]
        assert self.held().isdisjoint(gone)
        self.evicted += len(gone)
        assert self.store.counters.evict_chunks == self.evicted
        for key in gone:
            del self.chunks[key]


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(max_examples=40, stateful_step_count=50)
