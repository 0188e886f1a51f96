"""The device tier: a pool of a GPU's memory, which engines on that GPU map and fill themselves.

The daemon hands out its extents and copies chunks from there to the host tier: through pinned
memory of its own and in a stream that yields to everything else on the device, so that a copy
that gets stuck touches nothing but that. Nothing is ever written here by the daemon.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Final

import msgspec
import numpy as np

from kvstore.errors import TierError
from kvstore.gpu.device import (
    Copy,
    Device,
    DeviceError,
    DeviceLostError,
    Event,
    Urgency,
    Wait,
    wait_for,
)
from kvstore.gpu.pools import OwnPool
from kvstore.hashing import Digests64, block_count
from kvstore.limits import (
    CHECKSUM_BLOCK_BYTES,
    DEMOTE_PIECE_BYTES,
    DEVICE_CLOSE_TIMEOUT_SECONDS,
)
from kvstore.tiers.base import Shard, ShardKey, TierUsage
from kvstore.tiers.disk_calls import Crew, dismiss
from kvstore.transfer.allocator import Allocator
from kvstore.transfer.copies import copy_at
from kvstore.transfer.native import address_of
from kvstore.types import Extent, NamespaceId, Place, TierKind

log = logging.getLogger(__name__)

_PROBE_BYTES: Final = 64


class DeviceCounters(msgspec.Struct, kw_only=True):
    """What engines did here, and what they could not do."""

    stored_chunks: int = 0
    stored_bytes: int = 0
    loaded_chunks: int = 0
    loaded_bytes: int = 0
    reserve_chunks_no_space: int = 0
    """Asked for here and given room in the host tier."""


class DeviceTier:
    """Extents of one pool, and which shards they hold. Knows no order of leaving."""

    kind: Final = TierKind.DEVICE

    def __init__(self, device: Device, pool: OwnPool, *, wait: Wait = wait_for) -> None:
        """Raise `DeviceError` when the device has nothing to copy with."""
        self.pool: Final = pool
        self.counters = DeviceCounters()
        self._device = device
        self._wait = wait
        self._allocator = Allocator(pool.size_bytes)
        self._kept: dict[ShardKey, Extent] = {}
        self._stream = device.stream(Urgency.LOW)
        self._pinned = device.pin(2 * DEMOTE_PIECE_BYTES)
        self._crew = Crew("demote", 1)
        self._trouble: DeviceError | None = None

    # --- extents --------------------------------------------------------------------------

    def allocate(self, size_bytes: int) -> Extent | None:
        """Return room for *size_bytes*, or None when no free run is long enough."""
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

    def usage(self) -> TierUsage:
        """Return how full the pool is."""
        own = self._allocator
        return TierUsage(own.capacity_bytes, own.used_bytes, own.largest_free_bytes)

    def check(self, unpublished: Iterable[Extent], shards: int) -> None:
        """Raise `AssertionError` unless *unpublished* and as many *shards* are all that is out."""
        assert len(self._kept) == shards, "shards in the pool are miscounted"
        self._allocator.check([*self._kept.values(), *unpublished])

    # --- bytes ------------------------------------------------------------------------------

    async def write(self, shard: Shard, source: memoryview) -> Place | None:
        """Refuse: engines alone write here."""
        del shard, source
        return None

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
        await self._crew.do([functools.partial(self._bring, extent, target, found)])
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
        await self._crew.do([self._try])

    def close(self) -> None:
        """Give the pool back; what engines have mapped of it stays theirs."""
        if not dismiss([self._crew], DEVICE_CLOSE_TIMEOUT_SECONDS) or self._trouble is not None:
            return  # something may still be under way: the end of the process frees it all
        try:
            self._pinned.free()
            self.pool.close()
        except DeviceError as error:
            log.info("the pool was not given back", extra={"reason": str(error)})

    # --- in the thread ------------------------------------------------------------------------

    def _bring(self, extent: Extent, target: memoryview, table: Digests64) -> None:
        """Copy *extent* to *target*: one piece is on its way while the last is taken out."""
        if self._trouble is not None:
            self._try()
        base, last = address_of(target), (extent.size_bytes - 1) // DEMOTE_PIECE_BYTES
        try:
            coming = self._begin(extent, 0)
            for number in range(last + 1):
                event = coming
                if number < last:
                    coming = self._begin(extent, number + 1)
                self._wait(event)
                self._take(extent, number, base, table)
        except DeviceError as error:
            self._trouble = error
            raise TierError(f"device: {error}") from error

    def _begin(self, extent: Extent, number: int) -> Event:
        start, size = _piece(extent, number)
        source = self.pool.address + extent.offset + start
        self._stream.copy([Copy(self._half(number), source, size)])
        return self._stream.record()

    def _take(self, extent: Extent, number: int, base: int, table: Digests64) -> None:
        start, size = _piece(extent, number)
        digests = copy_at(base + start, self._half(number), size, checksums=True)
        assert digests is not None, "they were asked for"
        first = start // CHECKSUM_BLOCK_BYTES
        table[first : first + block_count(size)] = digests

    def _half(self, number: int) -> int:
        """Return where piece *number* is put: two halves of pinned memory, in turns."""
        return self._pinned.address + number % 2 * DEMOTE_PIECE_BYTES

    def _try(self) -> None:
        """Find out whether all that was begun has ended, and whether a copy succeeds now."""
        try:
            if isinstance(self._trouble, DeviceLostError):
                raise self._trouble
            self._stream.copy([Copy(self._half(0), self.pool.address, _PROBE_BYTES)])
            self._wait(self._stream.record())
        except DeviceError as error:
            raise TierError(f"device: {error}") from error
        self._trouble = None


def _piece(extent: Extent, number: int) -> tuple[int, int]:
    """Return where in *extent* piece *number* begins, and its size."""
    start = number * DEMOTE_PIECE_BYTES
    return start, min(DEMOTE_PIECE_BYTES, extent.size_bytes - start)
