"""The disk tier: extents of one preallocated file, published by records in another.

A slab with the allocator of the arena, and neither segments nor a file for each chunk: the store
evicts chunk by chunk, so segments would have to be copied together again, and making and
removing files costs more than writing a chunk of 1 MiB. tests/bench/disk_layouts.py measures it.

A chunk is published by its record, which is written after its bytes. Whatever happens before
that leaves free room; whatever happens after it is found when the chunk is read, since header,
blocks and root are all held against what was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, ParamSpec, TypeVar

import msgspec
import numpy as np

from kvstore.errors import TierError
from kvstore.hashing import Digests64
from kvstore.limits import (
    CHUNK_SIZE_MAX_BYTES,
    DISK_CLOSE_TIMEOUT_SECONDS,
    DISK_READ_THREADS,
    DISK_WRITE_THREADS,
    EXTENT_ALIGNMENT_BYTES,
)
from kvstore.tiers import disk_layout
from kvstore.tiers.base import RecoveredRun, Shard, TierUsage
from kvstore.tiers.disk_calls import Crew, Job, dismiss
from kvstore.tiers.disk_directory import DiskDirectory
from kvstore.tiers.disk_fingerprints import NO_SLOT
from kvstore.tiers.disk_layout import (
    RECORD_BYTES,
    VACANT,
    fingerprint_of,
    header_holds,
    pack_record,
    unpack_runs,
    unpack_shard,
    whole_records,
)
from kvstore.tiers.disk_payloads import Payloads
from kvstore.tiers.disk_slots import Room, Slots
from kvstore.tiers.disk_volume import Volume
from kvstore.types import NamespaceId, Place, TierKind

P = ParamSpec("P")
T = TypeVar("T")

_RECOVERED_AT_ONCE: Final = 16_384
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = logging.getLogger(__name__)


class DiskCounters(msgspec.Struct, kw_only=True):
    """What the disk tier counts beside what every tier does.

    *quarantined*: records and chunks that were damaged, and dropped. *superseded*: records that
    a start found replaced by later ones. *outgrown*: chunks that a smaller capacity had no room
    for. *io_errors* include *no_space*.
    """

    quarantined: int = 0
    superseded: int = 0
    outgrown: int = 0
    io_errors: int = 0
    no_space: int = 0


class DiskTier:
    """Keeps shards in a directory of its own; made by `disk_open.open_disk_tier`.

    All of its state belongs to the thread of the event loop; threads of its own do what blocks,
    stores and loads apart, so that neither waits for the other. A call that is cancelled ends
    when its threads have left the caller's memory: how long the disk takes is for the system's
    own time-outs to bound, and for whoever calls to wait for or not.
    """

    kind: Final = TierKind.DISK

    def __init__(
        self,
        directory: DiskDirectory,
        volume: Volume,
        slots: Slots,
        counters: DiskCounters,
        *,
        punches: bool = False,
    ) -> None:
        """Serve *volume*, of which *slots* are known.

        With *punches*, room that is freed goes back to the file system: the slab is longer than
        the capacity.
        """
        self.path = directory.path
        self.counters = counters
        self._directory = directory
        self._volume = volume
        self._slots = slots
        self._punches = punches
        self._payloads = Payloads(volume)
        self._leaving: set[int] = set()
        self._readers = Crew("disk-read", DISK_READ_THREADS)
        self._writers = Crew("disk-write", DISK_WRITE_THREADS)
        # One thread: records reach the index in the order in which they were decided.
        self._recorder = Crew("disk-record", 1)
        self._closed = False

    @property
    def is_direct(self) -> bool:
        """Whether payloads bypass the page cache."""
        return self._volume.is_direct

    def usage(self) -> TierUsage:
        """Return how full the slab is; the index has its own share of the configured capacity."""
        return self._slots.usage()

    def footprint(self, size_bytes: int) -> int:
        """Return what a chunk of *size_bytes* takes, header and padding included."""
        return disk_layout.footprint(size_bytes)

    # --- the promises of every remote tier -------------------------------------------------

    async def write(self, shard: Shard, source: memoryview) -> Place | None:
        """Keep *source*, and publish it when all of it is written."""
        assert len(source) == shard.size_bytes, "a shard is written whole"
        assert 0 < shard.size_bytes <= CHUNK_SIZE_MAX_BYTES, "a chunk has a size within limits"
        fingerprint = fingerprint_of(shard.key, self._directory.seed)
        room = self._slots.take(shard.size_bytes)
        if room is None and (former := self._slots.slot_of(fingerprint)) != NO_SLOT:
            await self._withdraw(former, fingerprint)
            room = self._slots.take(shard.size_bytes)
        if room is None:
            return None
        sequence = self._slots.next_sequence()
        await self._fill(room, shard, source, sequence, fingerprint)
        former = self._slots.slot_of(fingerprint)
        place = self._slots.publish(room, sequence, fingerprint)
        if former != NO_SLOT:
            try:
                await self._withdraw(former, fingerprint, forced=True)
            except asyncio.CancelledError:
                # Nobody will hear of the place.
                await self._withdraw(room.slot, fingerprint, forced=True)
                raise
        return place

    async def read(
        self, shard: Shard, place: Place, target: memoryview, table: Digests64 | None = None
    ) -> bool:
        """Fill *target* if what lies at *place* is *shard*, whole and right."""
        assert len(target) == shard.size_bytes, "a shard is read whole"
        fingerprint = fingerprint_of(shard.key, self._directory.seed)
        room = self._find(place, fingerprint)
        if room is None or room.size_bytes != shard.size_bytes:
            return False
        self._slots.enter(room.slot)
        try:
            is_whole = await self._fetch(room, shard, target, table)
        finally:
            if self._slots.leave(room.slot):
                await self._reclaim(room.slot)
        if not is_whole:
            await self._quarantine(shard, place, fingerprint)
        return is_whole

    async def remove(self, shard: Shard, place: Place) -> bool:
        """Forget *shard*, and free its room once nobody reads it any more."""
        fingerprint = fingerprint_of(shard.key, self._directory.seed)
        room = self._find(place, fingerprint)
        return room is not None and await self._withdraw(room.slot, fingerprint)

    async def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """Keep *manifest* in a file of its own; it is on the medium when this returns."""
        await self._record(self._directory.introduce, namespace, manifest)

    async def probe(self) -> None:
        """Read from the slab, and write to the medium."""
        await self._do(self._readers, [self._volume.probe])
        await self._record(self._directory.probe)

    # --- what survives -----------------------------------------------------------------------

    def manifests(self) -> dict[NamespaceId, bytes]:
        """Return all manifests that are whole. Blocking; raises `TierError`."""
        try:
            return self._directory.manifests()
        except OSError as error:
            raise self._failed(error) from error

    def recover(self) -> Iterator[RecoveredRun]:
        """Yield what is kept from the index alone, oldest first but for runs that interleave.

        Blocking, before the first write. Raises `TierError`.
        """
        try:
            rows = self._volume.read_records()
        except OSError as error:
            raise self._failed(error) from error
        slots = self._slots.published(rows["sequence"])
        slots = slots[np.argsort(rows["sequence"][slots], kind="stable")]
        for first in range(0, len(slots), _RECOVERED_AT_ONCE):
            part = slots[first : first + _RECOVERED_AT_ONCE]
            yield from unpack_runs(rows[part], self._slots.places_of(part))

    def close(self) -> None:
        """Write out what the system holds back, and give the directory up.

        A thread that hangs in the kernel keeps its files open, and the directory locked, until
        the process ends.
        """
        if self._closed:
            return
        self._closed = True
        crews = (self._readers, self._writers, self._recorder)
        if not dismiss(crews, DISK_CLOSE_TIMEOUT_SECONDS):
            _log.warning("disk does not answer; left open", extra={"path": str(self.path)})
            return
        try:
            self._volume.sync()
        except OSError as error:
            _log.warning("disk was not synced", extra={"path": str(self.path), "reason": error})
        self._volume.close()
        self._directory.close()

    def check(self) -> None:
        """Raise `AssertionError` unless the slab is tiled exactly. Nothing may be under way."""
        assert not self._leaving, "a removal never ended"
        self._slots.check()

    # --- how ---------------------------------------------------------------------------------

    def _find(self, place: Place, fingerprint: int) -> Room | None:
        room = self._slots.find(place)
        if room is None or self._slots.slot_of(fingerprint) != room.slot:
            return None
        return room

    async def _fill(
        self, room: Room, shard: Shard, source: memoryview, sequence: int, fingerprint: int
    ) -> None:
        """Write payload, header and record; after an error or a cancellation nothing is kept."""
        page = room.offset // EXTENT_ALIGNMENT_BYTES
        record = pack_record(shard, sequence=sequence, page=page, fingerprint=fingerprint)
        job = Job(shard, room, record)
        calls = [partial(self._payloads.write_whole, job, source)]
        if len(job.parts) > 1:
            write = self._payloads.write_part
            calls = [partial(self._payloads.write_header, job, source)]
            calls += [partial(write, job, source, start) for start in job.parts]
        try:
            await self._do(self._writers, calls, job.give_up)
        except BaseException:
            if job.is_recorded:
                await self._void(room.slot)
            await self._reclaim(room.slot)
            raise

    async def _fetch(
        self, room: Room, shard: Shard, target: memoryview, table: Digests64 | None
    ) -> bool:
        job = Job(shard, room)
        read = self._payloads.read_part
        parts = [partial(read, job, target, start) for start in job.parts]
        header, *_ = found = await self._do(self._readers, parts, job.give_up)
        if header is None or None in found:
            return False
        if table is not None:
            table[:] = job.digests
        return header_holds(header, shard, job.digests)

    async def _quarantine(self, shard: Shard, place: Place, fingerprint: int) -> None:
        """Drop what failed its check, unless it is the caller who is wrong about it."""
        room = self._slots.find(place)
        if room is None:
            return
        record = await self._record(self._volume.read_record, room.slot)
        rows = np.frombuffer(record.ljust(RECORD_BYTES, b"\0"), disk_layout.RECORD)
        if whole_records(rows)[0] and unpack_shard(record).root != shard.root:
            return
        if self._slots.find(place) is not None:
            self.counters.quarantined += 1
            extra = {"key": shard.key.digest, "path": str(self.path), "offset": room.offset}
            _log.warning("chunk on disk is damaged and dropped", extra=extra)
            await self._withdraw(room.slot, fingerprint, forced=True)

    async def _withdraw(self, slot: int, fingerprint: int, *, forced: bool = False) -> bool:
        """Void the record of *slot*, then free its room; False when that is under way already.

        When the record cannot be voided, nothing changes, or, when *forced*, the shard goes all
        the same: a start may find it again, and a read will tell what lies there.
        """
        if slot in self._leaving:
            return False
        self._leaving.add(slot)
        cancelled: asyncio.CancelledError | None = None
        try:
            await self._record(self._volume.write_record, slot, VACANT)
        except TierError:
            if not forced:
                raise
        except asyncio.CancelledError as error:
            cancelled = error  # and yet the record is void by now
        finally:
            self._leaving.discard(slot)
        self._slots.retire(slot, fingerprint)
        if self._slots.doom(slot):
            await self._reclaim(slot)
        if cancelled is not None:
            raise cancelled
        return True

    async def _void(self, slot: int) -> None:
        """Void a record that was never published, if the disk lets us."""
        with contextlib.suppress(TierError, asyncio.CancelledError):
            await self._record(self._volume.write_record, slot, VACANT)

    async def _reclaim(self, slot: int) -> None:
        """Free the room of a slot that nobody can find and nobody reads."""
        try:
            if self._punches:
                await self._record(self._volume.punch, *self._slots.room(slot).extent)
        except TierError as error:
            _log.warning("disk takes no room back", extra={"reason": error})
        finally:
            self._slots.give_back(slot)

    async def _record(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what *call* returns in the one thread that keeps index and names."""
        (found,) = await self._do(self._recorder, [partial(call, *args, **kwargs)])
        return found

    async def _do(
        self,
        crew: Crew,
        calls: Sequence[Callable[[], T]],
        give_up: Callable[[], None] | None = None,
    ) -> list[T]:
        """Let *crew* make *calls*, see `Crew.do`; the disk's errors are `TierError`."""
        if self._closed:
            raise self._is_closed()
        try:
            return await crew.do(calls, give_up)
        except OSError as error:
            raise self._failed(error) from error
        except asyncio.CancelledError:
            if self._closed:
                raise self._is_closed() from None
            raise

    def _failed(self, error: OSError) -> TierError:
        self.counters.io_errors += 1
        self.counters.no_space += error.errno in _FULL
        return TierError(f"disk at {self.path}: {error.strerror or error}")

    def _is_closed(self) -> TierError:
        return TierError(f"the disk tier at {self.path} is closed")
