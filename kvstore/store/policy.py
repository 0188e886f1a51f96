"""Who leaves first. Policies know slots and sizes, never bytes, keys or time.

Order is kept in queues that are linked through arrays, eight bytes a slot, so that a million
chunks cost no Python object each.
"""

from __future__ import annotations

from array import array
from typing import Final, Protocol

from kvstore.types import NO_SLOT


class EvictionPolicy(Protocol):
    """Decides the order of leaving.

    Every slot is admitted once and forgotten once; touch and postpone keep it in.
    """

    def admit(self, slot: int, size_bytes: int, fingerprint: int) -> None:
        """Take *slot* in; *fingerprint* (64 bits) recognises the same chunk after it has left."""

    def touch(self, slot: int) -> None:
        """Note a use of *slot*."""

    def candidate(self) -> int:
        """Return the slot that should leave next, or `NO_SLOT` when none is left."""

    def postpone(self, slot: int) -> None:
        """Put *slot*, which may not leave now, behind all others that could leave instead."""

    def hasten(self, slot: int) -> None:
        """Let *slot* leave before all others, unless it is used again."""

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

    __slots__ = ("_links", "count", "head", "tail")

    def __init__(self, links: Columns) -> None:
        self._links = links
        self.head = NO_SLOT
        self.tail = NO_SLOT
        self.count = 0

    def push(self, slot: int) -> None:
        """Put *slot* last."""
        self._links.before[slot] = self.tail
        self._links.after[slot] = NO_SLOT
        if self.tail == NO_SLOT:
            self.head = slot
        else:
            self._links.after[self.tail] = slot
        self.tail = slot
        self.count += 1

    def push_first(self, slot: int) -> None:
        """Put *slot* before all others."""
        self._links.before[slot] = NO_SLOT
        self._links.after[slot] = self.head
        if self.head == NO_SLOT:
            self.tail = slot
        else:
            self._links.before[self.head] = slot
        self.head = slot
        self.count += 1

    def remove(self, slot: int) -> None:
        """Take *slot* out, wherever it stands."""
        before, after = self._links.before[slot], self._links.after[slot]
        if before == NO_SLOT:
            assert self.head == slot, "the slot is in this queue"
            self.head = after
        else:
            self._links.after[before] = after
        if after == NO_SLOT:
            assert self.tail == slot, "the slot is in this queue"
            self.tail = before
        else:
            self._links.before[after] = before
        self.count -= 1


class LRU:
    """Least recently used leaves first."""

    def __init__(self, columns: Columns | None = None) -> None:
        self._links = columns or Columns()
        self._queue = Queue(self._links)

    def admit(self, slot: int, size_bytes: int, fingerprint: int) -> None:
        """Take *slot* in as the most recent."""
        del size_bytes, fingerprint
        self._links.cover(slot)
        self._queue.push(slot)

    def touch(self, slot: int) -> None:
        """Make *slot* the most recent."""
        self._queue.remove(slot)
        self._queue.push(slot)

    def candidate(self) -> int:
        """Return the least recent slot."""
        return self._queue.head

    def postpone(self, slot: int) -> None:
        """Make *slot* the most recent: it is held, which is a use."""
        self.touch(slot)

    def hasten(self, slot: int) -> None:
        """Make *slot* the least recent."""
        self._queue.remove(slot)
        self._queue.push_first(slot)

    def forget(self, slot: int, fingerprint: int, *, evicted: bool) -> None:
        """Take *slot* out."""
        del fingerprint, evicted
        self._queue.remove(slot)


class Ghost:
    """Remembers which chunks left lately: 8 bytes each, fingerprint and turn.

    A table addressed by fingerprint; a newer entry overwrites an older one in its place, and
    entries of more than *span* turns ago no longer count. After the paper's own layout.
    """

    __slots__ = ("_mask", "_table", "_turn")

    def __init__(self, entries_log2: int) -> None:
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


_SMALL: Final = 0
_MAIN: Final = 1
_HELD: Final = 2
_DONE: Final = 3
_USES_MAX: Final = 3
_GHOST_ENTRIES_LOG2: Final = 16


class S3Fifo:
    """S3-FIFO: a small queue sifts out what is used once, a main queue keeps the rest.

    After Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023: a tenth
    of the bytes is for newcomers; those used more than once move to the main queue, which
    gives each chunk another round for every use; those that left lately skip the sieve.

    The paper knows no chunks that may not leave. Here they wait in a queue of their own, so
    that they hide nobody who may; with every eviction the longest waiting is tried again.
    Nor does it know chunks that are said to be done with: they leave before all others.
    """

    def __init__(self, capacity_bytes: int, columns: Columns | None = None) -> None:
        self._small_target_bytes = capacity_bytes // 10
        self._links = columns or Columns()
        self._queues = tuple(Queue(self._links) for _ in range(4))
        self._bytes = [0, 0, 0, 0]
        self._ghost = Ghost(_GHOST_ENTRIES_LOG2)
        self._state = self._links.state
        self._size = self._links.size

    def admit(self, slot: int, size_bytes: int, fingerprint: int) -> None:
        """Take *slot* in: a newcomer to the small queue, one that left lately to the main one."""
        self._links.cover(slot)
        span = max(self._queues[_MAIN].count + self._queues[_HELD].count, 64)
        self._size[slot] = size_bytes
        self._enter(slot, _MAIN if self._ghost.take(fingerprint, span) else _SMALL, uses=0)

    def touch(self, slot: int) -> None:
        """Count a use, up to three."""
        if self._state[slot] & 3 < _USES_MAX:
            self._state[slot] += 1

    def candidate(self) -> int:
        """Return who leaves next, after moving on all that earned another round."""
        small, main, held, done = self._queues
        while True:
            if done.count:
                slot = done.head
                uses = self._state[slot] & 3
                if not uses:
                    return slot
                self._move(slot, _MAIN, uses=uses - 1)
            elif small.count and (self._bytes[_SMALL] > self._small_target_bytes or not main.count):
                slot = small.head
                if self._state[slot] & 3 <= 1:
                    return slot
                self._move(slot, _MAIN, uses=0)
            elif main.count:
                slot = main.head
                uses = self._state[slot] & 3
                if not uses:
                    return slot
                self._move(slot, _MAIN, uses=uses - 1)
            elif held.count:
                while held.count:
                    self._try_again(held.head)
            else:
                return NO_SLOT

    def postpone(self, slot: int) -> None:
        """Set *slot* aside: it is held, so it is in use."""
        self._move(slot, _HELD, uses=self._state[slot] & 3)

    def hasten(self, slot: int) -> None:
        """Set *slot* aside as done with."""
        self._move(slot, _DONE, uses=0)

    def forget(self, slot: int, fingerprint: int, *, evicted: bool) -> None:
        """Take *slot* out; one evicted from the small queue is remembered."""
        from_small = self._state[slot] >> 2 == _SMALL
        self._leave(slot)
        if evicted and from_small:
            self._ghost.add(fingerprint)
        if evicted and self._queues[_HELD].count:
            self._try_again(self._queues[_HELD].head)

    def _try_again(self, slot: int) -> None:
        self._move(slot, _MAIN, uses=self._state[slot] & 3)

    def _move(self, slot: int, queue: int, *, uses: int) -> None:
        self._leave(slot)
        self._enter(slot, queue, uses=uses)

    def _enter(self, slot: int, queue: int, *, uses: int) -> None:
        self._state[slot] = queue << 2 | uses
        self._queues[queue].push(slot)
        self._bytes[queue] += self._size[slot]

    def _leave(self, slot: int) -> None:
        queue = self._state[slot] >> 2
        self._queues[queue].remove(slot)
        self._bytes[queue] -= self._size[slot]


def make_policy(name: str, capacity_bytes: int, columns: Columns | None = None) -> EvictionPolicy:
    """Return the policy called *name* ("s3fifo" or "lru") for a tier of *capacity_bytes*."""
    if name == "lru":
        return LRU(columns)
    assert name == "s3fifo", f"no policy is called {name!r}"
    return S3Fifo(capacity_bytes, columns)
