"""`kvstore bench gpu`: pages on a GPU to the arena and back, beside plain copies of the same run.

Builds the kernels where none are built, checks them against NumPy, and measures, in less than ten
minutes: part by part, and what one part cannot do is said in its place. Where there is no GPU it
says so and ends with 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstore.bench import gpu_page, report
from kvstore.bench.gpu_bus import break_even_kib, bus_rows, page_rows, why_not_batched
from kvstore.bench.gpu_daemon import daemon_rows, pool_rows
from kvstore.bench.gpu_rig import GpuShape, Rig, host_microseconds, last_words, run_lane
from kvstore.gpu.cupy_device import open_device
from kvstore.gpu.devices import find_devices
from kvstore.gpu.lanes import StoreLane

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvstore.bench.report import Figures
    from kvstore.gpu.device import Device

SHAPES: Final = (
    GpuShape("Llama-8B, 256 tokens", 32, 8, 128, 16, 16, chunks=16),
    GpuShape("Llama-8B, 64 tokens", 32, 8, 128, 16, 4, chunks=64),
)
QUICK: Final = GpuShape("smoke", 2, 2, 64, 16, 2, chunks=4)
POOL_CODECS: Final = ("raw", "int8kv", "int4kv")
_ROUNDS: Final = 9
_MODEL_ROUNDS_MAX: Final = 3
_BUDGET_SECONDS: Final = 540.0
_MATMUL_SIZE: Final = 8192
_MATMULS: Final = 40


def main(argv: list[str]) -> int:
    """Measure and print; return 0 whatever the verdicts, and 1 where there is no GPU.

    Also 1 when a part has failed: the tables name it.
    """
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
    run = Run(ends_at=started_at + options.budget)
    shapes = (QUICK,) if options.quick else SHAPES
    rounds = options.rounds or (1 if options.quick else _ROUNDS)
    measure(
        device,
        shapes,
        rounds,
        gpu=str(options.device),
        matmul=_find_matmul(options.device),
        run=run,
    )
    run.part(
        "models",
        "time to first token",
        lambda: _measure_model(
            options.device, min(rounds, _MODEL_ROUNDS_MAX), run.left, quick=options.quick
        ),
    )
    made = run.report(gpu_page.facts(options.device) | {"device": device.name})
    if options.output == "json":
        report.print_json(made)
    else:
        print(gpu_page.tables(made))
    if options.write is not None:
        page = options.write.read_text()
        options.write.write_text(gpu_page.filled(page, made))
    return 1 if run.failed else 0


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
        help=f"what is not begun by then is left out (default {_BUDGET_SECONDS:.0f})",
    )
    parser.add_argument("--quick", action="store_true", help="one small shape: a smoke test")
    parser.add_argument(
        "--write",
        type=_page,
        metavar="PAGE",
        help="put the figures into this page, and keep the rest",
    )
    return parser.parse_args(argv)


def _page(path: str) -> Path:
    """Return where the page is; refused before anything is measured if it has no room for them."""
    page = Path(path)
    try:
        gpu_page.require_room(page.read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    return page


class Run:
    """The parts of one run: what each has found, and which have failed or were left out."""

    def __init__(
        self, *, ends_at: float = float("inf"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.found: dict[str, list[Figures]] = {"rows": [], "pages": [], "models": []}
        self.checks: Figures = {}
        self.failed: list[str] = []
        self._ends_at = ends_at
        self._clock = clock

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self._ends_at - self._clock()

    def part(self, table: str, name: str, call: Callable[[], Iterable[Figures]]) -> None:
        """Put the rows of *call* into a table; where they end early, a row that says why."""
        if self.left <= 0:
            self.found[table].append({"what": name, "verdict": "left out: no time is left"})
            return
        try:
            for row in call():
                self.found[table].append(row)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other parts go on
            self.failed.append(name)
            reason = f"{type(error).__name__}: {last_words(error)}"
            self.found[table].append({"what": name, "verdict": reason})

    def note(self, name: str, call: Callable[[], Figures]) -> None:
        """Put what *call* finds among the checks."""

        def checked() -> Iterable[Figures]:
            self.checks |= call()
            return ()

        self.part("rows", name, checked)

    def report(self, machine: Figures) -> Figures:
        """Return all of it."""
        return {
            "machine": report.machine() | machine,
            **self.found,
            "checks": self.checks,
            "targets": [
                verdict.figures() for verdict in gpu_page.verdicts(self.found, self.checks)
            ],
        }


def measure(
    device: Device,
    shapes: Sequence[GpuShape],
    rounds: int,
    *,
    gpu: str = "0",
    matmul: Callable[[int], float] | None = None,
    run: Run | None = None,
) -> Figures:
    """Check and measure; *matmul* returns the seconds of so many products on the device.

    *gpu* is *device* as the setting `tiers.device.gpu` has it.
    """
    run = run or Run()
    run.checks["copies are given"] = why_not_batched(device) or "in batches"
    for shape in shapes:
        is_first = shape is shapes[0]
        run.part("rows", f"lanes ({shape.name})", partial(bus_rows, device, shape, rounds))
        run.part("rows", f"a daemon ({shape.name})", partial(daemon_rows, device, shape, rounds))
        if is_first:
            for codec in POOL_CODECS:
                rows = partial(pool_rows, device, shape, rounds, gpu, codec)
                run.part("rows", f"device tier, {codec} ({shape.name})", rows)
            if matmul is not None:
                slower = partial(_matmul_slowdown, device, shape, matmul)
                run.note("matmul beside stores", slower)
            run.part("pages", "pages in one piece", partial(page_rows, device, shape, rounds))
        run.note(f"host time ({shape.name})", partial(_host_time, device, shape, rounds))
    measured = [row for row in run.found["pages"] if "page_kib" in row]
    for what, where in (("store", "host"), ("load", "device")):
        if measured:
            run.checks[gpu_page.EVEN.format(where)] = break_even_kib(measured, what)
    return run.report({"device": device.name})


def _host_time(device: Device, shape: GpuShape, rounds: int) -> Figures:
    with Rig(device, shape) as rig:
        called, begun = host_microseconds(rig, rounds)
        return {
            f"{shape.name}: arena registered, seconds": rig.register_seconds,
            f"{shape.name}: engine's thread, {gpu_page.CALL_ENDING}": called,
            f"{shape.name}: our thread, a transfer, us": begun,
        }


def _measure_model(index: int, rounds: int, seconds: float, *, quick: bool) -> Iterable[Figures]:
    """Return the rows of a model on GPU number *index*, or what is missing for them."""
    lacking = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if lacking:
        reason = f"needs {' and '.join(lacking)}: pip install 'kvstore[hf]'"
        return [{"what": "not measured", "outcome": reason}]
    from kvstore.bench import gpu_model

    shape = gpu_model.TINY if quick else gpu_model.ABOUT_1B
    return gpu_model.measure_cuda(index, shape, rounds=rounds, seconds=seconds)


def _matmul_slowdown(device: Device, shape: GpuShape, matmul: Callable[[int], float]) -> Figures:
    """Return by how much a running offload slows products down."""
    matmul(_MATMULS)
    alone = min(matmul(_MATMULS) for _ in range(3))
    with Rig(device, shape) as rig:
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
    return {gpu_page.MATMUL: beside / alone - 1}


def _find_matmul(index: int) -> Callable[[int], float]:
    """Return what runs products of half precision with CuPy and returns their seconds."""
    sides: list[Any] = []

    def run(count: int) -> float:
        import cupy

        with cupy.cuda.Device(index):
            if not sides:
                sides.append(cupy.ones((_MATMUL_SIZE, _MATMUL_SIZE), dtype=cupy.float16))
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            for _ in range(count):
                cupy.matmul(sides[0], sides[0])
            end.record()
            end.synchronize()
            return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3

    return run
