"""The prefix tree: which chunk comes before which, and which of them are in a tier.

Every chunk knows its parent. Below a chunk, each tier that evicts has a list of its own, of
the children that are in that tier: the end of a prefix is found without passing by those
that are not there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from kvstore.types import NO_SLOT, TierKind


class Branches:
    """For every chunk, the list of its children in one tier. Twelve bytes a chunk."""

    __slots__ = ("child", "next_sibling", "previous_sibling")

    def __init__(self) -> None:
        self.child = array("i")
        self.next_sibling = array("i")
        self.previous_sibling = array("i")

    def grow(self, count: int) -> None:
        """Make room for *count* more slots, which have no children."""
        for column in (self.child, self.next_sibling, self.previous_sibling):
            column.extend([NO_SLOT] * count)

    def link(self, slot: int, parent: int) -> None:
        """Make *slot* the first child of *parent*, which may be `NO_SLOT`."""
        following = NO_SLOT if parent == NO_SLOT else self.child[parent]
        self.previous_sibling[slot] = NO_SLOT
        self.next_sibling[slot] = following
        if following != NO_SLOT:
            self.previous_sibling[following] = slot
        if parent != NO_SLOT:
            self.child[parent] = slot

    def link_run(self, slots: npt.NDArray[np.int32], parents: npt.NDArray[np.int32]) -> None:
        """Do `link` for each of *slots*, which have no siblings yet, and its one of *parents*."""
        order = np.argsort(parents, kind="stable")
        slots, parents = slots[order], parents[order]
        is_first = np.ones(len(slots), np.bool_)
        is_first[1:] = parents[1:] != parents[:-1]
        is_last = np.ones(len(slots), np.bool_)
        is_last[:-1] = is_first[1:]
        child = np.frombuffer(self.child, np.int32)
        following = np.where(is_first, child[parents], np.roll(slots, 1))
        np.frombuffer(self.next_sibling, np.int32)[slots] = following
        is_any = following != NO_SLOT
        np.frombuffer(self.previous_sibling, np.int32)[following[is_any]] = slots[is_any]
        child[parents[is_last]] = slots[is_last]

    def unlink(self, slot: int, parent: int) -> None:
        """Take *slot* out of the children of *parent*."""
        previous, following = self.previous_sibling[slot], self.next_sibling[slot]
        if previous != NO_SLOT:
            self.next_sibling[previous] = following
        elif parent != NO_SLOT:
            self.child[parent] = following
        if following != NO_SLOT:
            self.previous_sibling[following] = previous
        self.previous_sibling[slot] = self.next_sibling[slot] = NO_SLOT

    def children(self, slot: int) -> Iterator[int]:
        """Yield the children of *slot*."""
        child = self.child[slot]
        while child != NO_SLOT:
            yield child
            child = self.next_sibling[child]

    def orphan(self, slot: int) -> Iterator[int]:
        """Yield the children of *slot* and take each out of the list before."""
        child, self.child[slot] = self.child[slot], NO_SLOT
        while child != NO_SLOT:
            following = self.next_sibling[child]
            self.previous_sibling[child] = self.next_sibling[child] = NO_SLOT
            yield child
            child = following


class PrefixTree:
    """Parents of all chunks, and their children tier by tier."""

    def __init__(self, kinds: Iterable[TierKind]) -> None:
        self._parent = array("i")
        self._branches = {kind: Branches() for kind in kinds}

    def grow(self, count: int) -> None:
        """Make room for *count* more slots."""
        self._parent.extend([NO_SLOT] * count)
        for branches in self._branches.values():
            branches.grow(count)

    def parent(self, slot: int) -> int:
        """Return the chunk before *slot*, or `NO_SLOT` when it is not known here."""
        return self._parent[slot]

    def plant(self, slot: int, parent: int) -> None:
        """Say what comes before *slot*, which is new and about to enter a tier."""
        self._parent[slot] = parent

    def plant_run(self, first: int, parents: npt.NDArray[np.int32], kind: TierKind) -> None:
        """Plant new slots, *first* and those behind it, and let them enter the tier *kind*.

        A parent with a higher number than its child stays unsaid: so nobody comes before itself.
        """
        slots = np.arange(first, first + len(parents), dtype=np.int32)
        above = np.where(parents < slots, parents, NO_SLOT).astype(np.int32)
        np.frombuffer(self._parent, np.int32)[first : first + len(parents)] = above
        is_child = above != NO_SLOT
        self._branches[kind].link_run(slots[is_child], above[is_child])

    def roots(self, first: int, count: int) -> list[int]:
        """Return which of *count* slots, *first* and those behind it, have no known parent."""
        parents = np.frombuffer(self._parent, np.int32, count, 4 * first)
        found: list[int] = (np.flatnonzero(parents == NO_SLOT) + first).tolist()
        return found

    def enter(self, slot: int, kind: TierKind) -> None:
        """Note that *slot* is in the tier *kind* from now on."""
        self._branches[kind].link(slot, self._parent[slot])

    def leave(self, slot: int, kind: TierKind) -> None:
        """Note that *slot* is in the tier *kind* no more."""
        self._branches[kind].unlink(slot, self._parent[slot])

    def adopt(self, slot: int, parent: int, tiers: int) -> None:
        """Put *slot*, which has no known parent, behind *parent*, in the lists of all *tiers*.

        A parent comes with a request, and nothing says that it is right: one that is behind
        *slot* itself is refused.
        """
        if self._has_children(slot) and self._is_above(slot, parent):
            return
        for kind, branches in self._branches.items():
            if tiers & kind:
                branches.link(slot, parent)
        self._parent[slot] = parent

    def cut(self, slot: int) -> None:
        """Forget the parent of *slot*, which is in none of these tiers."""
        self._parent[slot] = NO_SLOT

    def uproot(self, slot: int) -> None:
        """Forget *slot*, which is in no tier any more; its children become roots."""
        for branches in self._branches.values():
            for child in branches.orphan(slot):
                self._parent[child] = NO_SLOT

    def leaf_below(self, slot: int, kind: TierKind = TierKind.HOST) -> int:
        """Return a chunk at the end of a prefix through *slot* in one tier: it leaves first."""
        child = self._branches[kind].child
        while child[slot] != NO_SLOT:
            slot = child[slot]
        return slot

    def path_below(self, slot: int, kind: TierKind = TierKind.HOST) -> Iterator[int]:
        """Yield *slot* and all chunks on the way to its `leaf_below`."""
        child = self._branches[kind].child
        while slot != NO_SLOT:
            yield slot
            slot = child[slot]

    def has_others(self, slot: int, child: int, kind: TierKind = TierKind.HOST) -> bool:
        """Return whether *slot* has children in one tier besides *child*."""
        branches = self._branches[kind]
        first = branches.child[slot]
        return first != NO_SLOT and (first != child or branches.next_sibling[first] != NO_SLOT)

    def continued(self, slot: int, kind: TierKind) -> int:
        """Return the chunk that *slot* alone continues in the tier *kind*, or `NO_SLOT`."""
        branches = self._branches.get(kind)
        if branches is None or branches.next_sibling[slot] != NO_SLOT:
            return NO_SLOT
        return self._parent[slot] if branches.previous_sibling[slot] == NO_SLOT else NO_SLOT

    def children(self, slot: int, kind: TierKind = TierKind.HOST) -> list[int]:
        """Return the children of *slot* in one tier."""
        return list(self._branches[kind].children(slot))

    def _has_children(self, slot: int) -> bool:
        return any(branches.child[slot] != NO_SLOT for branches in self._branches.values())

    def _is_above(self, slot: int, below: int) -> bool:
        while below not in {NO_SLOT, slot}:
            below = self._parent[below]
        return below == slot

    def check(self, used: set[int], tiers_of: dict[int, int]) -> None:
        """Raise `AssertionError` unless lists and parents agree with *tiers_of* every slot."""
        for slot in used:
            parent = self._parent[slot]
            assert parent == NO_SLOT or parent in used, f"slot {slot} outlives its parent"
        for kind, branches in self._branches.items():
            listed = {slot: list(branches.children(slot)) for slot in used}
            for slot, children in listed.items():
                for child in children:
                    assert self._parent[child] == slot, f"slot {child} is another's child"
                    assert tiers_of[child] & kind, f"slot {child} is not in tier {kind.name}"
            for slot in used:
                if tiers_of[slot] & kind and self._parent[slot] != NO_SLOT:
                    assert slot in listed[self._parent[slot]], f"slot {slot} is not listed"
