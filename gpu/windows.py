"""The arena, registered with the driver window by window, in the background.

What is registered is copied at full speed and without the host. Until then, and where the limit
of locked memory ends it, copies bounce through pinned staging memory.
"""

from __future__ import annotations

import logging
import threading
from typing import NamedTuple, Protocol

from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.device import Device, DeviceError
from kvstore.limits import REGISTER_STEP_BYTES

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run of host memory."""

    address: int
    size_bytes: int


class HostMemory(Protocol):
    """Knows which host memory the device can reach by itself."""

    def pinned_runs(self, address: int, size_bytes: int) -> list[Run]:
        """Cut a run into what one copy may take; nothing, when part of it is not pinned."""
        ...


class AllPinned:
    """Host memory that its owner has pinned in one piece."""

    def pinned_runs(self, address: int, size_bytes: int) -> list[Run]:
        """Return the run as it is."""
        return [Run(address, size_bytes)]


class Windows:
    """Registers *size_bytes* from *address* on. *owner* is kept alive for as long.

    A GPU registers whole pages of memory: *address* and *step_bytes* are multiples of them.
    """

    def __init__(
        self,
        device: Device,
        address: int,
        size_bytes: int,
        *,
        owner: object,
        counters: DeviceCounters,
        step_bytes: int = REGISTER_STEP_BYTES,
    ) -> None:
        self._device = device
        self._start, self._end = address, address + size_bytes
        self._step = step_bytes
        self._reached = address
        self._owner = owner
        self._counters = counters
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-register", daemon=True)

    def start(self) -> None:
        """Begin, in the background."""
        self._thread.start()

    @property
    def registered_bytes(self) -> int:
        """How much is registered by now."""
        return self._reached - self._start

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when registering has come to its end, or the time is over."""
        self._thread.join(timeout_seconds)

    def pinned_runs(self, address: int, size_bytes: int) -> list[Run]:
        """Cut at the borders of windows: one copy must not cross two registrations."""
        end = address + size_bytes
        if not self._start <= address or end > self._reached:
            return []
        runs = []
        while address < end:
            border = address + self._step - (address - self._start) % self._step
            stop = min(end, border)
            runs.append(Run(address, stop - address))
            address = stop
        return runs

    def close(self) -> None:
        """Unregister all; no copy may be under way. Idempotent."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        starts = range(self._start, self._reached, self._step)
        self._reached = self._start
        for start in starts:
            try:
                self._device.unregister(start)
            except DeviceError as error:  # the context is gone, and its registrations with it
                log.info("the arena was not unregistered", extra={"reason": str(error)})
                return

    def _run(self) -> None:
        while self._reached < self._end and not self._stopped.is_set():
            size = min(self._step, self._end - self._reached)
            try:
                self._device.register(self._reached, size)
            except DeviceError as error:
                self._counters.registrations_failed += 1
                log.warning(
                    "the arena is not registered from here on: copies go through pinned memory;"
                    " raise the limit of locked memory (ulimit -l)",
                    extra={"reason": str(error), "registered_bytes": self.registered_bytes},
                )
                return
            self._reached += size
