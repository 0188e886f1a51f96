"""Pages that a device moves: in every layout, through host memory and straight to the daemon.

The device is the stand-in, which calls the pages of torch's CPU tensors its own.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.client.cache import PrefixCache
from kvstore.compression.twins import CODEC_TWINS
from kvstore.connectors.vllm_lanes import LaneMover, find_lane_mover, page_layout
from kvstore.connectors.vllm_layouts import KVGroup
from kvstore.connectors.vllm_metadata import NOWHERE, LoadJob, Span, StepMetadata, StoreJob
from kvstore.connectors.vllm_movers import chunk_shape
from kvstore.connectors.vllm_pages import GroupPages, checked_pages, self_test
from kvstore.connectors.vllm_tilings import amx_tiles, transposed_keys
from kvstore.connectors.vllm_transfers import Transfers, Urgency
from kvstore.connectors.vllm_worker import WorkerHalf
from kvstore.connectors.weights import UnsupportedError
from kvstore.gpu.device import DeviceLostError, Event, StuckError
from kvstore.gpu.lanes import StoreLane
from kvstore.gpu.standin import Fault, Standin
from kvstore.limits import STAGING_SIZE_BYTES
from tests.engine.vllm.test_layouts import (
    DIGESTS,
    FROM,
    LAYOUTS,
    TO,
    Kept,
    check_moved,
    group_of,
    pages_in,
)
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MakeMover = Callable[[KVGroup, Sequence[torch.Tensor]], LaneMover]


def on(device: Standin, staging_bytes: int = STAGING_SIZE_BYTES) -> MakeMover:
    def make(group: KVGroup, layers: Sequence[torch.Tensor]) -> LaneMover:
        for layer in layers:
            whole = layer.untyped_storage()
            device.adopt(whole.data_ptr(), whole.nbytes())
        return LaneMover(group, layers, device, lambda: 1, staging_bytes)

    return make


@pytest.fixture(params=range(3))
def device(request: pytest.FixtureRequest) -> Standin:
    return Standin(np.random.default_rng(request.param), twins=CODEC_TWINS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_opaque", [False, True], ids=["canonical", "opaque"])
def test_pages_of_every_layout_are_moved(device: Standin, layout: str, is_opaque: bool) -> None:
    group = group_of(tiling=None) if is_opaque else group_of()
    source, target = pages_in(layout, group, 1), pages_in(layout, group, 2)
    old, kept = [layer.clone() for layer in target], Kept()
    try:
        page_layout(group, source)
    except UnsupportedError:
        assert is_opaque
        assert layout in {"LHBNC", "BHLNC"}  # their pages are not in one piece
        return
    writer, reader = (GroupPages(group, pages, on(device)) for pages in (source, target))
    writer.store(kept, Span(0, DIGESTS, FROM), writer.fence())
    reader.load(kept, Span(0, DIGESTS, TO), reader.fence())
    device.drain()
    check_moved(source, target, old)
    if not is_opaque:
        plain = GroupPages(group, source)
        plain_kept = Kept()
        plain.store(plain_kept, Span(0, DIGESTS, FROM))
        for digest in DIGESTS:
            assert np.array_equal(kept.chunks[digest], plain_kept.chunks[digest])


def test_the_self_test_accepts_it(device: Standin) -> None:
    group = group_of()
    self_test(group, pages_in("LBNHC", group, 1), on(device))


def test_the_engine_is_not_failed_by_a_device_that_takes_no_fence(device: Standin) -> None:
    group, kept = group_of(), Kept()
    pages = GroupPages(group, pages_in("LBHNC", group, 1), on(device))
    pages.store(kept, Span(0, DIGESTS, FROM), pages.fence())
    device.lose()
    fence = pages.fence()
    for move in (pages.store, pages.load):
        with pytest.raises(DeviceLostError):
            move(kept, Span(0, DIGESTS, FROM), fence)


def test_what_the_device_may_still_write_to_outlives_who_asked(device: Standin) -> None:
    group = group_of()
    layers = pages_in("LBHNC", group, 1)
    mover = on(device)(group, layers)
    lane, blocks = mover._lane(StoreLane), [FROM[: group.blocks_per_chunk]]
    patient = lane.settings

    def gives_up(_: Event) -> None:
        raise StuckError("told to")

    def stuck_gather() -> weakref.ref[torch.Tensor]:
        room = torch.empty((1, *chunk_shape(group, layers)), dtype=group.dtype)
        with pytest.raises(StuckError):
            mover.gather(room, blocks, mover.fence())
        return weakref.ref(room)

    def is_there(room: weakref.ref[torch.Tensor]) -> bool:
        gc.collect()  # frames of errors hold it, too
        return room() is not None

    device.stall()
    lane.settings = patient._replace(wait=gives_up)
    first = stuck_gather()
    second = stuck_gather()
    assert is_there(first)
    assert not is_there(second)  # nothing was begun with it
    lane.settings = patient
    device.resume()
    device.drain()
    room = torch.empty((1, *chunk_shape(group, layers)), dtype=group.dtype)
    mover.gather(room, blocks, mover.fence())
    assert not is_there(first)


def test_loads_and_stores_that_begin_at_once_share_one_way(
    device: Standin, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of()
    mover = on(device)(group, pages_in("LBHNC", group, 1))
    both, made = threading.Barrier(2), []

    def make(chunks: PrefixCache) -> None:
        made.append(chunks)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.3)  # only one comes: the other waits for it

    monkeypatch.setattr(mover, "_make_direct", make)
    manifest = group.manifest(model="lanes", revision="1", rope="")
    with PrefixCache(manifest, socket=tmp_path / "nobody") as cache:
        threads = [threading.Thread(target=mover.direct, args=(cache, None)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made == [cache]


def test_with_staging_for_less_than_a_chunk_pages_go_through_host_memory(
    device: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group = group_of()
    source, target = pages_in("LBHNC", group, 1), pages_in("LBHNC", group, 2)
    old, kept = [layer.clone() for layer in target], Kept()
    writer, reader = (GroupPages(group, each, on(device, 1)) for each in (source, target))
    with PrefixCache(
        group.manifest(model="small", revision="1", rope=""), socket=tmp_path / "no"
    ) as cache:
        writer.load(cache, Span(0, DIGESTS, FROM), writer.fence())
    assert "staging of 1 bytes for chunks of" in caplog.text
    writer.store(kept, Span(0, DIGESTS, FROM), writer.fence())
    reader.load(kept, Span(0, DIGESTS, TO), reader.fence())
    device.drain()
    check_moved(source, target, old)


@pytest.mark.parametrize("fault", ["launch", "allocate", "copy"])
def test_where_the_device_fails_its_test_torch_moves_the_pages(
    device: Standin, fault: Fault
) -> None:
    group, kept = group_of(), Kept()
    source, target = pages_in("LBNHC", group, 1), pages_in("LBNHC", group, 2)
    old = [layer.clone() for layer in target]
    device.fail(fault, times=1_000_000)
    writer, reader = (checked_pages(group, pages, on(device)) for pages in (source, target))
    assert not writer.moves_both_ways
    writer.store(kept, Span(0, DIGESTS, FROM), writer.fence())
    reader.load(kept, Span(0, DIGESTS, TO), reader.fence())
    check_moved(source, target, old)


def test_what_a_test_has_taken_of_the_device_it_gives_back(device: Standin) -> None:
    group = group_of()
    layers = pages_in("LBNHC", group, 1)
    adopted: list[int] = []
    make = on(device)

    def noted(group: KVGroup, layers: Sequence[torch.Tensor]) -> LaneMover:
        adopted.extend({layer.untyped_storage().nbytes() for layer in layers})
        return make(group, layers)

    self_test(group, layers, noted)
    kept = {layer.untyped_storage().data_ptr() for layer in layers}
    owned = [size for start, (size, _) in device._claims.items() if start not in kept]
    assert set(owned) <= set(adopted)  # the pages of the test, and nothing of ours


def test_a_page_that_is_nowhere_is_not_written(device: Standin) -> None:
    group, kept = group_of(), Kept()
    source, target = pages_in("LBHNC", group, 1), pages_in("LBHNC", group, 2)
    old = [layer.clone() for layer in target]
    writer, reader = (GroupPages(group, pages, on(device)) for pages in (source, target))
    writer.store(kept, Span(0, DIGESTS, FROM), writer.fence())
    blocks = [NOWHERE, *TO[1:6], NOWHERE, NOWHERE]
    reader.load(kept, Span(0, DIGESTS, blocks), reader.fence())
    device.drain()
    for stored, loaded, before in zip(source, target, old, strict=True):
        expected = before.clone()
        expected[TO[1:6]] = stored[FROM[1:6]]
        assert torch.equal(loaded, expected)


@pytest.mark.parametrize("tiling", [transposed_keys, amx_tiles])
def test_tiled_pages_are_left_to_others(tiling: object) -> None:
    group = group_of(tiling=tiling)
    with pytest.raises(UnsupportedError):
        page_layout(group, pages_in("LBHNC", group, 1))


def test_odd_pages_are_left_to_others() -> None:
    group = group_of(head_dim=9, width=18)
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        page_layout(group, pages_in("LBHNC", group, 1))
    assert find_lane_mover(group_of(), pages_in("LBHNC", group_of(), 1)) is None


@pytest.mark.parametrize("codec", ["raw", "int8kv"])
def test_a_worker_moves_straight_between_pages_and_the_daemon(
    device: Standin, socket, codec: str
) -> None:
    group = group_of()
    manifest = group.manifest(model=f"lanes {id(device)}", revision="1", rope="", codec=codec)
    source, target = pages_in("LBNHC", group, 1), pages_in("LBNHC", group, 2)
    old = [layer.clone() for layer in target]
    jobs = (
        StepMetadata(stores=[StoreJob(1, (Span(0, DIGESTS, FROM),), held=True)]),
        StepMetadata(loads=[LoadJob("r", (Span(0, DIGESTS, TO),))]),
    )
    for metadata, pages in zip(jobs, (source, target), strict=True):
        cache = PrefixCache(manifest, socket=socket, timeout_seconds=DEADLINE_SECONDS)
        wait_until(lambda cache=cache: cache.is_connected)
        half = WorkerHalf([group], [cache], make_mover=on(device))
        half.register(dict(zip(group.layer_names, pages, strict=True)))
        half.start_loads(metadata)
        half.start_stores(metadata)
        if metadata.loads:
            received = wait_until(lambda half=half: half.take_received().requests)
            assert received == {"r"}
        else:
            assert wait_until(half.take_report).finished_stores == {1: 1}
        mover = half._pages[0]._mover
        assert mover.counters.values() == dict.fromkeys(mover.counters.values(), 0)
        counts = wait_until(lambda half=half: half.figures)
        assert counts["gpu_chunks_stored"] + counts["gpu_chunks_loaded"] == len(DIGESTS)
        coded = counts["gpu_encoded_chunks"] + counts["gpu_decoded_chunks"]
        assert coded == (len(DIGESTS) if codec != "raw" else 0)
        half.close()
    device.drain()
    if codec == "raw":
        check_moved(source, target, old)
        return
    for stored, loaded, before in zip(source, target, old, strict=True):
        missed = (loaded[TO].float() - stored[FROM].float()).norm()
        assert missed < 0.02 * stored[FROM].float().norm()
        others = [number for number in range(len(before)) if number not in TO]
        assert torch.equal(loaded[others], before[others])


def test_stores_wait_for_loads_until_they_have_a_thread_of_their_own() -> None:
    transfers = Transfers()
    hold, order = threading.Event(), []
    transfers.submit(Urgency.LOAD, lambda: hold.wait(DEADLINE_SECONDS))
    transfers.submit(Urgency.STORE, lambda: order.append("store"))
    transfers.submit(Urgency.LOAD, lambda: order.append("load"))
    transfers.split()
    wait_until(lambda: order == ["store"])  # beside the load that has not ended
    hold.set()
    wait_until(lambda: order == ["store", "load"])
    transfers.close()
    assert transfers.unfinished == 0


def test_one_thread_runs_loads_first() -> None:
    transfers = Transfers()
    hold, order = threading.Event(), []
    transfers.submit(Urgency.STORE, lambda: hold.wait(DEADLINE_SECONDS))
    for name in ("first", "second"):
        transfers.submit(Urgency.STORE, lambda name=name: order.append(f"store {name}"))
        transfers.submit(Urgency.LOAD, lambda name=name: order.append(f"load {name}"))
    hold.set()
    transfers.close()
    assert order == ["load first", "load second", "store first", "store second"]
