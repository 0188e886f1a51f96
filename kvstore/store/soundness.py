"""Which records of an earlier daemon can be true, all of them together. Pure, and of whole tables.

A record that holds was written by a daemon; that two of them agree was that daemon's doing,
and is checked here, because extents that overlap must never be allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvstore.limits import CHUNK_SIZE_MAX_BYTES, EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.record_layout import FILLING, READY
from kvstore.types import NamespaceId

if TYPE_CHECKING:
    from kvstore.tiers.host import HostTier
    from kvstore.tiers.records import Rows

Mask = npt.NDArray[np.bool_]


def tenant_mark(name: str) -> int:
    """Return what stands for a tenant in records: its number may be another's the next time."""
    return xxh3_64_intdigest(name.encode())


def within(rows: Rows, host: HostTier) -> Mask:
    """Return which of *rows* name an extent that lies in the arena, on pages."""
    capacity = host.usage().capacity_bytes
    offset, size = rows["offset"], rows["size_bytes"]
    sane: Mask = (offset < capacity) & (offset % EXTENT_ALIGNMENT_BYTES == 0)
    sane &= (size > 0) & (size <= CHUNK_SIZE_MAX_BYTES)
    _, ends = _spans(rows[sane], host)
    sane[sane] = ends <= capacity
    return sane


def apart(rows: Rows, host: HostTier) -> Mask:
    """Return which of *rows*, all of which are `within`, overlap no other.

    What is being written stays where it overlaps what was published: the one may still be
    written to, the other is then wrong. Of two that are being written one stays.
    """
    kept: Mask = rows["state"] == FILLING
    kept[kept] = ~_overlap_earlier(rows[kept], host)
    ready = rows["state"] == READY
    kept[ready] = ~_overlap_any(rows, host)[ready]
    return kept


def known(rows: Rows, kv_heads: Mapping[NamespaceId, int]) -> Mask:
    """Return which of *rows* are of a namespace in *kv_heads*, and have heads that it has."""
    fits = np.zeros(len(rows), dtype=np.bool_)
    for namespace, heads in kv_heads.items():
        fits |= (rows["namespace"] == np.void(namespace)) & (rows["head_stop"] <= heads)
    fits &= rows["head_start"] < rows["head_stop"]
    return fits


def _spans(rows: Rows, host: HostTier) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    starts: npt.NDArray[np.int64] = rows["offset"].astype(np.int64)
    # There are few sizes, and many of each.
    sizes, which = np.unique(rows["size_bytes"], return_inverse=True)
    footprints = np.array([host.footprint(size) for size in sizes.tolist()], dtype=np.int64)
    return starts, starts + footprints[which]


def _overlap_earlier(rows: Rows, host: HostTier) -> Mask:
    """Return which of *rows* start before one that starts no later has ended."""
    starts, ends = _spans(rows, host)
    order = np.argsort(starts, kind="stable")
    found = np.zeros(len(rows), dtype=np.bool_)
    reached = np.maximum.accumulate(ends[order])
    found[order[1:]] = starts[order[1:]] < reached[:-1]
    return found


def _overlap_any(rows: Rows, host: HostTier) -> Mask:
    starts, ends = _spans(rows, host)
    order = np.argsort(starts, kind="stable")
    found = _overlap_earlier(rows, host)
    found[order[:-1]] |= ends[order[:-1]] > starts[order[1:]]
    return found
