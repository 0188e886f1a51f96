"""The C library of codecs under test: its vector widths, and KV to code."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.compression import native
from kvstore.compression.floats import narrow
from kvstore.compression.shapes import SectionShape, SourceType

LIBRARY = native.load_library()
KERNELS = ("avx512", "avx2", "portable")
TYPES = tuple(kind for kind in SourceType if kind is not SourceType.OPAQUE)
# heads, tokens, width: tails of tiles and of groups, one of each, widths of no power of two.
SHAPES = (
    (2, 256, 64),
    (3, 70, 80),
    (1, 257, 96),
    (2, 33, 112),
    (1, 64, 128),
    (1, 130, 192),
    (2, 17, 256),
    (1, 65, 576),
    (1, 65, 7),
    (1, 5, 33),
    (1, 1, 64),
    (1, 3, 1),
)


def with_kernel(name: str) -> Iterator[native.Library]:
    """Yield the library while it uses the loops of *name*; skip where there are none."""
    if LIBRARY is None:
        pytest.skip("the C library was not built")
    best = LIBRARY.kernel
    if not LIBRARY.use_kernel(name):
        pytest.skip(f"this CPU has no {name}")
    yield LIBRARY
    LIBRARY.use_kernel(best)


def chance(*words: object) -> np.random.Generator:
    """Return chance that is the same in every run for the same *words*."""
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def kv_like(rng: np.random.Generator, shape: SectionShape) -> np.ndarray:
    """Return values of the engine's type whose channels differ in size and place."""
    size = (shape.heads, shape.tokens, shape.dim)
    spread = np.exp(rng.standard_normal(shape.dim))
    values = rng.standard_normal(size) * spread + rng.standard_normal(shape.dim)
    return narrow(values.astype(np.float32), shape.source)
