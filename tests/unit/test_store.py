"""The store: two-phase writes, reads by any head range, and counters that add up."""

from __future__ import annotations

import pytest

from kvstore.errors import (
    ChecksumError,
    LimitError,
    RequestError,
    ReservationError,
    TooLargeError,
)
from kvstore.limits import MIB, RESERVATIONS_PER_SESSION_MAX
from kvstore.store.store import NO_LEASE
from kvstore.types import Digest, HeadRange, ReserveOutcome, Root, TierKind
from tests.support.making import (
    loose_digest,
    make_digests,
    make_manifest,
    make_payload,
    make_root,
    opaque_manifest,
)
from tests.support.stores import Engine, fill_up, write_chunk

RESERVED, PRESENT = ReserveOutcome.RESERVED, ReserveOutcome.PRESENT
ARRIVING = ReserveOutcome.ARRIVING
MANIFEST = make_manifest()
LOWER, UPPER = HeadRange(0, 2), HeadRange(2, 4)


# --- writing and reading ----------------------------------------------------------------


def test_what_is_committed_is_found_and_read_back(store, engine, other):
    digests = make_digests(3)
    assert engine.put(digests) == [RESERVED] * 3
    lease, chunks = other.load(digests)
    assert lease != NO_LEASE
    for digest, (shard,) in zip(digests, chunks, strict=True):
        payload = make_payload(digest, MANIFEST.chunk_bytes)
        assert bytes(store.host.view(shard.extent)) == payload
        assert shard.root == make_root(payload)


def test_what_is_only_reserved_is_never_seen(engine, other):
    digests = make_digests(2)
    engine.reserve(digests)
    assert other.hits(digests) == 0
    assert other.load(digests) == (NO_LEASE, [])


def test_a_gap_ends_a_hit(engine):
    digests = make_digests(5)
    engine.put(digests[:2] + digests[3:])
    assert engine.hits(digests) == 2


def test_a_chunk_present_or_arriving_is_not_reserved_again(engine, other):
    digests = make_digests(3)
    engine.put(digests[:1])
    engine.reserve(digests[1:2])
    assert [place.outcome for place in other.reserve(digests)] == [PRESENT, ARRIVING, RESERVED]


def test_a_wrong_checksum_publishes_nothing_and_frees_the_room(store, engine):
    (digest,) = make_digests(1)
    (place,) = engine.reserve([digest])
    write_chunk(store, place.extent, make_payload(digest, MANIFEST.chunk_bytes))
    with pytest.raises(ChecksumError, match="do not match root"):
        engine.store.commit(engine.session, place.reservation, Root(1))
    assert engine.hits([digest]) == 0
    assert store.host.usage().used_bytes == 0
    assert store.counters.checksum_failures == store.counters.abort_chunks == 1
    with pytest.raises(ReservationError):
        engine.commit(digest, place)


def test_committing_twice_is_refused_and_harms_nothing(engine):
    (digest,) = make_digests(1)
    (place,) = engine.reserve([digest])
    engine.commit(digest, place)
    with pytest.raises(ReservationError):
        engine.commit(digest, place)
    assert engine.hits([digest]) == 1


def test_another_sessions_reservation_can_be_neither_committed_nor_aborted(engine, other):
    (digest,) = make_digests(1)
    (place,) = engine.reserve([digest])
    with pytest.raises(ReservationError):
        other.commit(digest, place)
    with pytest.raises(ReservationError):
        other.store.abort(other.session, [place.reservation])
    engine.commit(digest, place)


def test_aborting_frees_all_or_none(store, engine):
    places = engine.reserve(make_digests(3))
    wanted = [place.reservation for place in places]
    with pytest.raises(ReservationError):
        store.abort(engine.session, [*wanted, wanted[-1] + 1])
    assert len(store.reservations) == 3
    assert store.abort(engine.session, [*wanted, wanted[0]]) == 3
    assert store.host.usage().used_bytes == 0
    assert store.counters.abort_chunks == 3


def test_a_chunk_larger_than_the_arena_is_refused_with_both_numbers(store):
    with pytest.raises(TooLargeError, match=f"{MIB} bytes in an arena of {MIB} bytes"):
        Engine(store, opaque_manifest(MIB))


def test_a_size_larger_than_the_arena_is_refused_and_changes_nothing(store, engine):
    digests = fill_up(engine)
    with pytest.raises(TooLargeError, match=f"{2 * MIB} bytes"):
        engine.reserve([loose_digest(0), loose_digest(1)], sizes=[1, 2 * MIB])
    assert engine.hits(digests) == len(digests)
    assert len(store.reservations) == 0


def test_chunks_may_have_sizes_of_their_own(store, engine):
    digests = make_digests(3)
    places = engine.reserve(digests, sizes=[100, 5000, 70_000])
    assert [place.extent.size_bytes for place in places] == [100, 5000, 70_000]
    for digest, place in zip(digests, places, strict=True):
        engine.commit(digest, place)
    assert engine.hits(digests) == 3
    assert store.counters.commit_bytes == 75_100


def test_sizes_without_their_digests_are_refused(engine):
    with pytest.raises(RequestError, match="1 sizes for 2 digests"):
        engine.reserve(make_digests(2), sizes=[100])


def test_a_parent_that_is_no_digest_is_refused(engine):
    with pytest.raises(RequestError, match="parent digest of 3 bytes, 32 needed"):
        engine.reserve(make_digests(1), parent=Digest(b"abc"))


@pytest.mark.parametrize("heads", [(0, 5), (2, 2), (3, 2), (-1, 2), (0, 0)], ids=str)
def test_heads_that_the_model_has_not_are_refused(engine, heads):
    said = rf"heads \[{heads[0]}, {heads[1]}\) of a model with 4"
    with pytest.raises(RequestError, match=said):
        engine.reserve(make_digests(1), heads=HeadRange(*heads))
    with pytest.raises(RequestError, match=said):
        engine.load(make_digests(1), heads=HeadRange(*heads))


def test_a_session_may_have_only_so_many_reservations(store, engine):
    engine.reserve(make_digests(2))
    with pytest.raises(LimitError, match=str(RESERVATIONS_PER_SESSION_MAX)):
        engine.reserve([loose_digest(0)] * RESERVATIONS_PER_SESSION_MAX)
    assert len(store.reservations) == 2


def test_sessions_in_equal_manifests_share_and_in_others_do_not(store, engine):
    digests = make_digests(2)
    engine.put(digests)
    assert Engine(store, make_manifest(), session=5).hits(digests) == 2
    assert Engine(store, make_manifest(revision="2"), session=5).hits(digests) == 0


def test_a_namespace_is_left_as_often_as_it_was_entered(store, engine):
    store.leave(engine.space)
    with pytest.raises(AssertionError, match="as often as it was entered"):
        store.leave(engine.space)


# --- windows ----------------------------------------------------------------------------


def test_a_window_needs_only_the_last_chunks_before_its_end(engine):
    digests = make_digests(8)
    engine.put(digests[3:6])
    assert engine.hits(digests) == 0
    assert engine.hits(digests, window=3) == 6
    assert engine.hits(digests, window=4) == 0


def test_leasing_a_window_holds_its_chunks_and_no_more(store, engine):
    digests = make_digests(8)
    engine.put(digests[:6])
    found = store.lookup(engine.session, engine.space, digests, 0, window=2, lease=True)
    assert (found.hits, found.tiers) == (6, [(TierKind.HOST, 2)])
    assert store.delete(engine.space, digests) == (4, 2)


# --- shards -----------------------------------------------------------------------------


def test_two_writers_of_half_the_heads_make_a_whole_chunk(store, engine, other):
    digests = make_digests(2)
    engine.put(digests, heads=LOWER)
    assert engine.hits(digests) == 0
    other.put(digests, heads=UPPER)
    assert engine.hits(digests) == 2
    assert store.index.shards(0)[0].extent.size_bytes * 2 == MANIFEST.chunk_bytes


@pytest.mark.parametrize("readers", [1, 4])
def test_readers_of_any_width_get_shards_that_cover_their_heads(engine, other, readers):
    (digest,) = make_digests(1)
    engine.put([digest], heads=LOWER)
    other.put([digest], heads=UPPER)
    width = MANIFEST.kv_heads // readers
    for start in range(0, MANIFEST.kv_heads, width):
        _, (shards,) = engine.load([digest], heads=HeadRange(start, start + width))
        wanted = [half for half in (LOWER, UPPER) if half.start < start + width > 0]
        found = [shard.heads for shard in shards]
        assert found == [half for half in wanted if half.stop > start]


def test_a_reader_of_all_heads_prefers_one_shard_to_two(engine, other):
    (digest,) = make_digests(1)
    places = engine.reserve([digest])
    other.put([digest], heads=LOWER)
    engine.commit(digest, places[0])
    _, (shards,) = engine.load([digest])
    assert [shard.heads for shard in shards] == [HeadRange(0, 4)]


def test_a_shard_that_others_made_superfluous_meanwhile_is_dropped(store, engine, other):
    (digest,) = make_digests(1)
    (late,) = engine.reserve([digest], heads=LOWER)
    other.put([digest])
    engine.commit(digest, late)
    assert len(store.index.shards(0)) == 1
    assert store.host.usage().used_bytes == store.host.footprint(MANIFEST.chunk_bytes)


def test_the_same_shard_is_arriving_but_another_is_reserved(engine, other):
    (digest,) = make_digests(1)
    engine.reserve([digest], heads=LOWER)
    assert other.reserve([digest], heads=LOWER)[0].outcome == ARRIVING
    assert other.reserve([digest], heads=UPPER)[0].outcome == RESERVED


def test_a_shard_within_one_that_is_present_is_present(engine):
    (digest,) = make_digests(1)
    engine.put([digest], heads=LOWER)
    assert engine.reserve([digest], heads=HeadRange(1, 2))[0].outcome == PRESENT


# --- counters ---------------------------------------------------------------------------


def test_outcomes_of_lookups_sum_to_the_keys_asked(store, engine, other):
    digests = make_digests(9)
    engine.put(digests[:4])
    engine.reserve(digests[4:6])
    asked = 0
    for window in (0, 2, 9):
        for start in range(9):
            store.lookup(other.session, other.space, digests[start:], 0, window=window)
            asked += 9 - start
    found = store.counters
    total = found.lookup_chunks_ready + found.lookup_chunks_arriving + found.lookup_chunks_miss
    assert total == asked


def test_outcomes_of_reserves_sum_to_the_keys_asked(store, engine, other):
    digests = fill_up(engine)
    other.lease(digests)
    engine.reserve([*digests[:3], loose_digest(0)])
    found = store.counters
    assert found.reserve_chunks_present == 3
    assert found.reserve_chunks_no_space == 1
    assert found.reserve_chunks_reserved == found.commit_chunks == len(digests)


def test_loads_count_their_chunks_and_bytes(store, engine):
    digests = make_digests(3)
    engine.put(digests)
    engine.load(digests, heads=LOWER)
    assert store.counters.load_chunks == 3
    assert store.counters.load_bytes == 3 * MANIFEST.shard_bytes(LOWER)


# --- the law ----------------------------------------------------------------------------


def test_check_finds_a_lease_on_a_chunk_that_is_not_leased(store, engine):
    digests = make_digests(1)
    engine.put(digests)
    engine.lease(digests)
    store.index.release(0)
    with pytest.raises(AssertionError, match="leases of slot 0"):
        store.check()
    store.index.lease(0)


def test_check_finds_a_lease_on_a_chunk_that_is_gone(store, engine):
    digests = make_digests(1)
    engine.put(digests)
    lease = store.leases.grant(engine.session, [5], 0)
    with pytest.raises(AssertionError, match="leased chunks are present"):
        store.check()
    store.leases.end(engine.session, [lease])
