"""Hand-offs that are open at other daemons, brought here while they are still being published.

Each has a mirror here, a hand-off like any other, whose producer is the task that pulls it:
chunks are published as they are offered, and ready as soon as their bytes have come and been
compared. What is missing after a connection has broken is asked for again, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final

from kvstore.daemon.peer_link import PeerLink
from kvstore.daemon.peers import owner_of
from kvstore.daemon.spans import Fields, Parent, Step, parent_in
from kvstore.errors import (
    KVStoreError,
    LimitError,
    NoSpaceError,
    ReservationError,
    TierError,
)
from kvstore.limits import (
    PEER_FOLLOW_SECONDS,
    PULL_BATCH_BYTES,
    PULL_BATCH_CHUNKS_MAX,
    PULL_BATCHES_AHEAD,
    PULL_PAUSE_MAX_SECONDS,
    PULL_PAUSE_MIN_SECONDS,
    PULL_TROUBLE_SECONDS,
    PULLS_MAX,
)
from kvstore.protocol import peering as p
from kvstore.store.handoffs import HandoffKey
from kvstore.types import Digest, HandoffState, HeadRange, ReserveOutcome, Root, SessionId

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping, Sequence

    from kvstore.daemon.server import Server
    from kvstore.hashing import Digests64
    from kvstore.store.namespace import Namespace
    from kvstore.store.store import Granted

log = logging.getLogger(__name__)

_MIRROR_TTL_SECONDS: Final = 60.0


class Pulls:
    """All hand-offs that this daemon takes from its peers. `run` must be running."""

    def __init__(self, server: Server, links: Mapping[str, PeerLink]) -> None:
        self.links = dict(links)
        self._server = server
        self._pulls: dict[HandoffKey, _Pull] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    @property
    def count(self) -> int:
        """How many hand-offs are being pulled."""
        return len(self._pulls)

    def follow(
        self, key: HandoffKey, space: Namespace, *, early: bool, traceparent: str = ""
    ) -> None:
        """Pull the hand-off *key* of the peer that it names, unless that is done already.

        It is recorded as a part of *traceparent*, if that is recorded. Raises `LimitError`.
        """
        pull = self._pulls.get(key)
        if pull is not None:
            pull.early |= early
            return
        if self._server.handoffs.is_known(key) or self._is_closing:
            return
        if len(self._pulls) >= PULLS_MAX:
            raise LimitError(f"{len(self._pulls)} hand-offs are being pulled, at most {PULLS_MAX}")
        tenant = self._server.tenants.names[key.tenant]
        pull = _Pull(self._server, self.links[key.peer], key, space, tenant, early=early)
        self._pulls[key] = pull
        parent = parent_in(traceparent) if self._server.recorder is not None else None
        self._start(self._run(pull, parent), f"pull {key.name[:32]}")

    def leave(self, key: HandoffKey, space: Namespace) -> None:
        """Tell the peer that a consumer here needs no more."""
        tenant = self._server.tenants.names[key.tenant]
        request = p.PeerLeave(space.id, tenant, key.name)
        self._start(self._tell(self.links[key.peer], request), "leave")

    async def close(self) -> None:
        """Stop pulling, and close all connections."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self.links.values():
            link.close()

    def _start(self, work: Coroutine[object, object, None], name: str) -> None:
        task = self._server.loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, pull: _Pull, parent: Parent | None) -> None:
        began_at = perf_counter()
        try:
            await pull.run()
        except Exception:
            log.exception("pull failed", extra={"peer": pull.key.peer})
        finally:
            del self._pulls[pull.key]
            pull.end()
            if parent is not None and self._server.recorder is not None:
                step = Step("kvstore pull", began_at, perf_counter(), pull.fields)
                self._server.recorder.record(parent, step)

    async def _tell(self, link: PeerLink, request: p.PeerLeave) -> None:
        trouble = _Trouble(self._server.loop)
        while True:
            try:
                await link.leave(request)
            except KVStoreError as error:
                if not isinstance(error, TierError) or not await trouble.wait():
                    # What it holds for us expires there.
                    log.info("peer not told", extra={"peer": link.name, "reason": str(error)})
                    return
            else:
                return


class _Trouble:
    """How long nothing has come any more, and how long to wait before the next try."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.progressed()

    def progressed(self) -> None:
        self._since = self._loop.time()
        self._pause = PULL_PAUSE_MIN_SECONDS

    async def wait(self) -> bool:
        """Pause; return whether another try is worth it."""
        if self._loop.time() - self._since >= PULL_TROUBLE_SECONDS:
            return False
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, PULL_PAUSE_MAX_SECONDS)
        return True


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One shard that is to come, and the room for it."""

    want: p.Want
    place: Granted
    target: memoryview


class _Pull:
    """One hand-off on its way here. It owns its mirror through a session of its own."""

    def __init__(
        self,
        server: Server,
        link: PeerLink,
        key: HandoffKey,
        space: Namespace,
        tenant: str,
        *,
        early: bool,
    ) -> None:
        self.key = key
        self.early = early
        self._server = server
        self._store = server.store
        self._handoffs = server.handoffs
        self._link = link
        self._space = space
        self._tenant = tenant
        self._session: SessionId = server.new_session_id()
        self._trouble = _Trouble(server.loop)
        self._ahead = asyncio.Semaphore(PULL_BATCHES_AHEAD)
        self._first = 0
        self._parent: Digest | None = None
        self._has_failed = False
        self._came = 0
        if self._store.host.records is not None:
            self._store.open_session(self._session, owner_of(os.getpid()))
        now = server.loop.time()
        self._handoffs.open(
            self._session, key, space, now, consumers=1, ttl_seconds=_MIRROR_TTL_SECONDS
        )

    @property
    def fields(self) -> Fields:
        """What is recorded of it."""
        return {
            "kvstore.handoff": self.key.name,
            "kvstore.peer": self.key.peer,
            "kvstore.chunks": self._came,
        }

    @property
    def _is_wanted(self) -> bool:
        return self._handoffs.is_wanted(self.key) and not self._has_failed

    def end(self) -> None:
        """Leave nothing behind: what was reserved has been given back before."""
        self._store.end_session(self._session)
        self._store.bury(self._session)
        self._handoffs.end_session(self._session, self._server.loop.time())

    async def run(self) -> None:
        """Follow the hand-off to its end, and fetch what is offered meanwhile."""
        async with asyncio.TaskGroup() as group:
            last = await self._follow_all(group)
        now = self._server.loop.time()
        if last is None or not self._is_wanted:
            return
        if last.state is HandoffState.ABSENT and not self._first:
            self._handoffs.forget(self._session, self.key)
        elif last.state is HandoffState.CLOSED:
            self._handoffs.close(self._session, self.key, last.payload, now)
        # Otherwise it breaks with the session of this pull.

    async def _follow_all(self, group: asyncio.TaskGroup) -> p.Following | None:
        """Return how the hand-off has ended there; None when that could not be learned."""
        while self._is_wanted:
            request = p.Follow(
                self._space.id,
                self._tenant,
                self.key.name,
                self._first,
                round(PEER_FOLLOW_SECONDS * 1000),
                self.early,
            )
            try:
                following = await self._link.follow(request)
                self._check(following)
            except KVStoreError as error:
                self._note(error)
                if not isinstance(error, TierError) or not await self._trouble.wait():
                    return None
                continue
            self._trouble.progressed()
            if following.state is HandoffState.OPEN:
                # Its producer is alive, however long the next chunk takes.
                self._handoffs.publish(
                    self._session, self.key, self._first, [], self._server.loop.time()
                )
            # All of them may be here: the first that leaves does not end it for the others.
            self._handoffs.expect(self.key, following.consumers)
            for offers in _batches(following.offers):
                if not await self._take(offers, group):
                    return None
            if not all(offer.shards for offer in following.offers):
                return None
            if following.is_last:
                return following
        return None

    def _check(self, following: p.Following) -> None:
        """Raise `RequestError` when what is offered cannot be of this namespace."""
        for offer in following.offers:
            p.check_shards(offer.shards, self._space.manifest)

    async def _take(self, offers: Sequence[p.Offer], group: asyncio.TaskGroup) -> bool:
        """Publish chunks here, and begin to fetch what of them is not here yet.

        Returns whether to go on.
        """
        await self._ahead.acquire()
        jobs: list[_Job] = []
        try:
            for offer in offers:
                digest = Digest(offer.digest)
                if not self._is_wanted:
                    break
                now = self._server.loop.time()
                self._handoffs.publish(self._session, self.key, self._first, [digest], now)
                jobs += self._reserve(digest, offer.shards)
                self._first += 1
                self._parent = digest
        except KVStoreError as error:
            self._note(error)
            self._has_failed = True
        group.create_task(self._fetch(jobs), name="fetch")
        return self._is_wanted

    def _reserve(self, digest: Digest, shards: Sequence[p.OfferedShard]) -> Iterator[_Job]:
        """Take room for *shards*, but for those that are here or on their way."""
        for shard in shards:
            (place,) = self._store.reserve(
                self._session,
                self._space,
                [digest],
                parent=self._parent,
                heads=HeadRange(shard.head_start, shard.head_stop),
                sizes=[shard.size_bytes],
                tenant=self.key.tenant,
            )
            if place.outcome is ReserveOutcome.NO_SPACE:
                raise NoSpaceError("no room for a chunk that is handed over")
            if place.outcome is ReserveOutcome.RESERVED:
                target = self._store.host.view(place.extent)
                yield _Job(p.Want(self._space.id, digest, shard), place, target)

    async def _fetch(self, jobs: Sequence[_Job]) -> None:
        """Bring shards to their places and publish each as it comes; what does not is given up."""
        missing = dict.fromkeys(jobs)
        try:
            while missing and self._is_wanted:
                try:
                    await self._fetch_once(list(missing), missing)
                except KVStoreError as error:
                    self._note(error)
                    if not isinstance(error, TierError) or not await self._trouble.wait():
                        break
        finally:
            self._ahead.release()
            self._has_failed |= bool(missing)
            for job in missing:
                # A commit that was refused has given it back already.
                with contextlib.suppress(ReservationError):
                    self._store.abort(self._session, [job.place.reservation])
        lost = {job.want.digest for job in missing}
        came = {job.want.digest for job in jobs} - lost
        self._store.counters.handoff_chunks_pulled += len(came)
        self._came += len(came)

    async def _fetch_once(self, asked: Sequence[_Job], missing: dict[_Job, None]) -> None:
        def arrived(number: int, blocks: Digests64 | None) -> None:
            job = asked[number]
            if blocks is None:
                self._has_failed = True
                return
            self._trouble.progressed()
            self._store.host.seal(job.place.extent, blocks)
            try:
                root = Root(job.want.shard.root)
                self._store.commit(self._session, job.place.reservation, root)
            except KVStoreError as error:
                self._note(error)
                self._has_failed = True
            else:
                del missing[job]

        await self._link.fetch([(job.want, job.target) for job in asked], arrived)

    def _note(self, error: KVStoreError) -> None:
        self._store.counters.pull_failures += 1
        log.info("pull in trouble", extra={"peer": self.key.peer, "reason": str(error)})


def _batches(offers: Sequence[p.Offer]) -> Iterator[list[p.Offer]]:
    """Yield the leading *offers* that have shards, as many at a time as are asked for at once."""
    batch: list[p.Offer] = []
    size_bytes = 0
    for offer in itertools.takewhile(lambda offer: offer.shards, offers):
        length = sum(shard.size_bytes for shard in offer.shards)
        is_full = len(batch) == PULL_BATCH_CHUNKS_MAX or size_bytes + length > PULL_BATCH_BYTES
        if batch and is_full:
            yield batch
            batch, size_bytes = [], 0
        batch.append(offer)
        size_bytes += length
    if batch:
        yield batch
