"""An engine with pages on a device, host memory beside it, and what may go wrong between them.

The scenes are the same on the stand-in and on a GPU: the engine "computes" by copying prepared
contents to its pages in its own stream, so no kernel of its own is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvstore.client.gpu_forms import Forms
from kvstore.compression.chunks import ChunkCodec, decode
from kvstore.compression.container import next_section, open_container
from kvstore.compression.floats import narrow
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.shapes import SourceType
from kvstore.gpu.batches import SPAN
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import Copy, Device, Fence, Memory, StuckError, host_bytes
from kvstore.gpu.lanes import Lane, LaneSettings
from kvstore.gpu.pages import PageLayout
from kvstore.gpu.standin import Standin
from kvstore.gpu.transfers import Moved, Transfer
from kvstore.gpu.windows import Windows
from kvstore.hashing import block_digests
from tests.support.making import make_manifest

ENGINE = 0
"""CUDA's default stream: a handle that a GPU knows, too."""
PLANES, HEADS, TOKENS, ROW, PAGES = 2, 2, 4, 32, 12
PAGES_PER_CHUNK = 2
RUBBISH = 0xEE


class World:
    """Pages of a small engine, and an arena of eight chunks."""

    def __init__(
        self,
        device: Device,
        seed: int = 0,
        *,
        registered: bool = True,
        window_bytes: int = 0,
        put: Callable[[int, np.ndarray], None] | None = None,
        get: Callable[[int, int], np.ndarray] | None = None,
        codec: str = "raw",
    ) -> None:
        self.device = device
        self.codec = codec
        self.rng = np.random.default_rng(seed)
        self.put = put or self._put
        self.get = get or (lambda address, size: host_bytes(address, size).copy())
        self.compute = device.engine_stream(ENGINE)
        page = HEADS * TOKENS * ROW
        self.page_bytes = page
        self.pages = device.allocate(PLANES * PAGES * page)
        self.layout = PageLayout(
            planes=tuple(self.pages.address + plane * PAGES * page for plane in range(PLANES)),
            heads=HEADS,
            page_tokens=TOKENS,
            pages_per_chunk=PAGES_PER_CHUNK,
            row_bytes=ROW,
            page_stride=page,
            token_stride=ROW,
            head_stride=TOKENS * ROW,
        )
        self.manifest = make_manifest(
            layers=PLANES // 2,
            kv_heads=HEADS,
            head_dim=ROW // 2,
            chunk_tokens=PAGES_PER_CHUNK * TOKENS,
            codec=codec,
        )
        self._heads = self.manifest.all_heads
        size = self.layout.chunk_bytes
        forms = Forms(self.layout, self.manifest, self._heads, size_max_bytes=2 * size)
        self._chunk_codec = ChunkCodec(
            self.manifest, CodecPolicy(codec=codec, edge_layers=0, sinks=1)
        )
        self._plan = self._chunk_codec.plan(self._heads)
        found = forms.plain if codec == "raw" else forms.of_plan(self._plan)
        assert found is not None, "kernels have the codec"
        self.form = found
        self.place_bytes = max(size, found.size_bytes)
        self._kept: list[Memory] = []
        self._room = np.full(8 * self.place_bytes + 4096, RUBBISH, np.uint8)
        skip = -self._room.ctypes.data % 4096
        self.arena = self._room[skip : skip + 8 * self.place_bytes]
        self.counters = DeviceCounters()
        # By default windows end inside chunks. A GPU registers whole pages.
        self.windows = Windows(
            device,
            self.arena.ctypes.data,
            self.arena.nbytes,
            owner=self.arena,
            counters=self.counters,
            step_bytes=window_bytes or self.layout.chunk_bytes + 256,
        )
        if registered:
            self.windows.start()
            self.windows.wait()

    @staticmethod
    def _put(address: int, content: np.ndarray) -> None:
        host_bytes(address, content.nbytes)[:] = content.view(np.uint8).ravel()

    # --- what an engine does ---------------------------------------------------------------

    def content(self) -> np.ndarray:
        """Return what a chunk may hold, `[plane][head][token][byte]`."""
        shape = (PLANES, HEADS, PAGES_PER_CHUNK * TOKENS, ROW)
        if self.codec == "raw":
            return self.rng.integers(0, 256, shape, dtype=np.uint8)
        values = self.rng.standard_normal((*shape[:3], ROW // 2)).astype(np.float32)
        return narrow(values, SourceType.BFLOAT16).view(np.uint8)

    def stored(self, content: np.ndarray) -> tuple[np.ndarray, list[float]]:
        """Return what *content* is stored as, and the relative errors of its sections."""
        if self.codec == "raw":
            return content.ravel(), []
        room = np.full(self.form.size_bytes, RUBBISH, np.uint8)
        report = self._chunk_codec.encode(content.ravel().data, room.data, self._heads)
        errors = [section.relative_error for section in report.sections]
        return room[: report.size_bytes], errors

    def decoded(self, stored: np.ndarray) -> np.ndarray:
        """Return what pages hold once *stored* was loaded."""
        made = np.empty((PLANES, HEADS, PAGES_PER_CHUNK * TOKENS, ROW), np.uint8)
        if self.codec == "raw":
            made[...] = stored.reshape(made.shape)
        else:
            decode(self.manifest, stored.data, made.data, self._heads)
        return made

    def page_address(self, plane: int, page: int) -> int:
        return self.layout.planes[plane] + page * self.page_bytes

    def prepare(self, content: np.ndarray, pages: list[int]) -> list[Copy]:
        """Put *content* on the device; return the copies that make it that of *pages*."""
        made = self.device.allocate(content.nbytes)
        self._kept.append(made)
        parts = content.reshape(PLANES, HEADS, PAGES_PER_CHUNK, TOKENS, ROW)
        paged = np.ascontiguousarray(parts.transpose(0, 2, 1, 3, 4))
        self.put(made.address, paged)
        return [
            Copy(
                self.page_address(plane, page),
                made.address + (plane * PAGES_PER_CHUNK + number) * self.page_bytes,
                self.page_bytes,
            )
            for plane in range(PLANES)
            for number, page in enumerate(pages)
        ]

    def write(self, content: np.ndarray, pages: list[int]) -> None:
        """Have the engine compute *content* into *pages*, when it gets to it."""
        self.compute.copy(self.prepare(content, pages))

    def watch(self, pages: list[int]) -> Memory:
        """Have the engine read *pages*, when it gets to it; return where it leaves them."""
        made = self.device.allocate(self.layout.chunk_bytes)
        self._kept.append(made)
        copies = self.prepare(np.zeros_like(self.content()), pages)
        base = copies[0].source
        self.compute.copy(
            [
                Copy(made.address + copy.source - base, copy.target, copy.size_bytes)
                for copy in copies
            ]
        )
        return made

    def fence(self) -> Fence:
        return Fence.of(self.compute)

    def chunk_in(self, pages: list[int]) -> np.ndarray:
        """Return what *pages* hold now, as a chunk."""
        found = np.stack(
            [
                np.stack(
                    [self.get(self.page_address(plane, page), self.page_bytes) for page in pages]
                )
                for plane in range(PLANES)
            ]
        ).reshape(PLANES, PAGES_PER_CHUNK, HEADS, TOKENS, ROW)
        return found.transpose(0, 2, 1, 3, 4).reshape(PLANES, HEADS, -1, ROW)

    # --- host memory --------------------------------------------------------------------------

    def place(self, number: int) -> np.ndarray:
        """Return the bytes of place *number* of the arena."""
        size = self.place_bytes
        return self.arena[number * size : (number + 1) * size]

    def moved(self, pages: list[int], number: int) -> Moved:
        """Return a chunk of *pages*, and of place *number* as it is there, if its form varies."""
        place = self.place(number)
        if not self.form.varies or place[0] == RUBBISH:
            return Moved(pages, place.ctypes.data)
        found = open_container(place.data)
        spans = np.array([(one.offset, one.size_bytes) for one in found.sections], dtype=SPAN)
        size = next_section(int((spans["offset"] + spans["size"]).max()))
        return Moved(pages, place.ctypes.data, size_bytes=size, spans=spans)

    def lane(self, kind: type[Lane], settings: LaneSettings) -> Lane:
        return kind(self.device, self.layout, self.windows, self.counters, settings)


def settings(
    *, direct: bool = False, slots: int = 2, chunks: int = 2, patience: int | None = None
) -> LaneSettings:
    """Return settings of a lane with few and small slots, that gives up after *patience* polls."""
    chunk = PLANES * HEADS * PAGES_PER_CHUNK * TOKENS * ROW

    def wait(event: Any) -> None:
        polls = 0
        while not event.is_done():
            polls += 1
            if patience is not None and polls > patience:
                raise StuckError("no patience left")

    return LaneSettings(
        staging_bytes=slots * chunks * chunk,
        slots=slots,
        direct_page_min_bytes=1 if direct else None,
        wait=wait,
    )


def errors_of(reports: np.ndarray) -> np.ndarray:
    """Return the relative errors that the sections of one chunk were reported to have."""
    return np.sqrt(reports["error"] / np.maximum(reports["energy"], 1e-30))


# --- scenes: each returns whether every byte is as it must be -----------------------------------


def store_scene(world: World, lane: Lane, *, reuse_waits: bool = True, transfers: int = 4) -> bool:
    """Store what is being computed, a transfer begun before the last is finished.

    The engine overwrites pages as soon as it may; the host reads the arena as soon as it may.
    """
    begun: list[tuple[Transfer, list[tuple[np.ndarray, int]]]] = []
    good, head, size = True, world.form.head_bytes, world.form.size_bytes

    def finish() -> bool:
        transfer, expected = begun.pop(0)
        digests = transfer.finish()
        assert digests is not None
        ok = True
        for number, (content, place) in enumerate(expected):
            stored, errors = world.stored(content)
            ok &= bool(np.array_equal(world.place(place)[head:size], stored[head:]))
            if transfer.reports is None:
                ok &= bool(np.array_equal(digests[number], block_digests(stored.tobytes())))
            else:
                ok &= np.allclose(errors_of(transfer.reports[number]), errors, rtol=1e-2)
            world.place(place)[:] = RUBBISH  # sent to a tier, evicted, and used again
        return ok

    for number in range(transfers):
        chosen = world.rng.permutation(PAGES)[: 2 * PAGES_PER_CHUNK].reshape(2, -1).tolist()
        contents = [world.content() for _ in chosen]
        for content, pages in zip(contents, chosen, strict=True):
            world.write(content, pages)
        if not lane.can_begin:
            good &= finish()
        places = [(2 * number) % 8, (2 * number + 1) % 8]
        chunks = [world.moved(pages, at) for pages, at in zip(chosen, places, strict=True)]
        transfer = lane.begin(chunks, world.fence(), form=world.form)
        begun.append((transfer, list(zip(contents, places, strict=True))))
        if reuse_waits:
            event = transfer.pages_free or transfer.done
            assert event is not None
            world.compute.wait(event)
        for pages in chosen:
            world.write(world.content(), pages)
    while begun:
        good &= finish()
    return good


def reports_scene(world: World, lane: Lane) -> bool:
    """Store one chunk, and look at nothing but what its encoders reported."""
    content = world.content()
    world.write(content, [1, 2])
    transfer = lane.begin([world.moved([1, 2], 0)], world.fence(), form=world.form)
    transfer.finish()
    assert transfer.reports is not None
    return np.allclose(errors_of(transfer.reports[0]), world.stored(content)[1], rtol=1e-2)


def load_scene(world: World, lane: Lane, *, transfers: int = 4) -> bool:
    """Load into pages that the engine still reads; the arena is used again as soon as it may be."""
    good = True
    begun: list[tuple[Transfer, list[np.ndarray], list[Any], list[int]]] = []

    def finish() -> bool:
        transfer, contents, watched, places = begun.pop(0)
        digests = transfer.finish()
        assert digests is not None
        for place in places:
            world.place(place)[:] = RUBBISH  # the lease ends, and something evicts it
        ok = True
        for number, stored in enumerate(contents):
            found = transfer.digests_of(number)
            ok &= bool(np.array_equal(found, block_digests(stored.tobytes())))
        if transfer.reports is not None:
            ok &= not transfer.reports["broken"].any()
        for pages, stored, seen, before in watched:
            ok &= bool(np.array_equal(world.chunk_in(pages), world.decoded(stored)))
            held = world.get(seen.address, world.layout.chunk_bytes)
            paged = before.reshape(PLANES, HEADS, PAGES_PER_CHUNK, TOKENS, ROW)
            ok &= bool(np.array_equal(held, paged.transpose(0, 2, 1, 3, 4).ravel()))
        return ok

    for number in range(transfers):
        # Pages of their own for each two transfers: what is begun twice is not the engine's way.
        pool = world.rng.permutation(PAGES // 2) + number % 2 * (PAGES // 2)
        chosen = pool[: 2 * PAGES_PER_CHUNK].reshape(2, -1).tolist()
        places = [(2 * number) % 8, (2 * number + 1) % 8]
        if not lane.can_begin:
            good &= finish()
        contents, watched, chunks = [], [], []
        for pages, place in zip(chosen, places, strict=True):
            before, (stored, _) = world.content(), world.stored(world.content())
            world.write(before, pages)
            world.place(place)[: stored.size] = stored
            watched.append((pages, stored, world.watch(pages), before))
            contents.append(stored)
            chunks.append(world.moved(pages, place))
        transfer = lane.begin(chunks, world.fence(), form=world.form)
        begun.append((transfer, contents, watched, places))
    while begun:
        good &= finish()
    return good


def abandoned_load_scene(world: World, lane: Lane, device: Standin) -> bool:
    """Give up a load that is stuck; the engine computes its pages instead, and keeps them."""
    pages = [3, 5]
    content, own = world.content(), world.content()
    world.place(0)[:] = content.ravel()
    ours = [stream for stream in device.streams if stream is not world.compute]
    if world.rng.integers(2):
        device.stall(*ours)
    transfer = lane.begin([world.moved(pages, 0)], world.fence())
    device.stall(*ours)
    try:
        transfer.finish()
    except StuckError:
        world.write(own, pages)
    else:
        own = content
    for _ in range(20):
        device.get_on()
    device.resume()
    device.drain()
    return bool(np.array_equal(world.chunk_in(pages), own))


def abandoned_store_scene(world: World, lane: Lane, device: Standin) -> bool:
    """Give up a store that is stuck; its room is used again when it is over, not before."""
    if world.rng.integers(2):
        device.stall()
    transfer = lane.begin([world.moved([1, 2], 0)], world.fence())
    device.stall()
    try:
        transfer.finish()
    except StuckError:
        polls = 0
        while not transfer.is_over():
            polls += 1
            if polls == 10:
                device.resume()
    kept = world.content().ravel()
    world.place(0)[:] = kept
    device.resume()
    device.drain()
    return bool(np.array_equal(world.place(0), kept)) and lane.stuck == 0
