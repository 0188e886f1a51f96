"""What the NumPy coders of fixed-rate lossy codecs have in common.

Heads are taken in runs that fit a cache, widened to floats, coded by the codec, and compared
with what a decoder would make of the codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Final

import numpy as np

from kvstore.compression.floats import narrow, widen
from kvstore.compression.shapes import (
    UNFIT,
    Bytes,
    CodecId,
    Encoded,
    Floats,
    HeadLayout,
    SectionShape,
    Values,
    head_layout,
)
from kvstore.types import HeadRange

RUN_VALUES: Final = 1 << 17
"""Values that are worked on at a time: 512 KiB of floats."""


def head_runs(shape: SectionShape, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut the heads [*start*, *stop*) into runs of about `RUN_VALUES` values."""
    step = max(1, RUN_VALUES // (shape.tokens * shape.dim))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def fill(layout: HeadLayout, blocks: Bytes, part: str, content: Bytes) -> None:
    """Write *content* `[heads][...]` into *part* of every block, and zero its padding."""
    offset, size = layout.parts[part]
    ends = [place for place, _ in layout.parts.values() if place > offset]
    blocks[:, offset : offset + size] = content.reshape(len(blocks), size)
    blocks[:, offset + size : min(ends, default=layout.size_bytes)] = 0


def squares(values: Floats, decoded: Floats, sinks: int) -> tuple[float, float]:
    """Return the sums of squares of what *decoded* misses of *values*, and of those.

    The former is infinite when that of a single head exceeds the largest float.
    """
    heads = len(values)
    missed = (values - decoded)[:, sinks:].reshape(heads, -1)
    whole = values.reshape(heads, -1)
    error, energy = np.vecdot(missed, missed), np.vecdot(whole, whole)
    return float(error.sum(dtype=np.float64)), float(energy.sum(dtype=np.float64))


class FixedRateCoder(ABC):
    """A section coder whose sections have one length: encode and decode run by run."""

    codec: ClassVar[CodecId]

    def encode(self, shape: SectionShape, source: Values, target: Bytes) -> Encoded:
        """Fill *target*; see `SectionCoder`."""
        layout = head_layout(self.codec, shape)
        blocks = target.reshape(shape.heads, layout.size_bytes)
        error = energy = 0.0
        with np.errstate(all="ignore"):
            context = self.prepare(shape, source)
            for start, stop in head_runs(shape, 0, shape.heads):
                values = widen(source[start:stop], shape.source)
                values[:, : shape.sinks] = 0.0
                energy_of_run = float(np.vecdot(values.reshape(-1), values.reshape(-1)))
                if not np.isfinite(energy_of_run) and not np.isfinite(values).all():
                    return UNFIT
                run = shape.of_heads(stop - start)
                decoded = self.code(run, values, layout, blocks[start:stop], context)
                if decoded is None:
                    return UNFIT
                sums = squares(values, decoded, shape.sinks)
                error, energy = error + sums[0], energy + sums[1]
        if not np.isfinite(error):
            return UNFIT
        return Encoded(target.nbytes, error, energy)

    def decode(self, shape: SectionShape, source: Bytes, target: Values, heads: HeadRange) -> None:
        """Fill *target* with *heads*; see `SectionCoder`."""
        layout = head_layout(self.codec, shape)
        blocks = source.reshape(shape.heads, layout.size_bytes)
        with np.errstate(all="ignore"):
            for start, stop in head_runs(shape, heads.start, heads.stop):
                run = shape.of_heads(stop - start)
                values = self.values(run, layout, blocks[start:stop])
                target[start - heads.start : stop - heads.start] = narrow(values, shape.source)

    def prepare(self, shape: SectionShape, source: Values) -> Floats | None:
        """Return what all heads share, before the first of them is coded."""
        return None

    @abstractmethod
    def code(
        self,
        shape: SectionShape,
        values: Floats,
        layout: HeadLayout,
        blocks: Bytes,
        context: Floats | None,
    ) -> Floats | None:
        """Fill *blocks* and return what they decode to; None when a parameter is not finite.

        Sinks among *values* are zero.
        """

    @abstractmethod
    def values(self, shape: SectionShape, layout: HeadLayout, blocks: Bytes) -> Floats:
        """Return the values `[heads][tokens][dim]` of *blocks*."""
