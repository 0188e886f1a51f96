"""Threads that work for calls which may be given up: what they touch, and what they share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np

from kvstore.hashing import Digests64, block_count
from kvstore.limits import CHECKSUM_BLOCK_BYTES, DISK_PART_SIZE_BYTES

T = TypeVar("T")


class Gate:
    """Lets threads at memory of a caller until it is shut.

    A thread that hangs in the kernel is outside, so shutting takes no longer than a copy.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self.is_shut = False

    def enter(self) -> bool:
        """Return whether the memory may be touched, until `leave`."""
        with self._changed:
            if not self.is_shut:
                self._inside += 1
            return not self.is_shut

    def leave(self) -> None:
        """End what `enter` has begun."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def shut(self) -> None:
        """Return when nobody is inside, and nobody ever will be."""
        with self._changed:
            self.is_shut = True
            self._changed.wait_for(lambda: self._inside == 0)


class BlockSums:
    """The block digests of one chunk, put together by many threads."""

    def __init__(self, size_bytes: int) -> None:
        self.digests: Digests64 = np.zeros(block_count(size_bytes), "<u8")
        self._left = len(self.digests)
        self._lock = threading.Lock()

    def add(self, start: int, digests: Digests64) -> bool:
        """Put in those of the part at *start*; True for the one that makes them complete."""
        first = start // CHECKSUM_BLOCK_BYTES
        with self._lock:
            self.digests[first : first + len(digests)] = digests
            self._left -= len(digests)
            return self._left == 0


class Crew:
    """*count* threads that take calls one after the other."""

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"kvstore-disk-{name}")
        self._pending: set[Future[Any]] = set()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Let the next thread that is free make *call*."""
        future = self._pool.submit(call)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def dismiss(self) -> set[Future[Any]]:
        """Cancel what has not begun; return what has."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return set(self._pending)


def dismiss(crews: Iterable[Crew], timeout_seconds: float) -> bool:
    """End the work of all *crews*; return whether it ended in time."""
    pending: set[Future[Any]] = set().union(*(crew.dismiss() for crew in crews))
    return not wait(pending, timeout_seconds).not_done


def parts_of(size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield where each part of a payload starts and stops."""
    for start in range(0, size_bytes, DISK_PART_SIZE_BYTES):
        yield start, min(start + DISK_PART_SIZE_BYTES, size_bytes)
