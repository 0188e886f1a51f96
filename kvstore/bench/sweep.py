"""The sweep of `kvstore bench transfer`: shapes, sources, batches, checksums, both directions.

Pages are warm on both sides: the arena is prefaulted, this process has mapped it in, and a
first round that is not counted has touched everything. That round also checks that what comes
back is what was stored. Rounds of the lanes of one source are interleaved, and a round during
which the machine changed its speed is dropped.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from kvstore.bench.daemon import BenchDaemon
from kvstore.bench.echo import EchoServer
from kvstore.bench.lanes import Lane, Pass
from kvstore.bench.shapes import Pool, Shape, Source
from kvstore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.bench.echo import EchoClient
    from kvstore.bench.report import Figures

_BATCH: Final = 8
_REFERENCE_BYTES: Final = 16 * MIB
_REFERENCE_DRIFT_MAX: Final = 0.15


@dataclass(slots=True)
class Rounds:
    """The rounds of one lane in one direction: the call, and what it is compared with."""

    calls: list[Pass] = field(default_factory=list)
    floors: list[Pass] = field(default_factory=list)
    with_checksums: list[Pass] = field(default_factory=list)
    thin: list[Pass] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)


def sweep(shapes: Sequence[Shape], working_set_bytes: int, rounds: int) -> Iterator[Figures]:
    """Yield a row for every shape, source, batch, direction, and checksums off and on."""
    pool = Pool(working_set_bytes)
    capacity = working_set_bytes + working_set_bytes // 64 + 16 * MIB
    with (
        EchoServer() as echo,
        BenchDaemon(capacity, checksums=False, prefault=True) as plain,
        BenchDaemon(capacity, checksums=True, prefault=True) as checked,
    ):
        for shape in shapes:
            for source in shape.sources:
                yield from _sweep_source(pool, (plain, checked), echo.client, shape, source, rounds)


def _sweep_source(
    pool: Pool,
    daemons: Sequence[BenchDaemon],
    echo: EchoClient,
    shape: Shape,
    source: Source,
    rounds: int,
) -> Iterator[Figures]:
    count = pool.memory.size // shape.chunk_bytes // _BATCH * _BATCH
    runs = pool.chunks(shape, source, count)
    spaces = [(daemon, daemon.attach_warm(shape.manifest(source))) for daemon in daemons]
    lanes = [Lane(daemon, space, runs, n, echo) for n in (1, _BATCH) for daemon, space in spaces]
    measured = [(Rounds(), Rounds()) for _ in lanes]
    for lane in lanes:
        _check_bytes(pool, lane, count * shape.chunk_bytes)
    for _ in range(rounds):
        for lane, (stores, loads) in zip(lanes, measured, strict=True):
            _measure_round(pool, lane, stores, loads)
    for lane, (stores, loads) in zip(lanes, measured, strict=True):
        yield _row(shape, source, lane, "store", stores)
        yield _row(shape, source, lane, "load", loads)


def _check_bytes(pool: Pool, lane: Lane, used_bytes: int) -> None:
    """Store, wipe, load, compare: the round that warms all pages."""
    used = pool.memory[:used_bytes]
    before = xxhash.xxh3_64_intdigest(used.data)
    lane.store()
    used[:] = 0
    lane.load()
    lane.clear()
    assert xxhash.xxh3_64_intdigest(used.data) == before, "what comes back is what was stored"


def _measure_round(pool: Pool, lane: Lane, stores: Rounds, loads: Rounds) -> None:
    _measure_direction(pool, stores, lane.store, lane.copy_in, lane.thin_store, lane)
    _measure_direction(pool, loads, lane.load, lane.copy_out, lane.thin_load, lane)
    lane.clear()


def _measure_direction(
    pool: Pool,
    rounds: Rounds,
    call: Callable[[], Pass],
    copy: Callable[..., Pass],
    thin: Callable[[], Pass],
    lane: Lane,
) -> None:
    before = _reference_seconds(pool)
    rounds.calls.append(call())
    rounds.floors.append(copy())
    if lane.checksums:
        rounds.with_checksums.append(copy(checksums=True))
    if lane.batch == 1:
        rounds.thin.append(thin())
    rounds.drifts.append(abs(_reference_seconds(pool) / before - 1))


def _reference_seconds(pool: Pool) -> float:
    """Return how long a plain copy takes at this moment."""
    half = min(_REFERENCE_BYTES, pool.memory.size // 2)
    source, target = pool.memory[:half], np.empty(half, np.uint8)
    target[:] = 0
    seconds: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# --- rows ------------------------------------------------------------------------------


def _row(shape: Shape, source: Source, lane: Lane, direction: str, rounds: Rounds) -> Figures:
    kept = [at for at, drift in enumerate(rounds.drifts) if drift <= _REFERENCE_DRIFT_MAX]
    # With every round disturbed, a disturbed figure that says so is better than none.
    counted = kept or list(range(len(rounds.drifts)))
    seconds = _median(rounds.calls, counted)
    size_bytes = shape.chunk_bytes * lane.batch
    moved_gb = shape.chunk_bytes * len(lane.runs) * len(counted) / 1e9
    calls = [rounds.calls[at] for at in counted]
    return {
        "shape": shape.name,
        "source": source,
        "chunk_mib": shape.chunk_bytes // MIB,
        "piece_bytes": shape.piece_bytes(source),
        "batch": lane.batch,
        "checksums": lane.checksums,
        "direction": direction,
        "ms": seconds * 1e3,
        "gb_per_s": size_bytes / seconds / 1e9,
        "floor_ms": _median(rounds.floors, counted) * 1e3,
        "floor_gb_per_s": size_bytes / _median(rounds.floors, counted) / 1e9,
        "ratio": _share(rounds.floors, rounds.calls, counted),
        "copy_with_checksums_ms": _ms(rounds.with_checksums, counted),
        "thin_ms": _ms(rounds.thin, counted),
        "thin_ratio": _share(rounds.thin, rounds.calls, counted),
        "client_cpu_s_per_gb": sum(one.client_cpu_seconds for one in calls) / moved_gb,
        "daemon_cpu_s_per_gb": sum(one.daemon_cpu_seconds for one in calls) / moved_gb,
        "rounds_kept": len(kept),
        "rounds": len(rounds.drifts),
    }


def _median(passes: Sequence[Pass], counted: Sequence[int]) -> float:
    return statistics.median(passes[at].seconds for at in counted)


def _share(floors: Sequence[Pass], calls: Sequence[Pass], counted: Sequence[int]) -> float | None:
    """Return the median share of a call's time that its floor takes, or None without a floor."""
    if not floors:
        return None
    return statistics.median(floors[at].seconds / calls[at].seconds for at in counted)


def _ms(passes: Sequence[Pass], counted: Sequence[int]) -> float | None:
    return _median(passes, counted) * 1e3 if passes else None
