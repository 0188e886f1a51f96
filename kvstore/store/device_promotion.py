"""Which chunks come up from the host tier into the device tier, and how.

Who is loaded from the host tier a second time, by engines that have the pool mapped, would have
been read in the pool had it been there: it is copied up, if no more others were loaded for a
first time meanwhile than the pool has room for. So what is copied up is at most half of what is
loaded from the host tier.

It comes one at a time, behind everything else. Room is what is free, or what others have that
lie below, too, and that nobody has read since it was asked for: of a prefix longer than the pool
the head stays, and nothing is copied down to make room. Nothing is held meanwhile: what is
deleted, evicted or replaced under a copy is dropped when that has ended, and a copy of bytes
that somebody else has been given by then is not of its root.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from kvstore.compression.container import Flags, open_container
from kvstore.compression.shapes import CodecId
from kvstore.errors import ContainerError, TierError
from kvstore.limits import PROMOTE_QUEUE_CHUNKS_MAX
from kvstore.store.policy import SPAN_MIN, Ghost
from kvstore.store.residence import fingerprint
from kvstore.store.route import TakenRoom, shard_of
from kvstore.store.shards import find_form
from kvstore.types import NO_SLOT, Digest, Extent, HeadRange, TierKind

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.store.shards import ShardRecord
    from kvstore.store.shelves import Shelves
    from kvstore.store.store import Loading
    from kvstore.tiers.device import DeviceTier
    from kvstore.tiers.guard import GuardedTier

log = logging.getLogger(__name__)

_HOST: Final = TierKind.HOST
_DEVICE: Final = TierKind.DEVICE
# Spreads small numbers over all 64 bits: the golden ratio.
_SPREAD: Final = 0x9E3779B97F4A7C15
_MARKS: Final = 2**64 - 1

Key = tuple["Namespace", Digest, HeadRange]
TakeRoom = Callable[[int, int, Callable[[int], bool]], Extent | None]
"""Returns room for a tenant's shard of so many bytes, sparing slots; None where that is none."""


class Promotions:
    """What is to come up, and the task that brings it: `run`."""

    def __init__(self, store: Shelves, guard: GuardedTier, take: TakeRoom) -> None:
        self._tier: DeviceTier = guard.tier  # type: ignore[assignment]  # as its kind says
        self._store = store
        self._index = store.index
        self._guard = guard
        self._take = take
        self._seen = Ghost()
        # By what it is, the load that has asked for it: loads are counted, from the start on.
        self._waiting: dict[Key, int] = {}
        self._loads = 0
        # The last load that has read a slot in the pool: only as long as something waits.
        self._last_read: dict[int, int] = {}
        self._asked = asyncio.Event()
        self._is_working = False
        self._is_over = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or is on its way."""
        return not (self._waiting or self._is_working)

    def loaded(
        self, loading: Loading, slots: Sequence[int], chunks: Sequence[Sequence[ShardRecord]]
    ) -> None:
        """Note what an engine that has the pool reads, there and in the host tier."""
        if self._is_over or not self._guard.is_usable:
            return
        self._loads += 1
        own = _spread(loading.space.number, loading.heads)
        for slot, chunk in zip(slots, chunks, strict=True):
            shard = chunk[0]
            if loading.is_pooled(shard):
                self._last_read[slot] = self._loads
            elif shard.heads == loading.heads:
                # Others are cut otherwise: no device puts them together.
                self._note(slot, shard, own)
        if self._waiting:
            self._asked.set()
        elif not self._is_working:
            self._last_read.clear()

    def stop(self) -> None:
        """Bring nothing up any more: the daemon ends."""
        self._is_over = True
        self._drop_all()

    async def run(self) -> None:
        """Bring up what was asked for, one at a time, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._is_working = True
            try:
                while self._waiting:
                    key = next(iter(self._waiting))
                    await self._promote(key, self._waiting.pop(key))
                    await self._settle()
                    await asyncio.sleep(0)  # engines are answered between those that are dropped
            except Exception:
                log.exception("chunk not brought up", extra={"tier": "device"})
                self._asked.set()
            finally:
                self._is_working = False
            if not self._waiting:
                self._last_read.clear()

    # --- which ----------------------------------------------------------------------------

    def _note(self, slot: int, shard: ShardRecord, own: int) -> None:
        """Note a load from the host tier, and ask for what was loaded so before.

        *own* sets apart its namespace and heads.
        """
        digest = self._index.digest(slot)
        mark = fingerprint(digest) ^ own
        span = max(SPAN_MIN, self._tier.pool.size_bytes // shard.size_bytes)
        if len(self._waiting) < PROMOTE_QUEUE_CHUNKS_MAX and self._seen.take(mark, span):
            self._waiting[self._index.space_of(slot), digest, shard.heads] = self._loads
            return
        self._seen.grow(span)
        self._seen.add(mark)

    def _drop_all(self, upto: int | None = None) -> None:
        """Drop all that waits, or what loads up to number *upto* have asked for."""
        dropped = [key for key, asked in self._waiting.items() if upto is None or asked <= upto]
        for key in dropped:
            del self._waiting[key]
        self._count_dropped(len(dropped))

    def _count_dropped(self, count: int = 1) -> None:
        self._tier.counters.promote_chunks_dropped += count

    # --- how ------------------------------------------------------------------------------

    async def _promote(self, key: Key, asked: int) -> None:
        """Copy what *key* names into the pool, if it is wanted there still and there is room."""
        space, digest, _ = key
        is_of_use = await self._is_of_use(key)
        slot, record = self._find(key)
        if not is_of_use or record is None or not self._is_wanted(slot, record):
            self._count_dropped()
            return
        shard, tenant = shard_of(self._store, slot, record), self._index.tenant_of(slot)
        if self._tier.expects(shard.key):
            # A copy that was given up has not ended yet.
            self._count_dropped()
            return
        extent = self._take(tenant, record.size_bytes, lambda one: self._is_read(one, asked))
        if extent is None:
            # Who was asked for no later would find no more.
            self._count_dropped()
            self._drop_all(asked)
            return
        self._tier.expect(shard.key, extent)
        room = TakenRoom(partial(self._tier.give_up, shard.key))
        source = self._store.host.view(record.extent)
        try:
            place = await self._guard.write(shard, source, room.ended)
        except TierError as error:
            room.discard()
            self._count_dropped()
            log.info("chunk not brought up", extra={"tier": "device", "reason": str(error)})
            return
        except BaseException:
            room.discard()
            raise
        slot = space.find(digest)
        if slot == NO_SLOT or not self._is_wanted(slot, record):
            room.discard()
            self._count_dropped()
        elif place is None:
            # Whoever loads it will see the same, and delete it.
            room.discard()
            self._count_dropped()
            self._store.counters.checksum_failures += 1
        else:
            self._tier.arrived(shard.key)
            self._store.slower.entered(slot, record, _DEVICE, place)
            # What follows it in its prefix is not to take its room.
            self._last_read[slot] = max(asked, self._last_read.get(slot, 0))
            self._tier.counters.promoted_chunks += 1
            self._tier.counters.promoted_bytes += record.size_bytes

    def _find(self, key: Key) -> tuple[int, ShardRecord | None]:
        """Return the slot of *key*, and what the host tier has of it."""
        space, digest, heads = key
        slot = space.find(digest)
        return slot, None if slot == NO_SLOT else self._index.shard(slot, heads, _HOST)

    async def _is_of_use(self, key: Key) -> bool:
        """Return whether devices read what the host tier has of *key* by themselves.

        What a host has to decode is nearer to it where it is.
        """
        (space, _, heads), (_, record) = key, self._find(key)
        if record is None:
            return False
        manifest = space.manifest
        if manifest.codec == "raw" and record.size_bytes == manifest.plain_bytes(heads):
            return True
        content = self._store.host.view(record.extent)
        return await asyncio.to_thread(_is_for_devices, content)

    async def _settle(self) -> None:
        """Have room that a failed copy may still go to given back, or the tier left alone."""
        while self._tier.is_in_doubt and self._guard.is_usable:
            with suppress(TierError):
                await self._guard.check()

    def _is_wanted(self, slot: int, record: ShardRecord) -> bool:
        """Return whether *record* is in the host tier, where it was, and not in the pool."""
        index = self._index
        here = find_form(index.shards(slot), record)
        return (
            here is not None
            and here.is_in_host
            and here.extent == record.extent
            and index.shard(slot, record.heads, _DEVICE) is None
        )

    def _is_read(self, slot: int, since: int) -> bool:
        """Return whether the load number *since*, or a later one, has read *slot* in the pool."""
        return self._last_read.get(slot, 0) >= since


def _is_for_devices(content: memoryview) -> bool:
    """Return whether there are kernels that decode the container *content*."""
    # What devices have, for those daemons alone that have one.
    from kvstore.compression.twins import KERNEL_NAMES, VARIABLE_NAMES  # noqa: PLC0415

    try:
        container = open_container(content)
    except ContainerError:
        return False
    codecs = {section.codec for section in container.sections}
    is_sealed = container.header.flags & Flags.CHECKSUM
    return not is_sealed and codecs <= {CodecId.RAW, *KERNEL_NAMES, *VARIABLE_NAMES}


def _spread(space: int, heads: HeadRange) -> int:
    """Return 64 bits that set apart shards of these *heads*, in namespace number *space*.

    Ranks of one engine load a shard each: that is no second load of any.
    """
    return (space << 32 | heads.start << 16 | heads.stop) * _SPREAD & _MARKS
