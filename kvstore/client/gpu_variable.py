"""One store of a device with a codec of variable rate: encoded first, then given the room it takes.

    engine's stream  ──●
    kernels            └─► measure, lay ─●─► place ─●           ┌─► checksums ─┐
    copies                               │          └───────────┴─► D2H ───────┴─► done ─► commit
    host                                 └─► sizes ─► room ─► copies

While one transfer asks for room, the next is encoded, and those before it cross the bus.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.client.coding import size_of
from kvstore.client.gpu_forms import encoded_of
from kvstore.client.gpu_heads import Headed, HeadedCall
from kvstore.client.gpu_steps import alike
from kvstore.client.sync import NOTHING_STORED, report_of
from kvstore.compression.container import Section
from kvstore.compression.shapes import LOSSLESS, CodecId, Encoded
from kvstore.errors import UnfitError
from kvstore.gpu.transfers import Moved, Room
from kvstore.types import ReserveOutcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.client.chunks import Vacancy
    from kvstore.client.coding import Coding
    from kvstore.client.gpu_calls import Asked
    from kvstore.client.sync import Space
    from kvstore.gpu.forms import Form
    from kvstore.gpu.transfers import Encoding
    from kvstore.types import Digest, HeadRange

_AHEAD: Final = 2
"""How many transfers are encoded and not yet on the bus: the next, while one asks for room."""


class ToEncode(NamedTuple):
    """Chunk *number* of a call, and how the device encodes it."""

    number: int
    form: Form
    is_first: bool


class Line(NamedTuple):
    """The chunks of a call as they follow each other: theirs, and what is before the first."""

    digests: Sequence[Digest]
    parent: Digest | None
    heads: HeadRange


@dataclass
class _Filled:
    """A chunk that is measured: its place in the transfer, its sections, and its room."""

    position: int
    one: ToEncode
    sections: list[Section]
    vacancy: Vacancy | None = None


@dataclass
class _Batch:
    """One transfer, its chunks, those that fit their codec, and the room that was asked for."""

    transfer: Encoding
    chunks: list[ToEncode]
    filled: list[_Filled] = field(default_factory=list)
    vacancies: list[Vacancy] = field(default_factory=list)


class StoringMeasured(HeadedCall):
    """Encodes chunks, takes the room that each needs, and publishes them, transfer by transfer.

    What is then *left* is for the host to encode.
    """

    def __init__(self, asked: Asked, space: Space, coding: Coding, line: Line) -> None:
        super().__init__(asked, space)
        self.report = NOTHING_STORED
        self.left: list[int] = []
        self._coding = coding
        self._line = line
        self._lane = asked.parts.stores
        self._is_full = False

    def run(self, todo: Sequence[ToEncode]) -> None:
        """Store what is *todo*; room of what is not stored is given back, or kept until it is over.

        What there is no room for ends it.
        """
        groups = alike(todo, lambda one: (one.form, False), self._lane)
        group = next(groups, None)
        encoded: deque[_Batch] = deque()
        delivered: deque[_Batch] = deque()
        try:
            while True:
                if group is not None and self._can_encode(len(encoded)):
                    encoded.append(self._encode(group))
                    group = next(groups, None)
                elif encoded:
                    if not self._measure(encoded[0]):
                        encoded.popleft()
                        return
                    self._deliver(encoded[0])
                    delivered.append(encoded.popleft())
                elif not delivered or not self._end(delivered.popleft()):
                    return
        finally:
            for batch in (*encoded, *delivered):
                self._drop(batch)
            self.left.sort()

    def _can_encode(self, ahead: int) -> bool:
        lane = self._lane
        return ahead < _AHEAD and not self._is_full and not lane.off and lane.can_begin

    def _encode(self, group: list[ToEncode]) -> _Batch:
        moved = [Moved(self._pages[one.number], 0) for one in group]
        checksums = self._space.attached.checksums
        transfer = self._lane.encode(moved, self._after, group[0].form, checksums=checksums)
        return _Batch(transfer, group)

    def _measure(self, batch: _Batch) -> bool:
        """Wait until it is known how long chunks become; leave what does not fit its codec."""
        transfer = batch.transfer
        if not self._landed(transfer, batch.vacancies, transfer.measured):
            return False
        assert transfer.spans is not None, "what was measured has spans"
        assert transfer.reports is not None, "and what measures reports"
        misfits = []
        for position, one in enumerate(batch.chunks):
            codecs = self._coding.plan(is_first=one.is_first).codecs
            found = encoded_of(one.form, transfer.reports[position], len(codecs))
            sections = _sections(codecs, transfer.spans[position].tolist(), found)
            if sections is None:
                misfits.append(one)
            else:
                batch.filled.append(_Filled(position, one, sections))
        self._leave(misfits)
        return True

    def _deliver(self, batch: _Batch) -> None:
        """Take room, and have chunks brought there."""
        for run in _runs(batch.filled):
            first, stop = run[0].one.number, run[-1].one.number + 1
            vacancies = self._space.take_room(
                self._line.digests[first:stop],
                parent=self._line.digests[first - 1] if first else self._line.parent,
                heads=self._line.heads,
                sizes=[size_of(one.sections) for one in run],
            )
            batch.vacancies += vacancies
            for one, vacancy in zip(run, vacancies, strict=True):
                one.vacancy = vacancy if vacancy.is_reserved else None
                self._is_full |= vacancy.outcome is ReserveOutcome.NO_SPACE
        rooms: list[Room | None] = [None] * len(batch.chunks)
        for one in batch.filled:
            if one.vacancy is not None:
                address = self._arena.at(one.vacancy.offset)
                rooms[one.position] = Room(address, one.vacancy.size_bytes)
        if any(rooms):
            batch.transfer.deliver(rooms)

    def _end(self, batch: _Batch) -> bool:
        """Write heads, and publish; return whether all went well."""
        if not self._landed(batch.transfer, batch.vacancies):
            return False
        headed, misfits = list[Headed](), list[ToEncode]()
        for filled in batch.filled:
            if filled.vacancy is None:
                continue
            digests = batch.transfer.digests_of(filled.position)
            try:
                head = self._head_of(batch.transfer, filled, filled.vacancy)
            except UnfitError:
                misfits.append(filled.one)
                self._space.give_back([filled.vacancy])
            else:
                headed.append(Headed(filled.vacancy, head, digests))
        self._leave(misfits)
        ready = self._put_heads(headed)
        volatile = self._space.commit(ready) if ready else 0
        self.report = self.report.plus(report_of(batch.vacancies, volatile))
        return len(ready) == len(headed)

    def _head_of(self, transfer: Encoding, filled: _Filled, vacancy: Vacancy) -> bytes:
        """Return the head of a chunk that is delivered; raises `UnfitError`."""
        assert transfer.reports is not None, "what measures reports"
        reports = transfer.reports[filled.position]
        found = [
            Encoded(0) if section.is_fallback else encoded
            for section, encoded in zip(
                filled.sections,
                encoded_of(transfer.form, reports, len(filled.sections)),
                strict=True,
            )
        ]
        stored = vacancy.view if self._coding.seals_payload else None
        is_first = filled.one.is_first
        return self._coding.head_of(
            found, is_first=is_first, sections=filled.sections, stored=stored
        )

    def _leave(self, misfits: Sequence[ToEncode]) -> None:
        """Leave chunks to the host."""
        self.left += [one.number for one in misfits]
        self._parts.counters.misfit_chunks += len(misfits)

    def _drop(self, batch: _Batch) -> None:
        if self._landed(batch.transfer, batch.vacancies):
            self._space.give_back(batch.vacancies)


def _sections(
    codecs: Sequence[CodecId], spans: Sequence[tuple[int, int]], found: Sequence[Encoded]
) -> list[Section] | None:
    """Return where sections lie, and as what; None when one is not fit and nothing stands for it.

    What kernels cannot make smaller without loss they place as it is.
    """
    made = []
    for codec, (offset, size), encoded in zip(codecs, spans, found, strict=True):
        if not encoded.is_fit and codec not in LOSSLESS:
            return None
        used = codec if encoded.is_fit else CodecId.RAW
        made.append(Section(used, offset, size, is_fallback=not encoded.is_fit))
    return made


def _runs(filled: Sequence[_Filled]) -> Iterator[list[_Filled]]:
    """Cut *filled* into runs of chunks that follow each other."""
    run: list[_Filled] = []
    for one in filled:
        if run and one.one.number != run[-1].one.number + 1:
            yield run
            run = []
        run.append(one)
    if run:
        yield run
