"""Where an engine's pages lie on its device, and what kernels are told to move them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import RequestError
from kvstore.gpu.batches import BATCH, SECTION

VECTOR_BYTES: Final = 16
NOWHERE: Final = -1
"""Stands for a page that does not exist: nothing is written to it, zeros are read from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """The pages of one KV group. A chunk of it is `[plane][head][token][row]` in one piece.

    *planes* are the addresses of page 0 of K of layer 0, V of layer 0, K of layer 1 and so on;
    a row is what one token of one head has there. Strides are in bytes.

    Raises `RequestError` for what kernels cannot move: anything that is not in vectors of 16 bytes.
    """

    planes: tuple[int, ...]
    heads: int
    page_tokens: int
    pages_per_chunk: int
    row_bytes: int
    page_stride: int
    token_stride: int
    head_stride: int

    def __post_init__(self) -> None:
        counts = (len(self.planes), self.heads, self.page_tokens, self.pages_per_chunk)
        if min(*counts, self.row_bytes) < 1:
            raise RequestError(f"pages of {counts} planes, heads, tokens and pages a chunk")
        sizes = (self.row_bytes, self.page_stride, self.token_stride, self.head_stride)
        for size in (*sizes, *self.planes):
            if size % VECTOR_BYTES:
                raise RequestError(f"{size} of pages is no multiple of {VECTOR_BYTES} bytes")

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.page_tokens * self.pages_per_chunk

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one plane of a chunk."""
        return self.chunk_tokens * self.row_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return len(self.planes) * self.heads * self.head_bytes

    @property
    def piece_bytes(self) -> int:
        """Bytes that lie together both in a page and in a chunk."""
        return self.row_bytes * (self.page_tokens if self.token_stride == self.row_bytes else 1)

    @property
    def pieces_per_chunk(self) -> int:
        """Pieces of a chunk."""
        return self.chunk_bytes // self.piece_bytes

    def check_pages(self, chunks: Sequence[Sequence[int]]) -> None:
        """Raise `RequestError` unless each of *chunks* has its number of pages."""
        for pages in chunks:
            if len(pages) != self.pages_per_chunk:
                raise RequestError(f"{len(pages)} pages for a chunk of {self.pages_per_chunk}")

    def pieces(self, pages: Sequence[int]) -> NDArray[np.uint64]:
        """Return the addresses of the pieces of one chunk, whose tokens lie behind each other."""
        planes = np.array(self.planes, dtype=np.uint64)
        heads = np.arange(self.heads, dtype=np.uint64) * np.uint64(self.head_stride)
        starts = np.asarray(pages, dtype=np.uint64) * np.uint64(self.page_stride)
        found: NDArray[np.uint64] = planes[:, None, None] + heads[:, None] + starts
        return found.ravel()

    def sections(self) -> NDArray[Any]:
        """Return the planes as kernels read them."""
        made = np.zeros(len(self.planes), dtype=SECTION)
        made["plane"] = self.planes
        made["offset"] = np.arange(len(self.planes)) * (self.heads * self.head_bytes)
        return made


def digest_batch(
    count: int, size_bytes: int, *, pieces: int, starts: int, digests: int, sizes: int = 0
) -> NDArray[Any]:
    """Return the argument of xxh3_blocks: chunks of *size_bytes*, each in so many *pieces*.

    They are shorter where there are *sizes*: the address of a uint64 for each.
    """
    batch = np.zeros(1, dtype=BATCH)
    batch["containers"], batch["reports"], batch["table"] = starts, digests, sizes
    batch["chunk_count"], batch["page_count"] = count, pieces
    batch["page_stride"], batch["extra"] = size_bytes // pieces, size_bytes
    return batch
