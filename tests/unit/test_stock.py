"""What a durable tier has kept comes into the index: as if it had been learned one by one."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.hashing import block_digests, root_of
from kvstore.limits import MIB
from kvstore.metrics import Counters
from kvstore.protocol.manifest import encode_namespace
from kvstore.store.quota import Share, Shares
from kvstore.store.shelves import SlowTier
from kvstore.store.stock import Stock, take_stock
from kvstore.store.store import Store
from kvstore.tiers.base import Recovered, RecoveredRun, Shard, ShardKey
from kvstore.tiers.host import HostTier
from kvstore.transfer.arena import Arena
from kvstore.types import NO_SLOT, HeadRange, Place, TierKind
from tests.support.making import loose_digest, make_digests, make_manifest

DISK = TierKind.DISK
MANIFEST, OTHER = make_manifest(), make_manifest(model="other")
LOWER = HeadRange(0, 2)


class Kept:
    """All of a durable tier that taking stock asks for."""

    kind = DISK

    def __init__(self, manifests, found, at_once: int) -> None:
        self._manifests, self._found, self._at_once = manifests, found, at_once

    def manifests(self):
        return {m.namespace_id(): encode_namespace(m, "") for m in self._manifests}

    def recover(self):
        """Yield what was found in runs, as the disk does: so many looked at at once."""
        for start in range(0, len(self._found), self._at_once):
            runs: dict[tuple, list[Recovered]] = {}
            for one in self._found[start : start + self._at_once]:
                runs.setdefault((one.shard.key.namespace, one.shard.key.heads), []).append(one)
            for (namespace, heads), those in runs.items():
                yield RecoveredRun(
                    namespace,
                    heads,
                    [one.shard.key.digest for one in those],
                    [one.shard.parent for one in those],
                    np.array([one.shard.size_bytes for one in those], np.uint32),
                    np.array([one.shard.root for one in those], np.uint64),
                    np.array([one.place for one in those], np.uint64),
                )


def found(manifest, digest, parent=None, *, heads=None, size=100, number=0) -> Recovered:
    key = ShardKey(manifest.namespace_id(), digest, heads or manifest.all_heads)
    root = root_of(block_digests(digest))
    return Recovered(Shard(key, parent, size, root), Place(1000 + number))


def make_store(eviction: str = "s3fifo") -> Store:
    disk = SlowTier(DISK, eviction, Shares("disk", MIB * 100, [Share("")]))
    return Store(
        HostTier(Arena.create(MIB)),
        eviction="lru",
        lease_ttl_seconds=1.0,
        counters=Counters(),
        slower=[disk],
    )


def take(store: Store, those, manifests=(MANIFEST, OTHER), at_once: int = 1000) -> Stock:
    taken = take_stock(store, Kept(manifests, those, at_once))
    store.check()
    return taken


def seen(store: Store, manifest) -> dict:
    """What the store knows of each chunk of *manifest*: shards, chunk before, children."""
    index, space = store.index, store.enter(manifest)
    return {
        digest: (
            [shard[:1] + shard[2:] + (shard.size_bytes,) for shard in index.shards(slot)],
            index.parent_digest(slot),
            [index.digest(child) for child in index.tree.children(slot, DISK)],
        )
        for digest, slot in sorted((space.ready | space.partial).items())
    }


def leaving(store: Store) -> list:
    """Return the digests of all chunks on disk in the order in which they leave."""
    order = []
    while (slot := store.slower.next_victim(DISK, 0, 1)) != NO_SLOT:
        order.append(store.index.digest(slot))
        store.slower.left(slot, DISK, evicted=True)
    store.check()
    return order


def prompts(seed: int) -> list[Recovered]:
    """Branching prefixes of two models, shards among them, some before their parents."""
    rng = np.random.default_rng(seed)
    kept: list[Recovered] = []
    for manifest in (MANIFEST, OTHER):
        known = [None]
        for number in range(60):
            digest, parent = loose_digest(number), known[-1 - rng.integers(min(6, len(known)))]
            heads = LOWER if rng.random() < 0.1 else None
            kept.append(found(manifest, digest, parent, heads=heads, number=number))
            known.append(digest)
    for _ in range(15):
        first, second = rng.integers(len(kept), size=2)
        kept[first], kept[second] = kept[second], kept[first]
    return kept


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
@pytest.mark.parametrize("seed", [1, 2])
def test_stock_is_the_same_however_much_is_taken_at_once(eviction, at_once, seed):
    kept = prompts(seed)
    one_by_one = make_store(eviction)
    spaces = {m.namespace_id(): one_by_one.enter(m) for m in (MANIFEST, OTHER)}
    for one in kept:
        one_by_one.slower.learn(spaces[one.shard.key.namespace], DISK, one, tenant=0)
    for one in kept:
        space = spaces[one.shard.key.namespace]
        slot = space.find(one.shard.key.digest)
        above = NO_SLOT if one.shard.parent is None else space.find(one.shard.parent)
        if above != NO_SLOT:
            one_by_one.index.adopt(slot, above)
    store = make_store(eviction)
    assert take(store, kept, at_once=at_once) == (len(kept), 0)
    for manifest in (MANIFEST, OTHER):
        known, expected = seen(store, manifest), seen(one_by_one, manifest)
        # Children that came late may stand in another order among their siblings.
        for shown in (known, expected):
            for _, _, children in shown.values():
                children.sort()
        assert known == expected
    assert sorted(leaving(store)) == sorted(leaving(one_by_one))


def test_what_was_stored_in_order_is_found_by_runs_and_leaves_from_its_end():
    digests = make_digests(40)
    kept = [
        found(MANIFEST, digest, digests[number - 1] if number else None, number=number)
        for number, digest in enumerate(digests)
    ]
    store = make_store()
    take(store, kept)
    space = store.enter(MANIFEST)
    slots = store.index.leading(space, digests)
    assert slots == list(range(slots[0], slots[0] + 40))
    assert [store.index.shards(slot)[0].place for slot in slots] == [1000 + n for n in range(40)]
    assert leaving(store) == digests[::-1]


def test_chunks_that_claim_to_come_after_each_other_end_in_no_circle():
    first, second = loose_digest(1), loose_digest(2)
    store = make_store()
    take(store, [found(MANIFEST, first, second), found(MANIFEST, second, first)])
    assert len(leaving(store)) == 2


def test_what_comes_twice_is_there_once():
    one, other = found(MANIFEST, loose_digest(1)), found(MANIFEST, loose_digest(2))
    store = make_store()
    assert take(store, [one, other, one, other]).shards == 4
    assert len(leaving(store)) == 2


def test_what_does_not_fit_the_manifest_or_has_none_is_left_where_it_is():
    kept = [
        found(MANIFEST, loose_digest(1), heads=HeadRange(0, 9)),
        found(MANIFEST, loose_digest(2), size=2**31),
        found(MANIFEST, loose_digest(3)),
        found(OTHER, loose_digest(4)),
    ]
    store = make_store()
    assert take(store, kept, manifests=[MANIFEST]) == (1, 1)
    assert list(store.enter(MANIFEST).ready) == [loose_digest(3)]


def test_stores_go_on_behind_what_was_taken_in():
    store = make_store()
    take(store, [found(MANIFEST, loose_digest(n)) for n in range(10)])
    space = store.enter(MANIFEST)
    for number in range(10, 5000):
        store.slower.learn(space, DISK, found(MANIFEST, loose_digest(number)), tenant=0)
    store.check()
    assert len(space.ready) == 5000
