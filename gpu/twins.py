"""What kernels do, in NumPy and in steps that may go in any order: what the stand-in runs.

Kernels of codecs have their twins in `compression.reference`; here are those of plain transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kvstore.gpu.batches import SECTION
from kvstore.hashing import block_count, block_digests

Step = Callable[[], None]
MemoryAt = Callable[[int, int], NDArray[np.uint8]]
Twin = Callable[[NDArray[Any], MemoryAt], list[Step]]

_VECTOR_BYTES: Final = 16


def _read(memory: MemoryAt, address: int, dtype: DTypeLike, count: int) -> NDArray[Any]:
    return memory(address, count * np.dtype(dtype).itemsize).view(dtype)


def _copy_rows(batch: NDArray[Any], memory: MemoryAt, *, to_pages: bool) -> list[Step]:
    """Return the steps of raw_gather and raw_scatter: one a page and section."""
    told = batch[0]
    chunks, pages = int(told["chunk_count"]), int(told["page_count"])
    sections = _read(memory, int(told["sections"]), SECTION, int(told["section_count"]))
    table = _read(memory, int(told["pages"]), "<i4", chunks * pages).reshape(chunks, pages)
    containers = _read(memory, int(told["containers"]), "<u8", chunks)
    heads, tokens, size = int(told["heads"]), int(told["tokens"]), int(told["page_tokens"])
    row = int(told["width"]) * _VECTOR_BYTES
    first = int(told["first_token"])
    steps: list[Step] = []

    def add(section: np.void, container: int, page: int, number: int) -> None:
        start = max(0, page * size - first)
        stop = min(tokens, (page + 1) * size - first)

        def move() -> None:
            for head in range(heads):
                flat = container + int(section["offset"]) + head * int(told["extra"])
                flat += int(told["table"])
                for token in range(start, stop):
                    at = int(section["plane"]) + number * int(told["page_stride"])
                    at += (first + token - page * size) * int(told["token_stride"])
                    at += head * int(told["head_stride"])
                    kept = memory(flat + token * row, row)
                    if number < 0:
                        kept[:] = kept if to_pages else 0
                    elif to_pages:
                        memory(at, row)[:] = kept
                    else:
                        kept[:] = memory(at, row)

        steps.append(move)

    for chunk in range(chunks):
        for section in sections:
            for page in range(pages):
                add(section, int(containers[chunk]), page, int(table[chunk, page]))
    return steps


def raw_gather(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Copy rows of pages to where chunks lie flat."""
    return _copy_rows(batch, memory, to_pages=False)


def raw_scatter(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Copy flat chunks to rows of pages."""
    return _copy_rows(batch, memory, to_pages=True)


def xxh3_blocks(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Digest every 64 KiB block of chunks that lie in pieces: a step a chunk."""
    told = batch[0]
    chunks, pieces = int(told["chunk_count"]), int(told["page_count"])
    size, piece = int(told["extra"]), int(told["page_stride"])
    starts = _read(memory, int(told["containers"]), "<u8", chunks * pieces)
    starts = starts.reshape(chunks, pieces).copy()
    found = _read(memory, int(told["reports"]), "<u8", chunks * block_count(size))
    found = found.reshape(chunks, -1)

    def digest(chunk: int) -> Step:
        def run() -> None:
            lengths = [min(piece, size - at * piece) for at in range(pieces)]
            parts = [
                memory(int(start), length)
                for start, length in zip(starts[chunk], lengths, strict=True)
            ]
            found[chunk] = block_digests(np.concatenate(parts).tobytes())

        return run

    return [digest(chunk) for chunk in range(chunks)]


TWINS: Final[Mapping[str, Twin]] = {
    "raw_gather": raw_gather,
    "raw_scatter": raw_scatter,
    "xxh3_blocks": xxh3_blocks,
}
