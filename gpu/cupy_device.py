"""A GPU behind the interface of `device`, through CuPy. Importing this needs neither.

`open_device` returns None where there is no GPU, no CuPy, or nothing to run on it: "no GPU" is a
value. The calling thread's current device stays what it was.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from kvstore.errors import RequestError
from kvstore.gpu.batches import THREADS
from kvstore.gpu.build import find_code
from kvstore.gpu.cuda_driver import Captures, error_of, find_driver, open_copies
from kvstore.gpu.cuda_pools import CudaPools
from kvstore.gpu.device import (
    Copy,
    Device,
    DeviceError,
    DeviceLostError,
    Event,
    RegistrationError,
    Urgency,
)
from kvstore.gpu.kernels import CODECS, StreamOf, find_built

log = logging.getLogger(__name__)

SOURCES_OF: Final = {"raw": "raw", "whole": "whole", "spans": "spans", "xxh3": "xxh3", **CODECS}
"""What names of kernels begin with, and the source of each."""

_BLOCKS_PER_MULTIPROCESSOR: Final = {Urgency.HIGH: 8, Urgency.LOW: 2}
"""Few for stores, which share the device with the engine's own kernels."""
_PRIORITIES: Final = {Urgency.HIGH: -1, Urgency.LOW: 0}

# Numbers of cudaError and cudaMemcpyKind.
_NOT_READY: Final = 600
_ANY_DIRECTION: Final = 4
_PORTABLE: Final = 1


class CupyMemory:
    """Memory that CUDA gave out."""

    def __init__(self, device: CupyDevice, address: int, size_bytes: int, *, pinned: bool) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self._device = device
        self._pinned = pinned

    def free(self) -> None:
        """Give it back. Of a context that is gone, memory is gone with it."""
        with contextlib.suppress(DeviceLostError), self._device.entered() as runtime:
            (runtime.freeHost if self._pinned else runtime.free)(self.address)


class CupyEvent:
    """A CUDA event, recorded once."""

    def __init__(self, device: CupyDevice, event: Any) -> None:  # noqa: ANN401  # CuPy's
        self._device = device
        self.event = event

    def is_done(self) -> bool:
        """Ask the driver, without blocking."""
        # Not `Event.done`: to that, an event of a lost device is one that is not done yet.
        with self._device.entered() as runtime:
            status = int(runtime.eventQuery(self.event.ptr))
        if status not in {0, _NOT_READY}:
            raise error_of(status, f"an event ended with error {status} of CUDA")
        return status == 0

    def seconds_since(self, earlier: Event) -> float:
        """Return the device's time between two events that are done, both of streams of ours."""
        if not isinstance(earlier, CupyEvent):
            raise RequestError("an event of another device")
        with self._device.entered() as runtime:
            return float(runtime.eventElapsedTime(earlier.event.ptr, self.event.ptr)) / 1e3


class CupyStream:
    """A CUDA stream, ours or an engine's."""

    def __init__(
        self,
        device: CupyDevice,
        stream: Any,  # noqa: ANN401  # CuPy's
        urgency: Urgency,
        *,
        is_ours: bool,
    ) -> None:
        self._device = device
        self._stream = stream
        self._is_ours = is_ours
        self._blocks = device.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR[urgency]

    def wait(self, event: Event) -> None:
        """Hold back what follows until *event*."""
        if not isinstance(event, CupyEvent):
            raise RequestError("an event of another device")
        with self._device.entered():
            self._stream.wait_event(event.event)

    def record(self) -> CupyEvent:
        """Return what stands for all that was given until now."""
        with self._device.entered():
            event = self._device.new_event(is_timed=self._is_ours)
            return CupyEvent(self._device, self._stream.record(event))

    def copy(self, copies: Sequence[Copy]) -> None:
        """Move *copies*, those that lie behind each other at both ends in one go."""
        runs = list(merged(copies, self._device.registered))
        with self._device.entered() as runtime:
            # The driver takes the thread's context as given, and this may be the first call here.
            runtime.setDevice(self._device.index)
            given = self._device.copies.give(runs, self._stream.ptr)
            for target, source, size in runs[given:]:
                runtime.memcpyAsync(target, source, size, _ANY_DIRECTION, self._stream.ptr)

    def launch(self, kernel: str, argument: NDArray[Any]) -> None:
        """Run *kernel*; its argument is copied at the launch."""
        with self._device.entered():
            function = self._device.function(kernel)
            with self._stream:
                function((self._blocks,), (THREADS,), (argument,))


class CupyDevice:
    """One GPU, its kernels loaded from *folder* when first launched; None: it launches none.

    *cupy* is the module, *library* the driver's, None where it is not to be had.
    """

    def __init__(
        self,
        cupy: Any,  # noqa: ANN401
        index: int,
        folder: Path | None,
        *,
        library: Any | None = None,  # noqa: ANN401
    ) -> None:
        self.index = index
        self.copies = open_copies(library, index)
        self._captures = Captures(library)
        self._library = library
        self._cupy = cupy
        self._device = cupy.cuda.Device(index)
        self._folder = folder
        self._architecture = int(self._device.compute_capability)
        self._functions: dict[str, Any] = {}
        self.registered: set[int] = set()
        """Where registrations of host memory begin."""
        self._loading = threading.Lock()
        self.multiprocessors = int(self._device.attributes["MultiProcessorCount"])
        self.name = f"cuda:{index} (sm_{self._architecture})"

    def stream(self, urgency: Urgency) -> CupyStream:
        """Return a new stream, which waits for no other by itself."""
        with self.entered():
            priority = _PRIORITIES[urgency]
            made = self._cupy.cuda.Stream(non_blocking=True, priority=priority)
            return CupyStream(self, made, urgency, is_ours=True)

    def engine_stream(self, handle: int) -> CupyStream:
        """Return the stream that an engine knows by *handle*."""
        with self.entered():
            stream = self._cupy.cuda.Stream.from_external(StreamOf(handle))
        return CupyStream(self, stream, Urgency.HIGH, is_ours=False)

    def allocate(self, size_bytes: int) -> CupyMemory:
        """Return device memory, taken from CUDA itself and not from a pool that others share."""
        with self.entered() as runtime:
            return CupyMemory(self, runtime.malloc(size_bytes), size_bytes, pinned=False)

    def pin(self, size_bytes: int) -> CupyMemory:
        """Return pinned memory."""
        with self.entered() as runtime:
            address = runtime.hostAlloc(size_bytes, _PORTABLE)
            return CupyMemory(self, address, size_bytes, pinned=True)

    def register(self, address: int, size_bytes: int) -> None:
        """Pin memory where it lies."""
        try:
            with self.entered() as runtime:
                runtime.hostRegister(address, size_bytes, _PORTABLE)
                self.registered.add(address)
        except DeviceLostError:
            raise
        except DeviceError as error:
            raise RegistrationError(f"{size_bytes} bytes: {error}") from error

    def unregister(self, address: int) -> None:
        """End a registration."""
        with self.entered() as runtime:
            runtime.hostUnregister(address)
            self.registered.discard(address)

    def pools(self) -> CudaPools:
        """Return what shares memory with other processes."""
        return CudaPools(self, self._library)

    def function(self, kernel: str) -> Any:  # noqa: ANN401  # CuPy's
        """Return *kernel*, built ahead for this device or compiled from PTX by the driver."""
        if self._folder is None:
            raise DeviceError(f"{kernel}: this device was opened without kernels")
        with self._loading:
            if kernel not in self._functions:
                source = SOURCES_OF[kernel.partition("_")[0]]
                path = find_code(self._folder, source, self._architecture)
                module = self._cupy.RawModule(path=str(path))
                self._functions[kernel] = module.get_function(kernel)
            return self._functions[kernel]

    def new_event(self, *, is_timed: bool) -> Any:  # noqa: ANN401  # CuPy's
        """Return an event, which notes when it is done if it *is_timed*."""
        return self._cupy.cuda.Event(disable_timing=not is_timed)

    @contextlib.contextmanager
    def entered(self) -> Iterator[Any]:
        """Have this device current, and errors of CUDA raised as ours; gives CUDA's runtime.

        A graph that the engine captures meanwhile, in another thread, is not disturbed.
        """
        cuda = self._cupy.cuda
        try:
            with self._captures.apart(), self._device:
                yield cuda.runtime
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
            raise error_of(int(error.status), str(error)) from error


def merged(copies: Sequence[Copy], borders: Container[int] = ()) -> Iterator[Copy]:
    """Join neighbours that lie behind each other at both ends, if no border is between them.

    CUDA refuses a copy that goes from one registration of memory to the next.
    """
    last: Copy | None = None
    for copy in copies:
        if (
            last is not None
            and copy.target - last.target == copy.source - last.source == last.size_bytes
            and copy.target not in borders
            and copy.source not in borders
        ):
            last = Copy(last.target, last.source, last.size_bytes + copy.size_bytes)
            continue
        if last is not None:
            yield last
        last = copy
    if last is not None:
        yield last


def open_device(
    index: int = 0, *, folder: Path | None = None, launches: bool = True
) -> Device | None:
    """Return GPU number *index*, or None where there is none that could be used.

    One that *launches* nothing only copies: no kernels are looked for, nor built.
    """
    try:
        cupy = importlib.import_module("cupy")
        if index >= cupy.cuda.runtime.getDeviceCount():
            return None
    except ImportError:
        return None
    except Exception as error:  # CuPy's errors are its own; without a driver it has these
        if type(error).__name__ not in {"CUDARuntimeError", "CUDADriverError"}:
            raise
        return None
    if not hasattr(cupy.cuda.Stream, "from_external"):
        log.warning("the GPU is left alone: CuPy is older than 14")
        return None
    built = folder
    if launches and built is None:
        built = find_built(int(cupy.cuda.Device(index).compute_capability))
        if built is None:
            return None
    return CupyDevice(cupy, index, built, library=find_driver())
