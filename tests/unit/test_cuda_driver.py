"""What the driver is asked, as its headers declare it, and batches of copies: whole, or one by one.

The driver is scripted here; on a GPU, tests/gpu/test_transfers.py asks the real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.gpu import cuda_driver
from kvstore.gpu.cuda_driver import Captures, Driver, open_copies
from kvstore.gpu.device import Copy, DeviceError, DeviceLostError, DeviceMemoryError
from kvstore.gpu.pools import PoolError
from kvstore.limits import BATCHED_COPIES_MAX, BATCHED_COPIES_MIN

STREAM = 77

# From cuda.h of CUDA 12.9 and of 13.5, printed by the program that `declared` builds.
LAYOUTS = {
    "CUmemLocation": (cuda_driver.Location, 8, {"type": 0, "id": 4}),
    "CUmemAllocationProp": (
        cuda_driver.Properties,
        32,
        {
            "type": 0,
            "requestedHandleTypes": 4,
            "location": 8,
            "win32HandleMetaData": 16,
            "allocFlags.compressionType": 24,
            "allocFlags.gpuDirectRDMACapable": 25,
            "allocFlags.usage": 26,
            "allocFlags.reserved": 28,
        },
    ),
    "CUmemAccessDesc": (cuda_driver.Access, 12, {"location": 0, "flags": 8}),
    "CUmemcpyAttributes": (
        cuda_driver.CopyAttributes,
        24,
        {"srcAccessOrder": 0, "srcLocHint": 4, "dstLocHint": 12, "flags": 20},
    ),
}
NUMBERS = {
    "CUDA_SUCCESS": (cuda_driver.SUCCESS, 0),
    "CUDA_ERROR_OUT_OF_MEMORY": (cuda_driver.OUT_OF_MEMORY, 2),
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": (cuda_driver.GENERATION, 75),
    "CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM": (
        cuda_driver.REGISTERED_AT_ITS_ADDRESS,
        91,
    ),
    "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": (
        cuda_driver.HAS_VIRTUAL_MEMORY,
        102,
    ),
    "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": (
        cuda_driver.HAS_DESCRIPTORS,
        103,
    ),
    "CU_MEM_ALLOCATION_TYPE_PINNED": (cuda_driver.PINNED, 1),
    "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR": (cuda_driver.POSIX_DESCRIPTOR, 1),
    "CU_MEM_LOCATION_TYPE_DEVICE": (cuda_driver.ON_DEVICE, 1),
    "CU_MEM_ACCESS_FLAGS_PROT_READWRITE": (cuda_driver.READ_WRITE, 3),
    "CU_MEM_ALLOC_GRANULARITY_RECOMMENDED": (cuda_driver.RECOMMENDED, 1),
    "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM": (cuda_driver.IN_STREAM_ORDER, 1),
    "CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE": (cuda_driver.BESIDE_COMPUTE, 1),
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": (cuda_driver.OWN_CAPTURES_ALONE, 1),
    "(long)CU_STREAM_LEGACY": (max(cuda_driver._DEFAULT_STREAMS), 1),
}
LOST = {
    "NOT_INITIALIZED": 3,
    "DEINITIALIZED": 4,
    "DEVICE_UNAVAILABLE": 46,
    "NO_DEVICE": 100,
    "INVALID_DEVICE": 101,
    "CONTEXT_IS_DESTROYED": 709,
    "ECC_UNCORRECTABLE": 214,
    "NVLINK_UNCORRECTABLE": 220,
    "CONTAINED": 226,
    "EXTERNAL_DEVICE": 911,
    "ILLEGAL_ADDRESS": 700,
    "LAUNCH_TIMEOUT": 702,
    "ASSERT": 710,
    "HARDWARE_STACK_ERROR": 714,
    "ILLEGAL_INSTRUCTION": 715,
    "MISALIGNED_ADDRESS": 716,
    "INVALID_ADDRESS_SPACE": 717,
    "INVALID_PC": 718,
    "LAUNCH_FAILED": 719,
    "TENSOR_MEMORY_LEAK": 721,
    "UNKNOWN": 999,
}
CALLS = {
    # What a name takes, by the version of CUDA that its headers are of.
    12: "(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t,"
    " size_t *, CUstream)",
    13: "(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t,"
    " CUstream)",
}


def offsets_of(kind: type[ctypes.Structure]) -> list[int]:
    return [getattr(kind, name).offset for name, *_ in kind._fields_]


def test_structures_and_numbers_are_those_of_the_headers() -> None:
    for kind, size, offsets in LAYOUTS.values():
        assert (ctypes.sizeof(kind), offsets_of(kind)) == (size, list(offsets.values()))
    for ours, theirs in NUMBERS.values():
        assert ours == theirs
    assert set(LOST.values()) == cuda_driver.NEVER_BETTER


def headers() -> dict[int, Path]:
    """Return where the headers of each version of CUDA are, if they are installed."""
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (found.submodule_search_locations or [])] if found else []
    folders = {12: "cuda_runtime/include", 13: "cu13/include"}
    return {
        version: root / folder
        for version, folder in folders.items()
        for root in roots
        if (root / folder / "cuda.h").exists()
    }


def declared(include: Path, version: int, folder: Path) -> dict[str, int]:
    """Return what a C compiler makes of the headers."""
    asked = {f"sizeof({name})": f"sizeof({name})" for name in LAYOUTS}
    for name, (_, _, offsets) in LAYOUTS.items():
        asked |= {f"{name}.{field}": f"offsetof({name}, {field})" for field in offsets}
    asked |= {name: name for name in NUMBERS} | {name: f"CUDA_ERROR_{name}" for name in LOST}
    lines = [f'printf("%ld %s\\n", (long){what}, "{name}");' for name, what in asked.items()]
    source = folder / "asked.c"
    # A pointer of another type would be an error.
    source.write_text(
        "#include <cuda.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f"typedef CUresult (*Batch){CALLS[version]};\n"
        "static void takes(Batch call) { (void)call; }\n"
        "int main(void) {\n    if (0) takes(cuMemcpyBatchAsync);\n    "
        + "\n    ".join(lines)
        + "\n}\n"
    )
    program = folder / "asked"
    options = ["-O1", "-Wall", "-Werror", f"-isystem{include}", "-o", str(program)]
    subprocess.run(["cc", str(source), *options], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    rows = (line.partition(" ") for line in printed.splitlines())
    return {name: int(number) for number, _, name in rows}


@pytest.mark.parametrize("version", CALLS)
def test_the_headers_say_the_same(version: int, tmp_path: Path) -> None:
    include = headers().get(version)
    if include is None or shutil.which("cc") is None:
        pytest.skip("no headers of CUDA: pip install --group cuda-test")
    found = declared(include, version, tmp_path)
    for name, (_, size, offsets) in LAYOUTS.items():
        assert found[f"sizeof({name})"] == size
        assert [found[f"{name}.{field}"] for field in offsets] == list(offsets.values())
    assert {name: found[name] for name in NUMBERS} == {
        n: theirs for n, (_, theirs) in NUMBERS.items()
    }
    assert {name: found[name] for name in LOST} == LOST


class Scripted:
    """A driver of one of the two versions that moves what a batch says in host memory."""

    def __init__(self, version: int = 13) -> None:
        self.attributes = {75: 9, 91: 1}
        self.statuses: list[int] = []
        self.batches: list[int] = []
        if version:
            self.cuMemcpyBatchAsync = self._old
        if version == 13:
            self.cuMemcpyBatchAsync_v2 = self._move

    def cuInit(self, flags: Any) -> int:  # noqa: N802
        return self.attributes.get(0, 0) + flags.value

    def cuDeviceGet(self, found: Any, ordinal: Any) -> int:  # noqa: N802
        found._obj.value = 40 + ordinal.value
        return 0

    def cuDeviceGetAttribute(self, found: Any, attribute: Any, device: Any) -> int:  # noqa: N802
        assert device.value == 43
        found._obj.value = self.attributes[attribute.value]
        return 0

    def _old(self, *words: Any) -> int:
        *words, failed, stream = words
        failed._obj.value = ctypes.c_size_t(-1).value
        return self._move(*words, stream)

    def _move(self, targets, sources, sizes, count, attributes, firsts, kinds, stream) -> int:
        told, length = attributes._obj, count.value
        assert (told.source_order, told.flags, kinds.value, firsts._obj.value) == (1, 1, 1, 0)
        assert (told.source_hint.type, told.target_hint.type, stream.value) == (0, 0, STREAM)
        self.batches.append(length)
        status = self.statuses.pop(0) if self.statuses else 0
        rows = [
            np.ctypeslib.as_array((ctypes.c_uint64 * length).from_address(row.value)).tolist()
            for row in (targets, sources, sizes)
        ]
        # What is refused may have been begun.
        for target, source, size in list(zip(*rows, strict=True))[
            : length // 2 if status else None
        ]:
            ctypes.memmove(target, source, size)
        return status


def scattered(count: int) -> tuple[np.ndarray, np.ndarray, list[Copy]]:
    """Return two rooms, and copies of every other 16 bytes from the first to the second."""
    source = np.random.default_rng(count).integers(0, 256, (count, 32), np.uint8)
    target = np.zeros_like(source)
    copies = [Copy(target[n].ctypes.data, source[n].ctypes.data, 16) for n in range(count)]
    return source, target, copies


@pytest.mark.parametrize("version", [12, 13])
def test_many_copies_go_in_few_calls(version: int) -> None:
    driver, count = Scripted(version), 2 * BATCHED_COPIES_MAX + 5
    copies = open_copies(driver, 3)
    assert copies.off == ""
    source, target, asked = scattered(count)
    assert copies.give(asked, STREAM) == count
    assert driver.batches == [BATCHED_COPIES_MAX, BATCHED_COPIES_MAX, 5]
    assert np.array_equal(target[:, :16], source[:, :16])
    assert not target[:, 16:].any()


def test_few_copies_and_those_of_the_default_stream_are_left_to_the_caller() -> None:
    driver = Scripted()
    copies = open_copies(driver, 3)
    _, _, asked = scattered(BATCHED_COPIES_MIN)
    assert [copies.give(asked, stream) for stream in (0, 1)] == [0, 0]
    assert copies.give(asked[1:], STREAM) == 0
    assert driver.batches == []
    assert copies.give(asked, STREAM) == BATCHED_COPIES_MIN
    assert copies.off == ""


def test_one_refusal_ends_batches_and_leaves_the_rest_to_the_caller(caplog) -> None:
    driver = Scripted()
    driver.statuses = [0, 801]
    copies = open_copies(driver, 3)
    source, target, asked = scattered(BATCHED_COPIES_MAX + 9)
    given = copies.give(asked, STREAM)
    assert given == BATCHED_COPIES_MAX
    assert np.array_equal(target[:given, :16], source[:given, :16])
    assert copies.off == "cuMemcpyBatchAsync: error 801 of the driver"
    assert copies.give(asked, STREAM) == 0
    assert len(driver.batches) == 2
    assert [record.message for record in caplog.records].count(
        "copies are given one by one from here on"
    ) == 1


def test_a_batch_that_breaks_the_device_is_no_refusal() -> None:
    driver = Scripted()
    driver.statuses = [700]
    copies = open_copies(driver, 3)
    with pytest.raises(DeviceLostError, match="error 700"):
        copies.give(scattered(8)[2], STREAM)


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("no driver", "there is no driver library"),
        ("an old driver", "came with CUDA 12.8"),
        ("other addresses", "another address than the host"),
        ("a GPU on which they crash", "known to crash"),
        ("a driver that fails", "cuInit: error 999"),
    ],
)
def test_where_there_are_no_batches_it_says_why(why: str, reason: str) -> None:
    driver = Scripted(0 if why == "an old driver" else 13)
    driver.attributes |= {
        75: 10 if why == "a GPU on which they crash" else 9,
        91: int(why != "other addresses"),
        0: 999 * (why == "a driver that fails"),
    }
    copies = open_copies(None if why == "no driver" else driver, 3)
    assert reason in copies.off
    assert copies.give(scattered(8)[2], STREAM) == 0


@pytest.mark.parametrize(
    ("status", "kind"), [(2, DeviceMemoryError), (1, PoolError), (719, DeviceLostError)]
)
def test_a_call_that_fails_is_an_error_of_ours(status: int, kind: type[DeviceError]) -> None:
    driver = Scripted()
    driver.attributes[0] = status
    with pytest.raises(DeviceError, match=f"cuInit: error {status}") as raised:
        Driver(driver, 0)
    assert type(raised.value) is kind


@pytest.mark.parametrize("status", [0, 3])
def test_captures_of_others_are_ignored_inside_alone(status: int) -> None:
    modes = [0]

    def exchange(mode: Any) -> int:
        if not status:
            mode._obj.value, was = modes[-1], mode._obj.value
            modes.append(was)
        return status

    captures = Captures(SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange))
    with contextlib.suppress(KeyError), captures.apart():
        assert modes == ([0, 1] if not status else [0])
        raise KeyError
    assert modes == ([0, 1, 0] if not status else [0])
    for library in (None, SimpleNamespace()):
        with Captures(library).apart():
            pass
