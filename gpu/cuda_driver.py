"""CUDA's driver library, for what the runtime in CuPy lacks: memory by descriptor, batched copies.

Calls are made as the driver's headers declare them; tests/unit/test_cuda_driver.py holds every
structure and number here against them. That there is no driver, or an old one, is a value.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from kvstore.gpu.device import Copy, DeviceError, DeviceLostError, DeviceMemoryError
from kvstore.gpu.pools import PoolError
from kvstore.limits import BATCHED_COPIES_MAX, BATCHED_COPIES_MIN

log = logging.getLogger(__name__)

# Numbers of the driver's enumerations. Where the runtime has errors of the same meaning, it has the
# same numbers for them.
SUCCESS: Final = 0
OUT_OF_MEMORY: Final = 2
NEVER_BETTER: Final = frozenset(
    [
        *(3, 4, 46, 100, 101, 709),  # no context any more, or no device
        *(214, 220, 226, 911),  # broken memory, links, or other devices
        *(700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 999),  # what a kernel broke
    ]
)
GENERATION: Final = 75
REGISTERED_AT_ITS_ADDRESS: Final = 91
HAS_VIRTUAL_MEMORY: Final = 102
HAS_DESCRIPTORS: Final = 103
PINNED: Final = 1
POSIX_DESCRIPTOR: Final = 1
ON_DEVICE: Final = 1
READ_WRITE: Final = 3
RECOMMENDED: Final = 1
IN_STREAM_ORDER: Final = 1
BESIDE_COMPUTE: Final = 1
OWN_CAPTURES_ALONE: Final = 1
_GENERATION_MAX: Final = 9
"""Of GPUs that are given batches, by the number of their architecture: Hopper. On Blackwell others
have seen drivers crash and hang in batches, and no engine is risked for a few calls less."""
_DEFAULT_STREAMS: Final = frozenset({0, 1})
"""The default stream of old, by its two handles: it takes no batches."""


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes. The hints are for memory that is neither the device's nor pinned."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", Location),
        ("target_hint", Location),
        ("flags", ctypes.c_uint),
    )


def find_driver() -> Any | None:  # noqa: ANN401  # the library, whose calls are looked up by name
    """Return CUDA's driver library, or None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def error_of(status: int, text: str) -> DeviceError:
    """Return the error that a *status* of the driver or the runtime is."""
    if status in NEVER_BETTER:
        return DeviceLostError(text)
    return DeviceMemoryError(text) if status == OUT_OF_MEMORY else DeviceError(text)


class Driver:
    """The driver, as it knows one device. Every failure is a `DeviceError`."""

    def __init__(self, library: Any, ordinal: int) -> None:  # noqa: ANN401
        self._library = library
        self._device = ctypes.c_int(-1)
        self.call("cuInit", ctypes.c_uint(0))
        self.call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(ordinal))

    @property
    def location(self) -> Location:
        """The device, as memory lies there."""
        return Location(ON_DEVICE, self._device.value)

    def attribute(self, number: int) -> int:
        """Return what the device says of itself."""
        found = ctypes.c_int(0)
        self.call("cuDeviceGetAttribute", ctypes.byref(found), ctypes.c_int(number), self._device)
        return found.value

    def find(self, name: str) -> Callable[..., int] | None:
        """Return the call *name*, or None where the driver is older than it."""
        found: Callable[..., int] | None = getattr(self._library, name, None)
        return found

    def call(self, name: str, *arguments: object) -> None:
        """Call *name*; raises `PoolError` for what no other error stands for."""
        function = self.find(name)
        if function is None:
            raise PoolError(f"the driver has no {name}")
        status = function(*arguments)
        if status != SUCCESS:
            text = f"{name}: error {status} of the driver"
            error = error_of(status, text)
            raise PoolError(text) if type(error) is DeviceError else error


class BatchedCopies:
    """Gives the device many copies in one call. One refusal, and it gives none ever after.

    *driver* None: there is none. The caller's thread has the device's context current.
    """

    def __init__(self, driver: Driver | None, reason: str = "there is no driver library") -> None:
        self.off = reason
        """Why copies are given one by one; empty while they are not."""
        self._driver = driver
        self._calls: Callable[..., int] | None = None
        self._tells_where = False
        self._attributes = CopyAttributes(source_order=IN_STREAM_ORDER, flags=BESIDE_COMPUTE)
        if driver is not None:
            self.off = self._find(driver)

    def _find(self, driver: Driver) -> str:
        # Names have versions, and what a name takes never changes.
        self._calls = driver.find("cuMemcpyBatchAsync_v2")
        if self._calls is None:
            self._calls = driver.find("cuMemcpyBatchAsync")
            self._tells_where = True
        if self._calls is None:
            return "the driver has no cuMemcpyBatchAsync: it came with CUDA 12.8"
        if driver.attribute(GENERATION) > _GENERATION_MAX:
            return "drivers are known to crash in batches on GPUs of this generation"
        if not driver.attribute(REGISTERED_AT_ITS_ADDRESS):
            # A single copy takes the host's address for such memory; a batch faults on it.
            return "the device knows registered memory by another address than the host does"
        return ""

    def give(self, copies: Sequence[Copy], stream: int) -> int:
        """Give *copies* to *stream*; return how many of them, from the first on, it has taken.

        What is left is for the caller to give one by one: all of it, where a batch would not do.
        Some of what is left may have been given nevertheless; moved twice, it is the same bytes.
        Raises `DeviceLostError`.
        """
        if self.off or len(copies) < BATCHED_COPIES_MIN or stream in _DEFAULT_STREAMS:
            return 0
        for start in range(0, len(copies), BATCHED_COPIES_MAX):
            status = self._give(copies[start : start + BATCHED_COPIES_MAX], stream)
            if status != SUCCESS:
                self._refused(status)
                return start
        return len(copies)

    def _give(self, copies: Sequence[Copy], stream: int) -> int:
        assert self._calls is not None, "a batch has a call to go by"
        # Rows of targets, of sources and of sizes, each in one piece.
        rows = np.array(copies, dtype=np.uint64).T.copy()
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        return self._calls(
            *(ctypes.c_void_p(row.ctypes.data) for row in rows),
            ctypes.c_size_t(len(copies)),
            *(ctypes.byref(self._attributes), ctypes.byref(first), ctypes.c_size_t(1)),
            *((ctypes.byref(failed),) if self._tells_where else ()),
            ctypes.c_void_p(stream),
        )

    def _refused(self, status: int) -> None:
        reason = f"cuMemcpyBatchAsync: error {status} of the driver"
        if status in NEVER_BETTER:
            raise DeviceLostError(reason)
        self.off = reason
        log.warning("copies are given one by one from here on", extra={"reason": reason})


class Captures:
    """Keeps calls of a thread apart from the graphs that other threads capture.

    While an engine captures one, CUDA refuses what any thread asks that would not be part of it:
    memory, registrations, how far an event is. The engine's capture would fail with it. Threads may
    declare that captures of others are none of their business.
    """

    def __init__(self, library: Any | None) -> None:  # noqa: ANN401
        self._exchange: Callable[..., int] | None = None
        if library is not None:
            self._exchange = getattr(library, "cuThreadExchangeStreamCaptureMode", None)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Have it so for the calls inside, and then as it was."""
        mode = ctypes.c_int(OWN_CAPTURES_ALONE)
        changed = self._exchange is not None and self._exchange(ctypes.byref(mode)) == SUCCESS
        try:
            yield
        finally:
            if changed and self._exchange is not None:
                self._exchange(ctypes.byref(mode))


def open_copies(library: Any | None, ordinal: int) -> BatchedCopies:  # noqa: ANN401
    """Return how device number *ordinal* is given many copies."""
    try:
        made = BatchedCopies(None if library is None else Driver(library, ordinal))
    except DeviceError as error:
        made = BatchedCopies(None, str(error))
    if made.off:
        log.info("copies are given one by one", extra={"reason": made.off})
    return made
