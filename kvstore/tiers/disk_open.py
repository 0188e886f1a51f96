"""Opens a directory as a disk tier: claims it, takes stock of its index, makes it fit."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from kvstore.errors import ConfigError
from kvstore.limits import (
    DISK_INDEX_SHARE,
    DISK_SIZE_MAX_BYTES,
    DISK_SIZE_MIN_BYTES,
    EXTENT_ALIGNMENT_BYTES,
    KIB,
    MIB,
)
from kvstore.tiers.disk import DiskCounters, DiskTier
from kvstore.tiers.disk_directory import DiskDirectory
from kvstore.tiers.disk_layout import RECORD_BYTES, VACANT, Rows
from kvstore.tiers.disk_recovery import Survey, gaps_between, runs_of, survey
from kvstore.tiers.disk_slots import Slots
from kvstore.tiers.disk_volume import Volume
from kvstore.types import NamespaceId
from kvstore.units import format_size

# An index is rewritten when more of it is vacant than this, and three times what is kept.
_VACANT_MAX: Final = 16_384
# The parameter of mallopt(3), and the bounds between which the C library moves it.
_MMAP_THRESHOLD: Final = -3
_MMAP_THRESHOLD_MIN: Final = 128 * KIB
_MMAP_THRESHOLD_MAX: Final = 32 * MIB

_log = logging.getLogger(__name__)


class Shares(NamedTuple):
    """How a capacity is divided, in bytes."""

    slab_bytes: int
    index_bytes: int

    @property
    def slots(self) -> int:
        """How many records the index has room for: never fewer than chunks fit the slab."""
        return self.index_bytes // RECORD_BYTES


def shares_of(capacity_bytes: int) -> Shares:
    """Divide *capacity_bytes*, rounded down to pages; raises `ConfigError` out of bounds."""
    if not DISK_SIZE_MIN_BYTES <= capacity_bytes <= DISK_SIZE_MAX_BYTES:
        raise ConfigError(
            f"tiers.disk.capacity is {format_size(capacity_bytes)}; it lies between "
            f"{format_size(DISK_SIZE_MIN_BYTES)} and {format_size(DISK_SIZE_MAX_BYTES)}"
        )
    pages = capacity_bytes // EXTENT_ALIGNMENT_BYTES
    index_pages = -(-pages // DISK_INDEX_SHARE)
    return Shares(
        (pages - index_pages) * EXTENT_ALIGNMENT_BYTES, index_pages * EXTENT_ALIGNMENT_BYTES
    )


async def open_disk_tier(path: Path, *, capacity_bytes: int, direct: bool = True) -> DiskTier:
    """Open the disk tier in *path*, made when absent, with at most *capacity_bytes* in use.

    The whole capacity is set aside at once where the file system can do that, so that the disk
    is not full later. What was kept and no longer fits goes, oldest first. With *direct*,
    payloads bypass the page cache where the file system lets them.

    Raises `ConfigError` when the directory is not ours, of another format, in use or not usable,
    or when the disk is smaller than the capacity.
    """
    shares = shares_of(capacity_bytes)
    with _pages_of_their_own():
        return await asyncio.to_thread(_open, path, shares, direct=direct)


@contextlib.contextmanager
def _pages_of_their_own() -> Generator[None]:
    """Let large pieces of memory go back to the system when they are freed.

    The C library would soon keep them in the thread's own heap, and never give back what lies
    at its top: a tenth of all that a million chunks cost.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not every C library has it
        yield
        return
    mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_MIN)
    try:
        yield
    finally:
        # Where it would have moved by itself sooner or later.
        mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)


def _open(path: Path, shares: Shares, *, direct: bool) -> DiskTier:
    directory = DiskDirectory(path)
    with contextlib.ExitStack() as undo:
        undo.callback(directory.close)
        try:
            volume = Volume(path)
            undo.callback(volume.close)
            counters = DiskCounters()
            slots, is_longer = _restore(directory, volume, shares, counters)
            # A slab that is longer has holes, and what is in use of it is all that it may take.
            volume.reserve(0 if is_longer else shares.slab_bytes, shares.index_bytes)
            if direct:
                volume.bypass_cache()
        except OSError as error:
            raise ConfigError(f"tiers.disk.path {path} cannot be used: {error.strerror}") from error
        tier = DiskTier(directory, volume, slots, counters, punches=is_longer)
        undo.pop_all()
    _log.info(
        "disk tier is open",
        extra={"path": str(path), "chunks": len(slots), "direct": tier.is_direct},
    )
    return tier


def _restore(
    directory: DiskDirectory, volume: Volume, shares: Shares, counters: DiskCounters
) -> tuple[Slots, bool]:
    """Make index and slab what can be kept of them.

    Returns what that is, and whether the slab is longer than its share.
    """
    is_torn = volume.index_bytes() % RECORD_BYTES != 0
    rows = volume.read_records()
    kept = survey(rows, slab_bytes=volume.slab_bytes(), limit_bytes=shares.slab_bytes)
    runs = runs_of(rows[kept.slots])
    end = runs[-1].offset + runs[-1].size_bytes if runs else 0
    if end > shares.slab_bytes and not all(volume.punch(*gap) for gap in gaps_between(runs, end)):
        kept, end = _cut_down(rows, kept, shares), shares.slab_bytes
    _count(directory, kept, counters, is_torn=is_torn)
    rows, kept = _rewrite_index(volume, rows, kept, shares)
    slab_bytes = max(end, shares.slab_bytes)
    volume.resize(slab_bytes)
    slots = Slots(slab_bytes=slab_bytes, limit_bytes=shares.slab_bytes, slots_max=shares.slots)
    slots.restore(rows, kept.slots)
    directory.limit_manifests(lambda: _namespaces_of(rows[kept.slots]))
    return slots, slab_bytes > shares.slab_bytes


def _namespaces_of(rows: Rows) -> set[NamespaceId]:
    return {NamespaceId(bytes(name)) for name in np.unique(rows["namespace"])}


def _cut_down(rows: Rows, kept: Survey, shares: Shares) -> Survey:
    """Keep what lies inside the slab's new end: this file system takes no holes."""
    inside = survey(rows, slab_bytes=shares.slab_bytes, limit_bytes=shares.slab_bytes).slots
    lost = len(kept.slots) - len(inside)
    return kept._replace(slots=inside, outgrown=kept.outgrown + lost)


def _rewrite_index(volume: Volume, rows: Rows, kept: Survey, shares: Shares) -> tuple[Rows, Survey]:
    """Void in the index what is not kept, or write a short one when it has become too long."""
    vacant = len(rows) - len(kept.slots)
    if len(rows) > shares.slots or vacant > max(_VACANT_MAX, 3 * len(kept.slots)):
        rows = rows[kept.slots]
        volume.replace_records(rows)
        return rows, kept._replace(slots=np.arange(len(rows), dtype=np.int64))
    volume.cut_records(len(rows))
    dropped = rows["sequence"] != 0
    dropped[kept.slots] = False
    for slot in np.flatnonzero(dropped).tolist():
        volume.write_record(slot, VACANT)
        rows[slot] = np.zeros((), rows.dtype)
    return rows, kept


def _count(
    directory: DiskDirectory, kept: Survey, counters: DiskCounters, *, is_torn: bool
) -> None:
    counters.quarantined = kept.quarantined + is_torn
    counters.superseded = kept.superseded
    counters.outgrown = kept.outgrown
    extra = {"path": str(directory.path), "kept": len(kept.slots)}
    if counters.quarantined:
        _log.warning(
            "damaged records are left out", extra=extra | {"records": counters.quarantined}
        )
    if kept.outgrown:
        _log.warning(
            "the oldest chunks no longer fit the capacity", extra=extra | {"chunks": kept.outgrown}
        )
