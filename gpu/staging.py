"""Staging: a few slots of device memory through which chunks go, each used by one transfer.

A slot comes back only when its transfer has ended on the device and its host has read what it
left. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import LimitError, RequestError
from kvstore.gpu.batches import CODING, REPORT, SECTION, SPAN, Places
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import Copy, Device, DeviceMemoryError, Memory, host_bytes
from kvstore.gpu.forms import Form, batch_for
from kvstore.gpu.pages import NOWHERE, PageLayout, digest_batch
from kvstore.hashing import Digests64, block_count
from kvstore.limits import (
    CHECKSUM_SIZE_BYTES,
    CHUNKS_PER_TRANSFER_MAX,
    DEVICE_SCRATCH_BYTES,
    POOLED_PER_TRANSFER_MAX,
    STAGED_PER_PLAIN_MAX,
)

_ALIGNMENT: Final = 256
_PART_ALIGNMENT: Final = 16
_SECTIONS_PER_PLANE: Final = 4
"""What is coded of a plane, its sinks, its tail, and what pads them."""
_CODINGS_MAX: Final = 2
_HEAD_BYTES: Final = 320
_HEAD_BYTES_PER_PLANE: Final = 280
"""What a container in which nothing has become smaller takes beside its values, at most."""


class Geometry(NamedTuple):
    """How large a slot is."""

    slots: int
    chunks: int


class Told(NamedTuple):
    """What kernels are told: the arguments of the launches of a form, and of the digest.

    *upload* brings to the device what they point to. Where there are spans, any argument of
    *batches* says where they are.
    """

    batches: list[NDArray[Any]]
    digest: NDArray[Any]
    upload: Copy


_NOTHING_SAID: Final = np.zeros(0, dtype=REPORT)
_NO_SPANS: Final = np.zeros(0, dtype=SPAN)


class Slot:
    """Room for the chunks of one transfer, for what kernels read of it, and for what they report.

    *chunks* plain ones fit, or as many more as are encoded: up to `most`.
    """

    def __init__(self, device: Device, layout: PageLayout, chunks: int) -> None:
        self._device = device
        head_bytes = _HEAD_BYTES + _HEAD_BYTES_PER_PLANE * len(layout.planes)
        self.room_bytes = chunks * _stride(layout.chunk_bytes + head_bytes)
        self.most = min(chunks * STAGED_PER_PLAIN_MAX, CHUNKS_PER_TRANSFER_MAX)
        self._listed = max(self.most, chunks, POOLED_PER_TRANSFER_MAX)
        staged = block_count(self.room_bytes) + self.most
        pooled = POOLED_PER_TRANSFER_MAX * block_count(layout.chunk_bytes + head_bytes)
        self._digest_bytes = padded(max(staged, pooled) * CHECKSUM_SIZE_BYTES)
        self._words_bytes = self._digest_bytes + _words_bytes(layout, chunks, self._listed)
        self._said = self._spanned = 0, 0
        self._sizes_at = 0
        self._owned: list[Memory] = []
        self._bounce: Memory | None = None
        try:
            self._payload = self._own(device.allocate(self.room_bytes))
            self._words = self._own(device.allocate(self._words_bytes))
            self._host_words = self._own(device.pin(self._words_bytes))
        except DeviceMemoryError:
            self.free()
            raise

    def _own(self, memory: Memory) -> Memory:
        self._owned.append(memory)
        return memory

    def free(self) -> None:
        """Give all of it back; no work may be using it."""
        while self._owned:
            self._owned.pop().free()

    def capacity(self, size_bytes: int) -> int:
        """Return how many chunks of *size_bytes* fit."""
        return min(self.room_bytes // _stride(size_bytes), self.most)

    def capacity_beside(self, size_bytes: int) -> int:
        """Return how many chunks of *size_bytes* one transfer can take that need no room here."""
        digests = self._digest_bytes // CHECKSUM_SIZE_BYTES
        return min(self._listed, digests // block_count(size_bytes))

    def chunk(self, number: int, size_bytes: int) -> int:
        """Return where chunk *number* of those of *size_bytes* lies on the device."""
        return self._payload.address + number * _stride(size_bytes)

    def bounce(self, number: int, size_bytes: int) -> int:
        """Return where chunk *number* lies in pinned memory, made when first needed.

        Raises `DeviceMemoryError`.
        """
        if self._bounce is None:
            self._bounce = self._own(self._device.pin(self.room_bytes))
        return self._bounce.address + number * _stride(size_bytes)

    def tell(
        self,
        form: Form,
        pages: Sequence[Sequence[int]],
        places: Sequence[int],
        *,
        encodes: bool,
        scratch: int = 0,
        spans: Sequence[NDArray[Any]] = (),
        sizes: Sequence[int] = (),
    ) -> Told:
        """Lay down what kernels read to move chunks of *form* between *pages* and *places*.

        These are the page table, the places of the chunks, and the sections of every launch.
        Chunks of a form that varies have *spans* and *sizes* of their own, if they are known.
        """
        count = len(pages)
        said = np.zeros(count * form.said(encodes=encodes), dtype=REPORT)
        parts = {
            "pages": np.array(pages, dtype="<i4"),
            "nowhere": np.full(count, NOWHERE, dtype="<i4"),
            "chunks": np.array(places, dtype="<u8"),
        }
        if form.spans is not None:
            parts["sizes"] = np.array(sizes or [0] * count, dtype="<u8")
        for number, launch in enumerate(form.launches):
            parts[str(number)] = launch.sections
            if launch.coding is not None:
                parts[f"coding {number}"] = launch.coding
        known = _NO_SPANS if form.spans is None else np.stack(spans or [form.spans] * count)
        where, upload = self._write(parts, said, known)
        digest = digest_batch(
            count,
            form.size_bytes,
            pieces=1,
            starts=where["chunks"],
            digests=self._words.address,
            sizes=where.get("sizes", 0),
        )
        return Told(self._batches(form, count, where, scratch, encodes=encodes), digest, upload)

    def _batches(
        self, form: Form, count: int, where: Mapping[str, int], scratch: int, *, encodes: bool
    ) -> list[NDArray[Any]]:
        """Return the arguments of the launches of *form*, when all they read is laid down."""
        batches, report = [], where["said"]
        for number, launch in enumerate(form.launches):
            read = Places(
                sections=where[str(number)],
                pages=where["nowhere" if launch.is_padding else "pages"],
                containers=where["chunks"],
                reports=report,
                spans=0 if form.spans is None else where["spans"],
                scratch=scratch,
            )
            batch = batch_for(form, launch, count, read)
            if launch.coding is not None:
                batch["table"] = where[f"coding {number}"]
            batches.append(batch)
            if launch.says(encodes=encodes):
                report += count * len(launch.sections) * REPORT.itemsize
            scratch += count * launch.scratch_bytes
        return batches

    def tell_sizes(self, sizes: Sequence[int]) -> Copy:
        """Lay down how long the chunks that were told of are; return what uploads it."""
        told = np.array(sizes, dtype="<u8").view(np.uint8)
        at = self._sizes_at
        host_bytes(self._host_words.address + at, told.nbytes)[:] = told
        return Copy(self._words.address + at, self._host_words.address + at, told.nbytes)

    def tell_pieces(self, layout: PageLayout, pages: Sequence[Sequence[int]]) -> Told:
        """Lay down what the digest of chunks that stay in their *pages* reads."""
        pieces = np.stack([layout.pieces(each) for each in pages])
        where, upload = self._write({"starts": pieces})
        digest = digest_batch(
            len(pages),
            layout.chunk_bytes,
            pieces=layout.pieces_per_chunk,
            starts=where["starts"],
            digests=self._words.address,
        )
        return Told([], digest, upload)

    def _write(
        self,
        parts: Mapping[str, NDArray[Any]],
        said: NDArray[Any] = _NOTHING_SAID,
        spans: NDArray[Any] = _NO_SPANS,
    ) -> tuple[dict[str, int], Copy]:
        """Lay *parts* down for the device; return where they will be, and the copy for that.

        Before them is what comes back: reports, "said", and "spans". Raises `LimitError` when all
        is more than there is room for.
        """
        start = at = self._digest_bytes
        places = {}
        for name, part in ({"said": said, "spans": spans} | dict(parts)).items():
            raw = np.ascontiguousarray(part).view(np.uint8).ravel()
            if at + raw.nbytes > self._words_bytes:
                raise LimitError(f"what kernels read of a transfer exceeds {self._words_bytes}")
            places[name] = self._words.address + at
            host_bytes(self._host_words.address + at, raw.nbytes)[:] = raw
            at += padded(raw.nbytes)
        first = self._words.address
        self._said = places["said"] - first, said.size
        self._spanned = places["spans"] - first, spans.size
        self._sizes_at = places.get("sizes", first) - first
        return places, Copy(first + start, self._host_words.address + start, at - start)

    def found_copies(self) -> list[Copy]:
        """Return the copies that bring reports and spans to the host."""
        return self._to_host(
            (self._said[0], self._said[1] * REPORT.itemsize),
            (self._spanned[0], self._spanned[1] * SPAN.itemsize),
        )

    def digest_copies(self, chunks: int, size_bytes: int) -> list[Copy]:
        """Return the copies that bring the digests of *chunks* chunks to the host."""
        return self._to_host((0, chunks * block_count(size_bytes) * CHECKSUM_SIZE_BYTES))

    def _to_host(self, *parts: tuple[int, int]) -> list[Copy]:
        return [
            Copy(self._host_words.address + start, self._words.address + start, size)
            for start, size in parts
            if size
        ]

    def read_digests(self, chunks: int, size_bytes: int) -> Digests64:
        """Return the digests `[chunk][block]` that were brought to the host."""
        blocks = block_count(size_bytes)
        words = host_bytes(self._host_words.address, chunks * blocks * CHECKSUM_SIZE_BYTES)
        return words.view("<u8").reshape(chunks, blocks).copy()

    def read_reports(self) -> NDArray[Any]:
        """Return the reports that were brought to the host, in the order of the launches."""
        return self._read(*self._said, REPORT)

    def read_spans(self) -> NDArray[Any]:
        """Return the spans that were brought to the host, those of each chunk in their order."""
        return self._read(*self._spanned, SPAN)

    def _read(self, at: int, count: int, kind: np.dtype[Any]) -> NDArray[Any]:
        return host_bytes(self._host_words.address + at, count * kind.itemsize).view(kind).copy()


def padded(size_bytes: int) -> int:
    """Return *size_bytes* rounded up to where another part may begin."""
    return size_bytes + -size_bytes % _PART_ALIGNMENT


def _stride(size_bytes: int) -> int:
    return size_bytes + -size_bytes % _ALIGNMENT


def _words_bytes(layout: PageLayout, chunks: int, most: int) -> int:
    """Return what kernels are told at most, and report."""
    sections = _SECTIONS_PER_PLANE * len(layout.planes)
    pieces = chunks * layout.pieces_per_chunk * 8 if layout.token_stride == layout.row_bytes else 0
    found = len(layout.planes) * (REPORT.itemsize + SPAN.itemsize)
    of_chunks = most * (layout.pages_per_chunk * 4 + 4 + 8 + 8 + found)
    paddings = (sections + 2 * _SECTIONS_PER_PLANE) * _PART_ALIGNMENT
    codings = _CODINGS_MAX * padded(CODING.itemsize)
    return max(pieces, of_chunks) + sections * SECTION.itemsize + codings + paddings


class Ring:
    """All slots of one direction. Used by one thread at a time."""

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        *,
        size_bytes: int,
        slots: int,
        counters: DeviceCounters,
    ) -> None:
        """Take *size_bytes*, or less where the device has no more.

        Raises `RequestError` when one chunk does not fit, `DeviceMemoryError` when there is no
        room for one.
        """
        wanted = self._wanted(layout, size_bytes, slots)
        shape, made = wanted, self._try(device, layout, wanted)
        while made is None:
            if shape == (1, 1):
                raise DeviceMemoryError(
                    f"the device has no room to stage one chunk of {layout.chunk_bytes} bytes"
                )
            shape = Geometry(max(1, shape.slots - (shape.chunks == 1)), max(1, shape.chunks // 2))
            made = self._try(device, layout, shape)
        counters.smaller_rings += shape != wanted
        self.shape = shape
        self._device = device
        self._scratch: Memory | None = None
        self._free = made
        self._all = list(made)

    @staticmethod
    def _wanted(layout: PageLayout, size_bytes: int, slots: int) -> Geometry:
        most = size_bytes // layout.chunk_bytes
        if most == 0:
            raise RequestError(
                f"staging of {size_bytes} bytes for chunks of {layout.chunk_bytes} bytes"
            )
        slots = min(slots, most)
        return Geometry(slots, min(most // slots, CHUNKS_PER_TRANSFER_MAX))

    @staticmethod
    def _try(device: Device, layout: PageLayout, shape: Geometry) -> list[Slot] | None:
        made: list[Slot] = []
        try:
            for _ in range(shape.slots):
                made.append(Slot(device, layout, shape.chunks))  # noqa: PERF401  # freed if one fails
        except DeviceMemoryError:
            for slot in made:
                slot.free()
            return None
        return made

    @property
    def room_bytes(self) -> int:
        """How large one slot is."""
        return self._all[0].room_bytes

    def capacity(self, form: Form, *, on_device: bool) -> int:
        """Return how many chunks of *form* one transfer can take: none, if it is too large.

        Those that stay *on_device* are not staged.
        """
        slot = self._all[0]
        if on_device:
            most = slot.capacity_beside(form.size_bytes)
        else:
            most = self.shape.chunks if form.is_plain else slot.capacity(form.size_bytes)
        return min(most, DEVICE_SCRATCH_BYTES // form.scratch_bytes) if form.scratch_bytes else most

    def scratch(self) -> int:
        """Return where kernels note what they need of one transfer, made when first needed.

        All transfers have it in common: their kernels run in one stream. Raises
        `DeviceMemoryError`.
        """
        if self._scratch is None:
            self._scratch = self._device.allocate(DEVICE_SCRATCH_BYTES)
        return self._scratch.address

    @property
    def free_slots(self) -> int:
        """How many transfers can begin."""
        return len(self._free)

    def take(self) -> Slot:
        """Return a slot; raises `LimitError` when all are in use."""
        if not self._free:
            raise LimitError(f"all {self.shape.slots} slots of staging are in use")
        return self._free.pop(0)

    def give_back(self, slot: Slot) -> None:
        """Take back a slot whose transfer has ended and been read."""
        assert slot not in self._free, "a slot comes back once"
        self._free.append(slot)

    def close(self) -> None:
        """Free the slots that are not in use. The others are left to the end of the process."""
        if self._scratch is not None and len(self._free) == len(self._all):
            self._scratch.free()
            self._scratch = None
        for slot in self._free:
            slot.free()
        self._free = []
