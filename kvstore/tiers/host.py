"""The host tier: extents of the arena, each with its checksum table behind its bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from xxhash import xxh3_64_intdigest

from kvstore.hashing import block_count, stored_size, table_offset
from kvstore.limits import CHECKSUM_BLOCK_BYTES, CHECKSUM_SIZE_BYTES, EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.base import TierUsage
from kvstore.transfer.allocator import Allocator
from kvstore.transfer.arena import Arena
from kvstore.types import Extent, Root, TierKind

Verification = Literal["root", "sample", "full"]

_SAMPLES_MAX: Final = 2


class HostTier:
    """Memory of this host, mapped by the daemon and by every client.

    With *checksums*, an extent also has room for the block digests of its bytes, which the
    writer puts there. *verification* says how much of an extent `verify` reads: the table
    alone ("root"), also two blocks of it ("sample"), or all of it ("full").
    """

    kind: Final = TierKind.HOST

    def __init__(
        self, arena: Arena, *, checksums: bool = True, verification: Verification = "sample"
    ) -> None:
        self.arena = arena
        self.checksums = checksums
        self.verification = verification
        self._allocator = Allocator(arena.size_bytes)

    def allocate(self, size_bytes: int) -> Extent | None:
        """Return room for *size_bytes* and their table, or None when no free run is long enough."""
        extent = self._allocator.allocate(self.padded(size_bytes))
        return None if extent is None else Extent(extent.offset, size_bytes)

    def free(self, extent: Extent) -> None:
        """Take *extent* back."""
        self._allocator.free(Extent(extent.offset, self.padded(extent.size_bytes)))

    def padded(self, size_bytes: int) -> int:
        """Return what *size_bytes* take in the arena, before rounding to pages."""
        return stored_size(size_bytes) if self.checksums else size_bytes

    def footprint(self, size_bytes: int) -> int:
        """Return what *size_bytes* take in the arena, rounded to pages."""
        return -(-self.padded(size_bytes) // EXTENT_ALIGNMENT_BYTES) * EXTENT_ALIGNMENT_BYTES

    def view(self, extent: Extent) -> memoryview:
        """Return the bytes of *extent*, without their table."""
        return self.arena.view[extent.offset : extent.offset + extent.size_bytes]

    def verify(self, extent: Extent, root: Root) -> bool:
        """Return whether table and bytes of *extent* agree with *root*."""
        if not self.checksums:
            return True
        # A copy: the writer still has this memory mapped and must not change it under the check.
        table = bytes(self._table(extent))
        if xxh3_64_intdigest(table) != root:
            return False
        payload = self.view(extent)
        return all(
            _block_digest(payload, block) == _entry(table, block)
            for block in self._verified_blocks(extent, root)
        )

    def usage(self) -> TierUsage:
        """Return how full the arena is."""
        allocator = self._allocator
        return TierUsage(
            allocator.capacity_bytes, allocator.used_bytes, allocator.largest_free_bytes
        )

    def check(self, extents: Iterable[Extent]) -> None:
        """Raise `AssertionError` unless *extents* are exactly what was allocated."""
        self._allocator.check(Extent(e.offset, self.padded(e.size_bytes)) for e in extents)

    def close(self) -> None:
        """Unmap the arena."""
        self.arena.close()

    def _table(self, extent: Extent) -> memoryview:
        start = extent.offset + table_offset(extent.size_bytes)
        length = block_count(extent.size_bytes) * CHECKSUM_SIZE_BYTES
        return self.arena.view[start : start + length]

    def _verified_blocks(self, extent: Extent, root: Root) -> range:
        blocks = block_count(extent.size_bytes)
        if self.verification == "full":
            return range(blocks)
        if self.verification == "root":
            return range(0)
        stride = -(-blocks // _SAMPLES_MAX)
        # Where the sample starts differs from chunk to chunk, and no writer can foresee it.
        return range(root % stride, blocks, stride)


def _block_digest(payload: memoryview, block: int) -> int:
    start = block * CHECKSUM_BLOCK_BYTES
    return xxh3_64_intdigest(payload[start : start + CHECKSUM_BLOCK_BYTES])


def _entry(table: bytes, block: int) -> int:
    start = block * CHECKSUM_SIZE_BYTES
    return int.from_bytes(table[start : start + CHECKSUM_SIZE_BYTES], "little")
