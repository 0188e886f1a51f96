"""Pages go the way that was measured to be faster: staged, or one by one by the copy engine.

The stand-in's time is what the test says that copies and kernels take.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import DeviceError, Fence
from kvstore.gpu.lanes import Lane, LaneSettings, LoadLane, StoreLane
from kvstore.gpu.pages import NOWHERE, PageLayout
from kvstore.gpu.standin import Standin, StandinEvent, StandinMemory
from kvstore.gpu.transfers import Moved
from kvstore.gpu.twins import TWINS
from kvstore.gpu.ways import MEASURED, Least, Trial
from kvstore.gpu.windows import AllPinned
from kvstore.limits import (
    DIRECT_PAGE_MIN_BYTES,
    KIB,
    MIB,
    TRIED_TRANSFER_MIN_BYTES,
    TRIED_TRANSFERS,
)

CHUNKS = 4
ENOUGH = 3 * TRIED_TRANSFERS + 2
"""More transfers than a trial takes: of four in a row, three count."""


class Timed(Standin):
    """A device at which every copy and every kernel takes as long as it is told."""

    def __init__(self, *, copy_seconds: float, kernel_seconds: float) -> None:
        self.now = 0.0
        super().__init__(np.random.default_rng(0), eager=True, clock=lambda: self.now)
        self._copy_seconds = copy_seconds
        moving = [name for name in TWINS if name.endswith(("_gather", "_scatter"))]
        slow = {name: self._slow(name, kernel_seconds) for name in moving}
        self.twins = {**self.twins, **slow}

    def pieces_of(self, copies):
        def take() -> None:
            self.now += self._copy_seconds * len(copies)

        return [take, *super().pieces_of(copies)]

    def _slow(self, name: str, seconds: float):
        def twin(batch, memory_at) -> list:
            self.now += seconds
            return TWINS[name](batch, memory_at)

        return twin


class Scene:
    """A lane over pages of one length, each in one piece, and host memory for a transfer."""

    def __init__(self, device: Standin, kind: type[Lane], page_bytes: int, least: Least) -> None:
        pages = max(2, TRIED_TRANSFER_MIN_BYTES // (CHUNKS * page_bytes))
        self.device = device
        self.pages = device.allocate(CHUNKS * pages * page_bytes)
        self.layout = PageLayout(
            planes=(self.pages.address,),
            heads=1,
            page_tokens=16,
            pages_per_chunk=pages,
            row_bytes=page_bytes // 16,
            page_stride=page_bytes,
            token_stride=page_bytes // 16,
            head_stride=page_bytes,
        )
        size = self.layout.chunk_bytes
        self.host = device.pin(CHUNKS * size)
        assert isinstance(self.pages, StandinMemory)
        assert isinstance(self.host, StandinMemory)
        numbers = np.arange(CHUNKS * pages).reshape(CHUNKS, pages).tolist()
        self.chunks = [Moved(some, self.host.address + n * size) for n, some in enumerate(numbers)]
        self.counters = DeviceCounters()
        settings = LaneSettings(4 * CHUNKS * size, 4, direct_page_min_bytes=least)
        self.lane = kind(device, self.layout, AllPinned(), self.counters, settings)

    def move(self, count: int = ENOUGH, chunks: list[Moved] | None = None) -> int:
        """Move all chunks *count* times; return how many of the last went directly."""
        before = 0
        for _ in range(count):
            before = self.counters.direct_chunks
            self.lane.begin(chunks or self.chunks, None, checksums=False).finish()
        return self.counters.direct_chunks - before


@pytest.fixture(params=[StoreLane, LoadLane])
def kind(request: pytest.FixtureRequest) -> Iterator[type[Lane]]:
    return request.param


@pytest.mark.parametrize(
    ("page_bytes", "copy_seconds", "kernel_seconds", "expected"),
    [
        (32 * KIB, 0.001, 1.0, CHUNKS),  # calls for each page cost little
        (DIRECT_PAGE_MIN_BYTES, 1.0, 0.001, 0),  # and much, whatever the fixed number says
    ],
)
def test_a_lane_goes_the_way_that_was_faster(
    kind, page_bytes, copy_seconds, kernel_seconds, expected
) -> None:
    device = Timed(copy_seconds=copy_seconds, kernel_seconds=kernel_seconds)
    scene = Scene(device, kind, page_bytes, MEASURED)
    content = np.random.default_rng(1).integers(0, 256, scene.pages.size_bytes, np.uint8)
    ends = [scene.pages, scene.host] if kind is StoreLane else [scene.host, scene.pages]
    ends[0].view[:] = content
    assert scene.move() == expected
    assert scene.counters.direct_chunks < ENOUGH * CHUNKS
    assert np.array_equal(ends[1].view, content)
    before = scene.counters.direct_chunks
    scene.move(3)
    assert scene.counters.direct_chunks - before == 3 * expected


def test_what_a_transfer_waits_for_the_engine_does_not_count(kind) -> None:
    device = Timed(copy_seconds=0.001, kernel_seconds=1.0)
    scene = Scene(device, kind, 32 * KIB, MEASURED)
    engine = device.engine_stream(0)
    for number in range(ENOUGH):
        # Those that go directly are given while the engine is busy, and for long.
        is_direct = number % 8 > 3
        if is_direct:
            device.stall(engine)
        transfer = scene.lane.begin(scene.chunks, Fence.of(engine), checksums=False)
        if is_direct:
            device.now += 1000.0
            device.resume()
        transfer.finish()
    assert scene.move(1) == CHUNKS


@pytest.mark.parametrize(
    ("page_bytes", "least", "expected"),
    [
        (64 * KIB, 64 * KIB, CHUNKS),
        (32 * KIB, 64 * KIB, 0),
        (512 * KIB, None, 0),
        (1 * KIB, 1, CHUNKS),
    ],
)
def test_a_number_overrides_what_is_measured(kind, page_bytes, least, expected) -> None:
    device = Timed(copy_seconds=1.0, kernel_seconds=1.0)
    scene = Scene(device, kind, page_bytes, least)
    scene.move(3)
    assert scene.counters.direct_chunks == 3 * expected


@pytest.mark.parametrize("page_bytes", [64 * KIB, DIRECT_PAGE_MIN_BYTES])
def test_without_times_a_fixed_number_decides(kind, page_bytes, monkeypatch) -> None:
    def refuse(*_: object) -> float:
        raise DeviceError("events have no times")

    monkeypatch.setattr(StandinEvent, "seconds_since", refuse)
    scene = Scene(Timed(copy_seconds=1.0, kernel_seconds=1.0), kind, page_bytes, MEASURED)
    assert scene.move() == (CHUNKS if page_bytes >= DIRECT_PAGE_MIN_BYTES else 0)


def test_what_tells_nothing_is_not_tried(kind) -> None:
    device = Timed(copy_seconds=0.001, kernel_seconds=1.0)
    scene = Scene(device, kind, 32 * KIB, MEASURED)
    few = scene.chunks[:1]
    in_pool = [chunk._replace(on_device=True) for chunk in scene.chunks]
    torn = [chunk._replace(pages=[NOWHERE, *chunk.pages[1:]]) for chunk in scene.chunks]
    for chunks in (few, in_pool, torn):
        scene.move(8, chunks)
    small = Scene(device, kind, 8 * KIB, MEASURED)
    small.move(8)
    assert scene.counters.direct_chunks + small.counters.direct_chunks == 0
    # The first of four in a row that are staged is still to come.
    assert [scene.move(1) for _ in range(8)] == [0] * 4 + [CHUNKS] * 4
    assert scene.move() == CHUNKS
    # What was found out holds for small transfers, too.
    assert scene.move(1, few) == 1


def test_the_first_transfer_of_each_turn_does_not_count_and_a_tie_goes_directly() -> None:
    trial = Trial()
    ways = [trial.next() for _ in range(8)]
    assert [way.is_direct for way in ways] == [False] * 4 + [True] * 4
    assert [way.counts for way in ways] == [False, True, True, True] * 2
    for _ in range(TRIED_TRANSFERS):
        assert trial.is_direct is None
        trial.note(is_direct=False, seconds_per_byte=1.0 / MIB)
    for _ in range(TRIED_TRANSFERS - 1):
        trial.note(is_direct=True, seconds_per_byte=1.04 / MIB)
    assert trial.is_direct is None
    # One that was held up by something else decides nothing.
    trial.note(is_direct=True, seconds_per_byte=9.0 / MIB)
    assert trial.is_direct is True
    assert trial.next() == (True, False)
    trial.note(is_direct=True, seconds_per_byte=9.0 / MIB)
    assert trial.is_direct is True
