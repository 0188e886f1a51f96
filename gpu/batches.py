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

SECTION: Final = np.dtype([("plane", "<u8"), ("offset", "<u8"), ("layer", "<u4"), ("span", "<u4")])
REPORT: Final = np.dtype(
    [("error", "<f4"), ("energy", "<f4"), ("broken", "<u4"), ("unused", "<u4")]
)
SPAN: Final = np.dtype([("offset", "<u8"), ("size", "<u8")])
CODING: Final = np.dtype(
    [
        *(("delta", "<f4"), ("bound", "<u4"), ("kind", "<u4"), ("unused", "<u4")),
        ("frequencies", "<u2", (256,)),
    ]
)
"""A side of a preset of ecsq; kind is 0 for K, 1 for V."""
BATCH: Final = np.dtype(
    [
        *((name, "<u8") for name in ("sections", "pages", "containers", "reports")),
        *((name, "<i8") for name in ("page_stride", "token_stride", "head_stride")),
        *((name, "<u8") for name in ("extra", "table")),
        *((name, "<u4") for name in ("chunk_count", "section_count", "heads", "tokens")),
        *((name, "<u4") for name in ("width", "sinks", "page_tokens", "page_count")),
        *((name, "<u4") for name in ("first_token", "span_count")),
        *((name, "<u8") for name in ("spans", "scratch")),
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
    codec's table (ecsq: the address of a `CODING`). *span_count* is how many sections a container
    of variable rate has.
    """

    chunk_count: int
    section_count: int
    heads: int
    tokens: int
    width: int
    sinks: int = 0
    extra: int = 0
    table: int = 0
    span_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Addresses, as the device sees them, of the arrays that a launch reads.

    *sections* are `SECTION`s; *pages* is int32 `[chunk][page]`; *containers* is uint64 `[chunk]`;
    *reports*, `REPORT`s `[chunk][section]`, are zero before an encode and 0 for a decode.

    Variable rates have more. *spans* are `SPAN`s `[chunk][span]`, where sections lie in their
    containers: an encode finds them, a decode reads them; a section of a fixed rate beside them
    has its size there from the start. *scratch* is room for an encode, and for a decode of ecsq:
    `kernels.scratch_bytes`. A decode says in *reports*, zero before, what is damaged.
    """

    sections: int
    pages: int
    containers: int
    reports: int = 0
    spans: int = 0
    scratch: int = 0


def batch_of(chunks: Chunks, pages: Pages, places: Places) -> NDArray[Any]:
    """Return the argument of a kernel: one `BATCH`."""
    batch = np.zeros(1, dtype=BATCH)
    for part in (chunks, pages, places):
        for name in part.__slots__:
            batch[name] = getattr(part, name)
    return batch
