"""Hand-offs from prefill to decode: `kv_transfer_params`, and both sides of the connector.

The scheduler of a prefill engine opens a hand-off for every request that asks for one,
publishes its chunks as they are computed and closes it when they are stored. A worker of a
decode engine awaits them in order and loads them meanwhile; what does not come is computed.
Whoever carries the parameters between the two, a proxy, need not understand them.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Final, Protocol

import msgspec

from kvstore.client.handoff import NOTHING_AWAITED, Awaited, Opened
from kvstore.client.tracing import joined
from kvstore.connectors.chunks import first_needed
from kvstore.connectors.vllm_keys import RequestKeys
from kvstore.connectors.vllm_metadata import HandedOver, LoadJob, Span
from kvstore.connectors.vllm_transfers import Job, Transfers, Urgency
from kvstore.limits import HANDOFF_NAME_MAX_CHARS, HOST_NAME_MAX_CHARS, KEYS_PER_REQUEST_MAX
from kvstore.types import Digest, HandoffState

log = logging.getLogger("vllm.kvstore")

_SECRET_BYTES: Final = 16
# A request that ends waits so long for the name of its own daemon, which it has long had.
_HOST_SECONDS: Final = 0.05
# As many hand-offs are waited for at once without taking turns.
_THREADS_MAX: Final = 8
_WAIT_SECONDS: Final = 1.0
_TURN_SECONDS: Final = 0.02


class HandoffCalls(Protocol):
    """What is asked of the hand-offs of one namespace; see `CacheHandoffs`."""

    def open(self, name: str, *, consumers: int = 1, ttl_seconds: float = ...) -> Opened | None:
        """Open one."""
        ...

    def publish(self, name: str, first: int, digests: Sequence[Digest]) -> bool:
        """Announce chunks."""
        ...

    def close(self, name: str, payload: bytes = b"") -> bool:
        """Say that all is stored."""
        ...

    def abort(self, name: str) -> None:
        """Give it up."""
        ...

    def wait(
        self, name: str, first: int, *, timeout_seconds: float, peer: str = "", early: bool = False
    ) -> Awaited:
        """Wait for chunks."""
        ...

    def leave(self, name: str, *, peer: str = "") -> None:
        """Say that no more is needed."""
        ...


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What of `kv_transfer_params` is ours; the rest is other connectors'.

    *transfer_id* names the hand-off, *remote_host* the daemon that has it: empty for the own
    one. With *early*, the hand-off may be asked for before it is opened.
    """

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    transfer_id: Annotated[str, msgspec.Meta(max_length=HANDOFF_NAME_MAX_CHARS)] | None = None
    remote_host: Annotated[str, msgspec.Meta(max_length=HOST_NAME_MAX_CHARS)] | None = None
    remote_num_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    early: bool = False


def read_terms(params: object) -> Terms:
    """Return the terms in *params* of a request; terms that make no sense are none."""
    if not params:
        return Terms()
    try:
        return msgspec.convert(params, Terms)
    except msgspec.ValidationError as error:
        log.warning("kvstore: kv_transfer_params are not understood and ignored: %s", error)
        return Terms()


@dataclass(frozen=True, slots=True)
class HandoffGroup:
    """The hand-offs of one KV group, one in every namespace that a hit needs.

    *window* says what a hit needs of it, see `chunks.Group`. What the end of a prompt does not
    need is neither published nor waited for: a hand-off's number 0 is the first chunk needed.
    """

    calls: Sequence[HandoffCalls]
    window: int = 0


@dataclass(slots=True, eq=False)
class Production:
    """A hand-off of *chunks* chunks that this engine feeds; *jobs* store some of them now."""

    name: str
    chunks: int
    published: int = 0
    jobs: set[int] = field(default_factory=set)
    is_computed: bool = False
    is_broken: bool = False
    host: str | None = None
    opened: threading.Event = field(default_factory=threading.Event)


class SchedulerHandoffs:
    """The scheduler's side. Nothing here waits for the daemon: a thread of its own does.

    Without *groups*, nothing is handed over. A hand-off without news for *seconds* is over.
    """

    def __init__(
        self, groups: Sequence[HandoffGroup], *, seconds: float = 120.0, engine_id: str = ""
    ) -> None:
        self._groups = groups
        self._calls = [calls for group in groups for calls in group.calls]
        self._engine_id = engine_id
        self._seconds = seconds
        self._productions: dict[str, Production] = {}
        self._work: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._calls:
            self._thread = threading.Thread(target=self._run, name="kvstore-handoffs", daemon=True)
            self._thread.start()

    def begin(self, request_id: str, terms: Terms, chunks: int) -> bool:
        """Open a hand-off of a prompt's *chunks* if the request asks for it; return whether."""
        if not terms.do_remote_decode or request_id in self._productions or not self._calls:
            return False
        name = terms.transfer_id or _new_name(request_id)
        production = self._productions[request_id] = Production(name, chunks)
        self._work.put(partial(self._open, production))
        return True

    def promised(self, terms: Terms) -> HandedOver | None:
        """Return the hand-off that a request is to be fed from, if there is one."""
        if not terms.do_remote_prefill or not terms.transfer_id or not self._calls:
            return None
        return HandedOver(
            name=terms.transfer_id,
            peer=terms.remote_host or "",
            tokens=terms.remote_num_tokens,
            early=terms.early,
            seconds=self._seconds,
        )

    def publish(self, request_id: str, keys: RequestKeys, chunks: int) -> None:
        """Announce the first *chunks* chunks of a request, as far as they are new."""
        production = self._productions.get(request_id)
        if production is None or chunks <= production.published:
            return
        first, production.published = production.published, chunks
        self._work.put(partial(self._publish, production, first, keys.up_to(chunks)[first:]))

    def storing(self, request_id: str, job_id: int) -> None:
        """Note that *job_id* stores chunks of a request."""
        if production := self._productions.get(request_id):
            production.jobs.add(job_id)

    def stored(self, job_ids: Iterable[int]) -> None:
        """Close the hand-offs whose last stores these were."""
        for job_id in job_ids:
            for request_id, production in list(self._productions.items()):
                production.jobs.discard(job_id)
                self._close_when_done(request_id, production)

    def finish(self, request_id: str, tokens: int, *, is_aborted: bool) -> dict[str, Any] | None:
        """Return what the decode engine is to be given of a request that has ended, if anything."""
        production = self._productions.get(request_id)
        if production is None:
            return None
        production.opened.wait(_HOST_SECONDS)
        host = production.host
        if is_aborted or host is None:
            del self._productions[request_id]
            self._work.put(partial(self._abort, production))
            return None
        production.is_computed = True
        self._close_when_done(request_id, production)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self._engine_id,
            "remote_block_ids": [],
            "remote_request_id": request_id,
            "remote_host": host,
            "remote_port": None,
            "remote_num_tokens": tokens,
            "transfer_id": production.name,
        }

    def leave(self, source: HandedOver | None) -> None:
        """Say that this engine needs no more of a hand-off, if it had one."""
        if source is not None:
            self._work.put(partial(self._leave, source))

    def close(self) -> None:
        """Break what is not closed, and end the thread. Idempotent."""
        for production in self._productions.values():
            self._work.put(partial(self._abort, production))
        self._productions = {}
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _close_when_done(self, request_id: str, production: Production) -> None:
        if production.is_computed and not production.jobs:
            del self._productions[request_id]
            self._work.put(partial(self._close, production))

    # --- in the thread ------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("kvstore: a hand-off failed")

    def _open(self, production: Production) -> None:
        try:
            opened = [
                calls.open(production.name, ttl_seconds=self._seconds) for calls in self._calls
            ]
            hosts = {one.host for one in opened if one is not None}
            if None in opened or len(hosts) != 1:
                production.is_broken = True
            else:
                production.host = hosts.pop()
        finally:
            production.opened.set()

    def _publish(self, production: Production, first: int, digests: list[Digest]) -> None:
        for group in self._groups:
            base = first_needed(production.chunks, group.window)
            for start in range(max(first, base), first + len(digests), KEYS_PER_REQUEST_MAX):
                some = digests[start - first :][:KEYS_PER_REQUEST_MAX]
                for calls in () if production.is_broken else group.calls:
                    done = calls.publish(production.name, start - base, some)
                    production.is_broken |= not done

    def _close(self, production: Production) -> None:
        for calls in self._calls:
            calls.close(production.name)

    def _abort(self, production: Production) -> None:
        for calls in () if production.host is None else self._calls:
            calls.abort(production.name)

    def _leave(self, source: HandedOver) -> None:
        for calls in self._calls:
            calls.leave(source.name, peer=source.peer)


@dataclass(slots=True, eq=False)
class Arrival:
    """A load that waits for its chunks, span by span; *done* of each are loaded."""

    job: LoadJob
    source: HandedOver
    fences: Sequence[Any]
    ends_at: float
    started: float
    done: list[int]
    number: int = 0
    is_given_up: bool = False

    @property
    def span(self) -> Span:
        """The span that comes next."""
        return self.job.spans[self.number]

    @property
    def first(self) -> int:
        """The chunk of that span that comes next."""
        return self.done[self.number]

    @property
    def is_whole(self) -> bool:
        """Whether every chunk of every span is loaded."""
        return sum(self.done) == sum(len(span.digests) for span in self.job.spans)


class Arrivals:
    """The worker's side: loads chunks as they become ready, request by request.

    *calls* are the hand-offs of every KV group. *load* moves one span and says how many of its
    chunks are right; *report* is told once how every load has ended. Both run where all bytes
    are moved, in *transfers*.
    """

    def __init__(
        self,
        calls: Sequence[HandoffCalls],
        transfers: Transfers,
        load: Callable[[Span, Sequence[Any]], int],
        report: Callable[[LoadJob, Sequence[int], float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls = calls
        self._transfers = transfers
        self._load = load
        self._report = report
        self._clock = clock
        self._arrivals: dict[str, Arrival] = {}
        self._waiting: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closing = False

    def __len__(self) -> int:
        """Return how many loads wait for chunks."""
        return len(self._arrivals)

    def begin(self, job: LoadJob, source: HandedOver, fences: Sequence[Any]) -> None:
        """Load the spans of *job* as *source* delivers them."""
        ends_at, done = self._clock() + source.seconds, [0] * len(job.spans)
        arrival = Arrival(job, source, fences, ends_at, time.perf_counter(), done)
        self._arrivals[job.request_id] = arrival
        self._waiting.put(arrival)
        if len(self._threads) < min(_THREADS_MAX, len(self._arrivals)):
            number = len(self._threads)
            thread = threading.Thread(
                target=self._run, name=f"kvstore-arrivals-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def give_up(self, request_ids: Iterable[str]) -> None:
        """Wait no longer for requests that have ended."""
        for request_id in request_ids:
            with contextlib.suppress(KeyError):
                self._arrivals[request_id].is_given_up = True

    def close(self) -> None:
        """End the threads; what is still waited for is not reported any more. Idempotent."""
        self._closing = True
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _run(self) -> None:
        while (arrival := self._waiting.get()) is not None and not self._closing:
            try:
                with joined(arrival.job.trace):
                    self._turn(arrival)
            except Exception:
                log.exception("kvstore: a hand-off failed, the rest of its request is computed")
                self._transfers.submit(Urgency.LOAD, partial(self._end, arrival))

    def _turn(self, arrival: Arrival) -> None:
        """Wait for the next chunks of *arrival*, for a while, and have them loaded."""
        left = arrival.ends_at - self._clock()
        if left <= 0 or arrival.is_given_up:
            self._transfers.submit(Urgency.LOAD, partial(self._finish, arrival))
            return
        # With more to wait for than threads, they take turns.
        most = _WAIT_SECONDS if len(self._arrivals) <= _THREADS_MAX else _TURN_SECONDS
        source, span = arrival.source, arrival.span
        ready = self._calls[span.group].wait(
            source.name,
            source.firsts[arrival.number] + arrival.first,
            timeout_seconds=min(left, most),
            peer=source.peer,
            early=source.early,
        )
        count = _agreeing(ready.digests, span.digests[arrival.first :])
        if count:
            self._transfers.submit(Urgency.LOAD, partial(self._take, arrival, count))
        elif (ready.is_last or ready.digests) and not _is_to_open(arrival, ready):
            self._transfers.submit(Urgency.LOAD, partial(self._finish, arrival))
        else:
            self._waiting.put(arrival)

    def _take(self, arrival: Arrival, count: int) -> None:
        """Load the next *count* chunks, which are ready."""
        good = self._load_next(arrival, count)
        arrival.ends_at = self._clock() + arrival.source.seconds
        if good < count or arrival.is_whole:
            self._end(arrival)
        else:
            self._waiting.put(arrival)

    def _finish(self, arrival: Arrival) -> None:
        """Load what is there of the rest, as of any prefix, and wait no more."""
        good = rest = 0
        while good == rest and not (arrival.is_given_up or arrival.is_whole):
            rest = len(arrival.span.digests) - arrival.first
            good = self._load_next(arrival, rest)
        self._end(arrival)

    def _load_next(self, arrival: Arrival, count: int) -> int:
        """Load the next *count* chunks of a span; return how many of them have come."""
        span, first = arrival.span, arrival.first
        try:
            with joined(arrival.job.trace):
                good = self._load(_part(span, first, first + count), arrival.fences)
        except Exception:
            log.exception("kvstore: a load failed, the rest of its request is computed")
            good = 0
        arrival.done[arrival.number] += good
        if arrival.first == len(span.digests) and not arrival.is_whole:
            arrival.number += 1
        return good

    def _end(self, arrival: Arrival) -> None:
        if self._arrivals.pop(arrival.job.request_id, None) is not None:
            self._report(arrival.job, arrival.done, arrival.started)


def _is_to_open(arrival: Arrival, ready: Awaited) -> bool:
    """Whether the daemon has not heard of the hand-off yet, and may still."""
    is_answer = ready is not NOTHING_AWAITED  # which stands for no daemon, and comes at once
    is_unknown = ready.state is HandoffState.ABSENT and not any(arrival.done)
    return arrival.source.early and is_answer and is_unknown


def _new_name(request_id: str) -> str:
    secret = secrets.token_hex(_SECRET_BYTES)
    return f"{request_id[: HANDOFF_NAME_MAX_CHARS - len(secret) - 1]}-{secret}"


def _agreeing(theirs: Sequence[Digest], ours: Sequence[Digest]) -> int:
    """Return how many leading digests are the same."""
    count = 0
    for one, other in zip(theirs, ours, strict=False):
        if one != other:
            break
        count += 1
    return count


def _part(span: Span, start: int, stop: int) -> Span:
    """Return chunks [start, stop) of *span*."""
    parent = span.digests[start - 1] if start else span.parent
    return Span(span.group, span.digests[start:stop], span.blocks_of(start, stop), parent)
