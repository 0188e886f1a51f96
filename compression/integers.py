"""int8kv and int4kv: integers times scales; K by channel along tokens, V by token."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvstore.compression.fixed_rate import FixedRateCoder, fill
from kvstore.compression.floats import (
    Halves,
    bf16_up_bits,
    half_bits,
    inverse,
    widen_bf16,
    widen_half,
    without_subnormals,
)
from kvstore.compression.planes import pack_rows, unpack_rows
from kvstore.compression.shapes import (
    GROUPS,
    TILE_TOKENS,
    Bytes,
    CodecId,
    Floats,
    HeadLayout,
    Kind,
    SectionShape,
    channel_group_sizes,
)

INT8_MAX: Final = np.float32(127.0)
INT4_MAX: Final = np.float32(15.0)
MAGIC: Final = np.float32(1.5 * 2**23)
"""Added to a small float, it rounds it to an integer, ties to even, in the lowest bits."""
HALF_INFINITE: Final = 0x7C00


def read_halves(part: Bytes) -> Halves:
    """Return a part of head blocks as `[heads][...]` 16-bit words."""
    words: Halves = np.ascontiguousarray(part).view(np.uint16)
    return words


def is_finite_half(bits: Halves) -> bool:
    """Whether no half of *bits* is infinite or NaN."""
    return bool(((bits & 0x7FFF) < HALF_INFINITE).all())


class Int8KV(FixedRateCoder):
    """One signed byte per value; no value exceeds 127 of its scale."""

    codec = CodecId.INT8KV

    def code(
        self,
        shape: SectionShape,
        values: Floats,
        layout: HeadLayout,
        blocks: Bytes,
        context: Floats | None,
    ) -> Floats:
        """Fill *blocks*; see `FixedRateCoder`."""
        bits = without_subnormals(bf16_up_bits(self._sizes(shape, values) / INT8_MAX))
        scales = widen_bf16(bits)
        factors = inverse(scales)
        codes = np.empty(values.shape, dtype=np.uint8)
        decoded = np.empty_like(values)
        for rows, group in self._groups(shape):
            # Scales are rounded up: no step rounds to more than 127.
            steps = values[:, rows] * factors[:, group]
            steps += MAGIC
            codes[:, rows] = steps.view(np.uint8)[..., ::4]
            steps -= MAGIC
            np.multiply(steps, scales[:, group], out=decoded[:, rows])
        fill(layout, blocks, "codes", codes)
        fill(layout, blocks, "scales", bits.view(np.uint8))
        return decoded

    def values(self, shape: SectionShape, layout: HeadLayout, blocks: Bytes) -> Floats:
        """Return the values of *blocks*."""
        form = (shape.heads, shape.tokens, shape.dim)
        codes = layout.view(blocks, "codes").reshape(form).view(np.int8)
        scales = widen_bf16(read_halves(layout.view(blocks, "scales")))
        width = shape.dim if shape.kind is Kind.K else 1
        scales = scales.reshape(shape.heads, -1, width)
        decoded = np.empty(form, dtype=np.float32)
        for rows, group in self._groups(shape):
            into = decoded[:, rows]
            into[...] = codes[:, rows]
            into *= scales[:, group]
        return decoded

    @staticmethod
    def _sizes(shape: SectionShape, values: Floats) -> Floats:
        sizes = np.abs(values)
        if shape.kind is Kind.V:
            most: Floats = np.max(sizes, axis=2, keepdims=True)
            return most
        step = GROUPS[CodecId.INT8KV]
        groups = [
            np.max(sizes[:, start : start + step], axis=1) for start in range(0, shape.tokens, step)
        ]
        return np.stack(groups, axis=1)

    @staticmethod
    def _groups(shape: SectionShape) -> list[tuple[slice, slice]]:
        """Return rows and the scales that go with them."""
        if shape.kind is Kind.V:
            return [(slice(None), slice(None))]
        step = GROUPS[CodecId.INT8KV]
        starts = range(0, shape.tokens, step)
        return [(slice(at, at + step), slice(i, i + 1)) for i, at in enumerate(starts)]


class Int4KV(FixedRateCoder):
    """Four bits per value between the least of a group of 64 and 15 steps above it."""

    codec = CodecId.INT4KV

    def code(
        self,
        shape: SectionShape,
        values: Floats,
        layout: HeadLayout,
        blocks: Bytes,
        context: Floats | None,
    ) -> Floats | None:
        """Fill *blocks*; see `FixedRateCoder`."""
        groups = self._groups(shape)
        pairs = np.zeros((shape.heads, *self._pairs_form(shape), 2), dtype=np.uint16)
        codes = np.zeros(values.shape, dtype=np.uint8)
        decoded = np.empty_like(values)
        axis = 1 if shape.kind is Kind.K else 2
        for part, place in groups:
            group = values[part]
            pair = pairs[place]
            if self._measure(shape, group, part, axis, pair):
                scale, zero = (np.expand_dims(widen_half(pair[..., i]), axis) for i in (0, 1))
                steps = group - zero
                steps *= inverse(scale)
                np.clip(steps, 0, INT4_MAX, out=steps)
                steps += MAGIC
                codes[part] = steps.view(np.uint8)[..., ::4]
                steps -= MAGIC
                steps *= scale
                np.add(steps, zero, out=decoded[part])
        if not is_finite_half(pairs):
            return None
        codes[:, : shape.sinks] = 0
        if shape.kind is Kind.V:
            pairs[:, : shape.sinks] = 0
        fill(layout, blocks, "codes", self._pack(shape, codes))
        fill(layout, blocks, "scales", pairs.view(np.uint8))
        return decoded

    def values(self, shape: SectionShape, layout: HeadLayout, blocks: Bytes) -> Floats:
        """Return the values of *blocks*."""
        words = read_halves(layout.view(blocks, "scales"))
        pairs = widen_half(words).reshape(shape.heads, *self._pairs_form(shape), 2)
        codes = self._unpack(shape, layout.view(blocks, "codes"))
        decoded = np.empty(codes.shape, dtype=np.float32)
        axis = 1 if shape.kind is Kind.K else 2
        for part, place in self._groups(shape):
            scale, zero = (np.expand_dims(pairs[place][..., i], axis) for i in (0, 1))
            into = decoded[part]
            into[...] = codes[part]
            into *= scale
            into += zero
        return decoded

    @staticmethod
    def _measure(
        shape: SectionShape, group: Floats, part: tuple[slice, ...], axis: int, pair: Halves
    ) -> bool:
        """Put scale and zero of *group* into *pair*; return False for a group of sinks alone."""
        if shape.kind is Kind.K and part[1].start < shape.sinks:
            group = group[:, shape.sinks - part[1].start :]
            if group.shape[1] == 0:
                return False
        # Adding zero makes +0 of -0.
        least = np.min(group, axis=axis) + np.float32(0)
        most = np.max(group, axis=axis) + np.float32(0)
        pair[..., 0] = half_bits((most - least) / INT4_MAX)
        pair[..., 1] = half_bits(least)
        return True

    @staticmethod
    def _pairs_form(shape: SectionShape) -> tuple[int, int]:
        if shape.kind is Kind.K:
            return shape.tiles, shape.dim
        return shape.tokens, -(-shape.dim // TILE_TOKENS)

    @staticmethod
    def _groups(
        shape: SectionShape,
    ) -> list[tuple[tuple[slice, ...], tuple[slice | int, ...]]]:
        """Return the parts of the values that share scales, and where those are."""
        every = slice(None)
        if shape.kind is Kind.K:
            starts = range(0, shape.tokens, TILE_TOKENS)
            return [
                ((every, slice(at, min(at + TILE_TOKENS, shape.tokens))), (every, tile))
                for tile, at in enumerate(starts)
            ]
        starts = range(0, shape.dim, TILE_TOKENS)
        return [
            ((every, every, slice(at, at + TILE_TOKENS)), (every, every, group))
            for group, at in enumerate(starts)
        ]

    @staticmethod
    def _pack(shape: SectionShape, codes: Bytes) -> Bytes:
        if shape.kind is Kind.K:
            return pack_rows(codes, 4)
        packed = []
        for index, size in enumerate(channel_group_sizes(shape.dim)):
            group = codes[:, :, index * TILE_TOKENS : index * TILE_TOKENS + size]
            half = (size + 1) // 2
            low = group[:, :, :half].copy()
            low[:, :, : size - half] |= group[:, :, half:] << np.uint8(4)
            packed.append(low)
        return np.concatenate(packed, axis=2)

    @staticmethod
    def _unpack(shape: SectionShape, packed: Bytes) -> Bytes:
        if shape.kind is Kind.K:
            return unpack_rows(packed.reshape(shape.heads, -1, shape.dim), 4, shape.tokens)
        rows = packed.reshape(shape.heads, shape.tokens, -1)
        codes = np.empty((shape.heads, shape.tokens, shape.dim), dtype=np.uint8)
        at = 0
        for index, size in enumerate(channel_group_sizes(shape.dim)):
            half = (size + 1) // 2
            group = codes[:, :, index * TILE_TOKENS : index * TILE_TOKENS + size]
            group[:, :, :half] = rows[:, :, at : at + half] & np.uint8(15)
            group[:, :, half:] = rows[:, :, at : at + size - half] >> np.uint8(4)
            at += half
        return codes
