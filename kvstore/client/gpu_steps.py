"""What transfers of one device share: the registered arena, what is held, and their pipeline."""

from __future__ import annotations

import logging
import threading
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeVar

from kvstore.gpu.device import DeviceError, DeviceLostError, StuckError
from kvstore.gpu.windows import Run, Windows
from kvstore.transfer.native import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvstore.client.sync import Space
    from kvstore.gpu.counters import DeviceCounters
    from kvstore.gpu.device import Device
    from kvstore.gpu.forms import Form
    from kvstore.gpu.lanes import Lane
    from kvstore.gpu.pools import Pool
    from kvstore.gpu.transfers import Transfer, UnderWay
    from kvstore.transfer.arena import ArenaMapping

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class RegisteredArena:
    """An arena of one session, with the windows over it and the number of its users."""

    def __init__(self, mapping: ArenaMapping, windows: Windows, base: int) -> None:
        self.mapping = mapping
        self.windows = windows
        self.base = base
        self.users = 0
        self.pooled: Space | None = None
        """What `gpu_pool.PooledSpaces` has made of the session's space, once it was asked."""

    @property
    def pool(self) -> Pool | None:
        """The device memory that belongs to the same session, if it is mapped."""
        return self.pooled.attached.pool if self.pooled else None

    def at(self, offset: int) -> int:
        """Return the address of *offset*, where the pool begins when the arena ends."""
        pool, behind = self.pool, offset - self.mapping.size_bytes
        return self.base + offset if pool is None or behind < 0 else pool.address + behind

    def runs(self, address: int, size_bytes: int) -> list[Run]:
        """Cut a run into what one copy may take; see `gpu.windows.HostMemory`."""
        pool = self.pool
        if pool and pool.address <= address < pool.address + pool.size_bytes:
            return [Run(address, size_bytes)]
        return self.windows.pinned_runs(address, size_bytes)

    def close(self) -> None:
        """Let go of all of it: nothing is copied to or from it any more."""
        self.windows.close()
        if self.pool is not None:
            self.pool.close()


class Arenas:
    """The arena of the session of the moment, registered, and those that are still in use.

    A daemon that comes back has another arena. The one before it is unregistered when nothing
    is copied to or from it any more; until then it stays mapped. Thread-safe.
    """

    def __init__(self, device: Device, counters: DeviceCounters, step_bytes: int) -> None:
        self._device = device
        self._counters = counters
        self._step_bytes = step_bytes
        self._lock = threading.Lock()
        self._known: list[RegisteredArena] = []

    def use(self, mapping: ArenaMapping) -> RegisteredArena:
        """Return *mapping*, registered; it stays so until `done`."""
        with self._lock:
            found = next((known for known in self._known if known.mapping is mapping), None)
            found = found or self._register(mapping)
            found.users += 1
        return found

    def hold(self, arena: RegisteredArena) -> None:
        """Count one more user of an arena that is in use."""
        with self._lock:
            arena.users += 1

    def done(self, arena: RegisteredArena) -> None:
        """Count one user less; the last of an arena of the past unregisters it."""
        with self._lock:
            arena.users -= 1
            idle = [known for known in self._known[:-1] if not known.users]
            self._known = [known for known in self._known if known not in idle]
        for known in idle:
            known.close()

    def pinned_runs(self, address: int, size_bytes: int) -> list[Run]:
        """Cut a run into what one copy may take; see `gpu.windows.HostMemory`."""
        for known in tuple(self._known):
            if runs := known.runs(address, size_bytes):
                return runs
        return []

    @property
    def registered_bytes(self) -> int:
        """How much of the arena of the moment is registered."""
        known = self._known[-1:]
        return known[0].windows.registered_bytes if known else 0

    def close(self) -> None:
        """Unregister what nobody uses."""
        with self._lock:
            idle = [known for known in self._known if not known.users]
            self._known = [known for known in self._known if known.users]
        for known in idle:
            known.close()

    def _register(self, mapping: ArenaMapping) -> RegisteredArena:
        base = address_of(mapping.view)
        windows = Windows(
            self._device,
            base,
            mapping.size_bytes,
            owner=mapping,
            counters=self._counters,
            step_bytes=self._step_bytes,
        )
        windows.start()
        self._known.append(RegisteredArena(mapping, windows, base))
        return self._known[-1]


class Held:
    """Transfers that were given up, and what is let go of when they are over. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[tuple[UnderWay, Callable[[], None]]] = []

    def __len__(self) -> int:
        return len(self._held)

    def add(self, transfer: UnderWay, let_go: Callable[[], None]) -> None:
        """Have *let_go* called when *transfer* is over: at a later `reap`, or never."""
        with self._lock:
            self._held.append((transfer, let_go))

    def reap(self) -> None:
        """Let go of what is over by now."""
        with self._lock:
            over = [one for one in self._held if one[0].is_over()]
            self._held = [one for one in self._held if one not in over]
        for _, let_go in over:
            let_go()


class Outcome(Enum):
    """How a transfer ended."""

    LANDED = auto()
    FAILED = auto()
    """Nothing is under way any more."""
    HELD = auto()
    """Something may be: what it touches is let go of when it is over."""


def land(
    transfer: UnderWay,
    held: Held,
    keep: Callable[[], Callable[[], None]],
    wait: Callable[[], object] | None = None,
) -> Outcome:
    """Wait for *transfer*, or *wait* for a part of it.

    If it may still be under way when that has failed, *keep* what it touches.
    """
    try:
        (wait or transfer.finish)()
    except (StuckError, DeviceLostError) as error:
        log.error("a transfer was given up", extra={"reason": str(error)})
        held.add(transfer, keep())
        return Outcome.HELD
    except DeviceError as error:
        log.warning("a transfer failed", extra={"reason": str(error)})
        return Outcome.FAILED
    return Outcome.LANDED


def pipeline(
    lane: Lane,
    groups: Iterator[list[Item]],
    begin: Callable[[list[Item]], Transfer],
    end: Callable[[Transfer, list[Item]], bool],
    drop: Callable[[Transfer, list[Item]], None],
) -> None:
    """Begin groups as slots are free, and end them in order, until one says that it was the last.

    All that was begun is ended or, when something has ended it early, dropped: nothing is under
    way behind this that nobody looks after.
    """
    begun: deque[tuple[Transfer, list[Item]]] = deque()
    group = next(groups, None)
    try:
        while begun or group is not None:
            if group is not None and not lane.off and lane.can_begin:
                begun.append((begin(group), group))
                group = next(groups, None)
            elif not begun or not end(*begun.popleft()):
                return
    finally:
        for one in begun:
            drop(*one)


def groups_of(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Yield *items* at most *size* at a time."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def alike(
    items: Iterable[Item], kind_of: Callable[[Item], tuple[Form, bool]], lane: Lane
) -> Iterator[list[Item]]:
    """Yield *items* that follow each other and go in one transfer of *lane*.

    These have one form, and are all in device memory or none: their kind.
    """
    group: list[Item] = []
    kind: tuple[Form, bool] | None = None
    for item in items:
        form, on_device = kind_of(item)
        is_full = len(group) == lane.capacity(form, on_device=on_device)
        if group and ((form, on_device) != kind or is_full):
            yield group
            group = []
        kind = form, on_device
        group.append(item)
    if group:
        yield group
