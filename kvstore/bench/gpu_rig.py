"""What `kvstore bench gpu` measures with: pages on a device, memory like the arena, and lanes."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from kvstore.bench.report import Verdict
from kvstore.client.gpu_steps import groups_of, pipeline
from kvstore.compression.chunks import ChunkCodec
from kvstore.compression.container import POSITION_MAX
from kvstore.errors import InternalError, UnavailableError
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import Copy, Fence, Urgency, host_bytes, wait_for
from kvstore.gpu.lanes import LaneSettings, LoadLane, StoreLane
from kvstore.gpu.pages import PageLayout
from kvstore.gpu.transfers import Moved
from kvstore.gpu.windows import Windows
from kvstore.hashing import block_digests, chunk_digests
from kvstore.protocol.manifest import Manifest
from kvstore.transfer.arena import Arena
from kvstore.transfer.native import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.bench.report import Figures
    from kvstore.client.gpu import DeviceCache
    from kvstore.client.sync import Space
    from kvstore.compression.policy import CodecPolicy
    from kvstore.compression.shapes import Bytes
    from kvstore.gpu.device import Device, Memory, Stream
    from kvstore.gpu.lanes import Lane
    from kvstore.gpu.transfers import Transfer
    from kvstore.types import Digest

ENGINE_STREAM: Final = 0
"""CUDA's default stream: the bench has no engine."""
_SEED: Final = 7
_PATIENCE_SECONDS: Final = 20.0
_REASON_CHARACTERS_MAX: Final = 200
_CALL_CHUNKS: Final = 32
_CALLS_A_ROUND: Final = 20


@dataclass(frozen=True, slots=True)
class GpuShape:
    """A model's KV, K and V in one row as FlashAttention has them, and how much of it is moved."""

    name: str
    layers: int
    heads: int
    head_dim: int
    page_tokens: int
    pages_per_chunk: int
    chunks: int

    @property
    def row_bytes(self) -> int:
        """K or V of one token of one head, in bfloat16."""
        return self.head_dim * 2

    @property
    def page_bytes(self) -> int:
        """One layer of one page, K and V."""
        return self.heads * self.page_tokens * self.row_bytes * 2

    def layout(self, base: int) -> PageLayout:
        """Return the layout of pages `[layer][page][token][head][k|v]` from *base* on."""
        layer_bytes = self.chunks * self.pages_per_chunk * self.page_bytes
        return PageLayout(
            planes=tuple(
                base + layer * layer_bytes + side * self.row_bytes
                for layer in range(self.layers)
                for side in range(2)
            ),
            heads=self.heads,
            page_tokens=self.page_tokens,
            pages_per_chunk=self.pages_per_chunk,
            row_bytes=self.row_bytes,
            page_stride=self.page_bytes,
            token_stride=self.heads * 2 * self.row_bytes,
            head_stride=2 * self.row_bytes,
        )

    def manifest(self, codec: str) -> Manifest:
        """Return what a namespace of such chunks is called."""
        return Manifest(
            model="bench",
            revision="1",
            dtype="bfloat16",
            layers=self.layers,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            chunk_tokens=self.page_tokens * self.pages_per_chunk,
            codec=codec,
        )

    def digests(self) -> list[Digest]:
        """Return the digests of one prompt of so many chunks."""
        chunk_tokens = self.page_tokens * self.pages_per_chunk
        return chunk_digests(list(range(self.chunks * chunk_tokens)), chunk_tokens)

    def paged_layout(self, base: int, page_bytes: int) -> PageLayout:
        """Return the layout of the same memory cut into pages of one piece each."""
        row = min(page_bytes, 1024)
        return PageLayout(
            planes=(base,),
            heads=1,
            page_tokens=page_bytes // row,
            pages_per_chunk=self.layout(0).chunk_bytes // page_bytes,
            row_bytes=row,
            page_stride=page_bytes,
            token_stride=row,
            head_stride=page_bytes,
        )


class Rig:
    """Two sets of pages on a device, and registered memory for all their chunks."""

    def __init__(self, device: Device, shape: GpuShape) -> None:
        """Raise `UnavailableError` when the memory cannot be registered: floors need all of it."""
        self.device = device
        self.shape = shape
        self.counters = DeviceCounters()
        self.chunk_bytes = shape.layout(0).chunk_bytes
        self.total_bytes = shape.chunks * self.chunk_bytes
        self.first = device.allocate(self.total_bytes)
        self.second = device.allocate(self.total_bytes)
        self.arena = Arena.create(max(2 * self.total_bytes, 1 << 20), huge_pages=False)
        while self.arena.prefault_step():
            pass
        self.base = address_of(self.arena.view)
        self.windows = Windows(
            device, self.base, self.arena.size_bytes, owner=self.arena, counters=self.counters
        )
        started_at = time.perf_counter()
        self.windows.start()
        self.windows.wait()
        self.register_seconds = time.perf_counter() - started_at
        found, needed = self.windows.registered_bytes, self.arena.size_bytes
        if found < needed:
            self.__exit__()
            raise UnavailableError(
                f"{needed} bytes of memory could not be registered, only {found}:"
                " raise the limit of locked memory (ulimit -l)"
            )
        order = np.random.default_rng(_SEED).permutation(shape.chunks * shape.pages_per_chunk)
        self.pages: list[list[int]] = order.reshape(shape.chunks, -1).tolist()
        self._fill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.windows.close()
        self.first.free()
        self.second.free()
        self.arena.close()

    def _fill(self) -> None:
        """Put noise into the first pages, by way of the arena: numbers from one to two.

        What codecs make of numbers is of one length, whatever they are; infinities have none.
        """
        self.noise = np.random.default_rng(_SEED).integers(0, 256, self.total_bytes, np.uint8)
        bits = self.noise.view("<u2")
        bits &= 0x807F
        bits |= 0x3F80
        host_bytes(self.base, self.total_bytes)[:] = self.noise
        stream = self.device.stream(Urgency.HIGH)
        stream.copy(self.flat(self.first, to_device=True))
        wait_for(stream.record())

    def flat(self, memory: Memory, *, to_device: bool, half: int = 0) -> list[Copy]:
        """Return plain copies, as large as chunks, between *memory* and a half of the arena."""
        size = self.chunk_bytes
        host = self.base + half * self.total_bytes
        copies = []
        for start in range(0, self.total_bytes, size):
            for run in self.windows.pinned_runs(host + start, size):
                at = memory.address + run.address - host
                ends = (at, run.address) if to_device else (run.address, at)
                copies.append(Copy(*ends, run.size_bytes))
        return copies

    def moved(self, half: int = 0) -> list[Moved]:
        """Return all chunks, with places in a half of the arena."""
        size = self.chunk_bytes
        start = self.base + half * self.total_bytes
        return [Moved(pages, start + n * size) for n, pages in enumerate(self.pages)]

    def inside(self) -> list[Moved]:
        """Return all chunks, with places in the memory of the second pages."""
        size, start = self.chunk_bytes, self.second.address
        return [
            Moved(pages, start + n * size, on_device=True) for n, pages in enumerate(self.pages)
        ]

    def paged(self, page_bytes: int) -> list[Moved]:
        """Return all chunks in pages of *page_bytes*, in no order, with places in the arena."""
        count = self.total_bytes // page_bytes
        order = np.random.default_rng(_SEED).permutation(count).reshape(self.shape.chunks, -1)
        starts = range(self.base, self.base + self.total_bytes, self.chunk_bytes)
        return [Moved(*one) for one in zip(order.tolist(), starts, strict=True)]

    def lane(
        self, kind: type[Lane], memory: Memory, *, page_bytes: int = 0, direct: bool = False
    ) -> Lane:
        """Return a lane between *memory*, or pages of one piece each in it, and the arena."""
        base = memory.address
        layout = (
            self.shape.paged_layout(base, page_bytes) if page_bytes else self.shape.layout(base)
        )
        settings = LaneSettings(
            staging_bytes=max(LaneSettings().staging_bytes, 4 * layout.chunk_bytes),
            direct_page_min_bytes=1 if direct else None,
        )
        return kind(self.device, layout, self.windows, self.counters, settings)

    def speed(self, rounds: int, call: Callable[[], object], times: int = 1) -> float:
        """Return bytes a second, in GB, of a call that moves all chunks so many *times*."""
        return times * self.total_bytes / median_seconds(rounds, call) / 1e9

    def check(self) -> None:
        """Store the first pages, load them into the second, and store those.

        Raises `InternalError` unless the bytes are the right ones each time.
        """
        halves = [
            host_bytes(self.base + half * self.total_bytes, self.total_bytes) for half in (0, 1)
        ]
        halves[0][:] = 0
        store = self.lane(StoreLane, self.first)
        digests = run_lane(store, self.moved())
        _require(np.array_equal(halves[0], self.expected()), "chunks are not what the pages hold")
        size = self.chunk_bytes
        for number, found in enumerate(digests):
            chunk = halves[0][number * size : (number + 1) * size]
            _require(np.array_equal(found, block_digests(chunk.data)), "digests are wrong")
        run_lane(store, self.inside())
        run_copies(
            self.device.stream(Urgency.HIGH), self.flat(self.second, to_device=False, half=1)
        )
        _require(np.array_equal(halves[0], halves[1]), "chunks on the device are other ones")
        load, again = self.lane(LoadLane, self.second), self.lane(StoreLane, self.second)
        run_lane(load, self.moved())
        run_lane(again, self.moved(1))
        _require(np.array_equal(halves[0], halves[1]), "pages are not what the chunks hold")
        for lane in (store, load, again):
            lane.close()

    def expected(self, held: Bytes | None = None) -> Bytes:
        """Return the plain chunks that the first pages hold, or pages that hold what is *held*."""
        shape = self.shape
        form = (shape.layers, -1, shape.page_tokens, shape.heads, 2, shape.row_bytes)
        pages = (self.noise if held is None else held).reshape(form)
        chunks = [pages[:, chosen].transpose(0, 4, 3, 1, 2, 5).reshape(-1) for chosen in self.pages]
        return np.concatenate(chunks)


def check_stored(rig: Rig, space: Space, policy: CodecPolicy, digests: Sequence[Digest]) -> None:
    """Raise `InternalError` unless the daemon holds what the host would have stored.

    Of the first chunks and the last; errors in section tables may differ in their last bits.
    """
    size = rig.chunk_bytes
    chosen = sorted({0, 1, len(digests) - 1})
    plain, heads = rig.expected(), space.manifest.all_heads
    with space.load(digests) as loaded:
        for number in chosen:
            found = np.frombuffer(loaded.chunks[number].shards[0].view, dtype=np.uint8)
            chunk = plain[number * size : (number + 1) * size]
            start, expected = 0, chunk
            if policy.codec != "raw":
                codec, position = ChunkCodec(space.manifest, policy), POSITION_MAX * (number > 0)
                expected = np.empty(codec.encoded_size(heads, first_position=position), np.uint8)
                report = codec.encode(chunk.data, expected.data, heads, first_position=position)
                expected = expected[: report.size_bytes]
                start = codec.plan(heads, first_position=position).header.payload_offset
            _require(np.array_equal(found[start:], expected[start:]), "chunks are encoded wrong")


def _require(is_right: bool, what: str) -> None:
    if not is_right:
        raise InternalError(what)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return once *condition* holds; raises `UnavailableError` when *what* takes too long."""
    ends_at = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > ends_at:
            raise UnavailableError(f"{what}: not after {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.005)


def wait_until_registered(on_gpu: DeviceCache, space: Space) -> None:
    """Return once the device reaches the whole arena, or cannot; a transfer must have begun it."""
    size, counters = space.attached.arena.size_bytes, on_gpu.counters
    wait_until(
        lambda: on_gpu.registered_bytes == size or counters.registrations_failed > 0,
        "the registration of the arena",
    )


def run_lane(lane: Lane, chunks: Sequence[Moved], *, checksums: bool = True) -> list[Any]:
    """Move *chunks* as the client does; return their digests."""
    fence = None
    found: list[Any] = []

    def begin(group: list[Moved]) -> Transfer:
        return lane.begin(group, fence, checksums=checksums)

    def end(transfer: Transfer, _: list[Moved]) -> bool:
        digests = transfer.finish()
        found.extend(() if digests is None else digests)
        return True

    def drop(transfer: Transfer, _: list[Moved]) -> None:
        transfer.finish()

    most = lane.capacity(lane.plain, on_device=chunks[0].on_device)
    pipeline(lane, groups_of(chunks, most), begin, end, drop)
    return found


def run_copies(stream: Stream, copies: Sequence[Copy]) -> None:
    """Move *copies* and wait for them."""
    stream.copy(copies)
    wait_for(stream.record())


def together(*calls: Callable[[], object]) -> None:
    """Run *calls* at once, each in a thread of its own; raises what one of them raised."""
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def median_seconds(rounds: int, call: Callable[[], object]) -> float:
    """Return the median of *rounds* calls, after one that does not count."""
    call()
    taken = []
    for _ in range(rounds):
        started_at = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken)


def host_microseconds(rig: Rig, rounds: int) -> tuple[float, float]:
    """Return what a store costs the engine's thread, and what a begun transfer costs ours.

    The engine's thread takes a fence and hands on digests and pages; all else is another's.
    """
    device, given = rig.device, SimpleQueue[Any]()
    digests, pages = list(range(_CALL_CHUNKS)), [list(some) for some in rig.pages[:_CALL_CHUNKS]]

    def call() -> None:
        given.put((digests, pages, Fence.of(device.engine_stream(ENGINE_STREAM))))

    called = median_seconds(rounds * _CALLS_A_ROUND, call)
    lane = rig.lane(StoreLane, rig.first)
    chunks = rig.moved()[: lane.chunks_per_transfer]
    begun: list[float] = []

    def once() -> None:
        started_at = time.perf_counter()
        transfer = lane.begin(chunks, None)
        begun.append(time.perf_counter() - started_at)
        transfer.finish()

    median_seconds(rounds, once)
    lane.close()
    return called * 1e6, statistics.median(begun[1:]) * 1e6


def speed_row(
    shape: GpuShape,
    what: str,
    speed: float,
    floor: str,
    floor_speed: float,
    target: float | None = None,
) -> Figures:
    """Return a row of the table: GB/s beside a floor, judged where there is a target."""
    ratio = speed / floor_speed
    row: Figures = {
        "shape": shape.name,
        "what": what,
        "gb_per_s": speed,
        "floor": floor,
        "floor_gb_per_s": floor_speed,
        "ratio": ratio,
        "target": target,
    }
    if target is not None:
        row["verdict"] = Verdict(what, target, ratio, "more").word
    return row


def last_words(error: Exception) -> str:
    """Return why there is no figure, as a cell of a table."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].replace("|", "/")[-_REASON_CHARACTERS_MAX:]
