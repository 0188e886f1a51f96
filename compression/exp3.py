"""exp3: lossless bfloat16 at a nearly fixed rate.

Along the tokens of a channel exponents stay close below their largest: 3 bits say how close, and
the few that are not are listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvstore.compression.planes import pack_rows, unpack_rows
from kvstore.compression.shapes import (
    TILE_TOKENS,
    UNFIT,
    Bytes,
    Encoded,
    SectionShape,
    SourceType,
    Values,
    padded,
    plane_rows,
)
from kvstore.compression.split import merge, split
from kvstore.compression.variable_rate import FullError, Reader, Writer
from kvstore.errors import CodecError
from kvstore.types import HeadRange

MODES: Final = ((7, (2, 1)), (15, (4,)))
"""Of exp3 and exp4: what stands for "too far", and the planes' bits from the low end."""
RAW_MODE: Final = 2
MODE_MASK: Final = 15
COUNT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    dim: int

    def plane_bytes(self, bits: int) -> int:
        return plane_rows(self.rows, bits) * self.dim

    def size_bytes(self, mode: int, escapes: int) -> int:
        values = self.rows * self.dim
        if mode == RAW_MODE:
            return padded(2 * values)
        planes = sum(padded(self.plane_bytes(bits)) for bits in MODES[mode][1])
        fixed = padded(self.dim) + padded(values) + planes + padded(COUNT_BYTES)
        return fixed + padded(escapes)


def _check(shape: SectionShape) -> None:
    if shape.source is not SourceType.BFLOAT16:
        raise CodecError(f"exp3 takes bfloat16, not {shape.source.name.lower()}")


class Exp3:
    """Exponents as offsets from the largest of their channel, tile by tile."""

    def encode(self, shape: SectionShape, source: Values, target: Bytes) -> Encoded:
        """Fill *target*; see `SectionCoder`."""
        _check(shape)
        writer = Writer(target)
        try:
            directory = writer.reserve((shape.heads * shape.tiles + 1) * 4).view(np.uint32)
            index = 0
            for head in source:
                symbols, rest = split(head, shape.source)
                for start in range(0, shape.tokens, TILE_TOKENS):
                    rows = slice(start, start + TILE_TOKENS)
                    offset = writer.at
                    mode = self._put_tile(writer, head[rows], symbols[rows], rest[0][rows])
                    directory[index] = offset + mode
                    index += 1
            directory[index] = writer.at
        except FullError:
            return UNFIT
        return Encoded(writer.at)

    def decode(self, shape: SectionShape, source: Bytes, target: Values, heads: HeadRange) -> None:
        """Fill *target* with *heads*; see `SectionCoder`."""
        _check(shape)
        reader = Reader(source, "exp3")
        directory = reader.words(shape.heads * shape.tiles + 1, np.uint32)
        if int(directory[-1]) != len(source):
            raise reader.broken(f"has {len(source)} bytes and says {directory[-1]}")
        for into, head in enumerate(range(heads.start, heads.stop)):
            for tile in range(shape.tiles):
                entry = int(directory[head * shape.tiles + tile])
                reader.at = entry & ~MODE_MASK
                rows = slice(tile * TILE_TOKENS, (tile + 1) * TILE_TOKENS)
                self._take_tile(reader, entry & MODE_MASK, target[into, rows])

    def _put_tile(self, writer: Writer, values: Values, symbols: Bytes, rest: Bytes) -> int:
        """Append one tile in its shortest mode, and return the mode."""
        tile = _Tile(*values.shape)
        largest = np.max(symbols, axis=0)
        below = largest - symbols
        sizes = [
            tile.size_bytes(mode, int(np.count_nonzero(below >= MODES[mode][0])))
            for mode in range(len(MODES))
        ]
        sizes.append(tile.size_bytes(RAW_MODE, 0))
        mode = sizes.index(min(sizes))
        if mode == RAW_MODE:
            writer.put(values)
            return mode
        escape, planes = MODES[mode]
        offsets = np.minimum(below, np.uint8(escape))
        writer.put(largest)
        writer.put(rest)
        shift = 0
        for bits in planes:
            field = (offsets >> np.uint8(shift)) & np.uint8((1 << bits) - 1)
            writer.put(pack_rows(field[None], bits))
            shift += bits
        escapes = symbols[below >= escape]
        writer.put(np.array([escapes.size], dtype=np.uint32))
        writer.put(escapes)
        return mode

    def _take_tile(self, reader: Reader, mode: int, target: Values) -> None:
        tile = _Tile(*target.shape)
        if mode > RAW_MODE:
            raise reader.broken(f"has a tile of mode {mode}")
        if mode == RAW_MODE:
            target[...] = reader.words(target.size, np.uint16).reshape(target.shape)
            return
        escape, planes = MODES[mode]
        largest = reader.take(tile.dim)
        rest = reader.take(tile.rows * tile.dim).reshape(target.shape)
        offsets = np.zeros(target.shape, dtype=np.uint8)
        shift = 0
        for bits in planes:
            packed = reader.take(tile.plane_bytes(bits)).reshape(1, -1, tile.dim)
            offsets |= unpack_rows(packed, bits, tile.rows)[0] << np.uint8(shift)
            shift += bits
        is_escape = offsets == escape
        (count,) = reader.words(1, np.uint32)
        if int(count) != np.count_nonzero(is_escape):
            raise reader.broken(f"lists {count} escapes where there are others")
        symbols = largest - offsets
        symbols[is_escape] = reader.take(int(count))
        target[...] = merge(symbols, [rest], SourceType.BFLOAT16)
