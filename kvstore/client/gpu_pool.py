"""The daemon's pool of device memory, as one engine's device maps it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING

from kvstore.client.chunks import AttachedSpace
from kvstore.client.connection import deadline_ms
from kvstore.client.sync import Space
from kvstore.gpu.device import DeviceError
from kvstore.gpu.pools import Exported, PoolError
from kvstore.protocol import messages as m

if TYPE_CHECKING:
    from kvstore.client.gpu_steps import Arenas
    from kvstore.gpu.counters import DeviceCounters
    from kvstore.gpu.device import Device
    from kvstore.gpu.pools import Pool, Pools

log = logging.getLogger(__name__)


class PooledSpaces:
    """For the space of every session, one that has the daemon's pool mapped, if it has one.

    That is entered when it is first asked for, and kept with the arena of its session. Thread-safe.
    """

    def __init__(self, device: Device, arenas: Arenas, counters: DeviceCounters) -> None:
        self._device = device
        self._arenas = arenas
        self._counters = counters
        self._lock = threading.Lock()
        self._pools: Pools | None = None

    def of(self, space: Space) -> Space:
        """Return the space to store to and load from: *space* itself where there is no pool.

        Raises what a call to the daemon raises.
        """
        arena = self._arenas.use(space.attached.arena)
        try:
            with self._lock:
                if arena.pooled is None:
                    arena.pooled = self._enter(space)
                return arena.pooled
        finally:
            self._arenas.done(arena)

    def _enter(self, space: Space) -> Space:
        connection, manifest = space.connection, space.manifest
        connection.expect_fd(space.timeout_seconds)
        request = m.Attach(
            connection.next_id(),
            deadline_ms(space.timeout_seconds),
            manifest.encode(),
            manifest.chunk_bytes,
            pool=True,
        )
        attached = connection.call(request, m.Attached, space.timeout_seconds)
        pool = self._open(attached, connection.take_fd())
        if pool is None:
            return space
        arena = space.attached.arena
        pooled = AttachedSpace(manifest, attached, arena, pool)
        return Space(connection, pooled, space.timeout_seconds)

    def _open(self, attached: m.Attached, fd: int) -> Pool | None:
        """Map what the daemon has told of; None where there is nothing, or it cannot be mapped."""
        exported = Exported(fd, attached.pool_handle)
        if not attached.pool_bytes:
            _close(exported)
            return None
        try:
            pools = self._reaching(attached.pool_device)
        except DeviceError as error:
            _close(exported)
            self._refused(error)
            return None
        try:
            pool = pools.open(attached.pool_bytes, exported)
        except DeviceError as error:
            self._refused(error)
            return None
        log.info("device memory mapped", extra={"pool_bytes": pool.size_bytes})
        return pool

    def _reaching(self, device: str) -> Pools:
        """Return what opens pools of *device*; raises `DeviceError`."""
        if self._pools is None:
            self._pools = self._device.pools()
        if not self._pools.reaches(device):
            raise PoolError(f"it lies on {device}, out of reach")
        return self._pools

    def _refused(self, error: DeviceError) -> None:
        self._counters.pools_refused += 1
        log.warning(
            "the daemon's device memory is not used: chunks go through host memory",
            extra={"device": self._device.name, "reason": str(error)},
        )


def _close(exported: Exported) -> None:
    if exported.fd >= 0:
        with contextlib.suppress(OSError):
            os.close(exported.fd)
