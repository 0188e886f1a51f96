"""What stays and what leaves: leases, pins, eviction on demand, ended sessions, watches."""

from __future__ import annotations

import pytest

from kvstore.errors import ChecksumError, LeaseError, LimitError
from kvstore.limits import LEASES_PER_SESSION_MAX, MIB
from kvstore.store.store import NO_LEASE
from kvstore.types import LeaseId, ReserveOutcome, Root
from tests.support.making import (
    loose_digest,
    make_digests,
    make_manifest,
    opaque_manifest,
)
from tests.support.stores import LEASE_TTL_SECONDS, Engine, chunks_that_fit, fill_up

RESERVED = ReserveOutcome.RESERVED
NO_SPACE = ReserveOutcome.NO_SPACE
MANIFEST = make_manifest()


# --- leases, pins, deletes --------------------------------------------------------------


def test_leased_chunks_survive_eviction_pressure(engine, other):
    digests = make_digests(5)
    engine.put(digests)
    other.lease(digests)
    for prompt in range(1, 4):
        engine.put(make_digests(30, prompt))
    assert engine.hits(digests) == 5


@pytest.mark.parametrize("end", ["release", "expire", "end_session"])
def test_a_lease_that_has_ended_holds_nothing(store, engine, end):
    digests = make_digests(3)
    engine.put(digests)
    lease = engine.lease(digests)
    if end == "release":
        assert store.release(engine.session, [LeaseId(lease)]) == 1
    elif end == "expire":
        assert store.expire(LEASE_TTL_SECONDS - 0.1) == 0
        assert store.expire(LEASE_TTL_SECONDS) == 1
        assert store.counters.lease_expirations == 1
    else:
        assert not store.end_session(engine.session)
    assert store.delete(engine.space, digests) == (3, 0)


def test_another_sessions_lease_cannot_be_released(store, engine, other):
    digests = make_digests(1)
    engine.put(digests)
    lease = LeaseId(engine.lease(digests))
    with pytest.raises(LeaseError):
        store.release(other.session, [lease])
    assert store.delete(engine.space, digests) == (0, 1)


def test_a_lookup_that_finds_nothing_grants_no_lease(store, engine):
    assert engine.lease(make_digests(2)) == NO_LEASE
    assert len(store.leases) == 0


def test_a_refused_lease_changes_nothing(store, engine):
    digests = make_digests(1)
    engine.put(digests)
    for _ in range(LEASES_PER_SESSION_MAX):
        engine.lease(digests)
    with pytest.raises(LimitError):
        engine.load(digests)
    store.check()


def test_hard_pinned_chunks_survive_pressure_and_deletion_until_unpinned(store, engine):
    digests = make_digests(4)
    engine.put(digests)
    assert store.pin(engine.space, [*digests, loose_digest(0)], hard=True) == 4
    for prompt in range(1, 4):
        engine.put(make_digests(30, prompt))
    assert engine.hits(digests) == 4
    assert store.delete(engine.space, digests) == (0, 4)
    assert store.unpin(engine.space, digests) == 4
    assert store.unpin(engine.space, digests) == 0
    assert store.delete(engine.space, digests) == (4, 0)


def test_soft_pinned_chunks_leave_last(store, engine):
    digests = fill_up(engine)
    store.pin(engine.space, digests[:3], hard=False)
    engine.put(make_digests(len(digests) - 3, prompt=1))
    assert engine.hits(digests) == 3
    store.unpin(engine.space, make_digests(1, prompt=9))
    engine.put(make_digests(len(digests), prompt=2))
    assert engine.hits(digests) < 3


def test_chunks_whose_soft_pins_have_ended_leave_in_their_turn(store, engine):
    digests = fill_up(engine)
    room = len(digests) - 3
    store.pin(engine.space, digests[:3], hard=False)
    engine.put(make_digests(room, prompt=1))
    assert engine.hits(digests) == 3
    assert store.unpin(engine.space, digests) == 3
    engine.put(make_digests(room, prompt=2))
    for _ in range(2):
        lease, _ = engine.load(make_digests(room, prompt=2))
        store.release(engine.session, [lease])
    engine.put(make_digests(room, prompt=3))
    assert engine.hits(digests) < 3


def test_deleting_counts_what_went_and_what_is_in_use(store, engine, other):
    digests = make_digests(5)
    engine.put(digests[:3])
    other.lease(digests[:1])
    engine.reserve(digests[3:4])
    assert store.delete(engine.space, digests) == (2, 2)
    assert store.counters.delete_chunks == 2
    assert engine.hits(digests) == 1


# --- eviction ---------------------------------------------------------------------------


def test_a_full_store_makes_room_and_counts_what_left(store, engine):
    first = fill_up(engine)
    assert engine.put(make_digests(5, prompt=1)) == [RESERVED] * 5
    assert store.counters.evict_chunks == 5
    assert store.counters.evict_bytes == 5 * MANIFEST.chunk_bytes
    assert engine.hits(first) == len(first) - 5


def test_the_tail_of_a_prefix_leaves_before_its_head(engine):
    digests = fill_up(engine)
    for number in range(len(digests)):
        assert engine.hits(digests) == len(digests) - number
        engine.put([loose_digest(number)])


def test_a_chunk_that_is_used_outlives_one_that_is_not(engine):
    engine.put([loose_digest(number) for number in range(28)])
    for number in (0, 1):
        for _ in range(3):
            engine.load([loose_digest(number)])
        engine.store.end_session(engine.session)
    engine.put([loose_digest(number) for number in range(28, 50)])
    assert engine.hits([loose_digest(0)]) == engine.hits([loose_digest(1)]) == 1


def test_when_everything_is_held_reserving_finds_no_space_and_says_so(store, engine, other):
    digests = fill_up(engine)
    other.lease(digests)
    assert engine.put([loose_digest(0)]) == [NO_SPACE]
    assert store.counters.reserve_chunks_no_space == 1
    assert engine.hits(digests) == len(digests)


def test_what_is_being_written_is_not_evicted(store, engine, other):
    count = chunks_that_fit(store, MANIFEST)
    places = engine.reserve(make_digests(count))
    assert other.put([loose_digest(0)]) == [NO_SPACE]
    for digest, place in zip(make_digests(count), places, strict=True):
        engine.commit(digest, place)


def test_a_large_chunk_finds_room_among_small_ones_with_holes_between_leases(store, engine):
    """Eviction by policy leaves holes; clearing the cheapest window joins them."""
    small = Engine(store, opaque_manifest(4000), session=3)
    digests = [loose_digest(number) for number in range(256)]
    small.put(digests)
    for number in range(64, 256, 2):
        small.lease([digests[number]])
    large = Engine(store, opaque_manifest(60 * 4096), session=4)
    assert large.put([loose_digest(1000)]) == [RESERVED]
    assert small.hits(digests[64:65]) == 1


def test_held_chunks_everywhere_leave_no_window_for_a_large_one(store):
    small = Engine(store, opaque_manifest(4000), session=3)
    digests = [loose_digest(number) for number in range(256)]
    small.put(digests)
    for digest in digests[::8]:
        small.lease([digest])
    large = Engine(store, opaque_manifest(60 * 4096), session=4)
    assert large.put([loose_digest(1000)]) == [NO_SPACE]
    assert sum(small.hits([digest]) for digest in digests[::8]) == 32


def test_orphans_block_a_window_until_they_are_buried(store, engine):
    engine.reserve(make_digests(chunks_that_fit(store, MANIFEST)))
    store.end_session(engine.session)
    large = Engine(store, opaque_manifest(MIB // 2), session=4)
    assert large.put([loose_digest(0)]) == [NO_SPACE]
    store.bury(engine.session)
    assert large.put([loose_digest(0)]) == [RESERVED]


# --- the end of a session ---------------------------------------------------------------


def test_room_of_an_ended_session_is_set_aside_until_it_is_buried(store, engine, other):
    digests = make_digests(2)
    engine.reserve(digests)
    used = store.host.usage().used_bytes
    assert store.end_session(engine.session)
    assert store.host.usage().used_bytes == used
    assert [place.outcome for place in other.reserve(digests)] == [RESERVED] * 2
    store.bury(engine.session)
    assert store.host.usage().used_bytes == used
    store.bury(engine.session)
    assert store.counters.abort_chunks == 2


def test_committed_chunks_outlive_their_session(store, engine, other):
    digests = make_digests(2)
    engine.put(digests)
    assert not store.end_session(engine.session)
    assert other.hits(digests) == 2


# --- arriving ---------------------------------------------------------------------------


def test_chunks_being_written_behind_the_hits_are_arriving(store, engine, other):
    digests = make_digests(5)
    engine.put(digests[:1])
    engine.reserve(digests[1:3])
    found = store.lookup(other.session, other.space, digests, 0)
    assert (found.hits, found.arriving) == (1, 2)
    assert store.arriving_next(other.space, digests, 0) == digests[1]
    assert store.arriving_next(other.space, digests[3:], 0) is None
    assert store.arriving_next(other.space, digests[:1], 0) is None
    assert store.arriving_next(other.space, digests, 2) == digests[1]


@pytest.mark.parametrize("end", ["commit", "abort", "spoil", "end_session"])
def test_a_watcher_is_told_once_when_a_chunk_arrives_or_is_given_up(store, engine, end):
    (digest,) = make_digests(1)
    (place,) = engine.reserve([digest])
    told = []
    store.watch(engine.space, digest, lambda: told.append(end))
    if end == "commit":
        engine.commit(digest, place)
    elif end == "abort":
        store.abort(engine.session, [place.reservation])
    elif end == "spoil":
        with pytest.raises(ChecksumError):
            store.commit(engine.session, place.reservation, Root(0))
    else:
        store.end_session(engine.session)
    assert told == [end]
    engine.put([loose_digest(1)])
    assert told == [end]


def test_a_watch_that_has_ended_is_told_nothing_and_leaves_nothing(store, engine):
    first, second = make_digests(2)
    places = engine.reserve([first, second])
    told = []
    watches = [lambda n=n: told.append(n) for n in range(3)]
    for digest, changed in zip([first, first, second], watches, strict=True):
        store.watch(engine.space, digest, changed)
    store.unwatch(engine.space, first, watches[0])
    store.unwatch(engine.space, second, watches[2])
    store.unwatch(engine.space, second, watches[2])
    store.abort(engine.session, [place.reservation for place in places])
    assert told == [1]
    store.unwatch(engine.space, first, watches[1])
    assert not store._watchers
