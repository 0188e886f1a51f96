"""Calls that work in threads: who does the work, and what its threads know of each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np

from kvstore.hashing import Digests64, block_count
from kvstore.limits import CHECKSUM_BLOCK_BYTES, DISK_PART_SIZE_BYTES
from kvstore.tiers.base import Shard
from kvstore.tiers.disk_slots import Room

T = TypeVar("T")


class Job:
    """One shard on its way to or from its room, in parts that threads take.

    Each thread puts in the digests of its parts. Once the job is given up, parts that have not
    begun are left out.
    """

    def __init__(self, shard: Shard, room: Room, record: bytes = b"") -> None:
        self.shard, self.room, self.record = shard, room, record
        self.is_given_up = False
        self.is_recorded = False
        self.parts = range(0, shard.size_bytes, DISK_PART_SIZE_BYTES)
        self.digests: Digests64 = np.zeros(block_count(shard.size_bytes), "<u8")
        # A header of its own comes with several parts alone.
        self._writes_left = len(self.parts) + (len(self.parts) > 1)
        self._lock = threading.Lock()

    def give_up(self) -> None:
        """Leave out what has not begun."""
        self.is_given_up = True

    def add(self, start: int, digests: Digests64) -> None:
        """Put in the digests of what begins at *start*."""
        first = start // CHECKSUM_BLOCK_BYTES
        self.digests[first : first + len(digests)] = digests

    def finish_part(self) -> bool:
        """Note that a part, or the header, is written; True for the last."""
        with self._lock:
            self._writes_left -= 1
            return self._writes_left == 0


class Crew:
    """*count* threads that take calls one after the other.

    They have the priority of the event loop. With less, one that holds the interpreter's lock
    would not be let on where engines keep the processors busy, and the loop would wait for it:
    tests/bench/disk_silence.py shows it.
    """

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"kvstore-{name}")
        self._pending: set[Future[Any]] = set()

    async def do(
        self, calls: Sequence[Callable[[], T]], give_up: Callable[[], None] | None = None
    ) -> list[T]:
        """Return what all *calls* return; it comes, or the first error, when none runs any more.

        When cancelled, it calls *give_up* and ends no earlier: nothing goes on behind the back
        of the caller.
        """
        futures = [asyncio.wrap_future(self._submit(call)) for call in calls]
        cancelled: asyncio.CancelledError | None = None
        while not all(future.done() for future in futures):
            try:
                await asyncio.wait(futures)
            except asyncio.CancelledError as error:
                cancelled = error
                if give_up is not None:
                    give_up()
        failures = [future.exception() for future in futures if not future.cancelled()]
        if cancelled is not None:
            raise cancelled
        for failure in failures:
            if failure is not None:
                raise failure
        return [future.result() for future in futures]

    def dismiss(self) -> set[Future[Any]]:
        """Cancel what has not begun; return what has."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return set(self._pending)

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        future = self._pool.submit(call)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future


def dismiss(crews: Iterable[Crew], timeout_seconds: float) -> bool:
    """End the work of all *crews*; return whether it ended in time."""
    pending: set[Future[Any]] = set().union(*(crew.dismiss() for crew in crews))
    return not wait(pending, timeout_seconds).not_done
