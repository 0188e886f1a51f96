"""What engines look up, while somebody records it: which chunks, never which tokens.

A chunk goes by eight bytes that a secret of this process makes of its digest, so that a trace
tells what is asked for again and nothing else, not even to who knows the digests.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.limits import (
    TRACE_DIGESTS_MAX,
    TRACE_IDLE_SECONDS,
    TRACE_LOOKUPS_MAX,
    TRACE_PAGE_DIGESTS_MAX,
)

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.types import Digest

_MARK_BYTES: Final = 8


class TracedLookup(NamedTuple):
    """One look-up: when it was answered, how many leading chunks it hit, and all its chunks."""

    number: int
    at: float
    space: Namespace
    hits: int
    marks: bytes
    """Eight bytes a chunk."""

    @property
    def chunks(self) -> list[str]:
        """Return the chunks in hex."""
        marks, step = self.marks.hex(), 2 * _MARK_BYTES
        return [marks[at : at + step] for at in range(0, len(marks), step)]


class Tracing:
    """The look-ups of late. Off, and empty, unless it was asked for a moment ago."""

    def __init__(
        self, clock: Callable[[], float], wall_clock: Callable[[], float], secret: bytes = b""
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._secret = secret or os.urandom(32)
        self._kept: deque[TracedLookup] = deque()
        self._marks_bytes = 0
        self._last_number = 0
        self._on_until = float("-inf")

    @property
    def is_on(self) -> bool:
        """Whether anybody records; when nobody does any more, what was noted is forgotten."""
        is_on = self._clock() < self._on_until
        if self._kept and not is_on:
            self._kept.clear()
            self._marks_bytes = 0
        return is_on

    def note(self, space: Namespace, digests: Sequence[Digest], hits: int) -> None:
        """Remember a look-up; the oldest make room."""
        marks = b"".join(
            hashlib.blake2b(digest, digest_size=_MARK_BYTES, key=self._secret).digest()
            for digest in digests
        )
        self._last_number += 1
        self._kept.append(TracedLookup(self._last_number, self._wall_clock(), space, hits, marks))
        self._marks_bytes += len(marks)
        while (
            len(self._kept) > TRACE_LOOKUPS_MAX
            or self._marks_bytes > TRACE_DIGESTS_MAX * _MARK_BYTES
        ):
            self._marks_bytes -= len(self._kept.popleft().marks)

    def after(self, number: int, limit: int) -> list[TracedLookup]:
        """Return up to *limit* look-ups behind *number*, and go on noting for a while.

        Fewer where their chunks are many, so that a page takes no time that engines would notice.
        """
        self._on_until = self._clock() + TRACE_IDLE_SECONDS
        found: list[TracedLookup] = []
        left_bytes = TRACE_PAGE_DIGESTS_MAX * _MARK_BYTES
        for one in islice((one for one in self._kept if one.number > number), limit):
            left_bytes -= len(one.marks)
            if found and left_bytes < 0:
                break
            found.append(one)
        return found
