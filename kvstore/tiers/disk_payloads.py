"""Payloads between memory and slab: what the threads of the disk tier do, part by part.

Many threads work for one chunk, each on parts of its own. Checksums are taken part by part, too,
so that the disk is busy meanwhile.
"""

from __future__ import annotations

import threading

from kvstore.errors import ChecksumError
from kvstore.hashing import Digests64, root_of
from kvstore.limits import DISK_PART_SIZE_BYTES, EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.base import Shard
from kvstore.tiers.disk_calls import BlockSums, Gate
from kvstore.tiers.disk_layout import HEADER_MAX_BYTES, header_size, pack_header, padded
from kvstore.tiers.disk_slots import Room
from kvstore.tiers.disk_volume import Volume, aligned_buffer
from kvstore.transfer import copies
from kvstore.transfer.native import address_of


class Buffers(threading.local):
    """Memory of each thread, aligned for direct I/O: room for a header, then for one part."""

    def __init__(self) -> None:
        self.header = aligned_buffer(HEADER_MAX_BYTES + DISK_PART_SIZE_BYTES)
        self.part = self.header[HEADER_MAX_BYTES:]


class Payloads:
    """Reads and writes parts of extents of *volume*. Everything blocks; many threads at once."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._buffers = Buffers()

    def write_part(
        self, room: Room, shard: Shard, part: memoryview, start: int, sums: BlockSums, gate: Gate
    ) -> None:
        """Digest and write one part; whoever completes the digests adds the header."""
        if gate.is_shut:
            return
        views, digests = self._digested(part)
        lead = header_size(shard.size_bytes)
        offset = room.offset + lead + start
        if sums.add(start, digests):
            if root_of(sums.digests) != shard.root:
                raise ChecksumError("the bytes of a shard are not those of its root; not kept")
            header = self._buffers.header[HEADER_MAX_BYTES - lead : HEADER_MAX_BYTES]
            header[:] = pack_header(shard, sums.digests)
            if start == 0:
                views, offset = [header, *views], room.offset
            else:
                self._volume.write([header], room.offset)
        self._volume.write(views, offset)

    def read_part(
        self, room: Room, target: memoryview, start: int, sums: BlockSums, gate: Gate
    ) -> bytes | None:
        """Read one part, then copy and digest it in one pass.

        Returns the header with the first part, nothing with others, and None when the slab ends
        too early or the call was given up. Bytes come by way of a buffer, since a read that the
        disk does not answer must not write to the caller's memory later.
        """
        lead = header_size(room.size_bytes)
        before = lead if start == 0 else 0
        end = HEADER_MAX_BYTES + padded(len(target))
        view = self._buffers.header[HEADER_MAX_BYTES - before : end]
        if gate.is_shut or not self._volume.read([view], room.offset + lead + start - before):
            return None
        if not gate.enter():
            return None
        try:
            digests = copies.copy(target, self._buffers.part[: len(target)], checksums=True)
        finally:
            gate.leave()
        assert digests is not None
        sums.add(start, digests)
        return bytes(view[:before])

    def _digested(self, part: memoryview) -> tuple[list[memoryview], Digests64]:
        """Return *part* as whole pages that can be written, and its block digests.

        What starts on a page is written from where it lies, all but its last, partial page.
        """
        whole = len(part) // EXTENT_ALIGNMENT_BYTES * EXTENT_ALIGNMENT_BYTES
        if self._volume.is_direct and address_of(part) % EXTENT_ALIGNMENT_BYTES:
            digests = copies.copy(self._buffers.part[: len(part)], part, checksums=True)
            assert digests is not None
            end = padded(len(part))
            self._buffers.part[len(part) : end] = bytes(end - len(part))
            return [self._buffers.part[:end]], digests
        views = [part[:whole]] if whole else []
        if whole < len(part):
            page = self._buffers.part[:EXTENT_ALIGNMENT_BYTES]
            page[:] = bytes(part[whole:]).ljust(EXTENT_ALIGNMENT_BYTES, b"\0")
            views.append(page)
        return views, copies.digest_blocks(part)
