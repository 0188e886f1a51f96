"""Which extent each slot of the index stands for: columns, not objects; no I/O.

A slot is the place of a record in the index. In memory it costs 12 bytes and its fingerprint.
Everything here belongs to one thread.
"""

from __future__ import annotations

from array import array
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.limits import EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.base import TierUsage
from kvstore.tiers.disk_fingerprints import NO_SLOT, Fingerprints
from kvstore.tiers.disk_layout import Rows, footprint
from kvstore.tiers.disk_recovery import Numbers, runs_of
from kvstore.transfer.allocator import Allocator
from kvstore.types import Extent, Place

_GENERATION_BITS: Final = 32
_GENERATION_MASK: Final = 2**_GENERATION_BITS - 1
_NEVER: Final = 0
"""The generation of a slot that holds nothing."""


class Room(NamedTuple):
    """A slot and its extent: header at *offset*, then *size_bytes* of payload."""

    slot: int
    offset: int
    size_bytes: int

    @property
    def extent(self) -> Extent:
        """The whole of what is allocated."""
        return Extent(self.offset, footprint(self.size_bytes))


class Slots:
    """Slots and the extents of the slab, of which at most *limit_bytes* are in use at once.

    A place names a slot and the low bits of the sequence number that its shard was published
    with, so that a place of something gone never names what came into its slot later.
    """

    def __init__(self, *, slab_bytes: int, limit_bytes: int, slots_max: int) -> None:
        assert limit_bytes <= slab_bytes, "the slab may be longer than what is used of it"
        self._allocator = Allocator(slab_bytes)
        self._limit_bytes = limit_bytes
        self._slots_max = slots_max
        self._generations = array("I")
        self._pages = array("I")
        self._sizes = array("I")
        self._vacant = array("I")
        self._fingerprints = Fingerprints()
        self._sequence = 0
        self._readers: dict[int, int] = {}
        self._doomed: set[int] = set()

    def __len__(self) -> int:
        """Return how many shards are published."""
        return len(self._fingerprints)

    def restore(self, rows: Rows, slots: Numbers) -> None:
        """Take over the records at *slots* of an index of *rows*, before anything else."""
        assert not self._generations, "restored once, at the start"
        kept = rows[slots]
        for column, values in (
            (self._generations, kept["sequence"] & np.uint64(_GENERATION_MASK)),
            (self._pages, kept["page"]),
            (self._sizes, kept["size_bytes"]),
        ):
            filled = np.zeros(len(rows), np.uint32)
            filled[slots] = values
            column.frombytes(filled.tobytes())
        is_vacant = np.ones(len(rows), np.bool_)
        is_vacant[slots] = False
        # The lowest are taken first, so that the index stays short.
        vacant = np.flatnonzero(is_vacant)[::-1].astype(np.uint32)
        self._vacant.frombytes(vacant.tobytes())
        self._fingerprints.fill(kept["fingerprint"].copy(), slots.astype(np.uint32))
        self._allocator.occupy(runs_of(kept))
        self._sequence = int(rows["sequence"][slots].max(initial=0))

    # --- what is published ---------------------------------------------------------------

    def find(self, place: Place) -> Room | None:
        """Return the room of what was published as *place*, unless it is gone."""
        slot, generation = place >> _GENERATION_BITS, place & _GENERATION_MASK
        if slot >= len(self._generations) or generation == _NEVER:
            return None
        return self.room(slot) if self._generations[slot] == generation else None

    def room(self, slot: int) -> Room:
        """Return what belongs to *slot*."""
        return Room(slot, self._pages[slot] * EXTENT_ALIGNMENT_BYTES, self._sizes[slot])

    def slot_of(self, fingerprint: int) -> int:
        """Return the slot that was published with *fingerprint*, or `NO_SLOT`."""
        return self._fingerprints.get(fingerprint)

    def place_of(self, slot: int) -> Place:
        """Return the place that *slot* was published as; 0 in the low bits when it is vacant."""
        return Place(slot << _GENERATION_BITS | self._generations[slot])

    def published(self, sequences: npt.NDArray[np.uint64]) -> Numbers:
        """Return the slots that hold what was published with their one of *sequences*."""
        known = np.array(self._generations[: len(sequences)], np.uint32)
        held = (sequences & np.uint64(_GENERATION_MASK)).astype(np.uint32)[: len(known)]
        return np.flatnonzero((known == held) & (known != _NEVER))

    def places_of(self, slots: Numbers) -> npt.NDArray[np.uint64]:
        """Return `place_of` every one of *slots*."""
        generations = np.frombuffer(self._generations, np.uint32)[slots]
        return (slots << _GENERATION_BITS | generations).astype(np.uint64)

    # --- taking and giving back ------------------------------------------------------------

    def take(self, size_bytes: int) -> Room | None:
        """Return a vacant slot with room for *size_bytes*, or None without changing anything."""
        needed = footprint(size_bytes)
        if self._allocator.used_bytes + needed > self._limit_bytes:
            return None
        if not self._vacant and len(self._generations) >= self._slots_max:
            return None
        extent = self._allocator.allocate(needed)
        if extent is None:
            return None
        if not self._vacant:
            self._vacant.append(len(self._generations))
            for column in (self._generations, self._pages, self._sizes):
                column.append(0)
        slot = self._vacant.pop()
        self._pages[slot] = extent.offset // EXTENT_ALIGNMENT_BYTES
        self._sizes[slot] = size_bytes
        return self.room(slot)

    def next_sequence(self) -> int:
        """Return a number larger than any before; it is no multiple of 2**32."""
        self._sequence += 1
        if self._sequence & _GENERATION_MASK == _NEVER:
            self._sequence += 1
        return self._sequence

    def publish(self, room: Room, sequence: int, fingerprint: int) -> Place:
        """Make the shard in *room* one that is found."""
        assert self._generations[room.slot] == _NEVER, "a slot is published once"
        self._generations[room.slot] = sequence & _GENERATION_MASK
        self._fingerprints.put(fingerprint, room.slot)
        return self.place_of(room.slot)

    def retire(self, slot: int, fingerprint: int) -> None:
        """Make what is in *slot* one that is not found; its room stays taken."""
        assert self._generations[slot] != _NEVER, "what is retired was published"
        self._generations[slot] = _NEVER
        if self._fingerprints.get(fingerprint) == slot:
            self._fingerprints.drop(fingerprint)

    def give_back(self, slot: int) -> None:
        """Free the room of *slot*, which is not published, and the slot."""
        assert self._generations[slot] == _NEVER, "what is published keeps its room"
        assert slot not in self._readers, "what is read keeps its room"
        self._allocator.free(self.room(slot).extent)
        self._vacant.append(slot)

    # --- reading ---------------------------------------------------------------------------

    def enter(self, slot: int) -> None:
        """Note that *slot* is read: its room is kept until `leave`."""
        self._readers[slot] = self._readers.get(slot, 0) + 1

    def leave(self, slot: int) -> bool:
        """Note the end of a read; True when it is now for the caller to give *slot* back."""
        self._readers[slot] -= 1
        if self._readers[slot]:
            return False
        del self._readers[slot]
        is_doomed = slot in self._doomed
        self._doomed.discard(slot)
        return is_doomed

    def doom(self, slot: int) -> bool:
        """Return whether a retired *slot* can be given back now; else `leave` says when."""
        if slot not in self._readers:
            return True
        self._doomed.add(slot)
        return False

    # --- what holds ------------------------------------------------------------------------

    def usage(self) -> TierUsage:
        """Return how full the slab is."""
        used = self._allocator.used_bytes
        free = min(self._allocator.largest_free_bytes, self._limit_bytes - used)
        return TierUsage(self._limit_bytes, used, free)

    def check(self) -> None:
        """Raise `AssertionError` unless extents tile the slab. Nothing may be under way."""
        vacant = set(self._vacant)
        assert len(vacant) == len(self._vacant), "a slot is vacant twice"
        taken = [slot for slot in range(len(self._generations)) if slot not in vacant]
        self._allocator.check(self.room(slot).extent for slot in taken)
        assert all(self._generations[slot] for slot in taken), "a slot leaks"
        assert not any(self._generations[slot] for slot in vacant), "a vacant slot is published"
        assert len(self) == len(taken), "fingerprints and slots differ in number"
        assert self._allocator.used_bytes <= self._limit_bytes, "more is used than allowed"
        assert not self._readers, "a reader never left"
        assert not self._doomed, "what was read last is not given back"


assert NO_SLOT < 0, "no slot has this number"
