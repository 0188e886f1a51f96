"""What the sections of a container look like: ids, geometry, and where each part of a head lies.

Everything here follows docs/codec-format.md and knows no arithmetic of any codec.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import CodecError
from kvstore.types import HeadRange

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Values = NDArray[Any]
"""Values of the source as unsigned integers of their size."""

TILE_TOKENS: Final = 64
PART_ALIGNMENT_BYTES: Final = 16
SECTION_ALIGNMENT_BYTES: Final = 256
STREAM_SYMBOLS: Final = 8192
"""Symbols of one stream of an entropy-coded section."""


class CodecId(IntEnum):
    """What a section, or a container as a whole, says it is encoded with."""

    RAW = 0
    FP8 = 1
    INT8KV = 2
    INT4KV = 3
    K8V4 = 4
    NVFP4 = 5
    HQ4 = 6
    HQ3 = 7
    EXP3 = 8
    RANS = 9
    ECSQ = 10
    LZ4 = 12
    NVFP4_COMPAT = 13


GROUPS: Final = {
    CodecId.INT8KV: 256,
    CodecId.INT4KV: TILE_TOKENS,
    CodecId.EXP3: TILE_TOKENS,
    CodecId.HQ4: TILE_TOKENS,
    CodecId.HQ3: TILE_TOKENS,
    CodecId.NVFP4: 16,
    CodecId.NVFP4_COMPAT: 16,
}
"""Values that share a scale, or rows that are packed together."""

LOSSLESS: Final = frozenset({CodecId.RAW, CodecId.EXP3, CodecId.RANS, CodecId.LZ4})
FIXED_RATE: Final = frozenset(
    {
        CodecId.RAW,
        CodecId.FP8,
        CodecId.INT8KV,
        CodecId.INT4KV,
        CodecId.NVFP4,
        CodecId.NVFP4_COMPAT,
        CodecId.HQ4,
        CodecId.HQ3,
    }
)


class Kind(IntEnum):
    """Which side of the cache: its channels behave differently."""

    K = 0
    V = 1


class SourceType(IntEnum):
    """The type of values that an engine keeps."""

    BFLOAT16 = 1
    FLOAT16 = 2
    FLOAT32 = 3
    FLOAT8_E4M3 = 4
    FLOAT8_E5M2 = 5
    OPAQUE = 6

    @property
    def size_bytes(self) -> int:
        """Bytes of one value."""
        return {SourceType.FLOAT32: 4, SourceType.BFLOAT16: 2, SourceType.FLOAT16: 2}.get(self, 1)

    @property
    def carrier(self) -> np.dtype[Any]:
        """The unsigned integer of the same size, which NumPy knows."""
        return np.dtype(f"<u{self.size_bytes}")


def source_type(name: str) -> SourceType:
    """Return the type that a manifest calls *name*; raises `CodecError`."""
    try:
        return SourceType[name.upper()]
    except KeyError:
        known = ", ".join(kind.name.lower() for kind in SourceType)
        raise CodecError(f"no codec knows the type {name!r}; known are {known}") from None


@dataclass(frozen=True, slots=True)
class SectionShape:
    """One section: all heads of a container in one layer, K or V.

    *dim* counts the coded channels; *tail* more follow that lossy codecs leave alone. *table* is
    the id of the codec's table, 0 for codecs without.
    """

    kind: Kind
    source: SourceType
    heads: int
    tokens: int
    dim: int
    tail: int = 0
    sinks: int = 0
    layer: int = 0
    table: int = 0

    @property
    def tiles(self) -> int:
        """Tiles of one head."""
        return -(-self.tokens // TILE_TOKENS)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the section as the engine has it."""
        return self.heads * self.tokens * (self.dim + self.tail) * self.source.size_bytes

    def whole(self) -> SectionShape:
        """Return the shape as lossless codecs see it: no tail, no sinks."""
        return replace(self, dim=self.dim + self.tail, tail=0, sinks=0, table=0)

    def of_heads(self, heads: int) -> SectionShape:
        """Return the shape of *heads* of its heads."""
        return replace(self, heads=heads)


def shape_for(codec: CodecId, shape: SectionShape) -> SectionShape:
    """Return *shape* as sections of *codec* see it."""
    return shape.whole() if codec in LOSSLESS else shape


@dataclass(frozen=True, slots=True)
class Encoded:
    """What encoding a section came to; *error* and *energy* are sums of squares."""

    size_bytes: int
    error: float = 0.0
    energy: float = 0.0
    is_fit: bool = True

    @property
    def relative_error(self) -> float:
        """Root of error by energy; 0 for a section of zeros, NaN is never returned."""
        return float(np.sqrt(self.error / self.energy)) if self.energy > 0 else 0.0


UNFIT: Final = Encoded(0, is_fit=False)


class SectionCoder(Protocol):
    """Encodes and decodes sections of one codec; NumPy and compiled code both are such.

    *source* of `encode` and *target* of `decode` are `[heads][tokens][dim]` of the carrier type,
    the last axis contiguous. Sinks and tails are the caller's: a coder leaves them alone.
    """

    def encode(self, shape: SectionShape, source: Values, target: Bytes) -> Encoded:
        """Fill *target*, which is as long as the section, or as its cap where that varies.

        A section that the codec cannot represent, or that exceeds its cap, is not fit.
        """
        ...

    def decode(self, shape: SectionShape, source: Bytes, target: Values, heads: HeadRange) -> None:
        """Fill *target* with *heads* of the section *source*; raises `ContainerError`."""
        ...


# --- where parts lie -------------------------------------------------------------------


def padded(size_bytes: int, alignment: int = PART_ALIGNMENT_BYTES) -> int:
    """Return *size_bytes* rounded up to a multiple of *alignment*."""
    return -(-size_bytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Offset and size of every part of a head block, and its length."""

    parts: dict[str, tuple[int, int]]
    size_bytes: int

    def view(self, blocks: Bytes, part: str) -> Bytes:
        """Return *part* of all *blocks* `[heads][size_bytes]`."""
        offset, size = self.parts[part]
        return blocks[:, offset : offset + size]


def plane_rows(tokens: int, bits: int) -> int:
    """Return how many byte rows the row planes of *tokens* codes of *bits* take."""
    tiles, rest = divmod(tokens, TILE_TOKENS)
    return tiles * (TILE_TOKENS * bits // 8) + -(-rest * bits // 8)


def channel_group_sizes(dim: int) -> list[int]:
    """Return the sizes of the groups of 64 channels that int4kv gives a scale each in V."""
    return [min(TILE_TOKENS, dim - start) for start in range(0, dim, TILE_TOKENS)]


def _int8_parts(shape: SectionShape) -> dict[str, int]:
    groups = -(-shape.tokens // GROUPS[CodecId.INT8KV])
    scales = groups * shape.dim if shape.kind is Kind.K else shape.tokens
    return {"codes": shape.tokens * shape.dim, "scales": scales * 2}


def _int4_parts(shape: SectionShape) -> dict[str, int]:
    if shape.kind is Kind.K:
        rows = plane_rows(shape.tokens, 4)
        return {"codes": rows * shape.dim, "scales": shape.tiles * shape.dim * 4}
    groups = channel_group_sizes(shape.dim)
    row = sum((size + 1) // 2 for size in groups)
    return {"codes": shape.tokens * row, "scales": shape.tokens * len(groups) * 4}


def _nvfp4_parts(shape: SectionShape) -> dict[str, int]:
    codes = plane_rows(shape.tokens, 4) * shape.dim
    if shape.kind is Kind.K:
        blocks = -(-shape.tokens // 16) * shape.dim
        return {"codes": codes, "scales": blocks, "means": shape.dim * 2, "tensor": 4}
    return {"codes": codes, "scales": shape.tokens * -(-shape.dim // 16), "tensor": 4}


def _hq_parts(shape: SectionShape, index_bits: int) -> dict[str, int]:
    parts = {"codes": plane_rows(shape.tokens, 4) * shape.dim}
    if index_bits == 2:
        parts = {
            "codes": plane_rows(shape.tokens, 2) * shape.dim,
            "signs": plane_rows(shape.tokens, 1) * shape.dim,
        }
    parts["norms"] = shape.tokens * 2
    if shape.kind is Kind.K:
        parts |= {"means": shape.dim * 2, "sigmas": shape.dim * 2}
    return parts


def _coded_parts(codec: CodecId, shape: SectionShape) -> dict[str, int]:
    values = shape.tokens * shape.dim
    match codec:
        case CodecId.FP8:
            return {"codes": values, "exponent": 1}
        case CodecId.INT8KV:
            return _int8_parts(shape)
        case CodecId.INT4KV:
            return _int4_parts(shape)
        case CodecId.NVFP4:
            return _nvfp4_parts(shape)
        case CodecId.NVFP4_COMPAT:
            return {"codes": values // 2, "scales": values // 16, "tensor": 4}
        case CodecId.HQ4:
            return _hq_parts(shape, 3)
        case CodecId.HQ3:
            return _hq_parts(shape, 2)
        case _:
            raise CodecError(f"sections of codec {codec.name} have no fixed size")


@lru_cache(maxsize=4096)
def head_layout(codec: CodecId, shape: SectionShape) -> HeadLayout:
    """Return where the parts of a head block of a fixed-rate *codec* lie.

    The caller has passed *shape* through `shape_for`. The answer is shared: nobody changes it.
    """
    if codec is CodecId.RAW:
        size = shape.tokens * shape.dim * shape.source.size_bytes
        return HeadLayout({"codes": (0, size)}, size)
    parts = _coded_parts(codec, shape)
    element = shape.source.size_bytes
    parts["sinks"] = shape.sinks * shape.dim * element
    parts["tail"] = shape.tokens * shape.tail * element
    places, offset = {}, 0
    for name, size in parts.items():
        places[name] = (offset, size)
        offset += padded(size)
    return HeadLayout(places, offset)


@dataclass(frozen=True, slots=True)
class SidePlaces:
    """Where sinks and tail of head 0 begin in a section, and how far it is to the next head's."""

    sinks: int
    tail: int
    stride: int


def side_places(codec: CodecId, shape: SectionShape) -> SidePlaces:
    """Return where a lossy section keeps what it leaves as it is."""
    if codec in FIXED_RATE:
        layout = head_layout(codec, shape)
        return SidePlaces(layout.parts["sinks"][0], layout.parts["tail"][0], layout.size_bytes)
    streams = shape.heads * -(-shape.tokens * shape.dim // STREAM_SYMBOLS)
    scales = 2 * padded(shape.dim * 2) if shape.kind is Kind.K else padded(shape.tokens * 2)
    first = padded((streams + 1) * 4) + padded((shape.heads + 1) * 4) + shape.heads * scales
    sinks = padded(shape.sinks * shape.dim * shape.source.size_bytes)
    tail = padded(shape.tokens * shape.tail * shape.source.size_bytes)
    return SidePlaces(first, first + sinks, sinks + tail)


def fixed_section_bytes(codec: CodecId, shape: SectionShape) -> int:
    """Return how long every section of this *shape* is in a fixed-rate *codec*."""
    seen = shape_for(codec, shape)
    return seen.heads * head_layout(codec, seen).size_bytes


def section_cap_bytes(codec: CodecId, shape: SectionShape) -> int:
    """Return how long a section can be: exactly that where the rate is fixed."""
    if codec in FIXED_RATE:
        return fixed_section_bytes(codec, shape)
    return shape.raw_bytes if codec in LOSSLESS else fixed_section_bytes(CodecId.INT8KV, shape)
