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


class _Columns(NamedTuple):
    """What decides about records: of each its slot, fingerprint and pages, oldest first."""

    slots: Numbers
    fingerprints: npt.NDArray[np.uint64]
    starts: Numbers
    ends: Numbers

    def take(self, chosen: Numbers | npt.NDArray[np.bool_]) -> _Columns:
        """Return the chosen ones."""
        return _Columns(
            self.slots[chosen], self.fingerprints[chosen], self.starts[chosen], self.ends[chosen]
        )


def survey(rows: Rows, *, slab_bytes: int, limit_bytes: int) -> Survey:
    """Decide which of *rows* are kept: at most *limit_bytes*, inside *slab_bytes*."""
    used = int(np.count_nonzero(rows["sequence"]))
    starts, ends = _bounds(rows)
    sizes = rows["size_bytes"]
    is_sound = (sizes > 0) & (sizes <= CHUNK_SIZE_MAX_BYTES) & (ends <= slab_bytes)
    slots = np.flatnonzero(is_sound & whole_records(rows))
    slots = slots[np.argsort(rows["sequence"][slots], kind="stable")]
    sound = _Columns(slots, rows["fingerprint"][slots], starts[slots], ends[slots])
    apart = _without_overlaps(_newest_of_each_key(sound))
    fitting = _fitting(apart, limit_bytes)
    return Survey(
        fitting.slots,
        quarantined=used - len(slots),
        superseded=len(slots) - len(apart.slots),
        outgrown=len(apart.slots) - len(fitting.slots),
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


def _newest_of_each_key(found: _Columns) -> _Columns:
    """Return *found* without those whose key comes again later."""
    order = np.argsort(found.fingerprints, kind="stable")
    in_order = found.fingerprints[order]
    is_last = np.ones(len(order), np.bool_)
    is_last[:-1] = in_order[1:] != in_order[:-1]
    return found if is_last.all() else found.take(np.sort(order[is_last]))


def _without_overlaps(found: _Columns) -> _Columns:
    """Return *found* without those whose pages a later one has taken.

    Only a loss of power can leave such: the removal of the older did not reach the medium.
    """
    while True:
        order = np.argsort(found.starts, kind="stable")
        clash = np.flatnonzero(found.starts[order][1:] < found.ends[order][:-1])
        if not len(clash):
            return found
        # They are sorted by age, so of two neighbours the smaller position is the older one.
        is_kept = np.ones(len(order), np.bool_)
        is_kept[np.minimum(order[clash], order[clash + 1])] = False
        found = found.take(is_kept)


def _fitting(found: _Columns, limit_bytes: int) -> _Columns:
    """Return the newest of *found* that fit into *limit_bytes* together."""
    from_newest = np.cumsum((found.ends - found.starts)[::-1])[::-1]
    fits = from_newest <= limit_bytes
    return found if fits.all() else found.take(fits)
