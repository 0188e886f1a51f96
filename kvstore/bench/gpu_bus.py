"""What `kvstore bench gpu` measures of the bus: plain copies, lanes beside them, and pages.

Floors are plain asynchronous copies between the same memory, in the same run.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from kvstore.bench.gpu_rig import (
    Rig,
    median_seconds,
    run_copies,
    run_lane,
    speed_row,
    together,
)
from kvstore.gpu.device import Copy, Urgency, wait_for
from kvstore.gpu.lanes import LoadLane, StoreLane
from kvstore.limits import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.bench.gpu_rig import GpuShape
    from kvstore.bench.report import Figures
    from kvstore.gpu.cuda_driver import BatchedCopies
    from kvstore.gpu.device import Device, Stream
    from kvstore.gpu.lanes import Lane

ONE_WAY_MIN: Final = 0.90
DUPLEX_MIN: Final = 0.85
INSIDE_MIN: Final = 0.80
_TIMES_INSIDE: Final = 16
"""How often all chunks are moved without a pause: once takes a GPU less than a host's call."""
PAGE_SIZES: Final = (16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, MIB, 4 * MIB)
_PAGED_CHUNKS_MAX: Final = 4
"""Chunks that are cut into pages of every size: there are many calls, and many pages."""
_AS_GOOD: Final = 0.95
"""What pages that skip staging may lack: they need no kernel beside the engine's."""
WAYS: Final = ("staged", "one by one", "batched")
_NO_BATCHES: Final = "this device has no batched copies"


def bus_rows(device: Device, shape: GpuShape, rounds: int) -> Iterator[Figures]:
    """Yield plain copies, then lanes beside them, once the lanes were checked."""
    with Rig(device, shape) as rig:
        rig.check()
        out, back = (device.stream(urgency) for urgency in (Urgency.LOW, Urgency.HIGH))
        down_copies = rig.flat(rig.first, to_device=False)
        up_copies = rig.flat(rig.second, to_device=True, half=1)
        down, up = partial(run_copies, out, down_copies), partial(run_copies, back, up_copies)
        across = Copy(rig.second.address, rig.first.address, rig.total_bytes)
        mixed = [copy for pair in zip_longest(down_copies, up_copies) for copy in pair if copy]
        speed = partial(rig.speed, rounds)
        with one_by_one(device, when=True):
            floors = {
                "pinned copy to the host": speed(down),
                "pinned copy to the device": speed(up),
                "both at once": speed(partial(together, down, up), 2),
                "copy on the device": speed(partial(run_copies, out, [across])),
            }
        for name, bare in floors.items():
            yield speed_row(shape, f"floor: {name}", bare, name, bare)
        shared = speed(partial(_in_turn, out, mixed), 2)
        yield speed_row(
            shape, "both, plain, in one stream", shared, "both at once", floors["both at once"]
        )
        yield from _lanes(rig, floors, speed)


def _in_turn(stream: Stream, copies: Sequence[Copy]) -> None:
    """Move *copies* one after the other, as what is stored and loaded shares a stream."""
    for copy in copies:
        stream.copy([copy])
    wait_for(stream.record())


def _lanes(rig: Rig, floors: dict[str, float], speed: Callable[..., float]) -> Iterator[Figures]:
    store, load = rig.lane(StoreLane, rig.first), rig.lane(LoadLane, rig.second)
    storing, loading = partial(run_lane, store, rig.moved()), partial(run_lane, load, rig.moved(1))
    run_lane(store, rig.moved(1))
    for what, call, floor, times, target in (
        ("store", storing, "pinned copy to the host", 1, ONE_WAY_MIN),
        ("load", loading, "pinned copy to the device", 1, ONE_WAY_MIN),
        ("both", partial(together, storing, loading), "both at once", 2, DUPLEX_MIN),
    ):
        found = speed(call, times)
        yield speed_row(rig.shape, f"{what}, gathered", found, floor, floors[floor], target)
    load.close()
    back, floor = rig.lane(LoadLane, rig.first), "copy on the device"
    for what, lane in (("store", store), ("load", back)):
        inside = partial(run_lane, lane, _TIMES_INSIDE * rig.inside())
        found, name = speed(inside, _TIMES_INSIDE), f"{what}, on the device"
        yield speed_row(rig.shape, name, found, floor, floors[floor], INSIDE_MIN)
    store.close()
    back.close()


# --- pages as they are ------------------------------------------------------------------------


def page_rows(device: Device, shape: GpuShape, rounds: int) -> Iterator[Figures]:
    """Yield a row for each size of pages that lie in one piece each: GB/s by way and direction."""
    with Rig(device, shape) as rig:
        for size in PAGE_SIZES:
            if rig.chunk_bytes % size == 0:
                yield {"page_kib": size // KIB} | dict(_page_speeds(rig, size, rounds))


def _page_speeds(rig: Rig, page_bytes: int, rounds: int) -> Iterator[tuple[str, float | None]]:
    for what, kind, memory in (("store", StoreLane, rig.first), ("load", LoadLane, rig.second)):
        for way in WAYS:
            name = f"{what}, {way}"
            batches = batches_of(rig.device)
            if way == "batched" and (batches is None or batches.off):
                yield name, None
                continue
            lane = rig.lane(kind, memory, page_bytes=page_bytes, direct=way != "staged")
            with one_by_one(rig.device, when=way == "one by one"):
                yield name, _page_speed(rig, lane, page_bytes, rounds)
            lane.close()


def _page_speed(rig: Rig, lane: Lane, page_bytes: int, rounds: int) -> float:
    chunks = rig.paged(page_bytes)[:_PAGED_CHUNKS_MAX]
    call = partial(run_lane, lane, chunks, checksums=False)
    return len(chunks) * rig.chunk_bytes / median_seconds(rounds, call) / 1e9


def batches_of(device: Device) -> BatchedCopies | None:
    """Return how *device* is given many copies at once, if it has a way to."""
    found: BatchedCopies | None = getattr(device, "copies", None)
    return found


def why_not_batched(device: Device) -> str:
    """Return why copies are given one by one; empty while they are not."""
    batches = batches_of(device)
    return _NO_BATCHES if batches is None else batches.off


@contextmanager
def one_by_one(device: Device, *, when: bool) -> Iterator[None]:
    """Have copies given one by one, as where the driver is older."""
    batches = batches_of(device)
    if batches is None or not when:
        yield
        return
    off = batches.off
    batches.off = off or "measured without"
    try:
        yield
    finally:
        batches.off = off


def break_even_kib(rows: Sequence[Figures], what: str) -> float | None:
    """Return from which size on pages do as well without staging; None: at no size measured."""
    found = None
    for row in sorted(rows, key=lambda row: int(row["page_kib"]), reverse=True):
        direct = max(row.get(f"{what}, {way}") or 0.0 for way in WAYS[1:])
        if direct < _AS_GOOD * row[f"{what}, staged"]:
            break
        found = float(row["page_kib"])
    return found
