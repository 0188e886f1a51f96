"""The face of compression for connectors, the daemon and the mover: whole chunks in, out, and over.

    codec = ChunkCodec(manifest, policy)
    size = codec.encoded_size(heads)              # what to reserve, at most
    report = codec.encode(source, target, heads)  # report.size_bytes of target are the chunk
    decode(manifest, stored, target, heads)       # by what was stored, whatever the policy

A chunk whose namespace is `raw` has no container and never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.compression.container import (
    POSITION_MAX,
    Container,
    Flags,
    Header,
    Layout,
    Section,
    next_section,
    open_container,
    write_head,
)
from kvstore.compression.guard import CodecCounters, EncodeReport, SectionReport
from kvstore.compression.policy import CodecPolicy, fallbacks
from kvstore.compression.reference import find_coder
from kvstore.compression.shapes import (
    FIXED_RATE,
    LOSSLESS,
    Bytes,
    CodecId,
    Encoded,
    SectionShape,
    SourceType,
    Values,
    fixed_section_bytes,
    section_cap_bytes,
    side_places,
    source_type,
)
from kvstore.compression.tables import coding_shape
from kvstore.errors import CodecError, ContainerError, UnfitError
from kvstore.types import BytesLike, HeadRange

Sections = BytesLike | NDArray[Any] | Sequence[NDArray[Any]]
"""A chunk as the engine has it: its canonical bytes, an array `[layer][kind][head][token][dim]`
of the carrier type with any strides but the last, or a list of its sections, layer by layer."""


class Geometry(Protocol):
    """What compression needs of a manifest."""

    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def chunk_tokens(self) -> int: ...  # noqa: D102
    @property
    def layout(self) -> str: ...  # noqa: D102
    @property
    def values(self) -> str: ...  # noqa: D102
    @property
    def opaque_bytes(self) -> int: ...  # noqa: D102


def chunk_header(manifest: Geometry, heads: HeadRange) -> Header:
    """Return the header, without codec, of containers of *heads* of a chunk of *manifest*.

    Raises `CodecError` for heads that the manifest does not have.
    """
    if not 0 <= heads.start < heads.stop <= manifest.kv_heads:
        raise CodecError(f"heads {heads} lie outside the {manifest.kv_heads} of the manifest")
    if manifest.layout == "opaque":
        size = manifest.opaque_bytes
        return Header(CodecId.RAW, SourceType.OPAQUE, Layout.OPAQUE, 1, 1, 1, size)
    layout = Layout.KEYS_AND_VALUES if manifest.values == "k|v" else Layout.KEYS
    return Header(
        codec=CodecId.RAW,
        source=source_type(manifest.dtype),
        layout=layout,
        layers=manifest.layers,
        heads=heads.width,
        head_dim=manifest.head_dim,
        tokens=manifest.chunk_tokens,
        first_head=heads.start,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the sections of one container lie before anything is encoded."""

    header: Header
    codecs: tuple[CodecId, ...]
    is_fixed_rate: bool
    size_bytes: int
    """What sections take when none falls back: exactly, or at most where the rate varies."""
    spare_bytes: int


class ChunkCodec:
    """Encodes the chunks of one namespace by one policy. Shared by threads, except *counters*.

    Raises `CodecError` where the policy asks for what the manifest does not allow, such as a
    lossy codec for an opaque layout.
    """

    def __init__(
        self, manifest: Geometry, policy: CodecPolicy, counters: CodecCounters | None = None
    ) -> None:
        self.manifest = manifest
        self.policy = policy
        self.counters = counters
        self._plans: dict[tuple[HeadRange, bool], Plan] = {}
        self.plan(HeadRange(0, manifest.kv_heads))

    def plan(self, heads: HeadRange, *, first_position: int = 0) -> Plan:
        """Return where sections of a chunk of *heads* go: first chunks have a plan of their own."""
        is_first = first_position == 0
        known = self._plans.get((heads, is_first))
        if known is None:
            known = self._plans[heads, is_first] = self._make_plan(heads, is_first)
        return known

    def encoded_size(self, heads: HeadRange, *, first_position: int = 0) -> int:
        """Return the bytes to reserve for a chunk of *heads* that begins at *first_position*.

        `encode` fits into as much unless more sections fall back than the policy has room for.
        """
        plan = self.plan(heads, first_position=first_position)
        return plan.size_bytes + plan.spare_bytes

    def encode(
        self, source: Sections, target: memoryview, heads: HeadRange, *, first_position: int = 0
    ) -> EncodeReport:
        """Encode the chunk *source* into *target*; return what became of it.

        The container is the first `size_bytes` of *target*. Raises `UnfitError` when it does not
        fit: then the chunk is not stored.
        """
        plan = self.plan(heads, first_position=first_position)
        header = replace(plan.header, first_position=min(first_position, POSITION_MAX))
        sections = _sections(source, header)
        writer = _ChunkWriter(plan, self.policy, target)
        try:
            for index, values in enumerate(sections):
                writer.put(index, values)
        except UnfitError:
            if self.counters is not None:
                self.counters.refused += 1
            raise
        entries = [section for section, _ in writer.done]
        size = write_head(target, header, entries, checksum=self.policy.checksum)
        reports = tuple(report for _, report in writer.done)
        report = EncodeReport(size, header.raw_bytes, reports)
        if self.counters is not None:
            self.counters.record(report)
        return report

    def decode(self, stored: BytesLike, target: Sections, heads: HeadRange) -> None:
        """Fill *target* with *heads* of the chunk *stored*; see `decode`."""
        decode(self.manifest, stored, target, heads)

    def transcode(self, stored: BytesLike, target: memoryview) -> EncodeReport:
        """Encode the chunk *stored* again, by this policy; what it held is lost where it is lossy.

        Raises as `decode` and `encode` do. Errors reported are those of this step alone.
        """
        header = open_container(stored).header
        heads = HeadRange(header.first_head, header.first_head + header.heads)
        plain = np.empty(header.raw_bytes, dtype=np.uint8)
        decode(self.manifest, stored, plain.data, heads)
        return self.encode(plain.data, target, heads, first_position=header.first_position)

    def _make_plan(self, heads: HeadRange, is_first: bool) -> Plan:
        policy = self.policy
        header = chunk_header(self.manifest, heads)
        sinks = min(policy.sinks, header.tokens) if is_first else 0
        is_opaque = header.layout is Layout.OPAQUE
        header = replace(
            header,
            codec=policy.spec.codec,
            table_id=policy.spec.table_id,
            sinks=0 if is_opaque or policy.spec.is_lossless else sinks,
            tail=0 if is_opaque or policy.spec.is_lossless else policy.tail_channels,
        )
        if header.tail >= header.head_dim:
            raise CodecError(
                f"policy.tail_channels is {header.tail}, heads have {header.head_dim} channels"
            )
        shapes = [header.shape(index) for index in range(header.sections)]
        codecs = tuple(policy.section_codec(shape, header.layers) for shape in shapes)
        at, spare = header.payload_offset, 0
        for codec, shape in zip(codecs, shapes, strict=True):
            at = next_section(at + section_cap_bytes(codec, shape))
            chain = fallbacks(codec, shape)
            if CodecId.INT8KV in chain and codec in FIXED_RATE:
                spare = max(spare, next_section(fixed_section_bytes(CodecId.INT8KV, shape)))
        is_fixed = FIXED_RATE.issuperset(codecs)
        if not is_fixed:
            header = replace(header, flags=Flags.VARIABLE_RATE)
        return Plan(header, codecs, is_fixed, at, spare * policy.spare_sections)


def decode(manifest: Geometry, stored: BytesLike, target: Sections, heads: HeadRange) -> Header:
    """Fill *target* with *heads* of the chunk in the container *stored*; return its header.

    *heads* are those of the model and lie within the container's. Raises `ContainerError` when
    the container is damaged, or of another geometry; *target* is then not to be used.
    """
    container = open_container(stored)
    mine = check_geometry(manifest, container.header, heads)
    views = _sections(target, replace(container.header, heads=heads.width))
    for index, values in enumerate(views):
        decode_section(container, index, values, mine)
    return container.header


def check_geometry(manifest: Geometry, header: Header, heads: HeadRange) -> HeadRange:
    """Return *heads* counted from the container's first; raises `ContainerError`."""
    stop = header.first_head + header.heads
    if not header.first_head <= heads.start < heads.stop <= stop:
        raise ContainerError(f"heads {heads} are not all among [{header.first_head}, {stop})")
    expected = chunk_header(manifest, heads)
    for field in ("source", "layout", "layers", "head_dim", "tokens"):
        found, wanted = getattr(header, field), getattr(expected, field)
        if found != wanted:
            raise ContainerError(f"container: {field} is {found}, the manifest has {wanted}")
    return HeadRange(heads.start - header.first_head, heads.stop - header.first_head)


def decode_section(container: Container, index: int, target: Values, heads: HeadRange) -> None:
    """Fill *target* `[heads][tokens][head_dim]` with *heads* of section *index*.

    Sections may be decoded as they arrive: nothing of the others is looked at.
    """
    section, codec = container.section(index), container.sections[index].codec
    shape = coding_shape(codec, container.header.shape(index))
    coder = find_coder(codec, shape)
    if shape.tail == 0:
        coder.decode(shape, section, target, heads)
    else:
        coder.decode(shape, section, target[:, :, : shape.dim], heads)
    if codec not in LOSSLESS and shape.sinks + shape.tail > 0:
        for head in range(heads.start, heads.stop):
            sinks, tail = _sides(codec, shape, section, head)
            into = target[head - heads.start]
            into[: shape.sinks, : shape.dim] = sinks
            into[:, shape.dim :] = tail


# --- sections of a chunk -----------------------------------------------------------------


def _sections(chunk: Sections, header: Header) -> Sequence[Values]:
    """Return the sections `[heads][tokens][head_dim]` of *chunk* as views of the carrier type."""
    form = (header.heads, header.tokens, header.head_dim)
    carrier = header.source.carrier
    if isinstance(chunk, np.ndarray | bytes | bytearray | memoryview):
        whole = chunk if isinstance(chunk, np.ndarray) else np.frombuffer(chunk, dtype=np.uint8)
        if whole.nbytes != header.raw_bytes:
            raise CodecError(
                f"a chunk of {whole.nbytes} bytes, its geometry has {header.raw_bytes}"
            )
        if whole.dtype != carrier:
            whole = whole.view(carrier)
        if whole.ndim != 5:
            whole = whole.reshape(header.layers, header.layout.kinds, *form)
        sections = [side for layer in whole for side in layer]
    else:
        sections = list(chunk)
    if len(sections) != header.sections:
        raise CodecError(f"a chunk of {len(sections)} sections, its geometry has {header.sections}")
    for section in sections:
        if section.shape != form or section.dtype != carrier:
            raise CodecError(
                f"a section is {section.dtype} {section.shape}, its geometry {carrier} {form}"
            )
        if header.head_dim > 1 and section.strides[-1] != section.itemsize:
            raise CodecError("the channels of a token are not contiguous")
    return sections


def _sides(codec: CodecId, shape: SectionShape, section: Bytes, head: int) -> tuple[Values, Values]:
    """Return views of the sinks and the tail of *head* in a lossy *section*.

    Raises `ContainerError` when the section, which may be of any length, ends before them.
    """
    places, element = side_places(codec, shape), shape.source.size_bytes
    start = head * places.stride
    sinks_size = shape.sinks * shape.dim * element
    tail_size = shape.tokens * shape.tail * element
    for place, size in ((places.sinks, sinks_size), (places.tail, tail_size)):
        if size and place + start + size > len(section):
            raise ContainerError(
                f"container: a section of {len(section)} bytes, what it leaves as it is ends at "
                f"{place + start + size}"
            )
    sinks = section[places.sinks + start :][:sinks_size].view(shape.source.carrier)
    tail = section[places.tail + start :][:tail_size].view(shape.source.carrier)
    return sinks.reshape(shape.sinks, shape.dim), tail.reshape(shape.tokens, shape.tail)


def _put_sides(codec: CodecId, shape: SectionShape, source: Values, section: Bytes) -> None:
    """Copy sinks and tails of *source* into their places, and zero the padding behind."""
    places, element = side_places(codec, shape), shape.source.size_bytes
    for head in range(shape.heads):
        start = head * places.stride
        for place, values in (
            (places.sinks, source[head, : shape.sinks, : shape.dim]),
            (places.tail, source[head, :, shape.dim :]),
        ):
            size = values.size * element
            room = section[place + start :][: size + -size % 16]
            room[:size].view(shape.source.carrier).reshape(values.shape)[...] = values
            room[size:] = 0


class _ChunkWriter:
    """Puts section after section into a container's room, falling back where it must."""

    def __init__(self, plan: Plan, policy: CodecPolicy, target: memoryview) -> None:
        self._plan = plan
        self._policy = policy
        self._room: Final = np.frombuffer(target, dtype=np.uint8)
        self._at = plan.header.payload_offset
        # Behind the nominal sections; those of variable rate follow one another.
        self._spare_at = plan.size_bytes
        self.done: list[tuple[Section, SectionReport]] = []

    def put(self, index: int, values: Values) -> None:
        """Encode section *index*; raises `UnfitError` when nothing of its chain fits."""
        nominal = self._plan.codecs[index]
        shape = self._plan.header.shape(index)
        offset = self._at
        chain = [nominal, *fallbacks(nominal, shape)]
        for codec in chain:
            is_spare = self._plan.is_fixed_rate and codec is not nominal
            place = self._spare_at if is_spare else offset
            encoded = self._try(codec, shape, values, place)
            if encoded is not None:
                break
        else:
            raise UnfitError(
                f"section {index} is {nominal.name.lower()}, falls back to "
                f"{', '.join(codec.name.lower() for codec in chain[1:]) or 'nothing'}, "
                f"and does not fit {len(self._room)} bytes; nothing is stored"
            )
        self._step(nominal, codec, shape, place, encoded)

    def _step(
        self, nominal: CodecId, codec: CodecId, shape: SectionShape, place: int, encoded: Encoded
    ) -> None:
        """Note the section and move on behind it, leaving nothing but zeros between."""
        end = place + encoded.size_bytes
        after = next_section(end)
        self._room[end:after] = 0
        if place == self._at:
            self._at = after
        else:
            self._spare_at = after
            nominal_end = next_section(self._at + fixed_section_bytes(nominal, shape))
            self._room[self._at : nominal_end] = 0
            self._at = nominal_end
        error = 0.0 if codec in LOSSLESS else encoded.relative_error
        section = Section(codec, place, encoded.size_bytes, error, codec is not nominal)
        self.done.append((section, SectionReport(nominal, codec, encoded.size_bytes, error)))

    def _try(
        self, codec: CodecId, shape: SectionShape, values: Values, place: int
    ) -> Encoded | None:
        """Encode a section at *place*; None when it does not fit there or misses its bound."""
        seen = coding_shape(codec, shape)
        cap = section_cap_bytes(codec, shape)
        room = self._room[place : place + cap]
        is_short = len(room) < cap
        if is_short and codec in FIXED_RATE:
            return None
        section = np.empty(cap, dtype=np.uint8) if is_short else room
        coder = find_coder(codec, seen)
        encoded = coder.encode(seen, values[:, :, : seen.dim], section)
        end = next_section(place + encoded.size_bytes)
        if not encoded.is_fit or end > len(self._room):
            return None
        if codec not in LOSSLESS:
            if encoded.relative_error > self._policy.bound(codec):
                return None
            if seen.sinks + seen.tail > 0:
                _put_sides(codec, seen, values, section)
        if is_short:
            room[: encoded.size_bytes] = section[: encoded.size_bytes]
        return encoded
