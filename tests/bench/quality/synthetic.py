"""KV with the outliers that are published of large models, and what a codec does to it.

Channels of K differ log-normally, three pairs a head are 8 to 30 times larger, some carry offsets,
tokens differ in size; in the first layer eight channels of all reach 167, as in Qwen2-7B. V is
normal with tokens of different sizes, and the first token is ten times the rest.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from tests.bench.quality.evaluate import Bf16, RoundTrip, from_bf16, to_bf16
from tests.bench.quality.outliers import Floats

LAYERS: Final = 2
HEADS: Final = 8
TOKENS: Final = 256
DIM: Final = 128
_QUERIES: Final = 32
_LARGEST: Final = 167.0


class Errors(NamedTuple):
    """Relative L2, of logits and of attention over random queries of the keys' own statistics."""

    bits_per_value: float
    key_error: float
    value_error: float
    logit_error: float
    attention_error: float


def make_chunk(seed: int = 3) -> Bf16:
    """Return `[layer, 2, head, token, dim]`."""
    chance = np.random.default_rng(seed)
    spread = _channel_sizes(chance)
    token_sizes = chance.lognormal(0.0, 0.3, (LAYERS, 2, HEADS, TOKENS, 1))
    values = chance.standard_normal((LAYERS, 2, HEADS, TOKENS, DIM)) * token_sizes
    offsets = spread * chance.normal(0.0, 1.0, spread.shape) * (chance.random(spread.shape) < 0.1)
    values[:, 0] = values[:, 0] * spread + offsets
    keys = values[0, 0]
    for chosen in chance.choice(HEADS * DIM, 8, replace=False):
        channel = keys[chosen // DIM, :, chosen % DIM]
        channel *= _LARGEST / np.abs(channel).max()
    values[:, 1, :, 0] *= 10
    return to_bf16(values.astype(np.float32))


def measure(chunk: Bf16, round_trip: RoundTrip) -> Errors:
    """Return what *round_trip* does to *chunk*."""
    coded = round_trip(chunk)
    exact, found = from_bf16(chunk), from_bf16(coded.chunk)
    queries = _queries(exact[:, 0])
    logits = [_logits(queries, side[:, 0]) for side in (exact, found)]
    attended = [
        _attend(score, side[:, 1]) for score, side in zip(logits, (exact, found), strict=True)
    ]
    return Errors(
        8 * coded.stored_bytes / chunk.size,
        _error(found[:, 0], exact[:, 0]),
        _error(found[:, 1], exact[:, 1]),
        _error(*reversed(logits)),
        _error(*reversed(attended)),
    )


def _channel_sizes(chance: np.random.Generator) -> Floats:
    """Return `[layer, head, 1, dim]`: what keys' channels are multiplied with."""
    pairs = chance.lognormal(0.0, 0.6, (LAYERS, HEADS, DIM // 2))
    for layer, head in np.ndindex(LAYERS, HEADS):
        chosen = chance.choice(DIM // 2, 3, replace=False)
        pairs[layer, head, chosen] *= chance.uniform(8, 30, 3)
    return np.concatenate((pairs, pairs), axis=-1)[:, :, None, :].astype(np.float32)


def _queries(keys: Floats) -> Floats:
    """Return queries that see every channel of *keys* alike, as trained ones do.

    Scores come out with a deviation of about 1.5.
    """
    chance = np.random.default_rng(5)
    deviation = keys.std(axis=2, keepdims=True)
    queries = chance.standard_normal((*keys.shape[:2], _QUERIES, DIM)) / deviation
    return (queries * 1.5 / np.sqrt(DIM)).astype(np.float32)


def _logits(queries: Floats, keys: Floats) -> Floats:
    scores = queries @ keys.swapaxes(-1, -2)
    # A constant per query does not count: softmax does not see it.
    return scores - scores.mean(axis=-1, keepdims=True)


def _attend(logits: Floats, values: Floats) -> Floats:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def _error(found: Floats, wanted: Floats) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
