"""Conversions between float32 and the narrow types of caches and codecs, over whole arrays.

Rounding is to the nearest, ties to even; widening is exact. The same operations, in the same
order, as the compiled kernels: what is rounded here is rounded there.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.compression.shapes import TILE_TOKENS, Bytes, Floats, SourceType, Values

Halves = NDArray[np.uint16]

E4M3_MAX: Final = np.float32(448.0)
HALF_MAX: Final = np.float32(65504.0)
LEAST_NORMAL_BF16: Final = 0x0080
BF16_INFINITE: Final = 0x7F80


# --- bfloat16 and half ------------------------------------------------------------------


def widen_bf16(bits: Halves) -> Floats:
    """Return the values of bfloat16 *bits*."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def bf16_bits(values: Floats) -> Halves:
    """Return *values* as bfloat16; what is too large becomes infinite, NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    halves: Halves = rounded.astype(np.uint16)
    missing = np.isnan(values)
    if missing.any():
        halves[missing] = 0x7FC0
    return halves


def bf16_up_bits(values: Floats) -> Halves:
    """Return the least bfloat16 that is not below the finite *values*, which are >= 0."""
    bits = values.view(np.uint32) + np.uint32(0xFFFF)
    return (bits >> np.uint32(16)).astype(np.uint16)


def without_subnormals(bits: Halves) -> Halves:
    """Return bfloat16 scales with those zero whose inverse would overflow."""
    return np.where(bits < LEAST_NORMAL_BF16, np.uint16(0), bits)


def half_bits(values: Floats) -> Halves:
    """Return *values* as IEEE half; what is too large becomes infinite."""
    return values.astype(np.float16).view(np.uint16)


def widen_half(bits: Halves) -> Floats:
    """Return the values of half *bits*."""
    return bits.view(np.float16).astype(np.float32)


# --- eight bits and four ----------------------------------------------------------------


def _round_small(values: Floats, mantissa: int, least_exponent: int, largest: float) -> Bytes:
    """Round to a type with a sign, *mantissa* bits and no infinities; saturate at *largest*.

    2 ** *least_exponent* is its least normal number.
    """
    bits = values.view(np.uint32)
    size = np.minimum(np.abs(values), np.float32(largest))
    size_bits = size.view(np.uint32)
    shift = np.uint32(23 - mantissa)
    odd = (size_bits >> shift) & np.uint32(1)
    half = np.uint32((1 << (22 - mantissa)) - 1)
    bias = np.uint32((least_exponent + 126) << 23)
    normal = (size_bits + half + odd - bias) >> shift
    step = np.float32(2.0 ** (mantissa - least_exponent))
    small = np.rint(size * step).astype(np.uint32)
    is_small = size_bits < np.uint32((least_exponent + 127) << 23)
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    codes: Bytes = (np.where(is_small, small, normal) | sign).astype(np.uint8)
    return codes


def e4m3_codes(values: Floats) -> Bytes:
    """Return finite *values* as e4m3fn; beyond 448 they saturate."""
    return _round_small(values, 3, -6, 448.0)


def e5m2_codes(values: Floats) -> Bytes:
    """Return finite *values* as e5m2; beyond 57344 they saturate."""
    return _round_small(values, 2, -14, 57344.0)


def e2m1_codes(values: Floats) -> Bytes:
    """Return *values* as e2m1 in the low 4 bits; beyond 6 they saturate, -0 gives 0."""
    size = np.abs(values)
    # Codes are counted up; a value half way between two goes to the even one.
    codes = (size > 0.25).view(np.uint8)
    codes += size >= 0.75
    codes += size > 1.25
    codes += size >= 1.75
    codes += size > 2.5
    codes += size >= 3.5
    codes += size > 5.0
    codes |= (values < 0).view(np.uint8) << np.uint8(3)
    return codes


def _values_of_small(width: int, mantissa: int, least_exponent: int) -> Floats:
    codes = np.arange(1 << width)
    size = codes & ((1 << (width - 1)) - 1)
    exponent, fraction = size >> mantissa, size & ((1 << mantissa) - 1)
    small = fraction * 2.0 ** (least_exponent - mantissa)
    normal = (fraction + (1 << mantissa)) * 2.0 ** (exponent - 1 + least_exponent - mantissa)
    values = np.where(exponent == 0, small, normal)
    return np.where(codes >> (width - 1), -values, values).astype(np.float32)


def _e4m3_values() -> Floats:
    values = _values_of_small(8, 3, -6)
    values[[0x7F, 0xFF]] = np.nan
    return values


def _e5m2_values() -> Floats:
    values = _values_of_small(8, 2, -14)
    values[[0x7C, 0xFC]] = np.inf, -np.inf
    values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return values


E4M3_VALUES: Final = _e4m3_values()
E5M2_VALUES: Final = _e5m2_values()
E2M1_VALUES: Final = _values_of_small(4, 1, 0)


# --- the engine's types -----------------------------------------------------------------


def widen(values: Values, source: SourceType) -> Floats:
    """Return *values* of the engine's type as floats: a new array."""
    match source:
        case SourceType.BFLOAT16:
            return widen_bf16(values)
        case SourceType.FLOAT16:
            return widen_half(values)
        case SourceType.FLOAT32:
            return values.view(np.float32).copy()
        case SourceType.FLOAT8_E4M3:
            return np.take(E4M3_VALUES, values)
        case SourceType.FLOAT8_E5M2:
            return np.take(E5M2_VALUES, values)
        case SourceType.OPAQUE:
            raise AssertionError("opaque bytes have no values")


def narrow(values: Floats, source: SourceType) -> NDArray[Any]:
    """Return decoded *values* in the engine's type; what is too large becomes the largest."""
    match source:
        case SourceType.BFLOAT16:
            bits = bf16_bits(values)
            sizes = bits & np.uint16(0x7FFF)
            if sizes.max(initial=0) >= BF16_INFINITE:
                bits[sizes == BF16_INFINITE] -= 1
            return bits
        case SourceType.FLOAT16:
            return half_bits(np.clip(values, -HALF_MAX, HALF_MAX))
        case SourceType.FLOAT32:
            most = np.finfo(np.float32).max
            return np.clip(values, -most, most).view(np.uint32)
        case SourceType.FLOAT8_E4M3:
            return np.where(np.isnan(values), np.uint8(0x7F), e4m3_codes(values))
        case SourceType.FLOAT8_E5M2:
            return np.where(np.isnan(values), np.uint8(0x7F), e5m2_codes(values))
        case SourceType.OPAQUE:
            raise AssertionError("opaque bytes have no values")


# --- arithmetic whose order is part of the format ----------------------------------------


def inverse(scales: Floats) -> Floats:
    """Return 1 / *scales*, and 0 where a scale is 0."""
    return np.where(scales > 0, np.float32(1.0) / scales, np.float32(0.0))


def tree_sum(values: Floats, axis: int) -> Floats:
    """Return sums along *axis*, added in the order that docs/codec-format.md calls TREE."""
    rows = np.moveaxis(values, axis, 0)
    count = rows.shape[0]
    size = 1 << (count - 1).bit_length()
    if size != count:
        rows = np.concatenate(
            [rows, np.zeros((size - count, *rows.shape[1:]), dtype=np.float32)], axis=0
        )
    while size > 1:
        size //= 2
        rows = rows[:size] + rows[size : 2 * size]
    total: Floats = rows[0]
    return total


def sum_over_tokens(values: Floats) -> Floats:
    """Return the sums over tokens of `[heads][tokens][dim]`: a tree per tile, tiles in order."""
    total = np.zeros((values.shape[0], *values.shape[2:]), dtype=np.float32)
    for start in range(0, values.shape[1], TILE_TOKENS):
        total = total + tree_sum(values[:, start : start + TILE_TOKENS], axis=1)
    return total
