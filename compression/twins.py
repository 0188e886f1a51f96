"""What the kernels of codecs do, in the codecs' own NumPy or C, for the stand-in of a GPU.

A kernel is called `CODEC_SIDE_STEP_TYPE`, as in `int4_keys_encode_bf16`, or `CODEC_STEP_TYPE` where
K and V are alike. Its twin works section by section, in any order. Of what takes several steps,
twins do all in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.compression.reference import find_coder
from kvstore.compression.shapes import (
    LOSSLESS,
    UNFIT,
    CodecId,
    Encoded,
    Kind,
    SectionShape,
    SourceType,
    Values,
    fixed_section_bytes,
    padded,
    section_cap_bytes,
)
from kvstore.compression.tables import PRESETS, Preset
from kvstore.errors import ContainerError, RequestError
from kvstore.gpu.batches import CODING, REPORT, SECTION, SPAN
from kvstore.gpu.kernels import DTYPES, DTYPES_OF, kernel_names
from kvstore.gpu.twins import TWINS, MemoryAt, Step, Twin, section_starts
from kvstore.types import HeadRange

KERNEL_NAMES: Final[Mapping[CodecId, str]] = MappingProxyType(
    {
        CodecId.FP8: "fp8",
        CodecId.INT8KV: "int8",
        CodecId.INT4KV: "int4",
        CodecId.NVFP4: "nvfp4",
        CodecId.HQ4: "hq4",
        CodecId.HQ3: "hq3",
        CodecId.NVFP4_COMPAT: "compat",
    }
)
"""What kernels call the codecs of fixed rate that have some."""

VARIABLE_NAMES: Final[Mapping[CodecId, str]] = MappingProxyType(
    {CodecId.EXP3: "exp3", CodecId.RANS: "rans", CodecId.ECSQ: "ecsq"}
)
"""What they call those of variable rate."""

SIDES: Final[Mapping[Kind, str]] = MappingProxyType({Kind.K: "keys", Kind.V: "values"})
TYPES: Final[Mapping[SourceType, str]] = MappingProxyType(
    {SourceType.BFLOAT16: "bf16", SourceType.FLOAT16: "fp16", SourceType.FLOAT32: "fp32"}
)


def kernels_of(codec: CodecId, kind: Kind, direction: str, source: SourceType) -> tuple[str, ...]:
    """Return the kernels that are one *direction* of a codec, in their order.

    These are "encode" and "decode"; of a variable rate "measure", "place" and "decode". Raises
    `RequestError` where there are none for the codec, or values of this type.
    """
    name = KERNEL_NAMES.get(codec) or VARIABLE_NAMES.get(codec)
    if name is None or source not in TYPES:
        raise RequestError(f"there are no kernels for {source.name} in {codec.name}")
    return tuple(kernel_names(name, SIDES[kind], direction, TYPES[source]))


class _Sections:
    """The sections of one launch."""

    def __init__(
        self, batch: NDArray[Any], memory: MemoryAt, codec: CodecId, kind: Kind, source: SourceType
    ) -> None:
        self._told = told = batch[0]
        self._memory, self._codec = memory, codec
        self._starts = section_starts(batch, memory)
        count, chunks = int(told["section_count"]), int(told["chunk_count"])
        self.indices = list(product(range(chunks), range(count)))
        self._sections = self._read("sections", SECTION, count)
        pages = int(told["page_count"])
        self._pages = self._read("pages", "<i4", chunks * pages).reshape(chunks, pages)
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
        self._report(chunk, number, encoded)

    def decode(self, chunk: int, number: int) -> None:
        """Decode one section."""
        shape = self._shape_of(number)
        decoded = np.zeros((shape.heads, shape.tokens, shape.dim), shape.source.carrier)
        whole = HeadRange(0, shape.heads)
        find_coder(self._codec, shape).decode(shape, self._target(chunk, number), decoded, whole)
        for head, start, rows in self._rows(chunk, number):
            rows[...] = decoded[head, start : start + len(rows)]

    def _report(self, chunk: int, number: int, encoded: Encoded) -> None:
        reports = self._read("reports", REPORT, len(self.indices))
        report = reports[chunk * len(self._sections) + number]
        report["error"] += encoded.error
        report["energy"] += encoded.energy
        report["broken"] |= not encoded.is_fit

    def _shape_of(self, number: int) -> SectionShape:
        section, shape = self._sections[number], self._shape
        return SectionShape(
            **{name: getattr(shape, name) for name in shape.__slots__}
            | {"layer": int(section["layer"])}
        )

    def _target(self, chunk: int, number: int) -> NDArray[np.uint8]:
        size = fixed_section_bytes(self._codec, self._shape)
        return self._memory(self._starts[chunk][number], size)

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


class _Varying(_Sections):
    """The sections of one launch of a codec of variable rate."""

    def __init__(
        self, batch: NDArray[Any], memory: MemoryAt, codec: CodecId, source: SourceType
    ) -> None:
        coding = None
        if codec is CodecId.ECSQ:
            batch = batch.copy()
            coding = memory(int(batch[0]["table"]), CODING.itemsize).view(CODING)[0]
            batch["table"] = preset_of(coding).table_id
        kind = Kind.K if coding is None else Kind(int(coding["kind"]))
        super().__init__(batch, memory, codec, kind, source)
        chunks, spans = int(self._told["chunk_count"]), int(self._told["span_count"])
        self._spans = self._read("spans", SPAN, chunks * spans).reshape(chunks, spans)

    def measure(self, chunk: int, number: int) -> None:
        """Say how long a section becomes, and what is lost."""
        encoded, _ = self._encoded(chunk, number)
        cap = section_cap_bytes(self._codec, self._shape)
        self._report(chunk, number, encoded)
        self._span(chunk, number)["size"] = encoded.size_bytes if encoded.is_fit else cap
        self._noted(chunk, number)[:] = encoded.size_bytes

    def place(self, chunk: int, number: int) -> None:
        """Write a section where it belongs; what is not fit as it is, if nothing may be lost."""
        encoded, section = self._encoded(chunk, number)
        found = section[: encoded.size_bytes]
        if not encoded.is_fit:
            raw = self._values(chunk, number).view(np.uint8).ravel()
            found = raw if self._codec in LOSSLESS else raw[:0]
        # What another transfer has noted there meanwhile would be anybody's rubbish.
        noted = int(self._noted(chunk, number)[0])
        found = found if noted == encoded.size_bytes else found[:0]
        self._memory(self._starts[chunk][number], len(found))[:] = found

    def decode(self, chunk: int, number: int) -> None:
        """Decode one section, or report that it is damaged."""
        try:
            super().decode(chunk, number)
        except ContainerError:
            self._report(chunk, number, UNFIT)

    def _encoded(self, chunk: int, number: int) -> tuple[Encoded, NDArray[np.uint8]]:
        shape = self._shape_of(number)
        room = np.zeros(section_cap_bytes(self._codec, shape), dtype=np.uint8)
        values = self._values(chunk, number)
        return find_coder(self._codec, shape).encode(shape, values, room), room

    def _span(self, chunk: int, number: int) -> np.void:
        found: np.void = self._spans[chunk, int(self._sections[number]["span"])]
        return found

    def _noted(self, chunk: int, number: int) -> NDArray[np.uint32]:
        at = int(self._told["scratch"]) + (chunk * len(self._sections) + number) * _NOTE_BYTES
        return self._memory(at, 4).view(np.uint32)

    def _target(self, chunk: int, number: int) -> NDArray[np.uint8]:
        size = int(self._span(chunk, number)["size"])
        return self._memory(self._starts[chunk][number], size)


_NOTE_BYTES: Final = 16


def preset_of(coding: np.void) -> Preset:
    """Return the preset that kernels are told of."""
    kind = int(coding["kind"])
    for preset in PRESETS:
        if (preset.bounds[kind], np.float32(preset.deltas[kind])) == (
            coding["bound"],
            coding["delta"],
        ):
            return preset
    raise RequestError("a coding of no preset")


def coding_of(preset: Preset, kind: Kind) -> NDArray[Any]:
    """Return what kernels are told of K or V of a preset."""
    made = np.zeros(1, dtype=CODING)
    made["delta"], made["bound"], made["kind"] = preset.deltas[kind], preset.bounds[kind], kind
    made["frequencies"][0, : len(preset.frequencies[kind])] = preset.frequencies[kind]
    return made


def _twin(make: Callable[[NDArray[Any], MemoryAt], _Sections], step: str) -> Twin:
    """Return what takes one step with all sections: their method of that name."""

    def run(batch: NDArray[Any], memory: MemoryAt) -> list[Step]:
        sections = make(batch, memory)
        work = getattr(sections, step)
        return [lambda at=at: work(*at) for at in sections.indices]  # type: ignore[misc]

    return run


def _nothing(_batch: NDArray[Any], _memory: MemoryAt) -> list[Step]:
    return []


def _codec_twins() -> dict[str, Twin]:
    made: dict[str, Twin] = {}
    names_of = {**KERNEL_NAMES, **VARIABLE_NAMES}
    for (codec, name), kind, (source, dtype) in product(names_of.items(), SIDES, TYPES.items()):
        if dtype not in DTYPES_OF.get(name, DTYPES):
            continue
        make: Callable[[NDArray[Any], MemoryAt], _Sections]
        if codec in VARIABLE_NAMES:
            make = partial(_Varying, codec=codec, source=source)
            steps: tuple[str, ...] = ("measure", "place", "decode")
        else:
            make = partial(_Sections, codec=codec, kind=kind, source=source)
            steps = ("encode", "decode")
        for step in steps:
            names = kernels_of(codec, kind, step, source)
            worker = names[0] if step == "decode" else names[-1]
            made |= dict.fromkeys(names, _nothing) | {worker: _twin(make, step)}
    return made


CODEC_TWINS: Final[Mapping[str, Twin]] = MappingProxyType({**TWINS, **_codec_twins()})
"""All kernels by name, those of plain transfers among them."""
