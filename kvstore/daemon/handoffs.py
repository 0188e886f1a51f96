"""The answers to requests about hand-offs, and the time that hand-offs have."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Final, assert_never, cast

from kvstore.daemon.waits import Wait
from kvstore.errors import RequestError
from kvstore.protocol import messages as m
from kvstore.store.handoffs import HandoffKey, Handoffs, Standing
from kvstore.types import Digest, SessionId

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.daemon.server import Server
    from kvstore.store.namespace import Namespace

log = logging.getLogger(__name__)

_HOUSEKEEPING_SECONDS: Final = 0.25


class HandoffAnswers:
    """What one session asks about hand-offs. *later* sends what was not answered at once."""

    def __init__(
        self,
        server: Server,
        session: SessionId,
        waits: dict[int, Wait],
        later: Callable[[m.Request, Callable[[], m.AnyReply]], None],
    ) -> None:
        self._server = server
        self._session = session
        self._waits = waits
        self._later = later

    def answer(
        self, request: m.AnyHandoff, space: Namespace, tenant: int, seconds: float
    ) -> m.AnyReply | None:
        """Return the reply to *request*, or None when it will be sent within *seconds*."""
        if isinstance(request, m.HandoffAwait):
            return self._await(request, space, tenant, seconds)
        handoffs, now = self._server.handoffs, self._server.loop.time()
        key = HandoffKey(tenant, space.id, request.name)
        match request:
            case m.HandoffOpen():
                handoffs.open(
                    self._session,
                    key,
                    space,
                    now,
                    consumers=request.consumers,
                    ttl_seconds=request.ttl_ms / 1000,
                )
                return m.HandoffOpened(request.request_id, self._server.host_name)
            case m.HandoffPublish():
                digests = cast("list[Digest]", request.digests)
                count = handoffs.publish(self._session, key, request.first, digests, now)
            case m.HandoffClose():
                count = handoffs.close(self._session, key, request.payload, now)
            case m.HandoffAbort():
                count = handoffs.abort(self._session, key, now)
            case m.HandoffLeave():
                count = self._leave(self._there(key, request.peer), space, now)
            case _:
                assert_never(request)
        return m.Done(request.request_id, count)

    def _there(self, key: HandoffKey, peer: str) -> HandoffKey:
        """Return the key of a hand-off at *peer*; raises `RequestError` for one not configured."""
        if peer in {"", self._server.host_name}:
            return key
        if peer in self._server.pulls.links:
            return key._replace(peer=peer)
        raise RequestError(f"peer {peer!r} is not configured (peers.*)")

    def _leave(self, key: HandoffKey, space: Namespace, now: float) -> int:
        handoffs = self._server.handoffs
        if key.peer and not handoffs.has_left(self._session, key):
            self._server.pulls.leave(key, space)
        return int(handoffs.leave(self._session, key, now))

    def _await(
        self, request: m.HandoffAwait, space: Namespace, tenant: int, seconds: float
    ) -> m.HandoffReady | None:
        key = self._there(HandoffKey(tenant, space.id, request.name), request.peer)
        if key.peer:
            self._server.pulls.follow(
                key, space, early=request.early, traceparent=request.traceparent
            )
        wait = HandoffWait(self._server.handoffs, key, partial(self._ready_later, request, key))
        wait.watch(request.first, self._server.loop, seconds, early=request.early)
        if wait.is_over:
            return self._ready(request, key)
        self._waits[request.request_id] = wait
        return None

    def _ready_later(self, request: m.HandoffAwait, key: HandoffKey) -> None:
        if self._waits.pop(request.request_id, None) is not None:
            self._later(request, lambda: self._ready(request, key))

    def _ready(self, request: m.HandoffAwait, key: HandoffKey) -> m.HandoffReady:
        now = self._server.loop.time()
        return _reply(request.request_id, self._server.handoffs.standing(key, request.first, now))


class HandoffWait(Wait):
    """A request that waits for news of a hand-off."""

    def __init__(self, handoffs: Handoffs, key: HandoffKey, answer: Callable[[], None]) -> None:
        super().__init__()
        self._handoffs = handoffs
        self._key = key
        self._answer = answer
        self._is_early = False
        self._first = 0

    def watch(
        self, first: int, loop: asyncio.AbstractEventLoop, seconds: float, *, early: bool
    ) -> None:
        """Wait until chunk *first* is ready, or nothing more comes; with *early* also for a start.

        What is so already ends the wait at once.
        """
        self._first, self._is_early, self._loop = first, early, loop
        self._handoffs.wait(self._key, self._changed)
        self._limit(loop, seconds, self._finish)
        self._changed()

    def cancel(self) -> None:
        """End the watch, too."""
        super().cancel()
        self._handoffs.unwait(self._key, self._changed)

    def _changed(self) -> None:
        is_known = self._handoffs.is_known(self._key)
        if not is_known and self._is_early:
            return
        standing = self._handoffs.standing(self._key, self._first, self._loop.time())
        if standing.digests or standing.is_last:
            self._finish()

    def _finish(self) -> None:
        if not self.is_over:
            self.cancel()
            self._answer()


async def keep_handoffs(handoffs: Handoffs) -> None:
    """End hand-offs whose time is over, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        expired = handoffs.expire(loop.time())
        if expired:
            log.warning("hand-offs expired", extra={"count": expired})
        await asyncio.sleep(_HOUSEKEEPING_SECONDS)


def _reply(request_id: int, standing: Standing) -> m.HandoffReady:
    digests = cast("list[bytes]", list(standing.digests))
    return m.HandoffReady(
        request_id,
        standing.state,
        digests,
        standing.is_last,
        standing.published,
        standing.payload,
    )
