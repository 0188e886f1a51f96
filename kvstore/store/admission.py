"""What a slower tier takes in: everything, what comes again, or what comes more often.

Writing costs a slow tier time and a disk its life, and most chunks are never asked for again.
An admission knows 64-bit fingerprints and sizes, never bytes, slots or time; it may be wrong
about a chunk, which costs a hit or a write and nothing else. Its memory is bounded: at most
5 MiB a tier, see `ADMISSION_ENTRIES_MAX`.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from kvstore.limits import ADMISSION_ENTRIES_MAX

# Chunks are mostly larger than this, so that a memory has an entry for each that fits a tier.
_CHUNK_BYTES: Final = 256 * 1024
_ENTRIES_MIN: Final = 4096
_WORD: Final = (1 << 64) - 1


class Admission(Protocol):
    """Decides what enters. A chunk is noted with every use, and admitted by what was noted."""

    def note(self, fingerprint: int, size_bytes: int) -> None:
        """Note a use of a chunk: its store, or a load, from whichever tier."""

    def admits(self, fingerprint: int, victim: int | None = None) -> bool:
        """Return whether the chunk, whose use has been noted, may enter.

        *victim* is the fingerprint of the chunk that would have to leave for it; None when
        there is room. Changes nothing.
        """


class AdmitAll:
    """Everything enters."""

    def note(self, fingerprint: int, size_bytes: int) -> None:
        """Remember nothing."""

    def admits(self, fingerprint: int, victim: int | None = None) -> bool:
        """Return True."""
        del fingerprint, victim
        return True


class Bloom:
    """A set that forgets nothing, and takes a few for members that are not.

    Eight bits an entry and four probes: 2.4 % when full.
    """

    __slots__ = ("_bits", "_mask", "count")

    def __init__(self, entries: int) -> None:
        """Make room for *entries*, a power of two."""
        self._bits = bytearray(entries)
        self._mask = 8 * entries - 1
        self.count = 0

    def add(self, fingerprint: int) -> bool:
        """Take *fingerprint* in; return whether it was new."""
        bits, mask = self._bits, self._mask
        is_new = False
        for at in _probes(fingerprint):
            bit = at & mask
            if not bits[bit >> 3] >> (bit & 7) & 1:
                bits[bit >> 3] |= 1 << (bit & 7)
                is_new = True
        self.count += is_new
        return is_new

    def __contains__(self, fingerprint: int) -> bool:
        """Return whether *fingerprint* was taken in, or looks like one that was."""
        bits, mask = self._bits, self._mask
        for at in _probes(fingerprint):
            bit = at & mask
            if not bits[bit >> 3] >> (bit & 7) & 1:
                return False
        return True

    def clear(self) -> None:
        """Forget all."""
        self._bits = bytearray(len(self._bits))
        self.count = 0


def _probes(fingerprint: int) -> tuple[int, int, int, int]:
    """Return four numbers of at least 23 good bits each: parts of a digest need no hashing."""
    turned = fingerprint * 0x9E3779B97F4A7C15 & _WORD
    return fingerprint, fingerprint >> 32, turned >> 8, turned >> 36


class SecondTouch:
    """What is used a second time enters.

    Remembers the chunks of the last uses in two generations: when the newer one is full, in
    entries or in bytes, it becomes the older one, and what was in that is forgotten. A chunk is
    remembered for one to two capacities worth of other chunks.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Remember about as many bytes of chunks as the tier has."""
        self._entries = _entries_for(capacity_bytes)
        self._span_bytes = capacity_bytes
        self._bytes = 0
        self._once = (Bloom(self._entries // 2), Bloom(self._entries // 2))
        self._again = (Bloom(self._entries // 2), Bloom(self._entries // 2))

    def note(self, fingerprint: int, size_bytes: int) -> None:
        """Remember the chunk as used, and as used again when it was remembered."""
        newer, older = self._once
        was_used = fingerprint in older
        if newer.add(fingerprint):
            self._bytes += size_bytes
        else:
            was_used = True
        if was_used:
            self._again[0].add(fingerprint)
        if newer.count >= self._entries // 2 or self._bytes >= self._span_bytes:
            self._turn()

    def admits(self, fingerprint: int, victim: int | None = None) -> bool:
        """Return whether the chunk was used at least twice; room or victim do not matter."""
        del victim
        return fingerprint in self._again[0] or fingerprint in self._again[1]

    def _turn(self) -> None:
        self._bytes = 0
        self._once, self._again = self._once[::-1], self._again[::-1]
        self._once[0].clear()
        self._again[0].clear()


_ROWS: Final = 4
_COUNT_MAX: Final = 15
# Capacities of bytes noted, after which all counts are halved.
_HALVE_AFTER: Final = 10


class TinyLFU:
    """What was used more often than the chunk it would push out enters.

    After Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy",
    ACM Transactions on Storage, 2017: a count-min sketch counts uses up to 15, a Bloom filter
    before it (the doorkeeper) keeps out what is used once, and all counts are halved from time
    to time, so that what was popular yesterday gives way.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Count over about ten times as many bytes as the tier has."""
        entries = _entries_for(capacity_bytes)
        self._mask = entries - 1
        self._rows = [bytearray(entries) for _ in range(_ROWS)]
        self._doorkeeper = Bloom(entries)
        self._span_bytes = _HALVE_AFTER * capacity_bytes
        self._bytes = 0

    def note(self, fingerprint: int, size_bytes: int) -> None:
        """Count a use."""
        self._bytes += size_bytes
        if self._bytes >= self._span_bytes or self._doorkeeper.count > self._mask:
            self._halve()
        if self._doorkeeper.add(fingerprint):
            return
        mask = self._mask
        places = [at & mask for at in _probes(fingerprint)]
        least = min(row[at] for row, at in zip(self._rows, places, strict=True))
        if least == _COUNT_MAX:
            return
        # Only the smallest counters grow: the others are known to count others too.
        for row, at in zip(self._rows, places, strict=True):
            if row[at] == least:
                row[at] = least + 1

    def estimate(self, fingerprint: int) -> int:
        """Return how often the chunk was used lately, up to 16, rather too often than not."""
        mask = self._mask
        first, second, third, fourth = self._rows
        a, b, c, d = _probes(fingerprint)
        counted = min(first[a & mask], second[b & mask], third[c & mask], fourth[d & mask])
        return counted + (fingerprint in self._doorkeeper)

    def admits(self, fingerprint: int, victim: int | None = None) -> bool:
        """Return whether there is room, or the chunk was used more often than *victim*."""
        return victim is None or self.estimate(fingerprint) > self.estimate(victim)

    def _halve(self) -> None:
        self._bytes = 0
        self._doorkeeper.clear()
        for row in self._rows:
            counts = np.frombuffer(row, dtype=np.uint8)
            counts >>= 1


def _entries_for(capacity_bytes: int) -> int:
    """Return a power of two that is enough for the chunks of a tier, within bounds."""
    wanted = max(_ENTRIES_MIN, min(ADMISSION_ENTRIES_MAX, capacity_bytes // _CHUNK_BYTES))
    return 1 << (wanted - 1).bit_length()


def make_admission(name: str, capacity_bytes: int) -> Admission:
    """Return the admission called *name* for a tier of *capacity_bytes*.

    Names are "all", "second_touch" and "tinylfu".
    """
    if name == "all":
        return AdmitAll()
    if name == "second_touch":
        return SecondTouch(capacity_bytes)
    assert name == "tinylfu", f"no admission is called {name!r}"
    return TinyLFU(capacity_bytes)
