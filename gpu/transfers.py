"""What a lane moves, and what it has been given to move until that has ended.

The rules of order that are kept here are in the table of `kvstore.gpu.lanes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.gpu.device import DeviceError, DeviceLostError, Event, Fence
from kvstore.gpu.forms import Form
from kvstore.gpu.staging import Slot
from kvstore.gpu.ways import STAGED
from kvstore.hashing import Digests64, block_count

if TYPE_CHECKING:
    from kvstore.gpu.lanes import Lane, StoreLane


class Moved(NamedTuple):
    """One chunk to move: its pages, and where in host memory it lies in one piece.

    If that is memory *on_device*, kernels work there, and no staging is needed. Where its form
    varies, it is of *size_bytes*, and its sections lie where *spans* say.
    """

    pages: Sequence[int]
    address: int
    on_device: bool = False
    size_bytes: int = 0
    spans: NDArray[Any] | None = None


class Room(NamedTuple):
    """Where in host memory a chunk belongs, and how long it is."""

    address: int
    size_bytes: int


class UnderWay(Protocol):
    """What a lane has given the device. `finish` it once; after `StuckError`, ask `is_over`."""

    fence: Fence | None
    done: Event | None

    def finish(self) -> object:
        """Wait until it has ended; raises `DeviceError` as `Transfer.finish` does."""
        ...

    def is_over(self) -> bool:
        """Whether nothing of it is under way any more."""
        ...


class Transfer:
    """Chunks that are on their way. `finish` it once; after `StuckError`, ask `is_over`."""

    def __init__(
        self, lane: Lane, slot: Slot, chunks: Sequence[Moved], form: Form, *, checksums: bool
    ) -> None:
        self.chunks = chunks
        self.sizes = [chunk.size_bytes or form.size_bytes for chunk in chunks]
        self.form = form
        self.checksums = checksums
        self.slot = slot
        self.pages_free: Event | None = None
        """Of a store: behind it the engine may overwrite the pages. None: when it has ended."""
        self.bounced: list[int] = []
        """Chunks that go through pinned memory."""
        self.fence: Fence | None = None
        self.done: Event | None = None
        self.way = STAGED
        self.began: Event | None = None
        """Where it began, behind its fence, if it is to be known how long it takes."""
        self.error: DeviceError | None = None
        self.digests: Digests64 | None = None
        """What `finish` has returned."""
        self.reports: NDArray[Any] | None = None
        """What encoders, or decoders, said, `[chunk][section]`, once it is finished."""
        self._lane = lane
        self._has_slot = True

    def finish(self) -> Digests64 | None:
        """Wait until it has ended; return the digests `[chunk][block]` of what was moved.

        Raises `DeviceError` when it failed. Only if that is a `StuckError` or a
        `DeviceLostError`, copies may still be under way: the host memory stays as it is until
        `is_over`, for ever if need be.
        """
        try:
            if self.done is None:
                # Nothing tells when what was given of it has ended.
                raise DeviceLostError(f"the device took no event: {self.error}")
            self._lane.settings.wait(self.done)
        except DeviceError as error:
            self._lane.give_up(self, error)
            raise
        if self.error is not None:
            self._end()
            self._lane.note_failure(self.error)
            raise self.error
        self._lane.note_success(self)
        self._take_results()
        self._end()
        return self.digests

    @property
    def count(self) -> int:
        """How many chunks it moves."""
        return len(self.chunks)

    def digests_of(self, number: int) -> Digests64 | None:
        """Return the digests of chunk *number* alone; None where no checksums were asked for."""
        if self.digests is None:
            return None
        return self.digests[number, : block_count(self.sizes[number])]

    def _take_results(self) -> None:
        if self.checksums:
            self.digests = self.slot.read_digests(len(self.chunks), self.form.size_bytes)
        if self.form.said(encodes=self._lane.encodes):
            self.reports = self._read_reports()

    def _read_reports(self) -> NDArray[Any]:
        """Put what each launch has reported of its sections beside each other."""
        found, count = self.slot.read_reports(), len(self.chunks)
        parts, at = [], 0
        for launch in self.form.launches:
            if launch.says(encodes=self._lane.encodes):
                size = count * len(launch.sections)
                parts.append(found[at : at + size].reshape(count, -1))
                at += size
        return np.concatenate(parts, axis=1)

    def is_over(self) -> bool:
        """Whether nothing of it is under way any more. Never true when the device is lost."""
        if self.done is None:
            return False
        try:
            is_done = self.done.is_done()
        except DeviceError:
            return False
        if is_done:
            self._end()
        return is_done

    def _end(self) -> None:
        if self._has_slot:
            self._has_slot = False
            self._lane.ring.give_back(self.slot)


class Encoding(Transfer):
    """Chunks that are encoded before it is known how long they become.

    Ask what was `measured`, `deliver` them to rooms of that length, then `finish` it; or finish
    it at once, and nothing is stored.
    """

    measured_at: Event | None = None
    """Behind it sizes are on the host."""
    digest: NDArray[Any] | None = None
    """The argument of the kernel that takes checksums."""
    spans: NDArray[Any] | None = None
    """Where sections lie, `[chunk][section]`, once that is `measured`."""
    _lane: StoreLane
    _is_delivered = False

    def measured(self) -> None:
        """Wait until sizes are known; raises as `finish` does.

        Until it is finished, reports say of sections that vary alone whether they are broken.
        """
        if self.error is not None or self.measured_at is None:
            self.finish()
        assert self.measured_at is not None, "what failed is raised by finish"
        try:
            self._lane.settings.wait(self.measured_at)
        except DeviceError as error:
            self._lane.give_up(self, error)
            raise
        self.spans = self.slot.read_spans().reshape(len(self.chunks), -1)
        self.reports = self._read_reports()

    def deliver(self, rooms: Sequence[Room | None]) -> None:
        """Give the device what brings chunk i to `rooms[i]`, or nowhere; do not wait for it.

        To be called when `measured` has returned. What fails is told by `finish`.
        """
        self._is_delivered = True
        self.sizes = [room.size_bytes if room else 0 for room in rooms]
        self.chunks = [
            chunk._replace(address=room.address if room else 0, size_bytes=size)
            for chunk, room, size in zip(self.chunks, rooms, self.sizes, strict=True)
        ]
        self._lane.deliver(self)

    @property
    def count(self) -> int:
        """How many chunks it moves."""
        return sum(size > 0 for size in self.sizes) if self._is_delivered else 0

    def _take_results(self) -> None:
        if self._is_delivered:
            super()._take_results()
