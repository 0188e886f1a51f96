"""What `kvstore bench gpu` measures of the device tier: a daemon's pool beside a plain copy.

Bytes are those that the pages hold, whatever a codec makes of them.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.bench.daemon import BenchDaemon
from kvstore.bench.gpu_rig import (
    ENGINE_STREAM,
    GpuShape,
    Rig,
    check_stored,
    median_seconds,
    run_copies,
    wait_until,
    wait_until_registered,
)
from kvstore.client.cache import PrefixCache
from kvstore.client.gpu import DeviceCache
from kvstore.compression.policy import CodecPolicy
from kvstore.errors import InternalError, UnavailableError
from kvstore.gpu.device import Copy, Urgency, host_bytes
from kvstore.limits import MIB
from kvstore.transfer.copies import Runs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.client.sync import Space
    from kvstore.gpu.device import Device
    from kvstore.protocol.stats import TierStats

_TIMEOUT_SECONDS: Final = 10.0


class PoolSpeeds(NamedTuple):
    """Bytes a second, in GB."""

    store: float
    load: float
    floor: float
    """One copy of the same bytes on the device."""


def pool_settings(gpu: str, size_bytes: int) -> dict[str, str]:
    """Return the settings of a daemon with a pool for *size_bytes*, and as much again."""
    return {
        "tiers.device.gpu": gpu,
        "tiers.device.capacity": f"{-(-2 * size_bytes // MIB) + 1}MiB",
    }


def tier_of(daemon: BenchDaemon, name: str) -> TierStats:
    """Return how the tier *name* of the daemon does."""
    return next(tier for tier in daemon.client.stats().tiers if tier.tier == name)


def measure_pool(
    device: Device, shape: GpuShape, rounds: int, gpu: str, codec: str = "raw"
) -> PoolSpeeds:
    """Store to and load from the pool of a daemon of the bench's own, and check the bytes.

    Raises `UnavailableError`, which says why, where there is no pool or it was not used.
    """
    total = shape.chunks * shape.layout(0).chunk_bytes
    settings = pool_settings(gpu, total)
    # All layers alike: it is the kernels that are measured, not a policy.
    policy = CodecPolicy(codec=codec, edge_layers=0)
    with (
        Rig(device, shape) as rig,
        BenchDaemon(2 * total + 16 * MIB, checksums=True, prefault=True, more=settings) as daemon,
        PrefixCache(
            shape.manifest(codec),
            socket=daemon.socket,
            timeout_seconds=_TIMEOUT_SECONDS,
            policy=policy,
        ) as cache,
        DeviceCache(cache, device, shape.layout(rig.first.address)) as on_gpu,
    ):
        wait_until(lambda: cache.is_connected, "a connection to the daemon")
        bench = _PoolBench(rig, daemon, on_gpu, policy)
        bench.check()
        across = [Copy(rig.second.address, rig.first.address, total)]
        stream = device.stream(Urgency.HIGH)
        seconds = (
            bench.store_seconds(rounds),
            median_seconds(rounds, bench.load),
            median_seconds(rounds, partial(run_copies, stream, across)),
        )
        # One call to check, one that does not count, and the rounds.
        require_pooled(
            tier_of(daemon, "device").counters,
            (rounds + 2) * shape.chunks,
            refused=on_gpu.counters.pools_refused,
        )
        return PoolSpeeds(*(total / each / 1e9 for each in seconds))


def require_pooled(counters: Mapping[str, int], chunks: int, *, refused: int) -> None:
    """Raise `UnavailableError` unless *chunks* were stored in the pool, and as many loaded.

    *refused* is how often the device could not map it.
    """
    for what in ("stored", "loaded"):
        found = counters[f"{what}_chunks"]
        if found != chunks:
            raise UnavailableError(
                f"the pool was not used: {found} of {chunks} chunks were {what} there"
                f" ({refused} times it could not be mapped)"
            )


class _PoolBench:
    def __init__(
        self, rig: Rig, daemon: BenchDaemon, on_gpu: DeviceCache, policy: CodecPolicy
    ) -> None:
        self._rig = rig
        self._policy = policy
        self._daemon = daemon
        self._on_gpu = on_gpu
        self._space: Space = daemon.client.attach(rig.shape.manifest(policy.codec))
        self._digests = rig.shape.digests()
        self._second = rig.shape.layout(rig.second.address)

    def store(self) -> None:
        """Store all chunks."""
        fence = self._on_gpu.fence(ENGINE_STREAM)
        report = self._on_gpu.store(self._digests, self._rig.pages, after=fence)
        if report.stored != len(self._digests):
            raise UnavailableError(f"chunks were not stored: {report}")

    def load(self) -> None:
        """Load all chunks into the second pages."""
        fence = self._on_gpu.fence(ENGINE_STREAM)
        pages = self._rig.pages
        found = self._on_gpu.load(self._digests, pages, after=fence, layout=self._second)
        if found != len(self._digests):
            raise UnavailableError(f"{found} of {len(self._digests)} chunks were loaded")

    def store_seconds(self, rounds: int) -> float:
        """Return what a store takes; copies down to the host tier end before the next begins."""
        taken = []
        for _ in range(rounds + 1):
            self._clear()
            started_at = time.perf_counter()
            self.store()
            taken.append(time.perf_counter() - started_at)
            self._wait_for_copies()
        return median(taken[1:])

    def check(self) -> None:
        """Store and load once.

        Raises `InternalError` unless what is stored is what the host would have made of it, and
        the pages hold that then.
        """
        rig, total = self._rig, self._rig.total_bytes
        self.store()
        wait_until_registered(self._on_gpu, self._space)
        self._wait_for_copies()
        check_stored(rig, self._space, self._policy, self._digests)
        self.load()
        stream = rig.device.stream(Urgency.HIGH)
        run_copies(stream, rig.flat(rig.second, to_device=False))
        found = rig.expected(host_bytes(rig.base, total))
        plain, size = np.empty(total, np.uint8), total // len(self._digests)
        targets = [Runs.of_buffer(plain[at : at + size]) for at in range(0, total, size)]
        with self._space.load(self._digests) as loaded:
            loaded.copy_to(targets)
        if not np.array_equal(found, plain):
            raise InternalError("pages loaded from the device tier are not what was stored")

    def _clear(self) -> None:
        wait_until(
            lambda: not self._space.delete(self._digests).busy, "chunks that nobody uses any more"
        )

    def _wait_for_copies(self) -> None:
        count = len(self._digests)
        wait_until(lambda: tier_of(self._daemon, "host").chunks == count, "copies in the host tier")
