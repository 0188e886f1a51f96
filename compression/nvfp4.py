"""NVFP4: e2m1 codes, e4m3 scales of blocks of 16, a float for the tensor.

Two layouts. `NVFP4Compat` is byte for byte what NVIDIA ModelOpt makes of a tensor, for engines
that read FP4 themselves. `NVFP4` is for storage: blocks of K run along tokens, less the mean of
their channel, and every block takes the better of two scales.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.compression.fixed_rate import FixedRateCoder, fill
from kvstore.compression.floats import (
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_VALUES,
    Halves,
    e2m1_codes,
    e4m3_codes,
    half_bits,
    inverse,
    sum_over_tokens,
    tree_sum,
    widen,
    widen_half,
)
from kvstore.compression.integers import is_finite_half, read_halves
from kvstore.compression.planes import pack_rows, unpack_rows
from kvstore.compression.shapes import (
    Bytes,
    CodecId,
    Floats,
    HeadLayout,
    Kind,
    SectionShape,
    Values,
)
from kvstore.errors import CodecError

BLOCK: Final = 16
E2M1_MAX: Final = np.float32(6.0)
LEAST_SCALE: Final = np.float32(2.0**-9)
LEAST_TENSOR_SCALE: Final = np.float32(2.0**-100)
COMPAT_RANGE: Final = np.float32(6.0 * 448.0)
STORAGE_RANGE: Final = np.float32(6.0 * 256.0)
"""A block's scale grows by 6/4 in the second variant; 256 * 6/4 still is an e4m3."""


def channel_means(shape: SectionShape, values: Floats) -> Halves:
    """Return the half means of channels `[heads][dim]` over what is not a sink (those are 0)."""
    count = shape.tokens - shape.sinks
    if count == 0:
        return np.zeros((shape.heads, shape.dim), dtype=np.uint16)
    return half_bits(sum_over_tokens(values) / np.float32(count))


def read_floats(part: Bytes) -> Floats:
    """Return a part of head blocks as `[heads][...]` floats."""
    floats: Floats = np.ascontiguousarray(part).view(np.float32)
    return floats


class NVFP4Compat(FixedRateCoder):
    """Blocks along the channels of a token, as engines keep them."""

    codec = CodecId.NVFP4_COMPAT

    def prepare(self, shape: SectionShape, source: Values) -> Floats:
        """Return the tensor scale: one for the section."""
        if shape.dim % BLOCK:
            raise CodecError(
                f"nvfp4-compat needs head sizes that are multiples of {BLOCK}, not {shape.dim}"
            )
        most = np.float32(0.0)
        for head in source:
            values = widen(head[shape.sinks :], shape.source)
            most = np.maximum(most, np.max(np.abs(values), initial=np.float32(0)))
        return np.array([most / COMPAT_RANGE], dtype=np.float32)

    def code(
        self,
        shape: SectionShape,
        values: Floats,
        layout: HeadLayout,
        blocks: Bytes,
        context: Floats | None,
    ) -> Floats:
        """Fill *blocks*; see `FixedRateCoder`."""
        assert context is not None, "prepare gives the tensor scale"
        tensor = context[0]
        form = (shape.heads, shape.tokens, shape.dim // BLOCK, BLOCK)
        sizes = np.max(np.abs(values).reshape(form), axis=3)
        wanted = sizes / (E2M1_MAX * tensor) if tensor > 0 else np.zeros_like(sizes)
        wanted[wanted == 0] = 1.0
        scales = e4m3_codes(np.clip(wanted, LEAST_SCALE, E4M3_MAX))
        units = np.repeat(np.take(E4M3_VALUES, scales) * tensor, BLOCK, axis=2)
        codes = e2m1_codes(values / units) if tensor > 0 else np.zeros(values.shape, np.uint8)
        fill(layout, blocks, "codes", codes[:, :, ::2] | codes[:, :, 1::2] << np.uint8(4))
        fill(layout, blocks, "scales", scales)
        fill(layout, blocks, "tensor", np.repeat(context, shape.heads).view(np.uint8))
        decoded: Floats = np.take(E2M1_VALUES, codes) * units
        return decoded

    def values(self, shape: SectionShape, layout: HeadLayout, blocks: Bytes) -> Floats:
        """Return the values of *blocks*."""
        packed = layout.view(blocks, "codes").reshape(shape.heads, shape.tokens, -1)
        codes = np.empty((shape.heads, shape.tokens, shape.dim), dtype=np.uint8)
        codes[:, :, ::2] = packed & np.uint8(15)
        codes[:, :, 1::2] = packed >> np.uint8(4)
        tensor = read_floats(layout.view(blocks, "tensor"))[:, :, None]
        scales = layout.view(blocks, "scales").reshape(shape.heads, shape.tokens, -1)
        decoded: Floats = np.take(E2M1_VALUES, codes)
        decoded *= np.repeat(np.take(E4M3_VALUES, scales) * tensor, BLOCK, axis=2)
        return decoded


class NVFP4(FixedRateCoder):
    """Blocks of K along tokens, centred; blocks of V along channels."""

    codec = CodecId.NVFP4

    def code(
        self,
        shape: SectionShape,
        values: Floats,
        layout: HeadLayout,
        blocks: Bytes,
        context: Floats | None,
    ) -> Floats | None:
        """Fill *blocks*; see `FixedRateCoder`."""
        centred, means = values, None
        if shape.kind is Kind.K:
            bits = channel_means(shape, values)
            if not is_finite_half(bits):
                return None
            means = widen_half(bits)[:, None, :]
            centred = values - means
            centred[:, : shape.sinks] = 0.0
            fill(layout, blocks, "means", bits.view(np.uint8))
        tensor = np.max(np.abs(centred).reshape(shape.heads, -1), axis=1) / STORAGE_RANGE
        if not np.isfinite(tensor).all():
            return None
        tensor = np.where(tensor < LEAST_TENSOR_SCALE, np.float32(0), tensor)[:, None, None]
        codes, scales = self._better(shape, centred, tensor)
        fill(layout, blocks, "codes", pack_rows(codes, 4))
        fill(layout, blocks, "scales", scales)
        fill(layout, blocks, "tensor", np.ascontiguousarray(tensor).view(np.uint8))
        return self._decoded(shape, codes, scales, tensor, means)

    def values(self, shape: SectionShape, layout: HeadLayout, blocks: Bytes) -> Floats:
        """Return the values of *blocks*."""
        rows = layout.view(blocks, "codes").reshape(shape.heads, -1, shape.dim)
        scales = layout.view(blocks, "scales").reshape(shape.heads, *self._scales_form(shape))
        tensor = read_floats(layout.view(blocks, "tensor"))[:, :, None]
        means = None
        if shape.kind is Kind.K:
            means = widen_half(read_halves(layout.view(blocks, "means")))[:, None, :]
        return self._decoded(shape, unpack_rows(rows, 4, shape.tokens), scales, tensor, means)

    @staticmethod
    def _scales_form(shape: SectionShape) -> tuple[int, int]:
        if shape.kind is Kind.K:
            return -(-shape.tokens // BLOCK), shape.dim
        return shape.tokens, -(-shape.dim // BLOCK)

    def _better(self, shape: SectionShape, values: Floats, tensor: Floats) -> tuple[Bytes, Bytes]:
        """Return codes and scales, block by block with the divisor that misses less."""
        axis = 1 if shape.kind is Kind.K else 2
        sizes = self._over_blocks(shape, np.abs(values), axis)
        codes, scales, missed = self._with_divisor(shape, values, sizes, tensor, 6.0)
        others, other_scales, other_missed = self._with_divisor(shape, values, sizes, tensor, 4.0)
        is_better = other_missed < missed
        chosen = self._spread(shape, is_better, axis)
        return np.where(chosen, others, codes), np.where(is_better, other_scales, scales)

    def _with_divisor(
        self, shape: SectionShape, values: Floats, sizes: Floats, tensor: Floats, divisor: float
    ) -> tuple[Bytes, Bytes, Floats]:
        axis = 1 if shape.kind is Kind.K else 2
        wanted = np.where(tensor > 0, sizes / np.float32(divisor) / tensor, np.float32(0))
        scales = e4m3_codes(np.clip(wanted, LEAST_SCALE, E4M3_MAX))
        units = np.take(E4M3_VALUES, scales) * tensor
        codes = e2m1_codes(values * self._spread(shape, inverse(units), axis))
        missed = values - np.take(E2M1_VALUES, codes) * self._spread(shape, units, axis)
        missed *= missed
        return codes, scales, self._block_sums(shape, missed, axis)

    @staticmethod
    def _spread(shape: SectionShape, per_block: NDArray[Any], axis: int) -> NDArray[Any]:
        """Return *per_block* repeated for every value of its block."""
        count = shape.tokens if axis == 1 else shape.dim
        return np.repeat(per_block, BLOCK, axis=axis)[(slice(None),) * axis + (slice(count),)]

    @staticmethod
    def _over_blocks(shape: SectionShape, sizes: Floats, axis: int) -> Floats:
        """Return the greatest of *sizes* in every block."""
        starts = np.arange(0, sizes.shape[axis], BLOCK)
        most: Floats = np.maximum.reduceat(sizes, starts, axis=axis)
        return most

    @staticmethod
    def _block_sums(shape: SectionShape, values: Floats, axis: int) -> Floats:
        count = values.shape[axis]
        if count % BLOCK:
            room = [(0, 0)] * 3
            room[axis] = (0, -count % BLOCK)
            values = np.pad(values, room)
        form = [*values.shape[:axis], -1, BLOCK, *values.shape[axis + 1 :]]
        return tree_sum(values.reshape(form), axis=axis + 1)

    def _decoded(
        self,
        shape: SectionShape,
        codes: Bytes,
        scales: Bytes,
        tensor: Floats,
        means: Floats | None,
    ) -> Floats:
        axis = 1 if shape.kind is Kind.K else 2
        decoded: Floats = np.take(E2M1_VALUES, codes)
        decoded *= self._spread(shape, np.take(E4M3_VALUES, scales) * tensor, axis)
        if means is not None:
            decoded += means
        return decoded
