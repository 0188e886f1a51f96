"""Records that cannot be true, alone or together, are dropped and counted, and for good."""

from __future__ import annotations

import pytest

from kvstore.errors import TooLargeError
from kvstore.limits import MIB
from kvstore.store.soundness import apart, within
from kvstore.tiers.host import HostTier
from kvstore.tiers.kept import KeptArena
from kvstore.tiers.record_layout import READY, Owner, ready_body
from kvstore.types import Extent, HeadRange, Root
from tests.support.kept_stores import MANIFEST, KeptStores, bring_back, make_shard, publish
from tests.support.making import make_digests, make_manifest
from tests.support.stores import Engine

DIGESTS = make_digests(6)
OWNER = Owner(pid=7, started=8, pid_space=9)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a store over the kept arena, after ending the one before."""
    stores = KeptStores(tmp_path / "arena")
    yield stores
    stores.close()


@pytest.fixture
def left(start):
    """Return a function that ends a daemon which has left what it was told to."""
    memory = KeptArena(start.path, MIB)
    yield HostTier(memory)
    memory.close()


@pytest.mark.parametrize(
    ("extents", "reason"),
    [
        ([Extent(0, 9000), Extent(8192, 100)], "overlapping"),
        ([Extent(4096, 20_000), Extent(8192, 100), Extent(16384, 100)], "overlapping"),
        ([Extent(100, 100)], "out of bounds"),
        ([Extent(MIB - 4096, 4096)], "out of bounds"),
        ([Extent(2**40, 4096)], "out of bounds"),
        ([Extent(0, 0)], "out of bounds"),
        ([Extent(0, 2**31)], "out of bounds"),
    ],
)
def test_extents_that_cannot_be_are_dropped_and_counted(start, extents, reason):
    tier = HostTier(KeptArena(start.path, MIB))
    tier.records.introduce(MANIFEST.namespace_id(), MANIFEST.encode())
    publish(tier, Extent(512 * 1024, 5000), 99)
    for number, extent in enumerate(extents):
        shard = make_shard(number, extent.size_bytes, MANIFEST.all_heads, Root(1))
        tier.records._write(number + 1, READY, ready_body(extent, shard, number, 0))
    tier.close()
    store = start()
    recovery = bring_back(store)
    assert recovery.left == 1
    assert recovery.dropped == {reason: len(extents)}
    # They are gone for good.
    assert bring_back(start()).dropped == {}


def test_what_is_written_stays_set_aside_where_it_overlaps_what_was_published(start):
    tier = HostTier(KeptArena(start.path, MIB))
    publish(tier, Extent(8192, 5000), 1)
    tier.records.fill(Extent(4096, 6000), OWNER)
    tier.records.fill(Extent(0, 4097), OWNER)
    tier.close()
    store = start()
    recovery = bring_back(store)
    assert recovery.dropped == {"overlapping": 2}
    assert recovery.aside == {OWNER: [Extent(0, 4097)]}


def test_rows_that_do_not_exist_overlap_nothing(left):
    rows = left.records.scan().rows
    assert within(rows, left).tolist() == apart(rows, left).tolist() == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"heads": HeadRange(0, 5)}, "of no known namespace"),
        ({"heads": HeadRange(2, 2)}, "of no known namespace"),
        ({"root": Root(12345)}, "of other bytes"),
    ],
)
def test_shards_that_cannot_be_are_dropped_and_counted(start, changed, reason):
    tier = HostTier(KeptArena(start.path, MIB))
    publish(tier, Extent(0, 5000), 1, **changed)
    publish(tier, Extent(65536, 5000), 2)
    tier.close()
    recovery = bring_back(start())
    assert (recovery.left, recovery.dropped) == (1, {reason: 1})


@pytest.mark.parametrize("introduction", [b"no manifest", b"{}", None])
def test_shards_of_a_namespace_that_is_not_what_it_says_are_dropped(start, introduction):
    tier = HostTier(KeptArena(start.path, MIB))
    other = make_manifest(model="other")
    text = other.encode() if introduction is None else introduction
    tier.records.introduce(MANIFEST.namespace_id(), text)
    publish(tier, Extent(0, 5000), 1)
    tier.close()
    recovery = bring_back(start())
    assert (recovery.left, recovery.dropped) == (0, {"of no known namespace": 1})


def test_namespaces_whose_chunks_no_longer_fit_are_dropped(start, monkeypatch):
    Engine(start(), MANIFEST).put(DIGESTS[:1])
    store = start()

    def refuse(*_: object) -> None:
        raise TooLargeError("too large")

    monkeypatch.setattr(store, "_check_fits", refuse)
    assert bring_back(store).dropped == {"of no known namespace": 1}


def test_a_shard_that_is_there_twice_comes_back_once(start):
    tier = HostTier(KeptArena(start.path, MIB))
    publish(tier, Extent(0, 5000), 1)
    publish(tier, Extent(65536, 5000), 1)
    tier.close()
    store = start()
    recovery = bring_back(store)
    assert recovery.dropped == {"kept twice": 1}
    store.check()
    assert len(store.index) == 1


def test_torn_records_are_counted(start):
    Engine(start(), MANIFEST).put(DIGESTS)
    store = start()
    table = store.host._memory._map
    numbers = store.host.records.scan().numbers
    at = 4096 + 2 * 4 * MIB + int(numbers[2]) * 160 + 20
    table[at] ^= 1
    recovery = bring_back(store)
    assert (recovery.left, recovery.dropped) == (5, {"torn": 1})


def test_all_shards_of_a_chunk_come_back_to_one_tenant(start):
    tier = HostTier(KeptArena(start.path, MIB))
    publish(tier, Extent(0, 5000), 1, heads=HeadRange(0, 2), tenant="anna")
    publish(tier, Extent(65536, 5000), 1, heads=HeadRange(2, 4), tenant="bert")
    tier.close()
    store = start()
    assert bring_back(store).left == 2
    shares = store.residents.shares
    assert [shares.used_bytes(tenant) for tenant in range(3)] == [0, 4 * 4096, 0]


def test_namespaces_without_chunks_are_not_opened(start):
    store = start()
    engine = Engine(store, MANIFEST)
    engine.put(DIGESTS)
    store.delete(engine.space, DIGESTS)
    store = start()
    assert bring_back(store).left == 0
    assert store.index.namespaces == []
