"""The codec kernels on a GPU: found or built, loaded with CuPy, launched on torch's stream.

Importing this needs neither. `load` returns None where there is no GPU, no CuPy, or nothing to
load: "no GPU" is a value.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from kvstore.errors import RequestError
from kvstore.gpu.batches import THREADS, Chunks, Pages, Places, batch_of
from kvstore.gpu.build import SOURCES, build_for, find_code, fingerprint
from kvstore.gpu.nvrtc import CompileError, Compiler, find_compiler

log = logging.getLogger(__name__)

CODECS: Final = {
    "fp8": "fp8",
    "int8": "int8",
    "int4": "int4",
    "nvfp4": "nvfp4",
    "compat": "compat",
    "hq4": "hadamard",
    "hq3": "hadamard",
    "exp3": "exp3",
    "rans": "rans",
    "ecsq": "ecsq",
}
"""Codecs that have kernels, and the source of each; compat is nvfp4-compat."""

DTYPES: Final = ("bf16", "fp16")
DTYPES_OF: Final = {
    "exp3": ("bf16",),
    **dict.fromkeys(("fp8", "int8", "int4", "compat", "rans"), ("bf16", "fp16", "fp32")),
}
"""Types of values that kernels take; those of the codecs named are others."""

SIDES: Final = ("keys", "values")

VARIABLE: Final = frozenset({"exp3", "rans", "ecsq"})
"""Codecs whose sections are as long as what they hold. Instead of `encode` there is `measure`, then
`Kernels.lay`, then `place`; see gpu/cuda/spans.cuh. Exp3 and rans treat K and V alike; ecsq is told
by its coding which it has."""

ONE_SIDED: Final = VARIABLE | {"compat"}
"""Codecs whose kernels have one name for K and V."""

STEPS: Final = {
    ("compat", "encode"): ("scale", "encode"),
    ("exp3", "measure"): ("measure", "total"),
    ("rans", "measure"): ("count", "normalise", "measure", "total"),
    ("ecsq", "measure"): ("scale", "measure", "total"),
    ("ecsq", "decode"): ("decode", "escapes"),
}
"""What is more than one kernel."""

WIDTH_MAX: Final = 1024
WIDTHS_MAX: Final = {"nvfp4": 576, "ecsq": 576, "hq4": 256, "hq3": 256}
"""Widths of heads; those named keep a tile of codes in shared memory."""

WIDTH_STEP: Final = 16
STRIDE_STEP_BYTES: Final = 16
BLOCKS_PER_MULTIPROCESSOR: Final = 8
TILE_TOKENS: Final = 64
STREAM_SYMBOLS: Final = 8192
SYMBOLS: Final = 256
SECTION_MAX_BYTES: Final = 1 << 31
"""Of raw values: directories of variable rates count in 32 bits."""

SHIPPED: Final = SOURCES / "built"
"""Where a release keeps kernels that were built ahead."""


class StreamOf:
    """A stream of somebody else's, as libraries hand them to each other."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of that agreement, and the stream."""
        return 0, self._handle


class Kernels:
    """All kernels for one device. Launches are asynchronous, on torch's current stream."""

    def __init__(self, cupy: Any, torch: Any, folder: Path) -> None:
        self._cupy, self._torch, self._folder = cupy, torch, folder
        device = cupy.cuda.Device()
        self._architecture = int(device.compute_capability)
        self._blocks = device.attributes["MultiProcessorCount"] * BLOCKS_PER_MULTIPROCESSOR
        self._function = cache(self._load_function)

    def launch(
        self, codec: str, side: str, direction: str, dtype: str, batch: NDArray[Any]
    ) -> None:
        """Run a codec's kernels over a batch made by `checked_batch`; no host synchronisation."""
        for name in kernel_names(codec, side, direction, dtype):
            self._run(self._function(CODECS[codec], name), batch)

    def lay(self, batch: NDArray[Any]) -> None:
        """Lay the measured sections of containers one behind the other.

        The first begins where its span says. All sections of the containers are measured, or have
        their size in their span.
        """
        self._run(self._function("spans", "spans_lay"), batch)

    def copy(self, direction: str, batch: NDArray[Any]) -> None:
        """Gather or scatter bytes as they are; see raw.cu for what the batch means."""
        self._run(self._function("raw", f"raw_{direction}"), batch)

    def _run(self, function: Any, batch: NDArray[Any]) -> None:
        stream = self._torch.cuda.current_stream().cuda_stream
        with self._cupy.cuda.Stream.from_external(StreamOf(stream)):
            function((self._blocks,), (THREADS,), (batch,))

    def _load_function(self, source: str, name: str) -> Any:
        path = find_code(self._folder, source, self._architecture)
        return self._cupy.RawModule(path=str(path)).get_function(name)


def kernel_names(codec: str, side: str, direction: str, dtype: str) -> list[str]:
    """Return the kernels that are one direction of a codec, in their order.

    Raises `RequestError` for a type of values that they do not take.
    """
    known = DTYPES_OF.get(codec, DTYPES)
    if dtype not in known:
        raise RequestError(f"{codec} kernels take {' and '.join(known)}, not {dtype}")
    steps = STEPS.get((codec, direction), (direction,))
    sides = "" if codec in ONE_SIDED else f"_{side}"
    return [f"{codec}{sides}_{step}_{dtype}" for step in steps]


def scratch_bytes(codec: str, chunks: Chunks) -> int:
    """Return how much scratch memory measuring and placing take; 0 for fixed rates."""
    each = 4 * _scratch_words(codec, chunks)
    # Each section's begins at a multiple of sixteen bytes, see spans.cuh.
    return chunks.chunk_count * chunks.section_count * (each + -each % STRIDE_STEP_BYTES)


def _scratch_words(codec: str, chunks: Chunks) -> int:
    """Words a section: what the sources keep between measuring and placing."""
    if codec == "exp3":
        return chunks.heads * -(-chunks.tokens // TILE_TOKENS)
    streams = -(-chunks.tokens * chunks.width // STREAM_SYMBOLS)
    if codec == "rans":
        return chunks.heads * (SYMBOLS + chunks.width // 4 + streams) + SYMBOLS // 2
    if codec == "ecsq":
        scales = max(chunks.width, -(-chunks.tokens // 8) * 4)
        return chunks.heads * scales + 2 * (chunks.heads * streams + 1)
    return 0


def load(folder: Path | None = None) -> Kernels | None:
    """Return the kernels of the current device, or None where they cannot be had."""
    try:
        cupy, torch = (importlib.import_module(name) for name in ("cupy", "torch"))
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    built = folder or find_built(int(cupy.cuda.Device().compute_capability))
    return None if built is None else Kernels(cupy, torch, built)


def find_built(architecture: int) -> Path | None:
    """Return the folder with the kernels that were built for GPUs of this *architecture*.

    Where there are none but a compiler, they are built, once on this host: for this one alone, as
    somebody is waiting. None where there is no compiler either, or they cannot be built.
    """
    cached = _cache_folder() / f"{fingerprint()}.sm_{architecture}"
    for folder in (SHIPPED / fingerprint(), cached):
        if folder.is_dir():
            return folder
    compiler = find_compiler()
    if compiler is None:
        return None
    log.info("kernels are built for this GPU, once", extra={"folder": str(cached)})
    try:
        _build_aside(compiler, cached, architecture)
    except (OSError, CompileError) as error:
        log.warning("the GPU is left alone: its kernels cannot be built: %s", error)
        return None
    return cached


def _build_aside(compiler: Compiler, folder: Path, architecture: int) -> None:
    """Build into *folder*, which others look for meanwhile: it is there when all of it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as passing:
        made = Path(passing, "made")
        build_for(compiler, made, architecture)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # no other process was faster
                raise


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "kvstore", "kernels")


def checked_batch(codec: str, chunks: Chunks, pages: Pages, places: Places) -> NDArray[Any]:
    """Return the argument of a kernel; raises `RequestError` for what kernels cannot do."""
    most = WIDTHS_MAX.get(codec, WIDTH_MAX)
    if chunks.width % WIDTH_STEP or not 0 < chunks.width <= most:
        raise RequestError(
            f"{codec} kernels take heads of a multiple of {WIDTH_STEP} up to {most} channels, "
            f"not {chunks.width}"
        )
    for stride in (pages.page_stride, pages.token_stride, pages.head_stride):
        if stride % STRIDE_STEP_BYTES:
            raise RequestError(f"a stride of {stride} bytes is no multiple of {STRIDE_STEP_BYTES}")
    if pages.first_token + chunks.tokens > pages.page_tokens * pages.page_count:
        raise RequestError(
            f"{chunks.tokens} tokens from token {pages.first_token} on exceed "
            f"{pages.page_count} pages of {pages.page_tokens}"
        )
    if codec in VARIABLE:
        _check_variable(codec, chunks, places)
    return batch_of(chunks, pages, places)


def _check_variable(codec: str, chunks: Chunks, places: Places) -> None:
    if not (places.spans and places.reports):
        raise RequestError(f"{codec} has a variable rate: its kernels need spans and reports")
    if codec == "ecsq" and not (places.scratch and chunks.table):
        raise RequestError("ecsq kernels need scratch and a coding, in either direction")
    size = chunks.heads * chunks.tokens * chunks.width * 4
    if size >= SECTION_MAX_BYTES:
        raise RequestError(
            f"{codec} kernels take sections below {SECTION_MAX_BYTES} bytes, not {size}"
        )
