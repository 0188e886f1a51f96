"""Which chunk makes room. Decides only; the store acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.store.index import Index
from kvstore.store.policy import RETRIES, EvictionPolicy
from kvstore.types import NO_SLOT, TierKind

_SPARED_MAX: Final = 32


def next_victim(
    index: Index,
    policy: EvictionPolicy,
    kind: TierKind = TierKind.HOST,
    *,
    count: int | None = None,
    is_spared: Callable[[int], bool] | None = None,
) -> int:
    """Return the slot that leaves the tier *kind* next, or `NO_SLOT` when nothing may.

    The policy names a chunk, one of *count* that it knows; what leaves is the end of a prefix
    through it, so that a prefix loses its tail before its head, and never another tenant's.
    Held chunks never leave; those that *is_spared* names leave behind others, soft-pinned ones
    last. Few of the spared are looked past. The policy's order may change, nothing else does.
    """
    spared = NO_SLOT
    spared_count = 0
    # Long prefixes are walked once, not again from each of their chunks.
    dead_ends: set[int] = set()
    pinned: set[int] = set()
    # Those held may be tried twice: in their turn, and again when nothing else is left.
    for _ in range(2 * (len(index) if count is None else count) + RETRIES):
        slot = policy.candidate()
        if slot == NO_SLOT:
            break
        if slot in dead_ends or index.is_held(slot):
            policy.postpone(slot)
            continue
        is_last = policy.is_deferred(slot)
        if slot in pinned and not is_last:
            policy.defer(slot)
            continue
        leaf = _end_through(index, slot, kind)
        if index.is_held(leaf):
            dead_ends.update(index.tree.path_below(slot, kind))
            policy.postpone(slot)
        elif is_last:
            return leaf if spared == NO_SLOT else spared
        elif index.is_soft_pinned(leaf):
            pinned.update(index.tree.path_below(slot, kind))
            policy.defer(slot)
        elif is_spared is not None and is_spared(leaf):
            spared = leaf if spared == NO_SLOT else spared
            spared_count += 1
            dead_ends.update(index.tree.path_below(slot, kind))
            policy.postpone(slot)
            if spared_count == _SPARED_MAX:
                break
        else:
            return leaf
    return spared


def _end_through(index: Index, slot: int, kind: TierKind) -> int:
    """Return the end of a prefix through *slot*, or *slot* when that is another tenant's."""
    leaf = index.tree.leaf_below(slot, kind)
    return leaf if index.tenant_of(leaf) == index.tenant_of(slot) else slot


def cheapest_window(
    offsets: Sequence[int] | npt.NDArray[np.int64],
    sizes: Sequence[int] | npt.NDArray[np.int64],
    held: Sequence[bool] | npt.NDArray[np.bool_],
    need_bytes: int,
    capacity_bytes: int,
) -> list[int] | None:
    """Return which extents to clear for a run of *need_bytes*, or None when none can be had.

    For arenas whose free bytes lie scattered: *offsets*, *sizes* (padded) and *held* describe
    all extents; the answer are positions in them. Windows start at an extent or right behind
    one, hold nothing that is held, and the one that clears the fewest bytes wins.
    """
    order = np.argsort(np.asarray(offsets, dtype=np.int64), kind="stable")
    starts = np.asarray(offsets, dtype=np.int64)[order]
    lengths = np.asarray(sizes, dtype=np.int64)[order]
    ends = starts + lengths
    begins = np.unique(np.concatenate(([0], starts, ends)))
    begins = begins[begins + need_bytes <= capacity_bytes]
    first = np.searchsorted(ends, begins, side="right")
    last = np.searchsorted(starts, begins + need_bytes, side="left")
    held_before = np.concatenate(([0], np.cumsum(np.asarray(held, dtype=np.int64)[order])))
    bytes_before = np.concatenate(([0], np.cumsum(lengths)))
    free_of_held = held_before[last] == held_before[first]
    if not free_of_held.any():
        return None
    cost = np.where(free_of_held, bytes_before[last] - bytes_before[first], np.iinfo(np.int64).max)
    best = int(np.argmin(cost))
    return [int(position) for position in order[first[best] : last[best]]]
