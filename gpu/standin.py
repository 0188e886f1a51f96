"""A GPU that is not there: streams and device memory in host memory, in any order CUDA allows.

Work is done when the device *gets on*: at every call, and whenever somebody asks for an event,
a number of steps drawn from *rng*; which stream gets each step is drawn, too. Copies of a batch
go in any order and in pieces, kernels chunk by chunk in any order. So one seed is one
interleaving, and every order that events do not forbid comes up for some seed.

What CUDA leaves to luck is found out: work on memory that was freed or is not the device's, and
copies with host memory that is not pinned, break the device, as an illegal address does.
It can be told to hold streams still (`stall`) and to fail (`fail`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import RequestError
from kvstore.gpu.device import (
    Copy,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    Event,
    RegistrationError,
    Urgency,
    host_bytes,
)
from kvstore.gpu.standin_pools import StandinPools
from kvstore.gpu.twins import TWINS, Step, Twin

Fault = Literal["allocate", "pin", "register", "copy", "launch", "lost"]

_FREED: Final = 0xDD
_FRESH: Final = 0xCD
_STEPS_MAX: Final = 4
"""Steps at one call, at most: few, so that a host far ahead of its device is the usual case."""
_PIECES_MAX: Final = 3

_ERRORS: Final[Mapping[str, type[DeviceError]]] = {
    "allocate": DeviceMemoryError,
    "pin": DeviceMemoryError,
    "register": RegistrationError,
    "copy": DeviceError,
    "launch": DeviceError,
    "lost": DeviceLostError,
}


class StandinMemory:
    """Memory that the stand-in calls its own, or pinned. Filled with rubbish at both ends."""

    def __init__(self, device: Standin, size_bytes: int, *, is_pinned: bool) -> None:
        self._bytes = np.full(size_bytes + _ALIGNMENT, _FRESH, dtype=np.uint8)
        start = self._bytes.ctypes.data
        self.address = start + -start % _ALIGNMENT
        self.size_bytes = size_bytes
        self._device = device
        device.claim(self.address, size_bytes, is_pinned=is_pinned)

    @property
    def view(self) -> NDArray[np.uint8]:
        """The bytes, for tests to write and read."""
        skipped = self.address - self._bytes.ctypes.data
        return self._bytes[skipped : skipped + self.size_bytes]

    def free(self) -> None:
        """Give it back; the bytes become rubbish."""
        self._device.disclaim(self.address)
        self.view[:] = _FREED


_ALIGNMENT: Final = 256


class StandinEvent:
    """Done when its stream has come so far."""

    def __init__(self, device: Standin) -> None:
        self._device = device
        self.has_passed = False
        self.passed_at = 0.0

    def is_done(self) -> bool:
        """Let the device get on, and say whether it has come so far."""
        self._device.get_on()
        return self.has_passed

    def seconds_since(self, earlier: Event) -> float:
        """Return the time between two events that are done."""
        if not (isinstance(earlier, StandinEvent) and earlier.has_passed and self.has_passed):
            raise DeviceError("an event that is not done, or of another device")
        return self.passed_at - earlier.passed_at


@dataclass(slots=True)
class _Work:
    """What a stream does next: steps in any order, or waiting for an event."""

    steps: list[Step] = field(default_factory=list)
    event: StandinEvent | None = None


class StandinStream:
    """Work in order, done when the device gets on."""

    def __init__(self, device: Standin, urgency: Urgency) -> None:
        self._device = device
        self.urgency = urgency
        self.is_stalled = False
        self.queue: deque[_Work] = deque()

    def wait(self, event: Event) -> None:
        """Hold back what follows until *event*."""
        if not isinstance(event, StandinEvent):
            raise RequestError("an event of another device")
        self._device.give(self, _Work(event=event))

    def record(self) -> StandinEvent:
        """Return what stands for all that was given until now."""
        event = StandinEvent(self._device)

        def pass_by() -> None:
            event.has_passed, event.passed_at = True, self._device.clock()

        self._device.give(self, _Work([pass_by]))
        return event

    def copy(self, copies: Sequence[Copy]) -> None:
        """Move *copies* in pieces, in no particular order."""
        if any(type(number) is not int for copy in copies for number in copy):
            raise TypeError("an integer is required")  # what CuPy says to numbers of NumPy's
        self._device.meet("copy")
        self._device.give(self, _Work(self._device.pieces_of(copies)))

    def launch(self, kernel: str, argument: NDArray[Any]) -> None:
        """Run the twin of *kernel*, in any order of its steps."""
        self._device.meet("launch")
        batch, device = argument.copy(), self._device

        def begin() -> None:
            # What a kernel reads of device memory it reads when it runs, not when launched.
            work.steps.extend(device.twins[kernel](batch, device.memory_at))

        work = _Work([begin])
        device.give(self, work)

    @property
    def can_step(self) -> bool:
        """Whether there is work that nothing holds back."""
        while self.queue and (event := self.queue[0].event) and event.has_passed:
            self.queue.popleft()
        return bool(self.queue) and self.queue[0].event is None and not self.is_stalled


class Standin:
    """A device in host memory. Thread-safe; one thread and one seed give one interleaving."""

    name = "stand-in"

    def __init__(
        self,
        rng: np.random.Generator,
        *,
        twins: Mapping[str, Twin] = TWINS,
        eager: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """With *eager*, it does everything at once, as a GPU with nothing else to do may.

        Events take their times from *clock*.
        """
        self.twins = twins
        self.clock = clock
        self.memory_bytes_max = 1 << 62
        self._rng = rng
        self._eager = eager
        self._lock = threading.RLock()
        self.streams: list[StandinStream] = []
        self._engines: dict[int, StandinStream] = {}
        self._claims: dict[int, tuple[int, bool]] = {}
        self._faults: dict[Fault, list[int]] = {}
        self._lost: str = ""

    # --- what a device offers -----------------------------------------------------------

    def stream(self, urgency: Urgency) -> StandinStream:
        """Return a new stream."""
        with self._lock:
            self.check()
            made = StandinStream(self, urgency)
            self.streams.append(made)
            return made

    def engine_stream(self, handle: int) -> StandinStream:
        """Return the stream of this *handle*: always the same."""
        with self._lock:
            if handle not in self._engines:
                self._engines[handle] = self.stream(Urgency.HIGH)
            return self._engines[handle]

    def allocate(self, size_bytes: int) -> StandinMemory:
        """Return device memory."""
        self.meet("allocate")
        if self.used_bytes + size_bytes > self.memory_bytes_max:
            raise DeviceMemoryError(f"{size_bytes} bytes asked, {self.used_bytes} in use")
        return StandinMemory(self, size_bytes, is_pinned=False)

    def pin(self, size_bytes: int) -> StandinMemory:
        """Return pinned memory."""
        self.meet("pin")
        return StandinMemory(self, size_bytes, is_pinned=True)

    def register(self, address: int, size_bytes: int) -> None:
        """Take host memory for pinned from now on."""
        self.meet("register")
        self.claim(address, size_bytes, is_pinned=True)

    def unregister(self, address: int) -> None:
        """Take it for pinned no longer."""
        self.disclaim(address)

    def adopt(self, address: int, size_bytes: int) -> None:
        """Call memory of the host this device's own: the pages of an engine that has no GPU."""
        self.claim(address, size_bytes, is_pinned=False)

    def pools(self) -> StandinPools:
        """Return what shares memory with other stand-ins, of this process or another."""
        return StandinPools(self)

    # --- what it can be told --------------------------------------------------------------

    def fail(self, what: Fault, *, after: int = 0, times: int = 1) -> None:
        """Have the call *what* fail *times* times, once it has succeeded *after* times."""
        with self._lock:
            self._faults[what] = [after, times]

    def stall(self, *streams: StandinStream) -> None:
        """Hold *streams* still, or all there are, until `resume`."""
        with self._lock:
            for stream in streams or self.streams:
                stream.is_stalled = True

    def resume(self) -> None:
        """Let all streams go on."""
        with self._lock:
            for stream in self.streams:
                stream.is_stalled = False

    def lose(self, why: str = "told to") -> None:
        """Break for good, as CUDA's sticky errors do."""
        self._lost = self._lost or why

    def drain(self) -> None:
        """Do all that can be done."""
        while self._step():
            pass

    @property
    def used_bytes(self) -> int:
        """How much device memory is taken."""
        with self._lock:
            return sum(size for size, is_pinned in self._claims.values() if not is_pinned)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to be done."""
        return not any(stream.queue for stream in self.streams)

    # --- how it gets on ---------------------------------------------------------------------

    def check(self) -> None:
        """Raise `DeviceLostError` when it is broken."""
        if self._lost:
            raise DeviceLostError(f"the device is lost: {self._lost}")

    def meet(self, what: Fault) -> None:
        """Fail here, if told to."""
        with self._lock:
            self.check()
            for kind in (what, "lost") if what in {"copy", "launch"} else (what,):
                left = self._faults.get(kind)
                if left is None:
                    continue
                if left[0] > 0:
                    left[0] -= 1
                elif left[1] > 0:
                    left[1] -= 1
                    if kind == "lost":
                        self.lose()
                    raise _ERRORS[kind](f"{what} failed, as it was told to")

    def give(self, stream: StandinStream, work: _Work) -> None:
        """Take work for *stream*, and get on a little."""
        with self._lock:
            self.check()
            stream.queue.append(work)
            self.get_on()

    def get_on(self) -> None:
        """Do some of the work."""
        with self._lock:
            self.check()
            if self._eager:
                self.drain()
                return
            for _ in range(int(self._rng.integers(0, _STEPS_MAX + 1))):
                if not self._step():
                    return

    def _step(self) -> bool:
        """Do one step of one stream; return whether there was one."""
        with self._lock:
            ready = [stream for stream in self.streams if stream.can_step]
            if not ready or self._lost:
                return False
            stream = ready[int(self._rng.integers(len(ready)))]
            work = stream.queue[0]
            step = work.steps.pop(int(self._rng.integers(len(work.steps))))
            step()
            if not work.steps:
                stream.queue.popleft()
            return True

    # --- memory -------------------------------------------------------------------------------

    def claim(self, address: int, size_bytes: int, *, is_pinned: bool) -> None:
        """Know memory as the device's own or as pinned."""
        with self._lock:
            self._claims[address] = (size_bytes, is_pinned)

    def disclaim(self, address: int) -> None:
        """Know it no longer; raises `RequestError` when it was not known."""
        with self._lock:
            if self._claims.pop(address, None) is None:
                raise RequestError(f"no memory begins at {address:#x}")

    def memory_at(self, address: int, size_bytes: int) -> NDArray[np.uint8]:
        """Return known memory as bytes; any other breaks the device."""
        for start, (size, _) in self._claims.items():
            if start <= address and address + size_bytes <= start + size:
                return host_bytes(address, size_bytes)
        self.lose(f"illegal address {address:#x}")
        return np.zeros(size_bytes, dtype=np.uint8)

    def pieces_of(self, copies: Sequence[Copy]) -> list[Step]:
        """Cut *copies* into steps."""
        steps: list[Step] = []
        for copy in copies:
            count = int(self._rng.integers(1, _PIECES_MAX + 1))
            bounds = [copy.size_bytes * part // count for part in range(count + 1)]
            for start, stop in itertools.pairwise(bounds):
                if start < stop:
                    steps.append(
                        self._piece(copy.target + start, copy.source + start, stop - start)
                    )
        return steps or [lambda: None]

    def _piece(self, target: int, source: int, size_bytes: int) -> Callable[[], None]:
        def move() -> None:
            moved = self.memory_at(source, size_bytes)
            self.memory_at(target, size_bytes)[:] = moved

        return move
