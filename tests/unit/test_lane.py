"""What a slower tier is asked for next: loads by deadline, then prefetches; writes yield."""

from __future__ import annotations

import pytest

from kvstore.limits import (
    TIER_READS_BYTES,
    TIER_READS_MAX,
    TIER_WRITES_MAX,
    WRITE_QUEUE_CHUNKS_MAX,
)
from kvstore.store.lane import Fetch, Lane, Removal, Write
from kvstore.store.namespace import Namespace
from kvstore.store.recompute import worth_loading
from kvstore.tiers.base import Shard, ShardKey
from kvstore.types import HeadRange, NamespaceId, Place, Root
from tests.support.making import loose_digest, make_manifest

ALL = HeadRange(0, 4)
SPACE = Namespace(0, make_manifest())
QUEUE_BYTES = 1000


@pytest.fixture
def lane() -> Lane:
    return Lane(QUEUE_BYTES)


def waiter(fetch: Fetch, is_here: bool) -> None:
    """Wait for a fetch, without interest in how it ends."""


def load(lane: Lane, slot: int, deadline: float) -> Fetch:
    fetch = Fetch(slot, ALL, None)
    fetch.waiters[waiter] = None
    fetch.deadline = deadline
    lane.put_fetch(fetch)
    return fetch


def prefetch(lane: Lane, slot: int) -> Fetch:
    fetch = Fetch(slot, ALL, None)
    fetch.is_prefetch = True
    lane.put_fetch(fetch)
    return fetch


def write(
    number: int, size_bytes: int = 10, *, is_urgent: bool = False, above: int | None = None
) -> Write:
    digest = loose_digest(number)
    before = None if above is None else loose_digest(above)
    return Write(SPACE, digest, ALL, size_bytes, is_urgent=is_urgent, queued_at=0.0, above=before)


def waiting(lane: Lane) -> list[int]:
    """Return the numbers of the writes that wait, in the order in which they will go."""
    numbers = {loose_digest(number): number for number in range(100)}
    return [numbers[write.digest] for write in lane._writes.values()]


def removal() -> Removal:
    key = ShardKey(NamespaceId(b"n" * 16), loose_digest(0), ALL)
    return Removal(Shard(key, None, 1, Root(0)), Place(0))


def test_the_earliest_deadline_goes_first_and_prefetches_go_last(lane):
    coming = prefetch(lane, 1)
    late, soon, later = load(lane, 2, 9.0), load(lane, 3, 1.0), load(lane, 4, 9.0)
    assert [lane.next(0.0) for _ in range(4)] == [soon, late, later, coming]


def test_a_prefetch_that_a_load_joins_becomes_a_load(lane):
    joined, other = prefetch(lane, 1), load(lane, 2, 5.0)
    joined.waiters[waiter] = None
    joined.deadline = 1.0
    lane.put_fetch(joined)
    assert [lane.next(0.0) for _ in range(3)] == [joined, other, None]


def test_what_nobody_waits_for_any_more_is_passed_over(lane):
    given_up, wanted = load(lane, 1, 1.0), load(lane, 2, 2.0)
    given_up.waiters.clear()
    assert lane.next(0.0) is wanted
    assert lane.take_fetches() == []


def test_only_so_many_reads_are_under_way(lane):
    fetches = [load(lane, slot, 1.0) for slot in range(TIER_READS_MAX + 1)]
    begun = [lane.next(0.0) for _ in range(TIER_READS_MAX)]
    assert lane.next(0.0) is None
    lane.ended(begun[0])
    assert lane.next(0.0) is fetches[-1]


@pytest.mark.parametrize(
    ("size_bytes", "begun"),
    [(1, TIER_READS_MAX + 2), (TIER_READS_BYTES // TIER_READS_MAX, TIER_READS_MAX)],
)
def test_a_tier_that_takes_more_reads_gets_them_while_they_are_small(size_bytes, begun):
    lane = Lane(QUEUE_BYTES, TIER_READS_MAX + 2)
    for slot in range(begun + 2):
        load(lane, slot, 1.0).size_bytes = size_bytes
    running = list(iter(lambda: lane.next(0.0), None))
    assert len(running) == begun
    for fetch in running[:2]:
        lane.ended(fetch)
    assert len(list(iter(lambda: lane.next(0.0), None))) == 2


def test_writes_yield_to_loads_and_not_to_prefetches(lane):
    lane.put_write(write(1))
    loading = load(lane, 1, 1.0)
    assert lane.next(0.0) is loading
    assert lane.next(0.0) is None
    lane.ended(loading)
    coming = prefetch(lane, 2)
    assert lane.next(0.0) is coming
    assert isinstance(lane.next(0.0), Write)


def test_under_loads_without_end_one_write_at_a_time_goes_on(lane):
    for number in range(3):
        lane.put_write(write(number))
    load(lane, 1, 1.0)
    lane.next(0.0)
    assert lane.next(0.5) is None
    assert isinstance(lane.next(2.0), Write)
    assert lane.next(2.0) is None


def test_removals_come_before_writes_and_both_have_a_width(lane):
    for number in range(TIER_WRITES_MAX + 1):
        lane.put_write(write(number))
    lane.put_removal(removal())
    kinds = [type(lane.next(0.0)) for _ in range(TIER_WRITES_MAX + 1)]
    assert kinds == [Removal, *[Write] * (TIER_WRITES_MAX - 1), type(None)]
    assert not lane.is_settled


def test_beyond_its_bytes_the_oldest_write_is_dropped_and_told(lane):
    told: list[bool] = []
    oldest = write(0, 600)
    oldest.done.append(told.append)
    assert lane.put_write(oldest)
    assert lane.put_write(write(1, 400))
    assert lane.put_write(write(2, 10))
    assert (told, lane.dropped_writes, lane.write_bytes) == ([False], 1, 410)
    assert not lane.put_write(write(3, QUEUE_BYTES + 1))


def test_the_oldest_prefix_loses_its_end_and_keeps_its_head(lane):
    for number in range(5):
        lane.put_write(write(number, 100, above=number - 1 if number else None))
    for number in range(10, 15):
        lane.put_write(write(number, 100, above=number - 1 if number > 10 else None))
    for number in range(20, 23):
        assert lane.put_write(write(number, 100, above=number - 1 if number > 20 else None))
    assert waiting(lane) == [0, 1, *range(10, 15), 20, 21, 22]
    assert lane.dropped_writes == 3


def test_a_prefix_longer_than_the_queue_keeps_its_head(lane):
    kept = [lane.put_write(write(n, 100, above=n - 1 if n else None)) for n in range(14)]
    assert kept == [True] * 10 + [False] * 4
    assert waiting(lane) == list(range(10))
    # Once there is room again, what comes behind the gap may go, and pushes nobody out.
    lane.next(0.0)
    assert lane.put_write(write(14, 100, above=13))
    assert not lane.put_write(write(15, 100, above=40))
    assert waiting(lane) == [*range(1, 10), 14]


def test_what_continues_a_chunk_that_is_on_its_way_is_a_run_of_its_own(lane):
    lane.put_write(write(0, 100))
    under_way = lane.next(0.0)
    for number in range(1, 11):
        assert lane.put_write(write(number, 100, above=number - 1))
    lane.ended(under_way)
    assert lane.put_write(write(50, 300))
    assert waiting(lane) == [*range(1, 8), 50]


def test_the_oldest_run_gives_its_own_end_before_a_later_branch_of_it(lane):
    for number, above in ((0, None), (1, 0), (2, 1), (3, 0), (4, 3)):
        lane.put_write(write(number, 200, above=above))
    assert lane.put_write(write(9, 400))
    assert waiting(lane) == [0, 3, 4, 9]


def test_urgent_writes_of_the_same_prefix_push_out_what_nobody_waits_for(lane):
    for number in range(WRITE_QUEUE_CHUNKS_MAX):
        lane.put_write(write(number, 0, above=number - 1 if number else None))
    assert lane.put_write(write(-1, 0, above=WRITE_QUEUE_CHUNKS_MAX - 1, is_urgent=True))
    assert lane.write_chunks == WRITE_QUEUE_CHUNKS_MAX
    assert len(lane.take_urgent_writes()) == 1


def test_what_somebody_waits_for_is_not_dropped(lane):
    assert lane.put_write(write(0, 900, is_urgent=True))
    assert not lane.put_write(write(1, 200))
    assert lane.put_write(write(2, 200, is_urgent=True))
    assert len(lane.take_urgent_writes()) == 2
    assert (lane.write_chunks, lane.write_bytes) == (0, 0)


def test_the_number_of_writes_is_bounded_too(lane):
    for number in range(WRITE_QUEUE_CHUNKS_MAX + 5):
        lane.put_write(write(number, 0))
    assert lane.write_chunks == WRITE_QUEUE_CHUNKS_MAX
    assert lane.dropped_writes == 5


def test_a_write_of_the_same_shard_is_joined(lane):
    told: list[bool] = []
    lane.put_write(write(0))
    again = write(0, is_urgent=True)
    again.done.append(told.append)
    assert lane.put_write(again)
    assert lane.write_chunks == 1
    lane.next(0.0).finish(kept=True)
    assert told == [True]


# --- load or recompute ------------------------------------------------------------------------

DISK, HOST, REDIS = 4, 2, 8
SECONDS_A_CHUNK = {HOST: 0.0, DISK: 1.0, REDIS: 10.0}


def seconds_for(tiers: int, chunks: int) -> float:
    return SECONDS_A_CHUNK[tiers] * chunks


@pytest.mark.parametrize(
    ("runs", "recompute", "chunks", "seconds"),
    [
        ([], 1.0, 0, 0.0),
        ([(HOST, 5)], 0.001, 5, 0.0),
        ([(HOST, 5), (DISK, 5)], 0.0, 10, 5.0),
        ([(HOST, 5), (DISK, 5)], 0.5, 5, 0.0),
        ([(HOST, 5), (DISK, 5)], 2.0, 10, 5.0),
        ([(DISK, 5), (REDIS, 5)], 2.0, 5, 5.0),
        ([(DISK, 5), (REDIS, 1), (HOST, 100)], 2.0, 106, 15.0),
        ([(REDIS, 5), (HOST, 1)], 2.0, 0, 0.0),
    ],
)
def test_loading_ends_where_computing_is_sooner(runs, recompute, chunks, seconds):
    assert worth_loading(runs, seconds_for, recompute) == (chunks, seconds)
