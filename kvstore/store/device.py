"""Room in the device tier: for engines that fill it themselves, and chunks that leave for others.

What is there alone never leaves by itself: it is copied to the host tier first, in the
background. Who finds no room meanwhile is given some in the host tier. What engines load from
there again and again comes up, see `device_promotion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from kvstore.limits import DEMOTIONS_AHEAD_MAX
from kvstore.store.device_promotion import Promotions
from kvstore.store.shards import ShardRecord, tiers_with
from kvstore.tiers.base import ShardKey
from kvstore.types import NO_SLOT, Extent, HeadRange, Root, TierKind

if TYPE_CHECKING:
    from kvstore.store.leases import Reservation
    from kvstore.store.shelves import Shelves
    from kvstore.store.store import Loading
    from kvstore.tiers.device import DeviceTier
    from kvstore.tiers.guard import GuardedTier

_DEVICE: Final = TierKind.DEVICE


class DeviceRoom:
    """The pool's extents, those of chunks and those that are being filled.

    *bring* copies a shard to the host tier when nothing else is to do.
    """

    def __init__(
        self, store: Shelves, guard: GuardedTier, bring: Callable[[int, HeadRange], bool]
    ) -> None:
        self.tier: Final[DeviceTier] = guard.tier  # type: ignore[assignment]  # as its kind says
        self._guard = guard
        self._store = store
        self._index = store.index
        self._bring = bring
        self._residents = store.slower.residents[_DEVICE]
        store.slower.let_go[_DEVICE] = self.tier.forget
        self.promotions: Final = Promotions(store, guard, self._take_for_promotion)

    def take(self, tenant: int, size_bytes: int) -> Extent | None:
        """Return room, evicting what is kept elsewhere, too; None while there is none."""
        extent, victim = self._make_room(tenant, size_bytes, self._is_alone)
        if victim != NO_SLOT:
            self._demote_from(victim)
        self.tier.counters.reserve_chunks_no_space += extent is None
        return extent

    def free(self, extent: Extent) -> None:
        """Take back room that nothing was published in."""
        self.tier.free(extent)

    def publish(self, record: Reservation, root: Root) -> None:
        """Publish a shard that an engine has put into its room, and have it copied down."""
        index, slower, heads = self._index, self._store.slower, record.heads
        slot = record.space.find(record.digest)
        if slot != NO_SLOT and self._store.has_shard(slot, heads, index.usable):
            # Shards cut otherwise got there first: it would only take up room.
            self.tier.free(record.extent)
            return
        shard = ShardRecord(heads, Extent(0, record.extent.size_bytes), root, _DEVICE)
        above = NO_SLOT if record.parent is None else record.space.find(record.parent)
        if slot == NO_SLOT:
            slot = slower.add(record.space, record.digest, above, shard, record.tenant)
        else:
            stale = [one for one in index.shards(slot) if one.heads == heads and one.root != root]
            slower.entered(slot, shard, _DEVICE, shard.place)
            self._store.forget_slower(slot, stale)
            if above != NO_SLOT:
                index.adopt(slot, above)
        self.tier.keep(ShardKey(record.space.id, record.digest, heads), record.extent)
        self.tier.counters.stored_chunks += 1
        self.tier.counters.stored_bytes += shard.size_bytes
        self._bring(slot, heads)

    def place_of(self, slot: int, shard: ShardRecord) -> Extent:
        """Return where in the pool *shard* lies, which *slot* has there."""
        place = self.tier.place_of(self._key_of(slot, shard))
        assert place is not None, "what the index knows to be in the pool is there"
        return place

    def loaded(
        self, loading: Loading, slots: Sequence[int], chunks: Sequence[Sequence[ShardRecord]]
    ) -> None:
        """Note that an engine with the pool reads *chunks* of *slots*, here or in the host tier."""
        counters = self.tier.counters
        for slot, chunk in zip(reversed(slots), reversed(chunks), strict=True):
            here = [shard.size_bytes for shard in chunk if loading.is_pooled(shard)]
            if here:
                self._residents.touch(slot)
                counters.loaded_chunks += 1
                counters.loaded_bytes += sum(here)
        self.promotions.loaded(loading, slots, chunks)

    def demote_all(self) -> None:
        """Have all that is here alone copied down, as far as the queue is long enough."""
        for slot in self._index.slots():
            if self._index.tiers_of(slot) & _DEVICE:
                self._demote(slot)

    def check(self, unpublished: Iterable[Extent]) -> None:
        """Raise `AssertionError` unless the pool has what the index says, and *unpublished*."""
        self.tier.check(unpublished, sum(len(self._here(slot)) for slot in self._index.slots()))
        for slot in self._index.slots():
            for shard in self._here(slot):
                place = self.place_of(slot, shard)
                assert place.size_bytes == shard.size_bytes, f"slot {slot} in the pool"

    def _make_room(
        self, tenant: int, size_bytes: int, is_spared: Callable[[int], bool]
    ) -> tuple[Extent | None, int]:
        """Return room, evicting where needed, or None and who of the spared ones is in the way."""
        extent = self.tier.allocate(size_bytes) if self._guard.is_usable else None
        freed_bytes = 0
        # Beyond twice the need, holes are too small: more of them would not help.
        while extent is None and self._guard.is_usable and freed_bytes <= 2 * size_bytes:
            victim = self._residents.next_victim(tenant, size_bytes, self._bytes_of, is_spared)
            if victim == NO_SLOT or is_spared(victim):
                return None, victim
            freed_bytes += self._bytes_of(victim)
            self._store.slower.left(victim, _DEVICE, evicted=True)
            self._guard.counters.evict_chunks += 1
            extent = self.tier.allocate(size_bytes)
        return extent, NO_SLOT

    def _take_for_promotion(
        self, tenant: int, size_bytes: int, is_spared: Callable[[int], bool]
    ) -> Extent | None:
        """Return room that nobody has to be copied down for; those *is_spared* names stay."""
        extent, _ = self._make_room(
            tenant, size_bytes, lambda slot: self._is_alone(slot) or is_spared(slot)
        )
        return extent

    def _key_of(self, slot: int, shard: ShardRecord) -> ShardKey:
        space, digest = self._index.space_of(slot), self._index.digest(slot)
        return ShardKey(space.id, digest, shard.heads)

    def _bytes_of(self, slot: int) -> int:
        return self._store.slower.bytes_of(slot, _DEVICE)

    def _alone(self, slot: int) -> list[ShardRecord]:
        """Return the shards of *slot* that could be read nowhere else."""
        shards, others = self._index.shards(slot), self._index.usable & ~_DEVICE
        here = self._here(slot)
        return [shard for shard in here if not tiers_with(shards, shard.heads) & others]

    def _here(self, slot: int) -> list[ShardRecord]:
        return [shard for shard in self._index.shards(slot) if shard.tiers & _DEVICE]

    def _is_alone(self, slot: int) -> bool:
        return bool(self._alone(slot))

    def _demote_from(self, slot: int) -> None:
        """Have the end of a prefix copied down, and some of what is before it."""
        for _ in range(DEMOTIONS_AHEAD_MAX):
            if slot != NO_SLOT:
                self._demote(slot)
                slot = self._index.tree.parent(slot)

    def _demote(self, slot: int) -> None:
        for shard in self._alone(slot):
            self._bring(slot, shard.heads)
