"""The two ways to move bytes: the C library beside this file, and plain Python without it.

Both are `Movers` and give the same bytes and the same digests. The *flat* side is a contiguous
buffer, the other side is scattered `Pieces`. Everything here takes raw addresses and trusts them:
`kvstore.transfer.copies` checks sizes and keeps the owners alive.

Digests are filled in for whole checksum blocks only; the caller digests a shorter last one.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import xxhash

from kvstore.limits import CHECKSUM_BLOCK_BYTES

if TYPE_CHECKING:
    from kvstore.hashing import Digests64

LIBRARY_PATH: Final = Path(__file__).with_name("_copy.so")
WITHOUT_LIBRARY: Final = "KVSTORE_NO_NATIVE"
"""Environment variable: when set to 1, the library is not loaded even where it was built."""


class Pieces(ctypes.Structure):
    """The scattered side as the C library reads it; its fields are those of `runs` in _copy.c."""

    _fields_ = (
        ("addresses", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("piece_bytes", ctypes.c_uint64),
        ("inner_count", ctypes.c_uint64),
        ("inner_stride", ctypes.c_uint64),
    )

    addresses: int
    count: int
    piece_bytes: int
    inner_count: int
    inner_stride: int


class Movers(Protocol):
    """What both ways offer. Digests are None, or have room for every block."""

    @property
    def kernel(self) -> str:
        """Which inner loop runs: avx512, avx2, portable (C), or numpy (no library)."""
        ...

    def gather(self, flat: int, pieces: Pieces, digests: Digests64 | None) -> None:
        """Fill the flat side from the pieces, in order."""
        ...

    def scatter(self, flat: int, pieces: Pieces, digests: Digests64 | None) -> None:
        """Fill the pieces from the flat side, in order."""
        ...

    def copy(self, to: int, start: int, size_bytes: int, digests: Digests64 | None) -> None:
        """Copy between two contiguous places."""
        ...

    def digest_blocks(self, flat: int, size_bytes: int, digests: Digests64) -> None:
        """Digest the whole blocks of the flat side without moving anything."""
        ...


def address_of(view: memoryview) -> int:
    """Return where the bytes of a contiguous *view* start; 0 for an empty one.

    The address is good for as long as the caller keeps the memory alive.
    """
    if view.nbytes == 0:
        return 0
    if view.readonly:
        address: int = np.asarray(view).__array_interface__["data"][0]
        return address
    # Several times cheaper than the array interface, but refuses read-only memory.
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def bytes_at(address: int, size_bytes: int) -> memoryview:
    """Return the memory at *address* as a writable view. Nothing keeps that memory alive."""
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def load_library(path: Path = LIBRARY_PATH) -> NativeMovers | None:
    """Load the C library, or return None where it was not built or cannot be loaded."""
    try:
        return NativeMovers(ctypes.CDLL(str(path)))
    except OSError:
        return None


def choose_movers() -> Movers:
    """Return the fastest movers of this installation."""
    if os.environ.get(WITHOUT_LIBRARY) == "1":
        return PlainMovers()
    return load_library() or PlainMovers()


class NativeMovers:
    """The C library. Calls release the GIL."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, pieces = ctypes.c_void_p, ctypes.POINTER(Pieces)
        self._gather = library.kvstore_gather
        self._gather.argtypes, self._gather.restype = [pointer, pieces, pointer], None
        self._scatter = library.kvstore_scatter
        self._scatter.argtypes, self._scatter.restype = [pointer, pieces, pointer], None
        self._copy = library.kvstore_copy
        self._copy.argtypes = [pointer, pointer, ctypes.c_uint64, pointer]
        self._copy.restype = None
        self._digest = library.kvstore_digest_blocks
        self._digest.argtypes, self._digest.restype = [pointer, ctypes.c_uint64, pointer], None
        self._use_kernel = library.kvstore_use_kernel
        self._use_kernel.argtypes, self._use_kernel.restype = [ctypes.c_char_p], ctypes.c_int
        self._kernel = library.kvstore_kernel
        self._kernel.argtypes, self._kernel.restype = [], ctypes.c_char_p

    @property
    def kernel(self) -> str:
        """Name the inner loop in use."""
        name: bytes = self._kernel()
        return name.decode()

    def use_kernel(self, name: str) -> bool:
        """Switch to a lesser kernel, to compare; return whether this CPU has it."""
        return bool(self._use_kernel(name.encode()))

    def gather(self, flat: int, pieces: Pieces, digests: Digests64 | None) -> None:
        """Fill the flat side from the pieces, in order."""
        self._gather(flat, pieces, None if digests is None else address_of(digests.data))

    def scatter(self, flat: int, pieces: Pieces, digests: Digests64 | None) -> None:
        """Fill the pieces from the flat side, in order."""
        self._scatter(flat, pieces, None if digests is None else address_of(digests.data))

    def copy(self, to: int, start: int, size_bytes: int, digests: Digests64 | None) -> None:
        """Copy between two contiguous places."""
        into = None if digests is None else address_of(digests.data)
        self._copy(to, start, size_bytes, into)

    def digest_blocks(self, flat: int, size_bytes: int, digests: Digests64) -> None:
        """Digest the whole blocks of the flat side without moving anything."""
        self._digest(flat, size_bytes, address_of(digests.data))


class PlainMovers:
    """The same with memmove and python-xxhash: slower, and right wherever Python runs."""

    kernel = "numpy"

    def gather(self, flat: int, pieces: Pieces, digests: Digests64 | None) -> None:
        """Fill the flat side from the pieces, in order."""
        starts = _piece_addresses(pieces)
        for index, start in enumerate(starts):
            ctypes.memmove(flat + index * pieces.piece_bytes, start, pieces.piece_bytes)
        if digests is not None:
            self.digest_blocks(flat, len(starts) * pieces.piece_bytes, digests)

    def scatter(self, flat: int, pieces: Pieces, digests: Digests64 | None) -> None:
        """Fill the pieces from the flat side, in order."""
        starts = _piece_addresses(pieces)
        for index, start in enumerate(starts):
            ctypes.memmove(start, flat + index * pieces.piece_bytes, pieces.piece_bytes)
        if digests is not None:
            self.digest_blocks(flat, len(starts) * pieces.piece_bytes, digests)

    def copy(self, to: int, start: int, size_bytes: int, digests: Digests64 | None) -> None:
        """Copy between two contiguous places."""
        ctypes.memmove(to, start, size_bytes)
        if digests is not None:
            self.digest_blocks(to, size_bytes, digests)

    def digest_blocks(self, flat: int, size_bytes: int, digests: Digests64) -> None:
        """Digest the whole blocks of the flat side without moving anything."""
        for index in range(size_bytes // CHECKSUM_BLOCK_BYTES):
            block = bytes_at(flat + index * CHECKSUM_BLOCK_BYTES, CHECKSUM_BLOCK_BYTES)
            digests[index] = xxhash.xxh3_64_intdigest(block)


def _piece_addresses(pieces: Pieces) -> list[int]:
    """Return the address of every piece, in order."""
    if pieces.count == 0:
        return []
    runs = np.frombuffer(bytes_at(pieces.addresses, pieces.count * 8), dtype=np.uint64)
    inner = np.arange(pieces.inner_count, dtype=np.uint64) * np.uint64(pieces.inner_stride)
    addresses: list[int] = (runs[:, None] + inner).ravel().tolist()
    return addresses
