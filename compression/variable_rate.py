"""What sections of variable length are made of: parts in order, directories, checks.

A `Writer` stops at the section's cap, a `Reader` at the section's end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.compression.shapes import Bytes, padded
from kvstore.errors import ContainerError

Directory = NDArray[np.uint32]


class FullError(Exception):
    """The section would exceed its cap; the next codec of the chain is taken."""


class Writer:
    """Puts parts one behind the other into a section's room."""

    def __init__(self, target: Bytes) -> None:
        self._target = target
        self.at = 0

    def reserve(self, size_bytes: int) -> Bytes:
        """Return the next *size_bytes*, padded with zeros; raises `FullError`."""
        end = self.at + padded(size_bytes)
        if end > len(self._target):
            raise FullError
        room = self._target[self.at : self.at + size_bytes]
        self._target[self.at + size_bytes : end] = 0
        self.at = end
        return room

    def put(self, content: NDArray[Any]) -> None:
        """Append *content*, padded."""
        octets = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        self.reserve(octets.nbytes)[:] = octets


class Reader:
    """Takes parts one behind the other out of a section."""

    def __init__(self, source: Bytes, codec: str) -> None:
        self._source = source
        self._codec = codec
        self.at = 0

    def take(self, size_bytes: int) -> Bytes:
        """Return the next *size_bytes* and step over their padding; raises `ContainerError`."""
        end = self.at + padded(size_bytes)
        if end > len(self._source):
            raise self.broken(f"ends at {len(self._source)}, a part needs {end}")
        part = self._source[self.at : self.at + size_bytes]
        self.at = end
        return part

    def words(self, count: int, dtype: type[Any]) -> NDArray[Any]:
        """Return the next *count* numbers of *dtype*."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype=dtype)

    def directory(self, entries: int) -> Directory:
        """Return the next directory with *entries* places and its end; it ascends."""
        places: Directory = self.words(entries + 1, np.uint32)
        if (places[1:] < places[:-1]).any():
            raise self.broken("has a directory that does not ascend")
        return places

    def broken(self, why: str) -> ContainerError:
        """Return the error that says what is wrong with this section."""
        return ContainerError(f"a section of {self._codec} {why}")
