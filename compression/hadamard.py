"""hq4 and hq3: equalised, rotated by a signed Hadamard matrix, cut as a normal distribution.

The rotation makes the channels of a token alike, whatever they were; the stored norm is that of
the token, corrected for what the codes lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvstore.compression.fixed_rate import FixedRateCoder, fill
from kvstore.compression.floats import (
    BF16_INFINITE,
    Halves,
    bf16_bits,
    half_bits,
    inverse,
    sum_over_tokens,
    tree_sum,
    widen_bf16,
    widen_half,
    without_subnormals,
)
from kvstore.compression.integers import is_finite_half, read_halves
from kvstore.compression.nvfp4 import channel_means
from kvstore.compression.planes import pack_rows, unpack_rows
from kvstore.compression.shapes import Bytes, CodecId, Floats, HeadLayout, Kind, SectionShape
from kvstore.compression.tables import HQ3, HQ4, Codebook, signs

LEAST_NORM: Final = np.float32(2.0**-60)


def rotation_blocks(dim: int) -> list[tuple[int, int]]:
    """Cut *dim* channels into powers of two, the largest first: (start, size)."""
    blocks, start = [], 0
    for bit in reversed(range(dim.bit_length())):
        if dim >> bit & 1:
            blocks.append((start, 1 << bit))
            start += 1 << bit
    return blocks


def butterflies(values: Floats) -> Floats:
    """Return *values* `[dim][tokens]` with every rotation block transformed, not scaled.

    Channels come first, so that every step adds and subtracts whole rows.
    """
    tokens = values.shape[1]
    result = np.empty_like(values)
    for start, size in rotation_blocks(len(values)):
        block = values[start : start + size]
        spare = np.empty_like(block)
        into = result[start : start + size]
        # Between two arrays, so that the last step ends in the result.
        places = (into, spare) if size.bit_length() % 2 == 0 else (spare, into)
        if size == 1:
            into[...] = block
        reach = 1
        while reach < size:
            pairs = block.reshape(-1, 2, reach, tokens)
            block = places[reach.bit_length() % 2 == 0]
            turned = block.reshape(-1, 2, reach, tokens)
            np.add(pairs[:, 0], pairs[:, 1], out=turned[:, 0])
            np.subtract(pairs[:, 0], pairs[:, 1], out=turned[:, 1])
            reach *= 2
    return result


def per_channel(dim: int, factor_of_block: dict[int, np.float32]) -> Floats:
    """Return the factor of the block that every channel lies in, `[dim][1]`."""
    factors = [np.full(size, factor_of_block[size], np.float32) for _, size in rotation_blocks(dim)]
    return np.concatenate(factors)[:, None]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and deviation of every channel `[heads][dim]`, as stored."""

    means: Halves
    sigmas: Halves

    @property
    def is_finite(self) -> bool:
        """Whether none of them is infinite."""
        return is_finite_half(self.means) and bool(((self.sigmas & 0x7FFF) < BF16_INFINITE).all())


def channel_spread(shape: SectionShape, values: Floats) -> Spread:
    """Return mean and root mean square deviation of channels over what is not a sink."""
    means = channel_means(shape, values)
    missed = values - widen_half(means)[:, None, :]
    missed[:, : shape.sinks] = 0.0
    missed *= missed
    count = np.float32(max(1, shape.tokens - shape.sinks))
    sigmas = bf16_bits(np.sqrt(sum_over_tokens(missed) / count))
    return Spread(means, without_subnormals(sigmas))


class Hadamard(FixedRateCoder):
    """One of the two sizes, by its codebook."""

    def __init__(self, codec: CodecId, book: Codebook) -> None:
        self.codec = codec  # type: ignore[misc]  # each size is an instance
        self._thresholds = np.array(book.thresholds, dtype=np.float32)
        sizes = np.array(book.centroids, dtype=np.float32)
        self._values: Floats = np.concatenate([sizes, -sizes])
        self._sign = np.uint8(len(sizes))
        self._table_id = book.table_id

    def code(
        self,
        shape: SectionShape,
        values: Floats,
        layout: HeadLayout,
        blocks: Bytes,
        context: Floats | None,
    ) -> Floats | None:
        """Fill *blocks*; see `FixedRateCoder`."""
        equal, spread = values, None
        if shape.kind is Kind.K:
            spread = channel_spread(shape, values)
            if not spread.is_finite:
                return None
            equal = values - widen_half(spread.means)[:, None, :]
            equal *= inverse(widen_bf16(spread.sigmas))[:, None, :]
            equal[:, : shape.sinks] = 0.0
            fill(layout, blocks, "means", spread.means.view(np.uint8))
            fill(layout, blocks, "sigmas", spread.sigmas.view(np.uint8))
        codes, norms = self._codes(shape, equal)
        if not is_finite_half(norms):
            return None
        if self._sign == 8:
            fill(layout, blocks, "codes", pack_rows(codes, 4))
        else:
            fill(layout, blocks, "codes", pack_rows(codes & np.uint8(3), 2))
            fill(layout, blocks, "signs", pack_rows(codes >> np.uint8(2), 1))
        fill(layout, blocks, "norms", norms.view(np.uint8))
        return self._decoded(shape, codes, norms, spread)

    def values(self, shape: SectionShape, layout: HeadLayout, blocks: Bytes) -> Floats:
        """Return the values of *blocks*."""
        rows = layout.view(blocks, "codes").reshape(shape.heads, -1, shape.dim)
        if self._sign == 8:
            codes = unpack_rows(rows, 4, shape.tokens)
        else:
            codes = unpack_rows(rows, 2, shape.tokens)
            rows = layout.view(blocks, "signs").reshape(shape.heads, -1, shape.dim)
            codes |= unpack_rows(rows, 1, shape.tokens) << np.uint8(2)
        spread = None
        if shape.kind is Kind.K:
            parts = (read_halves(layout.view(blocks, name)) for name in ("means", "sigmas"))
            spread = Spread(*parts)
        return self._decoded(shape, codes, read_halves(layout.view(blocks, "norms")), spread)

    def _signs(self, shape: SectionShape) -> Floats:
        return signs(self._table_id, shape.layer, shape.kind, shape.dim)[:, None]

    def _codes(self, shape: SectionShape, values: Floats) -> tuple[Bytes, Halves]:
        """Return codes and corrected norms of tokens whose channels are alike."""
        # A copy in any case: with one token the transposed values are contiguous as they are.
        turned = values.reshape(-1, shape.dim).T.copy()
        norms: Floats = np.sqrt(tree_sum(turned * turned, axis=0))
        is_zero = norms < LEAST_NORM
        factors = np.float32(1.0) / norms
        roots = {
            size: np.sqrt(np.float32(shape.dim) / np.float32(size))
            for _, size in rotation_blocks(shape.dim)
        }
        turned *= self._signs(shape)
        turned = butterflies(turned)
        turned *= factors * per_channel(shape.dim, roots)
        sizes = np.abs(turned)
        codes = np.zeros(turned.shape, dtype=np.uint8)
        for threshold in self._thresholds:
            codes += sizes >= threshold
        codes += (turned < 0).view(np.uint8) * self._sign
        codes[:, is_zero] = 0
        chosen = np.take(self._values, codes)
        chosen *= chosen
        corrected: Floats = np.divide(norms, np.sqrt(tree_sum(chosen, axis=0)))
        corrected[is_zero] = 0.0
        form = (shape.heads, shape.tokens, shape.dim)
        return np.ascontiguousarray(codes.T).reshape(form), half_bits(corrected)

    def _decoded(
        self, shape: SectionShape, codes: Bytes, norms: Halves, spread: Spread | None
    ) -> Floats:
        roots = {
            size: np.float32(1.0) / np.sqrt(np.float32(size))
            for _, size in rotation_blocks(shape.dim)
        }
        turned = butterflies(np.take(self._values, codes.reshape(-1, shape.dim).T))
        turned *= widen_half(norms).reshape(-1) * per_channel(shape.dim, roots)
        turned *= self._signs(shape)
        decoded = np.ascontiguousarray(turned.T).reshape(codes.shape)
        if spread is not None:
            decoded *= widen_bf16(spread.sigmas)[:, None, :]
            decoded += widen_half(spread.means)[:, None, :]
        return decoded


HQ4_CODER: Final = Hadamard(CodecId.HQ4, HQ4)
HQ3_CODER: Final = Hadamard(CodecId.HQ3, HQ3)
