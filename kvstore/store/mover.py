"""Moves bytes between the host tier and the slower ones. All that waits is here.

Nothing that a slower tier does or fails to do holds up the host tier: every queue has a bound,
every call an end, and what a failing tier holds counts as missing until it answers again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, assert_never

from kvstore.errors import TierError
from kvstore.limits import (
    DEMOTIONS_AHEAD_MAX,
    FIND_DIGESTS_MAX,
    FREE_WATERMARK_SHARE,
    PREFETCH_QUEUE_CHUNKS_MAX,
    TIER_FINDS_MAX,
    WRITE_QUEUE_SHARE,
)
from kvstore.store.admission import Admission
from kvstore.store.lane import Fetch, FetchKey, Job, Lane, Removal, Write
from kvstore.store.promotion import PendingLoad
from kvstore.store.quota import DEFAULT_TENANT
from kvstore.store.route import Route, Threads, WritePolicy
from kvstore.store.shards import is_below, tiers_with
from kvstore.tiers.guard import GuardedTier
from kvstore.types import NO_SLOT, Digest, HeadRange, TierKind

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.store.shards import ShardRecord
    from kvstore.store.store import Loading, Store
    from kvstore.store.transcode import Transcoder

log = logging.getLogger(__name__)

_HOST: Final = TierKind.HOST
_ALL_TIERS: Final = 0xFF


class Mover:
    """Carries out what the store and its sessions ask of slower tiers.

    Calls return at once; the work is done by tasks of `run`, which must be running.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float], in_thread: Threads) -> None:
        self.routes: dict[TierKind, Route] = {}
        self._store = store
        self._clock = clock
        self._in_thread = in_thread
        self._fetches: dict[FetchKey, Fetch] = {}
        self._demoting: set[int] = set()
        self._finding = 0
        self._group: asyncio.TaskGroup | None = None
        self._settled = asyncio.Event()
        self._is_draining = False
        store.attach_movement(self)

    def add(
        self,
        tier: GuardedTier,
        policy: WritePolicy,
        admission: Admission | None = None,
        transcoder: Transcoder | None = None,
    ) -> Route:
        """Move to and from *tier*, too, which the store knows; *transcoder* makes its forms."""
        assert tier.kind in self._store.slower.residents, "the store knows its tiers"
        lane = Lane(self._store.host.usage().capacity_bytes // WRITE_QUEUE_SHARE, tier.reads_max)
        route = Route(self._store, tier, lane, policy, admission, self._in_thread, transcoder)
        self._store.slower.forming |= tier.kind if transcoder else 0
        self.routes[tier.kind] = route
        tier.on_change = partial(self._changed, route)
        return route

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for route in self.routes.values():
                group.create_task(
                    route.tier.keep_probing(), name=f"probe-{route.kind.name.lower()}"
                )
                self._kick(route)

    @property
    def writes_through(self) -> bool:
        """Whether some tier must have a copy before a store is called durable."""
        return any(route.policy == "through" for route in self.routes.values())

    @property
    def can_find(self) -> bool:
        """Whether some tier that other hosts write to can be asked now."""
        return any(r.tier.is_shared and r.tier.is_usable for r in self.routes.values())

    @property
    def is_busy(self) -> bool:
        """Whether something is being moved, or waits to be and could."""
        return bool(self._fetches) or self._finding > 0 or not self._is_settled()

    async def drain(self, timeout_seconds: float) -> int:
        """Write what waits to be written, for a while; return how many chunks were left."""
        self._is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while not self._is_settled():
                    self._settled.clear()
                    await self._settled.wait()
        return sum(route.lane.write_chunks for route in self.routes.values())

    # --- what the store tells -----------------------------------------------------------

    def published(self, slot: int, heads: HeadRange) -> None:
        """Note new bytes in the host tier: they are written down where that is the policy.

        However many shards a chunk is written in, that is one use of it.
        """
        here = [shard for shard in self._store.index.shards(slot) if shard.is_in_host]
        for route in self.routes.values():
            if len(here) == 1:
                route.note_use(slot)
            if route.is_offered:
                self._offer(route, slot, next(shard for shard in here if shard.heads == heads))
        # Only now: what makes room may be this very chunk.
        self.pressed()

    def used(self, slots: Sequence[int]) -> None:
        """Note a use of chunks in the host tier, some of which a tier may want by now."""
        index = self._store.index
        for route in self.routes.values():
            if route.is_selective:
                for slot in slots:
                    route.note_use(slot)
            # A tier that fails is offered what is used once it answers again.
            if route.is_offered and route.tier.is_usable:
                for slot in [slot for slot in slots if not index.tiers_of(slot) & route.kind]:
                    for shard in index.shards(slot):
                        self._offer(route, slot, shard)

    def pressed(self) -> None:
        """Demote ahead of need while there is little room."""
        routes = [r for r in self.routes.values() if r.policy == "on_evict" and r.tier.is_usable]
        if not routes or self._group is None:
            return
        usage = self._store.host.usage()
        free_bytes = usage.capacity_bytes - usage.used_bytes
        short = usage.capacity_bytes // FREE_WATERMARK_SHARE - free_bytes
        while short > 0 and len(self._demoting) < DEMOTIONS_AHEAD_MAX:
            victim = self._store.room.next_victim(DEFAULT_TENANT, short)
            if victim == NO_SLOT:
                return
            short -= self._store.room.footprint_of(victim)
            if self.is_wanted(victim):
                self._demote(victim)
            else:
                self._store.room.evict(victim)

    def removed(self, slot: int, shards: Sequence[ShardRecord]) -> None:
        """Let slower tiers forget *shards* of *slot*, which is about to be forgotten here."""
        for route in self.routes.values():
            route.remove(slot, shards)
            self._kick(route)

    def is_wanted(self, slot: int) -> bool:
        """Return whether a tier that takes what is evicted would take *slot*."""
        tiers = self._store.index.tiers_of(slot)
        return any(
            route.policy == "on_evict"
            and not tiers & route.kind
            and route.tier.is_usable
            and route.admits(slot)
            for route in self.routes.values()
        )

    def expected_seconds(self, tiers: int, chunks: int, chunk_bytes: int) -> float:
        """Return what it takes to bring chunks into the host tier; 0 when nothing is known."""
        route = self._fastest(tiers & self._store.index.usable)
        if route is None:
            return 0.0
        waiting = route.lane.fetch_chunks + chunks
        return route.tier.reads.expected_seconds(waiting * chunk_bytes, waiting)

    # --- what sessions ask --------------------------------------------------------------

    def load(
        self,
        loading: Loading,
        digests: Sequence[Digest],
        deadline: float,
        done: Callable[[int], None],
    ) -> PendingLoad:
        """Bring all of *loading* into the host tier and call *done* with how many chunks came.

        *deadline* orders loads; who waits gives up by itself. *done* may be called at once.
        """
        pending = PendingLoad(loading, done, self._withdrawn)
        for position, (slot, shards) in enumerate(zip(loading.slots, loading.chunks, strict=True)):
            parent = digests[position - 1] if position else None
            for shard in shards:
                if not loading.has_at_hand(shard) and position < pending.limit:
                    fetch = self._fetch(slot, shard.heads, parent)
                    pending.wait_for(fetch, position)
                    if deadline < fetch.deadline and not fetch.is_running:
                        fetch.deadline = deadline
                        self._route(fetch)
        pending.start()
        return pending

    def prefetch(self, space: Namespace, digests: Sequence[Digest]) -> int:
        """Bring chunks into the host tier when nothing else is to do; return how many will come."""
        _, slots = self._store.index.prefix(space, digests)
        coming = 0
        for parent, slot in zip((None, *digests), slots, strict=False):
            forms = self._store.index.shards(slot)
            for heads in {f.heads for f in forms if not tiers_with(forms, f.heads) & _HOST}:
                coming += self.bring(slot, heads, parent)
        self._store.counters.prefetch_chunks += coming
        return coming

    def bring(self, slot: int, heads: HeadRange, parent: Digest | None = None) -> bool:
        """Bring a shard into the host tier when nothing else is to do; return whether it comes."""
        if (slot, heads) not in self._fetches:
            if len(self._fetches) >= PREFETCH_QUEUE_CHUNKS_MAX:
                return False
            fetch = self._fetch(slot, heads, parent)
            fetch.is_prefetch = True
            self._route(fetch)
        return True

    def when_written(
        self, space: Namespace, digest: Digest, heads: HeadRange, done: Callable[[bool], None]
    ) -> int:
        """Call *done* for every tier that must have a copy before a store is called durable.

        Returns how many tiers these are. *done* may be called at once.
        """
        slot = space.find(digest)
        waits = 0
        for route in self.routes.values():
            if route.policy != "through" or slot == NO_SLOT:
                continue
            record = self._store.index.shard(slot, heads)
            if record is None or self._store.index.shard(slot, heads, route.kind) is not None:
                continue
            waits += 1
            if route.admits(slot):
                self._put_write(route, slot, record, done)
            else:
                done(False)
        return waits

    def spread(self, space: Namespace, digests: Sequence[Digest]) -> None:
        """Write chunks to all tiers that other hosts share, whatever the policy says."""
        for slot in self._store.index.leading(space, digests):
            for route in self.routes.values():
                for record in self._store.index.shards(slot) if route.tier.is_shared else ():
                    if route.lacks(slot, record):
                        self._put_write(route, slot, record, None)

    def find(self, space: Namespace, digests: Sequence[Digest], done: Callable[[], None]) -> bool:
        """Ask shared tiers for chunks that are not known here; then call *done*.

        Returns False, and calls nothing, when nobody can be asked now.
        """
        asked = [
            route
            for route in self.routes.values()
            if route.tier.is_shared and route.tier.is_usable and route.finding < TIER_FINDS_MAX
        ]
        if not asked or self._group is None:
            return False
        self._group.create_task(self._find(asked, space, digests, done), name="find")
        return True

    # --- reads --------------------------------------------------------------------------

    def _fetch(self, slot: int, heads: HeadRange, parent: Digest | None) -> Fetch:
        known = self._fetches.get((slot, heads))
        if known is not None:
            self._store.counters.promote_chunks_joined += 1
            return known
        fetch = self._fetches[slot, heads] = Fetch(slot, heads, parent)
        self._store.hold(slot)
        return fetch

    def _withdrawn(self, fetch: Fetch) -> None:
        """Forget *fetch* when nobody needs it any more; one under way ends by itself."""
        if not fetch.is_needed and not fetch.is_running:
            del self._fetches[fetch.key]
            self._store.counters.promote_chunks_cancelled += 1
            self._store.let_go(fetch.slot)

    def _route(self, fetch: Fetch) -> None:
        """Queue *fetch* where it is had fastest, or end it."""
        here = tiers_with(self._store.index.shards(fetch.slot), fetch.heads)
        if here & _HOST:
            self._finish(fetch, is_here=True)
            return
        tiers = here & self._store.index.usable & ~fetch.tried
        route = self._fastest(tiers)
        if route is None or not fetch.is_needed:
            self._finish(fetch, is_here=False)
            return
        route.put_fetch(fetch)
        self._kick(route)

    async def _run_fetch(self, route: Route, fetch: Fetch) -> None:
        is_here = False
        try:
            is_here = await route.fetch(fetch)
        except TierError as error:
            log.info("chunk not read", extra=route.fields(error))
        except Exception:
            log.exception("chunk not read", extra={"tier": route.kind.name.lower()})
        finally:
            route.lane.ended(fetch)
        if not is_here:
            fetch.tried |= route.kind
        self._route(fetch)

    def _finish(self, fetch: Fetch, *, is_here: bool) -> None:
        del self._fetches[fetch.key]
        self._store.counters.promote_chunks_failed += not is_here
        for arrived in list(fetch.waiters):
            arrived(fetch, is_here)
        self._store.let_go(fetch.slot)

    def _fastest(self, tiers: int) -> Route | None:
        return next((r for kind, r in sorted(self.routes.items()) if tiers & kind), None)

    # --- writes -------------------------------------------------------------------------

    def _offer(self, route: Route, slot: int, record: ShardRecord) -> None:
        """Queue a shard for a tier that has no copy and wants one."""
        if route.lacks(slot, record) and route.admits(slot):
            self._put_write(route, slot, record, None)

    def _put_write(
        self, route: Route, slot: int, record: ShardRecord, done: Callable[[bool], None] | None
    ) -> None:
        """Queue a write; what must be kept before a store is durable stays here until it is."""
        store = self._store
        write = Write(
            store.index.space_of(slot),
            store.index.digest(slot),
            record.heads,
            record.size_bytes,
            is_urgent=done is not None or route.policy == "through",
            queued_at=self._clock(),
            above=route.lacks_above(slot),
        )
        if write.is_urgent and not route.lane.has_write(write.key):
            store.hold(slot)
            write.done.append(lambda _: store.let_go(slot))
        if done is not None:
            write.done.append(done)
        if (write.is_urgent and not route.tier.is_usable) or not route.lane.put_write(write):
            write.finish(kept=False)
            return
        self._kick(route)

    async def _run_write(self, route: Route, write: Write) -> None:
        kept = False
        try:
            kept = await route.write(write)
        except TierError as error:
            log.info("chunk not written", extra=route.fields(error))
        finally:
            route.lane.ended(write)
            write.finish(kept=kept)

    def _demote(self, slot: int) -> None:
        """Write *slot* to the tiers that take what is evicted, then let it leave."""
        store = self._store
        left: list[int] = []
        self._demoting.add(slot)
        store.hold(slot)

        def written(_: bool) -> None:
            left.pop()
            if left:
                return
            self._demoting.discard(slot)
            is_done = store.index.tiers_of(slot) & _HOST and is_below(store.index.shards(slot))
            store.let_go(slot)
            if is_done and not store.index.is_held(slot):
                store.counters.demote_chunks += 1
                store.room.evict(slot)

        wanting = [
            (route, record)
            for route in self.routes.values()
            if route.policy == "on_evict" and route.tier.is_usable
            for record in store.index.shards(slot)
            if route.lacks(slot, record)
        ]
        assert wanting, "what is wanted is in the host tier and not yet there"
        left += [0] * len(wanting)
        for route, record in wanting:
            self._put_write(route, slot, record, written)

    async def _run_removal(self, route: Route, removal: Removal) -> None:
        try:
            await route.tier.remove(removal.shard, removal.place)
        except TierError as error:
            log.info("chunk not removed", extra=route.fields(error))
        finally:
            route.lane.ended(removal)

    # --- finding ------------------------------------------------------------------------

    async def _find(
        self,
        asked: Iterable[Route],
        space: Namespace,
        digests: Sequence[Digest],
        done: Callable[[], None],
    ) -> None:
        space.entered += 1
        self._finding += 1
        try:
            for route in asked:
                known, _ = self._store.index.prefix(space, digests)
                await self._find_in(route, space, digests[known:])
        finally:
            space.entered -= 1
            self._finding -= 1
            done()

    async def _find_in(self, route: Route, space: Namespace, digests: Sequence[Digest]) -> None:
        """Learn what *route* has of *digests*, batch by batch, until one is not whole there."""
        tenant = self._store.tenant_number(space.tenant)
        route.finding += 1
        try:
            for start in range(0, len(digests), FIND_DIGESTS_MAX):
                batch = digests[start : start + FIND_DIGESTS_MAX]
                for found in await route.tier.find(space.id, batch):
                    for one in found:
                        self._store.slower.learn(space, route.kind, one, tenant=tenant)
                if len(self._store.index.leading(space, batch)) < len(batch):
                    break
        except TierError as error:
            log.info("tier not asked", extra=route.fields(error))
        finally:
            route.finding -= 1

    # --- running ------------------------------------------------------------------------

    def _kick(self, route: Route) -> None:
        """Start whatever may start now."""
        if self._group is None:
            return
        while True:
            job = route.lane.next(self._clock(), writes=route.tier.is_usable)
            if job is None:
                break
            self._group.create_task(self._run_job(route, job), name=type(job).__name__.lower())
        if self._is_draining and self._is_settled():
            self._settled.set()

    async def _run_job(self, route: Route, job: Job) -> None:
        try:
            match job:
                case Fetch():
                    await self._run_fetch(route, job)
                case Write():
                    await self._run_write(route, job)
                case Removal():
                    await self._run_removal(route, job)
                case _:
                    assert_never(job)
        except Exception:
            # Whoever waits is answered all the same; see the `finally` clauses.
            log.exception("move failed", extra={"tier": route.kind.name.lower()})
        self._kick(route)
        self.pressed()

    def _is_settled(self) -> bool:
        """Whether all is written that can be: a tier that fails is not waited for."""
        return all(r.is_settled or not r.tier.is_usable for r in self.routes.values())

    def _changed(self, route: Route) -> None:
        """Act on a breaker that has opened or closed."""
        index = self._store.index
        if route.tier.is_usable:
            index.usable |= route.kind
        else:
            index.usable &= _ALL_TIERS ^ route.kind
            for write in route.lane.take_urgent_writes():
                write.finish(kept=False)
            for fetch in route.lane.take_fetches():
                # The end of one may be that of others, which the same load waited for.
                if self._fetches.get(fetch.key) is fetch:
                    self._route(fetch)
        self._kick(route)
