"""Copies between a pool and host memory: piece by piece through pinned memory of our own.

Each direction is a `Way` with a thread, a stream that yields to everything else on the device,
and two halves of pinned memory. One that gets stuck holds up neither the other nor an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from kvstore.errors import TierError
from kvstore.gpu.device import Copy, Device, DeviceError, DeviceLostError, Event, Urgency, Wait
from kvstore.gpu.pools import Pool
from kvstore.hashing import Digests64, block_count
from kvstore.limits import CHECKSUM_BLOCK_BYTES, DEVICE_PIECE_BYTES
from kvstore.tiers.disk_calls import Crew
from kvstore.transfer.copies import copy_at
from kvstore.transfer.native import address_of
from kvstore.types import Extent

_PROBE_BYTES: Final = 64


class Way:
    """One direction. While there is *trouble*, what was begun may not have ended.

    That is found out before the next copy, and by `probe`: a stream ends its work in order.
    """

    def __init__(self, device: Device, pool: Pool, name: str, wait: Wait) -> None:
        """Raise `DeviceError` when the device has nothing to copy with."""
        self.wait = wait
        self.crew: Final = Crew(name, 1)
        self.trouble: DeviceError | None = None
        self._pool = pool
        self._stream = device.stream(Urgency.LOW)
        self._pinned = device.pin(2 * DEVICE_PIECE_BYTES)

    async def down(self, extent: Extent, target: memoryview, table: Digests64) -> None:
        """Copy *extent* to *target*, and the digests of its blocks to *table*.

        Raises `TierError` when the device does not do it, or has not done so before.
        """
        await self._do(partial(self._bring, extent, target, table))

    async def up(self, source: memoryview, extent: Extent) -> Digests64:
        """Copy *source* to *extent*; return the digests of the blocks that were copied.

        Raises `TierError` when the device does not do it, or has not done so before.
        """
        table = np.zeros(block_count(extent.size_bytes), np.uint64)
        await self._do(partial(self._fill, source, extent, table))
        return table

    async def probe(self) -> None:
        """Copy a little, once all that was stuck has ended; raises `TierError`."""
        await self.crew.do([self._try])

    def close(self) -> None:
        """Give the memory back, when nothing is under way any more."""
        self._pinned.free()

    # --- in the thread ------------------------------------------------------------------------

    async def _do(self, copy: Callable[[], None]) -> None:
        def attempt() -> None:
            if self.trouble is not None:
                self._try()
            try:
                copy()
            except DeviceError as error:
                self.trouble = error
                raise TierError(f"device: {error}") from error
            except BaseException as error:
                # Whatever it was, what had been begun may be under way.
                self.trouble = DeviceError(f"{type(error).__name__}: {error}")
                raise

        await self.crew.do([attempt])

    def _bring(self, extent: Extent, target: memoryview, table: Digests64) -> None:
        """Copy *extent* to *target*: one piece is on its way while the last is taken out."""
        base, last = address_of(target), (extent.size_bytes - 1) // DEVICE_PIECE_BYTES
        coming = self._begin_down(extent, 0)
        for number in range(last + 1):
            event = coming
            if number < last:
                coming = self._begin_down(extent, number + 1)
            self.wait(event)
            start, size = _piece(extent, number)
            _digest_copy(base + start, self._half(number), (start, size), table)

    def _fill(self, source: memoryview, extent: Extent, table: Digests64) -> None:
        """Copy *source* to *extent*: one piece is on its way while the next is put in."""
        base, going = address_of(source), list[Event]()
        for number in range((extent.size_bytes - 1) // DEVICE_PIECE_BYTES + 1):
            if number >= 2:
                # What is in this half of the memory may still be on its way.
                self.wait(going[number - 2])
            start, size = _piece(extent, number)
            _digest_copy(self._half(number), base + start, (start, size), table)
            target = self._pool.address + extent.offset + start
            self._stream.copy([Copy(target, self._half(number), size)])
            going.append(self._stream.record())
        self.wait(going[-1])

    def _begin_down(self, extent: Extent, number: int) -> Event:
        start, size = _piece(extent, number)
        source = self._pool.address + extent.offset + start
        self._stream.copy([Copy(self._half(number), source, size)])
        return self._stream.record()

    def _half(self, number: int) -> int:
        """Return where piece *number* is put: two halves of pinned memory, in turns."""
        return self._pinned.address + number % 2 * DEVICE_PIECE_BYTES

    def _try(self) -> None:
        """Find out whether all that was begun has ended, and whether a copy succeeds now."""
        try:
            if isinstance(self.trouble, DeviceLostError):
                raise self.trouble
            self._stream.copy([Copy(self._half(0), self._pool.address, _PROBE_BYTES)])
            self.wait(self._stream.record())
        except DeviceError as error:
            raise TierError(f"device: {error}") from error
        self.trouble = None


def _digest_copy(target: int, source: int, piece: tuple[int, int], table: Digests64) -> None:
    """Copy a piece, (start, bytes), and put the digests of its blocks where they belong."""
    start, size = piece
    digests = copy_at(target, source, size, checksums=True)
    assert digests is not None, "they were asked for"
    first = start // CHECKSUM_BLOCK_BYTES
    table[first : first + block_count(size)] = digests


def _piece(extent: Extent, number: int) -> tuple[int, int]:
    """Return where in *extent* piece *number* begins, and its size."""
    start = number * DEVICE_PIECE_BYTES
    return start, min(DEVICE_PIECE_BYTES, extent.size_bytes - start)
