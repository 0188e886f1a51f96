"""One load of a device: chunks from where they are stored to the engine's pages."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvstore.client.chunks import copy_chunk
from kvstore.client.gpu_calls import Call
from kvstore.client.gpu_forms import Stored
from kvstore.client.gpu_steps import Outcome, alike, groups_of, land, pipeline
from kvstore.errors import ChecksumError, ContainerError, KVStoreError
from kvstore.gpu.device import DeviceError
from kvstore.gpu.heads import Heads
from kvstore.gpu.pages import NOWHERE
from kvstore.gpu.transfers import Moved
from kvstore.gpu.windows import Run
from kvstore.limits import HEADS_ROOM_BYTES
from kvstore.transfer.copies import Runs
from kvstore.transfer.native import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from kvstore.client.chunks import LoadedChunks, StoredChunk, StoredShard
    from kvstore.client.gpu_calls import Asked
    from kvstore.client.sync import Space
    from kvstore.gpu.forms import Form
    from kvstore.gpu.transfers import Transfer

log = logging.getLogger(__name__)


class _Source(NamedTuple):
    """Where chunk *number* is copied from. *shard* None: what was verified on the host already."""

    number: int
    address: int
    form: Form
    shard: StoredShard | None
    spans: NDArray[Any] | None = None
    room: object = None

    @property
    def moved(self) -> tuple[int, NDArray[Any] | None]:
        """How long it is, and where its sections lie, if that is not in the form."""
        return (self.shard.size_bytes if self.shard and self.form.varies else 0), self.spans

    @property
    def is_pooled(self) -> bool:
        """Whether that is device memory."""
        return self.shard is not None and self.shard.is_pooled


def _has_far_head(chunk: StoredChunk, head_bytes: int) -> bool:
    """Return whether *chunk* is a container in device memory, and long enough to be one."""
    shard = chunk.shards[0]
    return shard.is_pooled and not shard.is_plain and shard.size_bytes >= head_bytes


class Loading(Call):
    """Brings what was *loaded* to its pages; the first *whole* chunks are right."""

    def __init__(self, asked: Asked, space: Space, loaded: LoadedChunks) -> None:
        super().__init__(asked, space)
        self.whole = 0
        self.damage: KVStoreError | None = None
        self._lane = asked.parts.loads
        self._forms = asked.parts.forms
        self._loaded = loaded
        self._unread: tuple[int, KVStoreError] | None = None
        self._heads: dict[int, memoryview] = {}
        attached = space.attached
        self._verify = attached.verify_loads and attached.checksums

    def run(self) -> None:
        """Fill the pages."""

        def begin(group: list[_Source]) -> Transfer:
            moved = [
                Moved(self._pages[one.number], one.address, one.is_pooled, *one.moved)
                for one in group
            ]
            form = group[0].form
            # Nothing else keeps bytes there as they were: not even a lease, when the tier fails.
            verify = self._verify or any(one.is_pooled for one in group)
            return self._lane.begin(moved, self._after, checksums=verify, form=form)

        self._fetch_heads()
        groups = alike(self._sources(), lambda one: (one.form, one.is_pooled), self._lane)
        pipeline(self._lane, groups, begin, self._end, self._drop)
        if self.damage is None and self._unread is not None and self._unread[0] == self.whole:
            self.damage = self._unread[1]

    def _sources(self) -> Iterator[_Source]:
        """Yield where chunks are copied from, up to one that cannot be read."""
        for number, chunk in enumerate(self._loaded.chunks):
            try:
                source = self._source(number, chunk, self._pages[number])
            except (ChecksumError, ContainerError) as error:
                self._unread = (number, error)
                return
            except DeviceError as error:
                log.info("a chunk was not brought to the host", extra={"reason": str(error)})
                return
            yield source

    def _source(self, number: int, chunk: StoredChunk, pages: Sequence[int]) -> _Source:
        shard, plain = chunk.shards[0], self._forms.plain
        if shard.heads == chunk.heads:
            stored = self._stored_of(number, shard, pages)
            if stored is not None:
                return _Source(
                    number, self._arena.at(shard.offset), stored.form, shard, stored.spans
                )
        self._parts.counters.host_decoded_chunks += 1
        room = np.empty(plain.size_bytes, dtype=np.uint8)
        if shard.is_pooled:
            self._bring(shard)
            copy_chunk(self._space.attached, chunk, Runs.of_buffer(room), verify=False)
        else:
            self._loaded.copy_one(chunk, Runs.of_buffer(room))
        return _Source(number, address_of(room.data), plain, None, room=room)

    def _stored_of(self, number: int, shard: StoredShard, pages: Sequence[int]) -> Stored | None:
        """Return how the device reads *shard*, if it can."""
        if shard.is_plain:
            plain = self._forms.plain
            return Stored(plain) if shard.size_bytes == plain.size_bytes else None
        if NOWHERE in pages:
            return None
        return self._forms.of_stored(self._head_of(number, shard), shard.size_bytes)

    # --- what lies in device memory ---------------------------------------------------------

    def _fetch_heads(self) -> None:
        """Bring the heads of encoded chunks to the host, where their forms are made: all at once.

        Of chunks whose heads do not come, none is loaded.
        """
        size = self._forms.head_bytes
        wanted = [
            (number, chunk.shards[0])
            for number, chunk in enumerate(self._loaded.chunks)
            if _has_far_head(chunk, size) and NOWHERE not in self._pages[number]
        ]
        for group in groups_of(wanted, Heads.capacity(size)):
            places = [self._arena.at(shard.offset) for _, shard in group]
            step = self._parts.load_heads.fetch(places, size)
            if land(step, self._parts.held, self._keep) is not Outcome.LANDED:
                return
            for (number, _), head in zip(group, step.fetched, strict=True):
                self._heads[number] = head.data

    def _head_of(self, number: int, shard: StoredShard) -> memoryview:
        """Return what *shard* begins with; raises `DeviceError` when that was not brought."""
        size = self._forms.head_bytes
        if not shard.is_pooled:
            return shard.view[:size]
        if shard.size_bytes < size:
            raise ContainerError(f"a container of {shard.size_bytes} bytes, its head has {size}")
        if number not in self._heads:
            raise DeviceError("its head has not come")
        return self._heads[number]

    def _bring(self, shard: StoredShard) -> None:
        """Have *shard*, for which the device has no form, in host memory, verified.

        Raises `ChecksumError`, or `DeviceError` when it does not come.
        """
        room = np.empty(shard.size_bytes, dtype=np.uint8)
        start = self._arena.at(shard.offset)
        for at in range(0, shard.size_bytes, HEADS_ROOM_BYTES):
            run = Run(start + at, min(HEADS_ROOM_BYTES, shard.size_bytes - at))
            step = self._parts.load_heads.fetch_run(run)
            if land(step, self._parts.held, self._keep) is not Outcome.LANDED:
                raise DeviceError(f"{run.size_bytes} bytes of it have not come")
            room[at : at + run.size_bytes] = step.fetched[0]
        shard.read_from(room)
        shard.verify()
        self._parts.counters.brought_chunks += 1

    def _end(self, transfer: Transfer, group: list[_Source]) -> bool:
        outcome = land(transfer, self._parts.held, self._keep)
        if outcome is not Outcome.LANDED:
            return False
        for position, source in enumerate(group):
            found = transfer.digests_of(position)
            try:
                if found is not None and source.shard is not None:
                    source.shard.check(found)
                if transfer.reports is not None and transfer.reports[position]["broken"].any():
                    raise ContainerError(f"section of chunk {source.number}: cannot be decoded")
            except (ChecksumError, ContainerError) as error:
                self.damage = error
                return False
            self.whole += 1
        return True

    def _drop(self, transfer: Transfer, _group: list[_Source]) -> None:
        land(transfer, self._parts.held, self._keep)

    def _keep(self) -> Callable[[], None]:
        """Keep the lease and the arena."""
        return self._until_over(self._loaded.hold())
