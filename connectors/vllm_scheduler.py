"""The scheduler's half of the vLLM connector: what is looked up, loaded and stored, and when.

A request's chunks are looked up in the background as soon as it arrives. What is found is
loaded into blocks that the request holds meanwhile; what it computes is stored by the step
that completes it. Blocks that are being stored have a reference of their own, so a request may
finish, be aborted or be preempted at any time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from kvstore.connectors.chunks import Group
from kvstore.connectors.vllm_events import Events, NoEvents
from kvstore.connectors.vllm_handoff import SchedulerHandoffs, read_terms
from kvstore.connectors.vllm_holdings import Holdings
from kvstore.connectors.vllm_keys import RequestKeys
from kvstore.connectors.vllm_layouts import KVGroup
from kvstore.connectors.vllm_lookups import Lookup, Lookups, TieredCache
from kvstore.connectors.vllm_metadata import (
    NOWHERE,
    HandedOver,
    LoadJob,
    Span,
    StepMetadata,
    StoreJob,
    WorkerReport,
)
from kvstore.connectors.vllm_tracking import Counts, Role, Tracked
from kvstore.types import TierKind

log = logging.getLogger("vllm.kvstore")

_NULL_BLOCK: Final = 0
# A request whose loads fail is computed after that many.
_LOADS_MAX: Final = 3
# A step that computes nothing may wait for answers, so that their thread gets to run.
_IDLE_WAIT_SECONDS: Final = 0.002
_EPOCH_BYTES: Final = 16


class SchedulerHalf:
    """Decides. Never waits for the daemon in a step that computes something."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        caches: Sequence[Sequence[TieredCache]],
        *,
        ranks: int,
        store_decoded: bool,
        lookup_timeout_seconds: float,
        role: Role | None = None,
        handoffs: SchedulerHandoffs | None = None,
        events: Events | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take, for each group, the namespaces that a hit needs: one, or one of every rank."""
        self.counts = Counts()
        self._groups = groups
        self._chunk_tokens = groups[0].chunk_tokens
        self._chunk_groups = [
            Group(some[0], group.window) for some, group in zip(caches, groups, strict=True)
        ]
        self._caches = [cache for some in caches for cache in some]
        self._store_decoded = store_decoded
        self._lookup_timeout_seconds = lookup_timeout_seconds
        self._clock = clock
        self._lookups = Lookups(
            [
                (cache, group.window)
                for some, group in zip(caches, groups, strict=True)
                for cache in some
            ],
            clock,
        )
        self._role = role or Role()
        self._handoffs = handoffs or SchedulerHandoffs([])
        self._given_up: list[str] = []
        self._events = events or NoEvents()
        self._to_tell: dict[int, tuple[Any, tuple[Span, ...], tuple[int, ...]]] = {}
        self._requests: dict[str, Tracked] = {}
        self._loads: list[LoadJob] = []
        self._holdings = Holdings(ranks)
        self._last_job = 0
        self._epoch = b""
        self._off = ""

    # --- what vLLM asks before a step -------------------------------------------------

    def bind_block_pool(self, pool: Any) -> None:
        """Take the pool whose blocks are referenced while they are stored."""
        self._holdings.bind(pool)

    def on_new_request(self, request: Any) -> None:
        """Begin to look up the chunks of *request*."""
        with self._failing_open():
            tracked = self._track(request)
            terms = read_terms(getattr(request, "kv_transfer_params", None))
            chunks = request.num_prompt_tokens // self._chunk_tokens
            if self._role.produces and self._handoffs.begin(request.request_id, terms, chunks):
                self.counts.handoffs_opened += 1
            if self._role.consumes:
                tracked.source = self._handoffs.promised(terms)
            if tracked.lookup is None and tracked.source is None:
                self._ask(tracked)

    def matched_tokens(self, request: Any, local_tokens: int) -> int | None:
        """Return how many tokens beyond *local_tokens* can be loaded; None: ask again.

        Changes nothing that vLLM can see, so it may be asked any number of times.
        """
        try:
            return self._matched_tokens(request, local_tokens)
        except Exception:
            log.exception("kvstore: a request is served without the cache")
            self._turn_off("an unexpected error")
            return 0

    def after_allocation(self, request: Any, blocks: tuple[list[int], ...], tokens: int) -> None:
        """Plan the load of *tokens* tokens, for which *blocks* have been allocated."""
        if not tokens:
            return
        # The request waits for a load: there must be one, if only one that fails.
        job = LoadJob(request.request_id, (), tuple(itertools.chain(*blocks)))
        with self._failing_open():
            job = self._load_job(request, blocks, tokens)
        self._loads.append(job)

    def build(self, output: Any) -> StepMetadata:
        """Return what the workers are to do in the step of *output*."""
        loads, self._loads = self._loads, []
        stores: list[StoreJob] = []
        with self._failing_open():
            self._follow_blocks(output)
            if not self._off:
                # One by one: those before an error hold blocks and must be carried out.
                stores.extend(self._store_jobs(output))
        is_idle = not output.total_num_scheduled_tokens
        if is_idle and not loads and self._is_asking():
            self._lookups.wait_for_progress(_IDLE_WAIT_SECONDS)
        given_up, self._given_up = self._given_up, []
        return StepMetadata(loads, stores, is_idle, given_up)

    # --- what vLLM tells after a step ---------------------------------------------------

    def after_step(self, output: Any) -> None:
        """Let go of blocks whose stores are finished, and learn which loads failed."""
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            with self._failing_open():
                done = self._holdings.let_go(report.finished_stores)
                self._tell_stored(done, report.incomplete)
                self._handoffs.stored(done)
            if report.off:
                self._turn_off(report.off)
        with self._failing_open():
            self._see_failures(output)

    def request_finished(self, request: Any) -> dict[str, Any] | None:
        """Forget *request*. Its loads and stores in flight end as they would have.

        Returns what a decode engine is to be given of it, if it is handed over.
        """
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self._handoffs.leave(tracked.source)
        if tracked is not None and tracked.loading is not None:
            self._given_up.append(request.request_id)
            self._handoffs.leave(tracked.loading.source)
        is_aborted = getattr(request.status, "name", "") == "FINISHED_ABORTED"
        tokens = request.num_prompt_tokens
        return self._handoffs.finish(request.request_id, tokens, is_aborted=is_aborted)

    def has_holdings(self) -> bool:
        """Whether blocks are held that will be free soon, if steps go on."""
        return len(self._holdings) > 0

    def hit_sources(self, request: Any, tokens: int) -> dict[TierKind, int]:
        """Return from which tiers the *tokens* of the load planned last come."""
        tracked = self._requests.get(request.request_id)
        sources = {} if tracked is None else tracked.sources
        return sources if sum(sources.values()) == tokens else {TierKind.HOST: tokens}

    def take_events(self) -> list[Any]:
        """Return what has become known of stored blocks since the last call."""
        return self._events.take()

    def reset(self) -> None:
        """Keep what is computed from now on apart from all that was stored before."""
        self._epoch = secrets.token_bytes(_EPOCH_BYTES)
        self._events.forget()
        self._to_tell.clear()
        for tracked in self._requests.values():
            tracked.may_store = False
            tracked.loads = _LOADS_MAX

    def close(self) -> None:
        """End the look-ups and the connections."""
        self._lookups.close()
        self._handoffs.close()
        for cache in self._caches:
            cache.close()

    # --- failing open -------------------------------------------------------------------

    @contextlib.contextmanager
    def _failing_open(self) -> Iterator[None]:
        """Have the block end quietly whatever happens in it; an error turns caching off."""
        try:
            yield
        except Exception:
            log.exception("kvstore: the engine goes on without the cache")
            self._turn_off("an unexpected error")

    def _turn_off(self, reason: str) -> None:
        if not self._off:
            self._off = reason
            log.warning("kvstore: caching is off: %s", reason)

    # --- look-ups and loads ---------------------------------------------------------------

    def _matched_tokens(self, request: Any, local_tokens: int) -> int | None:
        tracked = self._track(request)
        chunks = request.num_tokens // self._chunk_tokens
        tracked.hit = 0
        if self._off or tracked.loads >= _LOADS_MAX or chunks * self._chunk_tokens <= local_tokens:
            return 0
        if tracked.source is not None:
            return self._promised_tokens(tracked, tracked.source, local_tokens)
        now = self._clock()
        if tracked.lookup is None or tracked.lookup.is_stale(now):
            self._ask(tracked)
        lookup = tracked.lookup
        assert lookup is not None, "it was asked just now"
        if not lookup.is_answered:
            if not lookup.is_late(now, self._lookup_timeout_seconds):
                return None
            self.counts.lookups_late += 1
            tracked.loads = _LOADS_MAX
            return 0
        tracked.hit = lookup.hit
        self._tell_missing(tracked, lookup)
        return max(0, lookup.hit * self._chunk_tokens - local_tokens)

    def _promised_tokens(self, tracked: Tracked, source: HandedOver, local_tokens: int) -> int:
        """Return how many tokens a hand-off will bring, whether it has them already or not."""
        tokens = tracked.request.num_prompt_tokens
        if source.tokens is not None:
            tokens = min(tokens, source.tokens)
        tracked.hit = tokens // self._chunk_tokens
        return max(0, tracked.hit * self._chunk_tokens - local_tokens)

    def _load_job(self, request: Any, blocks: tuple[list[int], ...], tokens: int) -> LoadJob:
        tracked = self._track(request)
        tracked.stored = max(tracked.stored, tracked.hit)
        local_tokens = tracked.hit * self._chunk_tokens - tokens
        source = tracked.source
        if source is not None:
            tracked.source = None
            local = local_tokens // self._chunk_tokens
            needed = [group.first_needed(tracked.hit) for group in self._chunk_groups]
            source = replace(source, firsts=tuple(max(0, local - first) for first in needed))
            self.counts.handoffs_taken += 1
            self.counts.tokens_handed += tokens
        spans = tuple(self._load_spans(tracked, blocks, local_tokens))
        job = LoadJob(request.request_id, spans, source=source, trace=tracked.trace)
        tracked.loads += 1
        tracked.loading = job
        tracked.has_failed = False
        tracked.sources = self._sources(tracked, local_tokens)
        self._tell_found(tracked)
        tracked.first_loaded = local_tokens // self._chunk_tokens
        # What it finds next time, after a preemption, is to be looked up anew.
        tracked.lookup = None
        self.counts.tokens_hit += tokens
        for tier, count in tracked.sources.items():
            name = f"tokens_hit_{tier.name.lower()}"
            setattr(self.counts, name, getattr(self.counts, name) + count)
        return job

    def _sources(self, tracked: Tracked, local_tokens: int) -> dict[TierKind, int]:
        """Return how many tokens behind *local_tokens* come from each tier."""
        tiers = tracked.lookup.tiers if tracked.lookup is not None else []
        sources: dict[TierKind, int] = {}
        for chunk in range(local_tokens // self._chunk_tokens, tracked.hit):
            # A sliding window says nothing of what lies before it, and loads nothing of it.
            place = chunk - tracked.hit + len(tiers)
            tier = tiers[place] if 0 <= place < len(tiers) else TierKind.HOST
            start = max(chunk * self._chunk_tokens, local_tokens)
            sources[tier] = sources.get(tier, 0) + (chunk + 1) * self._chunk_tokens - start
        return sources

    def _see_failures(self, output: Any) -> None:
        invalid = set(output.invalid_block_ids or ())
        failed = set(getattr(output, "failed_recving", None) or ())
        if invalid:
            # A rank may report its failure before the others have finished.
            self._mark_failed(invalid)
        for request_id in output.finished_recving or ():
            tracked = self._requests.get(request_id)
            if tracked is None or tracked.loading is None:
                continue
            job, tracked.loading = tracked.loading, None
            self._handoffs.leave(job.source)
            if request_id in failed or tracked.has_failed:
                self.counts.load_failures += 1
                # It computes what did not come, and stores that.
                tracked.stored = tracked.first_loaded
                for span in job.spans:
                    self._events.missing(span.group, span.digests)

    def _mark_failed(self, invalid: set[int]) -> None:
        for tracked in self._requests.values():
            if tracked.loading is not None:
                spans = tracked.loading.spans
                tracked.has_failed |= any(span.real_blocks & invalid for span in spans)

    # --- events ---------------------------------------------------------------------------

    def _tell_stored(self, jobs: Sequence[int], incomplete: set[int]) -> None:
        for job_id in jobs:
            request, spans, firsts = self._to_tell.pop(job_id, (None, (), ()))
            if job_id not in incomplete:
                for span, first in zip(spans, firsts, strict=True):
                    self._events.stored(request, span.group, first, span.digests, TierKind.HOST)

    def _tell_found(self, tracked: Tracked) -> None:
        """Say what another engine, or an earlier life of this one, has stored."""
        tiers = tracked.lookup.tiers if tracked.lookup is not None else []
        first = tracked.hit - len(tiers)
        for chunk, tier in enumerate(tiers, first):
            digests = tracked.keys.up_to(chunk + 1)[chunk:]
            for group in range(len(self._groups)):
                if chunk >= self._chunk_groups[group].first_needed(tracked.hit):
                    self._events.stored(tracked.request, group, chunk, digests, tier)

    def _tell_missing(self, tracked: Tracked, lookup: Lookup) -> None:
        for group, chunk_group in enumerate(self._chunk_groups):
            if not chunk_group.window:
                # Behind a gap nothing is found, whatever is there.
                self._events.missing(group, tracked.keys.up_to(lookup.chunks)[lookup.hit :])

    def _track(self, request: Any) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.request is not request:
            keys = RequestKeys(request, self._chunk_tokens, self._epoch)
            tracked = self._requests[request.request_id] = Tracked(request, keys)
            tracked.may_store = self._role.stores
            if getattr(request, "resumable", False):
                # A session takes back tokens that it has had: no key stands for them.
                tracked.may_store = False
                tracked.loads = _LOADS_MAX
        return tracked

    def _ask(self, tracked: Tracked) -> None:
        tokens = tracked.request.num_tokens
        self.counts.lookups += 1
        self.counts.tokens_asked += tokens
        chunks, name = tokens // self._chunk_tokens, tracked.request.request_id
        tracked.lookup = self._lookups.ask(tracked.keys, chunks, name, tracked.trace)

    def _missing_from(self, tracked: Tracked) -> int:
        """Return the first chunk that is not known to be stored."""
        if tracked.lookup is not None and tracked.lookup.is_answered:
            return max(tracked.stored, tracked.lookup.hit)
        return tracked.stored

    def _is_asking(self) -> bool:
        return any(
            tracked.lookup is not None and not tracked.lookup.is_answered
            for tracked in self._requests.values()
        )

    def _load_spans(
        self, tracked: Tracked, blocks: tuple[list[int], ...], local_tokens: int
    ) -> Iterator[Span]:
        hit = tracked.hit
        for number, group in enumerate(self._groups):
            needed = self._chunk_groups[number].first_needed(hit)
            first = max(needed, local_tokens // self._chunk_tokens)
            each, local = group.blocks_per_chunk, local_tokens // group.block_tokens
            targets = [
                NOWHERE if position < local or block == _NULL_BLOCK else block
                for position, block in enumerate(blocks[number][: hit * each])
            ]
            digests = tracked.keys.up_to(hit)[first:]
            yield Span(number, digests, targets[first * each :], tracked.keys.before(first))

    # --- stores ---------------------------------------------------------------------------

    def _follow_blocks(self, output: Any) -> None:
        """Keep the block tables of requests; a resumed request has a new one."""
        for new in output.scheduled_new_reqs:
            if tracked := self._requests.get(new.req_id):
                tracked.blocks = tuple(list(blocks) for blocks in new.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, added in zip(cached.req_ids, cached.new_block_ids, strict=True):
            tracked = self._requests.get(request_id)
            if tracked is None or added is None:
                continue
            if request_id in cached.resumed_req_ids:
                tracked.blocks = tuple(list(blocks) for blocks in added)
            else:
                for blocks, more in zip(tracked.blocks, added, strict=True):
                    blocks.extend(more)

    def _store_jobs(self, output: Any) -> Iterator[StoreJob]:
        """Yield a job for every request that completes chunks in this step."""
        for request_id, computed in _computed_after(output):
            tracked = self._requests.get(request_id)
            if tracked is None or not tracked.may_store:
                continue
            request = tracked.request
            tokens = request.num_tokens if self._store_decoded else request.num_prompt_tokens
            end = min(computed, tokens) // self._chunk_tokens
            self._handoffs.publish(request_id, tracked.keys, end)
            tracked.stored = self._missing_from(tracked)
            if end <= tracked.stored:
                continue
            placed = tuple(self._store_spans(tracked, output, end))
            spans = tuple(span for _, span in placed)
            self._last_job += 1
            held = self._holdings.can_hold
            if held and not self._holdings.hold(self._last_job, spans):
                # The other blocks are left to the engine. Tried again in the next step.
                self.counts.stores_skipped += 1
                continue
            tracked.stored = end
            if held:
                self._handoffs.storing(request_id, self._last_job)
                firsts = tuple(first for first, _ in placed)
                self._to_tell[self._last_job] = (request, spans, firsts)
            yield StoreJob(self._last_job, spans, held, tracked.trace)

    def _store_spans(self, tracked: Tracked, output: Any, end: int) -> Iterator[tuple[int, Span]]:
        """Yield what is to be stored, each with the number of its first chunk."""
        tables = self._block_tables(tracked, output)
        for number, group in enumerate(self._groups):
            each = group.blocks_per_chunk
            for first, stop in _runs_of_whole(tables[number], tracked.stored, end, each):
                digests = tracked.keys.up_to(stop)[first:]
                blocks = tables[number][first * each : stop * each]
                yield first, Span(number, digests, blocks, tracked.keys.before(first))

    def _block_tables(self, tracked: Tracked, output: Any) -> tuple[list[int], ...]:
        """Return the blocks of a request; those that have left a window are null."""
        state = getattr(output, "kv_connector_block_state", None)
        if state is None:
            assert not any(group.window for group in self._groups), "windows need current tables"
            return tracked.blocks
        return tuple(state.resolve_block_ids(tracked.request.request_id))


def _computed_after(output: Any) -> Iterator[tuple[str, int]]:
    """Yield every scheduled request with the tokens that have KV after the step."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens + output.num_scheduled_tokens[new.req_id]
    cached = output.scheduled_cached_reqs
    for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield request_id, computed + output.num_scheduled_tokens[request_id]


def _runs_of_whole(
    blocks: Sequence[int], start: int, end: int, each: int
) -> Iterator[tuple[int, int]]:
    """Yield the bounds of runs of chunks in [start, end) that have all their blocks."""
    first = start
    for chunk in range(start, end):
        if _NULL_BLOCK in blocks[chunk * each : (chunk + 1) * each]:
            if first < chunk:
                yield first, chunk
            first = chunk + 1
    if first < end:
        yield first, end
