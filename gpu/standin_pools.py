"""Pools of the stand-in: memory of this host, mapped by every process that has its descriptor."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.gpu.device import DeviceMemoryError
from kvstore.gpu.pools import Exported, PoolError

if TYPE_CHECKING:
    from kvstore.gpu.standin import Standin

IDENTITY: Final = "standin"


class StandinPool:
    """Shared memory that the stand-in calls its own."""

    identity = IDENTITY

    def __init__(self, device: Standin, fd: int, size_bytes: int, *, is_own: bool) -> None:
        self.exported = Exported(fd)
        self.size_bytes = size_bytes
        self._device = device
        self._is_own = is_own
        self._is_open = True
        # Never unmapped by hand: it goes with the last view of it, so that no access can fault.
        self.view = np.frombuffer(mmap.mmap(fd, size_bytes), dtype=np.uint8)
        self.address = self.view.ctypes.data
        device.adopt(self.address, size_bytes)

    def close(self) -> None:
        """Let the device know it no longer."""
        if self._is_open:
            self._is_open = False
            self._device.disclaim(self.address)
            if self._is_own:
                os.close(self.exported.fd)


class StandinPools:
    """The pools of one stand-in. All stand-ins are one device: what one exports, others open."""

    identity = IDENTITY

    def __init__(self, device: Standin) -> None:
        self._device = device

    def make(self, size_bytes: int) -> StandinPool:
        """Return a pool in a memfd."""
        self._device.meet("allocate")
        if self._device.used_bytes + size_bytes > self._device.memory_bytes_max:
            raise DeviceMemoryError(f"{size_bytes} bytes asked, {self._device.used_bytes} in use")
        size_bytes += -size_bytes % mmap.PAGESIZE
        fd = os.memfd_create("kvstore-pool", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            return StandinPool(self._device, fd, size_bytes, is_own=True)
        except OSError as error:
            os.close(fd)
            raise DeviceMemoryError(f"{size_bytes} bytes: {error.strerror}") from error

    def open(self, size_bytes: int, exported: Exported) -> StandinPool:
        """Map a pool that another stand-in has made."""
        try:
            self._device.meet("allocate")
            if exported.fd < 0 or os.fstat(exported.fd).st_size < size_bytes:
                raise PoolError(f"a pool of {size_bytes} bytes came without memory behind it")
            return StandinPool(self._device, exported.fd, size_bytes, is_own=False)
        except OSError as error:
            raise PoolError(f"a pool of {size_bytes} bytes: {error.strerror}") from error
        finally:
            if exported.fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(exported.fd)

    @staticmethod
    def reaches(identity: str) -> bool:
        """Return whether that is a stand-in, too."""
        return identity == IDENTITY
