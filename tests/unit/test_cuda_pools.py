"""What is asked of CUDA to share device memory, and that no failure of it leaves anything open.

The driver and the runtime are scripted here, with the arguments that their headers declare; on a
GPU, tests/gpu/test_pools.py asks the real ones.
"""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.gpu.cuda_driver import Access, Properties
from kvstore.gpu.cuda_pools import CudaPools
from kvstore.gpu.device import DeviceError, DeviceLostError, DeviceMemoryError
from kvstore.gpu.pools import Exported, PoolError

PAGE = 2 << 20
IDENTITY = "cuda at 0000:1a:00.0"


class Scripted:
    """A driver whose memory are files, and the runtime of a device beside it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, int] = {}
        self.handles: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.reserved: dict[int, int] = {}
        self.attributes = {102: 1, 103: 1}
        self.allocated: set[int] = set()
        self.opened: list[tuple[bytes, int]] = []
        self.name, self.index = "cuda:1 (scripted)", 1
        self.runtime = SimpleNamespace(
            getDeviceCount=lambda: 3,
            deviceGetPCIBusId=lambda n: f"0000:{0x19 + n:02X}:00.0",
            deviceCanAccessPeer=lambda own, other: int((own, other) == (1, 2)),
            malloc=self._malloc,
            free=self.allocated.discard,
            ipcGetMemHandle=self._ipc_handle,
            ipcOpenMemHandle=self._ipc_open,
            ipcCloseMemHandle=self.allocated.discard,
        )

    @contextlib.contextmanager
    def entered(self):
        yield self.runtime

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            status = self.fails.get(name, 0)
            if not status:
                getattr(self, f"on_{name}", lambda *_: None)(*arguments)
            return status

        return call

    @property
    def is_clean(self) -> bool:
        return not (self.handles or self.mapped or self.reserved or self.allocated)

    # --- the driver -----------------------------------------------------------------------

    def on_cuDeviceGet(self, found, ordinal):  # noqa: N802
        assert ordinal.value == 1
        found._obj.value = 40

    def on_cuDeviceGetAttribute(self, found, attribute, device):  # noqa: N802
        assert device.value == 40
        found._obj.value = self.attributes[attribute.value]

    def on_cuMemGetAllocationGranularity(self, found, properties, flags):  # noqa: N802
        assert flags.value == 1
        self._check(properties._obj)
        found._obj.value = PAGE

    def on_cuMemCreate(self, handle, size, properties, flags):  # noqa: N802
        self._check(properties._obj)
        assert size.value % PAGE == flags.value == 0
        handle._obj.value = 500 + len(self.calls)
        self.handles[handle._obj.value] = size.value

    def on_cuMemExportToShareableHandle(self, fd, handle, kind, flags):  # noqa: N802
        assert (handle.value in self.handles, kind.value, flags.value) == (True, 1, 0)
        fd._obj.value = os.memfd_create("scripted")
        os.ftruncate(fd._obj.value, self.handles[handle.value])

    def on_cuMemImportFromShareableHandle(self, handle, fd, kind):  # noqa: N802
        assert kind.value == 1
        handle._obj.value = 500 + len(self.calls)
        self.handles[handle._obj.value] = os.fstat(fd.value).st_size

    def on_cuMemAddressReserve(self, address, size, alignment, fixed, flags):  # noqa: N802
        assert alignment.value == fixed.value == flags.value == 0
        address._obj.value = 1 << 40
        self.reserved[1 << 40] = size.value

    def on_cuMemMap(self, address, size, offset, handle, flags):  # noqa: N802
        assert self.reserved[address.value] == size.value == self.handles[handle.value]
        assert offset.value == flags.value == 0
        self.mapped[address.value] = size.value

    def on_cuMemSetAccess(self, address, size, access, count):  # noqa: N802
        assert self.mapped[address.value] == size.value
        told: Access = access._obj
        assert (told.location.type, told.location.id, told.flags, count.value) == (1, 40, 3, 1)

    def on_cuMemUnmap(self, address, size):  # noqa: N802
        assert self.mapped.pop(address.value) == size.value

    def on_cuMemAddressFree(self, address, size):  # noqa: N802
        assert address.value not in self.mapped
        assert self.reserved.pop(address.value) == size.value

    def on_cuMemRelease(self, handle):  # noqa: N802
        del self.handles[handle.value]

    @staticmethod
    def _check(told: Properties) -> None:
        assert (told.type, told.handle_types) == (1, 1)
        assert (told.location.type, told.location.id, told.win32) == (1, 40, None)

    # --- the runtime -----------------------------------------------------------------------

    def _malloc(self, size: int) -> int:
        assert size % PAGE == 0
        self.allocated.add(4096)
        return 4096

    def _ipc_handle(self, address: int) -> bytes:
        if self.fails.get("ipc"):
            raise DeviceError("no handles here")
        return b"handle of %d" % address

    def _ipc_open(self, handle: bytes, flags: int) -> int:
        self.opened.append((handle, flags))
        self.allocated.add(8192)
        return 8192


@pytest.fixture
def cuda() -> Scripted:
    return Scripted()


def open_fds() -> set[Path]:
    gc.collect()  # what other tests have left is closed at any time
    return set(Path("/proc/self/fd").iterdir())


def test_a_pool_goes_by_descriptor_and_is_mapped_by_who_gets_it(cuda) -> None:
    before, pools = open_fds(), CudaPools(cuda, cuda)
    pool = pools.make(PAGE + 1)
    assert (pool.size_bytes, pool.address, pool.identity) == (2 * PAGE, 1 << 40, IDENTITY)
    assert pool.exported.handle == b""
    # Nothing holds the memory but its mapping and its descriptor: it goes with the last of them.
    assert not cuda.handles
    other = Scripted()
    mapped = CudaPools(other, other).open(2 * PAGE, Exported(os.dup(pool.exported.fd)))
    assert (mapped.size_bytes, mapped.address) == (2 * PAGE, 1 << 40)
    for one in (mapped, pool, pool):
        one.close()
    assert cuda.is_clean
    assert other.is_clean
    assert open_fds() <= before


@pytest.mark.parametrize(
    "call", ["Create", "ExportToShareableHandle", "AddressReserve", "Map", "SetAccess"]
)
def test_a_call_that_fails_leaves_nothing_behind(cuda, call) -> None:
    before, pools = open_fds(), CudaPools(cuda, cuda)
    cuda.fails[f"cuMem{call}"] = 2 if call == "Create" else 1
    with pytest.raises(DeviceMemoryError if call == "Create" else PoolError, match=call):
        pools.make(PAGE)
    assert cuda.is_clean
    assert open_fds() <= before


@pytest.mark.parametrize("call", ["ImportFromShareableHandle", "Map"])
def test_an_import_that_fails_closes_what_it_was_given(cuda, call) -> None:
    before, pools = open_fds(), CudaPools(cuda, cuda)
    cuda.fails[f"cuMem{call}"] = 801
    fd = os.memfd_create("given")
    os.ftruncate(fd, PAGE)
    with pytest.raises(PoolError, match="error 801 of the driver"):
        pools.open(PAGE, Exported(fd))
    assert cuda.is_clean
    assert open_fds() <= before


@pytest.mark.parametrize("why", ["no driver", "no virtual memory", "no descriptors", "old driver"])
def test_without_descriptors_a_pool_goes_by_handle(cuda, why) -> None:
    if why == "no virtual memory":
        cuda.attributes[102] = 0
    if why == "no descriptors":
        cuda.attributes[103] = 0
    library = {"no driver": None, "old driver": SimpleNamespace()}.get(why, cuda)
    pool = CudaPools(cuda, library).make(PAGE - 4096)
    assert pool.size_bytes == PAGE
    assert pool.exported == Exported(-1, b"handle of 4096")
    mapped = CudaPools(cuda, library).open(PAGE, pool.exported)
    assert cuda.opened == [(b"handle of 4096", 1)]
    mapped.close()
    pool.close()
    assert cuda.is_clean
    if library is None:
        before = open_fds()
        with pytest.raises(PoolError, match="no driver that maps it"):
            CudaPools(cuda, None).open(PAGE, Exported(os.memfd_create("given")))
        assert open_fds() <= before


def test_memory_that_cannot_be_passed_on_is_not_kept(cuda) -> None:
    with pytest.raises(PoolError, match="without memory behind it"):
        CudaPools(cuda, cuda).open(PAGE, Exported(-1))
    cuda.fails["ipc"] = 1
    with pytest.raises(DeviceError, match="no handles"):
        CudaPools(cuda, None).make(PAGE)
    assert cuda.is_clean


@pytest.mark.parametrize("by", ["descriptor", "handle"])
def test_a_pool_of_a_lost_device_is_gone_with_it(cuda, by) -> None:
    before = open_fds()
    pool = CudaPools(cuda, cuda if by == "descriptor" else None).make(PAGE)
    cuda.fails["cuMemUnmap"] = 700
    cuda.runtime.free = lambda _: lost()
    pool.close()
    pool.close()
    assert open_fds() <= before


def lost() -> None:
    raise DeviceLostError("an illegal access")


def test_a_device_reaches_itself_and_the_peers_that_it_can_access(cuda) -> None:
    pools = CudaPools(cuda, cuda)
    assert pools.reaches(IDENTITY)
    assert pools.reaches("cuda at 0000:1b:00.0")
    assert not pools.reaches("cuda at 0000:19:00.0")
    assert not pools.reaches("standin")
