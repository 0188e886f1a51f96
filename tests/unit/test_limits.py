"""Limits: every bound is positive, and those that must fit one another do."""

from __future__ import annotations

from kvstore import limits
from kvstore.hashing import stored_size
from kvstore.protocol import messages as m
from kvstore.protocol.framing import frame

BOUNDS = {name: value for name, value in vars(limits).items() if name.isupper()}


def test_every_bound_is_a_positive_number():
    assert all(isinstance(value, int | float) and value > 0 for value in BOUNDS.values())


def test_minimum_and_maximum_of_a_thing_are_in_order():
    named = [(name, name.replace("_MIN_", "_MAX_")) for name in BOUNDS if "_MIN_" in name]
    pairs = [(low, high) for low, high in named if high in BOUNDS]
    assert len(pairs) >= 4
    assert all(BOUNDS[low] < BOUNDS[high] for low, high in pairs)


def test_the_longest_lookup_fits_one_frame():
    digests = [bytes(32)] * limits.KEYS_PER_REQUEST_MAX
    assert frame(m.Lookup(limits.REQUEST_ID_MAX, limits.DEADLINE_MAX_MS, 0, digests, 4096, True))


def test_the_longest_reserve_fits_one_frame():
    count = limits.KEYS_PER_REQUEST_MAX
    sizes = [limits.CHUNK_SIZE_MAX_BYTES] * count
    assert frame(
        m.Reserve(limits.REQUEST_ID_MAX, 1, 0, [bytes(32)] * count, bytes(32), 0, 1, sizes)
    )


def test_the_longest_list_of_extents_fits_one_frame():
    shard = m.Shard(1023, 1024, limits.ARENA_SIZE_MAX_BYTES, limits.CHUNK_SIZE_MAX_BYTES, 2**64 - 1)
    chunks = [[shard] for _ in range(limits.EXTENTS_PER_REPLY_MAX)]
    assert frame(m.Loaded(limits.REQUEST_ID_MAX, limits.REQUEST_ID_MAX, chunks))


def test_the_longest_list_of_failures_fits_one_frame():
    failure = m.Failure(limits.REQUEST_ID_MAX, 32, "m" * 128)
    assert frame(m.Committed(limits.REQUEST_ID_MAX, [failure] * limits.KEYS_PER_REQUEST_MAX))


def test_a_stored_chunk_still_has_a_32_bit_size():
    assert stored_size(limits.CHUNK_SIZE_MAX_BYTES) < 2**32
