"""ecsq: uniform steps in units of the deviation, entropy coded with static tables.

No histogram and no calibration: K is centred and equalised by channel, V by token, after which
one mixture of normal and Laplace fits everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvstore.compression.fixed_rate import squares
from kvstore.compression.floats import (
    BF16_INFINITE,
    Halves,
    bf16_bits,
    inverse,
    narrow,
    tree_sum,
    widen,
    widen_bf16,
    widen_half,
    without_subnormals,
)
from kvstore.compression.hadamard import channel_spread
from kvstore.compression.shapes import (
    UNFIT,
    Bytes,
    Encoded,
    Floats,
    Kind,
    SectionShape,
    Values,
)
from kvstore.compression.streams import Coding, put_streams, streams_of, take_streams
from kvstore.compression.tables import PRESETS_BY_ID, Preset
from kvstore.compression.variable_rate import FullError, Reader, Writer
from kvstore.errors import CodecError, ContainerError
from kvstore.types import HeadRange

LEAST_STEP: Final = np.float32(2.0**-126)


@dataclass(frozen=True)
class _Side:
    """What a preset says about one section's kind."""

    delta: np.float32
    bound: int
    coding: Coding

    @classmethod
    def of(cls, preset: Preset, kind: Kind) -> _Side:
        frequencies = np.array(preset.frequencies[kind], dtype=np.uint16)
        return cls(np.float32(preset.deltas[kind]), preset.bounds[kind], Coding.of(frequencies))

    @property
    def escape(self) -> int:
        return 2 * self.bound + 1


def _preset(table_id: int) -> Preset:
    preset = PRESETS_BY_ID.get(table_id)
    if preset is None:
        raise ContainerError(f"ecsq knows no table {table_id:016x}")
    return preset


@dataclass(frozen=True)
class _Scales:
    """Stored parameters: means (K) and deviations of channels (K) or tokens (V)."""

    means: Halves | None
    sigmas: Halves

    def steps(self, delta: np.float32) -> Floats:
        wide = widen_bf16(self.sigmas) * delta
        # The inverse of a subnormal step would be infinite.
        wide[wide < LEAST_STEP] = 0.0
        return wide[:, None, :] if self.means is not None else wide[:, :, None]

    @property
    def centres(self) -> Floats | None:
        return None if self.means is None else widen_half(self.means)[:, None, :]


class Ecsq:
    """Quantised and entropy coded; what lies too far out is listed as bfloat16."""

    def encode(self, shape: SectionShape, source: Values, target: Bytes) -> Encoded:
        """Fill *target*; see `SectionCoder`."""
        if shape.table not in PRESETS_BY_ID:
            raise CodecError(f"ecsq knows no table {shape.table:016x}")
        side = _Side.of(PRESETS_BY_ID[shape.table], shape.kind)
        with np.errstate(all="ignore"):
            values = widen(source, shape.source)
            values[:, : shape.sinks] = 0.0
            if not np.isfinite(values).all():
                return UNFIT
            scales = self._scales(shape, values)
            if scales is None:
                return UNFIT
            symbols = self._symbols(shape, values, scales, side)
            escapes = bf16_bits(values)[symbols == side.escape]
            if ((escapes & 0x7FFF) == BF16_INFINITE).any():
                return UNFIT
            decoded = self._decoded(scales, side, symbols, escapes)
            error, energy = squares(values, decoded, shape.sinks)
        if not np.isfinite(error):
            return UNFIT
        writer = Writer(target)
        try:
            self._put(writer, shape, side, scales, symbols, escapes)
        except FullError:
            return UNFIT
        return Encoded(writer.at, error, energy)

    def decode(self, shape: SectionShape, source: Bytes, target: Values, heads: HeadRange) -> None:
        """Fill *target* with *heads*; see `SectionCoder`."""
        side = _Side.of(_preset(shape.table), shape.kind)
        reader = Reader(source, "ecsq")
        count = shape.tokens * shape.dim
        places = reader.directory(shape.heads * streams_of(count))
        before = reader.directory(shape.heads)
        scales = self._take_scales(reader, shape, heads)
        symbols = take_streams(reader, source, places, side.coding, count, heads)
        if int(before[0]) != 0 or int(places[-1]) % 16:
            raise reader.broken("has a directory that does not begin or end where it must")
        reader.at = int(places[-1])
        escapes = reader.words(int(before[-1]), np.uint16)
        if reader.at != len(source):
            raise reader.broken(f"has {len(source)} bytes and needs {reader.at}")
        symbols = symbols.reshape(-1, shape.tokens, shape.dim)
        counts = np.count_nonzero(symbols == side.escape, axis=(1, 2))
        if (counts != np.diff(before)[heads.start : heads.stop]).any():
            raise reader.broken("lists escapes where there are others")
        mine = escapes[int(before[heads.start]) : int(before[heads.stop])]
        with np.errstate(all="ignore"):
            target[...] = narrow(self._decoded(scales, side, symbols, mine), shape.source)

    @staticmethod
    def _scales(shape: SectionShape, values: Floats) -> _Scales | None:
        if shape.kind is Kind.K:
            spread = channel_spread(shape, values)
            return _Scales(spread.means, spread.sigmas) if spread.is_finite else None
        squares = tree_sum(values * values, axis=2) / np.float32(shape.dim)
        bits = without_subnormals(bf16_bits(np.sqrt(squares)))
        return _Scales(None, bits) if (bits < BF16_INFINITE).all() else None

    @staticmethod
    def _symbols(shape: SectionShape, values: Floats, scales: _Scales, side: _Side) -> Bytes:
        centres = scales.centres
        steps = values if centres is None else values - centres
        steps = steps * inverse(scales.steps(side.delta))
        most = np.float32(side.bound + 1)
        codes = np.rint(np.clip(steps, -most, most)).astype(np.int32)
        codes[:, : shape.sinks] = 0
        is_escape = np.abs(codes) > side.bound
        symbols = np.where(is_escape, side.escape, codes + side.bound)
        return symbols.astype(np.uint8)

    @staticmethod
    def _decoded(scales: _Scales, side: _Side, symbols: Bytes, escapes: Halves) -> Floats:
        decoded = symbols.astype(np.float32) - np.float32(side.bound)
        decoded *= scales.steps(side.delta)
        centres = scales.centres
        if centres is not None:
            decoded += centres
        decoded[symbols == side.escape] = widen_bf16(escapes)
        return decoded

    @staticmethod
    def _scale_sizes(shape: SectionShape) -> list[int]:
        return [2 * shape.dim, 2 * shape.dim] if shape.kind is Kind.K else [2 * shape.tokens]

    def _put(
        self,
        writer: Writer,
        shape: SectionShape,
        side: _Side,
        scales: _Scales,
        symbols: Bytes,
        escapes: Halves,
    ) -> None:
        """Append all parts in order; raises `FullError`."""
        streams = shape.heads * streams_of(shape.tokens * shape.dim)
        directory = writer.reserve((streams + 1) * 4).view(np.uint32)
        counts = np.count_nonzero(symbols == side.escape, axis=(1, 2))
        writer.put(np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32))
        for head in range(shape.heads):
            if scales.means is not None:
                writer.put(scales.means[head])
            writer.put(scales.sigmas[head])
        element = shape.source.size_bytes
        for _ in range(shape.heads):
            writer.reserve(shape.sinks * shape.dim * element)
            writer.reserve(shape.tokens * shape.tail * element)
        put_streams(writer, directory, side.coding, symbols.reshape(shape.heads, -1))
        writer.put(escapes)

    def _take_scales(self, reader: Reader, shape: SectionShape, heads: HeadRange) -> _Scales:
        """Return the scales of *heads*, and step over all of them and over sinks and tails."""
        sizes = self._scale_sizes(shape)
        parts = [[reader.take(size) for size in sizes] for _ in range(shape.heads)]
        mine = parts[heads.start : heads.stop]
        columns = [np.stack(column).view(np.uint16) for column in zip(*mine, strict=True)]
        return _Scales(columns[0] if shape.kind is Kind.K else None, columns[-1])
