"""Chunks for tests of compression: manifests of odd shapes, and KV that looks like KV."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.compression.chunks import ChunkCodec, decode
from kvstore.compression.floats import narrow, widen
from kvstore.compression.guard import EncodeReport
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.shapes import SourceType, source_type
from kvstore.protocol.manifest import Manifest
from kvstore.types import HeadRange

Values = np.ndarray[Any, Any]


def manifest_of(
    *,
    layers: int = 2,
    heads: int = 2,
    dim: int = 64,
    tokens: int = 64,
    dtype: str = "bfloat16",
    values: Any = "k|v",
) -> Manifest:
    return Manifest(
        model="m",
        revision="r",
        dtype=dtype,
        layers=layers,
        kv_heads=heads,
        head_dim=dim,
        chunk_tokens=tokens,
        values=values,
    )


def opaque_of(size: int) -> Manifest:
    return Manifest(
        model="m",
        revision="r",
        dtype="opaque",
        layers=2,
        kv_heads=1,
        head_dim=1,
        chunk_tokens=64,
        layout="opaque",
        opaque_bytes=size,
    )


def kv_floats(manifest: Manifest, seed: int = 0, outliers: float = 1.0) -> Values:
    """Return KV whose K channels differ in spread and centre, and whose V tokens differ in size."""
    rng = np.random.default_rng(seed)
    sides = 2 if manifest.values == "k|v" else 1
    heads, tokens, dim = manifest.kv_heads, manifest.chunk_tokens, manifest.head_dim
    values = rng.standard_normal((manifest.layers, sides, heads, tokens, dim))
    per_channel = (manifest.layers, heads, 1, dim)
    values[:, 0] *= np.exp(0.6 * rng.standard_normal(per_channel))
    values[:, 0] += 2 * outliers * rng.standard_normal(per_channel)
    values[:, 0, :, :, : max(1, dim // 32)] *= 1 + 11 * outliers
    if sides == 2:
        values[:, 1] *= np.exp(0.3 * rng.standard_normal((manifest.layers, heads, tokens, 1)))
    return values.astype(np.float32)


def kv_of(manifest: Manifest, seed: int = 0) -> Values:
    """Return the same in the manifest's type: `[layer][kind][head][token][dim]`."""
    return narrow(kv_floats(manifest, seed), source_type(manifest.dtype))


def encode(
    manifest: Manifest, policy: CodecPolicy, values: Values, first_position: int = 64
) -> tuple[bytearray, EncodeReport]:
    """Return the container of all heads of *values*, and the report."""
    codec = ChunkCodec(manifest, policy)
    heads = HeadRange(0, manifest.kv_heads)
    room = bytearray(b"\xa5" * codec.encoded_size(heads, first_position=first_position))
    report = codec.encode(values, memoryview(room), heads, first_position=first_position)
    return room[: report.size_bytes], report


def decoded(manifest: Manifest, stored: bytes | bytearray, like: Values) -> Values:
    """Return all heads of *stored*."""
    target = np.zeros_like(like)
    decode(manifest, stored, target, HeadRange(0, manifest.kv_heads))
    return target


def relative_error(values: Values, others: Values, source: SourceType) -> float:
    """Return the relative root of squared differences."""
    exact, found = (widen(part, source).astype(np.float64) for part in (values, others))
    return float(np.sqrt(np.sum((exact - found) ** 2) / np.sum(exact**2)))
