"""How figures are judged and printed: targets, tables, JSON, the machine in words."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from kvstore import __version__
from kvstore.transfer import copies

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Figures = dict[str, Any]
"""A row or a whole report, ready for JSON."""

_PASS: Final = "pass"  # noqa: S105  # a verdict
_MISS: Final = "MISS"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target and what was measured. *better* is "more" or "less"."""

    target: str
    limit: float
    measured: float
    better: str

    @property
    def is_met(self) -> bool:
        """Whether the target was reached."""
        return self.measured >= self.limit if self.better == "more" else self.measured <= self.limit

    @property
    def word(self) -> str:
        """The verdict in a word."""
        return _PASS if self.is_met else _MISS

    def figures(self) -> Figures:
        """Return all of it for JSON."""
        return asdict(self) | {"verdict": self.word}


def machine() -> Figures:
    """Return what decides the speed of this machine, in words."""
    return {
        "kvstore": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "copy_kernel": copies.KERNEL,
    }


def print_json(report: Figures) -> None:
    """Print *report* as JSON."""
    print(json.dumps(report, indent=2))


def print_heading(text: str) -> None:
    """Print a line over a table."""
    print(f"\n{text}\n")


def print_table(columns: Mapping[str, str], rows: Sequence[Figures]) -> None:
    """Print *rows* as a Markdown table; *columns* maps field names to headings."""
    print(table(columns, rows))


def table(columns: Mapping[str, str], rows: Sequence[Figures]) -> str:
    """Return *rows* as a Markdown table; *columns* maps field names to headings."""
    cells = [[_text(row.get(field)) for field in columns] for row in rows]
    lines = [list(columns.values()), *cells]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    under = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([_line(lines[0], widths), under, *(_line(line, widths) for line in cells)])


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print every target with its verdict."""
    columns = {"target": "target", "limit": "limit", "measured": "measured", "verdict": "verdict"}
    print_table(columns, [verdict.figures() for verdict in verdicts])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "| " + " | ".join(padded) + " |"


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
