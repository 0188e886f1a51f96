"""raw: values as the engine has them, gathered."""

from __future__ import annotations

from kvstore.compression.shapes import Bytes, Encoded, SectionShape, Values
from kvstore.types import HeadRange


class Raw:
    """The gather is the encoding."""

    def encode(self, shape: SectionShape, source: Values, target: Bytes) -> Encoded:
        """Fill *target*; see `SectionCoder`."""
        target.view(shape.source.carrier).reshape(source.shape)[...] = source
        return Encoded(target.nbytes)

    def decode(self, shape: SectionShape, source: Bytes, target: Values, heads: HeadRange) -> None:
        """Fill *target* with *heads*; see `SectionCoder`."""
        values = source.view(shape.source.carrier).reshape(shape.heads, shape.tokens, shape.dim)
        target[...] = values[heads.start : heads.stop]
