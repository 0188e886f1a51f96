"""Tables that codecs share with everyone who reads what they wrote: literal, never computed.

A container names its table by the hash of its content, so that a table never changes: another
one is another id.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from kvstore.compression.shapes import Bytes, CodecId, Floats, SectionShape, shape_for

PROBABILITIES: Final = 4096
"""What the frequencies of a table add up to."""

GOLDEN: Final = 0x9E3779B97F4A7C15
MASK_64: Final = 2**64 - 1


def _table_id(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content).digest()[:8], "little")


@dataclass(frozen=True)
class Codebook:
    """Where hq cuts the normal distribution, and what stands for each piece."""

    name: str
    thresholds: tuple[float, ...]
    centroids: tuple[float, ...]

    @cached_property
    def table_id(self) -> int:
        """The id that containers carry."""
        numbers = (*self.thresholds, *self.centroids)
        return _table_id(self.name.encode() + struct.pack(f"<{len(numbers)}f", *numbers))


@dataclass(frozen=True)
class Preset:
    """Steps of ecsq in units of the standard deviation, for K and V, with their frequencies.

    Symbol i stands for i - bound steps; the last symbol is the escape.
    """

    name: str
    deltas: tuple[float, float]
    bounds: tuple[int, int]
    frequencies: tuple[tuple[int, ...], tuple[int, ...]]

    @cached_property
    def table_id(self) -> int:
        """The id that containers carry."""
        content = self.name.encode() + struct.pack("<2f", *self.deltas)
        for frequencies in self.frequencies:
            content += struct.pack(f"<{len(frequencies)}H", *frequencies)
        return _table_id(content)


HQ3: Final = Codebook("hq3", (0.5005, 1.05, 1.7479), (0.2451, 0.756, 1.3439, 2.1519))
HQ4: Final = Codebook(
    "hq4",
    (0.2582, 0.5224, 0.7995, 1.0993, 1.4371, 1.8435, 2.4008),
    (0.1284, 0.388, 0.6568, 0.9423, 1.2562, 1.618, 2.069, 2.7326),
)

STEPS_0_2: Final = (
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    2,
    2,
    2,
    2,
    2,
    3,
    4,
    5,
    7,
    10,
    14,
    22,
    32,
    47,
    66,
    91,
    121,
    155,
    192,
    229,
    263,
    292,
    311,
    320,
    311,
    292,
    263,
    229,
    192,
    155,
    121,
    91,
    66,
    47,
    32,
    22,
    14,
    10,
    7,
    5,
    4,
    3,
    2,
    2,
    2,
    2,
    2,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    1,
    4,
)
STEPS_0_3: Final = (
    1,
    1,
    1,
    1,
    1,
    1,
    2,
    2,
    2,
    2,
    3,
    4,
    5,
    6,
    10,
    18,
    33,
    59,
    100,
    158,
    233,
    316,
    395,
    453,
    478,
    453,
    395,
    316,
    233,
    158,
    100,
    59,
    33,
    18,
    10,
    7,
    5,
    4,
    3,
    2,
    2,
    2,
    2,
    1,
    1,
    1,
    1,
    1,
    1,
    3,
)
STEPS_0_5: Final = (
    1,
    1,
    2,
    2,
    3,
    4,
    5,
    8,
    18,
    47,
    120,
    267,
    481,
    693,
    790,
    693,
    481,
    267,
    120,
    47,
    18,
    8,
    5,
    3,
    3,
    2,
    2,
    1,
    1,
    3,
)
STEPS_0_6: Final = (
    1,
    1,
    2,
    3,
    4,
    5,
    9,
    22,
    69,
    205,
    469,
    785,
    943,
    785,
    469,
    205,
    69,
    22,
    9,
    5,
    4,
    3,
    2,
    1,
    1,
    3,
)
STEPS_1_0: Final = (
    2,
    3,
    5,
    11,
    40,
    260,
    962,
    1527,
    962,
    260,
    40,
    11,
    5,
    3,
    2,
    3,
)

PRESETS: Final = (
    Preset("ecsq-hi", (0.2, 0.3), (35, 24), (STEPS_0_2, STEPS_0_3)),
    Preset("ecsq-mid", (0.3, 0.6), (24, 12), (STEPS_0_3, STEPS_0_6)),
    Preset("ecsq-lo", (0.5, 1.0), (14, 7), (STEPS_0_5, STEPS_1_0)),
)
PRESETS_BY_ID: Final = {preset.table_id: preset for preset in PRESETS}
_OWN_TABLES: Final = {CodecId.HQ4: HQ4.table_id, CodecId.HQ3: HQ3.table_id}


def coding_shape(codec: CodecId, shape: SectionShape) -> SectionShape:
    """Return *shape* as the coder of *codec* takes it.

    hq has one table each, whatever the container's codec is; ecsq uses the container's.
    """
    own = shape.table if codec is CodecId.ECSQ else _OWN_TABLES.get(codec, 0)
    return replace(shape_for(codec, shape), table=own)


def signs(table_id: int, layer: int, kind: int, dim: int) -> Floats:
    """Return the +1 and -1 by which hq turns the channels of one section before rotating."""
    state = table_id ^ ((((layer << 1) | kind) * GOLDEN) & MASK_64)
    words = []
    for _ in range(-(-dim // 64)):
        state = (state + GOLDEN) & MASK_64
        word = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK_64
        words.append(word ^ (word >> 31))
    octets: Bytes = np.array(words, dtype="<u8").view(np.uint8)
    bits = np.unpackbits(octets, bitorder="little")[:dim]
    return np.where(bits, np.float32(-1), np.float32(1))
