"""Our codecs for the same measurement: every section by the codec itself, nothing spared.

What a policy adds to keep errors small (gentler codecs in the first and last layers, exact first
tokens, falling back above a bound) is left out, so that a row is what the codec does.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from kvstore.compression.chunks import ChunkCodec
from kvstore.compression.policy import CodecPolicy
from kvstore.types import HeadRange
from tests.bench.quality.evaluate import Bf16, Coded, RoundTrip

NAMES: Final = (
    *("raw", "exp3", "rans", "int8kv", "fp8", "k8v4", "int4kv", "nvfp4", "nvfp4-compat"),
    *("hq4", "hq3", "ecsq-hi", "ecsq-mid", "ecsq-lo"),
)
"""All codecs that take bfloat16, from the gentlest on."""


class _Geometry(NamedTuple):
    """The manifest of a chunk `[layer, 2, kv_head, token, head_dim]`."""

    layers: int
    kv_heads: int
    chunk_tokens: int
    head_dim: int
    dtype: str = "bfloat16"
    layout: str = "canonical"
    values: str = "k|v"
    opaque_bytes: int = 0


def codecs() -> dict[str, RoundTrip]:
    """Return all of ours by name."""
    return {name: _round_trip(name) for name in NAMES}


def _round_trip(name: str) -> RoundTrip:
    policy = CodecPolicy(codec=name, edge_layers=0, sinks=0, bounds={})

    def round_trip(chunk: Bf16) -> Coded:
        layers, _, heads, tokens, dim = chunk.shape
        codec = ChunkCodec(_Geometry(layers, heads, tokens, dim), policy)
        every = HeadRange(0, heads)
        target = bytearray(codec.encoded_size(every))
        report = codec.encode(chunk, memoryview(target), every)
        found = np.empty_like(chunk)
        codec.decode(memoryview(target)[: report.size_bytes], found, every)
        return Coded(found, sum(section.size_bytes for section in report.sections))

    return round_trip
