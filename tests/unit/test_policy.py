"""Eviction policies: each keeps its own promise, and both keep those of the interface."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore.store.policy import (
    LRU,
    Columns,
    EvictionPolicy,
    Ghost,
    Queue,
    S3Fifo,
    make_policy,
)
from kvstore.types import NO_SLOT


def fingerprint(slot: int) -> int:
    return (slot + 1) << 40 | slot


def admit(policy: EvictionPolicy, *slots: int, size_bytes: int = 10) -> None:
    for slot in slots:
        policy.admit(slot, size_bytes, fingerprint(slot))


def leave(policy: EvictionPolicy, *, evicted: bool = True) -> int:
    """Evict the candidate and return it."""
    slot = policy.candidate()
    policy.forget(slot, fingerprint(slot), evicted=evicted)
    return slot


def leave_all(policy: EvictionPolicy) -> list[int]:
    return [leave(policy) for _ in iter(policy.candidate, NO_SLOT)]


@pytest.fixture(params=["lru", "s3fifo"])
def policy(request) -> EvictionPolicy:
    return make_policy(request.param)


# --- both -------------------------------------------------------------------------------


def test_nobody_leaves_an_empty_policy(policy):
    assert policy.candidate() == NO_SLOT


def test_every_slot_leaves_once(policy):
    admit(policy, *range(20))
    policy.touch(3)
    assert sorted(leave_all(policy)) == list(range(20))


def test_what_is_never_used_leaves_in_the_order_of_arrival(policy):
    admit(policy, 4, 2, 9)
    assert leave_all(policy) == [4, 2, 9]


def test_asking_for_the_candidate_again_gives_the_same_one(policy):
    admit(policy, *range(5))
    assert policy.candidate() == policy.candidate()


def test_a_postponed_slot_gives_way_to_others(policy):
    admit(policy, *range(5))
    policy.postpone(policy.candidate())
    assert leave_all(policy)[0] == 1


def test_a_postponed_slot_leaves_when_it_is_the_last(policy):
    admit(policy, 0)
    policy.postpone(0)
    assert leave_all(policy) == [0]


def test_a_deferred_slot_leaves_last_even_when_it_is_used(policy):
    admit(policy, *range(4))
    policy.defer(0)
    policy.touch(0)
    assert policy.is_deferred(0)
    assert leave_all(policy) == [1, 2, 3, 0]


def test_a_deferred_slot_that_is_resumed_leaves_in_its_turn(policy):
    admit(policy, *range(4))
    policy.defer(0)
    policy.defer(3)
    policy.resume(0)
    policy.resume(1)
    assert not policy.is_deferred(0)
    assert leave_all(policy) == [1, 2, 0, 3]


def test_a_hastened_slot_leaves_first_unless_it_is_used_again(policy):
    admit(policy, *range(6))
    policy.hasten(4)
    policy.hasten(5)
    policy.touch(4)
    order = leave_all(policy)
    assert order[0] == 5
    assert order.index(4) > 1


def test_some_that_were_held_are_tried_before_one_that_leaves_last(policy):
    admit(policy, *range(200))
    policy.defer(0)
    for slot in range(1, 200):
        policy.postpone(slot)
    tried = []
    while not policy.is_deferred(slot := policy.candidate()):
        tried.append(slot)
        policy.postpone(slot)
    assert tried == list(range(1, 65))
    leave(policy)
    assert not policy.is_deferred(policy.candidate())


def test_policies_of_one_tier_share_their_columns_and_nothing_else():
    columns = Columns()
    first, second = make_policy("s3fifo", columns), make_policy("lru", columns)
    admit(first, 0, 2, 4)
    admit(second, 1, 3)
    second.defer(1)
    assert leave_all(first) == [0, 2, 4]
    assert leave_all(second) == [3, 1]


def test_a_forgotten_slot_can_be_admitted_again(policy):
    admit(policy, 0, 1)
    policy.forget(0, fingerprint(0), evicted=False)
    admit(policy, 0)
    assert leave_all(policy) == [1, 0]


@given(st.sampled_from(["lru", "s3fifo"]), st.data())
def test_postponing_all_that_are_held_always_finds_one_that_is_not(name, data):
    policy = make_policy(name)
    alive: set[int] = set()
    for slot in range(data.draw(st.integers(1, 40))):
        admit(policy, slot, size_bytes=data.draw(st.integers(1, 100)))
        alive.add(slot)
        for used in data.draw(st.lists(st.sampled_from(sorted(alive)), max_size=3)):
            policy.touch(used)
        if data.draw(st.integers(0, 3)) == 0:
            alive.remove(leave(policy))
    if not alive:
        return
    free = data.draw(st.sampled_from(sorted(alive)))
    for _ in range(2 * len(alive)):
        if policy.candidate() == free:
            return
        policy.postpone(policy.candidate())
    pytest.fail(f"slot {free} is never the candidate")


# --- LRU --------------------------------------------------------------------------------


def test_lru_lets_the_least_recently_used_leave_first():
    policy = LRU()
    admit(policy, 0, 1, 2)
    policy.touch(0)
    assert leave_all(policy) == [1, 2, 0]


# --- S3-FIFO ----------------------------------------------------------------------------


def test_one_hit_wonders_leave_before_what_is_used_again():
    policy = S3Fifo()
    admit(policy, *range(10))
    for slot in range(5):
        policy.touch(slot)
        policy.touch(slot)
    admit(policy, *range(10, 30))
    gone = [leave(policy) for _ in range(15)]
    assert set(gone).isdisjoint(range(5))


def test_a_single_use_passes_the_sieve():
    policy = S3Fifo()
    admit(policy, 0, 1, 2)
    policy.touch(0)
    assert leave_all(policy) == [1, 2, 0]


def test_what_alone_continues_a_prefix_in_use_is_no_newcomer():
    policy = S3Fifo()
    admit(policy, 0, 1, 2)
    policy.touch(0)
    policy.admit(3, 10, fingerprint(3), after=0)
    policy.admit(4, 10, fingerprint(4), after=3)
    policy.admit(5, 10, fingerprint(5), after=1)
    admit(policy, *range(6, 30))
    order = leave_all(policy)
    assert order[:3] == [1, 2, 5]
    assert {0, 3, 4}.isdisjoint(order[:20])


def test_the_part_for_newcomers_grows_when_they_come_back_and_shrinks_when_others_do():
    policy = S3Fifo()
    admit(policy, *range(100))
    before = policy.small_share
    for _ in range(20):
        admit(policy, leave(policy))
    grown = policy.small_share
    assert before < grown <= 0.9
    while policy._state[policy.candidate()] >> 2 == 0:
        leave(policy)
    for _ in range(5):
        admit(policy, leave(policy))
    assert 0.1 <= policy.small_share < grown


def test_what_left_lately_skips_the_sieve_when_it_comes_back():
    policy = S3Fifo()
    admit(policy, *range(20))
    gone = leave(policy)
    admit(policy, gone)
    admit(policy, *range(20, 40))
    order = leave_all(policy)
    assert order.index(gone) > order.index(25)


def test_what_was_deleted_and_not_evicted_is_a_newcomer_when_it_comes_back():
    policy = S3Fifo()
    admit(policy, *range(20))
    gone = leave(policy, evicted=False)
    admit(policy, gone)
    admit(policy, *range(20, 40))
    order = leave_all(policy)
    assert order.index(gone) < order.index(20)


def fill_main(policy: S3Fifo, *slots: int, size_bytes: int = 10) -> None:
    """Admit *slots* to the main queue: they have left before."""
    for slot in slots:
        admit(policy, slot, size_bytes=size_bytes)
        policy.forget(slot, fingerprint(slot), evicted=True)
        admit(policy, slot, size_bytes=size_bytes)


def test_every_use_gives_another_round_in_the_main_queue_up_to_three():
    policy = S3Fifo()
    fill_main(policy, 0, 1, 2)
    for _ in range(9):
        policy.touch(0)
    policy.touch(1)
    assert leave_all(policy) == [2, 1, 0]


def test_the_main_queue_gives_way_while_newcomers_are_within_their_tenth():
    policy = S3Fifo()
    fill_main(policy, 0, 1, size_bytes=100)
    admit(policy, 2, size_bytes=20)
    assert leave(policy) == 0


def test_newcomers_leave_although_all_of_the_main_queue_is_held():
    policy = S3Fifo()
    fill_main(policy, *range(7), size_bytes=100)
    admit(policy, 7, size_bytes=100)
    for slot in range(7):
        policy.postpone(slot)
    assert leave(policy) == 7


def test_with_every_eviction_one_that_was_held_is_tried_again(policy):
    admit(policy, *range(6))
    policy.postpone(0)
    policy.postpone(1)
    assert leave(policy) == 2
    admit(policy, *range(6, 20))
    order = leave_all(policy)
    assert order.index(0) < order.index(1)
    if isinstance(policy, LRU):
        assert order[:5] == [3, 4, 5, 0, 6]


# --- the parts --------------------------------------------------------------------------


def test_a_queue_lets_go_from_anywhere():
    links = Columns()
    links.cover(9)
    queue = Queue(links)
    for slot in (3, 1, 9, 0):
        queue.push(slot)
    queue.remove(1)
    queue.remove(3)
    queue.remove(0)
    assert (queue.head, queue.tail, queue.count) == (9, 9, 1)
    queue.remove(9)
    assert (queue.head, queue.tail, queue.count) == (NO_SLOT, NO_SLOT, 0)


def test_a_slot_of_another_queue_cannot_be_removed():
    links = Columns()
    links.cover(2)
    first, second = Queue(links), Queue(links)
    first.push(0)
    second.push(1)
    with pytest.raises(AssertionError, match="in this queue"):
        first.remove(1)


def test_a_ghost_is_recognised_once_and_only_within_its_span():
    ghost = Ghost(4)
    ghost.add(fingerprint(1))
    assert not ghost.take(fingerprint(2), 10)
    assert ghost.take(fingerprint(1), 10)
    assert not ghost.take(fingerprint(1), 10)
    ghost.add(fingerprint(1))
    for slot in range(2, 12):
        ghost.add(fingerprint(slot))
    assert not ghost.take(fingerprint(1), 10)


def test_a_ghost_that_grows_forgets_nobody():
    ghost = Ghost(4)
    numbers = range(14)
    for slot in numbers:
        ghost.add(fingerprint(slot) | (slot & 1) << 4)
    ghost.grow(100)
    assert all(ghost.take(fingerprint(slot) | (slot & 1) << 4, 100) for slot in numbers)


def test_a_newer_ghost_takes_the_place_of_an_older_one_that_shares_it():
    ghost = Ghost(4)
    ghost.add(1 << 40 | 5)
    ghost.add(2 << 40 | 5)
    assert not ghost.take(1 << 40 | 5, 10)
    assert ghost.take(2 << 40 | 5, 10)


def test_an_unknown_policy_is_refused():
    with pytest.raises(AssertionError, match="fifo2"):
        make_policy("fifo2")
