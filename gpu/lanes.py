"""Chunks between an engine's pages and host memory: one lane a direction, ordered by events alone.

A lane has two streams, one for kernels and one for copies, so that the next chunks are gathered
while the last cross the bus; stores and loads have lanes of their own, so that loads never queue
behind stores and the bus is used both ways. What must be in order, and the one method that sees
to it:

| rule | where |
|---|---|
| pages are read when the engine has computed them | `_behind_engine` |
| a copy takes what a gather, or an encoder, has written | `StoreLane._behind_gather` |
| a scatter, or a decoder, takes what a copy has brought | `LoadLane._behind_copy` |
| pages are written when the engine has stopped reading them | `_behind_engine` |
| the engine goes on behind a load that was given up | `LoadLane._engine_behind` |
| sizes of what is encoded are read when they have come | `Encoding.measured` |
| a copy takes what an encoder has placed, behind its sizes | `StoreLane._behind_gather` |
| staging is used again when its transfer has ended | `Transfer.finish` |
| digests and reports of encoders are read when they have come | `Lane._join`, `Transfer.finish` |
| host memory is used again when no copy touches it | `Transfer.is_over` |

Nothing waits for the device but `Transfer.finish`, which a thread of ours calls, and that has an
end. Not thread-safe: one thread a lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import LimitError, RequestError
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import (
    Copy,
    Device,
    DeviceError,
    DeviceLostError,
    Event,
    Fence,
    Stream,
    StuckError,
    Urgency,
    Wait,
    host_bytes,
    wait_for,
)
from kvstore.gpu.forms import DIGEST, LAY, Form, plain_form
from kvstore.gpu.pages import NOWHERE, PageLayout
from kvstore.gpu.staging import Ring, Slot, Told
from kvstore.gpu.transfers import Encoding, Moved, Transfer, UnderWay
from kvstore.gpu.ways import MEASURED, Least, Ways
from kvstore.gpu.windows import HostMemory
from kvstore.limits import (
    DEVICE_FAILURES_MAX,
    STAGING_SIZE_BYTES,
    STAGING_SLOTS,
    STUCK_TRANSFERS_MAX,
)


class LaneSettings(NamedTuple):
    """How a lane works.

    Pages of *direct_page_min_bytes* and more skip staging; None: none do; else as it was measured.
    """

    staging_bytes: int = STAGING_SIZE_BYTES
    slots: int = STAGING_SLOTS
    direct_page_min_bytes: Least = MEASURED
    wait: Wait = wait_for


class Lane:
    """What both directions have in common."""

    urgency = Urgency.LOW
    encodes = False

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        host: HostMemory,
        counters: DeviceCounters,
        settings: LaneSettings | None = None,
    ) -> None:
        """Raise `DeviceError` or `RequestError` when there is no way to move these pages."""
        self.settings = settings or LaneSettings()
        self.plain = plain_form(layout)
        self.host = host
        self.counters = counters
        self.ring = Ring(
            device,
            layout,
            size_bytes=self.settings.staging_bytes,
            slots=self.settings.slots,
            counters=counters,
        )
        self._ways = Ways(self.settings.direct_page_min_bytes)
        self._kernels = device.stream(self.urgency)
        self._copies = device.stream(self.urgency)
        self._failures = 0
        self._stuck: list[UnderWay] = []
        self.off = ""
        """Why nothing is moved any more; empty while something is."""

    @property
    def chunks_per_transfer(self) -> int:
        """How many plain chunks one transfer can take."""
        return self.ring.shape.chunks

    def capacity(self, form: Form, *, on_device: bool = False) -> int:
        """Return how many chunks of *form* one transfer can take: none, if it is too large.

        More, if all of them are in memory *on_device*.
        """
        return self.ring.capacity(form, on_device=on_device)

    @property
    def can_begin(self) -> bool:
        """Whether a transfer can begin before another is finished."""
        return self.ring.free_slots > 0

    def begin(
        self,
        chunks: Sequence[Moved],
        after: Fence | None,
        *,
        checksums: bool = True,
        form: Form | None = None,
    ) -> Transfer:
        """Give the device what moves *chunks* behind the fence *after*; do not wait for it.

        They are plain, or of *form*; then no page of them may be `NOWHERE`. What fails is told by
        `finish`. Raises `DeviceLostError` when the lane is off, `LimitError` when no slot is free
        or *chunks* are more than its capacity, and `RequestError` for wrong pages.
        """
        form = form or self.plain
        transfer = Transfer(self, self._slot_for(chunks, form), chunks, form, checksums=checksums)
        transfer.fence = after
        way = transfer.way = self._ways.choose(transfer, self.host)

        def give() -> None:
            if way.counts:
                self._behind_engine(self._copies, transfer)
                transfer.began = self._copies.record()
            (self._give_direct if way.is_direct else self._give)(transfer)

        self._attempt(transfer, give, self._join)
        if way.is_direct and transfer.error is None:
            self.counters.direct_chunks += len(chunks)
        return transfer

    def close(self) -> None:
        """Free the staging that is not in use."""
        self.off = self.off or "the lane is closed"
        self._reap()
        self.ring.close()

    # --- what the directions do --------------------------------------------------------------

    def _give(self, transfer: Transfer) -> None:
        raise NotImplementedError

    def _give_direct(self, transfer: Transfer) -> None:
        raise NotImplementedError

    # --- rules ----------------------------------------------------------------------------------

    def _behind_engine(self, stream: Stream, transfer: Transfer) -> None:
        """Have *stream* wait until the engine has done what it had to do with the pages."""
        if transfer.fence is not None:
            stream.wait(transfer.fence.event)

    def _join(self) -> Event:
        """Return what stands for the work of both streams."""
        self._copies.wait(self._kernels.record())
        return self._copies.record()

    # --- what they are made of ------------------------------------------------------------------

    def _attempt(
        self,
        transfer: Transfer,
        give: Callable[[], None],
        ending: Callable[[], Event],
    ) -> None:
        """Have *give* give the device its work, and note what stands for the end of it."""
        try:
            give()
        except DeviceError as error:
            transfer.error = error
        # Also what was given before a call failed has to end before its memory is used again.
        transfer.done = None
        try:
            transfer.done = ending()
        except DeviceError as error:
            transfer.error = transfer.error or error

    def _slot_for(self, chunks: Sequence[Moved], form: Form) -> Slot:
        if self.off:
            raise DeviceLostError(self.off)
        self._check(chunks, form)
        return self.ring.take()

    def _check(self, chunks: Sequence[Moved], form: Form) -> None:
        form.layout.check_pages([chunk.pages for chunk in chunks])
        most = self.capacity(form, on_device=all(chunk.on_device for chunk in chunks))
        if len(chunks) > most:
            raise LimitError(f"{len(chunks)} chunks in one transfer of {most}")
        if not form.is_plain and any(NOWHERE in chunk.pages for chunk in chunks):
            raise RequestError("coded chunks with pages that are nowhere")
        if any(chunk.size_bytes > form.size_bytes for chunk in chunks):
            raise LimitError(f"chunks of more than {form.size_bytes} bytes")

    def _tell(self, transfer: Transfer) -> Told:
        """Bring what the kernels read to the device; return what they are told."""
        slot, form, chunks = transfer.slot, transfer.form, transfer.chunks
        told = slot.tell(
            form,
            [chunk.pages for chunk in chunks],
            [
                chunk.address if chunk.on_device else slot.chunk(number, form.size_bytes)
                for number, chunk in enumerate(chunks)
            ],
            encodes=self.encodes,
            scratch=self.ring.scratch() if form.scratch_bytes else 0,
            spans=[chunk.spans for chunk in chunks if chunk.spans is not None],
            sizes=transfer.sizes,
        )
        if form.is_plain:  # its kernels take the checksums on the way
            told.batches[0]["reports"] = told.digest["reports"] if transfer.checksums else 0
        self._kernels.copy([told.upload])
        return told

    def _launch(self, kernels: Sequence[str], batch: NDArray[Any]) -> None:
        for kernel in kernels:
            self._kernels.launch(kernel, batch)

    def _tell_pieces(self, transfer: Transfer) -> NDArray[Any]:
        """Bring places to the device; return the argument that digests chunks where pages lie."""
        pages = [chunk.pages for chunk in transfer.chunks]
        told = transfer.slot.tell_pieces(transfer.form.layout, pages)
        self._kernels.copy([told.upload])
        return told.digest

    def _results(self, transfer: Transfer, digest: NDArray[Any] | None) -> None:
        """Have *digest* taken where checksums are wanted, and bring what kernels have found."""
        copies = [] if transfer.form.is_plain else transfer.slot.found_copies()
        if transfer.checksums:
            if digest is not None:
                self._kernels.launch(DIGEST, digest)
            count, size = len(transfer.chunks), transfer.form.size_bytes
            copies += transfer.slot.digest_copies(count, size)
        if copies:
            self._kernels.copy(copies)

    def _runs(self, transfer: Transfer, number: int, start: int = 0) -> list[Copy]:
        """Return copies from host memory to staging, by way of pinned memory where need be.

        Only what lies behind the first *start* bytes of the chunk is copied.
        """
        slot, whole = transfer.slot, transfer.form.size_bytes
        if transfer.chunks[number].on_device:
            return []
        address = transfer.chunks[number].address + start
        at, size = slot.chunk(number, whole) + start, transfer.sizes[number] - start
        runs = self.host.pinned_runs(address, size)
        if not runs:
            transfer.bounced.append(number)
            return [Copy(at, slot.bounce(number, whole) + start, size)]
        return [Copy(at + run.address - address, run.address, run.size_bytes) for run in runs]

    def _bounces(
        self, transfer: Transfer, start: int = 0
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Yield host and pinned memory of the chunks that go through it, from *start* on."""
        whole = transfer.form.size_bytes
        for number in transfer.bounced:
            places = transfer.chunks[number].address, transfer.slot.bounce(number, whole)
            size = transfer.sizes[number] - start
            host, pinned = (host_bytes(place + start, size) for place in places)
            yield host, pinned

    def _piece_runs(self, transfer: Transfer) -> list[Copy]:
        """Return copies from host memory to pages."""
        copies: list[Copy] = []
        layout = transfer.form.layout
        size = layout.piece_bytes
        for chunk in transfer.chunks:
            for number, piece in enumerate(layout.pieces(chunk.pages).tolist()):
                start = chunk.address + number * size
                copies += [
                    Copy(piece + run.address - start, run.address, run.size_bytes)
                    for run in self.host.pinned_runs(start, size)
                ]
        return copies

    def _coded(self, transfer: Transfer) -> int:
        """Return how many chunks of *transfer* were encoded or decoded."""
        return 0 if transfer.form.is_plain else transfer.count

    # --- how it went ------------------------------------------------------------------------------

    def note_success(self, transfer: Transfer) -> None:
        """Count a transfer that has ended."""
        self._failures = 0
        self.counters.bounced_chunks += len(transfer.bounced)
        if transfer.done is not None:
            self._ways.ended(transfer, transfer.done)

    def note_failure(self, error: DeviceError) -> None:
        """Count one that has not; after too many in a row, the lane is off."""
        self.counters.failed_transfers += 1
        self._failures += 1
        if self._failures >= DEVICE_FAILURES_MAX:
            self.off = self.off or f"{self._failures} transfers in a row failed: {error}"

    def give_up(self, transfer: UnderWay, error: DeviceError) -> None:
        """Leave a transfer to itself: what it uses comes back when it has ended, if ever."""
        self._stuck.append(transfer)
        if isinstance(error, StuckError):
            self.counters.stuck_transfers += 1
        elif isinstance(error, DeviceLostError):
            self.counters.lost_devices += not self.off
            self.off = self.off or str(error)
        else:
            self.note_failure(error)
        if len(self._stuck) > STUCK_TRANSFERS_MAX:
            self.off = self.off or f"{len(self._stuck)} transfers are stuck"

    def _reap(self) -> None:
        self._stuck = [transfer for transfer in self._stuck if not transfer.is_over()]

    @property
    def stuck(self) -> int:
        """How many transfers were given up and have not ended."""
        self._reap()
        return len(self._stuck)


class StoreLane(Lane):
    """From pages to host memory. Yields to everything else on the device."""

    urgency = Urgency.LOW
    encodes = True

    def encode(
        self, chunks: Sequence[Moved], after: Fence | None, form: Form, *, checksums: bool = True
    ) -> Encoding:
        """Give the device what encodes *chunks* of a *form* that varies, and finds their sizes.

        Their addresses are not known yet: see `Encoding.deliver`. Raises as `begin` does.
        """
        slot = self._slot_for(chunks, form)
        transfer = Encoding(self, slot, chunks, form, checksums=checksums)
        transfer.fence = after
        # Nothing of it is in the other stream, where copies of those before it go on.
        self._attempt(transfer, partial(self._give_encoder, transfer), self._kernels.record)
        return transfer

    def deliver(self, transfer: Encoding) -> None:
        """Give the device what brings the chunks of *transfer* to their rooms."""
        self._attempt(transfer, partial(self._give_rooms, transfer), self._join)

    def _give(self, transfer: Transfer) -> None:
        told = self._tell(transfer)
        out = self._out(transfer)
        self._behind_engine(self._kernels, transfer)
        self._gather(transfer, told)
        self._behind_gather(transfer)
        self._copies.copy(out)
        self._results(transfer, None if transfer.form.is_plain else told.digest)

    def _give_encoder(self, transfer: Encoding) -> None:
        launches, told = transfer.form.launches, self._tell(transfer)
        transfer.digest = told.digest
        self._behind_engine(self._kernels, transfer)
        for launch, batch in zip(launches, told.batches, strict=True):
            self._launch(launch.measure, batch)
        self._kernels.launch(LAY, told.batches[0])
        self._kernels.copy(transfer.slot.found_copies())
        transfer.measured_at = self._kernels.record()
        self._gather(transfer, told)

    def _give_rooms(self, transfer: Encoding) -> None:
        assert transfer.digest is not None, "it was measured"
        self._kernels.copy([transfer.slot.tell_sizes(transfer.sizes)])
        self._behind_gather(transfer)
        self._copies.copy(self._out(transfer))
        self._results(transfer, transfer.digest)

    def _gather(self, transfer: Transfer, told: Told) -> None:
        for launch, batch in zip(transfer.form.launches, told.batches, strict=True):
            self._launch(launch.gather, batch)
        transfer.pages_free = self._kernels.record()

    def _out(self, transfer: Transfer) -> list[Copy]:
        """Return the copies from staging to where chunks belong, but for their heads."""
        head = transfer.form.head_bytes
        return [
            Copy(source=copy.target, target=copy.source, size_bytes=copy.size_bytes)
            for number, size in enumerate(transfer.sizes)
            if size
            for copy in self._runs(transfer, number, head)
        ]

    def _give_direct(self, transfer: Transfer) -> None:
        self._behind_engine(self._copies, transfer)
        self._copies.copy(
            [
                Copy(source=copy.target, target=copy.source, size_bytes=copy.size_bytes)
                for copy in self._piece_runs(transfer)
            ]
        )
        if transfer.checksums:
            batch = self._tell_pieces(transfer)
            self._behind_engine(self._kernels, transfer)
            self._results(transfer, batch)

    def _behind_gather(self, transfer: Transfer) -> None:
        if transfer.pages_free is not None:
            self._copies.wait(transfer.pages_free)

    def note_success(self, transfer: Transfer) -> None:
        """Bring what went through pinned memory to where it belongs, and count."""
        super().note_success(transfer)
        for host, pinned in self._bounces(transfer, transfer.form.head_bytes):
            host[:] = pinned
        self.counters.chunks_stored += transfer.count
        self.counters.encoded_chunks += self._coded(transfer)


class LoadLane(Lane):
    """From host memory to pages. The engine waits for these."""

    urgency = Urgency.HIGH

    def _give(self, transfer: Transfer) -> None:
        told = self._tell(transfer)
        copies = [
            copy for number in range(len(transfer.chunks)) for copy in self._runs(transfer, number)
        ]
        for host, pinned in self._bounces(transfer):
            pinned[:] = host
        self._copies.copy(copies)
        self._behind_copy()
        self._behind_engine(self._kernels, transfer)
        for launch, batch in zip(transfer.form.launches, told.batches, strict=True):
            self._launch(launch.scatter, batch)
        self._results(transfer, None if transfer.form.is_plain else told.digest)

    def _give_direct(self, transfer: Transfer) -> None:
        batch = self._tell_pieces(transfer) if transfer.checksums else None
        self._behind_engine(self._copies, transfer)
        self._copies.copy(self._piece_runs(transfer))
        if batch is not None:
            self._behind_copy()
            self._results(transfer, batch)

    def _behind_copy(self) -> None:
        self._kernels.wait(self._copies.record())

    def _join(self) -> Event:
        """Return what stands for the work of both streams.

        The kernels of a load end it: the copies of the next do not wait for them.
        """
        self._kernels.wait(self._copies.record())
        return self._kernels.record()

    def _engine_behind(self, transfer: UnderWay) -> None:
        """Have the engine's next work wait for a load that nobody waits for any more.

        It will be told that its pages hold nothing, and write to them: not before we have.
        """
        if transfer.fence is not None and transfer.done is not None:
            transfer.fence.stream.wait(transfer.done)

    def note_success(self, transfer: Transfer) -> None:
        """Count."""
        super().note_success(transfer)
        self.counters.chunks_loaded += len(transfer.chunks)
        self.counters.decoded_chunks += self._coded(transfer)

    def give_up(self, transfer: UnderWay, error: DeviceError) -> None:
        """See `Lane.give_up`; the engine goes on behind it."""
        super().give_up(transfer, error)
        try:
            self._engine_behind(transfer)
        except DeviceError as lost:
            self.off = self.off or str(lost)
