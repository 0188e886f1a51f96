"""What kernels do, in NumPy and in steps that may go in any order: what the stand-in runs.

Kernels of codecs have their twins in `compression.reference`; here are those of plain transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kvstore.gpu.batches import SECTION, SPAN
from kvstore.hashing import block_count, block_digests

Step = Callable[[], None]
MemoryAt = Callable[[int, int], NDArray[np.uint8]]
Twin = Callable[[NDArray[Any], MemoryAt], list[Step]]

_VECTOR_BYTES: Final = 16
_SECTION_UNIT_BYTES: Final = 256


def _read(memory: MemoryAt, address: int, dtype: DTypeLike, count: int) -> NDArray[Any]:
    return memory(address, count * np.dtype(dtype).itemsize).view(dtype)


def section_starts(batch: NDArray[Any], memory: MemoryAt) -> list[list[int]]:
    """Return where sections begin, `[chunk][section]`: in their spans, where there are some."""
    told = batch[0]
    chunks, spans = int(told["chunk_count"]), int(told["span_count"])
    sections = _read(memory, int(told["sections"]), SECTION, int(told["section_count"]))
    containers = _read(memory, int(told["containers"]), "<u8", chunks)
    if not told["spans"]:
        return [[int(start + section["offset"]) for section in sections] for start in containers]
    found = _read(memory, int(told["spans"]), SPAN, chunks * spans).reshape(chunks, spans)
    return [
        [int(start + row[int(section["span"])]["offset"]) for section in sections]
        for start, row in zip(containers, found, strict=True)
    ]


def _copy_rows(batch: NDArray[Any], memory: MemoryAt, *, to_pages: bool) -> list[Step]:
    """Return the steps of raw_gather and raw_scatter: one a page and section."""
    told = batch[0]
    chunks, pages = int(told["chunk_count"]), int(told["page_count"])
    sections = _read(memory, int(told["sections"]), SECTION, int(told["section_count"]))
    table = _read(memory, int(told["pages"]), "<i4", chunks * pages).reshape(chunks, pages)
    places = section_starts(batch, memory)
    heads, tokens, size = int(told["heads"]), int(told["tokens"]), int(told["page_tokens"])
    row = int(told["width"]) * _VECTOR_BYTES
    first = int(told["first_token"])
    steps: list[Step] = []

    def add(section: np.void, place: int, page: int, number: int) -> None:
        start = max(0, page * size - first)
        stop = min(tokens, (page + 1) * size - first)

        def move() -> None:
            for head in range(heads):
                flat = place + head * int(told["extra"]) + int(told["table"])
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
        for section, place in zip(sections, places[chunk], strict=True):
            for page in range(pages):
                add(section, place, page, int(table[chunk, page]))
    return steps


def raw_gather(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Copy rows of pages to where chunks lie flat."""
    return _copy_rows(batch, memory, to_pages=False)


def raw_scatter(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Copy flat chunks to rows of pages."""
    return _copy_rows(batch, memory, to_pages=True)


def _move_whole(batch: NDArray[Any], memory: MemoryAt, *, to_pages: bool) -> list[Step]:
    """Return the steps of raw_gather or raw_scatter; the last of each chunk takes its digests."""
    told = batch[0]
    steps = _copy_rows(batch, memory, to_pages=to_pages)
    if not told["reports"]:
        return steps
    chunks, rows = int(told["chunk_count"]), int(told["section_count"]) * int(told["heads"])
    size = rows * int(told["tokens"]) * int(told["width"]) * _VECTOR_BYTES
    starts = _read(memory, int(told["containers"]), "<u8", chunks).tolist()
    found = _read(memory, int(told["reports"]), "<u8", chunks * block_count(size))
    found = found.reshape(chunks, -1)
    each = len(steps) // chunks
    left = [each] * chunks

    def digesting(move: Step, chunk: int) -> Step:
        def run() -> None:
            move()
            left[chunk] -= 1
            if left[chunk] == 0:
                found[chunk] = block_digests(memory(starts[chunk], size).tobytes())

        return run

    return [digesting(step, number // each) for number, step in enumerate(steps)]


def whole_gather(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Copy rows of pages to where chunks lie in one piece, and digest what was copied."""
    return _move_whole(batch, memory, to_pages=False)


def whole_scatter(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Copy chunks in one piece to rows of pages, and digest what was copied."""
    return _move_whole(batch, memory, to_pages=True)


def spans_lay(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Lay measured sections one behind the other, with zeros between them: a step a container."""
    told = batch[0]
    chunks, count = int(told["chunk_count"]), int(told["span_count"])
    containers = _read(memory, int(told["containers"]), "<u8", chunks)
    found = _read(memory, int(told["spans"]), SPAN, chunks * count).reshape(chunks, count)

    def lay(spans: NDArray[Any], container: int) -> Step:
        def run() -> None:
            at = int(spans[0]["offset"])
            for span in spans:
                span["offset"], size = at, int(span["size"])
                end, after = (size + -size % unit for unit in (_VECTOR_BYTES, _SECTION_UNIT_BYTES))
                memory(container + at + end, after - end)[:] = 0
                at += after

        return run

    return [lay(spans, int(start)) for spans, start in zip(found, containers, strict=True)]


def xxh3_blocks(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
    """Digest every 64 KiB block of chunks that lie in pieces: a step a chunk."""
    told = batch[0]
    chunks, pieces = int(told["chunk_count"]), int(told["page_count"])
    size, piece = int(told["extra"]), int(told["page_stride"])
    starts = _read(memory, int(told["containers"]), "<u8", chunks * pieces)
    starts = starts.reshape(chunks, pieces).copy()
    found = _read(memory, int(told["reports"]), "<u8", chunks * block_count(size))
    found = found.reshape(chunks, -1)
    sizes = [size] * chunks
    if told["table"]:
        sizes = _read(memory, int(told["table"]), "<u8", chunks).tolist()

    def digest(chunk: int) -> Step:
        def run() -> None:
            lengths = [max(0, min(piece, sizes[chunk] - at * piece)) for at in range(pieces)]
            parts = [
                memory(int(start), length)
                for start, length in zip(starts[chunk], lengths, strict=True)
            ]
            digests = block_digests(np.concatenate(parts).tobytes())
            found[chunk, : len(digests)] = digests

        return run

    return [digest(chunk) for chunk in range(chunks)]


TWINS: Final[Mapping[str, Twin]] = {
    "raw_gather": raw_gather,
    "raw_scatter": raw_scatter,
    "spans_lay": spans_lay,
    "whole_gather": whole_gather,
    "whole_scatter": whole_scatter,
    "xxh3_blocks": xxh3_blocks,
}
