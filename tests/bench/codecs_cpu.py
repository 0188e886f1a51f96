"""How fast codecs run on the CPU: with the C library, without it, as multiples of memcpy.

`python -m tests.bench.codecs_cpu` prints a line per codec. GB/s count bfloat16 bytes of the engine.
The floor is one memcpy of the same bytes with the same number of threads, in the same run; both
are the best of a few rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.compression import native
from kvstore.compression.reference import REFERENCE
from kvstore.compression.registry import find_codec
from kvstore.compression.shapes import (
    CodecId,
    Kind,
    SectionCoder,
    SectionShape,
    SourceType,
    section_cap_bytes,
)
from kvstore.compression.tables import coding_shape
from kvstore.types import HeadRange

NAMES: Final = (
    *("exp3", "rans", "int8kv", "fp8", "k8v4", "int4kv", "nvfp4", "hq4", "hq3"),
    *("ecsq-hi", "ecsq-mid", "ecsq-lo"),
)
_HEADS: Final = 8
_NUMPY_SECTIONS: Final = 2
_NUMPY_ROUNDS: Final = 2

Bf16 = NDArray[np.uint16]


class Sizes(NamedTuple):
    """What is encoded, and how often."""

    sections: int = 16
    tokens: int = 256
    dim: int = 128
    threads: int = os.cpu_count() or 1
    rounds: int = 5


class Speed(NamedTuple):
    """A codec's speed in GB/s of bfloat16; *copy_gb_per_second* is that of memcpy."""

    codec: str
    loops: str
    bits_per_value: float
    encode: float
    decode: float
    copy_gb_per_second: float
    threads: int


def kv_sections(sizes: Sizes) -> Bf16:
    """Return KV `[section][head][token][channel]` with channels of different size."""
    rng = np.random.default_rng(7)
    spread = np.exp(0.6 * rng.standard_normal((sizes.sections, _HEADS, 1, sizes.dim)))
    form = (sizes.sections, _HEADS, sizes.tokens, sizes.dim)
    values = rng.standard_normal(form, dtype=np.float32) * spread
    values *= np.exp(0.3 * rng.standard_normal((*form[:3], 1)))
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def measure_all(
    names: Iterable[str] = NAMES, sizes: Sizes | None = None, *, with_numpy: bool = True
) -> list[Speed]:
    """Return the speed of codecs with the C library, where it was built, and without."""
    return list(_measure_each(names, sizes or Sizes(), with_numpy=with_numpy))


def _measure_each(names: Iterable[str], sizes: Sizes, *, with_numpy: bool) -> Iterator[Speed]:
    values = kv_sections(sizes)
    copied = np.empty_like(values)
    with ThreadPoolExecutor(sizes.threads) as pool:
        timer = _Timer(pool, sizes.rounds)
        copy = timer.speed(values, lambda index: np.copyto(copied[index], values[index]))
        for name in names:
            sides = [_side(name, kind, sizes) for kind in Kind]
            compiled = [native.find(side.codec, side.shape) for side in sides]
            coders = [coder for coder in compiled if coder is not None]
            if len(coders) == len(sides):
                found = _measure(coders, sides, values, timer)
                yield Speed(name, native.KERNEL, *found, copy, sizes.threads)
            if with_numpy:
                few = values[:_NUMPY_SECTIONS]
                slow = _Timer(pool, min(_NUMPY_ROUNDS, sizes.rounds))
                found = _measure([REFERENCE[side.codec] for side in sides], sides, few, slow)
                yield Speed(name, "numpy", *found, copy, sizes.threads)


class _Side(NamedTuple):
    """What sections of K or of V are coded with."""

    codec: CodecId
    shape: SectionShape


def _side(name: str, kind: Kind, sizes: Sizes) -> _Side:
    spec = find_codec(name)
    codec = spec.sections[kind]
    shape = SectionShape(
        kind, SourceType.BFLOAT16, _HEADS, sizes.tokens, sizes.dim, table=spec.table_id
    )
    return _Side(codec, coding_shape(codec, shape))


class _Timer:
    """Times work on sections in threads."""

    def __init__(self, pool: ThreadPoolExecutor, rounds: int) -> None:
        self._pool = pool
        self._rounds = rounds

    def speed(self, values: Bf16, work: Callable[[int], object]) -> float:
        """Return GB/s of *values* when all their sections are worked on, in the best round."""
        least = float("inf")
        for _ in range(self._rounds):
            start = time.perf_counter()
            list(self._pool.map(work, range(len(values))))
            least = min(least, time.perf_counter() - start)
        return values.nbytes / 1e9 / least


def _measure(
    coders: Sequence[SectionCoder], sides: Sequence[_Side], values: Bf16, timer: _Timer
) -> tuple[float, float, float]:
    """Return bits per value, and GB/s of encoding and decoding: every other section is V."""
    caps = [section_cap_bytes(side.codec, side.shape) for side in sides]
    sections: list[NDArray[Any]] = [
        np.zeros(caps[index % len(sides)], np.uint8) for index in range(len(values))
    ]
    decoded = np.zeros_like(values)
    sizes = [0] * len(values)
    heads = HeadRange(0, _HEADS)

    def encode(index: int) -> None:
        side = index % len(sides)
        found = coders[side].encode(sides[side].shape, values[index], sections[index])
        assert found.is_fit
        sizes[index] = found.size_bytes

    def decode(index: int) -> None:
        side = index % len(sides)
        section = sections[index][: sizes[index]]
        coders[side].decode(sides[side].shape, section, decoded[index], heads)

    encoding, decoding = timer.speed(values, encode), timer.speed(values, decode)
    return 8 * sum(sizes) / values.size, encoding, decoding


def main() -> None:
    """Measure and print a line per codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codecs", nargs="*", metavar="CODEC")
    default = Sizes()
    for field in Sizes._fields:
        parser.add_argument(f"--{field}", type=int, default=getattr(default, field))
    parser.add_argument("--numpy", action="store_true", help="also without the C library")
    arguments = parser.parse_args()
    sizes = Sizes(*(getattr(arguments, field) for field in Sizes._fields))
    print(f"{'codec':9} {'loops':8} {'bits':>5} {'encode GB/s':>20} {'decode GB/s':>20}")
    names = arguments.codecs or NAMES
    for speed in _measure_each(names, sizes, with_numpy=arguments.numpy):
        figures = " ".join(
            f"{figure:9.2f} ({figure / speed.copy_gb_per_second:5.2f} x)"
            for figure in (speed.encode, speed.decode)
        )
        print(f"{speed.codec:9} {speed.loops:8} {speed.bits_per_value:5.2f}  {figures}", flush=True)
    print(f"memcpy {speed.copy_gb_per_second:.1f} GB/s, {sizes.threads} threads")


if __name__ == "__main__":
    main()
