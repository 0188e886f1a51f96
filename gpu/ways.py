"""Whether pages that lie in one piece each are staged, or taken one by one by the copy engine.

Which is faster depends on the GPU, the bus, the driver and the length of the pieces. So the first
transfers of a lane go both ways in turn, the device says what each has taken, and behind that all
go the faster way. Nothing is moved that would not be moved anyway, and nothing is allocated.
"""

from __future__ import annotations

import logging
from statistics import median
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from kvstore.gpu.device import DeviceError, Event
from kvstore.gpu.pages import NOWHERE
from kvstore.limits import (
    DIRECT_PAGE_MIN_BYTES,
    TRIED_PAGE_MIN_BYTES,
    TRIED_TRANSFER_MIN_BYTES,
    TRIED_TRANSFERS,
)

if TYPE_CHECKING:
    from kvstore.gpu.transfers import Transfer
    from kvstore.gpu.windows import HostMemory

log = logging.getLogger(__name__)

Least = int | Literal["measured"] | None
"""The smallest pages that go directly, in bytes; None: none do."""

MEASURED: Final = "measured"
_IN_A_ROW: Final = 4
"""Transfers that go one way before the other has its turn. What the first of them takes tells of
both ways: it is under way beside the last of the other."""
_AS_GOOD: Final = 1.05
"""What the direct way may take, by what staging takes: it needs no kernel beside the engine's."""


class Way(NamedTuple):
    """How a transfer goes; *counts*: what it takes is to be noted."""

    is_direct: bool
    counts: bool = False


STAGED: Final = Way(is_direct=False)


class Trial:
    """What transfers of pieces of about one length have taken, until that is enough."""

    def __init__(self) -> None:
        self.is_direct: bool | None = None
        """The way that is faster; None while that is open."""
        self._begun = 0
        self._taken: dict[bool, list[float]] = {False: [], True: []}

    def next(self) -> Way:
        """Return how the next transfer goes."""
        if self.is_direct is not None:
            return Way(self.is_direct)
        turn, number = divmod(self._begun, _IN_A_ROW)
        self._begun += 1
        return Way(turn % 2 == 1, counts=number > 0)

    def note(self, *, is_direct: bool, seconds_per_byte: float) -> bool:
        """Take note of a transfer that counts; return whether it is the one that settles it."""
        if self.is_direct is not None:
            return False
        self._taken[is_direct].append(seconds_per_byte)
        staged, direct = (self._taken[way] for way in (False, True))
        if min(len(staged), len(direct)) < TRIED_TRANSFERS:
            return False
        self.is_direct = median(direct) <= _AS_GOOD * median(staged)
        return True

    def give_up(self, *, is_direct: bool) -> None:
        """Settle it without having measured."""
        if self.is_direct is None:
            self.is_direct = is_direct


class Ways:
    """How the transfers of one lane go, by the length of their pieces."""

    def __init__(self, least: Least) -> None:
        self._least = least
        self._trials: dict[int, Trial] = {}
        self._last: Event | None = None

    def choose(self, transfer: Transfer, host: HostMemory) -> Way:
        """Return how *transfer* goes."""
        layout, size = transfer.form.layout, transfer.form.layout.piece_bytes
        least = TRIED_PAGE_MIN_BYTES if self._least == MEASURED else self._least
        if least is None or size < least or not self._could_be_direct(transfer, host):
            return STAGED
        if self._least != MEASURED:
            return Way(is_direct=True)
        trial, moved = self._trial(size), len(transfer.chunks) * layout.chunk_bytes
        if trial.is_direct is None and moved < TRIED_TRANSFER_MIN_BYTES:
            return Way(size >= DIRECT_PAGE_MIN_BYTES)
        return trial.next()

    @staticmethod
    def _could_be_direct(transfer: Transfer, host: HostMemory) -> bool:
        layout = transfer.form.layout
        return (
            transfer.form.is_plain
            and layout.token_stride == layout.row_bytes
            and all(
                # Between pages and a pool, kernels do in one pass what a copy would begin.
                not chunk.on_device
                and NOWHERE not in chunk.pages
                and host.pinned_runs(chunk.address, layout.chunk_bytes)
                for chunk in transfer.chunks
            )
        )

    def ended(self, transfer: Transfer, done: Event) -> None:
        """Take note of a transfer that was *done*, and of what it took if it has a beginning.

        While others of the lane are under way beside it, it has taken what lies between their end
        and its own.
        """
        last, self._last = self._last, done
        if transfer.began is None:
            return
        layout = transfer.form.layout
        size = layout.piece_bytes
        trial = self._trial(size)
        try:
            seconds = done.seconds_since(transfer.began)
            if last is not None:
                seconds = min(seconds, done.seconds_since(last))
        except DeviceError:  # events without times
            trial.give_up(is_direct=size >= DIRECT_PAGE_MIN_BYTES)
            return
        moved = len(transfer.chunks) * layout.chunk_bytes
        if trial.note(is_direct=transfer.way.is_direct, seconds_per_byte=seconds / moved):
            told = {"page_bytes": size, "is_direct": trial.is_direct}
            log.info("it is known which way pages are faster", extra=told)

    def _trial(self, piece_bytes: int) -> Trial:
        return self._trials.setdefault(piece_bytes.bit_length(), Trial())
