"""Chunks between pages on a GPU and the daemon, for whoever has a device and a `PrefixCache`.

    device = open_device()                # kvstore.gpu.cupy_device; None where there is no GPU
    on_gpu = DeviceCache(cache, device, PageLayout(...))
    fence = on_gpu.fence(stream_handle)   # behind what the engine has been given so far
    on_gpu.store(digests, pages, after=fence)
    on_gpu.load(digests, pages, after=fence)

The engine's thread takes fences and waits for nothing; `store` and `load` are for threads of
their own, one each. The device encodes and decodes, copies to and from the arena itself, and takes
the checksums; what it has no kernels for, the host encodes and decodes. Like the cache, this fails
open: what goes wrong is a miss, or a chunk that is not stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from kvstore.client.gpu_calls import Asked, Parts
from kvstore.client.gpu_forms import Forms
from kvstore.client.gpu_loads import Loading
from kvstore.client.gpu_pool import PooledSpaces
from kvstore.client.gpu_steps import Arenas, Held, groups_of
from kvstore.client.gpu_stores import Storing, Wanted, gather_to_host
from kvstore.client.gpu_telling import Telling
from kvstore.client.gpu_variable import Line, StoringMeasured, ToEncode
from kvstore.client.sync import NOTHING_STORED, StoreReport, report_of
from kvstore.errors import RequestError
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import DeviceError, Fence
from kvstore.gpu.heads import Heads
from kvstore.gpu.lanes import LaneSettings, LoadLane, StoreLane
from kvstore.gpu.pages import NOWHERE
from kvstore.limits import ENCODE_SCRATCH_BYTES, REGISTER_STEP_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.client.cache import PrefixCache
    from kvstore.client.chunks import LoadedChunks
    from kvstore.client.coding import Coding
    from kvstore.client.sync import Space
    from kvstore.gpu.device import Device
    from kvstore.gpu.forms import Form
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

        `DeviceError` when the device has no room to stage one: then pages go through host memory,
        as they would without this.
        """
        needed = cache.manifest.plain_bytes(cache.heads)
        if layout.chunk_bytes != needed:
            raise RequestError(f"pages make chunks of {layout.chunk_bytes} bytes, not {needed}")
        self.counters = DeviceCounters()
        self._cache = cache
        self._device = device
        self._layout = layout
        self._arenas = Arenas(device, self.counters, register_step_bytes)
        stores = StoreLane(device, layout, self._arenas, self.counters, settings)
        try:
            loads = LoadLane(device, layout, self._arenas, self.counters, settings)
        except DeviceError:
            stores.close()
            raise
        self._stores, self._loads = stores, loads
        self._held = Held()
        self._pooled = PooledSpaces(device, self._arenas, self.counters)
        self._telling = Telling(self.counters, cache.ask)
        room = min(lane.ring.room_bytes for lane in (stores, loads))
        forms = Forms(layout, cache.manifest, cache.heads, size_max_bytes=room)
        self._parts = Parts(
            stores,
            loads,
            self._arenas,
            self._held,
            forms,
            self.counters,
            Heads(device, stores),
            Heads(device, loads),
        )

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
        layout: PageLayout | None = None,
    ) -> StoreReport:
        """Store chunk i from `pages[i]` as they are behind *after*; report what was kept.

        On return the engine may overwrite the pages, whatever became of them. With *layout*, they
        lie there for once; it may differ from the cache's in where planes, pages and heads are.
        """
        self._held.reap()
        if self._stores.off:
            return StoreReport(0, 0, len(digests), 0)
        asked = self._asked(pages, after, layout)

        def put(
            start: int, batch: Sequence[Digest], before: Digest | None, space: Space
        ) -> StoreReport:
            some, coding = asked.part(start, start + len(batch)), self._cache.coding
            if coding is None:
                return self._store_plain(batch, some, before, self._pooled.of(space))
            return self._store_coded(batch, some, before, space, coding)

        try:
            return self._cache.store_with(digests, put, parent=parent)
        finally:
            self._telling.note()

    def load(
        self,
        digests: Sequence[Digest],
        pages: Sequence[Sequence[int]],
        *,
        after: Fence | None = None,
        layout: PageLayout | None = None,
    ) -> int:
        """Fill `pages[i]` with chunk i behind *after*; return how many leading ones are right.

        What the device is given from now on sees them. Pages behind those may hold anything.
        What was given up may still write to them, but never behind what the stream of *after*
        is given from now on. *layout* is as for `store`.
        """
        self._held.reap()
        if self._loads.off:
            return 0
        asked = self._asked(pages, after, layout)

        def copy(start: int, part: Sequence[Digest], loaded: LoadedChunks, space: Space) -> int:
            with Loading(asked.part(start, start + len(loaded)), space, loaded) as loading:
                loading.run()
            trusted = loading.whole if loaded.is_trusted else 0
            if loading.damage is not None:
                self.counters.damaged_chunks += 1
                self._cache.drop_damaged(part[loading.whole], loaded, space, loading.damage)
            return trusted

        try:
            return self._cache.load_with(digests, copy, via=self._pooled.of)
        finally:
            self._telling.note()

    def close(self) -> None:
        """Free what is not in use. The cache stays open."""
        self._telling.close()
        self._held.reap()
        self._stores.close()
        self._loads.close()
        for heads in (self._parts.store_heads, self._parts.load_heads):
            heads.close()
        self._arenas.close()

    def _asked(
        self, pages: Sequence[Sequence[int]], after: Fence | None, layout: PageLayout | None
    ) -> Asked:
        parts = self._parts
        if layout is not None:
            parts = parts._replace(forms=parts.forms.in_pages(layout))
        return Asked(parts, pages, after)

    def _store_plain(
        self, digests: Sequence[Digest], asked: Asked, parent: Digest | None, space: Space
    ) -> StoreReport:
        vacancies = space.take_room(digests, parent=parent, heads=self._cache.heads)
        plain = asked.parts.forms.plain
        with Storing(asked, space) as storing:
            storing.run([Wanted(n, vacancy, plain) for n, vacancy in enumerate(vacancies)])
        return report_of(vacancies, storing.volatile)

    def _store_coded(
        self,
        digests: Sequence[Digest],
        asked: Asked,
        parent: Digest | None,
        space: Space,
        coding: Coding,
    ) -> StoreReport:
        """Have the device encode what it has kernels for, and the host the rest."""
        plans = [coding.plan(is_first=not (parent or n)) for n in range(len(digests))]
        forms = [
            None if NOWHERE in some else asked.parts.forms.of_plan(plan)
            for some, plan in zip(asked.pages, plans, strict=True)
        ]
        report, left = NOTHING_STORED, list(range(len(digests)))
        if any(form is not None and form.varies for form in forms):
            report, left = self._store_measured(digests, asked, parent, space, coding, forms)
        elif any(forms):
            sizes = [plan.size_bytes for plan in plans]
            heads = self._cache.heads
            into = self._space_for(coding, space)
            vacancies = into.take_room(digests, parent=parent, heads=heads, sizes=sizes)
            wanted = [
                Wanted(n, vacancy, form, is_first=not (parent or n))
                for n, (vacancy, form) in enumerate(zip(vacancies, forms, strict=True))
            ]
            with Storing(asked, into, coding) as storing:
                storing.run(wanted)
            report, left = report_of(vacancies, storing.volatile), storing.left
        for numbers in self._host_groups(left):
            report = report.plus(self._store_from_host(numbers, digests, asked, parent, space))
        return report._replace(refused=len(digests) - report.stored - report.present)

    def _store_measured(
        self,
        digests: Sequence[Digest],
        asked: Asked,
        parent: Digest | None,
        space: Space,
        coding: Coding,
        forms: Sequence[Form | None],
    ) -> tuple[StoreReport, list[int]]:
        """Encode chunks whose sizes are known behind that; return which are left to the host."""
        todo = [
            ToEncode(number, form, is_first=not (parent or number))
            for number, form in enumerate(forms)
            if form is not None and form.varies
        ]
        others = set(range(len(digests))) - {one.number for one in todo}
        line = Line(digests, parent, self._cache.heads)
        into = self._space_for(coding, space)
        with StoringMeasured(asked, into, coding, line) as storing:
            storing.run(todo)
        return storing.report, sorted({*storing.left, *others})

    def _space_for(self, coding: Coding, space: Space) -> Space:
        """Return where encoded chunks go. The host has to see a payload that it seals."""
        return space if coding.seals_payload else self._pooled.of(space)

    def _host_groups(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Cut *numbers* into runs of chunks that follow each other, and fit host memory."""
        most = max(1, ENCODE_SCRATCH_BYTES // self._layout.chunk_bytes)
        most = min(most, self._stores.chunks_per_transfer)
        start = 0
        for stop in range(1, len(numbers) + 1):
            if stop == len(numbers) or numbers[stop] != numbers[stop - 1] + 1:
                yield from groups_of(numbers[start:stop], most)
                start = stop

    def _store_from_host(
        self,
        numbers: Sequence[int],
        digests: Sequence[Digest],
        asked: Asked,
        parent: Digest | None,
        space: Space,
    ) -> StoreReport:
        """Store the chunks *numbers* by way of host memory, encoded there."""
        first, stop = numbers[0], numbers[-1] + 1
        gathered = gather_to_host(asked.part(first, stop))
        if gathered is None:
            return NOTHING_STORED
        report = space.store(
            digests[first:stop],
            gathered,
            parent=digests[first - 1] if first else parent,
            heads=self._cache.heads,
            coding=self._cache.coding,
        )
        self.counters.host_encoded_chunks += report.stored
        return report
