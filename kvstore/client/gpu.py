"""Chunks between pages on a GPU and the daemon, for whoever has a device and a `PrefixCache`.

    device = open_device()                # kvstore.gpu.cupy_device; None where there is no GPU
    on_gpu = DeviceCache(cache, device, PageLayout(...))
    fence = on_gpu.fence(stream_handle)   # behind what the engine has been given so far
    on_gpu.store(digests, pages, after=fence)
    on_gpu.load(digests, pages, after=fence)

The engine's thread takes fences and waits for nothing; `store` and `load` are for threads of
their own, one each. The device copies to and from the arena itself, and takes the checksums.
Like the cache, this fails open: what goes wrong is a miss, or a chunk that is not stored.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np

from kvstore.client.gpu_steps import Arenas, Held, Outcome, groups_of, land, pipeline
from kvstore.client.sync import StoreReport, report_of
from kvstore.errors import ChecksumError, ContainerError, KVStoreError, RequestError
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import DeviceError, Fence
from kvstore.gpu.lanes import LaneSettings, LoadLane, Moved, StoreLane
from kvstore.limits import REGISTER_STEP_BYTES
from kvstore.transfer.copies import Runs
from kvstore.transfer.native import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.client.cache import PrefixCache
    from kvstore.client.chunks import LoadedChunks, StoredChunk, StoredShard, Vacancy
    from kvstore.client.sync import Space
    from kvstore.gpu.device import Device
    from kvstore.gpu.lanes import Transfer
    from kvstore.gpu.pages import PageLayout
    from kvstore.types import Digest

_DEFAULTS: Final = LaneSettings()


class DeviceCache:
    """One KV group of one engine, on one device."""

    def __init__(
        self,
        cache: PrefixCache,
        device: Device,
        layout: PageLayout,
        *,
        settings: LaneSettings = _DEFAULTS,
        register_step_bytes: int = REGISTER_STEP_BYTES,
    ) -> None:
        """Raise `RequestError` when *layout* is not that of the cache's chunks.

        The same when they are encoded, and `DeviceError` when the device has no room to stage
        one: then pages go through host memory, as they would without this.
        """
        manifest = cache.manifest
        if manifest.codec != "raw":
            raise RequestError(f"chunks of codec {manifest.codec!r} are encoded in host memory")
        needed = manifest.plain_bytes(cache.heads)
        if layout.chunk_bytes != needed:
            raise RequestError(f"pages make chunks of {layout.chunk_bytes} bytes, not {needed}")
        self.counters = DeviceCounters()
        self._cache = cache
        self._device = device
        self._layout = layout
        self._arenas = Arenas(device, self.counters, register_step_bytes)
        self._stores = StoreLane(device, layout, self._arenas, self.counters, settings)
        try:
            self._loads = LoadLane(device, layout, self._arenas, self.counters, settings)
        except DeviceError:
            self._stores.close()
            raise
        self._held = Held()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def off(self) -> str:
        """Why nothing is transferred any more; empty while something is."""
        return self._loads.off or self._stores.off

    @property
    def registered_bytes(self) -> int:
        """How much of the arena the device reaches by itself."""
        return self._arenas.registered_bytes

    @property
    def held(self) -> int:
        """How many transfers were given up and are not known to be over."""
        self._held.reap()
        return len(self._held)

    def fence(self, stream_handle: int) -> Fence:
        """Return what stands for all that the engine has given this stream so far.

        Raises `DeviceError`.
        """
        return Fence.of(self._device.engine_stream(stream_handle))

    def store(
        self,
        digests: Sequence[Digest],
        pages: Sequence[Sequence[int]],
        *,
        parent: Digest | None = None,
        after: Fence | None = None,
    ) -> StoreReport:
        """Store chunk i from `pages[i]` as they are behind *after*; report what was kept.

        On return the engine may overwrite the pages, whatever became of them.
        """
        self._held.reap()
        if self._stores.off:
            return StoreReport(0, 0, len(digests), 0)

        def put(
            start: int, batch: Sequence[Digest], before: Digest | None, space: Space
        ) -> StoreReport:
            vacancies = space.take_room(batch, parent=before, heads=self._cache.heads)
            with _Store(self, space, vacancies) as storing:
                storing.run(pages[start : start + len(batch)], after)
            return report_of(vacancies, storing.volatile)

        return self._cache.store_with(digests, put, parent=parent)

    def load(
        self,
        digests: Sequence[Digest],
        pages: Sequence[Sequence[int]],
        *,
        after: Fence | None = None,
    ) -> int:
        """Fill `pages[i]` with chunk i behind *after*; return how many leading ones are right.

        What the device is given from now on sees them. Pages behind those may hold anything.
        What was given up may still write to them, but never behind what the stream of *after*
        is given from now on.
        """
        self._held.reap()
        if self._loads.off:
            return 0

        def copy(start: int, part: Sequence[Digest], loaded: LoadedChunks, space: Space) -> int:
            with _Load(self, space, loaded) as loading:
                loading.run(pages[start : start + len(loaded)], after)
            trusted = loading.whole if loaded.is_trusted else 0
            if loading.damage is not None:
                self.counters.damaged_chunks += 1
                self._cache.drop_damaged(part[loading.whole], loaded, space, loading.damage)
            return trusted

        return self._cache.load_with(digests, copy)

    def close(self) -> None:
        """Free what is not in use. The cache stays open."""
        self._held.reap()
        self._stores.close()
        self._loads.close()
        self._arenas.close()


class _Call:
    """One call of one session, which uses its arena while it lasts."""

    def __init__(self, owner: DeviceCache, space: Space) -> None:
        self._owner = owner
        self._space = space
        self._arenas = owner._arenas  # noqa: SLF001  # parts of one thing
        self._held = owner._held  # noqa: SLF001
        self._arena = self._arenas.use(space.attached.arena)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._arenas.done(self._arena)

    def _until_over(self, let_go: Callable[[], None]) -> Callable[[], None]:
        """Keep the arena registered, and return what ends that and calls *let_go*."""
        arenas, arena = self._arenas, self._arena
        arenas.hold(arena)

        def end() -> None:
            arenas.done(arena)
            let_go()

        return end


class _Store(_Call):
    """Fills *vacancies* and publishes them, group by group."""

    def __init__(self, owner: DeviceCache, space: Space, vacancies: Sequence[Vacancy]) -> None:
        super().__init__(owner, space)
        self.volatile = 0
        self._lane = owner._stores  # noqa: SLF001
        self._todo = [(n, vacancy) for n, vacancy in enumerate(vacancies) if vacancy.is_reserved]

    def run(self, pages: Sequence[Sequence[int]], after: Fence | None) -> None:
        """Store from *pages*; what is not stored is given back, or kept until it is over."""
        begun = 0

        def begin(group: list[tuple[int, Vacancy]]) -> Transfer:
            nonlocal begun
            moved = [Moved(pages[n], self._arena.base + vacancy.offset) for n, vacancy in group]
            checksums = self._space.attached.checksums
            transfer = self._lane.begin(moved, after, checksums=checksums)
            begun += len(group)
            return transfer

        try:
            groups = groups_of(self._todo, self._lane.chunks_per_transfer)
            pipeline(self._lane, groups, begin, self._end, self._drop)
        finally:
            self._space.give_back([vacancy for _, vacancy in self._todo[begun:]])

    def _end(self, transfer: Transfer, group: list[tuple[int, Vacancy]]) -> bool:
        if not self._land(transfer, group):
            return False
        vacancies, found = [vacancy for _, vacancy in group], transfer.digests
        for number, vacancy in enumerate(vacancies):
            vacancy.seal_with(None if found is None else found[number])
        self.volatile += self._space.commit(vacancies)
        return True

    def _drop(self, transfer: Transfer, group: list[tuple[int, Vacancy]]) -> None:
        if self._land(transfer, group):
            self._space.give_back([vacancy for _, vacancy in group])

    def _land(self, transfer: Transfer, group: list[tuple[int, Vacancy]]) -> bool:
        let_go = partial(self._space.give_back, [vacancy for _, vacancy in group])
        outcome = land(transfer, self._held, lambda: self._until_over(let_go))
        if outcome is Outcome.FAILED:
            let_go()
        return outcome is Outcome.LANDED


class _Source(NamedTuple):
    """Where a chunk is copied from. *shard* None: what was verified on the host already."""

    address: int
    shard: StoredShard | None
    room: object = None


class _Load(_Call):
    """Brings what was *loaded* to its pages; the first *whole* chunks are right."""

    def __init__(self, owner: DeviceCache, space: Space, loaded: LoadedChunks) -> None:
        super().__init__(owner, space)
        self.whole = 0
        self.damage: KVStoreError | None = None
        self._lane = owner._loads  # noqa: SLF001
        self._layout = owner._layout  # noqa: SLF001
        self._counters = owner.counters
        self._loaded = loaded
        self._unread: tuple[int, KVStoreError] | None = None
        self._sources: dict[Transfer, list[_Source]] = {}
        attached = space.attached
        self._verify = attached.verify_loads and attached.checksums

    def run(self, pages: Sequence[Sequence[int]], after: Fence | None) -> None:
        """Fill *pages*."""

        def begin(group: list[tuple[int, StoredChunk]]) -> Transfer | None:
            sources = self._read(group)
            if not sources:
                return None
            moved = [
                Moved(pages[n], source.address)
                for (n, _), source in zip(group, sources, strict=False)
            ]
            transfer = self._lane.begin(moved, after, checksums=self._verify)
            self._sources[transfer] = sources
            return transfer

        chunks = list(enumerate(self._loaded.chunks))
        groups = groups_of(chunks, self._lane.chunks_per_transfer)
        pipeline(self._lane, groups, begin, self._end, self._drop)
        if self.damage is None and self._unread is not None and self._unread[0] == self.whole:
            self.damage = self._unread[1]

    def _read(self, group: list[tuple[int, StoredChunk]]) -> list[_Source]:
        """Return where the chunks of *group* are copied from, up to one that cannot be read."""
        sources: list[_Source] = []
        for number, chunk in group:
            try:
                if self._unread is None:
                    sources.append(self._source(chunk))
            except (ChecksumError, ContainerError) as error:
                self._unread = (number, error)
        return sources

    def _source(self, chunk: StoredChunk) -> _Source:
        shard = chunk.shards[0]
        size = self._layout.chunk_bytes
        if shard.heads == chunk.heads and shard.is_plain and shard.size_bytes == size:
            return _Source(self._arena.base + shard.offset, shard)
        self._counters.decoded_chunks += 1
        room = np.empty(size, dtype=np.uint8)
        self._loaded.copy_one(chunk, Runs.of_buffer(room))
        return _Source(address_of(room.data), None, room)

    def _end(self, transfer: Transfer, _group: list[tuple[int, StoredChunk]]) -> bool:
        outcome = land(transfer, self._held, self._keep)
        if outcome is not Outcome.LANDED:
            return False
        sources, found = self._sources.pop(transfer), transfer.digests
        for number, source in enumerate(sources):
            try:
                if found is not None and source.shard is not None:
                    source.shard.check(found[number])
            except ChecksumError as error:
                self.damage = error
                return False
            self.whole += 1
        return True

    def _drop(self, transfer: Transfer, _group: list[tuple[int, StoredChunk]]) -> None:
        land(transfer, self._held, self._keep)

    def _keep(self) -> Callable[[], None]:
        """Keep the lease and the arena."""
        return self._until_over(self._loaded.hold())
