"""The heads of encoded chunks, between the host that writes and reads them and where chunks lie."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from kvstore.client.gpu_calls import Call
from kvstore.client.gpu_steps import Outcome, groups_of, land
from kvstore.gpu.heads import Heads
from kvstore.hashing import block_count
from kvstore.limits import CHECKSUM_BLOCK_BYTES
from kvstore.transfer.copies import digest_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.client.chunks import Vacancy
    from kvstore.gpu.transfers import UnderWay
    from kvstore.hashing import Digests64


class Headed(NamedTuple):
    """A chunk that the device has encoded in its room, and the head that belongs to it.

    *digests* are those of its blocks as the device has left them, None where there are no
    checksums: those of the first were not of the head.
    """

    vacancy: Vacancy
    head: bytes
    digests: Digests64 | None


class HeadedCall(Call):
    """A store whose chunks the device encodes where they will stay."""

    def _landed(
        self,
        step: UnderWay,
        vacancies: Sequence[Vacancy],
        wait: Callable[[], object] | None = None,
    ) -> bool:
        """Wait for *step*, or *wait* for a part of it; return whether that went well.

        If it did not, *vacancies* are given back, once nothing writes to them.
        """
        let_go = partial(self._space.give_back, vacancies)
        outcome = land(step, self._parts.held, lambda: self._until_over(let_go), wait)
        if outcome is Outcome.FAILED:
            let_go()
        return outcome is Outcome.LANDED

    def _put_heads(self, headed: Sequence[Headed]) -> list[Vacancy]:
        """Put heads, all of one length, to their chunks; return the rooms that can be committed.

        The others are given back, once nothing writes to them.
        """
        sealed: list[Vacancy] = []
        for one in headed:
            if not one.vacancy.is_pooled:
                _put_into_arena(one)
                sealed.append(one.vacancy)
        pooled = [one for one in headed if one.vacancy.is_pooled]
        for _, alike in groupby(pooled, _digested_bytes):
            for group in groups_of(list(alike), Heads.capacity(len(pooled[0].head))):
                sealed += self._put_into_pool(group)
        return sealed

    def _put_into_pool(self, group: Sequence[Headed]) -> list[Vacancy]:
        """Have the device put heads to chunks, and digest what is there then."""
        vacancies = [one.vacancy for one in group]
        places = [self._arena.at(vacancy.offset) for vacancy in vacancies]
        digested = 0 if group[0].digests is None else _digested_bytes(group[0])
        step = self._parts.store_heads.put(places, [one.head for one in group], digested)
        if not self._landed(step, vacancies):
            return []
        for position, one in enumerate(group):
            if one.digests is not None and step.digests is not None:
                one.digests[: block_count(digested)] = step.digests[position]
            one.vacancy.seal_with(one.digests)
        return vacancies


def _put_into_arena(one: Headed) -> None:
    room, found = one.vacancy.view, one.digests
    room[: len(one.head)] = one.head
    if found is not None:
        digested = _digested_bytes(one)
        found[: block_count(digested)] = digest_blocks(room[:digested])
    one.vacancy.seal_with(found)


def _digested_bytes(one: Headed) -> int:
    """Return how much of a chunk is digested with its head: whole blocks."""
    blocks = block_count(len(one.head))
    return min(blocks * CHECKSUM_BLOCK_BYTES, one.vacancy.size_bytes)
