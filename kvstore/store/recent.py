"""The look-ups of late, to be explained by the names that engines gave them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstore.limits import RECENT_LOOKUP_DIGESTS_MAX, RECENT_LOOKUPS_MAX

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.types import Digest


class RecentLookup(NamedTuple):
    """What one look-up asked for, and how many leading chunks counted then."""

    name: str
    space: Namespace
    digests: Sequence[Digest]
    hits: int
    recompute_seconds: float


class RecentLookups:
    """The last look-ups that had a name. Their digests are shared with nobody and not copied."""

    def __init__(self) -> None:
        self._kept: deque[RecentLookup] = deque()
        self._digests = 0

    def __len__(self) -> int:
        """Return the number of look-ups that are remembered."""
        return len(self._kept)

    def note(self, lookup: RecentLookup) -> None:
        """Remember *lookup*, and forget as many of the oldest as are too many."""
        self._kept.append(lookup)
        self._digests += len(lookup.digests)
        while self._digests > RECENT_LOOKUP_DIGESTS_MAX or len(self._kept) > RECENT_LOOKUPS_MAX:
            self._digests -= len(self._kept.popleft().digests)

    def find(self, name: str) -> RecentLookup | None:
        """Return the latest look-up called *name*."""
        return next((lookup for lookup in reversed(self._kept) if lookup.name == name), None)
