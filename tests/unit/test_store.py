"""The store: two-phase writes, leases, eviction on demand, and counters that add up."""

from __future__ import annotations

import pytest

from kvstore.errors import (
    ChecksumError,
    LeaseError,
    LimitError,
    RequestError,
    ReservationError,
    TooLargeError,
)
from kvstore.limits import LEASES_PER_SESSION_MAX, MIB, RESERVATIONS_PER_SESSION_MAX
from kvstore.store.store import NO_LEASE
from kvstore.types import Digest, HeadRange, LeaseId, ReserveOutcome, Root, TierKind
from tests.support.making import (
    loose_digest,
    make_digests,
    make_manifest,
    make_payload,
    make_root,
    opaque_manifest,
)
from tests.support.stores import LEASE_TTL_SECONDS, Engine, chunks_that_fit, make_store, write_chunk

RESERVED, PRESENT = ReserveOutcome.RESERVED, ReserveOutcome.PRESENT
ARRIVING, NO_SPACE = ReserveOutcome.ARRIVING, ReserveOutcome.NO_SPACE
MANIFEST = make_manifest()
LOWER, UPPER = HeadRange(0, 2), HeadRange(2, 4)


@pytest.fixture(params=["lru", "s3fifo"])
def store(request):
    made = make_store(eviction=request.param)
    yield made
    made.check()
    made.host.close()


@pytest.fixture
def engine(store) -> Engine:
    return Engine(store, MANIFEST)


@pytest.fixture
def other(store) -> Engine:
    """Another session in the same namespace."""
    return Engine(store, MANIFEST, session=2)


def fill_up(engine: Engine, prompt: int = 0) -> list[Digest]:
    """Fill the arena with one prefix and return its digests."""
    digests = make_digests(chunks_that_fit(engine.store, MANIFEST), prompt)
    assert set(engine.put(digests)) == {RESERVED}
    return digests


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
