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
import errno
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import msgspec
import numpy as np

from kvstore.errors import TierError
from kvstore.limits import (
    CHUNK_SIZE_MAX_BYTES,
    DISK_CALL_TIMEOUT_SECONDS,
    DISK_CLOSE_TIMEOUT_SECONDS,
    DISK_READ_THREADS,
    DISK_WRITE_THREADS,
    EXTENT_ALIGNMENT_BYTES,
)
from kvstore.tiers import disk_layout
from kvstore.tiers.base import Recovered, Shard, TierUsage
from kvstore.tiers.disk_calls import BlockSums, Crew, Gate, dismiss, parts_of
from kvstore.tiers.disk_directory import DiskDirectory
from kvstore.tiers.disk_fingerprints import NO_SLOT
from kvstore.tiers.disk_layout import (
    RECORD_BYTES,
    VACANT,
    fingerprint_of,
    header_holds,
    pack_record,
    unpack_shard,
    whole_records,
)
from kvstore.tiers.disk_payloads import Payloads
from kvstore.tiers.disk_slots import Room, Slots
from kvstore.tiers.disk_volume import Volume
from kvstore.types import NamespaceId, Place, TierKind

P = ParamSpec("P")
T = TypeVar("T")

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = logging.getLogger(__name__)


class DiskCounters(msgspec.Struct, kw_only=True):
    """What the disk tier counts beside what every tier does.

    *quarantined*: records and chunks that were damaged, and dropped. *superseded*: records that
    a start found replaced by later ones. *outgrown*: chunks that a smaller capacity had no room
    for. *io_errors* include *no_space*. *timeouts*: calls that the disk did not answer in time.
    *abandoned*: calls that were given up while threads worked for them, time-outs included.
    """

    quarantined: int = 0
    superseded: int = 0
    outgrown: int = 0
    io_errors: int = 0
    no_space: int = 0
    timeouts: int = 0
    abandoned: int = 0


class DiskTier:
    """Keeps shards in a directory of its own; made by `disk_open.open_disk_tier`.

    All of its state belongs to the thread of the event loop; threads of its own do what blocks.
    Every call ends in `DISK_CALL_TIMEOUT_SECONDS`, whatever the disk does: one that is given up
    goes on in the background until its threads are done, then frees what it held. Until then
    nothing of it can be read, and nothing touches the caller's memory to write to it.
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
        self._tasks: set[asyncio.Task[Any]] = set()
        self._leaving: set[int] = set()
        self._readers = Crew("read", DISK_READ_THREADS)
        self._writers = Crew("write", DISK_WRITE_THREADS)
        # One thread: records reach the index in the order in which they were decided.
        self._recorder = Crew("record", 1)
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
        """Keep *source*, and publish it when all of it is on its way to the medium.

        Raises `ChecksumError` when *source* is not what the shard's root stands for; then
        nothing is kept.
        """
        assert len(source) == shard.size_bytes, "a shard is written whole"
        assert 0 < shard.size_bytes <= CHUNK_SIZE_MAX_BYTES, "a chunk has a size within limits"
        gate = Gate()
        undo = partial(self._undo, shard)
        return await self._carry(self._write(shard, source, gate), gate, undo)

    async def read(self, shard: Shard, place: Place, target: memoryview) -> bool:
        """Fill *target* if what lies at *place* is *shard*, whole and right."""
        assert len(target) == shard.size_bytes, "a shard is read whole"
        gate = Gate()
        return await self._carry(self._read(shard, place, target, gate), gate)

    async def remove(self, shard: Shard, place: Place) -> bool:
        """Forget *shard*, and free its room once nobody reads it any more."""
        return await self._carry(self._remove(shard, place), Gate())

    async def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """Keep *manifest* in a file of its own; it is on the medium when this returns."""
        work = self._run(self._recorder, self._directory.introduce, namespace, manifest)
        await self._carry(work, Gate())

    # --- what survives -----------------------------------------------------------------------

    def manifests(self) -> dict[NamespaceId, bytes]:
        """Return all manifests that are whole. Blocking; raises `TierError`."""
        try:
            return self._directory.manifests()
        except OSError as error:
            raise self._failed(error) from error

    def recover(self) -> Iterator[Recovered]:
        """Yield what is kept, oldest first, from the index alone.

        Blocking, before the first write. Raises `TierError`.
        """
        try:
            rows = self._volume.read_records()
        except OSError as error:
            raise self._failed(error) from error
        order = np.argsort(rows["sequence"], kind="stable")
        records = rows.view(np.uint8).data
        for slot in order[np.count_nonzero(rows["sequence"] == 0) :].tolist():
            place = self._slots.place_of(slot)
            if self._slots.find(place) is not None:
                start = slot * RECORD_BYTES
                yield Recovered(unpack_shard(records[start : start + RECORD_BYTES]), place)

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

    async def settle(self) -> None:
        """Return when nothing is under way, also of calls that were given up."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- writing -----------------------------------------------------------------------------

    async def _write(self, shard: Shard, source: memoryview, gate: Gate) -> Place | None:
        fingerprint = fingerprint_of(shard.key, self._directory.seed)
        room = self._slots.take(shard.size_bytes)
        if room is None and (former := self._slots.slot_of(fingerprint)) != NO_SLOT:
            await self._withdraw(former, fingerprint)
            room = self._slots.take(shard.size_bytes)
        if room is None:
            return None
        try:
            await self._fill(room, shard, source, gate)
            sequence = self._slots.next_sequence()
            page = room.offset // EXTENT_ALIGNMENT_BYTES
            record = pack_record(shard, sequence=sequence, page=page, fingerprint=fingerprint)
            await self._run(self._recorder, self._volume.write_record, room.slot, record)
        except BaseException:
            self._slots.give_back(room.slot)
            raise
        former = self._slots.slot_of(fingerprint)
        place = self._slots.publish(room, sequence, fingerprint)
        if former != NO_SLOT:
            await self._withdraw(former, fingerprint, forced=True)
        return place

    async def _fill(self, room: Room, shard: Shard, source: memoryview, gate: Gate) -> None:
        sums = BlockSums(shard.size_bytes)
        parts = [
            partial(self._payloads.write_part, room, shard, source[start:stop], start, sums, gate)
            for start, stop in parts_of(shard.size_bytes)
        ]
        await self._run_all(self._writers, parts)
        if gate.is_shut:
            raise TierError(f"the write to {self.path} was given up")

    # --- reading -----------------------------------------------------------------------------

    async def _read(self, shard: Shard, place: Place, target: memoryview, gate: Gate) -> bool:
        fingerprint = fingerprint_of(shard.key, self._directory.seed)
        room = self._slots.find(place)
        if room is None or self._slots.slot_of(fingerprint) != room.slot:
            return False
        if room.size_bytes != shard.size_bytes:
            return False
        self._slots.enter(room.slot)
        try:
            is_whole = await self._fetch(room, shard, target, gate)
        finally:
            if self._slots.leave(room.slot):
                await self._reclaim(room.slot)
        if not is_whole and not gate.is_shut:
            await self._quarantine(shard, place, fingerprint)
        return is_whole

    async def _fetch(self, room: Room, shard: Shard, target: memoryview, gate: Gate) -> bool:
        sums = BlockSums(shard.size_bytes)
        parts = [
            partial(self._payloads.read_part, room, target[start:stop], start, sums, gate)
            for start, stop in parts_of(shard.size_bytes)
        ]
        header, *_ = found = await self._run_all(self._readers, parts)
        return (
            header is not None and None not in found and header_holds(header, shard, sums.digests)
        )

    async def _quarantine(self, shard: Shard, place: Place, fingerprint: int) -> None:
        """Drop what failed its check, unless it is the caller who is wrong about it."""
        room = self._slots.find(place)
        if room is None:
            return
        record = await self._run(self._recorder, self._volume.read_record, room.slot)
        rows = np.frombuffer(record.ljust(RECORD_BYTES, b"\0"), disk_layout.RECORD)
        if whole_records(rows)[0] and unpack_shard(record).root != shard.root:
            return
        self.counters.quarantined += 1
        extra = {"key": shard.key.digest, "path": str(self.path), "offset": room.offset}
        _log.warning("chunk on disk is damaged and dropped", extra=extra)
        if self._slots.find(place) is not None:
            await self._withdraw(room.slot, fingerprint, forced=True)

    # --- removing ----------------------------------------------------------------------------

    async def _remove(self, shard: Shard, place: Place) -> bool:
        fingerprint = fingerprint_of(shard.key, self._directory.seed)
        room = self._slots.find(place)
        if room is None or self._slots.slot_of(fingerprint) != room.slot:
            return False
        return await self._withdraw(room.slot, fingerprint)

    async def _withdraw(self, slot: int, fingerprint: int, *, forced: bool = False) -> bool:
        """Void the record of *slot*, then free its room; False when that is under way already.

        When the record cannot be voided, nothing changes, or, when *forced*, the shard goes all
        the same: a start may find it again, and a read will tell what lies there.
        """
        if slot in self._leaving:
            return False
        self._leaving.add(slot)
        try:
            await self._run(self._recorder, self._volume.write_record, slot, VACANT)
        except TierError:
            if not forced:
                raise
        finally:
            self._leaving.discard(slot)
        self._slots.retire(slot, fingerprint)
        if self._slots.doom(slot):
            await self._reclaim(slot)
        return True

    async def _reclaim(self, slot: int) -> None:
        """Free the room of a slot that nobody can find and nobody reads."""
        if self._punches:
            try:
                extent = self._slots.room(slot).extent
                await self._run(self._recorder, self._volume.punch, *extent)
            except TierError as error:
                _log.warning("disk takes no room back", extra={"reason": error})
        self._slots.give_back(slot)

    async def _undo(self, shard: Shard, place: Place) -> None:
        """Remove what a call has written that nobody waited for any more."""
        try:
            await self._remove(shard, place)
        except TierError as error:
            _log.warning("what was given up stays on disk", extra={"reason": error})

    # --- calls and threads -------------------------------------------------------------------

    async def _carry(
        self,
        work: Coroutine[Any, Any, T],
        gate: Gate,
        undo: Callable[[Place], Coroutine[Any, Any, None]] | None = None,
    ) -> T:
        """Return what *work* does, or give it up and let it end in the background."""
        if self._closed:
            work.close()
            raise TierError(f"the disk tier at {self.path} is closed")
        task = self._start(work)
        try:
            async with asyncio.timeout(DISK_CALL_TIMEOUT_SECONDS):
                return await asyncio.shield(task)
        except (TimeoutError, asyncio.CancelledError) as error:
            gate.shut()
            self.counters.abandoned += 1
            task.add_done_callback(partial(self._left_behind, undo))
            if isinstance(error, TimeoutError):
                self.counters.timeouts += 1
                raise TierError(
                    f"no answer from {self.path} in {DISK_CALL_TIMEOUT_SECONDS:g} s"
                ) from error
            if self._closed:
                raise TierError(f"the disk tier at {self.path} was closed") from error
            raise

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _left_behind(
        self,
        undo: Callable[[Place], Coroutine[Any, Any, None]] | None,
        task: asyncio.Task[Any],
    ) -> None:
        """Take note of how a call ended that was given up; its errors have nobody to go to."""
        if task.cancelled() or task.exception() is not None or self._closed:
            return
        if undo is not None and task.result() is not None:
            _ = self._start(undo(task.result()))

    async def _run(self, crew: Crew, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what *call* returns in a thread of *crew*; the disk's errors are `TierError`."""
        (found,) = await self._run_all(crew, [partial(call, *args, **kwargs)])
        return found

    async def _run_all(self, crew: Crew, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Return what all *calls* return; it comes, or the first error, when none runs any more."""
        if self._closed:
            raise TierError(f"the disk tier at {self.path} is closed")
        futures = [asyncio.wrap_future(crew.submit(call)) for call in calls]
        await asyncio.wait(futures)
        try:
            errors = [future.exception() for future in futures]
        except asyncio.CancelledError:
            raise TierError(f"the disk tier at {self.path} was closed") from None
        for error in errors:
            if isinstance(error, OSError):
                raise self._failed(error) from error
            if error is not None:
                raise error
        return [future.result() for future in futures]

    def _failed(self, error: OSError) -> TierError:
        self.counters.io_errors += 1
        self.counters.no_space += error.errno in _FULL
        return TierError(f"disk at {self.path}: {error.strerror or error}")
