"""The thread that moves bytes for a worker: loads first, then stores, in the order of asking."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Final

log = logging.getLogger("vllm.kvstore")

Job = Callable[[], None]

# Stores that are queued when the engine ends are finished, if that does not take longer.
_DRAIN_SECONDS: Final = 10.0


class Urgency(IntEnum):
    """What is moved first."""

    LOAD = 0
    STORE = 1


class Transfers:
    """Runs jobs one after the other, the most urgent first. A job that fails stops nobody."""

    def __init__(self) -> None:
        self._queue: list[tuple[Urgency, int, Job]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._progress = threading.Event()
        self._unfinished = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvstore-transfers", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """How many jobs are queued or under way."""
        return self._unfinished

    def submit(self, urgency: Urgency, job: Job) -> None:
        """Have *job* run."""
        with self._changed:
            self._unfinished += 1
            heapq.heappush(self._queue, (urgency, next(self._order), job))
            self._changed.notify()

    def wait_for_progress(self, timeout_seconds: float) -> None:
        """Return when a job has ended since the last call, or the time is over."""
        self._progress.wait(timeout_seconds)
        self._progress.clear()

    def close(self) -> None:
        """Finish what is queued, as far as time allows, and end the thread. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_DRAIN_SECONDS)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:
                log.exception("kvstore: a transfer failed")
            with self._changed:
                self._unfinished -= 1
            self._progress.set()

    def _next(self) -> Job | None:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            return heapq.heappop(self._queue)[2] if self._queue else None
