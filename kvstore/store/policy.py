"""Who leaves first. Policies know slots and sizes, never bytes, keys or time.

Order is kept in queues that are linked through arrays, 13 bytes a slot, so that a million
chunks cost no Python object each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from typing import Final, Protocol

import numpy as np

from kvstore.limits import GHOSTS_MAX
from kvstore.types import NO_SLOT


class EvictionPolicy(Protocol):
    """Decides the order of leaving.

    Every slot is admitted once and forgotten once; all else keeps it in.
    """

    def admit(self, slot: int, size_bytes: int, fingerprint: int, after: int = NO_SLOT) -> None:
        """Take *slot* in; *fingerprint* (64 bits) recognises the same chunk after it has left.

        *after* is the slot, known to this policy, of the chunk that it alone continues.
        """

    def admit_run(self, first: int, count: int, size_bytes: int) -> None:
        """Take in *count* slots, *first* and those behind it, oldest first: all newcomers.

        What an earlier daemon has left comes so; nothing is known of its uses.
        """

    def touch(self, slot: int) -> None:
        """Note a use of *slot*."""

    def candidate(self) -> int:
        """Return the slot that should leave next, or `NO_SLOT` when none is left."""

    def postpone(self, slot: int) -> None:
        """Put *slot*, which may not leave now, behind all others that could leave instead."""

    def defer(self, slot: int) -> None:
        """Put *slot* among those that leave only when nobody else is left, used or not."""

    def is_deferred(self, slot: int) -> bool:
        """Return whether *slot* is among those that leave last."""

    def hasten(self, slot: int) -> None:
        """Let *slot* leave before all others, unless it is used again."""

    def resume(self, slot: int) -> None:
        """Let *slot*, if it was postponed, deferred or hastened, leave in its turn again."""

    def forget(self, slot: int, fingerprint: int, *, evicted: bool) -> None:
        """Take *slot* out; only an *evicted* one is remembered as having been here."""


class Columns:
    """What policies note of every slot: links of the queue that it stands in, and more.

    The policies of all tenants on one tier share them, because a slot is in one of them only:
    a tenant costs no memory for the chunks of others.
    """

    __slots__ = ("after", "before", "size", "state")

    def __init__(self) -> None:
        self.before = array("i")
        self.after = array("i")
        # Uses in bits 0 and 1, the queue in those above.
        self.state = bytearray()
        self.size = array("I")

    def cover(self, slot: int) -> None:
        """Make room for *slot*; one at a time is the rule."""
        missing = slot + 1 - len(self.before)
        if missing > 0:
            self.before.extend([NO_SLOT] * missing)
            self.after.extend([NO_SLOT] * missing)
            self.state.extend(bytes(missing))
            self.size.extend([0] * missing)


class Queue:
    """First in, first out, with removal from anywhere in constant time."""

    __slots__ = ("_columns", "count", "head", "tail")

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.head = NO_SLOT
        self.tail = NO_SLOT
        self.count = 0

    def push(self, slot: int) -> None:
        """Put *slot* last."""
        self._columns.before[slot] = self.tail
        self._columns.after[slot] = NO_SLOT
        if self.tail == NO_SLOT:
            self.head = slot
        else:
            self._columns.after[self.tail] = slot
        self.tail = slot
        self.count += 1

    def push_run(self, first: int, count: int) -> None:
        """Put *count* slots, *first* and those behind it, last, one after the other."""
        last = first + count - 1
        before = np.frombuffer(self._columns.before, np.int32)
        after = np.frombuffer(self._columns.after, np.int32)
        before[first + 1 : last + 1] = np.arange(first, last)
        after[first:last] = np.arange(first + 1, last + 1)
        before[first], after[last] = self.tail, NO_SLOT
        if self.tail == NO_SLOT:
            self.head = first
        else:
            after[self.tail] = first
        self.tail = last
        self.count += count

    def remove(self, slot: int) -> None:
        """Take *slot* out, wherever it stands."""
        before, after = self._columns.before[slot], self._columns.after[slot]
        if before == NO_SLOT:
            assert self.head == slot, "the slot is in this queue"
            self.head = after
        else:
            self._columns.after[before] = after
        if after == NO_SLOT:
            assert self.tail == slot, "the slot is in this queue"
            self.tail = before
        else:
            self._columns.before[after] = before
        self.count -= 1


# A ghost is remembered for as many others as there are chunks, and for no fewer than these.
SPAN_MIN: Final = 64
_GHOST_ENTRIES_LOG2: Final = 10


class Ghost:
    """Remembers which chunks left lately: 8 bytes each, fingerprint and turn.

    A table addressed by fingerprint; a newer entry overwrites an older one in its place, and
    entries of more than *span* turns ago no longer count. After the paper's own layout.
    """

    __slots__ = ("_mask", "_table", "_turn")

    def __init__(self, entries_log2: int = _GHOST_ENTRIES_LOG2) -> None:
        self._mask = (1 << entries_log2) - 1
        self._table = array("Q", bytes(8 << entries_log2))
        self._turn = 0

    def add(self, fingerprint: int) -> None:
        """Remember *fingerprint* as the latest to leave."""
        self._turn = (self._turn + 1) & 0xFFFFFFFF
        self._table[fingerprint & self._mask] = (fingerprint >> 32 << 32) | self._turn

    def take(self, fingerprint: int, span: int) -> bool:
        """Return whether *fingerprint* left within the last *span* turns, and forget it."""
        at = fingerprint & self._mask
        entry = self._table[at]
        if entry == 0 or entry >> 32 != fingerprint >> 32:
            return False
        self._table[at] = 0
        return (self._turn - entry) & 0xFFFFFFFF < span

    def grow(self, count: int) -> None:
        """Double the table until it has room for *count*, or is as large as one may be."""
        while len(self._table) < min(count, GHOSTS_MAX):
            # Where an entry belongs now depends on a bit that was not kept: it is in both.
            self._table.extend(self._table)
            self._mask = len(self._table) - 1


_SMALL: Final = 0
_MAIN: Final = 1
_DONE: Final = 2
_HELD: Final = 3
_LAST: Final = 4
_USES_MAX: Final = 2
# The part of the bytes that is for newcomers.
_SMALL_SHARE_START: Final = 0.3
_SMALL_SHARE_MIN: Final = 0.1
_SMALL_SHARE_MAX: Final = 0.9
# How many of those that were held are tried again before one that is to leave last does.
RETRIES: Final = 64


class _Waiting(ABC):
    """What all policies do with chunks that may not leave now, leave first, or leave last.

    Each kind waits in a queue of its own and hides nobody else, however many wait. With every
    eviction the longest held is tried again; up to 64 are before one that leaves last does, and
    all are when there is nobody else.
    """

    def __init__(self, columns: Columns | None) -> None:
        self._columns = columns or Columns()
        self._state = self._columns.state
        self._size = self._columns.size
        self._queues = tuple(Queue(self._columns) for _ in range(5))
        self._bytes = [0, 0, 0, 0, 0]
        self._retries = RETRIES

    def candidate(self) -> int:
        """Return who leaves next."""
        _, _, done, held, last = self._queues
        while True:
            if done.count:
                slot = done.head
                if not self._state[slot] & 3:
                    return slot
                self.resume(slot)
            elif (slot := self._in_turn()) != NO_SLOT:
                return slot
            elif last.count and not (held.count and self._retries):
                return last.head
            elif last.count:
                self._retries -= 1
                self.resume(held.head)
            elif held.count:
                while held.count:
                    self.resume(held.head)
            else:
                return NO_SLOT

    def postpone(self, slot: int) -> None:
        """Set *slot* aside: it is held, so it is in use."""
        self._move(slot, _HELD)

    def defer(self, slot: int) -> None:
        """Set *slot* aside until nobody else is left."""
        self._move(slot, _LAST)

    def is_deferred(self, slot: int) -> bool:
        """Return whether *slot* is set aside until nobody else is left."""
        return self._state[slot] >> 2 == _LAST

    def hasten(self, slot: int) -> None:
        """Set *slot* aside as done with."""
        self._move(slot, _DONE, uses=0)

    def resume(self, slot: int) -> None:
        """Put *slot*, if it was set aside, last in the main queue."""
        if self._state[slot] >> 2 >= _DONE:
            self._move(slot, _MAIN)

    @abstractmethod
    def _in_turn(self) -> int:
        """Return who leaves next of those that are not set aside, or `NO_SLOT`."""

    def _take_in(self, slot: int, size_bytes: int, queue: int) -> None:
        self._columns.cover(slot)
        self._size[slot] = size_bytes
        self._enter(slot, queue, uses=0)

    def _take_in_run(self, first: int, count: int, size_bytes: int, queue: int) -> None:
        end = first + count
        self._columns.cover(end - 1)
        self._size[first:end] = array("I", [size_bytes]) * count
        self._state[first:end] = bytes([queue << 2]) * count
        self._queues[queue].push_run(first, count)
        self._bytes[queue] += size_bytes * count

    def _let_go(self, slot: int, *, evicted: bool) -> int:
        """Take *slot* out and return the queue that it was in."""
        queue = self._state[slot] >> 2
        self._leave(slot)
        if evicted:
            self._retries = RETRIES
            if self._queues[_HELD].count:
                self.resume(self._queues[_HELD].head)
        return queue

    def _move(self, slot: int, queue: int, *, uses: int | None = None) -> None:
        kept = self._state[slot] & 3 if uses is None else uses
        self._leave(slot)
        self._enter(slot, queue, uses=kept)

    def _enter(self, slot: int, queue: int, *, uses: int) -> None:
        self._state[slot] = queue << 2 | uses
        self._queues[queue].push(slot)
        self._bytes[queue] += self._size[slot]

    def _leave(self, slot: int) -> None:
        queue = self._state[slot] >> 2
        self._queues[queue].remove(slot)
        self._bytes[queue] -= self._size[slot]


class LRU(_Waiting):
    """Least recently used leaves first."""

    def __init__(self, columns: Columns | None = None) -> None:
        """Start empty; the policies of one tier share *columns*."""
        super().__init__(columns)

    def admit(self, slot: int, size_bytes: int, fingerprint: int, after: int = NO_SLOT) -> None:
        """Take *slot* in as the most recent."""
        del fingerprint, after
        self._take_in(slot, size_bytes, _MAIN)

    def admit_run(self, first: int, count: int, size_bytes: int) -> None:
        """Take *count* slots in, the last as the most recent."""
        self._take_in_run(first, count, size_bytes, _MAIN)

    def touch(self, slot: int) -> None:
        """Make *slot* the most recent; one that leaves last stays among those."""
        queue = self._state[slot] >> 2
        self._move(slot, queue if queue == _LAST else _MAIN)

    def forget(self, slot: int, fingerprint: int, *, evicted: bool) -> None:
        """Take *slot* out."""
        del fingerprint
        self._let_go(slot, evicted=evicted)

    def _in_turn(self) -> int:
        return self._queues[_MAIN].head


class S3Fifo(_Waiting):
    """S3-FIFO: a small queue sifts out what is used once, a main queue keeps the rest.

    After Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023: newcomers
    enter the small queue; those used move to the main queue when their turn to leave comes,
    which gives each chunk another round for every use; those that left lately skip the sieve.

    Conversations ask for three changes. Their think times are long, so one use is enough to
    pass the sieve, and the part of the bytes that is for newcomers adapts: it grows when chunks
    come back that have left the small queue, and shrinks when they have left the main one (as
    in ARC, Megiddo and Modha, FAST 2003). And what continues a prefix that was used, and that
    nothing else continues, is the next turn of a conversation: no newcomer.
    """

    def __init__(self, columns: Columns | None = None) -> None:
        """Start empty; the policies of one tier share *columns*."""
        super().__init__(columns)
        self.small_share = _SMALL_SHARE_START
        self._left_small = Ghost()
        self._left_main = Ghost()

    def admit(self, slot: int, size_bytes: int, fingerprint: int, after: int = NO_SLOT) -> None:
        """Take *slot* in: a newcomer to the small queue, all others to the main one."""
        is_known = self._came_back(fingerprint) or (after != NO_SLOT and self._is_in_use(after))
        self._take_in(slot, size_bytes, _MAIN if is_known else _SMALL)

    def admit_run(self, first: int, count: int, size_bytes: int) -> None:
        """Take *count* slots in, all to the small queue."""
        self._take_in_run(first, count, size_bytes, _SMALL)

    def touch(self, slot: int) -> None:
        """Count a use, up to two."""
        if self._state[slot] & 3 < _USES_MAX:
            self._state[slot] += 1

    def forget(self, slot: int, fingerprint: int, *, evicted: bool) -> None:
        """Take *slot* out; one evicted is remembered, by the queue that it was in."""
        queue = self._let_go(slot, evicted=evicted)
        if evicted and queue == _SMALL:
            self._left_small.add(fingerprint)
        elif evicted and queue == _MAIN:
            self._left_main.add(fingerprint)

    def _is_in_use(self, slot: int) -> bool:
        return self._state[slot] >> 2 != _SMALL or self._state[slot] & 3 != 0

    def _came_back(self, fingerprint: int) -> bool:
        """Return whether a chunk has left lately, and learn from it."""
        small = self._queues[_SMALL].count
        others = sum(queue.count for queue in self._queues[_MAIN:])
        step = 1 / max(SPAN_MIN, small + others)
        for ghost in (self._left_small, self._left_main):
            ghost.grow(small + others)
        if self._left_main.take(fingerprint, max(small, SPAN_MIN)):
            share = self.small_share - step * max(1.0, small / max(1, others))
        elif self._left_small.take(fingerprint, max(others, SPAN_MIN)):
            share = self.small_share + step * max(1.0, others / max(1, small))
        else:
            return False
        self.small_share = max(_SMALL_SHARE_MIN, min(_SMALL_SHARE_MAX, share))
        return True

    def _in_turn(self) -> int:
        """Return who leaves next, after moving on all that earned another round."""
        small, main = self._queues[:_DONE]
        while small.count or main.count:
            target = self.small_share * (self._bytes[_SMALL] + self._bytes[_MAIN])
            if small.count and (self._bytes[_SMALL] > target or not main.count):
                slot = small.head
                if not self._state[slot] & 3:
                    return slot
                self._move(slot, _MAIN, uses=0)
            else:
                slot = main.head
                uses = self._state[slot] & 3
                if not uses:
                    return slot
                self._move(slot, _MAIN, uses=uses - 1)
        return NO_SLOT


def make_policy(name: str, columns: Columns | None = None) -> EvictionPolicy:
    """Return the policy called *name*, "s3fifo" or "lru"; those of one tier share *columns*."""
    if name == "lru":
        return LRU(columns)
    assert name == "s3fifo", f"no policy is called {name!r}"
    return S3Fifo(columns)
