"""`kvstore bench gpu`: pages on a GPU to the arena and back, beside plain copies of the same run.

Builds the kernels where none are built, checks them against NumPy, and measures, in less than ten
minutes. Floors are plain asynchronous copies between the same memory: one direction, both at
once, and on the device. Where there is no GPU it says so and ends with 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from kvstore.bench import report
from kvstore.bench.daemon import BenchDaemon
from kvstore.bench.gpu_pool import measure_pool
from kvstore.bench.gpu_rig import (
    ENGINE_STREAM,
    GpuShape,
    Rig,
    check_stored,
    host_microseconds,
    last_words,
    median_seconds,
    run_copies,
    run_lane,
    together,
    wait_until,
    wait_until_registered,
)
from kvstore.bench.report import Figures, Verdict
from kvstore.client.cache import PrefixCache
from kvstore.client.gpu import DeviceCache
from kvstore.compression.policy import CodecPolicy
from kvstore.errors import InternalError, UnavailableError
from kvstore.gpu.cupy_device import open_device
from kvstore.gpu.device import Copy, Urgency
from kvstore.gpu.devices import find_devices
from kvstore.gpu.lanes import LoadLane, StoreLane
from kvstore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.gpu.device import Device

SHAPES: Final = (
    GpuShape("Llama-8B, 256 tokens", 32, 8, 128, 16, 16, chunks=16),
    GpuShape("Llama-8B, 64 tokens", 32, 8, 128, 16, 4, chunks=64),
)
QUICK: Final = GpuShape("smoke", 2, 2, 64, 16, 2, chunks=4)
_ROUNDS: Final = 9
_MODEL_ROUNDS_MAX: Final = 3
_BUDGET_SECONDS: Final = 540.0
CODECS: Final = ("raw", "int8kv", "int4kv")
_CODED_MIN: Final = {"int4kv": 3.2}
"""Raw bytes a second, by those of the raw path."""
_ONE_WAY_MIN: Final = 0.90
_DUPLEX_MIN: Final = 0.85
_POOL_MIN: Final = 0.80
POOL_CODECS: Final = ("raw", "int8kv", "int4kv")
_FENCE_MICROSECONDS_MAX: Final = 100.0
_MATMUL_SLOWER_MAX: Final = 0.03
_MATMUL_SIZE: Final = 8192
_MATMULS: Final = 40
_TIMEOUT_SECONDS: Final = 10.0

_COLUMNS: Final = {
    "shape": "shape",
    "what": "what",
    "gb_per_s": "GB/s",
    "floor": "floor",
    "floor_gb_per_s": "floor GB/s",
    "ratio": "ratio",
    "target": "target",
    "verdict": "verdict",
}
_MODEL_COLUMNS: Final = {
    "tokens": "prefix, tokens",
    "what": "what",
    "first_token_ms": "ms",
    "faster": "times cold",
    "moved_by": "moved by",
    "logits_off": "logits off by",
    "outcome": "outcome",
}


def main(argv: list[str]) -> int:
    """Measure and print; return 0 whatever the verdicts, and 1 where there is no GPU."""
    options, started_at = _parse(argv), time.monotonic()
    device = open_device(options.device)
    if device is None:
        found = find_devices()
        nodes = ", ".join(found.nodes) or "no device nodes"
        sys.stderr.write(
            f"kvstore bench gpu: no GPU to use here ({found.driver or 'no driver'}; {nodes});"
            " it needs a CUDA device, CuPy, and kernels or NVRTC to build them\n"
        )
        return 1
    shapes = (QUICK,) if options.quick else SHAPES
    rounds = options.rounds or (1 if options.quick else _ROUNDS)
    found_report = measure(device, shapes, rounds, gpu=str(options.device), matmul=_find_matmul())
    left = options.budget - (time.monotonic() - started_at)
    found_report["models"] = _measure_model(
        options.device, min(rounds, _MODEL_ROUNDS_MAX), left, quick=options.quick
    )
    found_report["targets"] += [
        verdict.figures() for verdict in _model_verdicts(found_report["models"])
    ]
    if options.output == "json":
        report.print_json(found_report)
    else:
        _print(found_report)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvstore bench gpu",
        description="Pages on a GPU to the arena and back, beside plain copies of the same run.",
    )
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default 0)")
    parser.add_argument("--rounds", type=int, help=f"counted rounds (default {_ROUNDS})")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        default=_BUDGET_SECONDS,
        help=f"what of the model would take longer is left out (default {_BUDGET_SECONDS:.0f})",
    )
    parser.add_argument("--quick", action="store_true", help="one small shape: a smoke test")
    return parser.parse_args(argv)


def measure(
    device: Device,
    shapes: Sequence[GpuShape],
    rounds: int,
    *,
    gpu: str = "0",
    matmul: Callable[[int], float] | None = None,
) -> Figures:
    """Check and measure; *matmul* returns the seconds of so many products on the device.

    *gpu* is *device* as the setting `tiers.device.gpu` has it.
    """
    rows: list[Figures] = []
    checks: Figures = {}
    for shape in shapes:
        with Rig(device, shape) as rig:
            started_at = time.perf_counter()
            rig.check()
            checks[f"{shape.name}: checked, seconds"] = time.perf_counter() - started_at
            checks[f"{shape.name}: arena registered, seconds"] = rig.register_seconds
            rows += _rows(rig, rounds)
            fence, begin = host_microseconds(rig, rounds)
            checks[f"{shape.name}: host time of a fence, us"] = fence
            checks[f"{shape.name}: host time to begin a transfer, us"] = begin
            if matmul is not None and shape is shapes[0]:
                checks["matmul beside stores, slower by"] = _matmul_slowdown(rig, matmul)
        rows += _through_a_daemon(device, shape, rounds)
        if shape is shapes[0]:
            for codec in POOL_CODECS:
                rows += _through_a_pool(device, shape, rounds, gpu, codec)
    return {
        "machine": report.machine() | {"device": device.name},
        "rows": rows,
        "checks": checks,
        "targets": [verdict.figures() for verdict in _verdicts(rows, checks)],
    }


# --- what is measured ---------------------------------------------------------------------------


def _rows(rig: Rig, rounds: int) -> Iterator[Figures]:
    """Yield lanes beside their floors."""
    out, back = (rig.device.stream(urgency) for urgency in (Urgency.LOW, Urgency.HIGH))
    down = partial(run_copies, out, rig.flat(rig.first, to_device=False))
    up = partial(run_copies, back, rig.flat(rig.second, to_device=True, half=1))
    across = Copy(rig.second.address, rig.first.address, rig.total_bytes)
    speed = partial(_speed, rig, rounds)
    floors = {
        "pinned copy to the host": speed(down),
        "pinned copy to the device": speed(up),
        "both at once": speed(partial(together, down, up), 2),
        "copy on the device": speed(partial(run_copies, out, [across])),
    }
    for name, bare in floors.items():
        yield _row(rig.shape, f"floor: {name}", bare, name, bare, None)
    for words in ({}, {"opaque": True}, {"opaque": True, "direct": True}):
        name = _name_of(**words)
        store = rig.lane(StoreLane, rig.first, **words)
        load = rig.lane(LoadLane, rig.second, **words)
        storing = partial(run_lane, store, rig.moved())
        loading = partial(run_lane, load, rig.moved(1))
        storing()
        run_lane(store, rig.moved(1))
        target = _ONE_WAY_MIN if not words else None
        for what, call, floor in (
            ("store", storing, "pinned copy to the host"),
            ("load", loading, "pinned copy to the device"),
        ):
            yield _row(rig.shape, f"{what}, {name}", speed(call), floor, floors[floor], target)
        both = speed(partial(together, storing, loading), 2)
        duplex = _DUPLEX_MIN if not words else None
        yield _row(rig.shape, f"both, {name}", both, "both at once", floors["both at once"], duplex)
        store.close()
        load.close()


def _name_of(*, opaque: bool = False, direct: bool = False) -> str:
    if direct:
        return "pages as they are, by the copy engine"
    return "pages as they are, staged" if opaque else "gathered"


def _speed(rig: Rig, rounds: int, call: Callable[[], object], times: int = 1) -> float:
    """Return bytes a second, in GB, of a call that moves all chunks so many *times*."""
    return times * rig.total_bytes / median_seconds(rounds, call) / 1e9


def _row(
    shape: GpuShape, what: str, speed: float, floor: str, floor_speed: float, target: float | None
) -> Figures:
    ratio = speed / floor_speed
    row: Figures = {
        "shape": shape.name,
        "what": what,
        "gb_per_s": speed,
        "floor": floor,
        "floor_gb_per_s": floor_speed,
        "ratio": ratio,
        "target": target,
    }
    if target is not None:
        row["verdict"] = Verdict(what, target, ratio, "more").word
    return row


def _through_a_daemon(device: Device, shape: GpuShape, rounds: int) -> Iterator[Figures]:
    """Yield stores and loads through a daemon of the bench's own, beside plain copies.

    Codecs stand beside the raw path of the same run, in raw bytes a second.
    """
    total = shape.chunks * shape.layout(0).chunk_bytes
    with Rig(device, shape) as rig, _daemon(2 * total) as daemon:
        stream, raw = device.stream(Urgency.HIGH), dict[str, float]()
        for codec in CODECS:
            for what, call in _calls(device, rig, daemon, codec):
                speed = _speed(rig, rounds, call)
                name = f"{what} through the daemon, {codec}"
                if codec == "raw":
                    raw[what] = speed
                    flat = rig.flat(rig.second, to_device=what == "load")
                    floor = f"pinned copy to the {'device' if what == 'load' else 'host'}"
                    floor_speed = _speed(rig, rounds, partial(run_copies, stream, flat))
                    yield _row(shape, name, speed, floor, floor_speed, _ONE_WAY_MIN)
                else:
                    target = _CODED_MIN.get(codec)
                    yield _row(shape, name, speed, f"{what}, raw", raw[what], target)


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


def _through_a_pool(
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
        yield _row(shape, names[what], speed, "copy on the device", found.floor, target)


def _measure_model(index: int, rounds: int, seconds: float, *, quick: bool) -> list[Figures]:
    """Return the rows of a model on GPU number *index*, or what is missing for them."""
    lacking = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if lacking:
        reason = f"needs {' and '.join(lacking)}: pip install 'kvstore[hf]'"
        return [{"what": "not measured", "outcome": reason}]
    from kvstore.bench import gpu_model

    shape = gpu_model.TINY if quick else gpu_model.ABOUT_1B
    return gpu_model.measure_cuda(index, shape, rounds=rounds, seconds=seconds)


def _matmul_slowdown(rig: Rig, matmul: Callable[[int], float]) -> float:
    """Return by how much a running offload slows products down."""
    matmul(_MATMULS)
    alone = min(matmul(_MATMULS) for _ in range(3))
    lane, stop = rig.lane(StoreLane, rig.first), threading.Event()

    def offload() -> None:
        while not stop.is_set():
            run_lane(lane, rig.moved())

    thread = threading.Thread(target=offload)
    thread.start()
    try:
        beside = min(matmul(_MATMULS) for _ in range(3))
    finally:
        stop.set()
        thread.join()
        lane.close()
    return beside / alone - 1


def _find_matmul() -> Callable[[int], float]:
    """Return what runs products of half precision with CuPy and returns their seconds."""
    import cupy

    side: Any = cupy.ones((_MATMUL_SIZE, _MATMUL_SIZE), dtype=cupy.float16)

    def run(count: int) -> float:
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        for _ in range(count):
            cupy.matmul(side, side)
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3

    return run


# --- how it is shown ----------------------------------------------------------------------------


def _verdicts(rows: Sequence[Figures], checks: Figures) -> list[Verdict]:
    verdicts = [
        Verdict(f"{row['what']} ({row['shape']})", row["target"], row["ratio"], "more")
        for row in rows
        if row.get("target") is not None
    ]
    for name, value in checks.items():
        if name.endswith("a fence, us"):
            verdicts.append(Verdict(name, _FENCE_MICROSECONDS_MAX, value, "less"))
        elif name.startswith("matmul"):
            verdicts.append(Verdict(name, _MATMUL_SLOWER_MAX, value, "less"))
    return verdicts


def _model_verdicts(rows: Sequence[Figures]) -> list[Verdict]:
    """Judge what is stored raw: the answers are those of the model alone."""
    return [
        Verdict(f"logits off by, {row['what']} ({row['tokens']})", 0.0, row["logits_off"], "less")
        for row in rows
        if "logits_off" in row and row["what"].endswith("raw")
    ]


def _print(found: Figures) -> None:
    for key, value in found["machine"].items():
        print(f"{key}: {value}")
    report.print_heading("Chunks between pages and host memory, medians")
    report.print_table(_COLUMNS, found["rows"])
    report.print_heading("Time to first token, medians")
    report.print_table(_MODEL_COLUMNS, found.get("models", []))
    report.print_heading("Checks and host time")
    rows = [{"what": name, "value": value} for name, value in found["checks"].items()]
    report.print_table({"what": "what", "value": "value"}, rows)
    report.print_heading("Targets")
    columns = {"target": "target", "limit": "limit", "measured": "measured", "verdict": "verdict"}
    report.print_table(columns, found["targets"])
