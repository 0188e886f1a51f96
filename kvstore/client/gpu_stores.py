"""One store of a device: rooms that it fills, and that are published group by group."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvstore.client.coding import Scratch
from kvstore.client.gpu_forms import encoded_of
from kvstore.client.gpu_heads import Headed, HeadedCall
from kvstore.client.gpu_steps import Outcome, alike, land, pipeline
from kvstore.errors import UnfitError
from kvstore.gpu.transfers import Moved
from kvstore.transfer.copies import Runs
from kvstore.transfer.native import address_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from kvstore.client.chunks import Vacancy
    from kvstore.client.coding import Coding
    from kvstore.client.gpu_calls import Asked
    from kvstore.client.sync import Space
    from kvstore.gpu.forms import Form
    from kvstore.gpu.transfers import Transfer

_scratch = Scratch()


class Wanted(NamedTuple):
    """Chunk *number* of a call, its room, and how the device fills that; None: it cannot."""

    number: int
    vacancy: Vacancy
    form: Form | None
    is_first: bool = False


class Storing(HeadedCall):
    """Fills rooms and publishes them, group by group.

    With *coding*, chunks are encoded as it says. What is then *left* is for the host to encode:
    its room is given back.
    """

    def __init__(self, asked: Asked, space: Space, coding: Coding | None = None) -> None:
        super().__init__(asked, space)
        self.volatile = 0
        self.left: list[int] = []
        self._coding = coding
        self._lane = asked.parts.stores

    def run(self, wanted: Sequence[Wanted]) -> None:
        """Store what is *wanted*; what is not stored is given back, or kept until it is over."""
        begun = 0
        reserved = [one for one in wanted if one.vacancy.is_reserved]
        self._leave([one for one in reserved if one.form is None])
        todo = [one for one in reserved if one.form is not None]

        def begin(group: list[Wanted]) -> Transfer:
            nonlocal begun
            moved = [
                Moved(
                    self._pages[one.number],
                    self._arena.at(one.vacancy.offset),
                    on_device=one.vacancy.is_pooled,
                )
                for one in group
            ]
            checksums = self._space.attached.checksums
            form = group[0].form
            transfer = self._lane.begin(moved, self._after, checksums=checksums, form=form)
            begun += len(group)
            return transfer

        try:
            groups = alike(todo, _kind_of, self._lane)
            pipeline(self._lane, groups, begin, self._end, self._drop)
        finally:
            self._space.give_back([one.vacancy for one in todo[begun:]])
            self.left.sort()

    def _end(self, transfer: Transfer, group: list[Wanted]) -> bool:
        vacancies = [one.vacancy for one in group]
        if not self._landed(transfer, vacancies):
            return False
        if transfer.form.is_plain:
            for position, vacancy in enumerate(vacancies):
                vacancy.seal_with(transfer.digests_of(position))
            return self._publish(vacancies, of=len(group))
        headed, misfits = list[Headed](), list[Wanted]()
        for position, one in enumerate(group):
            # Where every section is raw, nothing is reported.
            reports = () if transfer.reports is None else transfer.reports[position]
            try:
                head = self._head_of(one, transfer.form, reports)
            except UnfitError:
                misfits.append(one)
            else:
                headed.append(Headed(one.vacancy, head, transfer.digests_of(position)))
        self._leave(misfits)
        self._parts.counters.misfit_chunks += len(misfits)
        return self._publish(self._put_heads(headed), of=len(headed))

    def _publish(self, ready: Sequence[Vacancy], *, of: int) -> bool:
        """Commit what is *ready*; return whether that is all *of* them."""
        if ready:
            self.volatile += self._space.commit(ready)
        return len(ready) == of

    def _head_of(self, one: Wanted, form: Form, reports: Iterable[Any]) -> bytes:
        """Return the head of a chunk that is encoded; raises `UnfitError`."""
        assert self._coding is not None, "what is not plain was encoded"
        sections = len(self._coding.plan(is_first=one.is_first).codecs)
        found = encoded_of(form, reports, sections)
        stored = one.vacancy.view if self._coding.seals_payload else None
        return self._coding.head_of(found, is_first=one.is_first, stored=stored)

    def _leave(self, wanted: Sequence[Wanted]) -> None:
        """Leave chunks to the host."""
        self.left += [one.number for one in wanted]
        self._space.give_back([one.vacancy for one in wanted])

    def _drop(self, transfer: Transfer, group: list[Wanted]) -> None:
        vacancies = [one.vacancy for one in group]
        if self._landed(transfer, vacancies):
            self._space.give_back(vacancies)


def _kind_of(one: Wanted) -> tuple[Form, bool]:
    assert one.form is not None, "the device has a way to fill it"
    return one.form, one.vacancy.is_pooled


def gather_to_host(asked: Asked) -> list[Runs] | None:
    """Return plain chunks in memory of this thread; None when the device fails."""
    parts, pages, after = asked
    lane, size = parts.stores, parts.forms.plain.size_bytes
    if lane.off or not lane.can_begin:
        return None
    room = _scratch.room("gathered", len(pages) * size)
    start = address_of(room.data)
    moved = [Moved(some, start + number * size) for number, some in enumerate(pages)]
    transfer = lane.begin(moved, after, checksums=False, form=parts.forms.plain)
    # That memory is not pinned: the device writes to staging of its own, also later.
    if land(transfer, parts.held, lambda: _nothing) is not Outcome.LANDED:
        return None
    return [Runs.of_buffer(room[n * size : (n + 1) * size]) for n in range(len(pages))]


def _nothing() -> None:
    """Let go of nothing."""
