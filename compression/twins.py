"""What the kernels of codecs do, in the codecs' own NumPy or C, for the stand-in of a GPU.

A kernel is called `CODEC_SIDE_DIRECTION_TYPE`, as in `int4_keys_encode_bf16`. Its twin works
section by section, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.compression.reference import find_coder
from kvstore.compression.shapes import (
    CodecId,
    Kind,
    SectionShape,
    SourceType,
    Values,
    fixed_section_bytes,
    padded,
)
from kvstore.gpu.batches import REPORT, SECTION
from kvstore.gpu.twins import TWINS, MemoryAt, Step, Twin
from kvstore.types import HeadRange

KERNEL_NAMES: Final[Mapping[CodecId, str]] = MappingProxyType(
    {
        CodecId.FP8: "fp8",
        CodecId.INT8KV: "int8",
        CodecId.INT4KV: "int4",
        CodecId.NVFP4: "nvfp4",
        CodecId.HQ4: "hq4",
        CodecId.HQ3: "hq3",
    }
)
"""What kernels call the codecs that have some."""

SIDES: Final[Mapping[Kind, str]] = MappingProxyType({Kind.K: "keys", Kind.V: "values"})
TYPES: Final[Mapping[SourceType, str]] = MappingProxyType(
    {SourceType.BFLOAT16: "bf16", SourceType.FLOAT16: "fp16", SourceType.FLOAT32: "fp32"}
)


def kernel_name(codec: CodecId, kind: Kind, direction: str, source: SourceType) -> str:
    """Return the kernel that does *direction*, "encode" or "decode"."""
    return f"{KERNEL_NAMES[codec]}_{SIDES[kind]}_{direction}_{TYPES[source]}"


class _Sections:
    """The sections of one launch."""

    def __init__(
        self, batch: NDArray[Any], memory: MemoryAt, codec: CodecId, kind: Kind, source: SourceType
    ) -> None:
        self._told = told = batch[0]
        self._memory, self._codec = memory, codec
        count, chunks = int(told["section_count"]), int(told["chunk_count"])
        self.indices = list(product(range(chunks), range(count)))
        self._sections = self._read("sections", SECTION, count)
        pages = int(told["page_count"])
        self._pages = self._read("pages", "<i4", chunks * pages).reshape(chunks, pages)
        self._containers = self._read("containers", "<u8", chunks)
        heads, tokens, width = (int(told[name]) for name in ("heads", "tokens", "width"))
        element, sinks = source.size_bytes, int(told["sinks"])
        tail_bytes = int(told["extra"]) - padded(sinks * width * element)
        self._shape = SectionShape(
            kind=kind,
            source=source,
            heads=heads,
            tokens=tokens,
            dim=width,
            tail=tail_bytes // (tokens * element),
            sinks=sinks,
            table=int(told["table"]),
        )

    def _read(self, name: str, dtype: object, count: int) -> NDArray[Any]:
        kind = np.dtype(dtype)  # type: ignore[call-overload]  # of any of NumPy's spellings
        found: NDArray[Any] = self._memory(int(self._told[name]), count * kind.itemsize).view(kind)
        return found

    def encode(self, chunk: int, number: int) -> None:
        """Encode one section, and report."""
        shape, found = self._shape_of(number), self._values(chunk, number)
        encoded = find_coder(self._codec, shape).encode(shape, found, self._target(chunk, number))
        reports = self._read("reports", REPORT, len(self.indices))
        report = reports[chunk * len(self._sections) + number]
        report["error"] += encoded.error
        report["energy"] += encoded.energy
        report["broken"] |= not encoded.is_fit

    def decode(self, chunk: int, number: int) -> None:
        """Decode one section."""
        shape = self._shape_of(number)
        decoded = np.zeros((shape.heads, shape.tokens, shape.dim), shape.source.carrier)
        whole = HeadRange(0, shape.heads)
        find_coder(self._codec, shape).decode(shape, self._target(chunk, number), decoded, whole)
        for head, start, rows in self._rows(chunk, number):
            rows[...] = decoded[head, start : start + len(rows)]

    def _shape_of(self, number: int) -> SectionShape:
        section, shape = self._sections[number], self._shape
        return SectionShape(
            **{name: getattr(shape, name) for name in shape.__slots__}
            | {"layer": int(section["layer"])}
        )

    def _target(self, chunk: int, number: int) -> NDArray[np.uint8]:
        start = int(self._containers[chunk]) + int(self._sections[number]["offset"])
        return self._memory(start, fixed_section_bytes(self._codec, self._shape))

    def _values(self, chunk: int, number: int) -> Values:
        shape = self._shape
        found = np.zeros((shape.heads, shape.tokens, shape.dim), shape.source.carrier)
        for head, start, rows in self._rows(chunk, number):
            found[head, start : start + len(rows)] = rows
        return found

    def _rows(self, chunk: int, number: int) -> list[tuple[int, int, Values]]:
        """Return where head by head and page by page the rows of a section lie."""
        told, shape = self._told, self._shape
        strides = int(told["token_stride"]), shape.source.size_bytes
        size, first = int(told["page_tokens"]), int(told["first_token"])
        found = []
        for head, position in product(range(shape.heads), range(self._pages.shape[1])):
            start = max(0, position * size - first)
            count = min(shape.tokens, (position + 1) * size - first) - start
            at = int(self._sections[number]["plane"]) + head * int(told["head_stride"])
            at += int(self._pages[chunk, position]) * int(told["page_stride"])
            at += (first + start - position * size) * strides[0]
            reach = (count - 1) * strides[0] + shape.dim * strides[1]
            rows: Values = np.ndarray(
                (count, shape.dim), shape.source.carrier, self._memory(at, reach), 0, strides
            )
            found.append((head, start, rows))
        return found


def _twin(codec: CodecId, kind: Kind, direction: str, source: SourceType) -> Twin:
    def run(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
        sections = _Sections(batch, memory, codec, kind, source)
        work = sections.encode if direction == "encode" else sections.decode
        return [lambda at=at: work(*at) for at in sections.indices]  # type: ignore[misc]

    return run


CODEC_TWINS: Final[Mapping[str, Twin]] = MappingProxyType(
    {
        **TWINS,
        **{
            kernel_name(*words): _twin(*words)
            for words in product(KERNEL_NAMES, SIDES, ("encode", "decode"), TYPES)
        },
    }
)
"""All kernels by name, those of plain transfers among them."""
