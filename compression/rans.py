"""rans: the smallest lossless form. Exponents relative to their channel, entropy coded."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvstore.compression.shapes import (
    UNFIT,
    Bytes,
    Encoded,
    SectionShape,
    Values,
)
from kvstore.compression.split import has_exponents, merge, rest_planes, split
from kvstore.compression.streams import (
    Coding,
    normalised,
    put_streams,
    streams_of,
    take_streams,
)
from kvstore.compression.tables import PROBABILITIES
from kvstore.compression.variable_rate import FullError, Reader, Writer
from kvstore.types import HeadRange

SYMBOLS: Final = 256


class Rans:
    """One table per section, streams of 8192 symbols."""

    def encode(self, shape: SectionShape, source: Values, target: Bytes) -> Encoded:
        """Fill *target*; see `SectionCoder`."""
        symbols, rest = split(source, shape.source)
        largest = None
        if has_exponents(shape.source):
            largest = np.max(symbols, axis=1)
            symbols = largest[:, None, :] - symbols
        symbols = symbols.reshape(shape.heads, -1)
        frequencies = normalised(np.bincount(symbols.ravel(), minlength=SYMBOLS))
        writer = Writer(target)
        try:
            writer.put(frequencies)
            streams = shape.heads * streams_of(symbols.shape[1])
            directory = writer.reserve((streams + 1) * 4).view(np.uint32)
            if largest is not None:
                for head in largest:
                    writer.put(head)
            for index in range(shape.heads):
                for plane in rest:
                    writer.put(plane[index])
            put_streams(writer, directory, Coding.of(frequencies), symbols)
        except FullError:
            return UNFIT
        return Encoded(writer.at)

    def decode(self, shape: SectionShape, source: Bytes, target: Values, heads: HeadRange) -> None:
        """Fill *target* with *heads*; see `SectionCoder`."""
        reader = Reader(source, "rans")
        frequencies = reader.words(SYMBOLS, np.uint16)
        if int(frequencies.sum(dtype=np.int64)) != PROBABILITIES:
            raise reader.broken("has frequencies that do not add up")
        count = shape.tokens * shape.dim
        places = reader.directory(shape.heads * streams_of(count))
        if int(places[-1]) != len(source):
            raise reader.broken(f"has {len(source)} bytes and says {places[-1]}")
        largest = []
        if has_exponents(shape.source):
            largest = [reader.take(shape.dim) for _ in range(shape.heads)]
        form = (shape.tokens, shape.dim)
        planes = [
            [reader.take(count).reshape(form) for _ in range(rest_planes(shape.source))]
            for _ in range(shape.heads)
        ]
        coding = Coding.of(frequencies)
        symbols = take_streams(reader, source, places, coding, count, heads)
        for into, head in enumerate(range(heads.start, heads.stop)):
            plane = symbols[into].reshape(form)
            if largest:
                plane = largest[head] - plane
            target[into] = merge(plane, planes[head], shape.source)
