"""The arithmetic of other systems' codecs, from their papers, for the same measurement.

Only what they do to values, and how many bits they store, is rebuilt here; entropy coders are
counted as ideal. Everything is as the papers or the public formats have it, with no tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.bench.quality.evaluate import Bf16, Coded, RoundTrip, from_bf16, to_bf16
from tests.bench.quality.outliers import Floats

_FP8_MAX: Final = 448.0
_FP4_LEVELS: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_BLOCK: Final = 16
# Lloyd-Max centroids of a unit normal, positive half.
_LLOYD_MAX: Final = {
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
# CacheGen as LMCache configures it: bins of keys and values, for the first third of the layers
# and for the rest.
_CACHEGEN_KEY_BINS: Final = (32, 16)
_CACHEGEN_VALUE_BINS: Final = (32, 16)

_Sided = Callable[[Floats], tuple[Floats, float]]
"""Takes keys or values `[layer, kv_head, token, dim]`; returns them spoiled, and their bits."""


def codecs() -> dict[str, RoundTrip]:
    """Return all peers' codecs by name."""
    return {
        "fp8 without scale (LMCache)": _both(_fp8, _fp8),
        "fp8 with a scale per head": _both(_fp8_scaled, _fp8_scaled),
        "int8 per token and head (vLLM)": _both(_int_per_token(8), _int_per_token(8)),
        "int4 per token and head (vLLM)": _both(_int_per_token(4), _int_per_token(4)),
        "TurboQuant K8 V4": _both(_fp8, _int_per_token(4)),
        "TurboQuant 4 bit, norm-corrected": _both(_turboquant(4), _turboquant(4)),
        "TurboQuant 3 bit, norm-corrected": _both(_turboquant(3), _turboquant(3)),
        "CacheGen (LMCache's arithmetic)": _both(
            _cachegen(_CACHEGEN_KEY_BINS), _cachegen(_CACHEGEN_VALUE_BINS)
        ),
        "NVFP4 along the head (TensorRT-LLM)": _both(_nvfp4, _nvfp4),
    }


def _both(keys: _Sided, values: _Sided) -> RoundTrip:
    def round_trip(chunk: Bf16) -> Coded:
        exact = from_bf16(chunk)
        sides = [side(exact[:, kind]) for kind, side in enumerate((keys, values))]
        spoiled = np.stack([side for side, _ in sides], axis=1)
        return Coded(to_bf16(spoiled), round(sum(bits for _, bits in sides) / 8))

    return round_trip


def _to_fp8(x: Floats) -> Floats:
    """Round to e4m3, nearest even, saturating: 3 bits of mantissa down to 2^-6, then 2^-9 steps."""
    exponent = np.clip(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-20))), -6, 8)
    step = np.exp2(exponent - 3)
    return np.clip(np.rint(x / step) * step, -_FP8_MAX, _FP8_MAX).astype(np.float32)


def _fp8(x: Floats) -> tuple[Floats, float]:
    return _to_fp8(x), 8.0 * x.size


def _fp8_scaled(x: Floats) -> tuple[Floats, float]:
    scale = np.abs(x).max(axis=(2, 3), keepdims=True) / _FP8_MAX
    return _to_fp8(x / scale) * scale, 8.0 * x.size + 32.0 * scale.size


def _int_per_token(bits: int) -> _Sided:
    """Asymmetric, one fp16 scale and zero per token and head."""

    def side(x: Floats) -> tuple[Floats, float]:
        low = x.min(axis=-1, keepdims=True).astype(np.float16).astype(np.float32)
        steps = 2**bits - 1
        scale = ((x.max(axis=-1, keepdims=True) - low) / steps).astype(np.float16)
        scale = np.maximum(scale.astype(np.float32), 1e-8)
        codes = np.clip(np.rint((x - low) / scale), 0, steps)
        return codes * scale + low, bits * x.size + 32.0 * scale.size

    return side


def _turboquant(bits: int) -> _Sided:
    """A random rotation, Lloyd-Max codes, and a norm per token and head that they preserve."""
    positive = np.array(_LLOYD_MAX[bits], np.float32)
    centroids = np.concatenate((-positive[::-1], positive))

    def side(x: Floats) -> tuple[Floats, float]:
        turn = _rotation(x.shape[-1])
        norm = np.linalg.norm(x, axis=-1, keepdims=True).astype(np.float16).astype(np.float32)
        unit = (x / np.maximum(norm, 1e-8)) @ turn * np.sqrt(x.shape[-1])
        found = _nearest(unit, centroids)
        corrected = found / np.linalg.norm(found, axis=-1, keepdims=True) * norm
        return (corrected @ turn.T).astype(np.float32), bits * x.size + 16.0 * norm.size

    return side


def _rotation(dim: int) -> Floats:
    """Return a Hadamard matrix with random signs, orthonormal. *dim* is a power of two."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], dim)
    return (signs[:, None] * hadamard / np.sqrt(dim)).astype(np.float32)


def _nearest(x: Floats, levels: NDArray[np.float32]) -> Floats:
    """Return the nearest of ascending *levels* for each value."""
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def _cachegen(bins: tuple[int, int]) -> _Sided:
    """Symmetric bins scaled by each token's maximum over all heads, then an ideal coder.

    The coder has one table per channel and chunk, which is stored: int16, one more than bins.
    """

    def side(x: Floats) -> tuple[Floats, float]:
        spoiled, bits = np.empty_like(x), 0.0
        for number, layer in enumerate(x):
            count = bins[0] if number < len(x) // 3 else bins[1]
            largest = np.abs(layer).max(axis=(0, 2), keepdims=True)
            half = count // 2 - 1
            codes = np.rint(layer / np.maximum(largest, 1e-8) * half)
            spoiled[number] = codes / half * largest
            bits += _channel_entropy(codes) + 16.0 * largest.size
            bits += 16.0 * (max(bins) + 1) * layer.shape[0] * layer.shape[2]
        return spoiled, bits

    return side


def _channel_entropy(codes: Floats) -> float:
    """Return the bits of `[head, token, dim]` under each channel's own distribution."""
    total = 0.0
    for channel in codes.swapaxes(1, 2).reshape(-1, codes.shape[1]):
        _, counts = np.unique(channel, return_counts=True)
        total -= float((counts * np.log2(counts / len(channel))).sum())
    return total


def _nvfp4(x: Floats) -> tuple[Floats, float]:
    """E2M1 in blocks of 16 along the head, an e4m3 scale each, one fp32 scale per tensor."""
    tensor_scale = np.abs(x).max(axis=(1, 2, 3), keepdims=True) / (6 * _FP8_MAX)
    blocks = x.reshape(*x.shape[:-1], -1, _FP4_BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 6 / tensor_scale[..., None]
    scale = np.maximum(_to_fp8(scale), 2.0**-9) * tensor_scale[..., None]
    levels = np.concatenate((-_FP4_LEVELS[:0:-1], _FP4_LEVELS))
    found = _nearest(blocks / scale, levels) * scale
    bits = 4.0 * x.size + 8.0 * scale.size + 32.0 * tensor_scale.size
    return found.reshape(x.shape).astype(np.float32), bits
