"""Whether loading is worth while: a chunk that is computed anew sooner is left where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Worth(NamedTuple):
    """How many leading chunks to load, and how long that takes by all that is known."""

    chunks: int
    expected_seconds: float


def run_lengths(tiers: bytes) -> list[tuple[int, int]]:
    """Return (tier bits, chunks) for every run of equal bytes."""
    runs: list[tuple[int, int]] = []
    while tiers:
        rest = tiers.lstrip(tiers[:1])
        runs.append((tiers[0], len(tiers) - len(rest)))
        tiers = rest
    return runs


def worth_loading(
    runs: Sequence[tuple[int, int]],
    seconds_for: Callable[[int, int], float],
    recompute_seconds: float,
) -> Worth:
    """Return the prefix whose load saves most time against computing it.

    *runs* are (tier bits, chunks) in prefix order; *seconds_for* them is what a load of so
    many chunks from there takes. *recompute_seconds* is what one chunk costs the engine; with
    0 nobody has said, and all is loaded. Within a run every further chunk saves or loses the
    same, so only the ends of runs are compared.
    """
    best = Worth(0, 0.0)
    most_saved = 0.0
    chunks, expected = 0, 0.0
    for tiers, count in runs:
        chunks += count
        expected += seconds_for(tiers, count)
        saved = chunks * recompute_seconds - expected
        if not recompute_seconds or saved > most_saved or expected == 0.0:
            best, most_saved = Worth(chunks, expected), saved
    return best
