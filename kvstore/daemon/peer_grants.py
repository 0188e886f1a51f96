"""What is granted to other daemons: shards that they may read here by NIXL, and for how long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

from kvstore.errors import FrameError
from kvstore.limits import (
    NIXL_GRACE_SECONDS,
    NIXL_MEET_SECONDS,
    PEER_SPEED_MIN_BYTES_PER_SECOND,
    PEER_TIMEOUT_SECONDS,
)
from kvstore.protocol import peering as p
from kvstore.transfer.native import address_of
from kvstore.transfer.wire import Wire
from kvstore.types import SessionId

if TYPE_CHECKING:
    from kvstore.daemon.server import Server
    from kvstore.transfer.nixl import LocalAgent


log = logging.getLogger(__name__)


class Leased(Protocol):
    """A shard that stays where it is."""

    @property
    def view(self) -> memoryview:
        """Its bytes, in the arena."""


Ready = TypeVar("Ready", bound=Leased)
_NOWHERE: Final = p.GrantedRun(0, 0)


class _Held(NamedTuple, Generic[Ready]):
    """What is leased for one caller, and where all that it wanted lies."""

    agent: LocalAgent
    ready: Sequence[Ready]
    runs: list[p.GrantedRun]


class Grants(Generic[Ready]):
    """Serves `Grant`. *begin* leases one shard, or says that it cannot; *end* lets go of it."""

    def __init__(
        self,
        server: Server,
        begin: Callable[[p.Want, SessionId], Coroutine[object, object, Ready | p.Gone | p.Busy]],
        end: Callable[[SessionId, Ready, int], None],
    ) -> None:
        self._server = server
        self._begin = begin
        self._end = end

    def serve(self, wire: Wire, request: p.Grant, session: SessionId) -> None:
        """Hold what is wanted for as long as the caller reads it. In the thread of its connection.

        It ends when the caller says so, with the connection, or when its time is over.
        """
        loop = self._server.loop
        held = asyncio.run_coroutine_threadsafe(self._hold(request, session), loop).result()
        wire.begin(PEER_TIMEOUT_SECONDS)
        if isinstance(held, p.NotGranted):
            wire.send_frame(p.encode(held))
            return
        is_read = False
        try:
            agent = held.agent
            metadata = b"" if request.agent == agent.name else agent.metadata
            granted = p.Granted(agent.name, metadata, agent.address, held.runs)
            wire.send_frame(p.encode(granted))
            wire.begin(_hold_seconds(sum(run.size_bytes for run in held.runs)), patient=True)
            returned = p.decode(wire.receive_frame())
            if not isinstance(returned, p.Returned):
                raise FrameError(f"{type(returned).__name__} while chunks are granted")
            is_read = returned.is_read
        finally:
            letting_go = self._let_go(held, session, is_read=is_read)
            asyncio.run_coroutine_threadsafe(letting_go, loop).add_done_callback(_say_if_failed)

    # --- on the event loop --------------------------------------------------------------

    async def _hold(self, request: p.Grant, session: SessionId) -> _Held[Ready] | p.NotGranted:
        """Lease all that is wanted, and look closely at what is read from now on."""
        nixl = self._server.nixl
        if nixl is None:
            return p.NotGranted("peer.transport is tcp")
        if nixl.agent is None:
            return p.NotGranted(nixl.reason)
        agent = nixl.agent
        begun = await asyncio.gather(
            *(self._begin(want, session) for want in request.wants), return_exceptions=True
        )
        base = address_of(self._server.store.host.arena.view)
        ready: list[Ready] = []
        runs: list[p.GrantedRun] = []
        failures: list[BaseException] = []
        for one in begun:
            if isinstance(one, BaseException):
                failures.append(one)
            elif isinstance(one, p.Gone | p.Busy):
                runs.append(_NOWHERE)
            else:
                ready.append(one)
                runs.append(p.GrantedRun(address_of(one.view) - base, len(one.view)))
        if failures:
            for held in ready:
                self._end(session, held, 0)
            raise failures[0]
        await nixl.watch()
        return _Held(agent, ready, runs)

    async def _let_go(self, held: _Held[Ready], session: SessionId, *, is_read: bool) -> None:
        for one in held.ready:
            self._end(session, one, len(one.view) if is_read else 0)
        assert self._server.nixl is not None, "it has granted"
        await self._server.nixl.unwatch()


def _say_if_failed(letting_go: Future[None]) -> None:
    """Log what went wrong, for nobody waits for it."""
    error = None if letting_go.cancelled() else letting_go.exception()
    if error is not None:
        log.error("granted chunks not let go", exc_info=error)


def _hold_seconds(size_bytes: int) -> float:
    """Return for how long *size_bytes* are granted: longer than whoever keeps time takes."""
    meeting = NIXL_MEET_SECONDS + NIXL_GRACE_SECONDS
    reading = PEER_TIMEOUT_SECONDS + size_bytes / PEER_SPEED_MIN_BYTES_PER_SECOND
    return meeting + reading + NIXL_GRACE_SECONDS + PEER_TIMEOUT_SECONDS
