"""Shards: the parts of a chunk, cut along its heads, and which of them together make it up.

A shard may have several *forms*: what was stored, and what tiers have made of it with codecs of
their own. They are records of the same heads with other bytes, no two of them in one tier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvstore.types import Extent, HeadRange, Place, Root, TierKind

NO_PLACE = Place(0)


class ShardRecord(NamedTuple):
    """One stored shard: which heads, how long, the root of its checksum tree, and where it is.

    *tiers* are the bits of the tiers that hold it. The offset in *extent* means something only
    with that of the host tier, *place* only with that of the durable one.
    """

    heads: HeadRange
    extent: Extent
    root: Root
    tiers: int = TierKind.HOST
    place: Place = NO_PLACE

    @property
    def size_bytes(self) -> int:
        """How many bytes were stored."""
        return self.extent.size_bytes

    @property
    def is_in_host(self) -> bool:
        """Whether engines can read it where it lies."""
        return self.tiers & TierKind.HOST != 0


def whole_bytes(shard: ShardRecord, kv_heads: int) -> int:
    """Return what a chunk takes whose other heads are like those of *shard*."""
    return shard.size_bytes * kv_heads // shard.heads.width


def bytes_for(shards: Iterable[ShardRecord], wanted: HeadRange) -> int:
    """Return how many of the bytes of *shards* are those of the heads *wanted*."""
    found = 0
    for shard in shards:
        heads = min(shard.heads.stop, wanted.stop) - max(shard.heads.start, wanted.start)
        found += shard.size_bytes * heads // shard.heads.width
    return found


def tiers_with(shards: Iterable[ShardRecord], heads: HeadRange) -> int:
    """Return the bits of the tiers that hold exactly *heads*, in whatever form."""
    tiers = 0
    for shard in shards:
        if shard.heads == heads:
            tiers |= shard.tiers
    return tiers


def is_below(shards: Sequence[ShardRecord]) -> bool:
    """Return whether all heads that the host tier has are in a slower tier, too."""
    host, not_below = TierKind.HOST, TierKind.HOST | TierKind.DEVICE
    return all(tiers_with(shards, s.heads) & ~not_below for s in shards if s.tiers & host)


def is_at_hand(shard: ShardRecord, wanted: HeadRange, direct: int) -> bool:
    """Return whether an engine that maps the tiers *direct* can read *shard* where it lies.

    Only chunks in one piece are put together on a device.
    """
    at_hand = shard.tiers & direct
    return bool(at_hand & TierKind.HOST or (at_hand and shard.heads == wanted))


def find_form(shards: Iterable[ShardRecord], wanted: ShardRecord) -> ShardRecord | None:
    """Return the one of *shards* that has the very bytes of *wanted*."""
    key = (wanted.heads, wanted.root, wanted.size_bytes)
    return next((s for s in shards if (s.heads, s.root, s.size_bytes) == key), None)


def covers(shards: Iterable[HeadRange], wanted: HeadRange) -> bool:
    """Return whether *shards* together hold every head of *wanted*."""
    reached = wanted.start
    for heads in sorted(shards):
        if heads.start > reached:
            break
        reached = max(reached, heads.stop)
    return reached >= wanted.stop


def choose_cover(
    shards: Sequence[ShardRecord],
    wanted: HeadRange,
    usable: int = -1,
    direct: int = TierKind.HOST,
) -> list[ShardRecord]:
    """Return the fewest shards that hold every head of *wanted*, in head order.

    *shards* must cover *wanted* with those in *usable* tiers. Where shards that are at hand in
    the tiers *direct* are enough, no others are chosen; of several forms one is.
    """
    if len(shards) == 1:
        return list(shards)
    at_hand = [shard for shard in shards if is_at_hand(shard, wanted, direct & usable)]
    if covers([shard.heads for shard in at_hand], wanted):
        shards = at_hand
    chosen: list[ShardRecord] = []
    reached = wanted.start
    while reached < wanted.stop:
        best = max(
            (
                shard
                for shard in shards
                if shard.tiers & usable and shard.heads.start <= reached < shard.heads.stop
            ),
            key=lambda shard: (shard.heads.stop, shard.is_in_host),
        )
        chosen.append(best)
        reached = best.heads.stop
    return chosen
