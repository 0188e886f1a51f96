"""The planner: tail before head, never what is held, soft pins last, the cheapest window."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore.store.index import Index
from kvstore.store.planner import cheapest_window, next_victim
from kvstore.store.policy import make_policy
from kvstore.store.shards import ShardRecord
from kvstore.types import NO_SLOT, Extent, HeadRange, Root, TierKind
from tests.support.making import loose_digest, make_manifest

MANIFEST = make_manifest()


class Shelf:
    """An index and a policy that know the same chunks."""

    def __init__(self, eviction: str) -> None:
        self.index = Index()
        self.policy = make_policy(eviction)
        self.space = self.index.open_namespace(MANIFEST)
        self._added = 0

    def add(self, parent: int = NO_SLOT) -> int:
        record = ShardRecord(HeadRange(0, 4), Extent(4096 * self._added, 100), Root(0))
        slot = self.index.add(self.space, loose_digest(self._added), parent, record)
        self.policy.admit(slot, 100, self._added << 32)
        self._added += 1
        return slot

    def add_prefix(self, count: int) -> list[int]:
        slots = [NO_SLOT]
        for _ in range(count):
            slots.append(self.add(slots[-1]))
        return slots[1:]

    def evict(self) -> int:
        slot = next_victim(self.index, self.policy)
        if slot != NO_SLOT:
            self.policy.forget(slot, slot << 32, evicted=True)
            self.index.remove(slot)
        return slot

    def evict_all(self) -> list[int]:
        return list(iter(self.evict, NO_SLOT))


@pytest.fixture(params=["lru", "s3fifo"])
def shelf(request) -> Shelf:
    return Shelf(request.param)


def test_nothing_leaves_an_empty_index(shelf):
    assert shelf.evict() == NO_SLOT


def test_a_prefix_loses_its_tail_before_its_head(shelf):
    slots = shelf.add_prefix(5)
    assert shelf.evict_all() == slots[::-1]


def test_a_shared_head_stays_until_all_its_tails_are_gone(shelf):
    head = shelf.add()
    tails = [shelf.add(head) for _ in range(3)]
    order = shelf.evict_all()
    assert order[-1] == head
    assert sorted(order[:-1]) == tails


def test_what_is_leased_or_hard_pinned_never_leaves(shelf):
    slots = [shelf.add() for _ in range(4)]
    shelf.index.lease(slots[0])
    shelf.index.pin(slots[2], hard=True)
    assert sorted(shelf.evict_all()) == [slots[1], slots[3]]
    assert shelf.evict() == NO_SLOT


def test_a_held_tail_does_not_keep_other_prefixes(shelf):
    first, second = shelf.add_prefix(3), shelf.add_prefix(3)
    shelf.index.lease(first[2])
    assert set(shelf.evict_all()) >= set(second)


def test_a_held_newcomer_does_not_hide_its_elders(shelf):
    elders = [shelf.add() for _ in range(20)]
    for slot in elders[:19]:
        shelf.index.lease(slot)
    assert shelf.evict() == elders[19]


def test_soft_pins_leave_last_and_only_when_nothing_else_can(shelf):
    slots = [shelf.add() for _ in range(6)]
    shelf.index.pin(slots[0], hard=False)
    shelf.index.pin(slots[1], hard=False)
    shelf.index.lease(slots[2])
    order = shelf.evict_all()
    assert sorted(order[:3]) == slots[3:]
    assert sorted(order[3:]) == slots[:2]


def test_soft_pins_nearly_everywhere_are_looked_at_once(shelf):
    slots = [slot for _ in range(20) for slot in shelf.add_prefix(10)]
    for slot in slots:
        shelf.index.pin(slot, hard=False)
    assert shelf.evict() in slots
    shelf.policy.candidate = counted = CountedCall(shelf.policy.candidate)
    shelf.evict_all()
    assert counted.calls < 2 * len(slots)


class CountedCall:
    """A function that counts how often it is called."""

    def __init__(self, function) -> None:
        self._function = function
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self._function()


@pytest.mark.parametrize("hold", ["the end", "all", "all but the head"])
def test_a_long_prefix_that_is_held_is_walked_once_and_not_from_each_of_its_chunks(shelf, hold):
    slots = shelf.add_prefix(1000)
    held = {"the end": slots[-1:], "all": slots, "all but the head": slots[1:]}[hold]
    for slot in held:
        shelf.index.lease(slot)
    free = shelf.add()
    branches = shelf.index.tree._branches[TierKind.HOST]
    children = branches.child
    branches.child = Counted(children)
    assert shelf.evict() == free
    assert branches.child.reads < 5 * len(slots)
    branches.child = children


class Counted:
    """A column that counts how often it is read."""

    def __init__(self, column) -> None:
        self._column = column
        self.reads = 0

    def __getitem__(self, slot: int) -> int:
        self.reads += 1
        return self._column[slot]

    def __setitem__(self, slot: int, value: int) -> None:
        self._column[slot] = value


@given(st.sampled_from(["lru", "s3fifo"]), st.data())
def test_something_leaves_exactly_when_something_may(eviction, data):
    shelf = Shelf(eviction)
    slots: list[int] = []
    for _ in range(data.draw(st.integers(1, 12))):
        slots.append(shelf.add(data.draw(st.sampled_from([NO_SLOT, *slots]))))
        shelf.policy.touch(data.draw(st.sampled_from(slots)))
    held = data.draw(st.sets(st.sampled_from(slots)))
    for slot in held:
        shelf.index.lease(slot)
    left = set(slots)
    for slot in iter(shelf.evict, NO_SLOT):
        assert slot not in held
        left.remove(slot)
        shelf.index.check()
    # Only what is held stays, and what stands before it in its prefix.
    assert held <= left
    for slot in left - held:
        assert shelf.index.tree.leaf_below(slot) in held


# --- windows ----------------------------------------------------------------------------


# Free are [15, 20) and [30, 40).
OFFSETS, SIZES, END = [0, 10, 20], [10, 5, 10], 40


def test_the_window_that_clears_the_fewest_bytes_wins():
    assert cheapest_window(OFFSETS, SIZES, [False, False, False], 16, END) == [2]
    assert cheapest_window(OFFSETS, SIZES, [False, False, False], 10, END) == []


def test_a_window_never_holds_what_is_held():
    assert cheapest_window(OFFSETS, SIZES, [False, False, True], 16, END) == [0, 1]
    assert cheapest_window(OFFSETS, SIZES, [False, True, True], 11, END) is None


def test_an_empty_arena_needs_no_clearing():
    assert cheapest_window([], [], [], 10, 10) == []
    assert cheapest_window([], [], [], 11, 10) is None


extents = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=8)


@given(extents, st.integers(0, 3), st.integers(1, 20))
def test_a_window_is_as_cheap_as_the_best_of_all_windows(gaps, tail, need):
    offsets, sizes, held, end = [], [], [], 0
    for gap, size, is_held in gaps:
        offsets.append(end + gap)
        sizes.append(size)
        held.append(is_held)
        end += gap + size
    capacity = end + tail

    def touched(start: int) -> list[int]:
        return [
            n
            for n, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
            if offset < start + need and offset + size > start
        ]

    costs = [
        sum(sizes[n] for n in touched(start))
        for start in range(capacity - need + 1)
        if not any(held[n] for n in touched(start))
    ]
    found = cheapest_window(offsets, sizes, held, need, capacity)
    assert (found is None) == (not costs)
    if found is not None:
        assert sum(sizes[n] for n in found) == min(costs)
