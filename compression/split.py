"""How lossless codecs split values: a symbol worth modelling, and the rest kept as it is.

The symbol of bfloat16 and float32 is the exponent, that of half the high byte, that of 8-bit
types the byte itself.
"""

from __future__ import annotations

import numpy as np

from kvstore.compression.shapes import Bytes, SourceType, Values


def rest_planes(source: SourceType) -> int:
    """Return how many bytes of a value are kept as they are."""
    return source.size_bytes - 1


def has_exponents(source: SourceType) -> bool:
    """Whether symbols are exponents, which are worth relating to those of their channel."""
    return source in (SourceType.BFLOAT16, SourceType.FLOAT32)


def split(values: Values, source: SourceType) -> tuple[Bytes, list[Bytes]]:
    """Return the symbols and the rest planes of *values*, each of their shape."""
    match source:
        case SourceType.BFLOAT16:
            exponents = (values >> 7).astype(np.uint8)
            rest = ((values >> 8) & 0x80 | values & 0x7F).astype(np.uint8)
            return exponents, [rest]
        case SourceType.FLOAT16:
            return (values >> 8).astype(np.uint8), [values.astype(np.uint8)]
        case SourceType.FLOAT32:
            exponents = (values >> 23).astype(np.uint8)
            high = ((values >> 24) & 0x80 | (values >> 16) & 0x7F).astype(np.uint8)
            return exponents, [values.astype(np.uint8), (values >> 8).astype(np.uint8), high]
        case _:
            return values, []


def merge(symbols: Bytes, rest: list[Bytes], source: SourceType) -> Values:
    """Return the values that `split` split."""
    match source:
        case SourceType.BFLOAT16:
            sign_and_fraction = rest[0].astype(np.uint16)
            values = (sign_and_fraction & 0x80) << 8 | sign_and_fraction & 0x7F
            return values | symbols.astype(np.uint16) << 7
        case SourceType.FLOAT16:
            return symbols.astype(np.uint16) << 8 | rest[0]
        case SourceType.FLOAT32:
            high = rest[2].astype(np.uint32)
            values = (high & 0x80) << 24 | (high & 0x7F) << 16
            return (
                values | symbols.astype(np.uint32) << 23 | rest[1].astype(np.uint32) << 8 | rest[0]
            )
        case _:
            return symbols
