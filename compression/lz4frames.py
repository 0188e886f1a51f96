"""lz4: for what repeats itself. The exponents of KV, or the bytes of opaque pages, as frames.

A frame per head, which the `lz4` command reads. Bytes that a sample says do not repeat are left
to the fallback without trying.
"""

from __future__ import annotations

from typing import Final

import lz4.frame
import numpy as np

from kvstore.compression.shapes import UNFIT, Bytes, Encoded, SectionShape, Values
from kvstore.compression.split import merge, rest_planes, split
from kvstore.compression.variable_rate import FullError, Reader, Writer
from kvstore.types import HeadRange

SAMPLE_BYTES: Final = 4096
SAMPLE_ENTROPY_BITS: Final = 6.5
"""Order-0 entropy above which bytes are taken for noise."""


def entropy_bits(sample: Bytes) -> float:
    """Return the order-0 entropy of *sample* in bits a byte; 0 for none."""
    counts = np.bincount(sample.ravel())
    shares = counts[counts > 0] / max(1, sample.size)
    return float(-np.sum(shares * np.log2(shares)))


def is_promising(symbols: Bytes) -> bool:
    """Whether a sample from the middle of *symbols* looks compressible: under 50 us."""
    flat = symbols.reshape(-1)
    start = max(0, (flat.size - SAMPLE_BYTES) // 2)
    return entropy_bits(flat[start : start + SAMPLE_BYTES]) <= SAMPLE_ENTROPY_BITS


class Lz4:
    """The symbols of every head as one frame, the rest as it is."""

    def encode(self, shape: SectionShape, source: Values, target: Bytes) -> Encoded:
        """Fill *target*; see `SectionCoder`."""
        symbols, rest = split(source, shape.source)
        symbols = np.ascontiguousarray(symbols)
        if not is_promising(symbols):
            return UNFIT
        writer = Writer(target)
        try:
            directory = writer.reserve((shape.heads + 1) * 4).view(np.uint32)
            for head in range(shape.heads):
                for plane in rest:
                    writer.put(plane[head])
            at = writer.at
            for head in range(shape.heads):
                frame = lz4.frame.compress(symbols[head].reshape(-1).data, store_size=True)
                if at + len(frame) > len(target):
                    raise FullError
                directory[head] = at
                target[at : at + len(frame)] = np.frombuffer(frame, dtype=np.uint8)
                at += len(frame)
            directory[shape.heads] = at
        except FullError:
            return UNFIT
        return Encoded(at)

    def decode(self, shape: SectionShape, source: Bytes, target: Values, heads: HeadRange) -> None:
        """Fill *target* with *heads*; see `SectionCoder`."""
        reader = Reader(source, "lz4")
        places = reader.directory(shape.heads)
        if int(places[-1]) != len(source):
            raise reader.broken(f"has {len(source)} bytes and says {places[-1]}")
        form = (shape.tokens, shape.dim)
        count = shape.tokens * shape.dim
        planes = [
            [reader.take(count).reshape(form) for _ in range(rest_planes(shape.source))]
            for _ in range(shape.heads)
        ]
        if int(places[0]) != reader.at:
            raise reader.broken(f"has frames at {places[0]}, not at {reader.at}")
        for into, head in enumerate(range(heads.start, heads.stop)):
            frame = source[int(places[head]) : int(places[head + 1])]
            symbols = self._decompress(reader, frame, count).reshape(form)
            target[into] = merge(symbols, planes[head], shape.source)

    @staticmethod
    def _decompress(reader: Reader, frame: Bytes, size_bytes: int) -> Bytes:
        """Return what *frame* holds: exactly *size_bytes*, of which no more are ever made."""
        decompressor = lz4.frame.LZ4FrameDecompressor()
        try:
            plain = decompressor.decompress(frame.tobytes(), max_length=size_bytes)
            # The end mark is read only when asked for more.
            more = b"" if decompressor.eof else decompressor.decompress(b"", max_length=1)
        except (RuntimeError, EOFError, ValueError) as error:
            raise reader.broken(f"has a frame that does not decode: {error}") from error
        if len(plain) != size_bytes or more or not decompressor.eof or decompressor.unused_data:
            raise reader.broken("has a frame that decodes to something else")
        return np.frombuffer(plain, dtype=np.uint8)
