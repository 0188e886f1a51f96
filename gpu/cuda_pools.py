"""Pools of a GPU: CUDA's virtual memory management, or where that cannot be passed on, CUDA IPC.

The first is the driver's own interface, the second is the runtime's, which CuPy has. That there is
no driver, or an old one, is a value.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from kvstore.gpu.cuda_driver import (
    HAS_DESCRIPTORS,
    HAS_VIRTUAL_MEMORY,
    PINNED,
    POSIX_DESCRIPTOR,
    READ_WRITE,
    RECOMMENDED,
    Access,
    Driver,
    Properties,
)
from kvstore.gpu.device import DeviceError, DeviceLostError
from kvstore.gpu.pools import Exported, OwnPool, Pool, PoolError
from kvstore.limits import MIB

if TYPE_CHECKING:
    from kvstore.gpu.cupy_device import CupyDevice

log = logging.getLogger(__name__)

# cudaIpcMemLazyEnablePeerAccess
_PEERS_TOO: Final = 1
_ALLOCATION_BYTES: Final = 2 * MIB


class VirtualMemory:
    """The calls of the driver that pools are made of. Every failure is a `DeviceError`."""

    def __init__(self, driver: Driver) -> None:
        """Raise `PoolError` when the device has no memory that goes by descriptor."""
        for attribute in (HAS_VIRTUAL_MEMORY, HAS_DESCRIPTORS):
            if not driver.attribute(attribute):
                raise PoolError(f"the device lacks attribute {attribute} of CUDA")
        self._call = driver.call
        self._location = driver.location
        self._properties = Properties(
            type=PINNED, handle_types=POSIX_DESCRIPTOR, location=self._location
        )

    def granularity(self) -> int:
        """Return what sizes and addresses of mappings are multiples of."""
        found = ctypes.c_size_t(0)
        self._call(
            "cuMemGetAllocationGranularity",
            *(ctypes.byref(found), ctypes.byref(self._properties), ctypes.c_int(RECOMMENDED)),
        )
        return found.value

    def create(self, size_bytes: int) -> int:
        """Return a handle of new memory."""
        handle = ctypes.c_ulonglong(0)
        self._call(
            "cuMemCreate",
            *(ctypes.byref(handle), ctypes.c_size_t(size_bytes)),
            *(ctypes.byref(self._properties), ctypes.c_ulonglong(0)),
        )
        return handle.value

    def export(self, handle: int) -> int:
        """Return a descriptor of memory."""
        fd = ctypes.c_int(-1)
        self._call(
            "cuMemExportToShareableHandle",
            *(ctypes.byref(fd), ctypes.c_ulonglong(handle)),
            *(ctypes.c_int(POSIX_DESCRIPTOR), ctypes.c_ulonglong(0)),
        )
        return fd.value

    def import_(self, fd: int) -> int:
        """Return a handle of the memory behind a descriptor, which stays the caller's."""
        handle = ctypes.c_ulonglong(0)
        self._call(
            "cuMemImportFromShareableHandle",
            *(ctypes.byref(handle), ctypes.c_void_p(fd), ctypes.c_int(POSIX_DESCRIPTOR)),
        )
        return handle.value

    def release(self, handle: int) -> None:
        """Let go of a handle; memory stays while it is mapped or exported."""
        self._call("cuMemRelease", ctypes.c_ulonglong(handle))

    def map(self, handle: int, size_bytes: int) -> int:
        """Return where memory is from now on, for this device to read and write."""
        address, size = ctypes.c_ulonglong(0), ctypes.c_size_t(size_bytes)
        nothing, start = ctypes.c_ulonglong(0), ctypes.c_size_t(0)
        self._call("cuMemAddressReserve", ctypes.byref(address), size, start, nothing, nothing)
        try:
            self._call("cuMemMap", address, size, start, ctypes.c_ulonglong(handle), nothing)
            try:
                access = Access(self._location, READ_WRITE)
                self._call(
                    "cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1)
                )
            except DeviceError:
                self._call("cuMemUnmap", address, size)
                raise
        except DeviceError:
            self._call("cuMemAddressFree", address, size)
            raise
        return address.value

    def unmap(self, address: int, size_bytes: int) -> None:
        """End a mapping."""
        where, size = ctypes.c_ulonglong(address), ctypes.c_size_t(size_bytes)
        self._call("cuMemUnmap", where, size)
        self._call("cuMemAddressFree", where, size)


class MappedPool:
    """Memory that goes by descriptor. Its owner has *fd*, which is closed with it."""

    def __init__(
        self,
        device: CupyDevice,
        driver: VirtualMemory,
        handle: int,
        size_bytes: int,
        *,
        fd: int = -1,
        identity: str = "",
    ) -> None:
        self.exported = Exported(fd)
        self.identity = identity
        self.size_bytes = size_bytes
        self._device = device
        self._driver = driver
        self._is_open = True
        self.address = driver.map(handle, size_bytes)

    def close(self) -> None:
        """Unmap it."""
        if self._is_open:
            self._is_open = False
            if self.exported.fd >= 0:
                os.close(self.exported.fd)
            # Of a context that is gone, mappings are gone with it.
            with contextlib.suppress(DeviceLostError), self._device.entered():
                self._driver.unmap(self.address, self.size_bytes)


class HandlePool:
    """Memory of the runtime that goes by handle; *end* frees it, or lets go of it."""

    def __init__(
        self,
        device: CupyDevice,
        address: int,
        size_bytes: int,
        handle: bytes,
        *,
        end: str,
        identity: str = "",
    ) -> None:
        self.exported = Exported(-1, handle)
        self.identity = identity
        self.address = address
        self.size_bytes = size_bytes
        self._device = device
        self._end = end
        self._is_open = True

    def close(self) -> None:
        """Give it back."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(DeviceLostError), self._device.entered() as runtime:
                getattr(runtime, self._end)(self.address)


class CudaPools:
    """The pools of one GPU. *library* is the driver's, None where it is not to be had."""

    def __init__(self, device: CupyDevice, library: Any | None) -> None:  # noqa: ANN401
        self._device = device
        self._driver: VirtualMemory | None = None
        with device.entered() as runtime:
            # The calls of the driver take a context as given, and nothing may have made one yet.
            runtime.free(0)
            self.identity = identity_of(runtime, device.index)
            try:
                if library is not None:
                    self._driver = VirtualMemory(Driver(library, device.index))
            except DeviceError as error:
                log.warning(
                    "device memory is passed on by handle: other containers cannot map it",
                    extra={"device": device.name, "reason": str(error)},
                )

    def make(self, size_bytes: int) -> OwnPool:
        """Return a pool that goes by descriptor, or else by handle."""
        driver = self._driver
        with self._device.entered() as runtime:
            if driver is None:
                return self._make_by_handle(runtime, size_bytes)
            size_bytes += -size_bytes % driver.granularity()
            handle = driver.create(size_bytes)
            with _released(driver, handle):
                fd = driver.export(handle)
                try:
                    return MappedPool(
                        self._device, driver, handle, size_bytes, fd=fd, identity=self.identity
                    )
                except DeviceError:
                    os.close(fd)
                    raise

    def open(self, size_bytes: int, exported: Exported) -> Pool:
        """Map a pool of another process."""
        driver = self._driver
        if exported.fd < 0 and not exported.handle:
            raise PoolError(f"a pool of {size_bytes} bytes came without memory behind it")
        if exported.fd < 0:
            with self._device.entered() as runtime:
                address = runtime.ipcOpenMemHandle(exported.handle, _PEERS_TOO)
                return HandlePool(
                    self._device, address, size_bytes, exported.handle, end="ipcCloseMemHandle"
                )
        try:
            if driver is None:
                raise PoolError("a pool came by descriptor, and there is no driver that maps it")
            with self._device.entered():
                handle = driver.import_(exported.fd)
                with _released(driver, handle):
                    return MappedPool(self._device, driver, handle, size_bytes)
        finally:
            os.close(exported.fd)

    def reaches(self, identity: str) -> bool:
        """Return whether that is this GPU, or one whose memory it works on directly."""
        if identity == self.identity:
            return True
        with self._device.entered() as runtime:
            others = range(runtime.getDeviceCount())
            found = [n for n in others if identity_of(runtime, n) == identity]
            return any(runtime.deviceCanAccessPeer(self._device.index, n) for n in found)

    def _make_by_handle(self, runtime: Any, size_bytes: int) -> HandlePool:  # noqa: ANN401
        # What is smaller shares its allocation, and a handle stands for the whole of one.
        size_bytes += -size_bytes % _ALLOCATION_BYTES
        address = runtime.malloc(size_bytes)
        try:
            handle = bytes(runtime.ipcGetMemHandle(address))
        except BaseException:
            runtime.free(address)
            raise
        return HandlePool(
            self._device, address, size_bytes, handle, end="free", identity=self.identity
        )


def identity_of(runtime: Any, ordinal: int) -> str:  # noqa: ANN401
    """Return what processes on this host call a GPU, whichever of them it can see."""
    return f"cuda at {runtime.deviceGetPCIBusId(ordinal).lower()}"


@contextlib.contextmanager
def _released(driver: VirtualMemory, handle: int) -> Iterator[None]:
    """Let go of *handle* at the end: mappings and descriptors keep the memory."""
    try:
        yield
    finally:
        driver.release(handle)
