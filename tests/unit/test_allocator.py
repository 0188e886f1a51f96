"""The allocator: extents never overlap, nothing is lost, and free neighbours become one run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from kvstore.transfer.allocator import Allocator
from kvstore.types import Extent
from tests.support.stores import page_aligned

PAGES = 512
CAPACITY_BYTES = page_aligned(PAGES)


def make_holes(sizes: list[int]) -> tuple[Allocator, int]:
    """Return an allocator whose only free runs have *sizes* pages, freed in this order."""
    capacity = page_aligned(sum(sizes) + len(sizes))
    allocator = Allocator(capacity)
    holes = []
    for size in sizes:
        holes.append(allocator.allocate(page_aligned(size)))
        assert allocator.allocate(page_aligned(1))
    assert allocator.free_bytes == 0
    for hole in holes:
        allocator.free(hole)
    return allocator, capacity


def test_extents_start_on_pages_and_keep_the_size_asked_for():
    allocator = Allocator(CAPACITY_BYTES)
    assert allocator.allocate(1) == Extent(0, 1)
    assert allocator.allocate(5000) == Extent(4096, 5000)
    assert allocator.allocate(1) == Extent(3 * 4096, 1)
    assert allocator.used_bytes == 4 * 4096


def test_an_arena_can_be_filled_to_the_last_page_and_then_gives_none():
    allocator = Allocator(CAPACITY_BYTES)
    extents = [allocator.allocate(page_aligned(4)) for _ in range(PAGES // 4)]
    assert None not in extents
    assert allocator.free_bytes == allocator.largest_free_bytes == 0
    assert allocator.allocate(1) is None
    allocator.check(extents)


def test_refusing_changes_nothing():
    allocator = Allocator(CAPACITY_BYTES)
    taken = allocator.allocate(page_aligned(1))
    assert allocator.allocate(CAPACITY_BYTES) is None
    allocator.check([taken])
    assert allocator.largest_free_bytes == CAPACITY_BYTES - page_aligned(1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_freed_neighbours_become_one_run_in_whatever_order(order):
    allocator = Allocator(page_aligned(3))
    extents = [allocator.allocate(page_aligned(1)) for _ in range(3)]
    for position in order:
        allocator.free(extents[position])
    assert allocator.largest_free_bytes == page_aligned(3)
    assert allocator.allocate(page_aligned(3)) == Extent(0, page_aligned(3))


def test_an_extent_is_freed_once():
    allocator = Allocator(CAPACITY_BYTES)
    extent = allocator.allocate(1)
    allocator.free(extent)
    with pytest.raises(AssertionError):
        allocator.free(extent)


def test_check_finds_gaps_overlaps_and_what_hangs_over_the_end():
    allocator = Allocator(CAPACITY_BYTES)
    first, second = allocator.allocate(page_aligned(2)), allocator.allocate(page_aligned(2))
    allocator.check([second, first])
    with pytest.raises(AssertionError, match="gap or overlap"):
        allocator.check([second])
    with pytest.raises(AssertionError, match="gap or overlap"):
        allocator.check([first, first, second])
    with pytest.raises(AssertionError, match="pages end at"):
        Allocator(page_aligned(1)).check([Extent(4096, 1)])


@pytest.mark.parametrize("count", [2, 33, 40])
def test_a_run_that_is_long_enough_is_found_among_many_shorter_of_its_class(count):
    sizes = [1024 + more for more in range(count)]
    allocator, _ = make_holes(sizes)
    wanted = max(sizes) - 1 if count == 2 else max(sizes)
    # All but the longest are too short for one page more than the second longest has.
    assert allocator.largest_free_bytes == page_aligned(max(sizes))
    assert allocator.allocate(page_aligned(wanted) - 1) is not None


def test_whatever_fits_the_largest_free_run_can_be_had():
    sizes = [*range(1024, 1084), 1087]
    allocator, _ = make_holes(sizes)
    assert allocator.allocate(page_aligned(1086)) is not None


@given(st.data())
def test_random_traffic_never_overlaps_and_coalesces_to_one_run_at_the_end(data):
    allocator = Allocator(CAPACITY_BYTES)
    live: list[Extent] = []
    for _ in range(data.draw(st.integers(1, 60))):
        if live and data.draw(st.booleans()):
            allocator.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        else:
            size = data.draw(st.integers(1, CAPACITY_BYTES // 6))
            largest = allocator.largest_free_bytes
            extent = allocator.allocate(size)
            # None exactly when no run is long enough.
            assert (extent is None) == (size > largest)
            if extent is not None:
                assert extent.size_bytes == size
                live.append(extent)
        allocator.check(live)
    for extent in live:
        allocator.free(extent)
    assert allocator.largest_free_bytes == allocator.free_bytes == CAPACITY_BYTES


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_chunks_of_one_size_never_fragment_the_arena(pages, seed):
    rng = np.random.default_rng(seed)
    allocator = Allocator(CAPACITY_BYTES)
    live = []
    for _ in range(200):
        if live and rng.random() < 0.5:
            allocator.free(live.pop(rng.integers(len(live))))
        else:
            extent = allocator.allocate(page_aligned(pages))
            # A run that holds a chunk is only missing when the chunks that live fill the arena.
            assert extent is not None or len(live) == PAGES // pages
            live += [extent] if extent else []


@given(st.integers(0, 2**32))
def test_two_sizes_under_random_traffic_waste_less_than_half_of_the_arena(seed):
    rng = np.random.default_rng(seed)
    small, large = page_aligned(3), page_aligned(16)
    allocator = Allocator(CAPACITY_BYTES)
    live: list[Extent] = []
    wasted: list[int] = []
    for _ in range(400):
        extent = allocator.allocate(large if rng.random() < 0.5 else small)
        if extent is None:
            wasted.append(allocator.free_bytes)
            allocator.free(live.pop(rng.integers(len(live))))
        else:
            live.append(extent)
    assert max(wasted, default=0) < CAPACITY_BYTES / 2


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(0, 2**32))
def test_what_is_occupied_counts_as_allocated_in_whatever_order_it_comes(sizes, seed):
    rng = np.random.default_rng(seed)
    extents, page = [], 0
    for size in sizes:
        page += int(rng.integers(3))
        if page + size <= PAGES:
            extents.append(Extent(page_aligned(page), page_aligned(size) - int(rng.integers(4096))))
        page += size
    shuffled = [extents[at] for at in rng.permutation(len(extents))]
    allocator = Allocator(CAPACITY_BYTES)
    allocator.occupy(shuffled)
    allocator.check(extents)
    while (extent := allocator.allocate(page_aligned(1))) is not None:
        shuffled.append(extent)
    allocator.check(shuffled)
    for extent in shuffled:
        allocator.free(extent)
    assert allocator.largest_free_bytes == CAPACITY_BYTES


@pytest.mark.parametrize(
    ("extents", "reason"),
    [
        ([Extent(100, 1)], "starts on no page"),
        ([Extent(0, 4097), Extent(4096, 1)], "overlaps"),
        ([Extent(CAPACITY_BYTES - 4096, 4097)], "extents end at"),
    ],
)
def test_what_cannot_be_is_not_occupied(extents, reason):
    with pytest.raises(AssertionError, match=reason):
        Allocator(CAPACITY_BYTES).occupy(extents)


def test_extents_are_occupied_before_any_is_allocated():
    allocator = Allocator(CAPACITY_BYTES)
    allocator.allocate(1)
    with pytest.raises(AssertionError, match="before any is allocated"):
        allocator.occupy([])
