"""`kvstore bench transfer`: store and load through the daemon, beside the bare copy.

The floor of a row is a streaming copy of the very same bytes between the very same addresses,
in the same run. For single chunks there is a second one: the same copy and the bare round
trips that such a call cannot do without.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from kvstore.bench import report
from kvstore.bench.cold import measure_cold_start
from kvstore.bench.report import Figures, Verdict
from kvstore.bench.shapes import SHAPES, SMALL_MODEL
from kvstore.bench.sweep import sweep
from kvstore.limits import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROUNDS: Final = 7
_WORKING_SET_BYTES: Final = 256 * MIB
_QUICK_WORKING_SET_BYTES: Final = 24 * MIB
_RATIO_MIN: Final = {False: 0.80, True: 0.65}
_SMALL_CHUNK_MS_MAX: Final = 0.6
_READY_SECONDS_MAX: Final = 1.0

_COLUMNS: Final = {
    "shape": "shape",
    "source": "source",
    "chunk_mib": "MiB",
    "batch": "batch",
    "checksums": "checksums",
    "direction": "direction",
    "ms": "ms",
    "gb_per_s": "GB/s",
    "floor_gb_per_s": "floor GB/s",
    "ratio": "ratio",
    "verdict": "verdict",
    "copy_with_checksums_ms": "copy + checksums ms",
    "thin_ms": "copy + round trips ms",
    "thin_ratio": "share of that",
    "client_cpu_s_per_gb": "client CPU s/GB",
    "daemon_cpu_s_per_gb": "daemon CPU s/GB",
    "rounds_kept": "rounds kept",
}


def main(argv: list[str]) -> int:
    """Measure and print; return 0, whatever the verdicts."""
    options = _parse(argv)
    shapes = (SMALL_MODEL,) if options.quick else SHAPES
    working_set = _QUICK_WORKING_SET_BYTES if options.quick else _WORKING_SET_BYTES
    rows = list(sweep(shapes, working_set, options.rounds or (1 if options.quick else _ROUNDS)))
    for row in rows:
        row["verdict"] = _ratio_verdict(row).word
    cold = measure_cold_start(64 * MIB if options.quick else GIB)
    verdicts = _summary(rows, cold)
    if options.output == "json":
        targets = [verdict.figures() for verdict in verdicts]
        report.print_json(
            {"machine": report.machine(), "rows": rows, "cold_start": cold, "targets": targets}
        )
    else:
        _print(rows, cold, verdicts)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvstore bench transfer",
        description="Store and load through the daemon, beside the bare copy of the same bytes.",
    )
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.add_argument("--rounds", type=int, help=f"counted rounds (default {_ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="one shape, one round: a smoke test")
    return parser.parse_args(argv)


def _ratio_verdict(row: Figures) -> Verdict:
    limit = _RATIO_MIN[row["checksums"]]
    return Verdict("share of the floor", limit, row["ratio"], "more")


def _summary(rows: Sequence[Figures], cold: Figures) -> list[Verdict]:
    """Return the targets, each judged by its worst row."""
    verdicts: list[Verdict] = []
    for checksums, limit in _RATIO_MIN.items():
        ratios = [row["ratio"] for row in rows if row["checksums"] is checksums]
        kind = "with default checksums" if checksums else "without checksums"
        verdicts.append(
            Verdict(f"share of the floor {kind}, worst row", limit, min(ratios), "more")
        )
    small = [
        row
        for row in rows
        if row["chunk_mib"] == SMALL_MODEL.chunk_bytes // MIB
        and row["batch"] == 1
        and row["source"] != "contiguous"
    ]
    for direction in ("store", "load"):
        worst = max(row["ms"] for row in small if row["direction"] == direction)
        target = f"one paged {direction} of 3 MiB, ms, worst row"
        verdicts.append(Verdict(target, _SMALL_CHUNK_MS_MAX, worst, "less"))
    ready = cold["ready_seconds"]
    return [*verdicts, Verdict("daemon ready, seconds", _READY_SECONDS_MAX, ready, "less")]


def _print(rows: Sequence[Figures], cold: Figures, verdicts: Sequence[Verdict]) -> None:
    for key, value in report.machine().items():
        print(f"{key}: {value}")
    report.print_heading("Store and load, medians; the floor is a streaming copy of the same bytes")
    report.print_table(_COLUMNS, rows)
    report.print_heading("Cold start")
    report.print_table({field: field.replace("_", " ") for field in cold}, [cold])
    report.print_heading("Targets")
    report.print_verdicts(verdicts)
