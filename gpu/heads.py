"""Heads of encoded chunks in device memory: written behind an encoder, read before a decoder.

Few bytes of many chunks: all heads of a transfer cross the bus as one copy, and a kernel puts them
where they belong, or takes them from there. What must be in order, and what sees to it:

| rule | where |
|---|---|
| heads are put behind the encoders, whose reports they hold | who calls `Heads.put` has waited |
| first blocks are digested behind the heads | `Desk`: one stream, `place` before `digest` |
| a chunk is committed when its head is there | `Step.finish` |
| a form is made of a head that has come | `Step.finish` |
| room is used again, here and there, when no copy touches it | `Step.is_over` |

Nothing waits for the device but `Step.finish`, and that has an end. Not thread-safe: one thread a
lane, one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import LimitError
from kvstore.gpu.batches import SECTION, Chunks, Pages, Places, batch_of
from kvstore.gpu.device import (
    Copy,
    Device,
    DeviceError,
    DeviceLostError,
    Event,
    Fence,
    Urgency,
    host_bytes,
)
from kvstore.gpu.forms import DIGEST, GATHER, SCATTER
from kvstore.gpu.pages import VECTOR_BYTES, digest_batch
from kvstore.gpu.windows import Run
from kvstore.hashing import Digests64, block_count
from kvstore.limits import (
    CHECKSUM_BLOCK_BYTES,
    CHECKSUM_SIZE_BYTES,
    CHUNKS_PER_TRANSFER_MAX,
    HEADS_ROOM_BYTES,
)

if TYPE_CHECKING:
    from kvstore.gpu.lanes import Lane

_MOST: Final = CHUNKS_PER_TRANSFER_MAX
# What lies in front of the heads, on either side: digests, then what kernels are told.
_PLACES: Final = (_MOST + HEADS_ROOM_BYTES // CHECKSUM_BLOCK_BYTES) * CHECKSUM_SIZE_BYTES
_PAGES: Final = _PLACES + _MOST * 8
_SECTION: Final = _PAGES + _MOST * 4
_HEADS: Final = _SECTION + 256
assert _PLACES % VECTOR_BYTES == _SECTION % VECTOR_BYTES == _HEADS % VECTOR_BYTES == 0


class Step:
    """Work on heads that is under way. `finish` it once; after `StuckError`, ask `is_over`."""

    fence: Fence | None = None

    def __init__(self, lane: Lane) -> None:
        self.done: Event | None = None
        self.error: DeviceError | None = None
        self.is_given = False
        """Whether the device has some of it."""
        self.take: Callable[[], None] = lambda: None
        """Takes what has come, before the memory is used again."""
        self.digests: Digests64 | None = None
        """Of what was put, `[chunk][block]`, once it is finished."""
        self.fetched: list[NDArray[np.uint8]] = []
        """What was fetched, once it is finished."""
        self._lane = lane

    def finish(self) -> None:
        """Wait until it has ended.

        Raises `DeviceError` when it failed. Only if that is a `StuckError` or a
        `DeviceLostError`, copies may still be under way, until `is_over`.
        """
        try:
            if self.is_given:
                if self.done is None:
                    # Nothing tells when what was given of it has ended.
                    raise DeviceLostError(f"the device took no event: {self.error}")
                self._lane.settings.wait(self.done)
            if isinstance(self.error, DeviceLostError):
                raise self.error
        except DeviceError as error:
            self._lane.give_up(self, error)
            raise
        if self.error is not None:
            self._lane.note_failure(self.error)
            raise self.error
        self.take()

    def is_over(self) -> bool:
        """Whether nothing of it is under way any more. Never true when the device is lost."""
        if not self.is_given:
            return True
        try:
            return self.done is not None and self.done.is_done()
        except DeviceError:
            return False


class Desk:
    """Where heads lie on their way: memory of both sides, laid out alike, and a stream."""

    def __init__(self, device: Device, urgency: Urgency) -> None:
        """Raise `DeviceMemoryError` without room."""
        self.stream = device.stream(urgency)
        self._words = device.allocate(_HEADS + HEADS_ROOM_BYTES)
        try:
            self._pinned = device.pin(_HEADS + HEADS_ROOM_BYTES)
        except DeviceError:
            self._words.free()
            raise

    def room(self, size_bytes: int) -> NDArray[np.uint8]:
        """Return the pinned room for heads."""
        return host_bytes(self._pinned.address + _HEADS, size_bytes)

    def place(self, kernel: str, places: Sequence[int], head_bytes: int) -> None:
        """Bring heads from here to the chunks at *places*, or back, as *kernel* does."""
        count, base = len(places), self._words.address
        section = np.zeros(1, SECTION)
        section["plane"] = base + _HEADS
        for at, part in (
            (_PLACES, np.array(places, "<u8")),
            (_PAGES, np.arange(count, dtype="<i4")),
            (_SECTION, section),
        ):
            host_bytes(self._pinned.address + at, part.nbytes)[:] = part.view(np.uint8)
        end = _HEADS + (count * head_bytes if kernel == GATHER else 0)
        self._upload(_PLACES, end - _PLACES)
        told = Chunks(
            chunk_count=count,
            section_count=1,
            heads=1,
            tokens=1,
            width=head_bytes // VECTOR_BYTES,
            extra=head_bytes,
        )
        pages = Pages(
            page_tokens=1,
            page_count=1,
            page_stride=head_bytes,
            token_stride=head_bytes,
            head_stride=head_bytes,
        )
        read = Places(sections=base + _SECTION, pages=base + _PAGES, containers=base + _PLACES)
        self.stream.launch(kernel, batch_of(told, pages, read))
        if kernel == SCATTER:
            self._download(_HEADS, count * head_bytes)

    def digest(self, count: int, size_bytes: int) -> None:
        """Digest the first *size_bytes* of the chunks whose heads were placed before."""
        base = self._words.address
        batch = digest_batch(count, size_bytes, pieces=1, starts=base + _PLACES, digests=base)
        self.stream.launch(DIGEST, batch)
        self._download(0, count * block_count(size_bytes) * CHECKSUM_SIZE_BYTES)

    def fetch(self, run: Run) -> None:
        """Bring *run* of device memory to the room."""
        self.stream.copy([Copy(self._pinned.address + _HEADS, run.address, run.size_bytes)])

    def digests(self, count: int, size_bytes: int) -> Digests64:
        """Return what `digest` has brought."""
        blocks = block_count(size_bytes)
        words = host_bytes(self._pinned.address, count * blocks * CHECKSUM_SIZE_BYTES)
        return words.view("<u8").reshape(count, blocks).copy()

    def free(self) -> None:
        """Give the memory back; nothing may be using it."""
        self._words.free()
        self._pinned.free()

    def _upload(self, start: int, size_bytes: int) -> None:
        words, pinned = self._words.address, self._pinned.address
        self.stream.copy([Copy(words + start, pinned + start, size_bytes)])

    def _download(self, start: int, size_bytes: int) -> None:
        words, pinned = self._words.address, self._pinned.address
        self.stream.copy([Copy(pinned + start, words + start, size_bytes)])


class Heads:
    """What one lane puts into chunks in device memory for the host, and fetches for it."""

    desk_type = Desk

    def __init__(self, device: Device, lane: Lane) -> None:
        self._device = device
        self._lane = lane
        self._desk: Desk | None = None
        self._last: Step | None = None

    @staticmethod
    def capacity(head_bytes: int) -> int:
        """Return how many heads of *head_bytes* one step takes."""
        return min(_MOST, HEADS_ROOM_BYTES // head_bytes)

    def put(self, places: Sequence[int], heads: Sequence[bytes], digested_bytes: int = 0) -> Step:
        """Put head i of *heads*, all of one length, to the address `places[i]` on the device.

        Then the first *digested_bytes* of each chunk are digested. What was there was put there
        by work that has ended. What fails is told by `finish`; raises `LimitError` for more than
        the capacity.
        """
        count, size = len(places), len(heads[0])
        self._check(count, size)

        def give(desk: Desk, step: Step) -> None:
            room = desk.room(count * size).reshape(count, size)
            for number, head in enumerate(heads):
                room[number] = np.frombuffer(head, np.uint8)
            desk.place(GATHER, places, size)
            if digested_bytes:
                desk.digest(count, digested_bytes)

                def take() -> None:
                    step.digests = desk.digests(count, digested_bytes)

                step.take = take

        return self._begin(give)

    def fetch(self, places: Sequence[int], head_bytes: int) -> Step:
        """Bring the first *head_bytes* of the chunks at *places*; raises as `put` does."""
        count = len(places)
        self._check(count, head_bytes)

        def give(desk: Desk, step: Step) -> None:
            desk.place(SCATTER, places, head_bytes)

            def take() -> None:
                step.fetched = list(desk.room(count * head_bytes).copy().reshape(count, -1))

            step.take = take

        return self._begin(give)

    def fetch_run(self, run: Run) -> Step:
        """Bring *run*; raises `LimitError` when that is more than `HEADS_ROOM_BYTES`."""
        if run.size_bytes > HEADS_ROOM_BYTES:
            raise LimitError(f"{run.size_bytes} bytes in one step of {HEADS_ROOM_BYTES}")

        def give(desk: Desk, step: Step) -> None:
            desk.fetch(run)

            def take() -> None:
                step.fetched = [desk.room(run.size_bytes).copy()]

            step.take = take

        return self._begin(give)

    def close(self) -> None:
        """Free the memory, unless something may still use it."""
        if self._desk is not None and (self._last is None or self._last.is_over()):
            self._desk.free()
            self._desk = None

    def _check(self, count: int, head_bytes: int) -> None:
        if head_bytes % VECTOR_BYTES or not 0 < count <= self.capacity(head_bytes):
            raise LimitError(f"{count} heads of {head_bytes} bytes in one step")

    def _begin(self, give: Callable[[Desk, Step], None]) -> Step:
        step = Step(self._lane)
        try:
            desk = self._idle_desk()
        except DeviceError as error:
            step.error = error
            return step
        self._last, step.is_given = step, True
        try:
            give(desk, step)
        except DeviceError as error:
            step.error = error
        # Also what was given before a call failed has to end before its memory is used again.
        try:
            step.done = desk.stream.record()
        except DeviceError as error:
            step.error = step.error or error
        return step

    def _idle_desk(self) -> Desk:
        """Return the desk, made when it is first needed; raises `DeviceError`."""
        if self._lane.off:
            raise DeviceError(self._lane.off)
        if self._last is not None and not self._last.is_over():
            raise DeviceError("the heads before these are still under way")
        self._desk = self._desk or self.desk_type(self._device, self._lane.urgency)
        return self._desk
