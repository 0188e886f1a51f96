"""How fast codecs run on the CPU: with the C library, without it, as multiples of memcpy.

`python tests/bench/codecs_cpu.py` prints a line per codec. GB/s count bfloat16 bytes of the engine.
The floor is one memcpy of the same bytes with the same number of threads, in the same run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvstore.compression import native
from kvstore.compression.reference import REFERENCE
from kvstore.compression.shapes import (
    CodecId,
    Kind,
    SectionCoder,
    SectionShape,
    SourceType,
    section_cap_bytes,
    shape_for,
)
from kvstore.compression.tables import HQ3, HQ4, PRESETS
from kvstore.types import HeadRange

CASES = {
    "exp3": (CodecId.EXP3, 0),
    "rans": (CodecId.RANS, 0),
    "int8kv": (CodecId.INT8KV, 0),
    "fp8": (CodecId.FP8, 0),
    "int4kv": (CodecId.INT4KV, 0),
    "nvfp4": (CodecId.NVFP4, 0),
    "hq4": (CodecId.HQ4, HQ4.table_id),
    "hq3": (CodecId.HQ3, HQ3.table_id),
    **{preset.name: (CodecId.ECSQ, preset.table_id) for preset in PRESETS},
}


def kv_sections(count: int, heads: int, tokens: int, dim: int) -> np.ndarray:
    """Return bfloat16 KV `[section][head][token][channel]` with channels of different size."""
    rng = np.random.default_rng(7)
    spread = np.exp(0.6 * rng.standard_normal((count, heads, 1, dim)))
    values = rng.standard_normal((count, heads, tokens, dim), dtype=np.float32) * spread
    values *= np.exp(0.3 * rng.standard_normal((count, heads, tokens, 1)))
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def best_seconds(work: Callable[[int], object], sections: int, threads: int) -> float:
    """Return the least time in which *threads* do the work of all sections."""
    least = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ARGUMENTS.repeats):
            start = time.perf_counter()
            list(pool.map(work, range(sections)))
            least = min(least, time.perf_counter() - start)
    return least


def measure(coder: SectionCoder, shape: SectionShape, values: np.ndarray, codec: CodecId):
    """Return bytes stored, and the GB/s of encoding and decoding."""
    sections = [np.empty(section_cap_bytes(codec, shape), np.uint8) for _ in values]
    decoded = np.empty_like(values)
    sizes = [0] * len(values)
    heads = HeadRange(0, shape.heads)

    def encode(index: int) -> None:
        found = coder.encode(shape, values[index], sections[index])
        assert found.is_fit
        sizes[index] = found.size_bytes

    def decode(index: int) -> None:
        coder.decode(shape, sections[index][: sizes[index]], decoded[index], heads)

    speeds = [
        values.nbytes / 1e9 / best_seconds(work, len(values), ARGUMENTS.threads)
        for work in (encode, decode)
    ]
    return sum(sizes), speeds


def main() -> None:
    """Measure every codec and print a table."""
    values = kv_sections(ARGUMENTS.sections, 8, ARGUMENTS.tokens, ARGUMENTS.dim)
    copied = np.empty_like(values)
    copy_seconds = best_seconds(
        lambda index: np.copyto(copied[index], values[index]), len(values), ARGUMENTS.threads
    )
    floor = values.nbytes / 1e9 / copy_seconds
    print(f"memcpy {floor:.1f} GB/s, {ARGUMENTS.threads} threads, loops: {native.KERNEL}")
    print(f"{'codec':9} {'bits':>5}   {'encode GB/s':>20} {'decode GB/s':>20}  (x memcpy)")
    for name in ARGUMENTS.codecs or CASES:
        codec, table = CASES[name]
        shape = SectionShape(
            Kind.K, SourceType.BFLOAT16, 8, ARGUMENTS.tokens, ARGUMENTS.dim, table=table
        )
        shape = shape if codec is CodecId.ECSQ else shape_for(codec, shape)
        coders = {"C": native.find(codec, shape), "numpy": REFERENCE[codec]}
        for label, coder in coders.items():
            if coder is None or (label == "numpy" and not ARGUMENTS.numpy):
                continue
            part = values if label == "C" else values[: ARGUMENTS.threads]
            stored, speeds = measure(coder, shape, part, codec)
            bits = 8 * stored / part.size
            figures = " ".join(f"{speed:9.2f} ({speed / floor:5.2f} x)" for speed in speeds)
            print(f"{name:9} {bits:5.2f}   {figures}  {label}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codecs", nargs="*", choices=[[], *CASES])
    parser.add_argument("--sections", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--numpy", action="store_true", help="also without the C library")
    ARGUMENTS = parser.parse_args()
    main()
