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


class Passages(NamedTuple):
    """Sequences of one kind: prefixes as stored, and what the model says about the rest."""

    tokens: Tensor
    outliers: list[Outliers]
    stored: list[Bf16]
    exact: Pass
    attended: list[Tensor]
    """Of each layer, what exact queries find in the exact prefix alone."""
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


def make_passages(
    model: TinyModel, level: int, *, count: int, seed: int = 7
) -> tuple[Passages, Passages]:
    """Return *count* held-out texts and *count* with needles; keys have outliers of *level*."""
    chance = np.random.default_rng(seed)
    source = corpus.standard_library(held_out=True)
    texts = [corpus.text(source, chance, PREFIX_TOKENS + TEXT_TOKENS) for _ in range(count)]
    needles = [corpus.needles(chance, PREFIX_TOKENS) for _ in range(count)]
    is_asked = np.stack([needle.is_asked[PREFIX_TOKENS:] for needle in needles])
    return (
        _make_passages(model, level, [text.tokens for text in texts], None),
        _make_passages(model, level, [needle.tokens for needle in needles], is_asked),
    )


def needle_accuracy(passages: Sequence[Passages]) -> float:
    """Return the accuracy with the exact prefix."""
    return float(np.nanmean([_needles(some, some.exact.logits) for some in passages]))


def measure(model: TinyModel, passages: Sequence[Passages], round_trip: RoundTrip) -> Quality:
    """Return the quality of *round_trip*."""
    found = [_measure_some(model, some, round_trip) for some in passages]
    # Texts have no needles, and say nothing of them.
    return Quality(*(float(np.nanmean(column)) for column in np.array(found, np.float64).T))


def to_bf16(values: Floats) -> Bf16:
    """Round to nearest even; *values* are finite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Bf16) -> Floats:
    """Return the values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _make_passages(
    model: TinyModel,
    level: int,
    rows: Sequence[corpus.Bytes],
    is_asked: NDArray[np.bool_] | None,
) -> Passages:
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    with torch.inference_mode():
        before = model(tokens[:, :PREFIX_TOKENS]).kv
        kept = torch.stack([torch.stack((kv.keys, kv.values)) for kv in before])
        outliers, stored = [], []
        for chunk in kept.permute(2, 0, 1, 3, 4, 5).numpy():
            outliers.append(make_outliers(level, chunk[:, 0]))
            chunk[:, 0] = outliers[-1].inject(chunk[:, 0])
            stored.append(to_bf16(chunk))
        # An engine holds bf16: that loss is not the codec's, so it is part of what is exact.
        prefix = _read_back(stored, outliers)
        exact = _go_on(model, tokens, prefix)
        attended = _attend(exact.queries, prefix)
    return Passages(tokens, outliers, stored, exact, attended, is_asked)


def _read_back(stored: Sequence[Bf16], outliers: Sequence[Outliers]) -> list[LayerKV]:
    """Return stored chunks as the model's own queries expect them."""
    chunks = np.stack([from_bf16(chunk) for chunk in stored])
    for chunk, injected in zip(chunks, outliers, strict=True):
        chunk[:, 0] = injected.undo(chunk[:, 0])
    layers = torch.from_numpy(chunks).permute(1, 2, 0, 3, 4, 5).contiguous()
    return [LayerKV(keys, values) for keys, values in layers]


def _go_on(model: TinyModel, tokens: Tensor, prefix: list[LayerKV]) -> Pass:
    """Read what lies behind the prefix."""
    last = tokens[:, PREFIX_TOKENS - 1 : PREFIX_TOKENS]
    return model(tokens[:, PREFIX_TOKENS:], prefix, last)


def _measure_some(model: TinyModel, passages: Passages, round_trip: RoundTrip) -> Quality:
    coded = [round_trip(chunk) for chunk in passages.stored]
    read = _read_back([chunk for chunk, _ in coded], passages.outliers)
    with torch.inference_mode():
        spoiled = _go_on(model, passages.tokens, read).logits
        attended = _attend(passages.exact.queries, read)
    values = sum(chunk.size for chunk in passages.stored)
    pairs = [
        (from_bf16(found), from_bf16(wanted))
        for (found, _), wanted in zip(coded, passages.stored, strict=True)
    ]
    return Quality(
        8 * sum(stored_bytes for _, stored_bytes in coded) / values,
        _kl(passages.exact.logits, spoiled),
        _agreement(passages.exact.logits, spoiled),
        _attention_error(attended, passages.attended),
        *(np.mean([_error(f[:, side], w[:, side]) for f, w in pairs]) for side in (0, 1)),
        _needles(passages, spoiled),
    )


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


def _attend(queries: Sequence[Tensor], prefix: Sequence[LayerKV]) -> list[Tensor]:
    """Return attention of each layer's queries to the prefix alone."""
    return [
        functional.scaled_dot_product_attention(query, kv.keys, kv.values, enable_gqa=True)
        for query, kv in zip(queries, prefix, strict=True)
    ]


def _attention_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the mean error over layers and sequences."""
    errors = [
        (some - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        for some, exact in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(errors).mean())


def _needles(passages: Passages, logits: Tensor) -> float:
    """Return the share of needles that are the most likely byte; NaN without any."""
    if passages.is_asked is None:
        return math.nan
    rest = passages.tokens[:, PREFIX_TOKENS:]
    # The byte at position i is foretold at i - 1.
    is_right = logits[:, :-1].argmax(-1) == rest[:, 1:]
    return float(is_right[torch.from_numpy(passages.is_asked[:, 1:])].double().mean())
