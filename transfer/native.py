"""The two ways to move bytes: the C library beside this file, and plain Python without it.

Both are `Movers` and give the same bytes and the same digests. The *flat* side is a contiguous
buffer; the *pieces* are found as `Runs` describes. Everything here takes raw addresses and trusts
them: `kvstore.transfer.copies` checks sizes and keeps the owners alive.

Digests are filled in for whole checksum blocks only; the caller digests a shorter last one.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.limits import CHECKSUM_BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.hashing import Digests64

Addresses = npt.NDArray[np.uint64]

LIBRARY_PATH: Final = Path(__file__).with_name("_copy.so")
WITHOUT_LIBRARY: Final = "KVSTORE_NO_NATIVE"
"""Environment variable: when set to 1, the library is not loaded even where it was built."""


class Movers(Protocol):
    """What both ways offer."""

    @property
    def kernel(self) -> str:
        """Which inner loop runs: avx512, avx2, portable (C), or numpy (no library)."""
        ...

    def gather(
        self, flat: int, addresses: Addresses, shape: Shape, digests: Digests64 | None
    ) -> None:
        """Fill the flat side from the pieces, in order."""
        ...

    def scatter(
        self, flat: int, addresses: Addresses, shape: Shape, digests: Digests64 | None
    ) -> None:
        """Fill the pieces from the flat side, in order."""
        ...

    def digest_blocks(self, flat: int, size_bytes: int, digests: Digests64) -> None:
        """Digest the whole blocks of the flat side without moving anything."""
        ...


Shape = tuple[int, int, int]
"""`(piece_bytes, inner_count, inner_stride)`, the same for every run."""


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
        pointer, word = ctypes.c_void_p, ctypes.c_uint64
        self._gather = library.kvstore_gather
        self._scatter = library.kvstore_scatter
        for function in (self._gather, self._scatter):
            function.argtypes = [pointer, pointer, word, word, word, word, pointer]
            function.restype = None
        self._digest_blocks = library.kvstore_digest_blocks
        self._digest_blocks.argtypes = [pointer, word, pointer]
        self._digest_blocks.restype = None
        self._use_kernel = library.kvstore_use_kernel
        self._use_kernel.argtypes = [ctypes.c_char_p]
        self._use_kernel.restype = ctypes.c_int
        self._kernel = library.kvstore_kernel
        self._kernel.argtypes = []
        self._kernel.restype = ctypes.c_char_p

    @property
    def kernel(self) -> str:
        """Name the inner loop in use."""
        name: bytes = self._kernel()
        return name.decode()

    def use_kernel(self, name: str) -> bool:
        """Switch to a lesser kernel, to compare; return whether this CPU has it."""
        return bool(self._use_kernel(name.encode()))

    def gather(
        self, flat: int, addresses: Addresses, shape: Shape, digests: Digests64 | None
    ) -> None:
        """Fill the flat side from the pieces, in order."""
        into = None if digests is None else address_of(digests.data)
        self._gather(flat, address_of(addresses.data), len(addresses), *shape, into)

    def scatter(
        self, flat: int, addresses: Addresses, shape: Shape, digests: Digests64 | None
    ) -> None:
        """Fill the pieces from the flat side, in order."""
        into = None if digests is None else address_of(digests.data)
        self._scatter(flat, address_of(addresses.data), len(addresses), *shape, into)

    def digest_blocks(self, flat: int, size_bytes: int, digests: Digests64) -> None:
        """Digest the whole blocks of the flat side without moving anything."""
        self._digest_blocks(flat, size_bytes, address_of(digests.data))


class PlainMovers:
    """The same with memmove and python-xxhash: slower, and right wherever Python runs."""

    kernel = "numpy"

    def gather(
        self, flat: int, addresses: Addresses, shape: Shape, digests: Digests64 | None
    ) -> None:
        """Fill the flat side from the pieces, in order."""
        for offset, piece in _pieces(addresses, shape):
            ctypes.memmove(flat + offset, piece, shape[0])
        if digests is not None:
            self.digest_blocks(flat, _size_bytes(addresses, shape), digests)

    def scatter(
        self, flat: int, addresses: Addresses, shape: Shape, digests: Digests64 | None
    ) -> None:
        """Fill the pieces from the flat side, in order."""
        for offset, piece in _pieces(addresses, shape):
            ctypes.memmove(piece, flat + offset, shape[0])
        if digests is not None:
            self.digest_blocks(flat, _size_bytes(addresses, shape), digests)

    def digest_blocks(self, flat: int, size_bytes: int, digests: Digests64) -> None:
        """Digest the whole blocks of the flat side without moving anything."""
        for index in range(size_bytes // CHECKSUM_BLOCK_BYTES):
            block = bytes_at(flat + index * CHECKSUM_BLOCK_BYTES, CHECKSUM_BLOCK_BYTES)
            digests[index] = xxhash.xxh3_64_intdigest(block)


def _size_bytes(addresses: Addresses, shape: Shape) -> int:
    piece_bytes, inner_count, _ = shape
    return len(addresses) * inner_count * piece_bytes


def _pieces(addresses: Addresses, shape: Shape) -> Iterator[tuple[int, int]]:
    """Yield the flat offset and the address of every piece."""
    piece_bytes, inner_count, inner_stride = shape
    inner = np.arange(inner_count, dtype=np.uint64) * np.uint64(inner_stride)
    pieces: list[int] = (addresses[:, None] + inner).ravel().tolist()
    return zip(range(0, len(pieces) * piece_bytes, piece_bytes), pieces, strict=True)
