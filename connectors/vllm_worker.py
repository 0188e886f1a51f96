"""The worker's half of the vLLM connector: moves chunks between pages and the daemon.

Nothing here waits in a step that computes something. Every load that was asked for is
reported as received exactly once, with the blocks that did not come; every store is reported
as finished exactly once, whatever became of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch

from kvstore.client.sync import StoreReport
from kvstore.client.tracing import joined
from kvstore.connectors.chunks import ChunkCache
from kvstore.connectors.codecs import counted
from kvstore.connectors.vllm_handoff import Arrivals, HandoffCalls
from kvstore.connectors.vllm_layouts import KVGroup
from kvstore.connectors.vllm_metadata import LoadJob, Span, StepMetadata, StoreJob, WorkerReport
from kvstore.connectors.vllm_movers import choose_mover
from kvstore.connectors.vllm_pages import GroupPages, MakeMover, checked_pages
from kvstore.connectors.vllm_stats import codec_figures, device_figures
from kvstore.connectors.vllm_transfers import Transfers, Urgency
from kvstore.connectors.weights import UnsupportedError

log = logging.getLogger("vllm.kvstore")

# A step that computes nothing waits for transfers, so that their thread gets to run.
_IDLE_WAIT_SECONDS: Final = 0.005


@dataclass(slots=True)
class Received:
    """Loads that have ended since the last report."""

    requests: set[str] = field(default_factory=set)
    failed_requests: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


@dataclass(slots=True)
class TransferCounts:
    """What the worker's half has moved."""

    chunks_loaded: int = 0
    chunks_failed: int = 0
    chunks_stored: int = 0
    load_seconds: float = 0.0
    store_seconds: float = 0.0


class WorkerHalf:
    """Moves. Until pages are registered, and when they fail their test, every load fails."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        caches: Sequence[ChunkCache],
        handoffs: Sequence[HandoffCalls] = (),
        make_mover: MakeMover = choose_mover,
    ) -> None:
        """Take the namespace of every group and, where there are any, its hand-offs."""
        self.counts = TransferCounts()
        self.figures: dict[str, float] = {}
        self._groups = groups
        self._caches = caches
        self._make_mover = make_mover
        self._pages: list[GroupPages] = []
        self._off = ""
        self._transfers = Transfers()
        self._takes_handoffs = bool(handoffs)
        self._arrivals = Arrivals(handoffs, self._transfers, self._load_span, self._arrived)
        self._lock = threading.Lock()
        self._received = Received()
        self._finished_stores: dict[int, int] = {}
        self._incomplete: set[int] = set()

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take the engine's pages, once a test has shown that they are understood."""
        try:
            pages = []
            for group in self._groups:
                layers = [kv_caches[name] for name in group.layer_names]
                pages.append(checked_pages(group, layers, self._make_mover))
            self._pages = pages
            if all(each.moves_both_ways for each in pages):
                self._transfers.split()
        except UnsupportedError as error:
            self.turn_off(str(error))
        except Exception as error:
            log.exception("kvstore: the pages could not be tested")
            self.turn_off(f"the test of its pages failed: {error!r}")

    @property
    def converts(self) -> bool:
        """Whether some of the pages are converted, so that it matters who writes them."""
        return any(group.tiling is not None for group in self._groups)

    def turn_off(self, reason: str) -> None:
        """Move nothing from now on; the scheduler's half is told why."""
        self._pages = []
        self._off = self._off or reason

    def start_loads(self, metadata: StepMetadata) -> None:
        """Begin the loads of a step."""
        fences = self._fences(metadata.loads)
        self._arrivals.give_up(metadata.given_up)
        for job in metadata.loads:
            if job.source is not None and self._pages and self._takes_handoffs:
                self._arrivals.begin(job, job.source, fences)
                continue
            self._transfers.submit(Urgency.LOAD, partial(self._load, job, fences))

    def start_stores(self, metadata: StepMetadata) -> None:
        """Begin the stores of a step, whose KV is computed by now."""
        waits: list[threading.Event] = []
        fences = self._fences(metadata.stores)
        for job in metadata.stores:
            done = threading.Event()
            self._transfers.submit(Urgency.STORE, partial(self._store, job, fences, done))
            if not job.held:
                waits.append(done)
        for done in waits:
            done.wait()
        if metadata.is_idle and (self._transfers.unfinished or self._arrivals):
            self._transfers.wait_for_progress(_IDLE_WAIT_SECONDS)

    def take_received(self) -> Received:
        """Return the loads that have ended since the last call."""
        with self._lock:
            received, self._received = self._received, Received()
            return received

    def take_report(self) -> WorkerReport | None:
        """Return what the scheduler's half needs to know, if anything."""
        with self._lock:
            finished, self._finished_stores = self._finished_stores, {}
            incomplete, self._incomplete = self._incomplete, set()
        return WorkerReport(finished, self._off, incomplete) if finished or self._off else None

    def close(self) -> None:
        """Finish what is queued and end the connections. Idempotent."""
        self._arrivals.close()
        self._transfers.close()
        for pages in self._pages:
            pages.close()
        for cache in self._caches:
            cache.close()

    def _fences(self, jobs: Sequence[object]) -> list[Any]:
        """Return what transfers of *jobs* wait for, group by group; they begin behind this step."""
        return [pages.fence() for pages in self._pages] if jobs else []

    def _load(self, job: LoadJob, fences: Sequence[Any]) -> None:
        failed = set(job.lost)
        loaded, started = 0, time.perf_counter()
        try:
            with joined(job.trace):
                for span in job.spans:
                    good = self._load_span(span, fences)
                    failed |= _blocks_behind(span, good)
                    loaded += good
        except Exception:
            log.exception("kvstore: a load failed, its request is computed")
            failed = set().union(*(span.real_blocks for span in job.spans))
        self._receive(job, failed, loaded, started)

    def _arrived(self, job: LoadJob, loaded: Sequence[int], started: float) -> None:
        """Report a load that was fed by a hand-off, with the chunks that came of each span."""
        behind = (_blocks_behind(span, good) for span, good in zip(job.spans, loaded, strict=True))
        self._receive(job, set().union(*behind), sum(loaded), started)

    def _receive(self, job: LoadJob, failed: set[int], loaded: int, started: float) -> None:
        with self._lock:
            self._received.requests.add(job.request_id)
            if failed:
                self._received.failed_requests.add(job.request_id)
                self._received.failed_blocks |= failed
            self.counts.chunks_loaded += loaded
            self.counts.chunks_failed += sum(len(span.digests) for span in job.spans) - loaded
            self.counts.load_seconds += time.perf_counter() - started
        self._note_figures()

    def _load_span(self, span: Span, fences: Sequence[Any]) -> int:
        if not self._pages:
            return 0
        number = span.group
        return self._pages[number].load(self._caches[number], span, fences[number])

    def _store(self, job: StoreJob, fences: Sequence[Any], done: threading.Event) -> None:
        started = time.perf_counter()
        stored, is_whole = 0, bool(self._pages)
        try:
            with joined(job.trace):
                for span in job.spans if self._pages else ():
                    report = self._store_span(span, fences)
                    stored += report.stored
                    is_whole &= report.stored + report.present == len(span.digests)
        except Exception:
            log.exception("kvstore: a store failed")
            is_whole = False
        finally:
            with self._lock:
                if job.held:
                    self._finished_stores[job.job_id] = 1
                    if not is_whole:
                        self._incomplete.add(job.job_id)
                self.counts.chunks_stored += stored
                self.counts.store_seconds += time.perf_counter() - started
            self._note_figures()
            done.set()

    def _note_figures(self) -> None:
        damaged = sum(getattr(cache, "damaged_chunks", 0) for cache in self._caches)
        devices = (counters for pages in self._pages for counters in pages.device_counters)
        self.figures = codec_figures(counted(self._caches), damaged) | device_figures(devices)

    def _store_span(self, span: Span, fences: Sequence[Any]) -> StoreReport:
        number = span.group
        if not self._groups[number].shard.is_writer:
            # A neighbour has the same heads, and stores them.
            return StoreReport(0, len(span.digests), 0, 0)
        return self._pages[number].store(self._caches[number], span, fences[number])


def _blocks_behind(span: Span, good: int) -> set[int]:
    """Return the blocks of *span* behind its first *good* chunks."""
    rest = span.blocks_of(good, len(span.digests))
    return set(rest) & span.real_blocks
