"""What is kept, and in which tiers: every chunk of every namespace.

A chunk is a *slot*, a small number; its fields are columns (arrays), so that a chunk costs
less than 300 bytes, and to find one is at most one dict access whatever their number. Where a
chunk has several shards (of tensor-parallel writers), or forms of one, they lie in a side table.
A slot whose chunk is lost while it is held stays, *hollow*, until nobody holds it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.errors import LimitError
from kvstore.limits import EXTENT_ALIGNMENT_BYTES, NAMESPACES_MAX
from kvstore.protocol.manifest import Manifest
from kvstore.store.namespace import RUN_SLOTS, Namespace
from kvstore.store.shards import ShardRecord, covers
from kvstore.store.tree import PrefixTree
from kvstore.types import NO_SLOT, Digest, Extent, HeadRange, Place, Root, TierKind

if TYPE_CHECKING:
    from kvstore.tiers.base import RecoveredRun

_GROWTH_SLOTS: Final = 4096
_SLOTS_WORTH_A_GETTER: Final = 8
_SOFT_PIN: Final = 1
_HARD_PIN: Final = 2
_KEPT: Final = 4
_ALL_TIERS: Final = 0xFF


class Index:
    """All slots. Holds no bytes and frees none: `lose` returns what is to be freed.

    *tree* has the order of prefixes. *usable* are the bits of the tiers that can be read now;
    chunks that are in no other tier count as missing.
    """

    def __init__(self, evicting: Iterable[TierKind] = (TierKind.HOST,)) -> None:
        self.namespaces: list[Namespace] = []
        self.tree = PrefixTree(evicting)
        self.usable = _ALL_TIERS
        self.held = 0
        self.held_in_host = 0
        self.hollow: set[int] = set()
        self._evicting = tuple(evicting)
        self._evicting_bits = sum(self._evicting)
        self._digest: list[Digest | None] = []
        self._vacant: list[int] = []
        # All shards of the chunks that have more than one; their columns mean nothing then.
        self._several: dict[int, list[ShardRecord]] = {}
        self._space = array("H")
        # The mark of the namespace in which a slot is ready; see `Namespace.marks`.
        self._ready_in = array("H")
        self._page = array("I")
        self._size = array("I")
        self._root = array("Q")
        self._place = array("Q")
        self._head_start = array("H")
        self._head_stop = array("H")
        self._leases = array("I")
        self._pins = bytearray()
        # The bits of all tiers that hold a shard of the chunk.
        self._tiers = bytearray()
        self._tenant = bytearray()

    def __len__(self) -> int:
        """Return the number of chunks, whole, partial and hollow."""
        return len(self._digest) - len(self._vacant)

    def slots(self) -> Iterator[int]:
        """Yield every slot in use."""
        return (slot for slot, digest in enumerate(self._digest) if digest is not None)

    def open_namespace(self, manifest: Manifest, tenant: str = "") -> Namespace:
        """Add a namespace for *manifest*; raises `LimitError` when all there may be are in use."""
        if len(self.namespaces) < NAMESPACES_MAX:
            self.namespaces.append(Namespace(len(self.namespaces), manifest, tenant))
            return self.namespaces[-1]
        for number, space in enumerate(self.namespaces):
            if space.is_unused:
                self.namespaces[number] = Namespace(number, manifest, tenant)
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
        for start in range(0, len(digests), RUN_SLOTS):
            block = digests[start : start + RUN_SLOTS]
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
        self, space: Namespace, digests: Sequence[Digest], window: int = 0
    ) -> tuple[int, list[int]]:
        """Return how many chunks are a hit, and the slots that make them one.

        A hit can be read from some tier now. Without *window* these are the leading chunks,
        with it the last *window* of the longest prefix that has them, see `window_hits`.
        """
        if window:
            hits = self.window_hits(space, digests, window)
            return hits, self.leading(space, digests[max(0, hits - window) : hits])
        slots = self.leading(space, digests)
        if self.usable != _ALL_TIERS:
            slots = slots[: self._usable_count(slots)]
        return len(slots), slots

    def window_hits(self, space: Namespace, digests: Sequence[Digest], window: int) -> int:
        """Return the largest n such that chunks [max(0, n - window), n) are hits, or 0."""
        ready = space.ready
        run = 0
        for position in range(len(digests) - 1, -1, -1):
            slot = ready.get(digests[position], NO_SLOT)
            run = run + 1 if slot != NO_SLOT and self.is_usable(slot) else 0
            if run == window:
                return position + window
        return run

    @property
    def is_degraded(self) -> bool:
        """Whether some tier cannot be read now."""
        return self.usable != _ALL_TIERS

    def is_usable(self, slot: int) -> bool:
        """Return whether all heads of *slot*, which is ready, can be read now."""
        if self.usable == _ALL_TIERS:
            return True
        shards = self._several.get(slot)
        if shards is None:
            return self._tiers[slot] & self.usable != 0
        within = [shard.heads for shard in shards if shard.tiers & self.usable]
        return covers(within, self.space_of(slot).manifest.all_heads)

    def _usable_count(self, slots: Sequence[int]) -> int:
        """Return how many leading *slots* are usable; none of them costs Python a step."""
        if not self._several:
            table = bytes(bits & self.usable and 1 for bits in range(256))
            first = self.tiers(slots).translate(table).find(0) if slots else -1
            return len(slots) if first < 0 else first
        return next((n for n, slot in enumerate(slots) if not self.is_usable(slot)), len(slots))

    def tiers(self, slots: Sequence[int]) -> bytes:
        """Return one byte a slot: the bits of the tiers that hold it."""
        if len(slots) < _SLOTS_WORTH_A_GETTER:
            return bytes(map(self._tiers.__getitem__, slots))
        return bytes(itemgetter(*slots)(self._tiers))

    def shards(self, slot: int) -> list[ShardRecord]:
        """Return all shards of *slot*, in the order of their commits."""
        if slot in self._several:
            return list(self._several[slot])
        if not self._tiers[slot]:
            return []
        return [
            ShardRecord(
                HeadRange(self._head_start[slot], self._head_stop[slot]),
                Extent(self._page[slot] * EXTENT_ALIGNMENT_BYTES, self._size[slot]),
                Root(self._root[slot]),
                self._tiers[slot],
                Place(self._place[slot]),
            )
        ]

    def shard(self, slot: int, heads: HeadRange, tiers: int = _ALL_TIERS) -> ShardRecord | None:
        """Return what *tiers* have of exactly *heads* of *slot*, the host tier's form first."""
        forms = [s for s in self.shards(slot) if s.heads == heads and s.tiers & tiers]
        return max(forms, key=lambda form: form.is_in_host, default=None)

    def tiers_of(self, slot: int) -> int:
        """Return the bits of the tiers that hold a shard of *slot*."""
        return self._tiers[slot]

    def tenant_of(self, slot: int) -> int:
        """Return whose chunk *slot* is."""
        return self._tenant[slot]

    def digest(self, slot: int) -> Digest:
        """Return the digest of *slot*."""
        digest = self._digest[slot]
        assert digest is not None, f"slot {slot} is vacant"
        return digest

    def parent_digest(self, slot: int) -> Digest | None:
        """Return the digest of the chunk before *slot*, None when it is not known here."""
        parent = self.tree.parent(slot)
        return None if parent == NO_SLOT else self.digest(parent)

    def space_of(self, slot: int) -> Namespace:
        """Return the namespace of *slot*."""
        return self.namespaces[self._space[slot]]

    # --- changing -----------------------------------------------------------------------

    def add(
        self, space: Namespace, digest: Digest, parent: int, shard: ShardRecord, tenant: int = 0
    ) -> int:
        """Publish the first shard of a chunk and return its slot; *parent* may be `NO_SLOT`."""
        assert space.find(digest) == NO_SLOT, "a chunk is added once"
        if not self._vacant:
            self._grow()
        slot = self._vacant.pop()
        self._digest[slot] = digest
        self._space[slot] = space.number
        self._tenant[slot] = tenant
        self._put_columns(slot, shard)
        self._tiers[slot] = shard.tiers
        if parent != NO_SLOT and shard.tiers & self._evicting_bits:
            self.tree.plant(slot, parent)
        for kind in self._evicting:
            if shard.tiers & kind:
                self.tree.enter(slot, kind)
        if shard.heads == space.manifest.all_heads:
            space.ready[digest] = slot
            self._ready_in[slot] = space.marks[0]
        else:
            space.partial[digest] = slot
        return slot

    def add_run(self, space: Namespace, kind: TierKind, run: RecoveredRun, tenant: int = 0) -> int:
        """Publish new chunks that are whole and in the tier *kind* alone, in slots in a row.

        Returns the first of these. As `add` for each, and many times as fast: a start has a
        million. Who comes before its parent has none, until it is adopted.
        """
        first, count, heads = len(self._digest), len(run.digests), run.heads
        self._digest.extend(run.digests)
        self._size.frombytes(run.sizes.tobytes())
        self._root.frombytes(run.roots.tobytes())
        self._place.frombytes(run.places.tobytes())
        for column, value in (
            (self._space, space.number),
            (self._ready_in, space.marks[0]),
            (self._head_start, heads.start),
            (self._head_stop, heads.stop),
            (self._page, 0),
            (self._leases, 0),
        ):
            column.extend(array(column.typecode, [value]) * count)
        for marks, mark in ((self._pins, 0), (self._tiers, kind), (self._tenant, tenant)):
            marks.extend(bytes([mark]) * count)
        self.tree.grow(count)
        space.ready.update(zip(run.digests, range(first, first + count), strict=True))
        if kind in self._evicting:
            # One that is partial is found when its children are adopted.
            parents = map(space.ready.get, run.parents, repeat(NO_SLOT))  # type: ignore[arg-type]  # no digest is None
            self.tree.plant_run(first, np.fromiter(parents, np.int32, count), kind)
        return first

    def add_shard(self, slot: int, shard: ShardRecord) -> None:
        """Publish one more shard of *slot*; the chunk is ready once its shards cover all heads."""
        self._put_shards(slot, [*self.shards(slot), shard])

    def adopt(self, slot: int, parent: int) -> None:
        """Put *slot* behind *parent*, unless it has a place in its prefix already."""
        if self.tree.parent(slot) == NO_SLOT and self._tiers[slot] & self._evicting_bits:
            self.tree.adopt(slot, parent, self._tiers[slot])

    def replace(self, slot: int, shard: ShardRecord, by: ShardRecord) -> None:
        """Put *by*, the same bytes in other tiers or places, where *slot* has *shard*."""
        shards = self.shards(slot)
        shards[shards.index(shard)] = by
        self._put_shards(slot, shards)

    def lose(self, slot: int, kind: TierKind, heads: HeadRange | None = None) -> list[ShardRecord]:
        """Note that *slot*, or its shard *heads* alone, is in the tier *kind* no more.

        Returns the shards as they were there. A shard that is in no tier then is gone, and so
        is a chunk without shards: its slot is free at once, or hollow for as long as it is held.
        """
        shards = self.shards(slot)
        lost = [s for s in shards if s.tiers & kind and (heads is None or s.heads == heads)]
        if lost:
            left = [s._replace(tiers=s.tiers & ~kind) if s in lost else s for s in shards]
            self._put_shards(slot, [shard for shard in left if shard.tiers])
        if not self._tiers[slot]:
            self._hollow_out(slot)
        return lost

    def remove(self, slot: int) -> list[ShardRecord]:
        """Forget *slot*, which is not held, and return its shards as they were."""
        assert not self.is_held(slot), f"slot {slot} is held"
        shards = self.shards(slot)
        self._put_shards(slot, [])
        self._erase(slot)
        return shards

    def drop_hollow(self) -> None:
        """Free the slots of lost chunks that nobody holds any more."""
        for slot in [slot for slot in self.hollow if not self.is_held(slot)]:
            self._erase(slot)

    def _put_shards(self, slot: int, shards: list[ShardRecord]) -> None:
        """Make *shards* those of *slot*: columns, tiers, tree and readiness."""
        before, tiers = self._tiers[slot], 0
        for shard in shards:
            tiers |= shard.tiers
        self._tiers[slot] = tiers
        if len(shards) > 1:
            self._several[slot] = shards
        else:
            self._several.pop(slot, None)
            if shards:
                self._put_columns(slot, shards[0])
        changed = before ^ tiers
        if changed:
            self._move_tiers(slot, changed, tiers)
        self._settle(slot, shards)

    def _put_columns(self, slot: int, shard: ShardRecord) -> None:
        self._page[slot] = shard.extent.offset // EXTENT_ALIGNMENT_BYTES
        self._size[slot] = shard.extent.size_bytes
        self._root[slot] = shard.root
        self._place[slot] = shard.place
        self._head_start[slot], self._head_stop[slot] = shard.heads

    def _move_tiers(self, slot: int, changed: int, tiers: int) -> None:
        for kind in self._evicting:
            if changed & kind:
                if tiers & kind:
                    self.tree.enter(slot, kind)
                else:
                    self.tree.leave(slot, kind)
        if not tiers & self._evicting_bits:
            self.tree.cut(slot)
        if changed & TierKind.HOST and self.is_held(slot):
            self.held_in_host += 1 if tiers & TierKind.HOST else -1

    def _settle(self, slot: int, shards: Sequence[ShardRecord]) -> None:
        """Name *slot* as ready or partial, whatever its *shards* make of it."""
        space, digest = self.space_of(slot), self.digest(slot)
        if len(shards) == 1:
            whole = shards[0].heads == space.manifest.all_heads
        else:
            whole = covers([shard.heads for shard in shards], space.manifest.all_heads)
        self.hollow.discard(slot)
        if whole and not self._ready_in[slot]:
            space.partial.pop(digest, None)
            space.ready[digest] = slot
            self._ready_in[slot] = space.marks[0]
        elif not whole and self._ready_in[slot]:
            del space.ready[digest]
            space.partial[digest] = slot
            self._ready_in[slot] = 0

    def _hollow_out(self, slot: int) -> None:
        if self.is_held(slot):
            self.hollow.add(slot)
        else:
            self._erase(slot)

    def _erase(self, slot: int) -> None:
        """Free *slot*, which has no shards."""
        del self.space_of(slot).partial[self.digest(slot)]
        self.hollow.discard(slot)
        self.tree.uproot(slot)
        self._pins[slot] = 0
        self._digest[slot] = None
        self._vacant.append(slot)

    # --- holding ------------------------------------------------------------------------

    def lease(self, slot: int) -> None:
        """Count one more lease on *slot*."""
        if not self.is_held(slot):
            self._count_held(slot, 1)
        self._leases[slot] += 1

    def release(self, slot: int) -> None:
        """Count one lease less on *slot*."""
        assert self._leases[slot] > 0, f"slot {slot} has no lease"
        self._leases[slot] -= 1
        if not self.is_held(slot):
            self._count_held(slot, -1)

    def pin(self, slot: int, *, hard: bool) -> None:
        """Pin *slot*: hard holds it, soft only makes it leave last."""
        was_held = self.is_held(slot)
        self._pins[slot] |= _HARD_PIN if hard else _SOFT_PIN
        self._count_held(slot, self.is_held(slot) - was_held)

    def unpin(self, slot: int) -> bool:
        """End both kinds of pin; return whether there was one."""
        had, was_held = self._pins[slot] & ~_KEPT != 0, self.is_held(slot)
        self._pins[slot] &= _KEPT
        self._count_held(slot, self.is_held(slot) - was_held)
        return had

    def keep(self, slot: int, *, kept: bool) -> None:
        """Let *slot* leave last, as a soft pin does, or no longer. Hints do this, not people."""
        self._pins[slot] = self._pins[slot] & ~_KEPT | (_KEPT if kept else 0)

    def is_held(self, slot: int) -> bool:
        """Return whether *slot* may not leave: leased or hard-pinned."""
        return self._leases[slot] != 0 or self._pins[slot] & _HARD_PIN != 0

    def lease_count(self, slot: int) -> int:
        """Return how many leases are on *slot*."""
        return self._leases[slot]

    def is_hard_pinned(self, slot: int) -> bool:
        """Return whether *slot* may not leave until it is unpinned."""
        return self._pins[slot] & _HARD_PIN != 0

    def is_soft_pinned(self, slot: int) -> bool:
        """Return whether *slot* is to leave last."""
        return self._pins[slot] & (_SOFT_PIN | _KEPT) != 0

    def _count_held(self, slot: int, change: int) -> None:
        self.held += change
        if self._tiers[slot] & TierKind.HOST:
            self.held_in_host += change

    def _grow(self) -> None:
        """Make vacant slots, to be used in order: what is stored in order is found by runs."""
        first = len(self._digest)
        self._digest.extend([None] * _GROWTH_SLOTS)
        columns = (self._space, self._ready_in, self._page, self._size, self._root, self._place)
        for column in (*columns, self._head_start, self._head_stop, self._leases):
            column.extend([0] * _GROWTH_SLOTS)
        for marks in (self._pins, self._tiers, self._tenant):
            marks.extend(bytes(_GROWTH_SLOTS))
        self.tree.grow(_GROWTH_SLOTS)
        self._vacant.extend(range(first + _GROWTH_SLOTS - 1, first - 1, -1))

    # --- the law ------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `AssertionError` unless columns, dicts, counts and the tree agree."""
        named = {slot for space in self.namespaces for slot in space.ready.values()}
        partial = {slot for space in self.namespaces for slot in space.partial.values()}
        assert not named & partial, "a chunk is ready or partial, not both"
        used = set(self.slots())
        assert used == named | partial, "every slot in use has one name"
        assert self.held == sum(map(self.is_held, used)), "held chunks are miscounted"
        in_host = [slot for slot in used if self._tiers[slot] & TierKind.HOST]
        assert self.held_in_host == sum(map(self.is_held, in_host)), "held in host: miscounted"
        for slot in used:
            self._check_slot(slot)
        self.tree.check(used, {slot: self._tiers[slot] for slot in used})

    def _check_slot(self, slot: int) -> None:
        space, digest, shards = self.space_of(slot), self.digest(slot), self.shards(slot)
        assert space.find(digest) == slot, f"slot {slot} is found under its digest"
        whole = covers([shard.heads for shard in shards], space.manifest.all_heads)
        assert whole == (digest in space.ready), f"slot {slot} is ready exactly when it is whole"
        mark = space.marks[0] if whole else 0
        assert self._ready_in[slot] == mark, f"slot {slot} is marked where it is ready"
        assert (slot in self.hollow) == (not shards), f"slot {slot} is hollow without shards"
        assert shards or self.is_held(slot), f"slot {slot} is kept for nobody"
        assert all(shard.tiers for shard in shards), f"a shard of slot {slot} is nowhere"
