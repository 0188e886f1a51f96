"""Measure all codecs and print one table; `kvstore bench codec` from a checkout."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from kvstore.bench import report
from tests.bench import codecs_cpu
from tests.bench.quality import corpus, ours, page, peers, synthetic
from tests.bench.quality.evaluate import RoundTrip, make_passages, measure, needle_accuracy
from tests.bench.quality.model import WEIGHTS, TinyModel, load
from tests.bench.quality.outliers import LEVELS
from tests.bench.quality.plot import Dot, draw

_PASSAGES: Final = 12
_QUICK_PASSAGES: Final = 2


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0, whatever the figures."""
    options = _parse(argv)
    started_at = time.monotonic()
    # All tensors are small: a second thread would spend more on waiting than it saves.
    torch.set_num_threads(1)
    model = load(options.weights)
    rows, exact_needles = _measure(model, _QUICK_PASSAGES if options.quick else _PASSAGES)
    speed = [] if options.quick or options.no_speed else codecs_cpu.measure_all()
    facts = page.Facts(
        sum(weight.numel() for weight in model.parameters()),
        corpus.SOURCE,
        exact_needles,
        _QUICK_PASSAGES if options.quick else _PASSAGES,
        time.monotonic() - started_at,
        report.machine(),
    )
    if options.output == "json":
        report.print_json(_as_json(rows, facts, speed))
    else:
        print("\n".join(page.quality_table(rows)))
        print(f"\nneedles found with the exact prefix: {exact_needles:.3f}\n")
        print("\n".join([*page.goals_table(rows), "", *page.synthetic_table(rows)]))
        print("\n".join(page.speed_section(speed)))
    if options.write is not None:
        _write(options.write, rows, facts, speed)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvstore bench codec",
        description="What codecs do to the output of a small model, to synthetic KV, "
        "and how fast they are beside memcpy.",
    )
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.add_argument("--quick", action="store_true", help="two passages a kind, no speed")
    parser.add_argument("--no-speed", action="store_true", help="quality alone")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write page and plot there")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="another trained model")
    return parser.parse_args(argv)


def _measure(model: TinyModel, passages: int) -> tuple[list[page.Row], float]:
    """Return a row per codec, and the share of needles found with the exact prefix."""
    named: list[tuple[str, bool, RoundTrip]] = [
        *((name, True, codec) for name, codec in ours.codecs().items()),
        *((name, False, codec) for name, codec in peers.codecs().items()),
    ]
    by_level = {level: make_passages(model, level, count=passages) for level in LEVELS}
    chunk = synthetic.make_chunk()
    rows = [
        page.Row(
            name,
            is_ours,
            {level: measure(model, by_level[level], codec) for level in LEVELS},
            synthetic.measure(chunk, codec),
        )
        for name, is_ours, codec in named
    ]
    return rows, needle_accuracy(by_level[0])


def _write(
    path: Path, rows: Sequence[page.Row], facts: page.Facts, speed: Sequence[codecs_cpu.Speed]
) -> None:
    dots = [
        Dot(
            row.name,
            row.is_ours,
            row.levels[0].bits_per_value,
            row.levels[0].kl_nats,
            row.levels[8].kl_nats,
        )
        for row in rows
    ]
    path.write_text(page.write(rows, facts, speed))
    path.with_name(page.PLOT_NAME).write_text(draw(dots, 8))


def _as_json(
    rows: Sequence[page.Row], facts: page.Facts, speed: Sequence[codecs_cpu.Speed]
) -> dict[str, Any]:
    return {
        "facts": facts._asdict(),
        "codecs": [
            {
                "name": row.name,
                "is_ours": row.is_ours,
                "levels": {level: quality._asdict() for level, quality in row.levels.items()},
                "synthetic": row.synthetic._asdict(),
            }
            for row in rows
        ],
        "speed": [figure._asdict() for figure in speed],
    }
