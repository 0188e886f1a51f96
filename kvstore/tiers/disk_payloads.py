"""Payloads between memory and slab: what the threads of the disk tier do, part by part.

Many threads work for one chunk, each on parts of its own; checksums are taken while other parts
move. Bytes go directly between the caller's memory and the disk where that is aligned, as extents
of the arena are; all but a last, partial page.
"""

from __future__ import annotations

import threading

from kvstore.errors import TierError
from kvstore.hashing import root_of
from kvstore.limits import DISK_PART_SIZE_BYTES, EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.disk_calls import Job
from kvstore.tiers.disk_layout import HEADER_MAX_BYTES, header_size, pack_header, padded
from kvstore.tiers.disk_volume import Volume, aligned_buffer
from kvstore.transfer import copies
from kvstore.transfer.native import address_of

_PAGE = EXTENT_ALIGNMENT_BYTES


class Buffers(threading.local):
    """Aligned memory of each thread: room for a header, then for one part."""

    def __init__(self) -> None:
        self.all = aligned_buffer(HEADER_MAX_BYTES + DISK_PART_SIZE_BYTES)
        self.part = self.all[HEADER_MAX_BYTES:]

    def header(self, size_bytes: int) -> memoryview:
        """Return room for the header of a chunk of *size_bytes*."""
        return self.all[HEADER_MAX_BYTES - header_size(size_bytes) : HEADER_MAX_BYTES]


class Payloads:
    """Reads and writes parts of extents of *volume*. Everything blocks; many threads at once."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._buffers = Buffers()

    def write_whole(self, job: Job, source: memoryview) -> None:
        """Write header and payload of a chunk of one part, which is not worth two threads."""
        if job.is_given_up:
            return
        self._volume.write([self._header(job, source), *self._pages(source)], job.room.offset)
        self._finish(job)

    def write_header(self, job: Job, source: memoryview) -> None:
        """Digest all of *source*, and write the header: while others write the parts."""
        self._volume.write([self._header(job, source)], job.room.offset)
        self._finish(job)

    def write_part(self, job: Job, source: memoryview, start: int) -> None:
        """Write the part of *source* at *start*."""
        if job.is_given_up:
            return
        pages = self._pages(source[start : start + DISK_PART_SIZE_BYTES])
        self._volume.write(pages, job.room.offset + header_size(job.shard.size_bytes) + start)
        self._finish(job)

    def _header(self, job: Job, source: memoryview) -> memoryview:
        """Digest *source*, and return its header; raises `TierError` for other bytes."""
        job.add(0, copies.digest_blocks(source))
        if root_of(job.digests) != job.shard.root:
            raise TierError("the bytes of a shard are not those of its root; not kept")
        header = self._buffers.header(job.shard.size_bytes)
        header[:] = pack_header(job.shard, job.digests)
        return header

    def _pages(self, part: memoryview) -> list[memoryview]:
        """Return *part* as whole pages, the last one padded with zeros."""
        whole = 0 if self._must_bounce(part) else len(part) // _PAGE * _PAGE
        views = [part[:whole]] if whole else []
        if whole < len(part):
            rest = self._buffers.part[: padded(len(part) - whole)]
            rest[: len(part) - whole] = part[whole:]
            rest[len(part) - whole :] = bytes(len(rest) - len(part) + whole)
            views.append(rest)
        return views

    def _finish(self, job: Job) -> None:
        """Whoever is last writes the record: then all else is written."""
        if job.finish_part() and not job.is_given_up:
            job.is_recorded = True
            self._volume.write_record(job.room.slot, job.record)

    def read_part(self, job: Job, target: memoryview, start: int) -> bytes | None:
        """Read and digest the part of *target* at *start*.

        Returns the header with the first part, nothing with others, and None when the slab ends
        too early or the job was given up.
        """
        if job.is_given_up:
            return None
        part = target[start : start + DISK_PART_SIZE_BYTES]
        header = self._buffers.header(job.shard.size_bytes)
        offset = job.room.offset + len(header) + start
        whole = 0 if self._must_bounce(part) else len(part) // _PAGE * _PAGE
        views = [part[:whole]] if whole else []
        if whole < len(part):
            views.append(self._buffers.part[: padded(len(part) - whole)])
        if start == 0:
            views, offset = [header, *views], job.room.offset
        if not self._volume.read(views, offset):
            return None
        part[whole:] = self._buffers.part[: len(part) - whole]
        job.add(start, copies.digest_blocks(part))
        return bytes(header) if start == 0 else b""

    def _must_bounce(self, part: memoryview) -> bool:
        return self._volume.is_direct and address_of(part) % _PAGE != 0
