"""Staging: a few slots of device memory through which chunks go, each used by one transfer.

A slot comes back only when its transfer has ended on the device and its host has read what it
left. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import LimitError, RequestError
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import Copy, Device, DeviceMemoryError, Memory, host_bytes
from kvstore.gpu.pages import PageLayout
from kvstore.hashing import Digests64, block_count
from kvstore.limits import CHECKSUM_SIZE_BYTES, CHUNKS_PER_TRANSFER_MAX

_ALIGNMENT: Final = 256
_PART_ALIGNMENT: Final = 16


class Geometry(NamedTuple):
    """How large a slot is."""

    slots: int
    chunks: int


class Slot:
    """Room for the chunks of one transfer, for what kernels read of it, and for their digests."""

    def __init__(self, device: Device, layout: PageLayout, chunks: int) -> None:
        self._device = device
        self._layout = layout
        self.chunk_stride = layout.chunk_bytes + -layout.chunk_bytes % _ALIGNMENT
        self._chunks = chunks
        self._digest_bytes = chunks * block_count(layout.chunk_bytes) * CHECKSUM_SIZE_BYTES
        size = self._digest_bytes + _words_bytes(layout, chunks)
        self._owned: list[Memory] = []
        self._bounce: Memory | None = None
        try:
            self._payload = self._own(device.allocate(chunks * self.chunk_stride))
            self._words = self._own(device.allocate(size))
            self._host_words = self._own(device.pin(size))
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

    def chunk(self, number: int) -> int:
        """Return where chunk *number* lies on the device."""
        return self._payload.address + number * self.chunk_stride

    def bounce(self, number: int) -> int:
        """Return where chunk *number* lies in pinned memory, made when first needed.

        Raises `DeviceMemoryError`.
        """
        if self._bounce is None:
            self._bounce = self._own(self._device.pin(self._chunks * self.chunk_stride))
        return self._bounce.address + number * self.chunk_stride

    @property
    def digests(self) -> int:
        """Where kernels put digests."""
        return self._words.address

    def write(self, parts: Mapping[str, NDArray[Any]]) -> tuple[dict[str, int], Copy]:
        """Lay *parts* down for the device; return where they will be, and the copy for that."""
        start = at = self._digest_bytes + -self._digest_bytes % _PART_ALIGNMENT
        places = {}
        for name, part in parts.items():
            raw = np.ascontiguousarray(part).view(np.uint8).ravel()
            places[name] = self._words.address + at
            host_bytes(self._host_words.address + at, raw.nbytes)[:] = raw
            at += raw.nbytes + -raw.nbytes % _PART_ALIGNMENT
        return places, Copy(
            self._words.address + start, self._host_words.address + start, at - start
        )

    def digest_copy(self, chunks: int) -> Copy:
        """Return the copy that brings the digests of *chunks* chunks to the host."""
        size = chunks * block_count(self._layout.chunk_bytes) * CHECKSUM_SIZE_BYTES
        return Copy(self._host_words.address, self._words.address, size)

    def read_digests(self, chunks: int) -> Digests64:
        """Return the digests `[chunk][block]` that were brought to the host."""
        blocks = block_count(self._layout.chunk_bytes)
        size = chunks * blocks * CHECKSUM_SIZE_BYTES
        words = host_bytes(self._host_words.address, size).view("<u8")
        return words.reshape(chunks, blocks).copy()


def _words_bytes(layout: PageLayout, chunks: int) -> int:
    """Return what kernels read at most: sections, page table, places of chunks, or of pieces."""
    table = chunks * layout.pages_per_chunk * 4
    places = chunks * max(1, layout.pieces_per_chunk if _in_pages(layout) else 1) * 8
    return layout.sections().nbytes + table + places + chunks * 8 + 8 * _PART_ALIGNMENT


def _in_pages(layout: PageLayout) -> bool:
    return layout.token_stride == layout.row_bytes


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
        for slot in self._free:
            slot.free()
        self._free = []
