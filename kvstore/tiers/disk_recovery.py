"""What of an index can be kept: pure decisions over its records, without reading a payload.

A record counts when its checksum holds, its extent lies inside the slab, no later record has the
same key or any of the same pages, and, newest first, all fits the capacity.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.limits import CHUNK_SIZE_MAX_BYTES, EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.disk_layout import Rows, footprints, whole_records
from kvstore.types import Extent

Numbers = npt.NDArray[np.int64]

_PAGE: Final = EXTENT_ALIGNMENT_BYTES


class Survey(NamedTuple):
    """*slots* that are kept, oldest first, and how many were not.

    *quarantined* counts what is damaged or contradicts what is kept, *superseded* what was
    being replaced or removed, *outgrown* what the capacity has no room for any more.
    """

    slots: Numbers
    quarantined: int
    superseded: int
    outgrown: int


def survey(rows: Rows, *, slab_bytes: int, limit_bytes: int) -> Survey:
    """Decide which of *rows* are kept: at most *limit_bytes*, inside *slab_bytes*."""
    used = int(np.count_nonzero(rows["sequence"]))
    slots = np.flatnonzero(whole_records(rows))
    slots = slots[_lie_inside(rows[slots], slab_bytes)]
    quarantined = used - len(slots)
    slots = slots[np.argsort(rows["sequence"][slots], kind="stable")]
    newest = _newest_of_each_key(rows, slots)
    apart = _without_overlaps(rows, newest)
    fitting = _fitting(rows, apart, limit_bytes)
    return Survey(
        fitting,
        quarantined,
        superseded=len(slots) - len(apart),
        outgrown=len(apart) - len(fitting),
    )


def runs_of(rows: Rows) -> list[Extent]:
    """Return the pages that *rows* take, as few extents as they make, in order."""
    starts, ends = _bounds(rows)
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    opens = np.ones(len(starts), np.bool_)
    opens[1:] = starts[1:] != ends[:-1]
    closes = np.ones(len(ends), np.bool_)
    closes[:-1] = opens[1:]
    firsts, lasts = starts[opens].tolist(), ends[closes].tolist()
    return [Extent(first, last - first) for first, last in zip(firsts, lasts, strict=True)]


def gaps_between(runs: list[Extent], end_bytes: int) -> list[Extent]:
    """Return what lies between *runs* up to *end_bytes*."""
    gaps: list[Extent] = []
    at = 0
    for run in [*runs, Extent(end_bytes, 0)]:
        if run.offset > at:
            gaps.append(Extent(at, run.offset - at))
        at = run.offset + run.size_bytes
    return gaps


def _bounds(rows: Rows) -> tuple[Numbers, Numbers]:
    starts = rows["page"].astype(np.int64) * _PAGE
    return starts, starts + footprints(rows["size_bytes"])


def _lie_inside(rows: Rows, slab_bytes: int) -> npt.NDArray[np.bool_]:
    sizes = rows["size_bytes"]
    _, ends = _bounds(rows)
    inside: npt.NDArray[np.bool_] = (
        (sizes > 0) & (sizes <= CHUNK_SIZE_MAX_BYTES) & (ends <= slab_bytes)
    )
    return inside


def _newest_of_each_key(rows: Rows, slots: Numbers) -> Numbers:
    """Return *slots* without those whose key comes again later; both are sorted by age."""
    fingerprints = rows["fingerprint"][slots]
    order = np.argsort(fingerprints, kind="stable")
    is_last = np.ones(len(order), np.bool_)
    is_last[:-1] = fingerprints[order][1:] != fingerprints[order][:-1]
    return slots[np.sort(order[is_last])]


def _without_overlaps(rows: Rows, slots: Numbers) -> Numbers:
    """Return *slots* without those whose pages a later one has taken.

    Only a loss of power can leave such: the removal of the older did not reach the medium.
    """
    while True:
        starts, ends = _bounds(rows[slots])
        order = np.argsort(starts, kind="stable")
        clash = np.flatnonzero(starts[order][1:] < ends[order][:-1])
        if not len(clash):
            return slots
        # Slots are sorted by age, so of two neighbours the smaller position is the older one.
        older = np.minimum(order[clash], order[clash + 1])
        slots = np.delete(slots, older)


def _fitting(rows: Rows, slots: Numbers, limit_bytes: int) -> Numbers:
    """Return the newest of *slots* that fit into *limit_bytes* together."""
    starts, ends = _bounds(rows[slots])
    from_newest = np.cumsum((ends - starts)[::-1])[::-1]
    return slots[from_newest <= limit_bytes]
