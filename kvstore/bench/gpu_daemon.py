"""What `kvstore bench gpu` measures through a daemon of its own: the host tier, and its pool."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from kvstore.bench.daemon import BenchDaemon
from kvstore.bench.gpu_bus import ONE_WAY_MIN
from kvstore.bench.gpu_pool import measure_pool
from kvstore.bench.gpu_rig import (
    ENGINE_STREAM,
    Rig,
    check_stored,
    last_words,
    run_copies,
    speed_row,
    wait_until,
    wait_until_registered,
)
from kvstore.client.cache import PrefixCache
from kvstore.client.gpu import DeviceCache
from kvstore.compression.policy import CodecPolicy
from kvstore.errors import InternalError, UnavailableError
from kvstore.gpu.device import Urgency
from kvstore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvstore.bench.gpu_rig import GpuShape
    from kvstore.bench.report import Figures
    from kvstore.gpu.device import Device

CODECS: Final = ("raw", "int8kv", "int4kv", "exp3")
LARGE_CODECS: Final = ("nvfp4-compat", "ecsq-mid")
"""What is measured of chunks of *_LARGE_TOKENS* and more: smaller ones, ecsq leaves to others."""
_LARGE_TOKENS: Final = 64
_CODED_MIN: Final = {"int4kv": 3.2}
"""Raw bytes a second, by those of the raw path."""
_POOL_MIN: Final = 0.80
_TIMEOUT_SECONDS: Final = 10.0


def daemon_rows(device: Device, shape: GpuShape, rounds: int) -> Iterator[Figures]:
    """Yield stores and loads through a daemon of the bench's own, beside plain copies.

    Codecs stand beside the raw path of the same run, in raw bytes a second.
    """
    total = shape.chunks * shape.layout(0).chunk_bytes
    with Rig(device, shape) as rig, _daemon(2 * total) as daemon:
        stream, raw = device.stream(Urgency.HIGH), dict[str, float]()
        for codec in _codecs_for(shape):
            for what, call in _calls(device, rig, daemon, codec):
                speed = rig.speed(rounds, call)
                name = f"{what} through the daemon, {codec}"
                if codec == "raw":
                    raw[what] = speed
                    flat = rig.flat(rig.second, to_device=what == "load")
                    floor = f"pinned copy to the {'device' if what == 'load' else 'host'}"
                    floor_speed = rig.speed(rounds, partial(run_copies, stream, flat))
                    yield speed_row(shape, name, speed, floor, floor_speed, ONE_WAY_MIN)
                else:
                    target = _CODED_MIN.get(codec)
                    yield speed_row(shape, name, speed, f"{what}, raw", raw[what], target)


def _codecs_for(shape: GpuShape) -> tuple[str, ...]:
    is_large = shape.page_tokens * shape.pages_per_chunk >= _LARGE_TOKENS
    return CODECS + LARGE_CODECS if is_large else CODECS


def _calls(
    device: Device, rig: Rig, daemon: BenchDaemon, codec: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what stores all chunks with *codec*, and what loads them, once they were checked."""
    shape = rig.shape
    manifest, digests = shape.manifest(codec), shape.digests()
    # All layers alike: it is the kernels that are measured, not a policy.
    policy = CodecPolicy(codec=codec, edge_layers=0)
    cache = PrefixCache(
        manifest, socket=daemon.socket, timeout_seconds=_TIMEOUT_SECONDS, policy=policy
    )
    wait_until(lambda: cache.is_connected, "a connection to the daemon")
    first, second = (shape.layout(memory.address) for memory in (rig.first, rig.second))
    with cache, DeviceCache(cache, device, first) as on_gpu:
        space = daemon.client.attach(manifest)
        on_gpu.store(digests[:1], rig.pages[:1])  # has the arena registered
        wait_until_registered(on_gpu, space)
        fence = partial(on_gpu.fence, ENGINE_STREAM)

        def store() -> None:
            space.delete(digests)
            report_of = on_gpu.store(digests, rig.pages, after=fence())
            assert report_of.stored == len(digests), report_of

        def load() -> None:
            found = on_gpu.load(digests, rig.pages, after=fence(), layout=second)
            assert found == len(digests), found

        store()
        check_stored(rig, space, policy, digests)
        if codec != "raw" and on_gpu.counters.host_encoded_chunks:
            raise InternalError(f"the host has encoded chunks of {codec}")
        yield "store", store
        yield "load", load
        space.delete(digests)


def _daemon(total_bytes: int) -> BenchDaemon:
    return BenchDaemon(2 * total_bytes + 16 * MIB, checksums=True, prefault=True)


def pool_rows(
    device: Device, shape: GpuShape, rounds: int, gpu: str, codec: str
) -> Iterator[Figures]:
    """Yield a store and a load through the device tier of a daemon; where there is none, why."""
    names = {what: f"{what}, device tier, {codec}" for what in ("store", "load")}
    try:
        found = measure_pool(device, shape, rounds, gpu, codec)
    except UnavailableError as error:
        for name in names.values():
            yield {"shape": shape.name, "what": name, "verdict": last_words(error)}
        return
    target = _POOL_MIN if codec == "raw" else None
    for what, speed in (("store", found.store), ("load", found.load)):
        yield speed_row(shape, names[what], speed, "copy on the device", found.floor, target)
