"""How the figures of `kvstore bench gpu` are judged and shown, and put into their page.

The page keeps its text; what stands between two marks is what the last run has found.
"""

from __future__ import annotations

import contextlib
import datetime
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import kvstore
from kvstore.bench import report
from kvstore.bench.gpu_bus import WAYS
from kvstore.bench.report import Figures, Verdict
from kvstore.gpu.devices import find_devices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CALL_MICROSECONDS_MAX: Final = 100.0
MATMUL_SLOWER_MAX: Final = 0.03
MATMUL: Final = "matmul beside stores, slower by"
CALL_ENDING: Final = "a store of 32 chunks, us"
EVEN: Final = "pages skip staging to the {}, from KiB"
BLOCKS: Final = ("figures", "beside LMCache")
_LMCACHE: Final = (
    "one stream for store and load of a worker: no use of both directions",
    "55 GB/s ceiling on an H200 with `cudaMemcpyBatchAsync`",
    "about 24 GB/s by kernel for few huge blocks",
    "break-even of the copy engine at about 34 KB an entry",
)
NOT_MEASURED: Final = "not measured"

_ROWS: Final = {
    "shape": "shape",
    "what": "what",
    "gb_per_s": "GB/s",
    "floor": "floor",
    "floor_gb_per_s": "floor GB/s",
    "ratio": "ratio",
    "target": "target",
    "verdict": "verdict",
}
_PAGES: Final = {
    "page_kib": "pages, KiB",
    **{f"{what}, {way}": f"{what}, {way}" for what in ("store", "load") for way in WAYS},
    "verdict": "",
}
MODELS: Final = {
    "tokens": "prefix, tokens",
    "what": "what",
    "first_token_ms": "ms",
    "faster": "times cold",
    "moved_by": "moved by",
    "logits_off": "logits off by",
    "outcome": "outcome",
    "verdict": "",
}
_TARGETS: Final = {
    "target": "target",
    "limit": "limit",
    "measured": "measured",
    "verdict": "verdict",
}


def facts(index: int) -> Figures:
    """Return what figures of GPU number *index* are worth nothing without."""
    found: Figures = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    with contextlib.suppress(ImportError):
        import cupy

        runtime: Any = cupy.cuda.runtime
        found["gpu"] = runtime.getDeviceProperties(index)["name"].decode()
        found["driver"] = find_devices().driver or "unknown"
        found["cuda"] = f"driver {runtime.driverGetVersion()}, CuPy's {runtime.runtimeGetVersion()}"
        found["cupy"] = cupy.__version__
    return found | {"commit": _commit()}


def _commit() -> str:
    """Return the commit of the checkout that this runs from, if it is one."""
    root = Path(kvstore.__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()


# --- verdicts ---------------------------------------------------------------------------------


def verdicts(found: Mapping[str, Sequence[Figures]], checks: Figures) -> list[Verdict]:
    """Judge what has a target."""
    made = [
        Verdict(f"{row['what']} ({row['shape']})", row["target"], row["ratio"], "more")
        for row in found["rows"]
        if row.get("target") is not None
    ]
    for name, value in checks.items():
        if name.endswith(CALL_ENDING):
            made.append(Verdict(name, CALL_MICROSECONDS_MAX, value, "less"))
        elif name == MATMUL:
            made.append(Verdict(name, MATMUL_SLOWER_MAX, value, "less"))
    # What is stored raw is answered as by the model alone.
    made += [
        Verdict(f"logits off by, {row['what']} ({row['tokens']})", 0.0, row["logits_off"], "less")
        for row in found["models"]
        if "logits_off" in row and row["what"].endswith("raw")
    ]
    return made


# --- tables ---------------------------------------------------------------------------------


def tables(found: Figures) -> str:
    """Return all of a run, in Markdown."""
    machine = [f"- {key}: {value}" for key, value in found["machine"].items()]
    checks = [{"what": name, "value": value} for name, value in found["checks"].items()]
    parts = (
        ("Chunks between pages and host memory, medians", _ROWS, found["rows"]),
        ("Pages in one piece, GB/s, medians, without checksums", _PAGES, found["pages"]),
        ("Time to first token, medians", MODELS, found["models"]),
        ("Checks and host time", {"what": "what", "value": "value"}, checks),
        ("Targets", _TARGETS, found["targets"]),
    )
    shown = [f"{name}:\n\n{report.table(columns, rows)}" for name, columns, rows in parts]
    return "\n\n".join(["\n".join(machine), *shown])


def beside_lmcache(found: Figures) -> str:
    """Return what LMCache documents, and what this run has measured of the same."""
    speeds = {row["what"]: row["gb_per_s"] for row in found["rows"] if "gb_per_s" in row}
    pages = [row for row in found["pages"] if "page_kib" in row]

    def text(words: str, *values: float | None) -> str:
        known = [value for value in values if value is not None]
        return words.format(*known) if len(known) == len(values) else NOT_MEASURED

    def best(way: str) -> float | None:
        return max((row[way] for row in pages if row.get(way) is not None), default=None)

    largest: Figures = max(pages, key=lambda row: int(row["page_kib"]), default={})
    evens = [_even(found["checks"], to) for to in ("host", "device")]
    shared, both = speeds.get("both, plain, in one stream"), speeds.get("both, gathered")
    ours = (
        text("{:.1f} GB/s in two, {:.1f} plain in one", both, shared),
        text("{:.1f} GB/s out, {:.1f} in", best("store, batched"), best("load, batched")),
        text(
            "{:.1f} GB/s out, {:.1f} in, pages of {:.0f} KiB",
            *(largest.get(key) for key in ("store, staged", "load, staged", "page_kib")),
        ),
        f"{evens[0]} out, {evens[1]} in" if pages else NOT_MEASURED,
    )
    columns = {"theirs": "LMCache, documented", "ours": "ours"}
    rows = [{"theirs": theirs, "ours": mine} for theirs, mine in zip(_LMCACHE, ours, strict=True)]
    return report.table(columns, rows)


def _even(checks: Figures, to: str) -> str:
    size = checks.get(EVEN.format(to))
    return "none at any size" if size is None else f"{size:.0f} KiB"


# --- the page -------------------------------------------------------------------------------


def filled(page: str, found: Figures) -> str:
    """Return *page* with what a run has found between its marks; raises `ValueError`."""
    for name, content in zip(BLOCKS, (tables(found), beside_lmcache(found)), strict=True):
        begin, end = _marked(page, name)
        page = f"{page[:begin]}\n{content}\n{page[end:]}"
    return page


def require_room(page: str) -> None:
    """Raise `ValueError` unless *page* has the marks between which figures go."""
    for name in BLOCKS:
        _marked(page, name)


def _marked(page: str, name: str) -> tuple[int, int]:
    """Return where what lies between the marks of *name* begins and ends."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    begin, end = (page.find(mark) for mark in marks)
    if begin < 0 or end < begin or any(page.count(mark) != 1 for mark in marks):
        raise ValueError(f"the page has no room for {name!r}: it lies between two marks")
    return begin + len(marks[0]), end
