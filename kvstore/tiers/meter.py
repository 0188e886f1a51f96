"""How fast a tier has been lately, and so how long a load from it will take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from kvstore.limits import METER_STALE_SECONDS

_MEMORY_SECONDS: Final = 2.0
_CALL_WEIGHT: Final = 0.2


class Meter:
    """Bandwidth and latency as delivered, over calls that may overlap.

    Bandwidth counts only the time in which a call is under way. What is older than a few
    seconds of such time hardly counts, and nothing counts after `METER_STALE_SECONDS`: a tier
    that was slow once is then tried again.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._under_way = 0
        self._marked_at = 0.0
        self._bytes = 0.0
        self._busy_seconds = 0.0
        self._call_seconds = 0.0
        self._call_bytes = 0.0
        self._measured_at = -math.inf

    def begin(self) -> float:
        """Note that a call starts; return the time, for `end`."""
        now = self._clock()
        if not self._under_way:
            self._marked_at = now
        self._under_way += 1
        return now

    def end(self, began_at: float, size_bytes: int) -> None:
        """Note that a call has ended that moved *size_bytes*; 0 when it failed."""
        now = self._clock()
        busy = now - self._marked_at
        self._marked_at = now
        self._under_way -= 1
        fades = math.exp(-busy / _MEMORY_SECONDS)
        self._bytes = self._bytes * fades + size_bytes
        self._busy_seconds = self._busy_seconds * fades + busy
        if size_bytes:
            weight = _CALL_WEIGHT if self._call_bytes and not self._is_stale(now) else 1.0
            self._call_seconds += weight * (now - began_at - self._call_seconds)
            self._call_bytes += weight * (size_bytes - self._call_bytes)
            self._measured_at = now

    @property
    def bytes_per_second(self) -> float:
        """Delivered bandwidth; 0 when nothing is known."""
        if self._is_stale(self._clock()) or not self._busy_seconds:
            return 0.0
        return self._bytes / self._busy_seconds

    @property
    def call_seconds(self) -> float:
        """What one call took; 0 when nothing is known."""
        return 0.0 if self._is_stale(self._clock()) else self._call_seconds

    def expected_seconds(self, size_bytes: int, calls: int) -> float:
        """Return what it takes to move *size_bytes* in so many calls; 0 when nothing is known.

        Never less than one call of that size took.
        """
        bandwidth = self.bytes_per_second
        if not bandwidth:
            return 0.0
        one_call = self._call_seconds * max(1.0, size_bytes / max(calls, 1) / self._call_bytes)
        return max(one_call, size_bytes / bandwidth)

    def _is_stale(self, now: float) -> bool:
        return now - self._measured_at > METER_STALE_SECONDS
