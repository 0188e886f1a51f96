"""On a GPU: the scenes of unit/test_lane_order.py, the checksum kernel, a worker's failures.

What the stand-in finds by trying every order, a GPU finds by luck: here it is the same control
flow on the real thing that is tested, and that its kernels give the right bytes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvstore.bench import gpu as bench
from kvstore.compression.registry import BUILT_IN
from kvstore.gpu.cupy_device import CupyDevice, open_device
from kvstore.gpu.device import (
    Copy,
    Device,
    DeviceMemoryError,
    RegistrationError,
    StuckError,
    Urgency,
    host_bytes,
    wait_for,
)
from kvstore.gpu.lanes import LoadLane, StoreLane
from kvstore.gpu.pages import digest_batch
from kvstore.hashing import block_count, block_digests
from tests.support.device import World, load_scene, settings, store_scene
from tests.support.device_measured import measured_scene

pytestmark = pytest.mark.gpu

KIB = 1024
SIZES = (16, 128, 240, 256, KIB, 4096 - 16, 64 * KIB, 64 * KIB + 16, 300 * KIB + 48)


@pytest.fixture(scope="module")
def device() -> Device:
    found = open_device()
    if found is None:
        pytest.skip("no GPU, no CuPy, or no kernels")
    return found


class Bounce:
    """Brings bytes to the device and back through pinned memory, and waits."""

    def __init__(self, device: Device) -> None:
        self._stream = device.stream(Urgency.HIGH)
        self._pinned = device.pin(1 << 20)

    def put(self, address: int, content: np.ndarray) -> None:
        flat = np.ascontiguousarray(content).view(np.uint8).ravel()
        host_bytes(self._pinned.address, flat.nbytes)[:] = flat
        self._stream.copy([Copy(address, self._pinned.address, flat.nbytes)])
        wait_for(self._stream.record())

    def get(self, address: int, size: int) -> np.ndarray:
        self._stream.copy([Copy(self._pinned.address, address, size)])
        wait_for(self._stream.record())
        return host_bytes(self._pinned.address, size).copy()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "way",
    [
        *("staged", "direct", "bounced"),
        *("int4kv", "int8kv", "k8v4", "fp8", "nvfp4", "nvfp4-compat", "hq4", "hq3"),
        "exp3",
    ],
)
def test_what_arrives_is_what_was_there(device: Device, way: str, seed: int) -> None:
    bounce = Bounce(device)
    stores = measured_scene if way == "exp3" else store_scene
    for kind, scene in ((StoreLane, stores), (LoadLane, load_scene)):
        world = World(
            device,
            seed,
            registered=way != "bounced",
            window_bytes=4096,
            put=bounce.put,
            get=bounce.get,
            codec=way if way in BUILT_IN else "raw",
        )
        lane = world.lane(kind, settings(direct=way == "direct"))
        assert scene(world, lane)
        assert lane.stuck == 0
        lane.close()
        world.windows.close()


@pytest.mark.parametrize("size", SIZES)
def test_the_device_takes_the_checksums_of_kvstore(device: Device, size: int) -> None:
    bounce, stream = Bounce(device), device.stream(Urgency.HIGH)
    payload = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    memory, words = device.allocate(size), device.allocate(4 * KIB)
    bounce.put(memory.address, payload)
    bounce.put(words.address, np.array([memory.address], dtype="<u8"))
    batch = digest_batch(1, size, pieces=1, starts=words.address, digests=words.address + 256)
    stream.launch("xxh3_blocks", batch)
    wait_for(stream.record())
    found = bounce.get(words.address + 256, 8 * block_count(size)).view("<u8")
    assert np.array_equal(found, block_digests(payload.tobytes()))


@pytest.mark.parametrize("batched", [True, False])
def test_many_copies_at_once_arrive(device: Device, batched: bool) -> None:
    assert isinstance(device, CupyDevice)
    count, size, stream = 3000, 256, device.stream(Urgency.LOW)
    bounce, memory = Bounce(device), device.allocate(2 * count * size)
    content = np.random.default_rng(1).integers(0, 256, count * size, np.uint8)
    bounce.put(memory.address, content)
    order = np.random.default_rng(2).permutation(count).tolist()
    half = memory.address + count * size
    off = device.copies.off
    if not batched:
        device.copies.off = "as an older driver"
    elif off:
        pytest.skip(off)
    stream.copy(
        [Copy(half + to * size, memory.address + n * size, size) for n, to in enumerate(order)]
    )
    wait_for(stream.record())
    found = bounce.get(half, count * size).reshape(count, size)
    assert np.array_equal(found[order], content.reshape(count, size))
    assert batched is not bool(device.copies.off)
    device.copies.off = off
    memory.free()


def test_a_graph_that_is_captured_meanwhile_is_whole(device: Device) -> None:
    cupy = pytest.importorskip("cupy")
    engine = cupy.cuda.Stream(non_blocking=True)
    seen = cupy.zeros(1, dtype=cupy.int32)
    cupy.cuda.runtime.deviceSynchronize()

    def move() -> bool:
        bounce = Bounce(device)
        world = World(device, 1, registered=True, window_bytes=4096, put=bounce.put, get=bounce.get)
        lane = world.lane(StoreLane, settings(direct=False))
        moved = store_scene(world, lane)
        lane.close()
        world.windows.close()
        return bool(moved)

    move()  # kernels are loaded
    with engine, ThreadPoolExecutor(1) as other:
        engine.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        cupy.cuda.runtime.memsetAsync(seen.data.ptr, 1, 4, engine.ptr)
        moved = other.submit(move).result()
        graph = engine.end_capture()
    graph.launch(engine)
    engine.synchronize()
    assert moved
    assert int(seen[0]) == 0x01010101


def test_what_there_is_no_room_for_is_an_error_and_no_more(device: Device) -> None:
    with pytest.raises(DeviceMemoryError):
        device.allocate(1 << 60)
    device.allocate(1 << 20).free()


def test_memory_that_is_not_there_is_not_registered(device: Device) -> None:
    with pytest.raises(RegistrationError):
        device.register(1 << 12, 1 << 12)
    device.allocate(1 << 20).free()


def test_waiting_has_an_end(device: Device) -> None:
    stream = device.stream(Urgency.LOW)
    size = 1 << 28
    first, second = device.allocate(size), device.allocate(size)
    stream.copy([Copy(first.address, second.address, size)] * 200)
    event = stream.record()
    with pytest.raises(StuckError):
        wait_for(event, seconds=0.0)
    wait_for(event)
    first.free()
    second.free()


def test_the_benchmark_runs(device: Device) -> None:
    found = bench.measure(device, [bench.QUICK], 1)
    assert all(row["gb_per_s"] > 0 for row in found["rows"] if "floor" in row)
    assert list(bench._measure_model(0, 1, 120.0, quick=True))
