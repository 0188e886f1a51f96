"""What kernels are told: sections, chunks and pages, as gpu/cuda/batch.cuh lays them out.

Addresses are plain integers, so the same description drives a GPU and the host build of tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

THREADS: Final = 256
"""Threads of a block, in every kernel."""

SECTION: Final = np.dtype(
    [("plane", "<u8"), ("offset", "<u8"), ("layer", "<u4"), ("unused", "<u4")]
)
REPORT: Final = np.dtype(
    [("error", "<f4"), ("energy", "<f4"), ("broken", "<u4"), ("unused", "<u4")]
)
BATCH: Final = np.dtype(
    [
        *((name, "<u8") for name in ("sections", "pages", "containers", "reports")),
        *((name, "<i8") for name in ("page_stride", "token_stride", "head_stride")),
        *((name, "<u8") for name in ("extra", "table")),
        *((name, "<u4") for name in ("chunk_count", "section_count", "heads", "tokens")),
        *((name, "<u4") for name in ("width", "sinks", "page_tokens", "page_count")),
        *((name, "<u4") for name in ("first_token", "unused")),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """How the engine's cache is laid out. Strides are in bytes and multiples of 16.

    A chunk lies in *page_count* pages of its row of the page table and begins at token
    *first_token* of the first.
    """

    page_tokens: int
    page_count: int
    page_stride: int
    token_stride: int
    head_stride: int
    first_token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """What all sections of one launch have in common.

    *extra* is the length of the parts sinks and tail of a head block, *table* the id of the
    codec's table.
    """

    chunk_count: int
    section_count: int
    heads: int
    tokens: int
    width: int
    sinks: int = 0
    extra: int = 0
    table: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Addresses, as the device sees them, of the arrays that a launch reads.

    *sections* are `SECTION`s; *pages* is int32 `[chunk][page]`; *containers* is uint64 `[chunk]`;
    *reports*, `REPORT`s `[chunk][section]`, are zero before an encode and 0 for a decode.
    """

    sections: int
    pages: int
    containers: int
    reports: int = 0


def batch_of(chunks: Chunks, pages: Pages, places: Places) -> NDArray[Any]:
    """Return the argument of a kernel: one `BATCH`."""
    batch = np.zeros(1, dtype=BATCH)
    for part in (chunks, pages, places):
        for name in part.__slots__:
            batch[name] = getattr(part, name)
    return batch
