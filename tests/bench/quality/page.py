"""The page docs/benchmarks/codecs.md: what was measured, beside its goals, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from tests.bench.codecs_cpu import Speed
from tests.bench.quality.evaluate import PREFIX_TOKENS, TEXT_TOKENS, Quality
from tests.bench.quality.synthetic import Errors

PLOT_NAME: Final = "codecs.svg"
GROWTH_MAX: Final = 1.5
GROWTH_FLOOR_KL: Final = 6e-5
"""Growth of KL from outliers counts only above this."""


_FP8: Final = "fp8 without scale (LMCache)"
_TURBO_4: Final = "TurboQuant 4 bit, norm-corrected"
_TURBO_3: Final = "TurboQuant 3 bit, norm-corrected"
_CACHEGEN: Final = "CacheGen (LMCache's arithmetic)"


class Goal(NamedTuple):
    """What a codec is meant to reach."""

    bits: float
    calm_kl: float
    outlier_kl: float
    key_error: float
    value_error: float
    beside: str = ""
    """Which other codec of about that size it is to beat."""


GOALS: Final[Mapping[str, Goal]] = {
    "exp3": Goal(11.3, 0, 0, 0, 0),
    "rans": Goal(10.7, 0, 0, 0, 0),
    "int8kv": Goal(8.1, 3e-6, 5e-6, 0.006, 0.007, _FP8),
    "fp8": Goal(8.01, 3e-5, 6e-5, 0.027, 0.027, _FP8),
    "k8v4": Goal(6.3, 3e-5, 3e-5, 0.006, 0.09, "TurboQuant K8 V4"),
    "int4kv": Goal(4.51, 1e-4, 1e-4, 0.065, 0.09, _TURBO_4),
    "nvfp4": Goal(4.57, 1.3e-4, 1.3e-4, 0.075, 0.09, "NVFP4 along the head (TensorRT-LLM)"),
    "hq4": Goal(4.2, 1.3e-4, 1.3e-4, 0.07, 0.10, _TURBO_4),
    "hq3": Goal(3.2, 6e-4, 6e-4, 0.13, 0.19, _TURBO_3),
    "ecsq-hi": Goal(4.25, 6e-5, 6e-5, 0.04, 0.09, _CACHEGEN),
    "ecsq-mid": Goal(3.5, 1.6e-4, 1.6e-4, 0.06, 0.18, _CACHEGEN),
    "ecsq-lo": Goal(2.8, 6e-4, 6e-4, 0.10, 0.30, _TURBO_3),
}
"""Bits at heads of 128 and 256 tokens; errors of keys and values without injected outliers."""


class Row(NamedTuple):
    """A codec in this measurement."""

    name: str
    is_ours: bool
    levels: Mapping[int, Quality]
    synthetic: Errors


class Facts(NamedTuple):
    """What the page says of the model, and how long everything took."""

    parameters: int
    source: str
    exact_needles: float
    passages: int
    seconds: float
    machine: Mapping[str, Any]


def write(rows: Sequence[Row], facts: Facts, speed: Sequence[Speed]) -> str:
    """Return the page."""
    parts = [
        _INTRODUCTION.format(
            parameters=f"{facts.parameters / 1e6:.1f}",
            source=facts.source,
            needles=f"{facts.exact_needles:.3f}",
            passages=facts.passages,
            prefix=PREFIX_TOKENS,
            text=TEXT_TOKENS,
            plot=PLOT_NAME,
        ),
        *quality_table(rows),
        _GOALS_INTRODUCTION,
        *goals_table(rows),
        _SYNTHETIC_INTRODUCTION,
        *synthetic_table(rows),
        *speed_section(speed),
    ]
    machine = facts.machine
    closing = (
        f"\nMeasured with kvstore {machine['kvstore']} on {machine['system']}, "
        f"{machine['cores']} cores, in {facts.seconds:.0f} s.\n"
    )
    return "\n".join([*parts, closing])


def quality_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table of all codecs on the model."""
    lines = [
        _QUALITY_HEADING,
        "|---" * 13 + "|",
    ]
    for row in sorted(rows, key=lambda row: -row.levels[0].bits_per_value):
        calm, eight, thirty = (row.levels[level] for level in (0, 8, 30))
        cells = [
            f"**{row.name}**" if row.is_ours else row.name,
            f"{calm.bits_per_value:.2f}",
            *(f"{quality.kl_nats:.1e}" for quality in (calm, eight, thirty)),
            f"{growth(row):.1f}x" if calm.kl_nats > 0 else "-",
            f"{eight.top1_agreement:.4f}",
            *(f"{e:.4f}" for e in (eight.attention_error, eight.key_error, eight.value_error)),
            *(f"{quality.needle_accuracy:.3f}" for quality in (calm, eight, thirty)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def growth(row: Row) -> float:
    """Return how many times worse outliers of level 8 make a codec."""
    calm = row.levels[0].kl_nats
    return row.levels[8].kl_nats / calm if calm > 0 else 1.0


def is_spoiled_by_outliers(row: Row) -> bool:
    """Return whether the codec must not ship: outliers spoil it."""
    return growth(row) > GROWTH_MAX and row.levels[8].kl_nats > GROWTH_FLOOR_KL


def goals_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of goals, each beside what was measured."""
    lines = [
        "| codec | bits at D=128 | KL, 0 | KL, 8 | error of K | of V | outliers | KL, 8, share |",
        "|---" * 8 + "|",
    ]
    by_name = {row.name: row for row in rows}
    for row in rows:
        if row.name not in GOALS:
            continue
        goal, calm = GOALS[row.name], row.levels[0]
        pairs = (
            (row.synthetic.bits_per_value, goal.bits, ".2f"),
            (calm.kl_nats, goal.calm_kl, ".1e"),
            (row.levels[8].kl_nats, goal.outlier_kl, ".1e"),
            (calm.key_error, goal.key_error, ".4f"),
            (calm.value_error, goal.value_error, ".4f"),
        )
        cells = [_beside(*pair) for pair in pairs]
        verdict = "MISS" if is_spoiled_by_outliers(row) else "pass"
        cells += [verdict, _share(row, by_name.get(goal.beside))]
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
    return lines


def synthetic_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table of all codecs on synthetic KV."""
    lines = [
        "| codec | bits | error of K | of V | of logits | of attention |",
        "|---" * 6 + "|",
    ]
    for row in sorted(rows, key=lambda row: -row.synthetic.bits_per_value):
        name = f"**{row.name}**" if row.is_ours else row.name
        errors = [f"{error:.4f}" for error in row.synthetic[1:]]
        lines.append("| " + " | ".join([name, f"{row.synthetic[0]:.2f}", *errors]) + " |")
    return lines


def speed_section(speed: Sequence[Speed]) -> list[str]:
    """Return heading and table of speed beside memcpy; nothing when it was not measured."""
    if not speed:
        return []
    lines = [
        _SPEED_INTRODUCTION.format(threads=speed[0].threads, copy=speed[0].copy_gb_per_second),
        "| codec | loops | encode, x memcpy | GB/s | decode, x memcpy | GB/s |",
        "|---" * 6 + "|",
    ]
    for figure in speed:
        copied = figure.copy_gb_per_second
        cells = [
            f"{figure.encode / copied:.3f}",
            f"{figure.encode:.2f}",
            f"{figure.decode / copied:.3f}",
            f"{figure.decode:.2f}",
        ]
        lines.append("| " + " | ".join([figure.codec, figure.loops, *cells]) + " |")
    return lines


def _share(row: Row, other: Row | None) -> str:
    if other is None:
        return "-"
    return f"{row.levels[8].kl_nats / other.levels[8].kl_nats:.3f} of {other.name}"


def _beside(found: float, goal: float, form: str) -> str:
    # Shown and judged at the same precision.
    is_met = float(format(found, form)) <= goal
    return f"{found:{form}} of {goal:{form}}" + ("" if is_met else " MISS")


_QUALITY_HEADING: Final = (
    "| codec | bits | KL, 0 | KL, 8 | KL, 30 | growth to 8 | same first choice, 8 "
    "| error of attention, 8 | of K, 8 | of V, 8 | needles, 0 | 8 | 30 |"
)

_INTRODUCTION: Final = """\
# What codecs do to a model

Written by `kvstore bench codec --write docs/benchmarks/codecs.md` (or `make bench-codecs`) from a
checkout, in a few minutes on two cores. It needs PyTorch: `pip install 'kvstore[torch]'`.

A model of {parameters} million parameters (4 layers, 4 query and 2 KV heads of 64, RoPE, bytes as
tokens), trained on {source}, reads a prefix of
{prefix} bytes. The prefix's KV goes through a codec once, as bfloat16, and the model goes on from
what comes out: over {passages} held-out texts of {text} more bytes, and over {passages} passages
that ask 40 values which stand in the prefix and nowhere else. With the exact prefix it finds
{needles} of these needles.

*KL* is how far the distribution of the next byte moved, in nats per byte. *Level* 8 or 30 gives
three pairs of channels per head outliers of that many times the rest, and two an offset, in the
keys as stored; queries are scaled back, so the model's own output stays the same and every
difference is the codec's. Level 8 is what is published for models with biased keys. *Error* is
relative L2. Rows in bold are ours, without what a policy adds (gentler first and last layers, exact
first tokens, falling back above a bound). The others are the arithmetic of other systems rebuilt
from their papers and formats; entropy coders count as ideal.

![KL against bits per value]({plot})
"""

_GOALS_INTRODUCTION: Final = """
## Goals

Measured *of* goal. Goals of KL were set with an earlier model that had not learnt to look back: its
prefix mattered little, and all its KL were smaller, those of other systems' codecs too. Share is KL
at level 8 as a share of that of a comparable codec here. *Outliers* passes when level 8 makes
KL no more than 1.5 times worse, or leaves it below 6e-5.
"""

_SYNTHETIC_INTRODUCTION: Final = """
## Synthetic KV

Heads of 128, 256 tokens, with the outliers that are published of large models: channels of K that
differ log-normally, three pairs a head 8 to 30 times larger, offsets, eight channels that reach 167
in one layer as in Qwen2-7B, tokens of different size; a first token ten times the rest in V.
Queries see every channel alike.
"""

_SPEED_INTRODUCTION: Final = """
## Speed on the CPU

Sections of 8 heads of 128 and 256 tokens, of K and V by turns, in {threads} threads, with the C
library and without. GB/s count bfloat16 bytes of the engine; beside them stands memcpy of the same
bytes in the same run, which did {copy:.1f} GB/s.
"""
