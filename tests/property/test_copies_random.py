"""Whatever the shape: gather then scatter is the identity, and no byte outside is touched."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st

from kvstore.hashing import block_digests
from kvstore.limits import KIB
from kvstore.transfer import copies
from kvstore.transfer.copies import Runs
from kvstore.transfer.native import address_of

GUARD = 0xA5
GUARD_SIZE_BYTES = 256
SIZE_MAX_BYTES = 700 * KIB


@st.composite
def layouts(draw):
    """Draw a shape, the order of its runs in memory, and the misalignment of both sides."""
    sizes = st.integers(1, 5000) | st.sampled_from([256, 576, 1024, 4096, 32 * KIB, 65_537])
    piece, inner = draw(sizes), draw(st.integers(1, 20))
    stride = piece + draw(st.sampled_from([0, 1, 64, 1792]))
    run_count = draw(st.integers(0, max(1, min(2000, SIZE_MAX_BYTES // (piece * inner)))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skews = st.sampled_from([0, 64, 16, 1, 37])
    return (piece, inner, stride), rng.permutation(run_count), rng, draw(skews), draw(skews)


def guarded(size_bytes: int, skew: int):
    """Return guard bytes all over, and the part of them to work in, *skew* bytes off a line."""
    memory = np.full(size_bytes + 2 * GUARD_SIZE_BYTES + 128, GUARD, np.uint8)
    start = GUARD_SIZE_BYTES + -(address_of(memory.data) + GUARD_SIZE_BYTES) % 64 + skew
    return memory, memory[start : start + size_bytes]


@settings(deadline=None)
@given(layouts(), st.booleans())
def test_gather_then_scatter_is_the_identity_and_guards_stay(layout, checksums):
    shape, order, rng, flat_skew, piece_skew = layout
    piece, inner, stride = shape
    memory, inside = guarded(order.size * inner * stride, piece_skew)
    inside[:] = rng.integers(0, 256, inside.size, dtype=np.uint8)
    before = memory.copy()
    pieces = inside.reshape(order.size, inner, stride)[:, :, :piece]
    wanted = pieces[order].tobytes()
    starts = np.uint64(address_of(inside.data)) + order.astype(np.uint64) * np.uint64(
        inner * stride
    )
    runs = Runs(starts, *shape, owner=memory)
    guards, flat = guarded(runs.size_bytes, flat_skew)

    gathered = copies.gather(flat, runs, checksums=checksums)
    assert flat.tobytes() == wanted
    assert np.array_equal(memory, before)

    pieces[:] = 0
    scattered = copies.scatter(runs, flat, checksums=checksums)
    assert np.array_equal(memory, before)

    flat[:] = GUARD
    assert (guards == GUARD).all()
    for digests in (gathered, scattered):
        assert (digests is not None) is checksums
        assert digests is None or digests.tolist() == block_digests(wanted).tolist()
