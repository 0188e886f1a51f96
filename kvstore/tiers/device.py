"""The device tier: a pool of a GPU's memory, which engines on that GPU map and fill themselves.

The daemon hands out its extents, copies chunks from there to the host tier, and hot ones from
the host tier to there: through pinned memory of its own and in streams that yield to everything
else on the device. A copy down that gets stuck touches nothing but that memory; the room that a
copy up goes to stays set aside until that has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

import msgspec
import numpy as np

from kvstore.gpu.device import Device, DeviceError, Wait, wait_for
from kvstore.gpu.pools import OwnPool
from kvstore.hashing import Digests64, block_count, root_of
from kvstore.limits import DEVICE_CLOSE_TIMEOUT_SECONDS
from kvstore.tiers.base import Shard, ShardKey, TierUsage
from kvstore.tiers.device_copies import Way
from kvstore.tiers.disk_calls import dismiss
from kvstore.transfer.allocator import Allocator
from kvstore.types import Extent, NamespaceId, Place, TierKind

log = logging.getLogger(__name__)


class DeviceCounters(msgspec.Struct, kw_only=True):
    """What engines did here, what they could not do, and what came up for them."""

    stored_chunks: int = 0
    stored_bytes: int = 0
    loaded_chunks: int = 0
    loaded_bytes: int = 0
    reserve_chunks_no_space: int = 0
    """Asked for here and given room in the host tier."""
    promoted_chunks: int = 0
    promoted_bytes: int = 0
    promote_chunks_dropped: int = 0
    """Hot in the host tier and not brought up.

    No device decodes them, there was no room, they were gone meanwhile, or the copy failed.
    """


class DeviceTier:
    """Extents of one pool, and which shards they hold. Knows no order of leaving."""

    kind: Final = TierKind.DEVICE

    def __init__(self, device: Device, pool: OwnPool, *, wait: Wait = wait_for) -> None:
        """Raise `DeviceError` when the device has nothing to copy with."""
        self.pool: Final = pool
        self.counters = DeviceCounters()
        self._allocator = Allocator(pool.size_bytes)
        self._kept: dict[ShardKey, Extent] = {}
        # Where `write` puts what is on its way up, and room that a stuck copy may still go to.
        self._expected: dict[ShardKey, Extent] = {}
        self._doubtful: list[Extent] = []
        self._down = Way(device, pool, "demote", wait)
        self._up = Way(device, pool, "promote", wait)

    # --- extents --------------------------------------------------------------------------

    def allocate(self, size_bytes: int) -> Extent | None:
        """Return room for *size_bytes*, or None when no free run is long enough."""
        self._settle()
        return self._allocator.allocate(size_bytes)

    def free(self, extent: Extent) -> None:
        """Take back what `allocate` gave and nobody has kept."""
        self._allocator.free(extent)

    def keep(self, key: ShardKey, extent: Extent) -> None:
        """Let *extent*, which somebody has filled, hold *key* from now on."""
        assert key not in self._kept, "a shard is kept once"
        self._kept[key] = extent

    def place_of(self, key: ShardKey) -> Extent | None:
        """Return where *key* lies."""
        return self._kept.get(key)

    def forget(self, key: ShardKey) -> None:
        """Free what holds *key*."""
        extent = self._kept.pop(key, None)
        if extent is not None:
            self._allocator.free(extent)

    def expects(self, key: ShardKey) -> bool:
        """Return whether room is set aside for *key*."""
        return key in self._expected

    def expect(self, key: ShardKey, extent: Extent) -> None:
        """Let `write` put *key* into *extent*, which `arrived` or `give_up` decides about."""
        assert key not in self._expected, "a shard comes up once"
        self._expected[key] = extent

    def arrived(self, key: ShardKey) -> None:
        """Let *key*, which `write` has put there, be kept."""
        self.keep(key, self._expected.pop(key))

    def give_up(self, key: ShardKey) -> None:
        """Free the room that was set aside for *key*, or have it freed once no copy goes there."""
        extent = self._expected.pop(key)
        if self._up.trouble is None:
            self._allocator.free(extent)
        else:
            self._doubtful.append(extent)

    @property
    def is_in_doubt(self) -> bool:
        """Whether room is set aside for what is on its way up, or was when that got stuck."""
        return bool(self._expected or self._doubtful)

    def usage(self) -> TierUsage:
        """Return how full the pool is."""
        own = self._allocator
        return TierUsage(own.capacity_bytes, own.used_bytes, own.largest_free_bytes)

    def check(self, unpublished: Iterable[Extent], shards: int) -> None:
        """Raise `AssertionError` unless *unpublished* and as many *shards* are all that is out."""
        assert len(self._kept) == shards, "shards in the pool are miscounted"
        out = (*self._kept.values(), *self._expected.values(), *self._doubtful, *unpublished)
        self._allocator.check(list(out))

    # --- bytes ------------------------------------------------------------------------------

    async def write(self, shard: Shard, source: memoryview) -> Place | None:
        """Copy *source* to the room that is set aside for *shard*.

        None without such room, and where the bytes that were copied are not those of its root.
        Raises `TierError` when the device does not do it, or has not done so before.
        """
        extent = self._expected.get(shard.key)
        if extent is None:
            return None
        blocks = await self._up.up(source, extent)
        return Place(extent.offset) if root_of(blocks) == shard.root else None

    async def read(
        self, shard: Shard, place: Place, target: memoryview, table: Digests64 | None = None
    ) -> bool:
        """Copy *shard* to *target*, with the digests of its blocks; False when it is not here.

        Raises `TierError` when the device does not do it, or has not done so before.
        """
        del place
        extent = self._kept.get(shard.key)
        if extent is None:
            return False
        blocks = np.zeros(block_count(shard.size_bytes), np.uint64)
        found = blocks if table is None else table
        await self._down.down(extent, target, found)
        return True

    async def remove(self, shard: Shard, place: Place) -> bool:
        """Do nothing: what the index lets go of is freed then and there."""
        del shard, place
        return False

    async def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """Do nothing: what is here is gone with the daemon."""
        del namespace, manifest

    async def probe(self) -> None:
        """Copy a little, once all that was stuck has ended."""
        await self._down.probe()
        if self.is_in_doubt:
            await self._up.probe()
        self._settle()

    def close(self) -> None:
        """Give the pool back; what engines have mapped of it stays theirs."""
        ways = (self._down, self._up)
        has_ended = dismiss([way.crew for way in ways], DEVICE_CLOSE_TIMEOUT_SECONDS)
        if not has_ended or any(way.trouble is not None for way in ways):
            return  # something may still be under way: the end of the process frees it all
        try:
            for way in ways:
                way.close()
            self.pool.close()
        except DeviceError as error:
            log.info("the pool was not given back", extra={"reason": str(error)})

    def _settle(self) -> None:
        """Free the room of copies that were stuck, once it is known that they have ended."""
        if self._doubtful and self._up.trouble is None:
            for extent in self._doubtful:
                self._allocator.free(extent)
            self._doubtful.clear()
