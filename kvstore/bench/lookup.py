"""`kvstore bench lookup`: one look-up, beside a bare echo of the same bytes.

The echo is a server on the same kind of event loop in its own process, called in turn with the
daemon; its requests and replies have the sizes of those of the look-up. Beside the bare
look-up stands the whole of it from token ids, SHA-256 included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.bench import report
from kvstore.bench.daemon import BenchDaemon
from kvstore.bench.echo import EchoServer, request_of
from kvstore.bench.filling import CHUNK_TOKENS, MANIFEST, arena_bytes_for, fill, prefix
from kvstore.bench.report import Figures, Verdict
from kvstore.hashing import chunk_digests
from kvstore.limits import KEYS_PER_REQUEST_MAX
from kvstore.protocol import messages as m
from kvstore.protocol.framing import frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.bench.echo import EchoClient
    from kvstore.client.sync import Space
    from kvstore.types import Digest

_SIZES: Final = (1_000, 1_000_000)
_QUICK_SIZES: Final = (500,)
_OVER_ECHO_MS_MAX: Final = {16: 0.03, 256: 0.10, 4096: 1.0}
_CHUNK_BYTES_MAX: Final = 300
_ROUNDS: Final = 300
_KINDS: Final = ("all hit", "half", "all miss")
_VARIANTS: Final = 16
"""Different prefixes asked for in turn, so that a large index is not served from the caches."""

_COLUMNS: Final = {
    "index_chunks": "chunks in the index",
    "digests": "digests",
    "kind": "kind",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "echo_p50_ms": "echo p50 ms",
    "echo_p99_ms": "echo p99 ms",
    "over_echo_ms": "over echo ms",
    "limit_ms": "limit ms",
    "verdict": "verdict",
    "from_tokens_p50_ms": "from token ids p50 ms",
    "from_list_p50_ms": "from a list of ids p50 ms",
}


def main(argv: list[str]) -> int:
    """Measure and print; return 0, whatever the verdicts."""
    options = _parse(argv)
    rounds = options.rounds or (5 if options.quick else _ROUNDS)
    sizes = _QUICK_SIZES if options.quick else _SIZES
    rows: list[Figures] = []
    memory: list[Figures] = []
    with EchoServer() as echo:
        for chunks in sizes:
            _measure_size(chunks, echo.client, rounds, rows, memory)
    verdicts = _verdicts(rows, memory[-1])
    if options.output == "json":
        targets = [verdict.figures() for verdict in verdicts]
        report.print_json(
            {"machine": report.machine(), "rows": rows, "index": memory, "targets": targets}
        )
    else:
        _print(rows, memory, verdicts)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvstore bench lookup",
        description="Look up prefixes, beside a bare echo of the same bytes.",
    )
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.add_argument("--rounds", type=int, help=f"calls of each kind (default {_ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="a small index, few calls")
    return parser.parse_args(argv)


# --- measuring -------------------------------------------------------------------------


def _measure_size(
    chunks: int, echo: EchoClient, rounds: int, rows: list[Figures], memory: list[Figures]
) -> None:
    """Fill an index with *chunks* chunks and append what was measured."""
    with BenchDaemon(arena_bytes_for(chunks), checksums=False, prefault=False) as daemon:
        space = daemon.client.attach(MANIFEST)
        before = daemon.client.stats().resident_bytes
        started_at = time.perf_counter()
        prefixes = fill(space, chunks)
        seconds = time.perf_counter() - started_at
        held = daemon.client.stats().resident_bytes - before
        memory.append(
            {
                "index_chunks": chunks,
                "fill_seconds": seconds,
                "reserve_and_commit_us_per_chunk": seconds / chunks * 1e6,
                "daemon_bytes_per_chunk": held / chunks,
            }
        )
        for count in _OVER_ECHO_MS_MAX:
            for kind in _KINDS:
                lookups = list(_variants(kind, count, chunks, prefixes))
                row = _measure_kind(space, echo, lookups, rounds)
                rows.append(
                    _judged({"index_chunks": chunks, "digests": count, "kind": kind, **row})
                )


def _variants(kind: str, count: int, chunks: int, prefixes: int) -> Iterator[list[Digest]]:
    """Yield prefixes of *count* digests of which all, the first half or none are present."""
    present = {"all hit": count, "half": count // 2, "all miss": 0}[kind]
    length = min(chunks, KEYS_PER_REQUEST_MAX)
    # The last prefix may be a short one.
    whole = max(1, prefixes - 1)
    for variant in range(_VARIANTS):
        stored = prefix(variant * whole // _VARIANTS, length)
        # An index smaller than the request is asked for the same chunks again.
        found = (stored * -(-present // length))[:present]
        yield found + prefix(variant, count - present, kind="absent")


def _measure_kind(
    space: Space, echo: EchoClient, lookups: Sequence[Sequence[Digest]], rounds: int
) -> Figures:
    count = len(lookups[0])
    echo_call = _echo_call(space, echo, lookups[0])
    tokens = np.random.default_rng(0).integers(0, 100_000, count * CHUNK_TOKENS, dtype=np.uint32)
    token_list = tokens.tolist()
    times: dict[str, list[float]] = {"lookup": [], "echo": [], "tokens": [], "list": []}
    whole_rounds = max(3, rounds // 10)
    for at in range(-3, rounds):
        calls: dict[str, Callable[[], object]] = {
            "lookup": partial(space.lookup, lookups[at % len(lookups)]),
            "echo": echo_call,
        }
        if at < whole_rounds:
            calls["tokens"] = lambda: space.lookup(chunk_digests(tokens, CHUNK_TOKENS))
            calls["list"] = lambda: space.lookup(chunk_digests(token_list, CHUNK_TOKENS))
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if at >= 0:
                times[name].append(time.perf_counter() - start)
    return {
        "p50_ms": _quantile_ms(times["lookup"], 0.5),
        "p99_ms": _quantile_ms(times["lookup"], 0.99),
        "echo_p50_ms": _quantile_ms(times["echo"], 0.5),
        "echo_p99_ms": _quantile_ms(times["echo"], 0.99),
        "from_tokens_p50_ms": _quantile_ms(times["tokens"], 0.5),
        "from_list_p50_ms": _quantile_ms(times["list"], 0.5),
    }


def _echo_call(space: Space, echo: EchoClient, digests: Sequence[Digest]) -> Callable[[], None]:
    """Return an echo with the sizes of a look-up of *digests* and of its reply."""
    found = space.lookup(digests)
    asked = m.Lookup(found.request_id, 1000, space.attached.number, list(digests))
    reply_bytes = len(frame(found))
    return partial(echo.call, request_of(len(frame(asked)), reply_bytes), reply_bytes)


def _quantile_ms(seconds: Sequence[float], share: float) -> float:
    if len(seconds) < 2:
        return seconds[0] * 1e3
    return statistics.quantiles(seconds, n=100, method="inclusive")[round(share * 100) - 1] * 1e3


# --- judging and printing --------------------------------------------------------------


def _judged(row: Figures) -> Figures:
    row["over_echo_ms"] = row["p50_ms"] - row["echo_p50_ms"]
    row["limit_ms"] = _OVER_ECHO_MS_MAX[row["digests"]]
    row["verdict"] = _over_echo(row).word
    return row


def _over_echo(row: Figures) -> Verdict:
    target = f"{row['digests']} digests, ms over an echo, worst row"
    return Verdict(target, row["limit_ms"], row["over_echo_ms"], "less")


def _verdicts(rows: Sequence[Figures], memory: Figures) -> list[Verdict]:
    """Return the targets, each judged by its worst row."""
    worst = [
        max((row for row in rows if row["digests"] == count), key=lambda row: row["over_echo_ms"])
        for count in _OVER_ECHO_MS_MAX
    ]
    target = f"daemon memory per chunk at {memory['index_chunks']:,}, bytes"
    per_chunk = Verdict(target, _CHUNK_BYTES_MAX, memory["daemon_bytes_per_chunk"], "less")
    return [*map(_over_echo, worst), per_chunk]


def _print(rows: Sequence[Figures], memory: Sequence[Figures], verdicts: Sequence[Verdict]) -> None:
    for key, value in report.machine().items():
        print(f"{key}: {value}")
    report.print_heading("One look-up, beside an echo of the same bytes in the same run")
    report.print_table(_COLUMNS, rows)
    report.print_heading("The index")
    report.print_table({field: field.replace("_", " ") for field in memory[0]}, memory)
    report.print_heading("Targets")
    report.print_verdicts(verdicts)
