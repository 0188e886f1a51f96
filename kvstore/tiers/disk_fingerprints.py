"""Which slot holds a key: 64-bit fingerprints in open addressing, 18 to 36 bytes an entry.

The disk tier needs it for one thing alone: to notice that a key is written again. Fingerprints
stand for keys: of two keys with one fingerprint, the later is taken for the earlier one written
again, which costs a miss and never a wrong byte, since what is read is held against its full key.
"""

from __future__ import annotations

from array import array
from typing import Final

import numpy as np
import numpy.typing as npt

Fingerprint64 = npt.NDArray[np.uint64]

_TABLES: Final = 256
_TABLE_BITS: Final = 8
_ENTRIES_MIN: Final = 8
_EMPTY: Final = 2**32 - 1
NO_SLOT: Final = -1


class Fingerprints:
    """fingerprint -> slot. Many small tables, so that none takes long to grow."""

    def __init__(self) -> None:
        self._tables = [_Table() for _ in range(_TABLES)]

    def __len__(self) -> int:
        return sum(table.count for table in self._tables)

    def get(self, fingerprint: int) -> int:
        """Return the slot of *fingerprint*, or `NO_SLOT`."""
        return self._tables[fingerprint % _TABLES].get(fingerprint >> _TABLE_BITS)

    def put(self, fingerprint: int, slot: int) -> None:
        """Let *fingerprint* stand for *slot*."""
        self._tables[fingerprint % _TABLES].put(fingerprint >> _TABLE_BITS, slot)

    def drop(self, fingerprint: int) -> None:
        """Forget *fingerprint*, if it is known."""
        self._tables[fingerprint % _TABLES].drop(fingerprint >> _TABLE_BITS)

    def fill(self, fingerprints: Fingerprint64, slots: npt.NDArray[np.uint32]) -> None:
        """Put many at once, all different, into what is empty."""
        assert not len(self), "filled once"
        homes = fingerprints % np.uint64(_TABLES)
        order = np.argsort(homes, kind="stable")
        bounds = np.searchsorted(homes[order], np.arange(_TABLES + 1))
        keys = fingerprints >> np.uint64(_TABLE_BITS)
        for number, table in enumerate(self._tables):
            part = order[bounds[number] : bounds[number + 1]]
            table.fill(keys[part], slots[part])


class _Table:
    """Linear probing; at most two thirds full."""

    def __init__(self) -> None:
        self.count = 0
        self._allot(_ENTRIES_MIN)

    def get(self, key: int) -> int:
        at = self._find(key)
        return NO_SLOT if at is None else self._slots[at]

    def put(self, key: int, slot: int) -> None:
        assert 0 <= slot < _EMPTY, f"slot {slot} does not fit"
        found = self._find(key)
        if found is not None:
            self._slots[found] = slot
            return
        if (self.count + 1) * 3 > (self._mask + 1) * 2:
            self._double()
        self._insert(key, slot)

    def drop(self, key: int) -> None:
        found = self._find(key)
        if found is None:
            return
        self.count -= 1
        hole = at = found
        # What was pushed on by the dropped entry moves back, so that no probe ends too early.
        while True:
            at = (at + 1) & self._mask
            if self._slots[at] == _EMPTY:
                break
            if (at - self._keys[at]) & self._mask >= (at - hole) & self._mask:
                self._keys[hole], self._slots[hole] = self._keys[at], self._slots[at]
                hole = at
        self._slots[hole] = _EMPTY

    def fill(self, keys: Fingerprint64, slots: npt.NDArray[np.uint32]) -> None:
        """Put all *keys*, sorted by where they belong, each behind the one before."""
        # The least power of two in which one more can be put without growing.
        size = max(_ENTRIES_MIN, 1 << ((len(keys) + 2) * 3 // 2).bit_length())
        self._allot(size)
        homes = (keys & np.uint64(self._mask)).astype(np.int64)
        order = np.argsort(homes, kind="stable")
        keys, slots, homes = keys[order], slots[order], homes[order]
        steps = np.arange(len(keys), dtype=np.int64)
        places = np.maximum.accumulate(homes - steps) + steps if len(keys) else homes
        inside = places < size
        np.frombuffer(self._keys, np.uint64)[places[inside]] = keys[inside]
        np.frombuffer(self._slots, np.uint32)[places[inside]] = slots[inside]
        self.count = int(inside.sum())
        # The last ones may run over the end, and go on at its start.
        for key, slot in zip(keys[~inside].tolist(), slots[~inside].tolist(), strict=True):
            self._insert(key, slot)

    def _find(self, key: int) -> int | None:
        at = key & self._mask
        while self._slots[at] != _EMPTY:
            if self._keys[at] == key:
                return at
            at = (at + 1) & self._mask
        return None

    def _insert(self, key: int, slot: int) -> None:
        at = key & self._mask
        while self._slots[at] != _EMPTY:
            at = (at + 1) & self._mask
        self._keys[at], self._slots[at] = key, slot
        self.count += 1

    def _double(self) -> None:
        slots = np.frombuffer(self._slots, np.uint32)
        known = slots != _EMPTY
        keys = np.frombuffer(self._keys, np.uint64)[known]
        self.fill(keys, slots[known])

    def _allot(self, size: int) -> None:
        self._mask = size - 1
        self._keys = array("Q", bytes(8 * size))
        self._slots = array("I", b"\xff" * (4 * size))
