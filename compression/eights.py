"""fp8: e4m3 times a power of two per head, so that rescaling is exact."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvstore.compression.fixed_rate import FixedRateCoder, fill
from kvstore.compression.floats import E4M3_VALUES, e4m3_codes
from kvstore.compression.shapes import Bytes, CodecId, Floats, HeadLayout, SectionShape

LEAST_EXPONENT: Final = -100
FRACTION_OF_448: Final = np.uint32(0x600000)
"""The fraction bits of 448 = 1.75 * 2^8."""


def powers_of_two(exponents: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Floats:
    """Return 2 ** *exponents*, each from -126 to 127."""
    return ((exponents + 127).astype(np.uint32) << np.uint32(23)).view(np.float32)


class FP8(FixedRateCoder):
    """A byte of e4m3 per value; the largest of a head lies between 224 and 448."""

    codec = CodecId.FP8

    def code(
        self,
        shape: SectionShape,
        values: Floats,
        layout: HeadLayout,
        blocks: Bytes,
        context: Floats | None,
    ) -> Floats:
        """Fill *blocks*; see `FixedRateCoder`."""
        most = np.max(np.abs(values).reshape(shape.heads, -1), axis=1).view(np.uint32)
        exponents = (most >> np.uint32(23)).astype(np.int32) - 127
        is_above = (most & np.uint32(0x7FFFFF)) > FRACTION_OF_448
        exponents = np.maximum(np.where(is_above, exponents - 7, exponents - 8), LEAST_EXPONENT)
        codes = e4m3_codes(values * powers_of_two(-exponents)[:, None, None])
        codes[:, : shape.sinks] = 0
        fill(layout, blocks, "codes", codes)
        fill(layout, blocks, "exponent", exponents.astype(np.int8).view(np.uint8))
        return np.take(E4M3_VALUES, codes) * powers_of_two(exponents)[:, None, None]

    def values(self, shape: SectionShape, layout: HeadLayout, blocks: Bytes) -> Floats:
        """Return the values of *blocks*."""
        codes = layout.view(blocks, "codes").reshape(shape.heads, shape.tokens, shape.dim)
        exponents = layout.view(blocks, "exponent").view(np.int8)[:, 0].astype(np.int32)
        # A hostile exponent gives any float, but never one that does not exist.
        return (
            np.take(E4M3_VALUES, codes) * powers_of_two(np.maximum(exponents, -126))[:, None, None]
        )
