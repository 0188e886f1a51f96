"""Look-ups in the background: the scheduler asks, goes on, and asks again."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from kvstore.connectors.chunks import Group, joint_hit
from kvstore.connectors.vllm_keys import RequestKeys

log = logging.getLogger("vllm.kvstore")

# A request may wait for its blocks for long; what was found for it is then looked up again.
_FRESH_SECONDS: Final = 1.0


class Lookup:
    """One question: how many leading chunks can be loaded. Answered at most once."""

    __slots__ = ("_answered_at", "_asked_at", "chunks", "hit", "keys")

    def __init__(self, keys: RequestKeys, chunks: int, asked_at: float) -> None:
        self.keys = keys
        self.chunks = chunks
        self.hit = 0
        self._asked_at = asked_at
        self._answered_at = 0.0

    @property
    def is_answered(self) -> bool:
        """Whether `hit` is known."""
        return self._answered_at > 0

    def answer(self, hit: int, now: float) -> None:
        """Set the answer."""
        self.hit, self._answered_at = hit, now

    def is_stale(self, now: float) -> bool:
        """Whether the answer is so old that it should be asked for again."""
        return self.is_answered and now > self._answered_at + _FRESH_SECONDS

    def is_late(self, now: float, timeout_seconds: float) -> bool:
        """Whether the request should go on without an answer."""
        return not self.is_answered and now > self._asked_at + timeout_seconds


class Lookups:
    """A thread that answers look-ups in the order in which they were asked."""

    def __init__(
        self, groups: Sequence[Group], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._groups = groups
        self._clock = clock
        self._questions: queue.SimpleQueue[Lookup | None] = queue.SimpleQueue()
        self._progress = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-lookups", daemon=True)
        self._thread.start()

    def ask(self, keys: RequestKeys, chunks: int) -> Lookup:
        """Return the question how many of the first *chunks* chunks can be loaded."""
        lookup = Lookup(keys, chunks, self._clock())
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
            hit = 0
            try:
                digests = lookup.keys.up_to(lookup.chunks)
                hit = joint_hit(self._groups, digests) if digests else 0
            except Exception:
                log.exception("kvstore: a look-up failed, counted as a miss")
            lookup.answer(hit, self._clock())
            self._progress.set()
