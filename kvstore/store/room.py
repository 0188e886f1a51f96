"""Room in the host tier: extents given and taken back, and chunks that leave to make some.

`publish` and `vacate` are the only two places where a chunk enters or leaves the host tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvstore.protocol.manifest import encode_namespace
from kvstore.store.history import Fate
from kvstore.store.planner import cheapest_window
from kvstore.store.shards import whole_bytes
from kvstore.store.soundness import tenant_mark
from kvstore.tiers.base import Shard, ShardKey
from kvstore.types import NO_SLOT, Digest, Extent, TierKind

if TYPE_CHECKING:
    from kvstore.metrics import Counters
    from kvstore.store.history import History
    from kvstore.store.index import Index
    from kvstore.store.namespace import Namespace
    from kvstore.store.residence import Residents
    from kvstore.store.shards import ShardRecord
    from kvstore.tiers.host import HostTier

_HOST = TierKind.HOST


class HostRoom:
    """The arena's extents: those of chunks, and those that are being filled.

    *unpublished* lists the extents that are no chunk's. Every extent is charged to a tenant
    for as long as it is out.
    """

    def __init__(
        self,
        index: Index,
        host: HostTier,
        residents: Residents,
        counters: Counters,
        history: History,
        unpublished: Callable[[], Iterable[Extent]],
    ) -> None:
        self.is_wanted: Callable[[int], bool] | None = None
        # Told of every shard that has come into the host tier, and every chunk that has left it.
        self.on_change: Callable[[Namespace, Digest], None] | None = None
        self._index = index
        self._host = host
        self._residents = residents
        self._counters = counters
        self._history = history
        self._unpublished = unpublished

    def take(self, tenant: int, size_bytes: int) -> Extent | None:
        """Return room, evicting in the policy's order, then by the cheapest window.

        Chunks of different sizes can leave holes that are each too small; once twice the
        need was freed in vain, clearing one window is cheaper than going on.
        """
        need = self._host.footprint(size_bytes)
        shares = self._residents.shares
        has_quota = shares.quota_bytes(tenant) < shares.capacity_bytes
        while has_quota and shares.is_over(tenant, need):
            if not self._evict_for(tenant, need, Fate.EVICTED_FOR_QUOTA):
                return None
        extent = self._host.allocate(size_bytes)
        freed_bytes = 0
        while extent is None:
            freed = 0 if freed_bytes > 2 * size_bytes else self._evict_for(tenant, need)
            if not freed:
                cleared = self._clear_window(tenant, size_bytes)
                extent = self._host.allocate(size_bytes) if cleared else None
                break
            freed_bytes += freed
            extent = self._host.allocate(size_bytes)
        if extent is not None:
            shares.charge(tenant, need)
        return extent

    def give_back(self, tenant: int, extent: Extent) -> None:
        """Take *extent*, charged to *tenant*, back."""
        self._residents.shares.refund(tenant, self._host.footprint(extent.size_bytes))
        self._host.free(extent)

    def publish(self, slot: int, shard: ShardRecord) -> None:
        """Note that *shard* of *slot* has come into the host tier, as the index says already."""
        assert shard.is_in_host, "the index knows it to be here"
        space = self._index.space_of(slot)
        self._residents.gained(space, shard)
        here = sum(other.is_in_host for other in self._index.shards(slot))
        if here == 1:
            self._residents.admit(slot, whole_bytes(shard, space.manifest.kv_heads))
        if self.on_change is not None:
            self.on_change(space, self._index.digest(slot))

    def record(self, slot: int, shard: ShardRecord, parent: Digest | None) -> None:
        """Note for a restart what the extent of *shard*, of *slot*, holds from now on.

        The chunk *parent* may be one that comes later.
        """
        if self._host.records is None:
            return
        index = self._index
        space, tenant = index.space_of(slot), index.tenant_of(slot)
        self._host.publish(
            shard.extent,
            Shard(
                ShardKey(space.id, index.digest(slot), shard.heads),
                index.parent_digest(slot) if parent is None else parent,
                shard.size_bytes,
                shard.root,
            ),
            lambda: encode_namespace(space.manifest, space.tenant),
            tenant_mark(self._residents.shares.shares[tenant].tenant),
        )

    def vacate(self, slot: int, *, evicted: bool) -> list[ShardRecord]:
        """Let *slot* leave the host tier and free its extents; return the shards that were here.

        Where it is in no slower tier, it is gone.
        """
        tenant = self._index.tenant_of(slot)
        self._residents.forget(slot, evicted=evicted)
        space, digest = self._index.space_of(slot), self._index.digest(slot)
        shards = self._index.lose(slot, _HOST)
        self._residents.gave(space, shards)
        if self.on_change is not None:
            self.on_change(space, digest)
        for shard in shards:
            self.give_back(tenant, shard.extent)
        return shards

    def evict(self, slot: int, fate: Fate = Fate.EVICTED_FOR_ROOM) -> int:
        """Let *slot* leave for others, and return how many bytes that made free."""
        self._history.note(self._index.space_of(slot), self._index.digest(slot), fate, _HOST)
        if self.is_wanted is not None and self.is_wanted(slot):
            self._counters.demote_chunks_dropped += 1
        shards = self.vacate(slot, evicted=True)
        freed_bytes = sum(shard.size_bytes for shard in shards)
        self._counters.evict_chunks += 1
        self._counters.evict_bytes += freed_bytes
        return freed_bytes

    def footprint_of(self, slot: int) -> int:
        """Return what *slot* takes up here."""
        shards = self._index.shards(slot)
        return sum(self._host.footprint(s.size_bytes) for s in shards if s.is_in_host)

    def next_victim(self, tenant: int, need_bytes: int) -> int:
        """Return who leaves next for *tenant*, whether wanted elsewhere or not, or `NO_SLOT`."""
        return self._residents.next_victim(tenant, need_bytes, self.footprint_of)

    def extents(self) -> Iterable[tuple[Extent, int]]:
        """Yield every extent in use, with its slot, or `NO_SLOT` when it is not published."""
        for slot in self._index.slots():
            for shard in self._index.shards(slot):
                if shard.is_in_host:
                    yield shard.extent, slot
        for extent in self._unpublished():
            yield extent, NO_SLOT

    def _evict_for(self, tenant: int, need_bytes: int, fate: Fate = Fate.EVICTED_FOR_ROOM) -> int:
        """Evict one chunk, what is wanted elsewhere behind what is not; return the bytes freed."""
        victim = self._residents.next_victim(tenant, need_bytes, self.footprint_of, self.is_wanted)
        return 0 if victim == NO_SLOT else self.evict(victim, fate)

    def _clear_window(self, tenant: int, size_bytes: int) -> bool:
        need = self._host.footprint(size_bytes)
        extents = list(self.extents())
        cleared = cheapest_window(
            [extent.offset for extent, _ in extents],
            [self._host.footprint(extent.size_bytes) for extent, _ in extents],
            [not self._may_go(slot, tenant, need) for _, slot in extents],
            need,
            self._host.usage().capacity_bytes,
        )
        if cleared is None:
            return False
        for slot in {extents[position][1] for position in cleared}:
            self.evict(slot, Fate.EVICTED_FOR_WINDOW)
        return True

    def _may_go(self, slot: int, writer: int, need_bytes: int) -> bool:
        """Return whether a window for *writer* may clear *slot*.

        A window clears up to twice its size, so that others give only what they can spare of it.
        """
        if slot == NO_SLOT or self._index.is_held(slot):
            return False
        owner, shares = self._index.tenant_of(slot), self._residents.shares
        return owner == writer or shares.spare_bytes(owner) >= 2 * need_bytes
