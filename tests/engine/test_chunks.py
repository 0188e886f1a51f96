"""Chunk arithmetic that no engine is needed for: joint hits against brute force, runs, windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, strategies as st

from kvstore.connectors.chunks import Group, chunk_runs, joint_hit, window_chunks
from kvstore.transfer.copies import gather
from kvstore.types import Digest

DIGESTS = [Digest(bytes([index]) * 32) for index in range(12)]


class Present:
    """Answers look-ups from a set of chunk numbers, and counts them."""

    def __init__(self, chunks: set[int]) -> None:
        self.chunks = chunks
        self.asked = 0

    def serves(self, end: int, window: int) -> bool:
        return self.chunks.issuperset(range(max(0, end - window) if window else 0, end))

    def lookup(self, digests: Sequence[Digest], *, window: int = 0) -> int:
        self.asked += 1
        ends = range(len(digests), -1, -1)
        return next(end for end in ends if self.serves(end, window))

    def load(self, digests, targets): ...
    def store(self, digests, sources, *, parent=None): ...
    def close(self): ...


chunk_sets = st.sets(st.integers(0, len(DIGESTS) - 1))


@given(st.lists(st.tuples(chunk_sets, st.integers(0, 4)), min_size=1, max_size=4))
def test_the_joint_hit_is_the_longest_that_every_group_serves(layout):
    groups = [Group(Present(chunks), window) for chunks, window in layout]
    ends = range(len(DIGESTS), -1, -1)
    longest = next(
        end for end in ends if all(group.cache.serves(end, group.window) for group in groups)
    )
    assert joint_hit(groups, DIGESTS) == longest


def test_one_group_is_asked_once_and_nothing_is_asked_for_nothing():
    full = Group(Present({0, 1, 2}))
    assert joint_hit([full], DIGESTS) == 3
    assert joint_hit([full], []) == 0
    assert full.cache.asked == 1


@pytest.mark.parametrize(
    ("window_tokens", "chunks"), [(1, 1), (2, 1), (17, 1), (18, 2), (33, 2), (34, 3)]
)
def test_a_window_of_n_tokens_needs_the_chunks_of_n_minus_one(window_tokens, chunks):
    assert window_chunks(window_tokens, 16) == chunks


def test_runs_gather_the_tokens_of_a_chunk_head_by_head():
    kv = np.arange(3 * 8 * 2, dtype=np.uint32).reshape(3, 8, 2)
    heads = np.array([kv[head].ctypes.data for head in range(3)], dtype=np.uint64)
    runs = chunk_runs(heads, token_bytes=8, chunk_tokens=2, chunks=range(1, 3), owner=kv)
    for index, run in zip((1, 2), runs, strict=True):
        chunk = np.empty((3, 2, 2), dtype=np.uint32)
        gather(chunk, run, checksums=False)
        assert np.array_equal(chunk, kv[:, 2 * index : 2 * index + 2])
