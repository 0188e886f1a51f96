"""The host tier: extents of the arena, each with its checksum table behind its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal

from xxhash import xxh3_64_intdigest

from kvstore.hashing import Digests64, block_count, stored_size, table_offset
from kvstore.limits import CHECKSUM_BLOCK_BYTES, CHECKSUM_SIZE_BYTES, EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.base import Shard, TierUsage
from kvstore.tiers.kept import KeptArena
from kvstore.tiers.record_layout import Owner
from kvstore.tiers.records import Records
from kvstore.transfer.allocator import Allocator
from kvstore.transfer.arena import Arena
from kvstore.transfer.copies import digest_blocks
from kvstore.types import Extent, Root, TierKind

Verification = Literal["root", "sample", "full"]

_SAMPLES_MAX: Final = 2


class HostTier:
    """Memory of this host, mapped by the daemon and by every client.

    With *checksums*, an extent also has room for the block digests of its bytes, which the
    writer puts there. *verification* says how much of an extent `verify` reads: the table
    alone ("root"), also two blocks of it ("sample"), or all of it ("full").

    Over a *kept* arena it keeps records of what extents are for: `fill` before somebody writes
    to one, `publish` once it holds a shard, and none any more before `free` gives it away.
    *records* is None where nothing outlives the daemon.
    """

    kind: Final = TierKind.HOST

    def __init__(
        self,
        arena: Arena | KeptArena,
        *,
        checksums: bool = True,
        verification: Verification = "sample",
    ) -> None:
        self._memory = arena
        self.arena = arena.arena if isinstance(arena, KeptArena) else arena
        self.records: Records | None = None
        if isinstance(arena, KeptArena) and checksums:
            self.records = arena.records
        self.checksums = checksums
        self.verification = verification
        self._allocator = Allocator(self.arena.size_bytes)

    @property
    def cold(self) -> str:
        """Why nothing that an earlier daemon left could be used; empty when that is not so."""
        return self._memory.cold if isinstance(self._memory, KeptArena) else ""

    def allocate(self, size_bytes: int) -> Extent | None:
        """Return room for *size_bytes* and their table, or None when no free run is long enough."""
        extent = self._allocator.allocate(self.padded(size_bytes))
        return None if extent is None else Extent(extent.offset, size_bytes)

    def fill(self, extent: Extent, owner: Owner) -> bool:
        """Note that *owner* will write to *extent*; False, when it cannot be, forbids that."""
        return self.records is None or self.records.fill(extent, owner)

    def publish(
        self, extent: Extent, shard: Shard, introduce: Callable[[], bytes], tenant: int = 0
    ) -> None:
        """Note that *extent* holds *shard*, for a restart to find.

        *introduce* says what its namespace is, and is asked once for each.
        """
        records, namespace = self.records, shard.key.namespace
        if records is not None:
            if not records.knows(namespace):
                records.introduce(namespace, introduce())
            records.publish(extent, shard, tenant)

    def free(self, extent: Extent) -> None:
        """Take *extent* back."""
        if self.records is not None:
            self.records.clear(extent.offset)
        self._allocator.free(Extent(extent.offset, self.padded(extent.size_bytes)))

    def occupy(self, extents: Iterable[Extent]) -> None:
        """Count *extents* as allocated, in a tier that nothing was allocated from."""
        self._allocator.occupy(Extent(e.offset, self.padded(e.size_bytes)) for e in extents)

    def padded(self, size_bytes: int) -> int:
        """Return what *size_bytes* take in the arena, before rounding to pages."""
        return stored_size(size_bytes) if self.checksums else size_bytes

    def footprint(self, size_bytes: int) -> int:
        """Return what *size_bytes* take in the arena, rounded to pages."""
        return -(-self.padded(size_bytes) // EXTENT_ALIGNMENT_BYTES) * EXTENT_ALIGNMENT_BYTES

    def view(self, extent: Extent) -> memoryview:
        """Return the bytes of *extent*, without their table."""
        return self.arena.view[extent.offset : extent.offset + extent.size_bytes]

    def seal(self, extent: Extent, blocks: Digests64) -> None:
        """Put *blocks*, the digests of the bytes in *extent*, behind them."""
        if self.checksums:
            table = blocks.astype("<u8", copy=False).tobytes()
            start = extent.offset + table_offset(extent.size_bytes)
            self.arena.view[start : start + len(table)] = table

    def verify(self, extent: Extent, root: Root) -> bool:
        """Return whether table and bytes of *extent* agree with *root*."""
        if not self.checksums:
            return True
        table = self._table_under(extent, root)
        if table is None:
            return False
        payload = self.view(extent)
        return all(
            _block_digest(payload, block) == _entry(table, block)
            for block in self._verified_blocks(extent, root)
        )

    def verify_table(self, extent: Extent, root: Root) -> bool:
        """Return whether the table of *extent* agrees with *root*; no payload is read."""
        return self._table_under(extent, root) is not None

    def verify_bytes(self, extent: Extent, root: Root) -> bool:
        """Return whether every byte of *extent* agrees with *root*.

        For a thread: the GIL is released while bytes are read.
        """
        table = self._table_under(extent, root)
        return table is not None and digest_blocks(self.view(extent)).tobytes() == table

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
        """Unmap the arena; what is kept stays as it is."""
        self._memory.close()

    def _table_under(self, extent: Extent, root: Root) -> bytes | None:
        """Return the table of *extent* when it is the one that *root* stands for."""
        start = extent.offset + table_offset(extent.size_bytes)
        length = block_count(extent.size_bytes) * CHECKSUM_SIZE_BYTES
        # A copy: the writer still has this memory mapped and must not change it under the check.
        table = bytes(self.arena.view[start : start + length])
        return table if xxh3_64_intdigest(table) == root else None

    def _verified_blocks(self, extent: Extent, root: Root) -> range:
        blocks = block_count(extent.size_bytes)
        if self.verification == "full":
            return range(blocks)
        if self.verification == "root":
            return range(0)
        stride = -(-blocks // _SAMPLES_MAX)
        # Where the sample starts differs from chunk to chunk, and no writer can foresee it.
        return range(root % stride, blocks, stride)


def make_memory(
    arena: str, size_bytes: int, *, huge_pages: bool, checksums: bool
) -> Arena | KeptArena:
    """Return the memory of a host tier: "memfd", or the path of a file that is to be kept.

    Without checksums nothing that is found could be trusted: such a file is emptied first.
    Raises `ConfigError`.
    """
    if arena == "memfd":
        return Arena.create(size_bytes, huge_pages=huge_pages)
    return KeptArena(Path(arena), size_bytes, checksums=checksums)


def _block_digest(payload: memoryview, block: int) -> int:
    start = block * CHECKSUM_BLOCK_BYTES
    return xxh3_64_intdigest(payload[start : start + CHECKSUM_BLOCK_BYTES])


def _entry(table: bytes, block: int) -> int:
    start = block * CHECKSUM_SIZE_BYTES
    return int.from_bytes(table[start : start + CHECKSUM_SIZE_BYTES], "little")
