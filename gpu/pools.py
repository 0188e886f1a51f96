"""Pools: device memory that one process owns and others on the same device map.

The owner passes on what `Exported` holds, as it passes the arena on; who opens it reads and
writes the same bytes. There are two ways, of which the device takes the first that it has:

- by *file descriptor*: the memory stays for as long as anybody has it mapped, also when its owner
  dies, and a descriptor goes where sockets go, into other containers too;
- by *handle*, a few bytes: the memory goes with its owner, and both need one view of processes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kvstore.gpu.device import DeviceError


class PoolError(DeviceError):
    """A pool cannot be passed on, or not be mapped here: no driver for it, or another device."""


class Exported(NamedTuple):
    """What another process needs to map a pool: a descriptor, or, where that is -1, a handle.

    The descriptor is its holder's to close.
    """

    fd: int
    handle: bytes = b""


class Pool(Protocol):
    """Device memory as one process maps it."""

    @property
    def address(self) -> int:
        """Where it begins in this process."""
        ...

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        ...

    def close(self) -> None:
        """Unmap it, when no work uses it any more. Idempotent."""
        ...


class OwnPool(Pool, Protocol):
    """A pool as its owner has it. `close` ends the export, too."""

    @property
    def identity(self) -> str:
        """What the device is called that it lies on."""
        ...

    @property
    def exported(self) -> Exported:
        """What to pass on; the descriptor stays the owner's."""
        ...


class Pools(Protocol):
    """How one device makes and opens pools."""

    @property
    def identity(self) -> str:
        """What the device is called by every process that can map its pools."""
        ...

    def make(self, size_bytes: int) -> OwnPool:
        """Return a pool of *size_bytes* or a little more, in whole pages of the device.

        Raises `DeviceMemoryError` without room, `PoolError` when it could not be passed on.
        """
        ...

    def open(self, size_bytes: int, exported: Exported) -> Pool:
        """Map a pool of another process, of *size_bytes*; closes the descriptor in every case.

        Raises `DeviceMemoryError` or `PoolError`.
        """
        ...

    def reaches(self, identity: str) -> bool:
        """Return whether this device works on memory of the one called *identity*."""
        ...
