"""What kvstore asks of a GPU: memory, streams, events, copies and kernels, behind one interface.

Two implementations: `cupy_device.CupyDevice` on a GPU, `standin.Standin` in host memory, which runs
what it is given in any order that CUDA allows. That there is no device is a value: None.

Nothing here waits for the device except `wait_for`, which has an end. A stream runs its work in
the order given; between streams nothing is ordered but by events. Copies of one batch have no
order among themselves. Host memory in a copy is pinned or registered: no copy is synchronous.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import KVStoreError
from kvstore.limits import DEVICE_PATIENCE_SECONDS, DEVICE_POLL_SECONDS

if TYPE_CHECKING:
    from kvstore.gpu.pools import Pools


class DeviceError(KVStoreError):
    """The device refused one call; others may succeed."""


class DeviceMemoryError(DeviceError):
    """The device, or the host's pinned memory, has no room for what was asked."""


class RegistrationError(DeviceError):
    """Host memory could not be registered: the limit of locked memory, or the driver."""


class DeviceLostError(DeviceError):
    """The context is broken for good: nothing that was given to it can be relied on."""


class StuckError(DeviceError):
    """Work did not end in time. It may still end, so what it touches must not be reused."""


class Urgency(IntEnum):
    """Which of two streams with work the device prefers."""

    HIGH = 0
    LOW = 1


class Copy(NamedTuple):
    """One run of bytes to move; addresses of device and host share one space."""

    target: int
    source: int
    size_bytes: int


class Event(Protocol):
    """A place in a stream. It stands for all work given before it was recorded."""

    def is_done(self) -> bool:
        """Whether all of it has ended. Never blocks; raises `DeviceLostError`."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Return the device's time between two events that are done, both of streams of ours.

        Raises `DeviceError` where it does not take it.
        """
        ...


class Stream(Protocol):
    """Work in order. No call waits for any of it; every call may raise `DeviceError`."""

    def wait(self, event: Event) -> None:
        """Hold back what is given from now on until *event*. The host goes on."""
        ...

    def record(self) -> Event:
        """Return what stands for all that was given until now."""
        ...

    def copy(self, copies: Sequence[Copy]) -> None:
        """Move *copies*, in no particular order."""
        ...

    def launch(self, kernel: str, argument: NDArray[Any]) -> None:
        """Run *kernel* on a copy of *argument*, one `batches.BATCH`."""
        ...


class Memory(Protocol):
    """Memory of the device, or pinned memory of the host."""

    @property
    def address(self) -> int:
        """Where it begins."""
        ...

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        ...

    def free(self) -> None:
        """Give it back, once, when no work uses it any more."""
        ...


class Device(Protocol):
    """One GPU as this process sees it. Safe to share between threads."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def stream(self, urgency: Urgency) -> Stream:
        """Return a new stream of our own."""
        ...

    def engine_stream(self, handle: int) -> Stream:
        """Return the stream of an engine that has this *handle*."""
        ...

    def allocate(self, size_bytes: int) -> Memory:
        """Return device memory; raises `DeviceMemoryError`."""
        ...

    def pin(self, size_bytes: int) -> Memory:
        """Return pinned host memory; raises `DeviceMemoryError`."""
        ...

    def register(self, address: int, size_bytes: int) -> None:
        """Pin host memory where it lies; raises `RegistrationError`."""
        ...

    def unregister(self, address: int) -> None:
        """End the registration that begins at *address*, when no copy uses it any more."""
        ...

    def pools(self) -> Pools:
        """Return what makes and opens memory that processes share; raises `DeviceError`."""
        ...


@dataclass(frozen=True, slots=True)
class Fence:
    """All that *stream*, an engine's, had been given when the fence was taken."""

    stream: Stream
    event: Event

    @classmethod
    def of(cls, stream: Stream) -> Self:
        """Take a fence in *stream*, now."""
        return cls(stream, stream.record())


@contextmanager
def fenced(engine: Stream, ours: Stream) -> Iterator[Fence]:
    """Have what is given to *ours* inside run between what *engine* has and what it gets next.

    Both orders are kept by events; the host waits for nothing, also after an exception.
    """
    fence = Fence.of(engine)
    ours.wait(fence.event)
    try:
        yield fence
    finally:
        engine.wait(ours.record())


def host_bytes(address: int, size_bytes: int) -> NDArray[np.uint8]:
    """Return host memory as bytes. The caller vouches for it and keeps it alive."""
    memory = (ctypes.c_uint8 * size_bytes).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=np.uint8)


Wait = Callable[[Event], None]
"""Returns when an event is done; raises `StuckError` when it takes too long."""

_QUICK_POLLS: Final = 50


def wait_for(
    event: Event,
    *,
    seconds: float = DEVICE_PATIENCE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Return when *event* is done; raises `StuckError` after *seconds*, or `DeviceLostError`.

    Asks again and again instead of blocking in the driver, which would have no end.
    """
    ends_at = clock() + seconds
    asked = 0
    while not event.is_done():
        if clock() > ends_at:
            raise StuckError(f"work on the device did not end within {seconds} s")
        asked += 1
        pause(0.0 if asked < _QUICK_POLLS else DEVICE_POLL_SECONDS)
