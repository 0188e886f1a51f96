"""The container: header and section table of a compressed chunk, written and read.

Whatever reads one believes nothing of it: every number is checked against limits and against the
bytes at hand before it is used. docs/codec-format.md has the layout.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

import numpy as np
import xxhash

from kvstore.compression.shapes import (
    FIXED_RATE,
    GROUPS,
    SECTION_ALIGNMENT_BYTES,
    Bytes,
    CodecId,
    Kind,
    SectionShape,
    SourceType,
    fixed_section_bytes,
    padded,
    section_cap_bytes,
    shape_for,
)
from kvstore.errors import CodecError, ContainerError
from kvstore.limits import (
    CHUNK_SIZE_MAX_BYTES,
    CHUNK_TOKENS_MAX,
    KV_HEADS_MAX,
    LAYERS_MAX,
)
from kvstore.types import BytesLike

MAGIC: Final = b"KVX1"
VERSION: Final = 1
HEADER: Final = struct.Struct("<4s4B4H3I2H3QI")
HEADER_BYTES: Final = 64
ENTRY: Final = struct.Struct("<2BHfQQ")
POSITION_MAX: Final = 2**32 - 1
WORD_MASK: Final = 2**32 - 1


class Layout(IntEnum):
    """What the sections of a container are."""

    KEYS_AND_VALUES = 1
    KEYS = 2
    OPAQUE = 3

    @property
    def kinds(self) -> int:
        """Sections of one layer."""
        return 2 if self is Layout.KEYS_AND_VALUES else 1


class Flags(IntFlag):
    """What a reader may want to know of a container at once."""

    SINKS = 1
    CENTRED = 2
    PRE_ROPE = 4
    FALLBACK = 8
    VARIABLE_RATE = 16
    CHECKSUM = 32


NO_FLAGS: Final = Flags(0)
_CENTRED: Final = frozenset({CodecId.NVFP4, CodecId.HQ4, CodecId.HQ3, CodecId.ECSQ})
_FALLBACK_ENTRY: Final = 1
_ALL_FLAGS: Final = sum(Flags)


@dataclass(frozen=True, slots=True)
class Header:
    """What a container says of itself; see docs/codec-format.md for the fields."""

    codec: CodecId
    source: SourceType
    layout: Layout
    layers: int
    heads: int
    head_dim: int
    tokens: int
    tail: int = 0
    first_position: int = 0
    flags: Flags = NO_FLAGS
    first_head: int = 0
    sinks: int = 0
    table_id: int = 0

    @property
    def sections(self) -> int:
        """Number of sections."""
        return self.layers * self.layout.kinds

    @property
    def payload_offset(self) -> int:
        """Where the first section may begin."""
        return padded(HEADER_BYTES + ENTRY.size * self.sections, SECTION_ALIGNMENT_BYTES)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the chunk as the engine has it."""
        values = self.sections * self.heads * self.tokens * self.head_dim
        return values * self.source.size_bytes

    def shape(self, index: int) -> SectionShape:
        """Return the shape of the section *index*: layer by layer, K before V."""
        layer, kind = divmod(index, self.layout.kinds)
        return SectionShape(
            kind=Kind(kind),
            source=self.source,
            heads=self.heads,
            tokens=self.tokens,
            dim=self.head_dim - self.tail,
            tail=self.tail,
            sinks=self.sinks,
            layer=layer,
            table=self.table_id,
        )

    def check(self) -> None:
        """Raise `ContainerError` unless the geometry makes sense and lies within limits."""
        ranges = {
            "layers": (self.layers, LAYERS_MAX),
            "heads": (self.heads, KV_HEADS_MAX),
            "head size": (self.head_dim, 0xFFFF),
            "raw size in bytes": (self.raw_bytes, CHUNK_SIZE_MAX_BYTES),
        }
        if self.layout is not Layout.OPAQUE:
            ranges["tokens"] = (self.tokens, CHUNK_TOKENS_MAX)
        for name, (value, most) in ranges.items():
            if not 1 <= value <= most:
                raise ContainerError(f"container: {name} is {value}, must lie in [1, {most}]")
        if self.tail >= self.head_dim or self.sinks > self.tokens:
            raise ContainerError(
                f"container: {self.tail} of {self.head_dim} channels are tail, "
                f"{self.sinks} of {self.tokens} tokens are sinks"
            )
        is_opaque = self.layout is Layout.OPAQUE
        form = (self.layers, self.heads, self.head_dim)
        if is_opaque != (self.source is SourceType.OPAQUE) or (is_opaque and form != (1, 1, 1)):
            raise ContainerError(f"container: {self.source.name} in layout {self.layout.name}")


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the section table."""

    codec: CodecId
    offset: int
    size_bytes: int
    relative_error: float = 0.0
    is_fallback: bool = False

    @property
    def end(self) -> int:
        """Where the section ends."""
        return self.offset + self.size_bytes


def next_section(offset: int) -> int:
    """Return the first place at or after *offset* where a section may begin."""
    return padded(offset, SECTION_ALIGNMENT_BYTES)


# --- checksums --------------------------------------------------------------------------


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901
        table.append(value)
    return table


_CRC_TABLE: Final = _crc_table()


def crc32c(content: BytesLike) -> int:
    """Return the CRC-32C of *content*, which is short: a header."""
    crc = WORD_MASK
    for byte in bytes(content):
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ WORD_MASK


def payload_digest(payload: memoryview) -> int:
    """Return the checksum of all that lies behind a head."""
    return xxhash.xxh64_intdigest(payload)


# --- writing ----------------------------------------------------------------------------


def write_head(
    target: memoryview, header: Header, sections: list[Section], *, checksum: bool
) -> int:
    """Write header and table in front of the sections in *target*; return the container's size.

    Everything else of the container is in place already, but for the padding at its end.
    """
    assert len(sections) == header.sections, "one entry per section"
    end = max(section.end for section in sections)
    size = next_section(end)
    target[end:size] = bytes(size - end)
    digest = payload_digest(target[header.payload_offset : size]) if checksum else None
    head = head_of(header, sections, digest=digest)
    target[: len(head)] = head
    return size


def head_of(header: Header, sections: list[Section], *, digest: int | None = None) -> bytes:
    """Return header and table of a container of *sections*, up to where the first may begin.

    *digest* is the checksum of its payload, if it has one of its own.
    """
    table = b"".join(
        ENTRY.pack(
            section.codec,
            _FALLBACK_ENTRY if section.is_fallback else 0,
            GROUPS.get(section.codec, 0),
            section.relative_error,
            section.offset,
            section.size_bytes,
        )
        for section in sections
    )
    flags = header.flags & Flags.VARIABLE_RATE
    for is_set, flag in (
        (header.sinks > 0, Flags.SINKS),
        (any(section.codec in _CENTRED for section in sections), Flags.CENTRED),
        (any(section.is_fallback for section in sections), Flags.FALLBACK),
        (digest is not None, Flags.CHECKSUM),
    ):
        flags |= flag if is_set else NO_FLAGS
    start = header.payload_offset
    size = next_section(max(section.end for section in sections))
    fields = HEADER.pack(
        MAGIC,
        VERSION,
        header.codec,
        header.source,
        header.layout,
        header.layers,
        header.heads,
        header.head_dim,
        header.tail,
        header.tokens,
        header.first_position,
        flags,
        header.first_head,
        header.sinks,
        header.table_id,
        size - start,
        digest or 0,
        xxhash.xxh64_intdigest(table) & WORD_MASK,
    )
    head = fields + struct.pack("<I", crc32c(fields)) + table
    return head + bytes(start - len(head))


# --- reading ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Container:
    """A container whose header and table have been checked; its sections have not."""

    header: Header
    sections: tuple[Section, ...]
    octets: Bytes

    def section(self, index: int) -> Bytes:
        """Return the bytes of section *index*."""
        section = self.sections[index]
        return self.octets[section.offset : section.end]

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Give offset and size of the bytes that a reader of heads [*start*, *stop*) needs.

        For sections of variable rate these are whole sections. Header and table come on top:
        `header.payload_offset` bytes at the start.
        """
        for section in self.sections:
            if section.codec in FIXED_RATE:
                block = section.size_bytes // self.header.heads
                yield section.offset + start * block, (stop - start) * block
            else:
                yield section.offset, section.size_bytes


def open_container(content: BytesLike) -> Container:
    """Check header and section table of the container that *content* begins with.

    Raises `ContainerError` naming what is wrong. Allocates no more than the table.
    """
    view = memoryview(content).cast("B")
    if len(view) < HEADER_BYTES:
        raise ContainerError(f"a container has at least {HEADER_BYTES} bytes, this has {len(view)}")
    header, payload_bytes, digest, table_check = _read_header(view)
    start = header.payload_offset
    end = start + payload_bytes
    if end > len(view) or payload_bytes % SECTION_ALIGNMENT_BYTES:
        raise ContainerError(f"container: payload ends at {end} of {len(view)} bytes")
    table = view[HEADER_BYTES : HEADER_BYTES + ENTRY.size * header.sections]
    if xxhash.xxh64_intdigest(table) & WORD_MASK != table_check:
        raise ContainerError("container: the section table does not match its checksum")
    if header.flags & Flags.CHECKSUM and payload_digest(view[start:end]) != digest:
        raise ContainerError("container: the payload does not match its checksum")
    sections = tuple(
        _section(header, index, ENTRY.unpack_from(table, index * ENTRY.size), end)
        for index in range(header.sections)
    )
    _check_disjoint(header, sections, end)
    return Container(header, sections, np.frombuffer(view[:end], dtype=np.uint8))


def _read_header(view: memoryview) -> tuple[Header, int, int, int]:
    """Return the checked header, the payload's size and digest, and the table's check."""
    if bytes(view[:4]) != MAGIC:
        raise ContainerError("these bytes are no container")
    fields = HEADER.unpack_from(view)
    if fields[1] != VERSION:
        raise ContainerError(f"container: version {fields[1]} is unknown, {VERSION} is known")
    (stored,) = struct.unpack_from("<I", view, HEADER.size)
    if crc32c(view[: HEADER.size]) != stored:
        raise ContainerError("container: the header does not match its checksum")
    try:
        codec, source, layout = CodecId(fields[2]), SourceType(fields[3]), Layout(fields[4])
    except ValueError as error:
        raise ContainerError(f"container: unknown codec, type or layout: {error}") from error
    if fields[11] & ~_ALL_FLAGS:
        raise ContainerError(f"container: unknown flags {fields[11]:#x}")
    header = Header(
        codec=codec,
        source=source,
        layout=layout,
        layers=fields[5],
        heads=fields[6],
        head_dim=fields[7],
        tail=fields[8],
        tokens=fields[9],
        first_position=fields[10],
        flags=Flags(fields[11]),
        first_head=fields[12],
        sinks=fields[13],
        table_id=fields[14],
    )
    header.check()
    return header, fields[15], fields[16], fields[17]


def _section(
    header: Header, index: int, fields: tuple[int, int, int, float, int, int], end: int
) -> Section:
    """Return entry *index* of the table; its section must lie before *end*."""
    number, flags, group, relative_error, offset, size = fields
    place = f"container: section {index}"
    try:
        codec = CodecId(number)
    except ValueError:
        raise ContainerError(f"{place} has the unknown codec {number}") from None
    if codec is CodecId.K8V4 or flags & ~_FALLBACK_ENTRY or group != GROUPS.get(codec, 0):
        raise ContainerError(f"{place} has codec {number}, flags {flags}, group {group}")
    if not (math.isfinite(relative_error) and relative_error >= 0):
        raise ContainerError(f"{place} has a relative error of {relative_error}")
    if offset % SECTION_ALIGNMENT_BYTES or offset < header.payload_offset or size > end - offset:
        raise ContainerError(f"{place} claims {size} bytes at {offset} of {end}")
    shape = shape_for(codec, header.shape(index))
    _check_codec(place, codec, shape, header)
    if codec in FIXED_RATE:
        expected = fixed_section_bytes(codec, shape)
        if size != expected:
            raise ContainerError(f"{place} has {size} bytes, its geometry has {expected}")
    elif size > section_cap_bytes(codec, shape):
        raise ContainerError(f"{place} has {size} bytes, more than its cap")
    return Section(codec, offset, size, relative_error, bool(flags & _FALLBACK_ENTRY))


def _check_codec(place: str, codec: CodecId, shape: SectionShape, header: Header) -> None:
    """Raise unless sections of *codec* can be of this type and geometry."""
    try:
        check_codec(codec, shape)
    except CodecError as error:
        raise ContainerError(f"{place}: {error} in {header.layout.name}") from error


def check_codec(codec: CodecId, shape: SectionShape) -> None:
    """Raise `CodecError` unless *codec* takes sections of this *shape*."""
    if shape.source is SourceType.OPAQUE and codec not in OPAQUE_CODEC_IDS:
        allowed = ", ".join(sorted(known.name.lower() for known in OPAQUE_CODEC_IDS))
        raise CodecError(f"opaque bytes take {allowed} alone, not {codec.name.lower()}")
    if codec is CodecId.EXP3 and shape.source is not SourceType.BFLOAT16:
        raise CodecError(f"exp3 takes bfloat16, not {shape.source.name.lower()}")
    if codec is CodecId.NVFP4_COMPAT and shape.dim % GROUPS[codec]:
        raise CodecError(f"nvfp4-compat takes head sizes in multiples of 16, not {shape.dim}")


OPAQUE_CODEC_IDS: Final = (CodecId.RAW, CodecId.RANS, CodecId.LZ4)


def _check_disjoint(header: Header, sections: tuple[Section, ...], end: int) -> None:
    last = header.payload_offset
    for section in sorted(sections, key=lambda entry: entry.offset):
        if section.offset < last:
            raise ContainerError(f"container: sections overlap at {section.offset} of {end}")
        last = section.end
