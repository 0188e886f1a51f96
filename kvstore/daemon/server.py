"""The data socket: accepts sessions, knows all of them, ends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from kvstore import __version__
from kvstore.daemon.address import SocketAddress
from kvstore.daemon.peers import Admission, Credentials, owner_of
from kvstore.daemon.session import Session
from kvstore.errors import DrainingError, LimitError, RefusedError
from kvstore.limits import STATS_NAME_MAX_CHARS, STATS_NAMESPACES_MAX
from kvstore.protocol import messages as m
from kvstore.types import SessionId

if TYPE_CHECKING:
    from kvstore.store.store import Store

log = logging.getLogger(__name__)

_ACCEPT_BACKLOG = 128


class Server:
    """All sessions of one daemon over one store."""

    def __init__(
        self,
        store: Store,
        address: SocketAddress,
        admission: Admission,
        *,
        sessions_max: int,
        orphan_grace_seconds: float,
        verify_loads: bool,
        prefaults: bool,
    ) -> None:
        self.store = store
        self.address = address
        self.verify_loads = verify_loads
        self.prefaults = prefaults
        self.draining = False
        self.name = f"kvstore {__version__}"
        self.loop: asyncio.AbstractEventLoop
        self._admission = admission
        self._sessions: dict[SessionId, Session] = {}
        self._sessions_max = sessions_max
        self._orphan_grace_seconds = orphan_grace_seconds
        self._refused_uids: set[int] = set()
        self._last_session = 0
        self._started_at = time.monotonic()
        self._listener: asyncio.Server | None = None
        self._settled = asyncio.Event()

    async def start(self, listening: socket.socket) -> None:
        """Accept sessions on *listening*, a bound Unix socket."""
        self.loop = asyncio.get_running_loop()
        self._listener = await self.loop.create_unix_server(
            self._new_session, sock=listening, backlog=_ACCEPT_BACKLOG
        )

    async def drain(self, timeout_seconds: float) -> None:
        """Take nothing new, let what is under way finish for a while, then end all sessions."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        self.settle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._settled.wait()
        for session in list(self._sessions.values()):
            session.close(DrainingError("the daemon is shutting down"))

    def admit(self, session: Session, peer: Credentials) -> None:
        """Take *session* in, or raise `RefusedError` or `LimitError`."""
        if not self._admission.admits(peer):
            self.store.counters.sessions_refused += 1
            if peer.uid not in self._refused_uids:
                self._refused_uids.add(peer.uid)
                log.warning(
                    "user refused", extra={"uid": peer.uid, "gid": peer.gid, "pid": peer.pid}
                )
            raise RefusedError(f"uid {peer.uid} may not use this daemon (server.allowed_uids)")
        if len(self._sessions) >= self._sessions_max:
            self.store.counters.sessions_refused += 1
            raise LimitError(f"{len(self._sessions)} sessions are open (server.sessions_max)")
        if self.store.host.records is not None:
            self.store.open_session(session.id, owner_of(peer.pid))
        self.store.counters.sessions_opened += 1
        self._sessions[session.id] = session

    def ended(self, session: Session) -> None:
        """Free all that *session* held.

        What it had reserved stays set aside for as long as its process might still write there.
        """
        if self._sessions.pop(session.id, None) is None:
            return
        orphaned = self.store.end_session(session.id)
        assert session.peer is not None, "an admitted session has a peer"
        if orphaned:
            session.peer.when_gone(
                self.loop, self._orphan_grace_seconds, lambda: self.store.bury(session.id)
            )
        else:
            session.peer.close()
        self.settle()

    def settle(self) -> None:
        """While draining, note when nothing is leased or being written any more."""
        if self.draining and not len(self.store.leases) and not len(self.store.reservations):
            self._settled.set()

    def stats(self) -> m.DaemonStats:
        """Return one look at everything."""
        store, arena = self.store, self.store.host.arena
        return m.DaemonStats(
            version=__version__,
            pid=os.getpid(),
            state="draining" if self.draining else "ready",
            socket=str(self.address.path),
            uptime_seconds=time.monotonic() - self._started_at,
            resident_bytes=_resident_bytes(),
            sessions=len(self._sessions),
            leases=len(store.leases),
            reservations=len(store.reservations),
            tiers=[self._host_stats()],
            namespaces=self._namespace_stats(),
            namespaces_count=len(store.index.namespaces),
            arena=m.ArenaStats(
                kind=arena.kind,
                size_bytes=arena.size_bytes,
                prefaulted_bytes=arena.prefaulted_bytes,
                huge_pages=arena.huge_pages,
            ),
            counters=store.counters.as_dict(),
        )

    def _namespace_stats(self) -> list[m.NamespaceStats]:
        largest = sorted(self.store.index.namespaces, key=lambda space: -len(space.ready))
        return [
            m.NamespaceStats(
                namespace=space.id.hex(),
                model=space.manifest.model[:STATS_NAME_MAX_CHARS],
                revision=space.manifest.revision[:STATS_NAME_MAX_CHARS],
                dtype=space.manifest.dtype,
                group=space.manifest.group[:STATS_NAME_MAX_CHARS],
                chunk_tokens=space.manifest.chunk_tokens,
                chunk_bytes=space.manifest.chunk_bytes,
                chunks=len(space.ready),
            )
            for space in largest[:STATS_NAMESPACES_MAX]
        ]

    def _host_stats(self) -> m.TierStats:
        usage = self.store.host.usage()
        return m.TierStats(
            tier="host",
            capacity_bytes=usage.capacity_bytes,
            used_bytes=usage.used_bytes,
            largest_free_bytes=usage.largest_free_bytes,
            chunks=len(self.store.index),
        )

    def _new_session(self) -> Session:
        self._last_session += 1
        return Session(self, SessionId(self._last_session))


def _resident_bytes() -> int:
    """Return the daemon's own memory: resident, but for the pages it shares (the arena)."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123  # read at every look, and hot
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
