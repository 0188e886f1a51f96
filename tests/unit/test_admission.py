"""Admissions: what enters a slower tier, what is remembered, and how much memory that takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from kvstore.limits import ADMISSION_ENTRIES_MAX, GIB, MIB, TIB
from kvstore.store.admission import Bloom, SecondTouch, TinyLFU, make_admission

CAPACITY_BYTES = GIB
CHUNK_BYTES = MIB

fingerprints = st.integers(0, 2**64 - 1)


def marks(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64).tolist()


@pytest.fixture(params=["all", "second_touch", "tinylfu"])
def admission(request):
    return make_admission(request.param, CAPACITY_BYTES)


def test_what_is_used_often_enters_everywhere(admission):
    often, once = marks(2)
    for _ in range(5):
        admission.note(often, CHUNK_BYTES)
    admission.note(once, CHUNK_BYTES)
    assert admission.admits(often)
    assert admission.admits(often, once)


def test_asking_changes_nothing(admission):
    mark, victim = marks(2)
    admission.note(mark, CHUNK_BYTES)
    answers = {(admission.admits(mark), admission.admits(mark, victim)) for _ in range(20)}
    assert len(answers) == 1


def test_an_unknown_admission_is_refused():
    with pytest.raises(AssertionError, match="lfu2"):
        make_admission("lfu2", 1)


# --- second touch -----------------------------------------------------------------------


def test_the_first_use_is_not_enough_and_the_second_is():
    admission = SecondTouch(CAPACITY_BYTES)
    mark, other = marks(2)
    admission.note(mark, CHUNK_BYTES)
    assert not admission.admits(mark)
    admission.note(mark, CHUNK_BYTES)
    assert admission.admits(mark)
    assert not admission.admits(other)


def test_a_second_use_counts_within_a_capacity_of_others_and_not_after_two():
    admission = SecondTouch(CAPACITY_BYTES)
    near, far, *others = marks(5000)
    for other in others[:900]:
        admission.note(other, CHUNK_BYTES)
    admission.note(near, CHUNK_BYTES)
    for other in others[900:1800]:
        admission.note(other, CHUNK_BYTES)
    admission.note(near, CHUNK_BYTES)
    assert admission.admits(near)
    admission.note(far, CHUNK_BYTES)
    for other in others[1800:4000]:
        admission.note(other, CHUNK_BYTES)
    admission.note(far, CHUNK_BYTES)
    assert not admission.admits(far)


def test_a_flood_of_tiny_chunks_is_forgotten_and_not_taken_for_known():
    admission = SecondTouch(CAPACITY_BYTES)
    wrong = 0
    for mark in marks(20_000):
        admission.note(mark, 1)
        wrong += admission.admits(mark)
    assert wrong < 20_000 * 0.1


# --- TinyLFU ----------------------------------------------------------------------------


def test_everything_enters_while_there_is_room():
    assert TinyLFU(CAPACITY_BYTES).admits(1, None)


def test_a_newcomer_has_to_be_used_more_often_than_its_victim():
    admission = TinyLFU(CAPACITY_BYTES)
    newcomer, victim = marks(2)
    for mark in (newcomer, victim):
        admission.note(mark, CHUNK_BYTES)
    assert not admission.admits(newcomer, victim)
    admission.note(newcomer, CHUNK_BYTES)
    assert admission.admits(newcomer, victim)
    assert not admission.admits(victim, newcomer)


def test_counts_end_somewhere_and_are_halved_in_time():
    admission = TinyLFU(CAPACITY_BYTES)
    mark, *others = marks(11_000)
    for _ in range(50):
        admission.note(mark, CHUNK_BYTES)
    assert admission.estimate(mark) == 16
    for other in others[: 10 * 1024 - 49]:
        admission.note(other, CHUNK_BYTES)
    assert admission.estimate(mark) < 16


def test_yesterdays_favourite_gives_way():
    admission = TinyLFU(CAPACITY_BYTES)
    yesterday, today = marks(2)
    for _ in range(15):
        admission.note(yesterday, CHUNK_BYTES)
    for round_ in range(6):
        for other in marks(10 * 1024, seed=round_ + 1):
            admission.note(other, CHUNK_BYTES)
    for _ in range(4):
        admission.note(today, CHUNK_BYTES)
    assert admission.admits(today, yesterday)


@given(st.lists(st.integers(0, 30), max_size=200))
def test_an_estimate_is_never_below_the_count(uses):
    admission = TinyLFU(CAPACITY_BYTES)
    names = marks(31)
    for use in uses:
        admission.note(names[use], CHUNK_BYTES)
    for number, name in enumerate(names):
        assert admission.estimate(name) >= min(uses.count(number), 15)


def test_estimates_of_a_full_sketch_are_mostly_right():
    admission = TinyLFU(CAPACITY_BYTES)
    names = marks(1024)
    for name in names:
        for _ in range(3):
            admission.note(name, CHUNK_BYTES)
    assert sum(admission.estimate(name) == 3 for name in names) > 0.95 * len(names)


# --- memory -----------------------------------------------------------------------------


@given(st.lists(fingerprints, max_size=100))
def test_a_bloom_filter_forgets_nothing_until_it_is_cleared(members):
    bloom = Bloom(1024)
    for member in members:
        bloom.add(member)
    assert all(member in bloom for member in members)
    assert bloom.count <= len(set(members))
    bloom.clear()
    assert not any(member in bloom for member in members)


def test_a_full_bloom_filter_takes_few_for_members_that_are_not():
    bloom = Bloom(4096)
    for mark in marks(4096):
        bloom.add(mark)
    assert sum(mark in bloom for mark in marks(10_000, seed=1)) < 400


@pytest.mark.parametrize("capacity_bytes", [1, MIB, GIB, TIB, 2**60])
@pytest.mark.parametrize("name", ["second_touch", "tinylfu"])
def test_memory_is_bounded_whatever_the_capacity(name, capacity_bytes):
    admission = make_admission(name, capacity_bytes)
    if isinstance(admission, SecondTouch):
        filters = [*admission._once, *admission._again]
        size_bytes = sum(len(bloom._bits) for bloom in filters)
    else:
        size_bytes = sum(map(len, admission._rows)) + len(admission._doorkeeper._bits)
    assert size_bytes <= 5 * ADMISSION_ENTRIES_MAX == 5 * MIB
