"""What engines expect of conversations, and what is done about it ahead of time.

Advice: it is bounded, may be forgotten, and is never needed for a right answer.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, NamedTuple, assert_never

from kvstore.limits import HINT_CHUNKS_MAX, HINT_KEEP_SECONDS, HINTS_MAX
from kvstore.types import HintKind, TierKind

if TYPE_CHECKING:
    from kvstore.store.mover import Mover
    from kvstore.store.namespace import Namespace
    from kvstore.store.store import Store
    from kvstore.types import Digest

# How long before a conversation is expected its chunks are brought up, at least, and how many
# times longer than that is expected to take.
_AHEAD_SECONDS = 1.0
_AHEAD_TIMES = 2.0
# It may be late by this much of its time before its chunks are no longer kept.
_LATE_TIMES = 0.5


class _Expected(NamedTuple):
    """A conversation that is to return, and whether its chunks are kept for it."""

    timer: asyncio.TimerHandle
    digests: list[Digest]
    is_kept: bool


class Hints:
    """Conversations that are to return, and what else hints lead to."""

    def __init__(
        self,
        store: Store,
        mover: Mover,
        loop: asyncio.AbstractEventLoop,
        *,
        host_name: str = "",
    ) -> None:
        self._store = store
        self._mover = mover
        self._loop = loop
        self._host_name = host_name or socket.gethostname()
        self._expected: dict[tuple[Namespace, Digest], _Expected] = {}
        self._chunks = 0

    def prefetch(self, space: Namespace, digests: list[Digest]) -> int:
        """Bring the leading chunks up, also those that only other hosts know of.

        Returns how many are known to come by now.
        """
        coming = self._mover.prefetch(space, digests)
        hits, _ = self._store.index.prefix(space, digests)
        if hits < len(digests) and self._mover.can_find:
            self._mover.find(space, digests[hits:], lambda: self._bring_up(space, digests))
        return coming

    def take(
        self, space: Namespace, digests: list[Digest], kind: HintKind, seconds: int, host: str
    ) -> int:
        """Act on one hint; return how many of its chunks are here, in whichever tier."""
        self._store.counters.hints += 1
        here = len(self._store.index.leading(space, digests))
        self._forget(space, digests[-1])
        match kind:
            case HintKind.RETURNS_IN:
                self._expect(space, digests, float(seconds))
            case HintKind.GOES_TO:
                if host == self._host_name:
                    self.prefetch(space, digests)
                else:
                    self._mover.spread(space, digests)
            case HintKind.FINISHED:
                self._store.hasten(space, digests)
            case _:
                assert_never(kind)
        return here

    def _expect(self, space: Namespace, digests: list[Digest], seconds: float) -> None:
        """Keep what is needed soon; bring up in time what is needed later."""
        if seconds <= HINT_KEEP_SECONDS:
            self.prefetch(space, digests)
            late = seconds * (1 + _LATE_TIMES) + _AHEAD_SECONDS
            if self._remember(space, digests, late, is_kept=True):
                self._store.keep(space, digests, kept=True)
            return
        expected = self._mover.expected_seconds(
            TierKind.DISK | TierKind.REDIS | TierKind.PEER, len(digests), space.chunk_bytes
        )
        ahead = max(_AHEAD_SECONDS, expected * _AHEAD_TIMES)
        self._remember(space, digests, max(seconds - ahead, 0.0), is_kept=False)

    def _remember(
        self, space: Namespace, digests: list[Digest], seconds: float, *, is_kept: bool
    ) -> bool:
        """Come back to this after *seconds*; False when too much is remembered already."""
        if len(self._expected) >= HINTS_MAX or self._chunks + len(digests) > HINT_CHUNKS_MAX:
            return False
        timer = self._loop.call_later(seconds, self._due, space, digests)
        self._expected[space, digests[-1]] = _Expected(timer, digests, is_kept)
        self._chunks += len(digests)
        # The namespace stays while something is expected in it.
        space.entered += 1
        return True

    def _due(self, space: Namespace, digests: list[Digest]) -> None:
        if not self._forget(space, digests[-1]):
            self._expect(space, digests, _AHEAD_SECONDS)

    def _forget(self, space: Namespace, last: Digest) -> bool:
        """Expect that conversation no more; return whether its chunks were kept until now."""
        expected = self._expected.pop((space, last), None)
        if expected is None:
            return False
        expected.timer.cancel()
        self._chunks -= len(expected.digests)
        space.entered -= 1
        if expected.is_kept:
            self._store.keep(space, expected.digests, kept=False)
        return expected.is_kept

    def _bring_up(self, space: Namespace, digests: list[Digest]) -> None:
        self._mover.prefetch(space, digests)
