"""Feeds a build of the C library sound, damaged and invented sections: LIBRARY ROUNDS.

Arrays are exactly as large as they must be and lie alone in their allocation, so that a build
with AddressSanitizer notices the first byte beyond.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from kvstore.compression import native
from kvstore.compression.shapes import (
    LOSSLESS,
    CodecId,
    Kind,
    SectionShape,
    SourceType,
    section_cap_bytes,
)
from kvstore.compression.tables import HQ3, HQ4, PRESETS
from kvstore.errors import ContainerError
from kvstore.types import HeadRange

SIZES = ((1, 1, 1), (2, 70, 48), (1, 65, 7), (3, 64, 64), (1, 300, 96), (1, 17, 576))
TABLES = {
    CodecId.HQ4: [HQ4.table_id],
    CodecId.HQ3: [HQ3.table_id],
    CodecId.ECSQ: [preset.table_id for preset in PRESETS],
}


def shapes(codec: CodecId, rng: np.random.Generator) -> list[SectionShape]:
    """Return one shape of every size, with a type that the codec takes."""
    types = [SourceType.BFLOAT16]
    if codec is not CodecId.EXP3:
        types += [SourceType.FLOAT16, SourceType.FLOAT32, SourceType.FLOAT8_E4M3]
    made = []
    for heads, tokens, dim in SIZES:
        sinks = 0 if codec in LOSSLESS else int(rng.integers(0, min(tokens, 4) + 1))
        made.append(
            SectionShape(
                Kind(int(rng.integers(0, 2))),
                types[int(rng.integers(0, len(types)))],
                heads,
                tokens,
                dim,
                tail=0 if codec in LOSSLESS else int(rng.integers(0, 3)) * 8,
                sinks=sinks,
                table=int(rng.choice(np.array(TABLES.get(codec, [0]), dtype=np.uint64))),
            )
        )
    return made


def damaged(section: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return *section* with some bytes changed, cut, or all of them invented."""
    kind = int(rng.integers(0, 5))
    if kind == 0:
        return rng.integers(0, 256, len(section), dtype=np.uint8)
    if kind == 1:
        return section[: int(rng.integers(0, len(section) + 1))].copy()
    bad = section.copy()
    reach = len(bad) if kind == 2 else min(len(bad), 256)  # directories lie in front
    for _ in range(int(rng.integers(1, 9))):
        bad[int(rng.integers(0, reach))] = int(rng.integers(0, 256))
    return bad


def main() -> None:
    """Run as many rounds over every codec, shape and kernel as asked for."""
    library = native.load_library(Path(sys.argv[1]))
    assert library is not None, "the library does not load"
    rng = np.random.default_rng(20)
    decoded = refused = 0
    for round_index in range(int(sys.argv[2])):
        for codec in sorted(native.CODECS):
            kernel = ("avx512", "avx2", "portable")[round_index % 3]
            library.use_kernel(kernel)
            for shape in shapes(codec, rng):
                coder = native.coder_of(library, codec, shape)
                assert coder is not None
                size = (shape.heads, shape.tokens, shape.dim)
                # Every third any bits at all, so that unfit sections are met, too.
                top = 1 << (8 * shape.source.size_bytes) if round_index % 3 == 0 else 0x3000
                values = rng.integers(0, top, size).astype(shape.source.carrier)
                target = np.empty(section_cap_bytes(codec, shape), dtype=np.uint8)
                found = coder.encode(shape, values, target)
                section = target[: found.size_bytes].copy() if found.is_fit else target
                for _ in range(4):
                    first = int(rng.integers(0, shape.heads))
                    into = np.empty((shape.heads - first, *size[1:]), values.dtype)
                    try:
                        heads = HeadRange(first, shape.heads)
                        coder.decode(shape, damaged(section, rng), into, heads)
                        decoded += 1
                    except ContainerError:
                        refused += 1
    sys.stdout.write(f"{decoded} sections decoded, {refused} refused\n")
    assert decoded
    assert refused


if __name__ == "__main__":
    main()
