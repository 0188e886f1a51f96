"""Look-ups of prefixes whose chunks lie in consecutive slots, and of those that do not."""

import hashlib

import pytest

from kvstore.protocol.manifest import Manifest
from kvstore.store.index import Index
from kvstore.store.namespace import Namespace
from kvstore.store.shards import ShardRecord
from kvstore.types import NO_SLOT, Digest, Extent, HeadRange, Root

LENGTH = 200


def manifest(model: str) -> Manifest:
    return Manifest(
        model=model,
        revision="1",
        dtype="bfloat16",
        layers=1,
        kv_heads=2,
        head_dim=8,
        chunk_tokens=16,
    )


def digests(count: int, name: str = "a") -> list[Digest]:
    return [Digest(hashlib.sha256(f"{name}{at}".encode()).digest()) for at in range(count)]


def shard(start: int = 0, stop: int = 2) -> ShardRecord:
    return ShardRecord(HeadRange(start, stop), Extent(0, 4096), Root(0))


def add(index: Index, space: Namespace, chunks: list[Digest]) -> list[int]:
    return [index.add(space, digest, NO_SLOT, shard()) for digest in chunks]


@pytest.mark.parametrize("asked", [1, 2, 63, 64, 65, 128, 129, LENGTH])
def test_a_prefix_stored_in_order_is_found_in_full(asked: int) -> None:
    index = Index()
    space = index.open_namespace(manifest("m"))
    slots = add(index, space, digests(LENGTH))
    assert index.leading(space, digests(asked)) == slots[:asked]
    index.check()


def test_a_prefix_stored_in_any_order_is_found_in_full() -> None:
    index = Index()
    space = index.open_namespace(manifest("m"))
    chunks = digests(LENGTH)
    order = sorted(range(LENGTH), key=lambda at: at * 7 % LENGTH + at % 7 / 10)
    slots = {at: index.add(space, chunks[at], NO_SLOT, shard()) for at in order}
    assert index.leading(space, chunks) == [slots[at] for at in range(LENGTH)]


def test_a_prefix_stored_in_two_parts_is_found_in_full() -> None:
    index = Index()
    space = index.open_namespace(manifest("m"))
    first = add(index, space, digests(100))
    add(index, space, digests(10, "other"))
    second = add(index, space, digests(LENGTH)[100:])
    assert index.leading(space, digests(LENGTH)) == first + second


@pytest.mark.parametrize("gap", [0, 1, 63, 64, 65, 130, LENGTH - 1])
def test_a_gap_ends_the_prefix_wherever_it_is(gap: int) -> None:
    index = Index()
    space = index.open_namespace(manifest("m"))
    slots = add(index, space, digests(LENGTH))
    index.remove(slots[gap])
    assert index.leading(space, digests(LENGTH)) == slots[:gap]
    index.check()


def test_a_chunk_without_all_heads_ends_the_prefix() -> None:
    index = Index()
    space = index.open_namespace(manifest("m"))
    chunks = digests(LENGTH)
    slots = add(index, space, chunks[:70])
    partial = index.add(space, chunks[70], NO_SLOT, shard(0, 1))
    rest = add(index, space, chunks[71:])
    assert index.leading(space, chunks) == slots
    index.add_shard(partial, shard(1, 2))
    assert index.leading(space, chunks) == [*slots, partial, *rest]
    index.check()


def test_the_next_slot_in_another_namespace_is_not_taken_for_the_next_chunk() -> None:
    index = Index()
    space = index.open_namespace(manifest("m"))
    other = index.open_namespace(manifest("n"))
    chunks = digests(LENGTH)
    slots = add(index, space, chunks[:80])
    add(index, other, chunks[80:])
    assert index.leading(space, chunks) == slots
    assert index.leading(other, chunks) == []


def test_nothing_asked_is_nothing_found() -> None:
    index = Index()
    assert index.leading(index.open_namespace(manifest("m")), []) == []


@pytest.mark.parametrize("count", [0, 1, 7, 8, LENGTH])
def test_every_slot_has_its_tier(count: int) -> None:
    index = Index()
    space = index.open_namespace(manifest("m"))
    slots = add(index, space, digests(count))
    assert index.tiers(slots) == bytes([2]) * count
