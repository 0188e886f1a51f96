"""The threads that move bytes for a worker: loads first, then stores, in the order of asking."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
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
        self._queues: dict[Urgency, deque[Job]] = {urgency: deque() for urgency in Urgency}
        self._stores_apart = False
        self._changed = threading.Condition()
        self._progress = threading.Event()
        self._unfinished = 0
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._start("kvstore-transfers", is_first=True)

    def split(self) -> None:
        """Give stores a thread of their own, which gets on beside loads: once, if at all.

        It pays where a device moves the bytes, and costs where the processor does.
        """
        with self._changed:
            self._stores_apart = True
        self._start("kvstore-stores", is_first=False)

    @property
    def unfinished(self) -> int:
        """How many jobs are queued or under way."""
        return self._unfinished

    def submit(self, urgency: Urgency, job: Job) -> None:
        """Have *job* run."""
        with self._changed:
            self._unfinished += 1
            self._queues[urgency].append(job)
            self._changed.notify_all()

    def wait_for_progress(self, timeout_seconds: float) -> None:
        """Return when a job has ended since the last call, or the time is over."""
        self._progress.wait(timeout_seconds)
        self._progress.clear()

    def close(self) -> None:
        """Finish what is queued, as far as time allows, and end the thread. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        ends_at = time.monotonic() + _DRAIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, ends_at - time.monotonic()))

    def _start(self, name: str, *, is_first: bool) -> None:
        thread = threading.Thread(target=self._run, args=(is_first,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, is_first: bool) -> None:  # a thread's argument
        while (job := self._next(is_first=is_first)) is not None:
            try:
                job()
            except Exception:
                log.exception("kvstore: a transfer failed")
            with self._changed:
                self._unfinished -= 1
            self._progress.set()

    def _next(self, *, is_first: bool) -> Job | None:
        with self._changed:
            while not (queue := self._due(is_first=is_first)) and not self._closing:
                self._changed.wait()
            return queue.popleft() if queue else None

    def _due(self, *, is_first: bool) -> deque[Job]:
        """Return the queue that this thread serves next, which may be empty."""
        loads, stores = self._queues[Urgency.LOAD], self._queues[Urgency.STORE]
        if not is_first:
            return stores
        return loads if loads or self._stores_apart else stores
