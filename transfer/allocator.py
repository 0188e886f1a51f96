"""Extents of one arena: two-level segregated fit with coalescing, O(1) in all three verbs.

Free runs are kept by exact size and by size class (16 classes an octave, a bitmap over them);
both ends of a free run are known, so a freed extent joins its neighbours at once. Nothing is
stored for allocated extents: their owner remembers them. After Masmano et al., "TLSF: a new
dynamic memory allocator for real-time systems", 2004.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kvstore.limits import EXTENT_ALIGNMENT_BYTES
from kvstore.types import Extent

_CLASS_BITS: Final = 4
_CLASSES_AN_OCTAVE: Final = 1 << _CLASS_BITS


def _class_of(pages: int) -> int:
    """Return the class whose sizes include *pages*."""
    if pages < _CLASSES_AN_OCTAVE:
        return pages
    octave = pages.bit_length() - _CLASS_BITS
    return octave * _CLASSES_AN_OCTAVE + (pages >> (octave - 1)) - _CLASSES_AN_OCTAVE


class Allocator:
    """Hands out page-aligned extents of `[0, capacity_bytes)`; knows offsets, never bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        assert capacity_bytes % EXTENT_ALIGNMENT_BYTES == 0, "whole pages only"
        self.capacity_bytes = capacity_bytes
        self._pages = capacity_bytes // EXTENT_ALIGNMENT_BYTES
        self._free_pages = 0
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        self._starts: dict[int, dict[int, None]] = {}
        self._sizes: dict[int, dict[int, None]] = {}
        self._occupied_classes = 0
        self._insert(0, self._pages)

    @property
    def free_bytes(self) -> int:
        """Bytes in no extent."""
        return self._free_pages * EXTENT_ALIGNMENT_BYTES

    @property
    def used_bytes(self) -> int:
        """Bytes in extents, padding included."""
        return self.capacity_bytes - self.free_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The largest extent that could be had without freeing anything."""
        if not self._occupied_classes:
            return 0
        largest = max(self._sizes[self._occupied_classes.bit_length() - 1])
        return largest * EXTENT_ALIGNMENT_BYTES

    def allocate(self, size_bytes: int) -> Extent | None:
        """Return an extent of *size_bytes*, or None when no free run is long enough.

        Nothing changes when None is returned.
        """
        assert size_bytes > 0, "an extent has a size"
        pages = _pages_of(size_bytes)
        found = self._find(pages)
        if found is None:
            return None
        start = next(iter(self._starts[found]))
        self._remove(start, found)
        if found > pages:
            self._insert(start + pages, found - pages)
        return Extent(start * EXTENT_ALIGNMENT_BYTES, size_bytes)

    def occupy(self, extents: Iterable[Extent]) -> None:
        """Count *extents* as allocated, in an allocator that nothing was taken from.

        They must lie inside, start on pages and not overlap.
        """
        assert self._free_pages == self._pages, "extents are occupied before any is allocated"
        self._remove(0, self._pages)
        end = 0
        for offset, size_bytes in sorted(extents):
            start, rest = divmod(offset, EXTENT_ALIGNMENT_BYTES)
            assert not rest, f"extent at {offset} starts on no page"
            assert start >= end, f"extent at {offset} overlaps another"
            if start > end:
                self._insert(end, start - end)
            end = start + _pages_of(size_bytes)
        assert end <= self._pages, f"extents end at page {end} of {self._pages}"
        if end < self._pages:
            self._insert(end, self._pages - end)

    def free(self, extent: Extent) -> None:
        """Take *extent* back; it must be allocated, and is freed once."""
        start = extent.offset // EXTENT_ALIGNMENT_BYTES
        pages = _pages_of(extent.size_bytes)
        assert start not in self._size_at, f"extent at {extent.offset} is freed twice"
        before = self._start_before.get(start)
        if before is not None:
            size = self._size_at[before]
            self._remove(before, size)
            start, pages = before, pages + size
        behind = self._size_at.get(start + pages)
        if behind is not None:
            self._remove(start + pages, behind)
            pages += behind
        self._insert(start, pages)

    def check(self, extents: Iterable[Extent]) -> None:
        """Raise `AssertionError` unless *extents* and the free runs tile the arena exactly."""
        runs = [(e.offset // EXTENT_ALIGNMENT_BYTES, _pages_of(e.size_bytes)) for e in extents]
        runs += self._size_at.items()
        end = 0
        for start, pages in sorted(runs):
            assert start == end, f"gap or overlap at page {min(start, end)}"
            end = start + pages
        assert end == self._pages, f"pages end at {end} of {self._pages}"
        assert self._free_pages == sum(self._size_at.values()), "free pages are miscounted"

    def _find(self, pages: int) -> int | None:
        """Return the size of a free run of at least *pages*: exact, else the next class.

        Only when every higher class is empty are the sizes of the own one looked through.
        They differ by at most 1/16, so they are few.
        """
        if pages in self._starts:
            return pages
        own = _class_of(pages)
        higher = self._occupied_classes >> (own + 1)
        if higher:
            lowest = (higher & -higher).bit_length() - 1
            return next(iter(self._sizes[own + 1 + lowest]))
        longest = max(self._sizes.get(own, ()), default=0)
        return longest if longest >= pages else None

    def _insert(self, start: int, pages: int) -> None:
        self._size_at[start] = pages
        self._start_before[start + pages] = start
        self._free_pages += pages
        starts = self._starts.get(pages)
        if starts is None:
            starts = self._starts[pages] = {}
            index = _class_of(pages)
            self._sizes.setdefault(index, {})[pages] = None
            self._occupied_classes |= 1 << index
        starts[start] = None

    def _remove(self, start: int, pages: int) -> None:
        del self._size_at[start]
        del self._start_before[start + pages]
        self._free_pages -= pages
        starts = self._starts[pages]
        del starts[start]
        if not starts:
            del self._starts[pages]
            index = _class_of(pages)
            sizes = self._sizes[index]
            del sizes[pages]
            if not sizes:
                self._occupied_classes &= ~(1 << index)


def _pages_of(size_bytes: int) -> int:
    return -(-size_bytes // EXTENT_ALIGNMENT_BYTES)
