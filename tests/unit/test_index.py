"""The index: what is found, what holds it, and how prefixes hang together."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore.errors import LimitError
from kvstore.limits import NAMESPACES_MAX
from kvstore.store.index import Index
from kvstore.store.shards import ShardRecord, choose_cover, covers
from kvstore.types import NO_SLOT, Extent, HeadRange, Root, TierKind
from tests.support.making import loose_digest, make_digests, make_manifest

MANIFEST = make_manifest()
ALL, LOWER, UPPER = HeadRange(0, 4), HeadRange(0, 2), HeadRange(2, 4)


def shard(heads: HeadRange = ALL, page: int = 0) -> ShardRecord:
    return ShardRecord(heads, Extent(page * 4096, 100), Root(7))


@pytest.fixture
def index():
    made = Index()
    made.open_namespace(MANIFEST)
    yield made
    made.check()


@pytest.fixture
def space(index):
    return index.namespaces[0]


def add_prefix(index, space, digests) -> list[int]:
    slots = [NO_SLOT]
    for digest in digests:
        slots.append(index.add(space, digest, slots[-1], shard(page=len(slots))))
    return slots[1:]


# --- finding ----------------------------------------------------------------------------


def test_a_gap_ends_the_leading_chunks(index, space):
    digests = make_digests(5)
    slots = add_prefix(index, space, digests)
    assert index.leading(space, digests) == slots
    index.remove(slots[2])
    assert index.leading(space, digests) == slots[:2]
    assert index.leading(space, digests[3:]) == slots[3:]


def test_namespaces_do_not_see_each_others_chunks(index, space):
    other = index.open_namespace(make_manifest(model="other"))
    (slot,) = add_prefix(index, space, [loose_digest(0)])
    assert other.find(loose_digest(0)) == NO_SLOT
    assert index.space_of(slot) is space


def test_a_chunk_is_ready_once_its_shards_cover_all_heads(index, space):
    digest = loose_digest(0)
    slot = index.add(space, digest, NO_SLOT, shard(LOWER))
    index.check()
    assert index.leading(space, [digest]) == []
    assert space.find(digest) == slot
    index.add_shard(slot, shard(LOWER, page=3))
    assert digest in space.partial
    index.add_shard(slot, shard(UPPER, page=1))
    assert index.leading(space, [digest]) == [slot]
    assert [found.heads for found in index.shards(slot)] == [LOWER, LOWER, UPPER]


def test_a_shard_more_of_a_whole_chunk_leaves_it_whole(index, space):
    slot = index.add(space, loose_digest(0), NO_SLOT, shard())
    index.add_shard(slot, shard(UPPER, page=1))
    assert index.leading(space, [loose_digest(0)]) == [slot]


def test_what_is_removed_returns_all_its_extents_and_its_slot_is_used_again(index, space):
    slot = index.add(space, loose_digest(0), NO_SLOT, shard(LOWER, page=1))
    index.add_shard(slot, shard(UPPER, page=2))
    index.pin(slot, hard=False)
    assert [s.extent for s in index.remove(slot)] == [Extent(4096, 100), Extent(8192, 100)]
    assert len(index) == 0
    assert index.add(space, loose_digest(1), NO_SLOT, shard()) == slot
    assert not index.is_soft_pinned(slot)
    assert index.shards(slot) == [shard()]


def test_a_partial_chunk_can_be_removed(index, space):
    slot = index.add(space, loose_digest(0), NO_SLOT, shard(LOWER))
    index.remove(slot)
    assert space.find(loose_digest(0)) == NO_SLOT


def test_a_chunk_is_added_once(index, space):
    index.add(space, loose_digest(0), NO_SLOT, shard())
    with pytest.raises(AssertionError, match="added once"):
        index.add(space, loose_digest(0), NO_SLOT, shard())


def test_a_vacant_slot_has_no_digest(index, space):
    slot = index.add(space, loose_digest(0), NO_SLOT, shard())
    index.remove(slot)
    with pytest.raises(AssertionError, match="vacant"):
        index.digest(slot)


def test_committed_chunks_are_in_the_host_tier(index, space):
    slots = add_prefix(index, space, make_digests(2))
    assert index.tiers(slots) == bytes([TierKind.HOST] * 2)


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 13))
def test_a_window_is_found_where_its_definition_says(present, window):
    index = Index()
    space = index.open_namespace(MANIFEST)
    digests = [loose_digest(number) for number in range(len(present))]
    for digest, is_present in zip(digests, present, strict=True):
        if is_present:
            index.add(space, digest, NO_SLOT, shard())
    wanted = max(n for n in range(len(present) + 1) if all(present[max(0, n - window) : n]))
    assert index.window_hits(space, digests, window) == wanted
    hits, slots = index.prefix(space, digests, window)
    assert hits == wanted
    assert [index.digest(slot) for slot in slots] == digests[max(0, wanted - window) : wanted]


# --- namespaces -------------------------------------------------------------------------


def test_a_namespace_that_nobody_uses_makes_room_for_a_new_one():
    index = Index()
    for number in range(NAMESPACES_MAX):
        index.open_namespace(make_manifest(revision=str(number))).entered = 1
    with pytest.raises(LimitError, match=str(NAMESPACES_MAX)):
        index.open_namespace(MANIFEST)
    index.add(index.namespaces[5], loose_digest(0), NO_SLOT, shard())
    index.add(index.namespaces[6], loose_digest(0), NO_SLOT, shard(LOWER))
    for number in (5, 6, 7):
        index.namespaces[number].entered = 0
    assert index.open_namespace(MANIFEST).number == 7
    index.check()


# --- holding ----------------------------------------------------------------------------


def test_leases_and_hard_pins_hold_and_soft_pins_do_not(index, space):
    (slot,) = add_prefix(index, space, [loose_digest(0)])
    index.pin(slot, hard=False)
    assert index.is_soft_pinned(slot)
    assert not index.is_held(slot)
    index.pin(slot, hard=True)
    index.lease(slot)
    index.lease(slot)
    assert (index.held, index.lease_count(slot)) == (1, 2)
    assert index.unpin(slot)
    assert not index.unpin(slot)
    index.release(slot)
    assert index.is_held(slot)
    index.release(slot)
    assert (index.held, index.is_held(slot)) == (0, False)


def test_what_is_held_cannot_be_removed(index, space):
    (slot,) = add_prefix(index, space, [loose_digest(0)])
    index.lease(slot)
    with pytest.raises(AssertionError, match="is held"):
        index.remove(slot)


def test_a_chunk_cannot_be_released_more_often_than_leased(index, space):
    (slot,) = add_prefix(index, space, [loose_digest(0)])
    with pytest.raises(AssertionError, match="has no lease"):
        index.release(slot)


# --- the prefix tree --------------------------------------------------------------------


def test_the_leaf_below_is_the_end_of_a_prefix(index, space):
    slots = add_prefix(index, space, make_digests(4))
    assert index.tree.leaf_below(slots[0]) == slots[3]
    assert list(index.tree.path_below(slots[1])) == slots[1:]
    index.remove(slots[3])
    assert index.tree.leaf_below(slots[0]) == slots[2]


def test_children_of_what_is_removed_become_roots(index, space):
    root = index.add(space, loose_digest(0), NO_SLOT, shard())
    middle = index.add(space, loose_digest(1), root, shard())
    leaves = [index.add(space, loose_digest(2 + n), middle, shard()) for n in range(3)]
    index.remove(middle)
    index.check()
    assert index.tree.leaf_below(root) == root
    assert [index.tree.leaf_below(leaf) for leaf in leaves] == leaves


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1])
def test_siblings_can_go_in_any_order(index, space, first, second):
    root = index.add(space, loose_digest(0), NO_SLOT, shard())
    leaves = [index.add(space, loose_digest(1 + n), root, shard()) for n in range(3)]
    index.remove(leaves.pop(first))
    index.check()
    index.remove(leaves.pop(second))
    index.check()
    assert index.tree.leaf_below(root) == leaves[0]


# --- covers -----------------------------------------------------------------------------

ranges = st.builds(
    lambda start, width: HeadRange(start, start + width), st.integers(0, 7), st.integers(1, 4)
)


@given(st.lists(ranges, max_size=6), ranges)
def test_shards_cover_what_the_union_of_their_heads_holds(shards, wanted):
    union = {head for heads in shards for head in range(*heads)}
    assert covers(shards, wanted) == union.issuperset(range(*wanted))


@given(st.lists(ranges, min_size=1, max_size=6), ranges)
def test_the_chosen_cover_is_complete_in_order_and_as_small_as_any(shards, wanted):
    if not covers(shards, wanted):
        return
    records = [shard(heads, page) for page, heads in enumerate(shards)]
    chosen = [record.heads for record in choose_cover(records, wanted)]
    assert covers(chosen, wanted)
    assert chosen == sorted(chosen)
    assert not any(covers(chosen[:n] + chosen[n + 1 :], wanted) for n in range(len(chosen)))
