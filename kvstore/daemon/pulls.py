"""Hand-offs that are open at other daemons, brought here while they are still being published.

Each has a mirror here, a hand-off like any other, whose producer is the task that pulls it:
chunks are published as they are offered, and ready as soon as their bytes have come and been
compared. What is missing after a connection has broken is asked for again, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Final

from kvstore.daemon.peer_link import PeerLink
from kvstore.daemon.peers import owner_of
from kvstore.errors import (
    KVStoreError,
    LimitError,
    RequestError,
    ReservationError,
    TierError,
)
from kvstore.limits import (
    PEER_FOLLOW_SECONDS,
    PULL_CHUNKS_AHEAD,
    PULL_PAUSE_MAX_SECONDS,
    PULL_PAUSE_MIN_SECONDS,
    PULL_TROUBLE_SECONDS,
    PULLS_MAX,
)
from kvstore.protocol import peering as p
from kvstore.store.handoffs import HandoffKey
from kvstore.store.shards import covers
from kvstore.types import Digest, HandoffState, HeadRange, ReserveOutcome, Root, SessionId

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from kvstore.daemon.server import Server
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

    def follow(self, key: HandoffKey, space: Namespace, *, early: bool) -> None:
        """Pull the hand-off *key* of the peer that it names, unless that is done already.

        Raises `LimitError`.
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
        self._start(self._run(pull), f"pull {key.name[:32]}")

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

    async def _run(self, pull: _Pull) -> None:
        try:
            await pull.run()
        except Exception:
            log.exception("pull failed", extra={"peer": pull.key.peer})
        finally:
            del self._pulls[pull.key]
            pull.end()

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
        self._ahead = asyncio.Semaphore(PULL_CHUNKS_AHEAD)
        self._first = 0
        self._parent: Digest | None = None
        self._has_failed = False
        if self._store.host.records is not None:
            self._store.open_session(self._session, owner_of(os.getpid()))
        now = server.loop.time()
        self._handoffs.open(
            self._session, key, space, now, consumers=1, ttl_seconds=_MIRROR_TTL_SECONDS
        )

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
            for offer in following.offers:
                if not offer.shards or not self._is_wanted:
                    return None
                await self._take(offer, group)
            if following.is_last:
                return following
        return None

    def _check(self, following: p.Following) -> None:
        """Raise `RequestError` when what is offered cannot be of this namespace."""
        manifest = self._space.manifest
        for offer in following.offers:
            reached = 0
            for shard in offer.shards:
                if shard.head_start > reached or shard.head_stop <= reached:
                    raise RequestError("the shards of an offered chunk do not follow one another")
                reached = shard.head_stop
                heads = HeadRange(shard.head_start, shard.head_stop)
                manifest.check_stored_bytes(heads, shard.size_bytes)
            if offer.shards and not covers([HeadRange(0, reached)], manifest.all_heads):
                raise RequestError("an offered chunk has not all heads of its manifest")
            if reached > manifest.kv_heads:
                raise RequestError("an offered chunk has more heads than its manifest")

    async def _take(self, offer: p.Offer, group: asyncio.TaskGroup) -> None:
        """Publish the chunk here, and begin to fetch what of it is not here yet."""
        digest = Digest(offer.digest)
        await self._ahead.acquire()
        now = self._server.loop.time()
        if not self._is_wanted:
            self._ahead.release()
            return
        try:
            self._handoffs.publish(self._session, self.key, self._first, [digest], now)
            granted = [(shard, self._reserve(digest, shard)) for shard in offer.shards]
        except KVStoreError as error:
            self._note(error)
            self._has_failed = True
            self._ahead.release()
            return
        self._first += 1
        self._parent = digest
        group.create_task(self._fetch_chunk(digest, granted), name="fetch")

    def _reserve(self, digest: Digest, shard: p.OfferedShard) -> Granted:
        (granted,) = self._store.reserve(
            self._session,
            self._space,
            [digest],
            parent=self._parent,
            heads=HeadRange(shard.head_start, shard.head_stop),
            sizes=[shard.size_bytes],
            tenant=self.key.tenant,
        )
        return granted

    async def _fetch_chunk(
        self, digest: Digest, granted: list[tuple[p.OfferedShard, Granted]]
    ) -> None:
        try:
            for shard, place in granted:
                if place.outcome is ReserveOutcome.NO_SPACE:
                    self._has_failed = True
                if place.outcome is ReserveOutcome.RESERVED:
                    self._has_failed |= not await self._fetch(digest, shard, place)
        finally:
            self._ahead.release()
        if not self._has_failed:
            self._server.store.counters.handoff_chunks_pulled += 1

    async def _fetch(self, digest: Digest, shard: p.OfferedShard, place: Granted) -> bool:
        """Bring one shard to its *place* and publish it; return whether that went well."""
        is_here = False
        try:
            is_here = await self._fill(digest, shard, place)
        except KVStoreError as error:
            self._note(error)
        finally:
            if not is_here:
                # A commit that was refused has given it back already.
                with contextlib.suppress(ReservationError):
                    self._store.abort(self._session, [place.reservation])
        return is_here

    async def _fill(self, digest: Digest, shard: p.OfferedShard, place: Granted) -> bool:
        target = self._store.host.view(place.extent)
        while self._is_wanted:
            try:
                blocks = await self._link.fetch(self._space.id, digest, shard, target)
            except TierError as error:
                self._note(error)
                if not await self._trouble.wait():
                    return False
                continue
            if blocks is None:
                return False
            self._trouble.progressed()
            self._store.host.seal(place.extent, blocks)
            self._store.commit(self._session, place.reservation, Root(shard.root))
            return True
        return False

    def _note(self, error: KVStoreError) -> None:
        self._store.counters.pull_failures += 1
        log.info("pull in trouble", extra={"peer": self.key.peer, "reason": str(error)})
