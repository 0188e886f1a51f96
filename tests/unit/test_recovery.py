"""What comes back after a restart: every committed chunk, whole, and nothing that is torn."""

from __future__ import annotations

import os

import pytest

from kvstore.limits import MIB
from kvstore.store.quota import Share
from kvstore.store.recovery import Recovery
from kvstore.store.store import Store
from kvstore.tiers.record_layout import Owner
from kvstore.types import NO_SLOT, Extent, HeadRange, ReserveOutcome, SessionId
from tests.support.kept_stores import MANIFEST, TENANTS, KeptStores, bring_back
from tests.support.making import loose_digest, make_digests, make_manifest, make_payload
from tests.support.stores import Engine, fill_up

DIGESTS = make_digests(6)
OWNER = Owner(pid=7, started=8, pid_space=9)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a store over the kept arena, after ending the one before."""
    stores = KeptStores(tmp_path / "arena")
    yield stores
    stores.close()


def assert_served(engine: Engine, digests) -> None:
    """Check that *digests* are all hits, to the byte."""
    _, chunks = engine.load(digests)
    assert len(chunks) == len(digests)
    for digest, shards in zip(digests, chunks, strict=True):
        for shard in shards:
            assert engine.store.host.view(shard.extent) == make_payload(digest, shard.size_bytes)
            assert engine.store.host.verify_bytes(shard.extent, shard.root)
    engine.store.end_session(engine.session)


def test_without_anything_kept_nothing_comes_back(start):
    recovery = bring_back(start())
    assert (recovery.left, recovery.aside, recovery.dropped) == (0, {}, {})


def test_a_store_over_a_memfd_has_nothing_to_bring_back(store):
    recovery = bring_back(store)
    assert recovery.left == 0


def test_every_committed_chunk_is_served_again_restart_after_restart(start):
    Engine(start(), MANIFEST).put(DIGESTS)
    for _ in range(3):
        store = start()
        recovery = bring_back(store)
        assert (recovery.left, recovery.dropped) == (6, {})
        assert recovery.left_bytes == 6 * MANIFEST.chunk_bytes
        assert_served(Engine(store, MANIFEST), DIGESTS)
        more = make_digests(1, prompt=store.counters.commit_chunks + 50)
        assert Engine(store, MANIFEST).reserve(more)[0].outcome is ReserveOutcome.RESERVED


def test_what_was_stored_after_a_restart_comes_back_with_what_was_stored_before(start):
    Engine(start(), MANIFEST).put(DIGESTS[:3])
    store = start()
    bring_back(store)
    Engine(store, MANIFEST).put(DIGESTS)
    store = start()
    bring_back(store)
    assert_served(Engine(store, MANIFEST), DIGESTS)


def test_what_was_deleted_evicted_or_given_up_does_not_come_back(start):
    engine = Engine(start(), MANIFEST)
    engine.put(DIGESTS)
    engine.store.delete(engine.space, DIGESTS[4:])
    engine.store.abort(engine.session, [engine.reserve(make_digests(1, 9))[0].reservation])
    store = start()
    assert bring_back(store).left == 4
    assert Engine(store, MANIFEST).hits(DIGESTS) == 4
    evicted = fill_up(Engine(store, MANIFEST), prompt=5)
    store = start()
    bring_back(store)
    engine = Engine(store, MANIFEST)
    assert engine.hits(DIGESTS) == 0
    assert engine.hits(evicted) == len(evicted)


def test_an_arena_that_is_full_to_the_last_page_comes_back(start):
    digests = fill_up(Engine(start(), MANIFEST))
    store = start()
    bring_back(store)
    assert_served(Engine(store, MANIFEST), digests)
    # And goes on evicting in order.
    engine = Engine(store, MANIFEST)
    assert set(engine.put(make_digests(5, 77))) == {ReserveOutcome.RESERVED}


def test_the_order_of_leaving_is_that_of_committing(start):
    engine = Engine(start(), MANIFEST)
    loose = [loose_digest(number) for number in range(28)]
    for digest in loose:
        engine.put([digest])
    store = start()
    bring_back(store)
    engine = Engine(store, MANIFEST)
    engine.put([loose_digest(number) for number in range(100, 103)])
    left = [digest for digest in loose if engine.hits([digest])]
    assert left == loose[len(loose) - len(left) :]
    assert len(left) < 28


def test_a_prefix_still_leaves_from_its_end(start):
    engine = Engine(start(), MANIFEST)
    # The tail is committed first.
    places = engine.reserve(DIGESTS)
    for digest, place in reversed(list(zip(DIGESTS, places, strict=True))):
        engine.commit(digest, place)
    store = start()
    bring_back(store)
    engine = Engine(store, MANIFEST)
    tree = store.index.tree
    slots = [engine.space.find(digest) for digest in DIGESTS]
    assert [tree.parent(slot) for slot in slots] == [NO_SLOT, *slots[:-1]]
    assert tree.leaf_below(slots[0]) == slots[-1]


def test_a_child_whose_parent_is_gone_comes_back_as_a_root(start):
    engine = Engine(start(), MANIFEST)
    engine.put(DIGESTS)
    engine.store.delete(engine.space, DIGESTS[:1])
    store = start()
    assert bring_back(store).left == 5
    assert_served(Engine(store, MANIFEST), DIGESTS[1:])


def test_shards_of_one_chunk_come_back_together(start):
    engine = Engine(start(), MANIFEST)
    halves = [HeadRange(0, 2), HeadRange(2, 4)]
    for heads in halves:
        engine.put(DIGESTS, heads=heads)
    engine.put(make_digests(2, 8), heads=halves[0])
    store = start()
    assert bring_back(store).left == 14
    engine = Engine(store, MANIFEST)
    assert engine.hits(DIGESTS) == 6
    assert engine.hits(make_digests(2, 8)) == 0
    engine.put(make_digests(2, 8), heads=halves[1])
    assert engine.hits(make_digests(2, 8)) == 2


def test_namespaces_come_back_apart_and_can_be_left(start):
    store = start()
    other = make_manifest(model="other")
    Engine(store, MANIFEST).put(DIGESTS[:2])
    Engine(store, other, session=2).put(DIGESTS[:3])
    store = start()
    bring_back(store)
    assert [space.entered for space in store.index.namespaces] == [0, 0]
    assert Engine(store, MANIFEST).hits(DIGESTS) == 2
    assert Engine(store, other, session=2).hits(DIGESTS) == 3


def test_tenants_have_what_they_had_under_whatever_number(start):
    store = start()
    space = store.enter(MANIFEST, "anna")
    engine = Engine(store, MANIFEST)
    engine.space = space
    places = store.reserve(
        engine.session, space, DIGESTS, parent=None, heads=MANIFEST.all_heads, tenant=1
    )
    for digest, place in zip(DIGESTS, places, strict=True):
        engine.commit(digest, place)
    store = start(tenants=(Share(""), Share("zoe"), Share("anna")))
    bring_back(store)
    shares = store.residents.shares
    assert [bool(shares.used_bytes(tenant)) for tenant in range(3)] == [False, False, True]
    engine = Engine(store, MANIFEST)
    assert engine.hits(DIGESTS) == 0
    engine.space = store.enter(MANIFEST, "anna")
    assert engine.hits(DIGESTS) == 6
    # A tenant that is no more leaves its chunks to the default one.
    store = start(tenants=TENANTS[:1])
    bring_back(store)
    assert store.residents.shares.used_bytes(0) > 0


# --- what was being written --------------------------------------------------------------------


def test_room_that_was_being_written_is_set_aside_for_its_writer(start):
    engine = Engine(start(), MANIFEST)
    engine.store.open_session(engine.session, OWNER)
    engine.put(DIGESTS[:2])
    places = engine.reserve(DIGESTS[2:])
    store = start()
    recovery = bring_back(store)
    assert recovery.left == 2
    assert recovery.aside == {OWNER: [place.extent for place in places]}
    taken = {place.extent.offset for place in places}
    given = set()
    while (extent := store.host.allocate(4096)) is not None:
        given.add(extent.offset)
        assert not taken & {extent.offset}
    for offset in given:
        store.host.free(Extent(offset, 4096))
    for place in places:
        store.give_up_room(place.extent)
    assert store.host.records.scan().rows.size == 2


def test_room_that_is_set_aside_stays_so_over_another_restart(start):
    engine = Engine(start(), MANIFEST)
    engine.store.open_session(engine.session, OWNER)
    (place,) = engine.reserve(DIGESTS[:1])
    bring_back(start())
    store = start()
    assert bring_back(store).aside == {OWNER: [place.extent]}
    store.give_up_room(place.extent)
    assert bring_back(start()).aside == {}


def test_room_of_an_ended_session_is_set_aside_until_it_is_buried(start):
    store = start()
    engine = Engine(store, MANIFEST)
    engine.reserve(DIGESTS[:2])
    store.end_session(engine.session)
    assert sum(map(len, bring_back(start()).aside.values())) == 2
    store = start()
    engine = Engine(store, MANIFEST)
    for extents in bring_back(store).aside.values():
        for extent in extents:
            store.give_up_room(extent)
    engine.reserve(DIGESTS[:2])
    store.end_session(engine.session)
    store.bury(engine.session)
    assert bring_back(start()).aside == {}


def test_a_reservation_that_cannot_be_recorded_is_no_space(start, monkeypatch):
    store = start()
    engine = Engine(store, MANIFEST)
    monkeypatch.setattr(store.host.records, "fill", lambda *_: False)
    assert engine.put(DIGESTS) == [ReserveOutcome.NO_SPACE] * 6
    assert store.counters.reserve_chunks_no_space == 6
    assert store.host.usage().used_bytes == 0
    store.check()


# --- bytes --------------------------------------------------------------------------------------


def spoil(store: Store, digest) -> None:
    """Flip a bit in the bytes of *digest*, which its table does not show."""
    space = next(iter(store.index.namespaces))
    (shard,) = store.index.shards(space.find(digest))
    store.host.view(shard.extent)[100] ^= 1


@pytest.fixture
def spoiled(start) -> Store:
    """Return a store whose third chunk has changed since it was stored."""
    store = start()
    Engine(store, MANIFEST).put(DIGESTS)
    spoil(store, DIGESTS[2])
    return start()


async def test_changed_bytes_are_found_behind_what_is_served(spoiled):
    recovery = bring_back(spoiled)
    assert Engine(spoiled, MANIFEST).hits(DIGESTS) == 6
    await recovery.prove()
    spoiled.check()
    assert Engine(spoiled, MANIFEST).hits(DIGESTS) == 2
    assert spoiled.counters.checksum_failures == 1
    assert recovery.dropped == {"of other bytes": 1}
    counters = spoiled.counters
    assert (counters.recover_shards, counters.recover_shards_dropped) == (6, 1)


async def test_changed_bytes_are_never_served_to_who_does_not_verify(spoiled):
    recovery = Recovery(spoiled, proven_first=True)
    engine = Engine(spoiled, MANIFEST)
    assert engine.hits(DIGESTS) == 0
    spoiled.check()
    await recovery.prove()
    spoiled.check()
    assert engine.hits(DIGESTS) == 2
    assert engine.hits(DIGESTS[3:]) == 3
    assert spoiled.counters.checksum_failures == 1
    assert [space.entered for space in spoiled.index.namespaces] == [1]


async def test_chunks_are_proven_in_whatever_order_they_were_committed(start):
    engine = Engine(start(), MANIFEST)
    places = engine.reserve(DIGESTS)
    for digest, place in reversed(list(zip(DIGESTS, places, strict=True))):
        engine.commit(digest, place)
    store = start()
    await Recovery(store, proven_first=True).prove()
    store.check()
    slots = [store.index.namespaces[0].find(digest) for digest in DIGESTS]
    assert [store.index.tree.parent(slot) for slot in slots] == [NO_SLOT, *slots[:-1]]


async def test_what_has_left_meanwhile_is_passed_over(spoiled):
    recovery = bring_back(spoiled)
    engine = Engine(spoiled, MANIFEST)
    spoiled.delete(engine.space, DIGESTS)
    engine.put(DIGESTS)
    await recovery.prove()
    assert spoiled.counters.checksum_failures == 0
    assert engine.hits(DIGESTS) == 6


async def test_what_leaves_while_it_is_verified_is_passed_over(spoiled, monkeypatch):
    recovery = bring_back(spoiled)
    engine = Engine(spoiled, MANIFEST)

    def leave_first(*_: object) -> bool:
        spoiled.delete(engine.space, DIGESTS)
        return False

    monkeypatch.setattr(spoiled.host, "verify_bytes", leave_first)
    await recovery.prove()
    assert spoiled.counters.checksum_failures == 0
    spoiled.check()


async def test_a_leased_chunk_of_changed_bytes_goes_too(spoiled):
    recovery = bring_back(spoiled)
    engine = Engine(spoiled, MANIFEST)
    lease = engine.lease(DIGESTS)
    await recovery.prove()
    assert engine.hits(DIGESTS) == 2
    spoiled.check()
    spoiled.release(SessionId(1), [lease])
    spoiled.check()


def test_an_arena_that_is_not_the_one_of_the_records_gives_nothing(start):
    Engine(start(), MANIFEST).put(DIGESTS)
    start().host.close()
    with start.path.open("r+b") as file:
        file.write(os.urandom(MIB))
    recovery = bring_back(start())
    assert (recovery.left, recovery.dropped) == (0, {"of other bytes": 6})


class Listener:
    """A movement that only hears what was used."""

    def __init__(self) -> None:
        self.slots: list[int] = []

    def used(self, slots) -> None:
        self.slots += slots

    def is_wanted(self, slot: int) -> bool:
        return False


@pytest.mark.parametrize("proven_first", [False, True])
async def test_what_is_proven_is_offered_to_slower_tiers_again(spoiled, proven_first):
    recovery = Recovery(spoiled, proven_first=proven_first)
    listener = Listener()
    spoiled.attach_movement(listener)
    await recovery.prove()
    space = spoiled.index.namespaces[0]
    right = [digest for digest in DIGESTS if digest != DIGESTS[2]]
    assert listener.slots == [space.find(digest) for digest in right]
