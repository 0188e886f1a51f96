"""Look-ups in the background: the scheduler asks, goes on, and asks again."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvstore.client.cache import Hits
from kvstore.client.tracing import joined
from kvstore.connectors.chunks import ChunkCache, joint_hit
from kvstore.connectors.vllm_keys import RequestKeys
from kvstore.types import Digest, TierKind

log = logging.getLogger("vllm.kvstore")

# A request may wait for its blocks for long; what was found for it is then looked up again.
_FRESH_SECONDS: Final = 1.0


class TieredCache(ChunkCache, Protocol):
    """A namespace that says which tiers hold what it has."""

    def find(self, digests: Sequence[Digest], *, window: int = 0, name: str = "") -> Hits:
        """Look up like `lookup`, and say where; *name* is what to explain it by later."""
        ...


@dataclass(slots=True)
class SearchedGroup:
    """A group in one look-up: it notes where its chunks were found last."""

    found_in: TieredCache
    window: int
    name: str = ""
    tiers: list[tuple[int, int]] = field(default_factory=list)

    @property
    def cache(self) -> SearchedGroup:
        """Itself: it asks, and notes the answer."""
        return self

    def lookup(self, digests: Sequence[Digest], *, window: int = 0) -> int:
        """Return how many leading chunks can be served."""
        found = self.found_in.find(digests, window=window, name=self.name)
        self.tiers = found.tiers
        return found.chunks


class Lookup:
    """One question: how many leading chunks can be loaded. Answered at most once.

    *tiers* says where each of them was found; it may be shorter, and is by sliding windows.
    """

    __slots__ = ("_answered_at", "_asked_at", "chunks", "hit", "keys", "name", "tiers", "trace")

    def __init__(
        self, keys: RequestKeys, chunks: int, asked_at: float, name: str = "", trace: str = ""
    ) -> None:
        self.keys = keys
        self.name = name
        self.trace = trace
        self.chunks = chunks
        self.hit = 0
        self.tiers: list[TierKind] = []
        self._asked_at = asked_at
        self._answered_at = 0.0

    @property
    def is_answered(self) -> bool:
        """Whether `hit` is known."""
        return self._answered_at > 0

    def answer(self, hit: int, tiers: list[TierKind], now: float) -> None:
        """Set the answer."""
        self.hit, self.tiers, self._answered_at = hit, tiers, now

    def is_stale(self, now: float) -> bool:
        """Whether the answer is so old that it should be asked for again."""
        return self.is_answered and now > self._answered_at + _FRESH_SECONDS

    def is_late(self, now: float, timeout_seconds: float) -> bool:
        """Whether the request should go on without an answer."""
        return not self.is_answered and now > self._asked_at + timeout_seconds


class Lookups:
    """A thread that answers look-ups in the order in which they were asked."""

    def __init__(
        self,
        caches: Sequence[tuple[TieredCache, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look in *caches*, each with its group's window in chunks."""
        self._caches = caches
        self._clock = clock
        self._questions: queue.SimpleQueue[Lookup | None] = queue.SimpleQueue()
        self._progress = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-lookups", daemon=True)
        self._thread.start()

    def ask(self, keys: RequestKeys, chunks: int, name: str = "", trace: str = "") -> Lookup:
        """Return the question how many of the first *chunks* chunks can be loaded.

        *name* is the engine's id of the request, by which operators ask why it was a miss;
        *trace* is what it belongs to (`traceparent`), if anything.
        """
        lookup = Lookup(keys, chunks, self._clock(), name, trace)
        self._questions.put(lookup)
        return lookup

    def wait_for_progress(self, timeout_seconds: float) -> None:
        """Return when something has been answered since the last call, or the time is over."""
        self._progress.wait(timeout_seconds)
        self._progress.clear()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._questions.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (lookup := self._questions.get()) is not None:
            hit, tiers = 0, list[TierKind]()
            try:
                with joined(lookup.trace):
                    hit, tiers = self._find(lookup.keys.up_to(lookup.chunks), lookup.name)
            except Exception:
                log.exception("kvstore: a look-up failed, counted as a miss")
            lookup.answer(hit, tiers, self._clock())
            self._progress.set()

    def _find(self, digests: Sequence[Digest], name: str) -> tuple[int, list[TierKind]]:
        if not digests:
            return 0, []
        groups = [SearchedGroup(cache, window, name) for cache, window in self._caches]
        hit = joint_hit(groups, digests)
        # Groups travel together: one of those that need every chunk speaks for all.
        speaker = min(groups, key=lambda group: group.window)
        return hit, [fastest(bits) for bits, count in speaker.tiers for _ in range(count)][:hit]


def fastest(bits: int) -> TierKind:
    """Return the fastest of the tiers in *bits*."""
    return TierKind(bits & -bits) if bits else TierKind.HOST
