"""What is asked of CuPy for every call of the interface, and what becomes of its errors.

CuPy is scripted here, and refuses what CuPy 14 refuses: numbers of NumPy's as addresses, arguments
of kernels that are more than one element. On a GPU, tests/gpu/test_transfers.py asks the real one.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from kvstore.errors import RequestError
from kvstore.gpu import cupy_device
from kvstore.gpu.batches import BATCH, THREADS
from kvstore.gpu.counters import MEANINGS, DeviceCounters
from kvstore.gpu.cupy_device import CupyDevice, merged, open_device
from kvstore.gpu.device import (
    Copy,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    Fence,
    RegistrationError,
    Urgency,
    fenced,
)
from kvstore.gpu.standin import Standin


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"cuda error {status}")
        self.status = status


class CUDADriverError(CUDARuntimeError):
    pass


class Scripted:
    """A cupy module that notes what it is asked, and fails when told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status = 0
        self.devices = 1
        self.current: list[int] = []
        answers = {"malloc": 4096, "hostAlloc": 8192, "eventQuery": 0}
        silent = (
            *("free", "freeHost", "hostRegister", "hostUnregister"),
            *("memcpyAsync", "setDevice"),
        )
        calls = {name: self._call(name, answers.get(name)) for name in (*answers, *silent)}
        stream = stream_of(self)
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: self.devices, **calls
            ),
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            Device=device_of(self),
            Stream=stream,
            Event=event_of(),
        )

    def RawModule(self, path: str) -> Any:  # noqa: N802  # CuPy's name
        self.note("module", path.rpartition("/")[2])
        return SimpleNamespace(get_function=self._kernel)

    def _kernel(self, name: str) -> Any:
        def run(grid: tuple[int], block: tuple[int], arguments: tuple[np.ndarray]) -> None:
            for one in arguments:
                # CuPy passes the bytes of an array by value, if it has one element.
                assert isinstance(one, np.ndarray)
                assert one.size == 1
                assert one.nbytes <= 4096
            self.note(name, grid, block, arguments)

        return run

    def note(self, *call: Any) -> None:
        assert self.current == [3], "the device is current during the call"
        self.calls.append(call)
        if self.status:
            raise CUDARuntimeError(self.status)

    def _call(self, name: str, found: Any) -> Any:
        def run(*words: Any) -> Any:
            for word in words:
                if type(word) is not int:  # CuPy takes no numbers of NumPy's
                    raise TypeError("an integer is required")
            self.note(name, *words)
            return found

        return run


def device_of(cupy: Scripted) -> type:
    class Device:
        compute_capability = "90"
        attributes: ClassVar = {"MultiProcessorCount": 10}

        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            cupy.current.append(self.index)

        def __exit__(self, *_: object) -> None:
            cupy.current.pop()

    return Device


def stream_of(cupy: Scripted) -> type:
    class Stream:
        def __init__(self, *, non_blocking: bool, priority: int) -> None:
            cupy.note("stream", non_blocking, priority)
            self.ptr = 77

        @classmethod
        def from_external(cls, stream: Any) -> Any:
            version, handle = stream.__cuda_stream__()
            assert version == 0
            made = cls.__new__(cls)
            made.ptr = handle
            cupy.note("engine's stream", handle)
            return made

        def wait_event(self, event: Any) -> None:
            cupy.note("wait", event.number)

        def record(self, event: Any) -> Any:
            cupy.note("record", event.number)
            return event

        def __enter__(self) -> None:
            cupy.note("enter")

        def __exit__(self, *_: object) -> None:
            cupy.note("exit")

    return Stream


def event_of() -> type:
    numbers = count()

    class Event:
        def __init__(self, *, disable_timing: bool) -> None:
            self.is_timed = not disable_timing
            self.number = next(numbers)
            self.ptr = 500 + self.number

    return Event


@pytest.fixture
def cupy() -> Scripted:
    return Scripted()


@pytest.fixture
def device(cupy: Scripted, tmp_path) -> CupyDevice:
    (tmp_path / "raw.sm_90.cubin").touch()
    return CupyDevice(cupy, 3, tmp_path)


def test_work_is_given_to_the_stream_and_nothing_is_waited_for(device, cupy) -> None:
    engine, ours = device.engine_stream(5), device.stream(Urgency.LOW)
    assert cupy.calls == [
        ("engine's stream", 5),
        ("stream", True, 0),
    ]
    cupy.calls.clear()
    with fenced(engine, ours) as fence:
        assert isinstance(fence, Fence)
        ours.copy([Copy(0, 1000, 16), Copy(16, 1016, 16), Copy(64, 1064, 16)])
    names = [call[0] for call in cupy.calls]
    assert names == ["record", "wait", "setDevice", "memcpyAsync", "memcpyAsync", "record", "wait"]
    assert cupy.calls[2:5] == [
        ("setDevice", 3),
        ("memcpyAsync", 0, 1000, 32, 4, 77),
        ("memcpyAsync", 64, 1064, 16, 4, 77),
    ]
    assert fence.event.is_done()
    with pytest.raises(RequestError, match="another device"):
        ours.wait(Standin(np.random.default_rng(0)).stream(Urgency.LOW).record())


def test_many_copies_are_given_at_once_and_what_is_left_one_by_one(device, cupy) -> None:
    def give(copies: list[Copy], stream: int) -> int:
        assert cupy.calls[-1] == ("setDevice", 3), "the context is this thread's"
        asked.append((copies, stream))
        return 5

    asked: list[tuple[list[Copy], int]] = []
    device.copies.give = give
    stream = device.stream(Urgency.LOW)
    # The second of each pair lies behind the first at both ends.
    pairs = [Copy(100 * n + part, 9000 + 100 * n + part, 8) for n in range(7) for part in (0, 8)]
    stream.copy(pairs)
    runs = [Copy(100 * n, 9000 + 100 * n, 16) for n in range(7)]
    assert asked == [(runs, 77)]
    assert cupy.calls[-2:] == [("memcpyAsync", *run, 4, 77) for run in runs[5:]]


def test_kernels_are_loaded_once_as_built_or_as_ptx(device, cupy) -> None:
    stream, batch = device.stream(Urgency.HIGH), np.zeros(1, dtype=BATCH)
    cupy.calls.clear()
    for kernel in ("raw_gather", "raw_gather", "xxh3_blocks", "hq4_keys_encode_bf16"):
        stream.launch(kernel, batch)
    assert [call[0] for call in cupy.calls] == [
        *("module", "enter", "raw_gather", "exit"),
        *("enter", "raw_gather", "exit"),
        *("module", "enter", "xxh3_blocks", "exit"),
        *("module", "enter", "hq4_keys_encode_bf16", "exit"),
    ]
    assert cupy.calls[0] == ("module", "raw.sm_90.cubin")
    assert cupy.calls[7] == ("module", "xxh3.compute_80.ptx")
    assert cupy.calls[11] == ("module", "hadamard.compute_80.ptx")
    assert cupy.calls[2][1:3] == ((80,), (THREADS,))


def test_memory_comes_from_cuda_itself_and_goes_back(device, cupy) -> None:
    memory, pinned = device.allocate(100), device.pin(200)
    assert (memory.address, memory.size_bytes, pinned.address) == (4096, 100, 8192)
    device.register(1 << 20, 4096)
    device.unregister(1 << 20)
    memory.free()
    pinned.free()
    assert [call[0] for call in cupy.calls] == [
        *("malloc", "hostAlloc", "hostRegister", "hostUnregister", "free", "freeHost"),
    ]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(2, DeviceMemoryError), (1, DeviceError), (700, DeviceLostError), (719, DeviceLostError)],
)
def test_errors_of_cuda_have_our_names(device, cupy, status: int, kind: type) -> None:
    stream = device.stream(Urgency.LOW)
    cupy.status = status
    for call in (lambda: device.allocate(1), stream.record, lambda: stream.copy([Copy(0, 1, 2)])):
        with pytest.raises(DeviceError) as raised:
            call()
        assert type(raised.value) is kind
    with pytest.raises(DeviceError) as raised:
        device.register(0, 4096)
    assert type(raised.value) is (kind if status >= 700 else RegistrationError)


@pytest.mark.parametrize(
    ("status", "expected"), [(0, True), (600, False), (700, DeviceLostError), (1, DeviceError)]
)
def test_an_event_of_a_lost_device_is_not_taken_for_one_that_is_not_done(
    device, cupy, status: int, expected: object
) -> None:
    event = device.stream(Urgency.LOW).record()
    cupy.cuda.runtime.eventQuery = lambda ptr: status if ptr >= 500 else None
    if isinstance(expected, bool):
        assert event.is_done() is expected
    else:
        with pytest.raises(expected):
            event.is_done()


def test_addresses_are_numbers_of_pythons(device, cupy) -> None:
    stream = device.stream(Urgency.LOW)
    with pytest.raises(TypeError, match="an integer is required"):
        stream.copy([Copy(0, np.uint64(8), 16)])
    with pytest.raises(TypeError, match="an integer is required"):
        Standin(np.random.default_rng(0)).stream(Urgency.LOW).copy([Copy(np.int64(0), 8, 16)])


def test_events_of_our_streams_tell_the_time_and_fences_do_not(device, cupy) -> None:
    def elapsed(start: int, end: int) -> float:
        cupy.note("elapsed", start, end)
        return 250.0

    cupy.cuda.runtime.eventElapsedTime = elapsed
    first, last = (device.stream(Urgency.LOW).record() for _ in range(2))
    assert last.seconds_since(first) == 0.25
    assert cupy.calls[-1] == ("elapsed", first.event.ptr, last.event.ptr)
    assert first.event.is_timed
    assert not device.engine_stream(5).record().event.is_timed
    with pytest.raises(RequestError, match="another device"):
        last.seconds_since(Standin(np.random.default_rng(0)).stream(Urgency.LOW).record())
    cupy.status = 400
    with pytest.raises(DeviceError):
        last.seconds_since(first)


def test_memory_of_a_lost_device_is_gone_with_it(device, cupy) -> None:
    memory, pinned = device.allocate(100), device.pin(200)
    cupy.status = 700
    memory.free()
    pinned.free()
    cupy.status = 1
    with pytest.raises(DeviceError):
        memory.free()


def test_copies_that_lie_behind_each_other_are_one() -> None:
    assert list(merged([])) == []
    assert list(merged([Copy(0, 8, 8), Copy(8, 16, 8), Copy(16, 32, 8)])) == [
        Copy(0, 8, 16),
        Copy(16, 32, 8),
    ]


def test_no_copy_goes_from_one_registration_to_the_next(device, cupy) -> None:
    stream = device.stream(Urgency.LOW)
    for start in (4096, 8192):
        device.register(start, 4096)
    across = [Copy(64, 8192 - 32, 32), Copy(96, 8192, 32), Copy(128, 8192 + 32, 32)]
    stream.copy(across)
    stream.copy([Copy(copy.source, copy.target, copy.size_bytes) for copy in across])
    moved = [call[1:4] for call in cupy.calls if call[0] == "memcpyAsync"]
    assert moved == [(64, 8160, 32), (96, 8192, 64), (8160, 64, 32), (8192, 96, 64)]
    device.unregister(8192)
    cupy.calls.clear()
    stream.copy(across)
    assert [call[3] for call in cupy.calls if call[0] == "memcpyAsync"] == [96]


def test_what_is_asked_leaves_graphs_of_other_threads_alone(cupy, tmp_path) -> None:
    modes = [0]

    def exchange(mode: Any) -> int:
        mode._obj.value, was = modes.pop(), mode._obj.value
        modes.append(was)
        return 0

    library = SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange)
    device = CupyDevice(cupy, 3, tmp_path, library=library)
    event = device.stream(Urgency.LOW).record()
    seen: list[int] = []
    cupy.cuda.runtime.eventQuery = lambda _: seen.append(modes[0]) or 0
    assert event.is_done()
    assert (seen, modes) == ([1], [0])


def test_no_gpu_is_a_value(cupy, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert open_device() is None
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cupy.devices = 0
    assert open_device(folder=tmp_path) is None
    cupy.devices = 2
    assert open_device(2, folder=tmp_path) is None
    assert open_device(1, folder=tmp_path).name == "cuda:1 (sm_90)"
    monkeypatch.setattr(cupy_device, "find_built", lambda _: None)
    assert open_device() is None

    def no_driver() -> int:
        raise CUDARuntimeError(35)

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", no_driver)
    assert open_device() is None


def test_a_device_that_only_copies_needs_no_kernels(cupy, monkeypatch) -> None:
    def refuse(_: int) -> None:
        raise AssertionError("kernels are looked for")

    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy_device, "find_built", refuse)
    cupy.devices = 4
    device = open_device(3, launches=False)
    assert device is not None
    stream = device.stream(Urgency.LOW)
    stream.copy([Copy(64, 8192, 32)])
    with pytest.raises(DeviceError, match="raw_gather: this device was opened without kernels"):
        stream.launch("raw_gather", np.zeros(1, BATCH))


def test_an_older_cupy_is_no_gpu(cupy, monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert open_device(folder=tmp_path) is not None
    monkeypatch.delattr(cupy.cuda.Stream, "from_external")
    assert open_device(folder=tmp_path) is None
    assert "CuPy is older than 14" in caplog.text


def test_the_daemon_knows_no_gpu() -> None:
    code = (
        "import sys, kvstore.app, kvstore.cli, kvstore.doctor\n"
        "found = [name for name in sys.modules if 'cupy' in name or name == 'kvstore.client.gpu']\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_counter_has_a_meaning() -> None:
    assert list(MEANINGS) == list(DeviceCounters().values())
