"""The forms of the chunks of one namespace, for a device whose kernels know their codecs.

A form says where the sections of a container lie, and which kernel brings each between there and
the engine's pages. What no kernel can do has none: the host encodes or decodes it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.client.coding import Scratch, sections_of
from kvstore.compression.chunks import check_geometry
from kvstore.compression.container import (
    ENTRY,
    HEADER,
    HEADER_BYTES,
    Container,
    Flags,
    next_section,
    open_container,
)
from kvstore.compression.shapes import (
    FIXED_RATE,
    LOSSLESS,
    SECTION_ALIGNMENT_BYTES,
    CodecId,
    Encoded,
    head_layout,
    padded,
    section_cap_bytes,
    shape_for,
    side_places,
)
from kvstore.compression.tables import PRESETS_BY_ID, coding_shape
from kvstore.compression.twins import (
    KERNEL_NAMES,
    TYPES,
    VARIABLE_NAMES,
    coding_of,
    kernels_of,
)
from kvstore.errors import ContainerError, RequestError
from kvstore.gpu.batches import SECTION, SPAN, Chunks, Pages, Places
from kvstore.gpu.forms import GATHER, SCATTER, Form, Launch, plain_form
from kvstore.gpu.kernels import checked_batch, scratch_bytes
from kvstore.gpu.pages import VECTOR_BYTES
from kvstore.limits import DEVICE_SCRATCH_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from kvstore.compression.chunks import Plan
    from kvstore.compression.container import Header, Section
    from kvstore.compression.shapes import Kind, SectionShape
    from kvstore.gpu.pages import PageLayout
    from kvstore.protocol.manifest import Manifest
    from kvstore.types import BytesLike, HeadRange

_NOWHERE: Final = Places(sections=0, pages=0, containers=0)
_SOMEWHERE: Final = Places(sections=0, pages=0, containers=0, reports=1, spans=1, scratch=1)
_FORMS_MAX: Final = 64
_FLAGS_FIELD: Final = 11
_scratch: Final = Scratch()


class _Placed(NamedTuple):
    """One section: which plane of the pages it is of, and where it begins in its container."""

    plane: int
    shape: SectionShape
    offset: int


class Stored(NamedTuple):
    """How a container is read: its form, and where its sections lie if that is not in the form."""

    form: Form
    spans: NDArray[Any] | None = None


class Forms:
    """All forms of *heads* of the chunks of *manifest* in pages of *layout*.

    *size_max_bytes* is what staging has room for. Thread-safe.
    """

    def __init__(
        self, layout: PageLayout, manifest: Manifest, heads: HeadRange, *, size_max_bytes: int
    ) -> None:
        self.plain = plain_form(layout)
        self._layout = layout
        self._manifest = manifest
        self._heads = heads
        self._size_max = size_max_bytes
        self._known: dict[tuple[object, ...], Form | None] = {}

    def in_pages(self, layout: PageLayout) -> Forms:
        """Return the same for other pages; raises `RequestError` when they hold other chunks."""
        if _form_of(layout) != _form_of(self._layout):
            raise RequestError(f"pages of {_form_of(layout)}, not {_form_of(self._layout)}")
        return Forms(layout, self._manifest, self._heads, size_max_bytes=self._size_max)

    def of_plan(self, plan: Plan) -> Form | None:
        """Return the form of chunks that are encoded by *plan*, if the device can do that."""
        if plan.is_fixed_rate:
            return self._find(plan.header, sections_of(plan), plan.size_bytes)
        return self._find_varying(plan.header, plan.codecs)

    @property
    def head_bytes(self) -> int:
        """How long the head of every container is."""
        return _head_bytes(len(self._layout.planes))

    def of_stored(self, head: BytesLike, size_bytes: int) -> Stored | None:
        """Return how a container of *size_bytes* is read that begins with *head*.

        Raises `ContainerError` when it is damaged, or of another geometry.
        """
        container = _read_head(head, size_bytes)
        if container is None:
            return None
        header, sections = container.header, container.sections
        heads = check_geometry(self._manifest, header, self._heads)
        if heads.width != header.heads:
            return None
        codecs = tuple(section.codec for section in sections)
        if FIXED_RATE.issuperset(codecs):
            form = self._find(header, sections, size_bytes)
            return None if form is None else Stored(form)
        form = self._find_varying(header, codecs)
        if form is None or not form.head_bytes < size_bytes <= form.size_bytes:
            return None
        spans = np.array([(one.offset, one.size_bytes) for one in sections], dtype=SPAN)
        is_aligned = not (size_bytes % VECTOR_BYTES or (spans["size"] % VECTOR_BYTES).any())
        return Stored(form, spans) if is_aligned else None

    def _find(self, header: Header, sections: Sequence[Section], size_bytes: int) -> Form | None:
        places = tuple((section.codec, section.offset) for section in sections)
        key = (header.sinks, header.tail, header.table_id, size_bytes, places)
        return self._kept(key, partial(self._make, header, sections, size_bytes))

    def _find_varying(self, header: Header, codecs: tuple[CodecId, ...]) -> Form | None:
        key = (header.sinks, header.tail, header.table_id, codecs)
        return self._kept(key, partial(self._make_varying, header, codecs))

    def _kept(self, key: tuple[object, ...], make: Callable[[], Form | None]) -> Form | None:
        if key not in self._known:
            while len(self._known) >= _FORMS_MAX:
                # Sections fall back in many ways, and each may be seen once.
                self._known.pop(next(iter(self._known)), None)
            self._known[key] = make()
        return self._known[key]

    def _make(self, header: Header, sections: Sequence[Section], size_bytes: int) -> Form | None:
        """Return a form; None when some kernel is missing, or staging is too small."""
        places = [(section.codec, section.offset) for section in sections]
        return self._made(header, places, size_bytes, paddings=self._paddings(sections, size_bytes))

    def _make_varying(self, header: Header, codecs: Sequence[CodecId]) -> Form | None:
        """Return the form of chunks whose sections lie where their spans say, at most so long."""
        spans = np.zeros(len(codecs), dtype=SPAN)
        spans["offset"][:1] = size_bytes = header.payload_offset
        for index, codec in enumerate(codecs):
            cap = section_cap_bytes(codec, shape_for(codec, header.shape(index)))
            spans["size"][index] = cap if codec in FIXED_RATE else 0
            size_bytes = next_section(size_bytes + cap)
        return self._made(header, [(codec, 0) for codec in codecs], size_bytes, spans=spans)

    def _made(
        self,
        header: Header,
        places: Sequence[tuple[CodecId, int]],
        size_bytes: int,
        *,
        paddings: Iterable[Launch] = (),
        spans: NDArray[Any] | None = None,
    ) -> Form | None:
        """Return the form of sections of these codecs, at these offsets or in *spans*."""
        groups: dict[tuple[CodecId, Kind], list[_Placed]] = {}
        if len(places) != len(self._layout.planes) or size_bytes > self._size_max:
            return None
        if header.source not in TYPES or size_bytes % VECTOR_BYTES:
            return None
        for index, (codec, offset) in enumerate(places):
            shape = coding_shape(codec, header.shape(index))
            placed = _Placed(index, shape, offset)
            groups.setdefault((codec, shape.kind), []).append(placed)
        try:
            launches = [
                launch
                for (codec, _), placed in groups.items()
                for launch in self._launches(codec, placed)
            ]
        except RequestError:
            return None
        reported = [
            one.plane
            for (codec, _), placed in groups.items()
            for one in placed
            if codec is not CodecId.RAW
        ]
        form = Form(
            layout=self._layout,
            size_bytes=size_bytes,
            launches=(*launches, *paddings),
            head_bytes=header.payload_offset,
            reported=tuple(reported),
            spans=spans,
        )
        return form if form.scratch_bytes <= DEVICE_SCRATCH_BYTES else None

    def _launches(self, codec: CodecId, placed: Sequence[_Placed]) -> Iterable[Launch]:
        """Yield what codes sections of one codec and kind; raises `RequestError`."""
        shape = placed[0].shape
        element = shape.source.size_bytes
        if codec is CodecId.RAW:
            layout = head_layout(codec, shape)
            yield self._copied(placed, layout.size_bytes, 0, shape.tokens, shape.dim * element)
            return
        yield self._fixed(codec, placed) if codec in FIXED_RATE else self._varying(codec, placed)
        # Behind the decoder: what it makes of sinks is not theirs.
        places = side_places(codec, shape) if codec not in LOSSLESS else None
        if places is not None and shape.sinks:
            row = shape.dim * element
            yield self._copied(placed, places.stride, places.sinks, shape.sinks, row)
        if places is not None and shape.tail:
            row, skipped = shape.tail * element, shape.dim * element
            yield self._copied(
                placed, places.stride, places.tail, shape.tokens, row, skipped=skipped
            )

    def _fixed(self, codec: CodecId, placed: Sequence[_Placed]) -> Launch:
        """Return what codes sections whose length is known."""
        shape = placed[0].shape
        gather = kernels_of(codec, shape.kind, "encode", shape.source)
        layout = head_layout(codec, shape)
        sides = layout.size_bytes - layout.parts["sinks"][0]
        told = replace(_told(placed), extra=sides, table=shape.table)
        checked_batch(KERNEL_NAMES[codec], told, self._pages(), _NOWHERE)
        return Launch(
            gather=gather,
            scatter=kernels_of(codec, shape.kind, "decode", shape.source),
            sections=self._records(placed),
            chunks=told,
            reports=True,
        )

    def _varying(self, codec: CodecId, placed: Sequence[_Placed]) -> Launch:
        """Return what measures, places and decodes sections as long as what they hold."""
        shape, told, coding = placed[0].shape, _told(placed), None
        measure = kernels_of(codec, shape.kind, "measure", shape.source)
        if codec is CodecId.ECSQ:
            places = side_places(codec, shape)
            preset = PRESETS_BY_ID.get(shape.table)
            sides_end = places.sinks + shape.heads * places.stride
            if preset is None or sides_end > section_cap_bytes(codec, shape):
                raise RequestError("sections of ecsq without a table, or with little but sinks")
            coding = coding_of(preset, shape.kind)
            # The address of its coding takes the place of the table when that is known.
            told = replace(told, extra=places.stride, table=1)
        name = VARIABLE_NAMES[codec]
        checked_batch(name, told, self._pages(), _SOMEWHERE)
        return Launch(
            measure=measure,
            gather=kernels_of(codec, shape.kind, "place", shape.source),
            scatter=kernels_of(codec, shape.kind, "decode", shape.source),
            sections=self._records(placed),
            chunks=told,
            reports=True,
            checks=True,
            scratch_bytes=scratch_bytes(name, replace(told, chunk_count=1)),
            coding=coding,
        )

    def _copied(
        self,
        placed: Sequence[_Placed],
        block_bytes: int,
        part: int,
        tokens: int,
        row_bytes: int,
        *,
        skipped: int = 0,
    ) -> Launch:
        """Return what moves the part of every head block that is kept as it is."""
        if row_bytes % VECTOR_BYTES:
            raise RequestError(f"rows of {row_bytes} bytes are no vectors")
        told = Chunks(
            chunk_count=0,
            section_count=len(placed),
            heads=placed[0].shape.heads,
            tokens=tokens,
            width=row_bytes // VECTOR_BYTES,
            extra=block_bytes,
            table=part,
        )
        records = self._records(placed)
        records["plane"] += np.uint64(skipped)
        return Launch(gather=(GATHER,), scatter=(SCATTER,), sections=records, chunks=told)

    def _paddings(self, sections: Sequence[Section], size_bytes: int) -> Iterable[Launch]:
        """Yield what zeroes the gaps between sections, gaps of one length together."""
        gaps: dict[int, list[int]] = {}
        inner = sorted(sections, key=lambda section: section.offset)
        nexts = [*(section.offset for section in inner[1:]), size_bytes]
        for section, after in zip(inner, nexts, strict=True):
            if gap := after - section.end:
                gaps.setdefault(gap, []).append(section.end)
        for gap, offsets in gaps.items():
            records = np.zeros(len(offsets), dtype=SECTION)
            records["plane"], records["offset"] = self._layout.planes[0], offsets
            told = Chunks(
                chunk_count=0,
                section_count=len(offsets),
                heads=1,
                tokens=1,
                width=gap // VECTOR_BYTES,
                extra=gap,
            )
            yield Launch(
                gather=(GATHER,), scatter=(), sections=records, chunks=told, is_padding=True
            )

    def _records(self, placed: Sequence[_Placed]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        records = np.zeros(len(placed), dtype=SECTION)
        records["plane"] = [self._layout.planes[one.plane] for one in placed]
        records["offset"] = [one.offset for one in placed]
        records["layer"] = [one.shape.layer for one in placed]
        records["span"] = [one.plane for one in placed]
        return records

    def _pages(self) -> Pages:
        layout = self._layout
        return Pages(
            page_tokens=layout.page_tokens,
            page_count=layout.pages_per_chunk,
            page_stride=layout.page_stride,
            token_stride=layout.token_stride,
            head_stride=layout.head_stride,
        )


def encoded_of(form: Form, reports: Iterable[Any], sections: int) -> list[Encoded]:
    """Return what encoders have *report*ed of the *sections* of one chunk."""
    made = [Encoded(0)] * sections
    for index, report in zip(form.reported, reports, strict=True):
        error, energy = float(report["error"]), float(report["energy"])
        is_fit = not report["broken"] and bool(np.isfinite((error, energy)).all())
        made[index] = Encoded(0, error, energy, is_fit)
    return made


def _told(placed: Sequence[_Placed]) -> Chunks:
    """Return what kernels are told of sections of one kind, for as many chunks as there will be."""
    shape = placed[0].shape
    return Chunks(
        chunk_count=0,
        section_count=len(placed),
        heads=shape.heads,
        tokens=shape.tokens,
        width=shape.dim,
        sinks=shape.sinks,
    )


def _form_of(layout: PageLayout) -> dict[str, int]:
    """Return what pages must have in common to share staging."""
    names = ("heads", "page_tokens", "pages_per_chunk", "row_bytes", "token_stride")
    return {"planes": len(layout.planes)} | {name: getattr(layout, name) for name in names}


def _head_bytes(sections: int) -> int:
    """Return how long the head of a container of so many *sections* is."""
    return padded(HEADER_BYTES + ENTRY.size * sections, SECTION_ALIGNMENT_BYTES)


def _read_head(head: BytesLike, size_bytes: int) -> Container | None:
    """Return the container of *size_bytes* that begins with *head*, of which a copy is read.

    None when its payload has a checksum of its own, which is for the host to take.
    """
    room = _scratch.room("head", max(size_bytes, len(head)))
    copy = room[: len(head)]
    copy[:] = np.frombuffer(head, dtype=np.uint8)
    if len(head) < HEADER_BYTES:
        raise ContainerError(f"a container has at least {HEADER_BYTES} bytes, this has {len(head)}")
    flags = HEADER.unpack_from(copy.data)[_FLAGS_FIELD]
    return None if flags & Flags.CHECKSUM else open_container(room[:size_bytes].data)
