"""The answers to one session's requests, at once or when what they wait for has happened."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, assert_never, cast

from kvstore.daemon.handoffs import HandoffAnswers
from kvstore.daemon.spans import RequestSpans
from kvstore.daemon.waits import CommitWait, FindWait, LoadWait, LookupWait, Wait
from kvstore.errors import DrainingError, KVStoreError, LimitError, ManifestError, RequestError
from kvstore.limits import (
    ATTACHMENTS_PER_SESSION_MAX,
    EXTENTS_PER_REPLY_MAX,
    FIND_WAIT_MAX_SECONDS,
)
from kvstore.protocol import messages as m
from kvstore.protocol.manifest import decode_manifest
from kvstore.store.history import Fate
from kvstore.store.recent import RecentLookup
from kvstore.types import Digest, HeadRange, LeaseId, ReservationId, Root, SessionId, TierKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.daemon.server import Server
    from kvstore.store.namespace import Namespace
    from kvstore.store.shards import ShardRecord
    from kvstore.store.store import Loading

# An answer leaves this long before the deadline, so that it is there in time.
_ANSWER_SECONDS = 0.002
_MICROSECOND = 1e-6
_DIRECT = TierKind.HOST | TierKind.DEVICE


class Answers:
    """What one session has entered and waits for. *reply* sends what was not answered at once."""

    def __init__(
        self, server: Server, session: SessionId, reply: Callable[[m.AnyReply], None]
    ) -> None:
        self.spaces: list[Namespace] = []
        # The numbers of those whose engine maps the pool of device memory.
        self._pooled: set[int] = set()
        self.tenant = 0
        self._scope = ""
        self._server = server
        self._store = server.store
        self._mover = server.mover
        self._session = session
        self._reply = reply
        self.spans = None if server.recorder is None else RequestSpans(server.recorder)
        self._waits: dict[int, Wait] = {}
        self._handoffs = HandoffAnswers(server, session, self._waits, self._later)

    def act_for(self, tenant: int, scope: str) -> None:
        """Count what comes for *tenant*, in the namespaces of *scope* (empty: the public ones)."""
        self.tenant = tenant
        self._scope = scope

    def end(self) -> None:
        """Stop waiting, and leave all namespaces: the session has ended."""
        for wait in self._waits.values():
            wait.cancel()
        self._waits.clear()
        for space in self.spaces:
            self._store.leave(space)

    def answer(self, request: m.AnyRequest) -> m.AnyReply | None:
        """Return the reply to *request*, or None when it will be sent later.

        Raises the `KVStoreError` that is the answer. Greetings are the session's own.
        """
        if isinstance(request, m.AnyHandoff):
            return self._hand_off(request)
        match request:
            case m.Lookup():
                return self._lookup(request)
            case m.Load():
                return self._load(request)
            case m.Reserve():
                return self._reserve(request)
            case m.Commit():
                return self._commit(request)
            case m.Release() | m.Abort():
                return self._let_go(request)
            case m.Pin() | m.Unpin() | m.Delete() | m.Prefetch() | m.Hint():
                return self._keep(request)
            case m.Stats():
                return m.StatsReply(request.request_id, self._server.stats())
            case m.Ping():
                self._server.engines.tell(self._session, request.counters)
                return m.Pong(request.request_id, request.payload)
            case _:
                raise AssertionError("greetings are answered by the session")

    def _hand_off(self, request: m.AnyHandoff) -> m.AnyReply | None:
        if isinstance(request, m.HandoffOpen):
            self._refuse_when_draining()
        space, seconds = self._space(request.space), self._seconds(request)
        return self._handoffs.answer(request, space, self.tenant, seconds)

    def _let_go(self, request: m.Release | m.Abort) -> m.Done:
        if isinstance(request, m.Release):
            count = self._store.release(self._session, map(LeaseId, request.leases))
        else:
            count = self._store.abort(self._session, map(ReservationId, request.reservations))
        return m.Done(request.request_id, count)

    def attach(self, request: m.Attach) -> m.Attached:
        """Enter the namespace that *request* is about."""
        self._refuse_when_draining()
        if len(self.spaces) >= ATTACHMENTS_PER_SESSION_MAX:
            raise LimitError(f"more than {ATTACHMENTS_PER_SESSION_MAX} namespaces in one session")
        manifest = decode_manifest(request.manifest)
        if manifest.chunk_bytes != request.chunk_bytes:
            raise ManifestError(
                f"attach.chunk_bytes is {request.chunk_bytes}, but by its manifest a chunk has "
                f"{manifest.chunk_bytes} bytes"
            )
        space = self._store.enter(manifest, self._scope)
        self.spaces.append(space)
        host, device = self._store.host, self._store.device
        pool = None if device is None or not request.pool else device.tier.pool
        if pool is not None:
            self._pooled.add(len(self.spaces) - 1)
        return m.Attached(
            request.request_id,
            len(self.spaces) - 1,
            space.id,
            host.arena.size_bytes,
            round(self._store.leases.ttl_seconds * 1000),
            host.checksums,
            host.checksums and self._server.verify_loads,
            self._server.prefaults,
            self._mover.writes_through,
            self.spans is not None,
            *(() if pool is None else (pool.size_bytes, pool.identity, pool.exported.handle)),
        )

    def _keep(self, request: m.Pin | m.Unpin | m.Delete | m.Prefetch | m.Hint) -> m.Done:
        space, digests = self._space(request.space), _digests(request.digests)
        request_id, store = request.request_id, self._store
        match request:
            case m.Pin():
                return m.Done(request_id, store.pin(space, digests, hard=request.hard))
            case m.Unpin():
                return m.Done(request_id, store.unpin(space, digests))
            case m.Delete():
                fate = Fate.DAMAGED if request.damaged else Fate.DELETED
                gone, busy = store.delete(space, digests, fate)
                return m.Done(request_id, gone, busy)
            case m.Prefetch():
                return m.Done(request_id, self._server.hints.prefetch(space, digests))
            case m.Hint():
                taken = self._server.hints.take(
                    space, digests, request.kind, request.seconds, request.host
                )
                return m.Done(request_id, taken)
            case _:
                assert_never(request)

    def sample(self, request: m.Lookup, body: bytes) -> None:
        """Note a look-up for miss-ratio curves, where these are wanted."""
        reuse = self._store.reuse
        if reuse.is_on and request.space < len(self.spaces):
            digests = _digests(request.digests)
            size_bytes = self.spaces[request.space].chunk_bytes
            reuse.looked_up(self.tenant, digests, size_bytes, body)

    # --- look-ups -----------------------------------------------------------------------

    def _lookup(self, request: m.Lookup) -> m.Found | None:
        space, digests = self._space(request.space), _digests(request.digests)
        if self._mover.can_find:
            hits, _ = self._store.index.prefix(space, digests, request.window)
            if hits < len(digests) and self._find(request, space, digests[hits:]):
                return None
        return self._look(request)

    def _find(self, request: m.Lookup, space: Namespace, digests: list[Digest]) -> bool:
        """Ask tiers that other hosts write to; the look-up goes on with what they say in time."""
        wait = FindWait(self._server.loop, partial(self._go_on, request))
        if not self._mover.find(space, digests, wait.finish):
            return False
        if not wait.is_over:
            self._waits[request.request_id] = wait
            wait.start(min(FIND_WAIT_MAX_SECONDS, self._seconds(request) / 2))
        return True

    def _go_on(self, request: m.Lookup) -> None:
        self._waits.pop(request.request_id, None)
        self._later(request, lambda: self._look(request))

    def _look(self, request: m.Lookup) -> m.Found | None:
        """Return what is there now, or wait for what is being written."""
        space, digests = self._space(request.space), _digests(request.digests)
        if request.wait:
            blocking = self._store.arriving_next(space, digests, request.window)
            if blocking is not None:
                wait = LookupWait(self._store, partial(self._found_later, request))
                self._waits[request.request_id] = wait
                wait.watch(
                    space,
                    lambda: self._store.arriving_next(space, digests, request.window),
                    self._server.loop,
                    self._seconds(request),
                )
                return None
        return self._found(request)

    def _found_later(self, request: m.Lookup) -> None:
        self._waits.pop(request.request_id, None)
        self._later(request, lambda: self._found(request))

    def _found(self, request: m.Lookup) -> m.Found:
        found = self._store.lookup(
            self._session,
            self._space(request.space),
            _digests(request.digests),
            self._server.loop.time(),
            window=request.window,
            lease=request.lease,
            recompute_seconds=request.recompute_us * _MICROSECOND,
        )
        if self._server.tracing.is_on:
            space, digests = self._space(request.space), _digests(request.digests)
            self._server.tracing.note(space, digests, found.hits)
        if request.name:
            self._note(request, found.hits)
        expected_us = round(found.expected_seconds / _MICROSECOND)
        return m.Found(
            request.request_id, found.hits, found.arriving, found.tiers, found.lease, expected_us
        )

    def _note(self, request: m.Lookup, hits: int) -> None:
        """Remember a look-up by its name."""
        digests, cost = _digests(request.digests), request.recompute_us * _MICROSECOND
        space = self._space(request.space)
        self._store.recent.note(RecentLookup(request.name, space, digests, hits, cost))

    # --- loads --------------------------------------------------------------------------

    def _load(self, request: m.Load) -> m.Loaded | None:
        space, loop = self._space(request.space), self._server.loop
        digests, now = _digests(request.digests), loop.time()
        loading = self._store.begin_load(
            self._session,
            space,
            digests,
            _heads(request, space),
            now,
            recompute_seconds=request.recompute_us * _MICROSECOND,
            direct=_DIRECT if request.space in self._pooled else TierKind.HOST,
        )
        if loading.is_at_hand:
            return self._loaded(request, loading, len(loading.slots))
        # Longer than this, its lease would not last for the copy.
        seconds = min(self._seconds(request), self._store.leases.ttl_seconds / 2)
        wait = LoadWait(partial(self._loaded_later, request, loading))
        self._waits[request.request_id] = wait
        wait.begin(
            lambda done: self._mover.load(loading, digests, now + seconds, done), loop, seconds
        )
        return None

    def _loaded_later(self, request: m.Load, loading: Loading, count: int) -> None:
        wait = self._waits.pop(request.request_id, None)
        if self.spans is not None and isinstance(wait, LoadWait):
            self.spans.reads(request.request_id, wait.reads)
        self._store.counters.load_chunks_late += len(loading.slots) - count
        self._later(request, lambda: self._loaded(request, loading, count))

    def _loaded(self, request: m.Load, loading: Loading, count: int) -> m.Loaded:
        lease, chunks = self._store.end_load(loading, count)
        if loading.direct != TierKind.HOST:
            chunks = self._with_pool(loading, chunks)
        return m.Loaded(request.request_id, lease, _shards(chunks))

    def _with_pool(
        self, loading: Loading, chunks: list[list[ShardRecord]]
    ) -> list[list[ShardRecord]]:
        """Return *chunks* with the places in the pool of what is read there, behind the arena."""
        device, behind = self._store.device, self._store.host.arena.size_bytes
        assert device is not None, "a space is pooled where there is a pool"

        def place(slot: int, shard: ShardRecord) -> ShardRecord:
            if not loading.is_pooled(shard):
                return shard
            extent = device.place_of(slot, shard)
            return shard._replace(extent=extent._replace(offset=behind + extent.offset))

        slots = loading.slots[: len(chunks)]
        return [
            [place(slot, shard) for shard in chunk]
            for slot, chunk in zip(slots, chunks, strict=True)
        ]

    # --- writing ------------------------------------------------------------------------

    def _reserve(self, request: m.Reserve) -> m.Reserved:
        self._refuse_when_draining()
        space = self._space(request.space)
        heads = _heads(request, space)
        for size_bytes in set(request.sizes):
            space.manifest.check_stored_bytes(heads, size_bytes)
        granted = self._store.reserve(
            self._session,
            space,
            _digests(request.digests),
            parent=Digest(request.parent) if request.parent else None,
            heads=heads,
            sizes=request.sizes,
            tenant=self.tenant,
            pooled=request.space in self._pooled,
        )
        behind = self._store.host.arena.size_bytes
        slots = [
            m.Slot(one.outcome, one.reservation, one.extent.offset + one.is_pooled * behind)
            for one in granted
        ]
        return m.Reserved(request.request_id, slots)

    def _commit(self, request: m.Commit) -> m.Committed | None:
        failures: list[m.Failure] = []
        wait = CommitWait(partial(self._committed_later, request, failures))
        for filled in request.filled:
            reservation = ReservationId(filled.reservation)
            try:
                made = self._store.commit(self._session, reservation, Root(filled.root))
            except KVStoreError as error:
                self._store.counters.request_errors += 1
                failures.append(m.Failure(filled.reservation, error.code, str(error)))
                continue
            if self._mover.writes_through:
                wait.expect(
                    reservation,
                    partial(self._mover.when_written, made.space, made.digest, made.heads),
                )
        if not wait.is_needed:
            return m.Committed(request.request_id, failures)
        self._waits[request.request_id] = wait
        wait.start(self._server.loop, self._seconds(request))
        return None

    def _committed_later(
        self, request: m.Commit, failures: list[m.Failure], volatile: list[int]
    ) -> None:
        self._waits.pop(request.request_id, None)
        self._reply(m.Committed(request.request_id, failures, volatile))

    # --- inside -------------------------------------------------------------------------

    def _later(self, request: m.Request, answer: Callable[[], m.AnyReply | None]) -> None:
        """Send the reply, or the error, to a request that has waited."""
        try:
            reply = answer()
        except KVStoreError as error:
            self._store.counters.request_errors += 1
            reply = error_reply(request.request_id, error)
        if reply is not None:
            self._reply(reply)

    def _seconds(self, request: m.Request) -> float:
        """Return how long *request* may wait from now on."""
        seconds = request.deadline_ms / 1000
        return max(seconds - _ANSWER_SECONDS, seconds / 2)

    def _refuse_when_draining(self) -> None:
        if self._server.draining:
            raise DrainingError("the daemon is shutting down")

    def _space(self, number: int) -> Namespace:
        if number >= len(self.spaces):
            raise RequestError(f"space {number} was not attached in this session")
        return self.spaces[number]


def error_reply(request_id: int, error: KVStoreError) -> m.Error:
    """Return the reply that says *error*."""
    return m.Error(request_id, error.code, str(error), error.retryable)


def _digests(raw: list[bytes]) -> list[Digest]:
    return cast("list[Digest]", raw)


def _heads(request: m.Load | m.Reserve, space: Namespace) -> HeadRange:
    return HeadRange(request.head_start, request.head_stop or space.manifest.kv_heads)


def _shards(chunks: list[list[ShardRecord]]) -> list[list[m.Shard]]:
    """Return the wire form of as many leading *chunks* as one reply may list."""
    listed: list[list[m.Shard]] = []
    room = EXTENTS_PER_REPLY_MAX
    for chunk in chunks:
        room -= len(chunk)
        if room < 0:
            break
        listed.append([m.Shard(*s.heads, *s.extent, s.root) for s in chunk])
    return listed
