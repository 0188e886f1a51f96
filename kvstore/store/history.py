"""What became of chunks that are not here any more: a bounded memory of fates.

A table addressed by fingerprint, 16 bytes an entry: a newer fate overwrites an older one in its
place. It begins small and doubles up to `HISTORY_ENTRIES_MAX`; what was overwritten is counted,
so that "never stored" is only said where that is known. The clock is an argument.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from enum import IntEnum, unique
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.limits import HISTORY_ENTRIES_MAX, HISTORY_ENTRIES_MIN
from kvstore.types import Digest, TierKind

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace

_TICKS_PER_SECOND: Final = 10
_TICKS_MAX: Final = 2**32 - 1


@unique
class Fate(IntEnum):
    """What last happened to a chunk that a look-up did not find, or did not count."""

    EVICTED_FOR_ROOM = 1
    EVICTED_FOR_QUOTA = 2
    EVICTED_FOR_WINDOW = 3
    DELETED = 4
    DAMAGED = 5
    DAMAGED_AT_COMMIT = 6
    EXPIRED = 7
    LOST = 8
    FORGOTTEN = 9
    NO_ROOM = 10
    ABORTED = 11
    DECLINED = 12
    LATE = 13


class Entry(NamedTuple):
    """One fate, in which tier, and when (seconds, by the clock of the history)."""

    fate: Fate
    tier: TierKind
    at: float


class History:
    """The latest fate of each chunk that had one, as far as memory reaches."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.overwritten = 0
        self.entries = 0
        self._clock = clock
        self._began_at = clock()
        self._keys = array("Q", bytes(8 * HISTORY_ENTRIES_MIN))
        self._ticks = array("I", bytes(4 * HISTORY_ENTRIES_MIN))
        self._fates = bytearray(HISTORY_ENTRIES_MIN)
        self._tiers = bytearray(HISTORY_ENTRIES_MIN)

    @property
    def began_at(self) -> float:
        """Since when fates are remembered."""
        return self._began_at

    @property
    def capacity(self) -> int:
        """How many fates there is room for now."""
        return len(self._keys)

    @property
    def is_complete(self) -> bool:
        """Whether nothing has been overwritten yet."""
        return not self.overwritten

    def start(self, clock: Callable[[], float]) -> None:
        """Take the time from *clock* from now on."""
        self._clock = clock
        self._began_at = clock()

    def note(self, space: Namespace, digest: Digest, fate: Fate, tier: TierKind) -> None:
        """Remember *fate* of the chunk *digest* of *space* as its latest."""
        key = _key(space, digest)
        at = key & (len(self._keys) - 1)
        before = self._keys[at]
        if before != key:
            # After a doubling a place may hold what belongs elsewhere now.
            if before and before & (len(self._keys) - 1) == at:
                self.overwritten += 1
            else:
                self.entries += 1
            self._keys[at] = key
        ticks = int((self._clock() - self._began_at) * _TICKS_PER_SECOND)
        self._ticks[at] = min(max(ticks, 0), _TICKS_MAX)
        self._fates[at] = fate
        self._tiers[at] = tier
        if 2 * self.entries > len(self._keys):
            self._grow()

    def find(self, space: Namespace, digest: Digest) -> Entry | None:
        """Return the latest fate of *digest* in *space*, or None."""
        key = _key(space, digest)
        at = key & (len(self._keys) - 1)
        if self._keys[at] != key:
            return None
        when = self._began_at + self._ticks[at] / _TICKS_PER_SECOND
        return Entry(Fate(self._fates[at]), TierKind(self._tiers[at]), when)

    def _grow(self) -> None:
        """Double the table: every entry is in both halves then, and looked for in one."""
        if len(self._keys) < HISTORY_ENTRIES_MAX:
            self._keys.extend(self._keys)
            self._ticks.extend(self._ticks)
            self._fates.extend(self._fates)
            self._tiers.extend(self._tiers)


def _key(space: Namespace, digest: Digest) -> int:
    """Return 64 bits, never 0, that stand for *digest* in *space*."""
    return (int.from_bytes(digest[:8], "little") ^ space.stamp) or 1
