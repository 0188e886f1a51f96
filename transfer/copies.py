"""Copies between one contiguous buffer and scattered runs of memory, with checksums on the way.

A *gather* fills the buffer from the runs, a *scatter* fills the runs from the buffer. With
`checksums=True` both return the digests of the buffer's 64 KiB blocks, equal to
`kvstore.hashing.block_digests` and taken in the same pass over memory. The GIL is released while
bytes move. Buffers and runs must not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.errors import RequestError
from kvstore.hashing import block_count
from kvstore.limits import CHECKSUM_BLOCK_BYTES
from kvstore.transfer.native import Pieces, address_of, bytes_at, choose_movers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.hashing import Digests64

Addresses = npt.NDArray[np.uint64]

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]
"""Anything C-contiguous that offers its memory."""

SIZE_MAX_BYTES: Final = 2**56

_MOVERS: Final = choose_movers()

KERNEL: Final = _MOVERS.kernel
"""Which inner loop moves the bytes: avx512, avx2, portable, or numpy (no library built)."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Equally shaped runs of memory, in the order in which their bytes count.

    Run i is *inner_count* pieces of *piece_bytes*, *inner_stride* bytes apart, the first at
    `addresses[i]`; *size_bytes* counts the bytes of all. *owner* is kept alive for as long as the
    runs are; nothing else is.

    Raises `RequestError` when the shape is empty, negative, overlapping or beyond any memory.
    """

    addresses: Addresses
    piece_bytes: int
    inner_count: int = 1
    inner_stride: int = 0
    owner: object = None
    is_writable: bool = True
    pieces: Pieces = field(init=False, repr=False)
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self._validate()
        found, inner = self.addresses, self.inner_count
        start = address_of(found.data)
        pieces = Pieces(start, found.size, self.piece_bytes, inner, self.inner_stride)
        # Made once here, because small chunks are moved in less time than this takes.
        object.__setattr__(self, "pieces", pieces)
        object.__setattr__(self, "size_bytes", found.size * inner * self.piece_bytes)

    def _validate(self) -> None:
        found = self.addresses
        if found.ndim != 1 or found.dtype != np.uint64 or not found.flags.c_contiguous:
            raise RequestError("addresses of runs must be a flat contiguous array of uint64")
        if self.piece_bytes <= 0 or self.inner_count <= 0:
            raise RequestError(f"a run has {self.inner_count} pieces of {self.piece_bytes} bytes")
        if self.inner_count > 1 and self.inner_stride < self.piece_bytes:
            raise RequestError(
                f"pieces of {self.piece_bytes} bytes overlap when {self.inner_stride} bytes apart"
            )
        reach = max(self.piece_bytes, self.inner_stride) * self.inner_count
        if reach * max(1, found.size) > SIZE_MAX_BYTES:
            raise RequestError(f"runs of {reach} bytes each exceed any memory")

    @classmethod
    def of_buffer(cls, buffer: Buffer) -> Runs:
        """Return *buffer* as one run (none when it is empty). It must be C-contiguous."""
        view = _contiguous(buffer)
        starts = np.array([address_of(view)] if view.nbytes else [], dtype=np.uint64)
        return cls(starts, view.nbytes or 1, owner=view, is_writable=not view.readonly)

    @classmethod
    def of_arrays(cls, arrays: Sequence[npt.NDArray[Any]]) -> Runs:
        """Return C-contiguous *arrays* of one size, a run each."""
        views = [_contiguous(array) for array in arrays]
        sizes = {view.nbytes for view in views}
        if len(sizes) != 1 or 0 in sizes:
            raise RequestError(f"runs must share one size above zero, got {sorted(sizes)} bytes")
        starts = np.array([address_of(view) for view in views], dtype=np.uint64)
        writable = not any(view.readonly for view in views)
        return cls(starts, sizes.pop(), owner=views, is_writable=writable)

    @classmethod
    def of_pages(
        cls,
        bases: Sequence[int] | Addresses,
        page_table: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        page_stride_bytes: int,
        piece_bytes: int,
        head_count: int = 1,
        head_stride_bytes: int = 0,
        inner_count: int = 1,
        inner_stride: int = 0,
        owner: object = None,
    ) -> Runs:
        """Return the runs of the pages in *page_table*, in the order plane, head, page.

        *bases* holds the address of page 0 of every plane: K of layer 0, V of layer 0, K of
        layer 1 and so on. For pages that store tokens before heads, a run is the tokens of one
        head: `inner_count` tokens, `inner_stride` bytes apart. For pages that store heads first,
        a run is one piece. With `head_count=1` a run is a whole page.

        Raises `RequestError` for a negative page or stride.
        """
        pages = np.asarray(page_table, dtype=np.int64)
        if page_stride_bytes < 0 or head_stride_bytes < 0 or (pages.size and pages.min() < 0):
            raise RequestError("pages and their strides cannot be negative")
        planes = np.asarray(bases, dtype=np.uint64)
        heads = np.arange(head_count, dtype=np.uint64) * np.uint64(head_stride_bytes)
        offsets = heads[:, None] + pages.astype(np.uint64) * np.uint64(page_stride_bytes)
        addresses = (planes[:, None] + offsets.ravel()).ravel()
        return cls(addresses, piece_bytes, inner_count, inner_stride, owner)


def gather(target: Buffer, runs: Runs, *, checksums: bool) -> Digests64 | None:
    """Fill *target* from *runs*; return its block digests when *checksums*.

    Raises `RequestError` unless *target* is writable, contiguous and as large as the runs.
    """
    view = _writable(target)
    return gather_at(address_of(view), view.nbytes, runs, checksums=checksums)


def scatter(runs: Runs, source: Buffer, *, checksums: bool) -> Digests64 | None:
    """Fill *runs* from *source*; return the block digests of *source* when *checksums*.

    The bytes are stored whether or not the digests are what the caller expects.
    Raises `RequestError` unless the runs are writable and as large as *source*.
    """
    view = _contiguous(source)
    return scatter_from(address_of(view), view.nbytes, runs, checksums=checksums)


def copy(target: Buffer, source: Buffer, *, checksums: bool) -> Digests64 | None:
    """Copy *source* to *target*; return the block digests when *checksums*.

    Raises `RequestError` unless *target* is writable and both are contiguous and of one size.
    """
    into, view = _writable(target), _contiguous(source)
    if into.nbytes != view.nbytes:
        raise RequestError(f"the target has {into.nbytes} bytes, the source {view.nbytes}")
    return copy_at(address_of(into), address_of(view), view.nbytes, checksums=checksums)


def digest_blocks(buffer: Buffer) -> Digests64:
    """Return the XXH3-64 of every 64 KiB block of *buffer* (the last may be shorter)."""
    view = _contiguous(buffer)
    return digest_blocks_at(address_of(view), view.nbytes)


# The same by address, for callers that know where their buffer starts: a slice of a mapping is
# found by adding its offset, which costs less than asking a memoryview, above all a read-only one.
# The caller vouches for the addresses and keeps the memory alive.


def gather_at(address: int, size_bytes: int, runs: Runs, *, checksums: bool) -> Digests64 | None:
    """Gather into the *size_bytes* at *address*, like `gather`."""
    _check_size(runs, size_bytes)
    digests = _room_for_digests(size_bytes) if checksums else None
    _MOVERS.gather(address, runs.pieces, digests)
    return _digest_tail(address, size_bytes, digests)


def scatter_from(address: int, size_bytes: int, runs: Runs, *, checksums: bool) -> Digests64 | None:
    """Scatter the *size_bytes* at *address*, like `scatter`."""
    _check_size(runs, size_bytes)
    if not runs.is_writable:
        raise RequestError("the runs are read-only")
    digests = _room_for_digests(size_bytes) if checksums else None
    _MOVERS.scatter(address, runs.pieces, digests)
    return _digest_tail(address, size_bytes, digests)


def copy_at(target: int, source: int, size_bytes: int, *, checksums: bool) -> Digests64 | None:
    """Copy *size_bytes* from one address to another, like `copy`."""
    digests = _room_for_digests(size_bytes) if checksums else None
    _MOVERS.copy(target, source, size_bytes, digests)
    return _digest_tail(target, size_bytes, digests)


def digest_blocks_at(address: int, size_bytes: int) -> Digests64:
    """Digest the *size_bytes* at *address*, like `digest_blocks`."""
    digests = _room_for_digests(size_bytes)
    _MOVERS.digest_blocks(address, size_bytes, digests)
    _digest_tail(address, size_bytes, digests)
    return digests


def _contiguous(buffer: Buffer) -> memoryview:
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    if not view.c_contiguous:
        raise RequestError("the buffer is not C-contiguous")
    return view


def _writable(buffer: Buffer) -> memoryview:
    view = _contiguous(buffer)
    if view.readonly:
        raise RequestError("the target is read-only")
    return view


def _check_size(runs: Runs, size_bytes: int) -> None:
    if runs.size_bytes != size_bytes:
        raise RequestError(f"the buffer has {size_bytes} bytes, the runs {runs.size_bytes}")


def _room_for_digests(size_bytes: int) -> Digests64:
    return np.empty(block_count(size_bytes), dtype=np.uint64)


def _digest_tail(address: int, size_bytes: int, digests: Digests64 | None) -> Digests64 | None:
    """Digest the last block when it is short: the movers digest whole blocks only."""
    tail = size_bytes % CHECKSUM_BLOCK_BYTES
    if digests is not None and tail:
        digests[-1] = xxhash.xxh3_64_intdigest(bytes_at(address + size_bytes - tail, tail))
    return digests
