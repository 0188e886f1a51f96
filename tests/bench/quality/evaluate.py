"""What a codec does to a model that reads its prefix through it.

The prefix is computed exactly; its post-RoPE KV goes through the codec once, in bf16, as a
canonical chunk `X[layer][k|v][kv_head][token][head_dim]`; the rest of the sequence attends to
what comes out. Compared is the next-byte distribution with the one of the untouched prefix.

Half of the sequences are held-out text. The others ask for values that stand in the prefix and
nowhere else: needles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tests.bench.quality import corpus
from tests.bench.quality.model import LayerKV, Pass, TinyModel
from tests.bench.quality.outliers import Floats, Outliers, make_outliers

PREFIX_TOKENS: Final = 256
TEXT_TOKENS: Final = 128

Bf16 = NDArray[np.uint16]
"""bf16 by its bits; numpy has no such type."""


class Coded(NamedTuple):
    """A chunk after a round trip, and the bytes that it took in between."""

    chunk: Bf16
    stored_bytes: int


RoundTrip = Callable[[Bf16], Coded]
"""Encode and decode one canonical chunk `[layer, 2, kv_head, token, head_dim]`."""


class Passage(NamedTuple):
    """One sequence: its prefix as stored, and what the model says about the rest."""

    tokens: Tensor
    outliers: Outliers
    stored: Bf16
    prefix: Floats
    exact: Pass
    is_asked: NDArray[np.bool_] | None
    """Which bytes behind the prefix are needles, where there are any."""


class Quality(NamedTuple):
    """Means over all sequences. Errors are relative L2."""

    bits_per_value: float
    kl_nats: float
    top1_agreement: float
    attention_error: float
    key_error: float
    value_error: float
    needle_accuracy: float


def make_passages(model: TinyModel, level: int, *, count: int, seed: int = 7) -> list[Passage]:
    """Return *count* held-out texts and *count* with needles; keys have outliers of *level*."""
    chance = np.random.default_rng(seed)
    source = corpus.standard_library(held_out=True)
    texts = [corpus.text(source, chance, PREFIX_TOKENS + TEXT_TOKENS) for _ in range(count)]
    needles = [corpus.needles(chance, PREFIX_TOKENS) for _ in range(count)]
    return [
        *(_make_passage(model, level, text.tokens, None) for text in texts),
        *(_make_passage(model, level, *needle) for needle in needles),
    ]


def needle_accuracy(passages: Sequence[Passage]) -> float:
    """Return the accuracy with the exact prefix."""
    return float(np.nanmean([_needles(passage, passage.exact.logits) for passage in passages]))


def measure(model: TinyModel, passages: Sequence[Passage], round_trip: RoundTrip) -> Quality:
    """Return the quality of *round_trip*."""
    found = [_measure_one(model, passage, round_trip) for passage in passages]
    # Texts have no needles, and say nothing of them.
    return Quality(*(float(np.nanmean(column)) for column in np.array(found, np.float64).T))


def to_bf16(values: Floats) -> Bf16:
    """Round to nearest even; *values* are finite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Bf16) -> Floats:
    """Return the values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _make_passage(
    model: TinyModel, level: int, row: corpus.Bytes, is_asked: NDArray[np.bool_] | None
) -> Passage:
    tokens = torch.from_numpy(row.astype(np.int64))[None]
    with torch.inference_mode():
        before = model(tokens[:, :PREFIX_TOKENS]).kv
        chunk = torch.stack([torch.stack((kv.keys[0], kv.values[0])) for kv in before]).numpy()
        outliers = make_outliers(level, chunk[:, 0])
        chunk[:, 0] = outliers.inject(chunk[:, 0])
        stored = to_bf16(chunk)
        # An engine holds bf16: that loss is not the codec's, so it is part of what is exact.
        prefix = _read_back(stored, outliers)
        exact = _go_on(model, tokens, prefix)
    asked = None if is_asked is None else is_asked[PREFIX_TOKENS:]
    return Passage(tokens, outliers, stored, prefix, exact, asked)


def _read_back(stored: Bf16, outliers: Outliers) -> Floats:
    """Return a stored chunk as the model's own queries expect it."""
    chunk = from_bf16(stored)
    chunk[:, 0] = outliers.undo(chunk[:, 0])
    return chunk


def _measure_one(model: TinyModel, passage: Passage, round_trip: RoundTrip) -> Quality:
    coded = round_trip(passage.stored)
    read = _read_back(coded.chunk, passage.outliers)
    with torch.inference_mode():
        spoiled = _go_on(model, passage.tokens, read).logits
    exact = passage.exact
    found, wanted = from_bf16(coded.chunk), from_bf16(passage.stored)
    return Quality(
        8 * coded.stored_bytes / passage.stored.size,
        _kl(exact.logits, spoiled),
        _agreement(exact.logits, spoiled),
        _attention_error(exact.queries, passage.prefix, read),
        _error(found[:, 0], wanted[:, 0]),
        _error(found[:, 1], wanted[:, 1]),
        _needles(passage, spoiled),
    )


def _go_on(model: TinyModel, tokens: Tensor, prefix: Floats) -> Pass:
    """Read what lies behind the prefix."""
    last = tokens[:, PREFIX_TOKENS - 1 : PREFIX_TOKENS]
    return model(tokens[:, PREFIX_TOKENS:], _as_layers(prefix), last)


def _as_layers(chunk: Floats) -> list[LayerKV]:
    return [
        LayerKV(torch.from_numpy(keys.copy())[None], torch.from_numpy(values.copy())[None])
        for keys, values in chunk
    ]


def _error(found: Floats, wanted: Floats) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _kl(exact: Tensor, spoiled: Tensor) -> float:
    """Return KL(exact || spoiled) in nats per token."""
    return float(
        functional.kl_div(
            functional.log_softmax(spoiled.double(), -1),
            functional.log_softmax(exact.double(), -1),
            log_target=True,
            reduction="none",
        )
        .sum(-1)
        .mean()
    )


def _agreement(exact: Tensor, spoiled: Tensor) -> float:
    return float((exact.argmax(-1) == spoiled.argmax(-1)).double().mean())


def _attention_error(queries: Sequence[Tensor], exact: Floats, read: Floats) -> float:
    """Return the mean error over layers of attention to the prefix alone, by exact queries."""
    errors = []
    for query, wanted, found in zip(queries, _as_layers(exact), _as_layers(read), strict=True):
        attended = [
            functional.scaled_dot_product_attention(
                query, kv.keys, kv.values, enable_gqa=True
            ).numpy()
            for kv in (found, wanted)
        ]
        errors.append(_error(*attended))
    return float(np.mean(errors))


def _needles(passage: Passage, logits: Tensor) -> float:
    """Return the share of needles that are the most likely byte; NaN without any."""
    if passage.is_asked is None:
        return math.nan
    rest = passage.tokens[0, PREFIX_TOKENS:]
    # The byte at position i is foretold at i - 1.
    is_right = logits[0, :-1].argmax(-1) == rest[1:]
    return float(is_right[torch.from_numpy(passage.is_asked[1:])].double().mean())
