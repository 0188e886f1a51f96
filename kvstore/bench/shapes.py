"""KV as engines hold it: models, pages in shuffled order, and one pool of memory for all."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from kvstore.limits import MIB
from kvstore.protocol.manifest import Manifest
from kvstore.transfer.copies import Runs
from kvstore.transfer.native import address_of

if TYPE_CHECKING:
    import numpy.typing as npt

PAGE_TOKENS: Final = 16
_HEAD_BYTES: Final = 128 * 2
"""One token of one head, keys or values: 128 of bfloat16."""

Source = Literal["contiguous", "whole pages", "HND pages", "NHD pages"]
"""Where a chunk's bytes lie in the engine.

Whole pages are stored as they are; HND pages (heads before tokens) and NHD pages (tokens
before heads) become the canonical chunk, which has heads outermost.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """A chunk of *tokens* tokens of a model with bfloat16 KV and heads of 128."""

    name: str
    layers: int
    heads: int
    tokens: int

    @property
    def planes(self) -> int:
        """Keys and values of every layer."""
        return 2 * self.layers

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one plane."""
        return PAGE_TOKENS * self.heads * _HEAD_BYTES

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk."""
        return self.planes * self.heads * self.tokens * _HEAD_BYTES

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that differ for this shape: with one head, all pages are alike."""
        if self.heads == 1:
            return ("contiguous", "whole pages")
        return ("contiguous", "whole pages", "HND pages", "NHD pages")

    def piece_bytes(self, source: Source) -> int:
        """Return how many bytes lie together in the engine."""
        sizes: dict[Source, int] = {
            "contiguous": self.chunk_bytes,
            "whole pages": self.page_bytes,
            "HND pages": PAGE_TOKENS * _HEAD_BYTES,
            "NHD pages": _HEAD_BYTES,
        }
        return sizes[source]

    def manifest(self, source: Source) -> Manifest:
        """Return the namespace of chunks from *source*."""
        canonical = source in {"HND pages", "NHD pages"}
        return Manifest(
            model=f"kvstore-bench/{self.name}/{source}",
            revision="1",
            dtype="bfloat16" if canonical else "opaque",
            layers=self.layers,
            kv_heads=self.heads if canonical else 1,
            head_dim=128,
            chunk_tokens=self.tokens,
            layout="canonical" if canonical else "opaque",
            opaque_bytes=0 if canonical else self.chunk_bytes,
        )


SMALL_MODEL: Final = Shape("small model, 12 x 2 heads", layers=12, heads=2, tokens=256)
SHAPES: Final = (
    Shape("Llama-8B, one of 8 shards", layers=32, heads=1, tokens=64),
    SMALL_MODEL,
    Shape("Llama-8B", layers=32, heads=8, tokens=64),
    Shape("Llama-8B", layers=32, heads=8, tokens=256),
)


class Pool:
    """The KV memory of a pretended engine: random bytes, all pages faulted in."""

    def __init__(self, size_bytes: int, *, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
        for start in range(0, size_bytes, 16 * MIB):
            part = self.memory[start : start + 16 * MIB]
            part[:] = self._rng.integers(0, 256, part.size, dtype=np.uint8)

    def chunks(self, shape: Shape, source: Source, count: int) -> list[Runs]:
        """Return where *count* chunks lie, together on all of their part of the pool."""
        assert count * shape.chunk_bytes <= self.memory.size, "the pool holds all chunks"
        if source == "contiguous":
            parts = self.memory[: count * shape.chunk_bytes].reshape(count, -1)
            return [Runs.of_buffer(part) for part in parts]
        pages = shape.tokens // PAGE_TOKENS
        table = self._rng.permutation(count * pages).reshape(count, pages)
        return [self._paged(shape, source, row, count * pages) for row in table]

    def _paged(
        self, shape: Shape, source: Source, pages: npt.NDArray[np.int64], page_count: int
    ) -> Runs:
        start = address_of(self.memory.data)
        by_heads = source != "whole pages"
        scattered = source == "NHD pages"
        return Runs.of_pages(
            [start + plane * page_count * shape.page_bytes for plane in range(shape.planes)],
            pages,
            page_stride_bytes=shape.page_bytes,
            piece_bytes=shape.piece_bytes(source),
            head_count=shape.heads if by_heads else 1,
            head_stride_bytes=shape.piece_bytes(source) if by_heads else 0,
            inner_count=PAGE_TOKENS if scattered else 1,
            inner_stride=shape.heads * _HEAD_BYTES if scattered else 0,
            owner=self.memory,
        )
