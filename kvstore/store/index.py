"""What is kept, and where: every committed chunk of every namespace.

A chunk is a *slot*, a small number; its fields are columns (arrays), so that a chunk costs
about 250 bytes, and to find one is at most one dict access whatever their number. Shards
beyond the first of a chunk, which only tensor-parallel writers make, lie in a side table.
Chunks of a prefix form a tree by parent, in which leaves leave first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

from kvstore.errors import LimitError
from kvstore.limits import EXTENT_ALIGNMENT_BYTES, NAMESPACES_MAX
from kvstore.protocol.manifest import Manifest
from kvstore.types import NO_SLOT, Digest, Extent, HeadRange, Root, TierKind

_RUN_SLOTS: Final = 64
_SLOTS_WORTH_A_GETTER: Final = 8
_SOFT_PIN: Final = 1
_HARD_PIN: Final = 2


class ShardRecord(NamedTuple):
    """One stored shard: which heads, where, and the root of its checksum tree."""

    heads: HeadRange
    extent: Extent
    root: Root


class Namespace:
    """The chunks of one manifest. *ready* ones have all their heads, *partial* ones do not.

    *entered* counts the sessions that are in it. *marks* says on a run of slots, the same on
    each, that they are ready in this namespace.
    """

    __slots__ = ("entered", "id", "manifest", "marks", "number", "partial", "ready")

    def __init__(self, number: int, manifest: Manifest) -> None:
        self.number = number
        self.manifest = manifest
        self.id = manifest.namespace_id()
        self.marks = array("H", [number + 1]) * _RUN_SLOTS
        self.entered = 0
        self.ready: dict[Digest, int] = {}
        self.partial: dict[Digest, int] = {}

    @property
    def is_unused(self) -> bool:
        """Whether nobody would miss it: no chunks, no sessions."""
        return not (self.ready or self.partial or self.entered)

    def find(self, digest: Digest) -> int:
        """Return the slot of *digest*, whole or partial, or `NO_SLOT`."""
        slot = self.ready.get(digest)
        return self.partial.get(digest, NO_SLOT) if slot is None else slot


class Index:
    """All slots. Holds no bytes and frees none: `remove` returns the extents to be freed."""

    def __init__(self) -> None:
        self.namespaces: list[Namespace] = []
        self.held = 0
        self._digest: list[Digest | None] = []
        self._vacant: list[int] = []
        self._more_shards: dict[int, list[ShardRecord]] = {}
        self._space = array("H")
        # The mark of the namespace in which a slot is ready; see `Namespace.marks`.
        self._ready_in = array("H")
        self._page = array("I")
        self._size = array("I")
        self._root = array("Q")
        self._head_start = array("H")
        self._head_stop = array("H")
        self._leases = array("I")
        self._pins = bytearray()
        self._tiers = bytearray()
        self._parent = array("i")
        self._child = array("i")
        self._next_sibling = array("i")
        self._previous_sibling = array("i")

    def __len__(self) -> int:
        """Return the number of chunks, whole and partial."""
        return len(self._digest) - len(self._vacant)

    def slots(self) -> Iterator[int]:
        """Yield every slot in use."""
        return (slot for slot, digest in enumerate(self._digest) if digest is not None)

    def open_namespace(self, manifest: Manifest) -> Namespace:
        """Add a namespace for *manifest*; raises `LimitError` when all there may be are in use."""
        if len(self.namespaces) < NAMESPACES_MAX:
            self.namespaces.append(Namespace(len(self.namespaces), manifest))
            return self.namespaces[-1]
        for number, space in enumerate(self.namespaces):
            if space.is_unused:
                self.namespaces[number] = Namespace(number, manifest)
                return self.namespaces[number]
        raise LimitError(f"{NAMESPACES_MAX} namespaces are in use, no more are allowed")

    # --- finding ------------------------------------------------------------------------

    def leading(self, space: Namespace, digests: Sequence[Digest]) -> list[int]:
        """Return the slots of the leading whole chunks; a gap ends the prefix.

        What was stored in order lies in slots in order. Comparing a run of those is several
        times cheaper than finding each of them in a dict of a million.
        """
        slots: list[int] = []
        expected = space.ready.get(digests[0], NO_SLOT) if digests else NO_SLOT
        if expected == NO_SLOT:
            return slots
        for start in range(0, len(digests), _RUN_SLOTS):
            block = digests[start : start + _RUN_SLOTS]
            if self._is_run(space, expected, block):
                slots.extend(range(expected, expected + len(block)))
            else:
                found = list(map(space.ready.get, block))
                if None in found:
                    slots += found[: found.index(None)]  # type: ignore[arg-type]  # no None before
                    break
                slots += found  # type: ignore[arg-type]  # none of them is None
            expected = slots[-1] + 1
        return slots

    def _is_run(self, space: Namespace, first: int, digests: Sequence[Digest]) -> bool:
        """Return whether *digests* are ready in *space*, in consecutive slots from *first*."""
        count = len(digests)
        return (
            self._digest[first : first + count] == digests
            and self._ready_in[first : first + count] == space.marks[:count]
        )

    def prefix(
        self, space: Namespace, digests: Sequence[Digest], window: int
    ) -> tuple[int, list[int]]:
        """Return how many chunks are a hit, and the slots that make them one.

        Without *window* these are the leading chunks, with it the last *window* of the longest
        prefix that has them, see `window_hits`.
        """
        if not window:
            slots = self.leading(space, digests)
            return len(slots), slots
        hits = self.window_hits(space, digests, window)
        return hits, self.leading(space, digests[max(0, hits - window) : hits])

    def window_hits(self, space: Namespace, digests: Sequence[Digest], window: int) -> int:
        """Return the largest n such that chunks [max(0, n - window), n) are present, or 0."""
        ready = space.ready
        run = 0
        for position in range(len(digests) - 1, -1, -1):
            run = run + 1 if digests[position] in ready else 0
            if run == window:
                return position + window
        return run

    def tiers(self, slots: Sequence[int]) -> bytes:
        """Return one byte a slot: the bits of the tiers that hold it."""
        if len(slots) < _SLOTS_WORTH_A_GETTER:
            return bytes(map(self._tiers.__getitem__, slots))
        return bytes(itemgetter(*slots)(self._tiers))

    def shards(self, slot: int) -> list[ShardRecord]:
        """Return all shards of *slot*, in the order of their commits."""
        first = ShardRecord(
            HeadRange(self._head_start[slot], self._head_stop[slot]),
            Extent(self._page[slot] * EXTENT_ALIGNMENT_BYTES, self._size[slot]),
            Root(self._root[slot]),
        )
        return [first, *self._more_shards.get(slot, ())]

    def digest(self, slot: int) -> Digest:
        """Return the digest of *slot*."""
        digest = self._digest[slot]
        assert digest is not None, f"slot {slot} is vacant"
        return digest

    def space_of(self, slot: int) -> Namespace:
        """Return the namespace of *slot*."""
        return self.namespaces[self._space[slot]]

    # --- changing -----------------------------------------------------------------------

    def add(self, space: Namespace, digest: Digest, parent: int, shard: ShardRecord) -> int:
        """Publish the first shard of a chunk and return its slot; *parent* may be `NO_SLOT`."""
        assert space.find(digest) == NO_SLOT, "a chunk is added once"
        slot = self._vacant.pop() if self._vacant else self._grow()
        self._digest[slot] = digest
        self._space[slot] = space.number
        self._page[slot] = shard.extent.offset // EXTENT_ALIGNMENT_BYTES
        self._size[slot] = shard.extent.size_bytes
        self._root[slot] = shard.root
        self._head_start[slot], self._head_stop[slot] = shard.heads
        self._tiers[slot] = TierKind.HOST
        self._link(slot, parent)
        whole = covers((shard.heads,), space.manifest.all_heads)
        if whole:
            self._make_ready(space, digest, slot)
        else:
            space.partial[digest] = slot
        return slot

    def add_shard(self, slot: int, shard: ShardRecord) -> None:
        """Publish one more shard of *slot*; the chunk is ready once its shards cover all heads."""
        self._more_shards.setdefault(slot, []).append(shard)
        space, digest = self.space_of(slot), self.digest(slot)
        heads = [other.heads for other in self.shards(slot)]
        if digest in space.partial and covers(heads, space.manifest.all_heads):
            del space.partial[digest]
            self._make_ready(space, digest, slot)

    def remove(self, slot: int) -> list[Extent]:
        """Forget *slot*, which is not held, and return its extents. Children become roots."""
        assert not self.is_held(slot), f"slot {slot} is held"
        extents = [shard.extent for shard in self.shards(slot)]
        space, digest = self.space_of(slot), self.digest(slot)
        if space.ready.pop(digest, NO_SLOT) == NO_SLOT:
            del space.partial[digest]
        self._more_shards.pop(slot, None)
        self._unlink(slot)
        self._pins[slot] = 0
        self._ready_in[slot] = 0
        self._digest[slot] = None
        self._vacant.append(slot)
        return extents

    # --- holding ------------------------------------------------------------------------

    def lease(self, slot: int) -> None:
        """Count one more lease on *slot*."""
        if not self.is_held(slot):
            self.held += 1
        self._leases[slot] += 1

    def release(self, slot: int) -> None:
        """Count one lease less on *slot*."""
        assert self._leases[slot] > 0, f"slot {slot} has no lease"
        self._leases[slot] -= 1
        if not self.is_held(slot):
            self.held -= 1

    def pin(self, slot: int, *, hard: bool) -> None:
        """Pin *slot*: hard holds it, soft only makes it leave last."""
        was_held = self.is_held(slot)
        self._pins[slot] |= _HARD_PIN if hard else _SOFT_PIN
        self.held += self.is_held(slot) - was_held

    def unpin(self, slot: int) -> bool:
        """End both kinds of pin; return whether there was one."""
        had, was_held = self._pins[slot] != 0, self.is_held(slot)
        self._pins[slot] = 0
        self.held += self.is_held(slot) - was_held
        return had

    def is_held(self, slot: int) -> bool:
        """Return whether *slot* may not leave: leased or hard-pinned."""
        return self._leases[slot] != 0 or self._pins[slot] & _HARD_PIN != 0

    def lease_count(self, slot: int) -> int:
        """Return how many leases are on *slot*."""
        return self._leases[slot]

    def is_soft_pinned(self, slot: int) -> bool:
        """Return whether *slot* is to leave last."""
        return self._pins[slot] & _SOFT_PIN != 0

    # --- the prefix tree ----------------------------------------------------------------

    def leaf_below(self, slot: int) -> int:
        """Return a chunk at the end of a prefix that goes through *slot*: it leaves first."""
        while self._child[slot] != NO_SLOT:
            slot = self._child[slot]
        return slot

    def path_below(self, slot: int) -> Iterator[int]:
        """Yield *slot* and all chunks on the way to its `leaf_below`."""
        while slot != NO_SLOT:
            yield slot
            slot = self._child[slot]

    def _link(self, slot: int, parent: int) -> None:
        self._child[slot] = NO_SLOT
        self._previous_sibling[slot] = NO_SLOT
        self._parent[slot] = parent
        following = NO_SLOT if parent == NO_SLOT else self._child[parent]
        self._next_sibling[slot] = following
        if following != NO_SLOT:
            self._previous_sibling[following] = slot
        if parent != NO_SLOT:
            self._child[parent] = slot

    def _unlink(self, slot: int) -> None:
        child = self._child[slot]
        while child != NO_SLOT:
            following = self._next_sibling[child]
            self._parent[child] = self._previous_sibling[child] = self._next_sibling[child] = (
                NO_SLOT
            )
            child = following
        previous, following = self._previous_sibling[slot], self._next_sibling[slot]
        if previous != NO_SLOT:
            self._next_sibling[previous] = following
        elif self._parent[slot] != NO_SLOT:
            self._child[self._parent[slot]] = following
        if following != NO_SLOT:
            self._previous_sibling[following] = previous

    def _make_ready(self, space: Namespace, digest: Digest, slot: int) -> None:
        space.ready[digest] = slot
        self._ready_in[slot] = space.marks[0]

    def _grow(self) -> int:
        slot = len(self._digest)
        self._digest.append(None)
        for column in (self._space, self._ready_in, self._page, self._size, self._root):
            column.append(0)
        self._leases.append(0)
        for column in (self._head_start, self._head_stop):
            column.append(0)
        for column in (self._parent, self._child, self._next_sibling, self._previous_sibling):
            column.append(NO_SLOT)
        self._pins.append(0)
        self._tiers.append(0)
        return slot

    # --- the law ------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `AssertionError` unless columns, dicts, counts and the tree agree."""
        named = {slot for space in self.namespaces for slot in space.ready.values()}
        partial = {slot for space in self.namespaces for slot in space.partial.values()}
        assert not named & partial, "a chunk is ready or partial, not both"
        used = set(self.slots())
        assert used == named | partial, "every slot in use has one name"
        assert self.held == sum(map(self.is_held, used)), "held chunks are miscounted"
        for slot in used:
            self._check_slot(slot, used)

    def _check_slot(self, slot: int, used: set[int]) -> None:
        space, digest = self.space_of(slot), self.digest(slot)
        assert space.find(digest) == slot, f"slot {slot} is found under its digest"
        whole = covers([shard.heads for shard in self.shards(slot)], space.manifest.all_heads)
        assert whole == (digest in space.ready), f"slot {slot} is ready exactly when it is whole"
        mark = space.marks[0] if whole else 0
        assert self._ready_in[slot] == mark, f"slot {slot} is marked where it is ready"
        parent = self._parent[slot]
        assert parent == NO_SLOT or parent in used, f"slot {slot} outlives its parent"
        child = self._child[slot]
        while child != NO_SLOT:
            assert self._parent[child] == slot, f"slot {child} is another's child"
            child = self._next_sibling[child]


def covers(shards: Iterable[HeadRange], wanted: HeadRange) -> bool:
    """Return whether *shards* together hold every head of *wanted*."""
    reached = wanted.start
    for heads in sorted(shards):
        if heads.start > reached:
            break
        reached = max(reached, heads.stop)
    return reached >= wanted.stop


def choose_cover(shards: Sequence[ShardRecord], wanted: HeadRange) -> list[ShardRecord]:
    """Return the fewest shards that hold every head of *wanted*, in head order.

    *shards* must cover *wanted*.
    """
    if len(shards) == 1:
        return list(shards)
    chosen: list[ShardRecord] = []
    reached = wanted.start
    while reached < wanted.stop:
        best = max(
            (shard for shard in shards if shard.heads.start <= reached < shard.heads.stop),
            key=lambda shard: shard.heads.stop,
        )
        chosen.append(best)
        reached = best.heads.stop
    return chosen
