"""Scenes of what is encoded before it is known how long it becomes; see `tests.support.device`."""

from __future__ import annotations

import numpy as np

from kvstore.compression.container import open_container
from kvstore.gpu.lanes import StoreLane
from kvstore.gpu.transfers import Encoding, Room
from kvstore.hashing import block_count
from tests.support.device import PAGES, PAGES_PER_CHUNK, RUBBISH, World

Expected = list[tuple[np.ndarray, int]]
"""What each chunk is stored as, and its place in the arena."""


def measured_scene(
    world: World, lane: StoreLane, *, reuse_waits: bool = True, transfers: int = 4
) -> bool:
    """Store what is being computed: two transfers are encoded while those before them are copied.

    The engine overwrites pages as soon as it may; the host reads the arena as soon as it may.
    """
    encoded: list[tuple[Encoding, Expected]] = []
    delivered: list[tuple[Encoding, Expected]] = []
    good = True

    def deliver() -> bool:
        encoding, expected = encoded.pop(0)
        encoding.measured()
        delivered.append((encoding, expected))
        encoding.deliver([Room(world.place(at).ctypes.data, len(one)) for one, at in expected])
        return spans_are_right(encoding, expected)

    def finish() -> bool:
        encoding, expected = delivered.pop(0)
        encoding.finish()
        return all(has_arrived(world, encoding, n, *one) for n, one in enumerate(expected))

    for number in range(transfers):
        while not lane.can_begin or len(encoded) == 2:
            good &= deliver() if encoded else finish()
        chosen = world.rng.permutation(PAGES)[: 2 * PAGES_PER_CHUNK].reshape(2, -1).tolist()
        contents = [world.content() for _ in chosen]
        for content, pages in zip(contents, chosen, strict=True):
            world.write(content, pages)
        places = [(2 * number) % 8, (2 * number + 1) % 8]
        chunks = [world.moved(pages, at) for pages, at in zip(chosen, places, strict=True)]
        encoding = lane.encode(chunks, world.fence(), world.form)
        stored = [world.stored(content)[0] for content in contents]
        encoded.append((encoding, list(zip(stored, places, strict=True))))
        if reuse_waits:
            assert encoding.pages_free is not None
            world.compute.wait(encoding.pages_free)
        for pages in chosen:
            world.write(world.content(), pages)
    while encoded:
        good &= deliver()
    while delivered:
        good &= finish()
    return good


def has_arrived(world: World, encoding: Encoding, number: int, stored: np.ndarray, at: int) -> bool:
    """Whether chunk *number* is in its place, and nothing beside it; the place is used again."""
    place, head = world.place(at), world.form.head_bytes
    good = bool(np.array_equal(place[head : len(stored)], stored[head:]))
    good &= bool((place[len(stored) :] == RUBBISH).all())
    # What the device has digested of a chunk's first block was not its head.
    found = encoding.digests_of(number)
    good &= found is not None and len(found) == block_count(len(stored))
    place[:] = RUBBISH  # sent to a tier, evicted, and used again
    return good


def sizes_scene(world: World, lane: StoreLane) -> bool:
    """Encode one chunk, look at nothing but where its sections are to lie, and store nothing."""
    content = world.content()
    world.write(content, [1, 2])
    encoding = lane.encode([world.moved([1, 2], 0)], world.fence(), world.form)
    encoding.measured()
    good = spans_are_right(encoding, [(world.stored(content)[0], 0)])
    encoding.finish()
    return good and lane.can_begin and not world.counters.encoded_chunks


def spans_are_right(encoding: Encoding, expected: Expected) -> bool:
    """Whether sections are where the host would have put them."""
    assert encoding.spans is not None
    return all(
        spans.tolist() == [(one.offset, one.size_bytes) for one in open_container(stored).sections]
        for spans, (stored, _) in zip(encoding.spans, expected, strict=True)
    )
