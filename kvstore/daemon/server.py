"""The data socket: accepts sessions, knows all of them, ends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from typing import TYPE_CHECKING

from kvstore import __version__
from kvstore.daemon.address import SocketAddress
from kvstore.daemon.engines import EngineCounters
from kvstore.daemon.hints import Hints
from kvstore.daemon.peer_endpoint import PeerEndpoint
from kvstore.daemon.peers import Admission, Credentials, owner_of
from kvstore.daemon.pulls import Pulls
from kvstore.daemon.session import Session
from kvstore.daemon.spans import Recorder
from kvstore.daemon.stats import daemon_stats
from kvstore.daemon.tenants import Tenants
from kvstore.errors import DrainingError, LimitError, RefusedError
from kvstore.metrics import Latencies
from kvstore.protocol import messages as m
from kvstore.store.handoffs import Handoffs
from kvstore.store.tracing import Tracing
from kvstore.types import SessionId

if TYPE_CHECKING:
    from kvstore.daemon.peer_sharing import Sharing
    from kvstore.store.mover import Mover
    from kvstore.store.store import Store
    from kvstore.transfer.nixl import Nixl

log = logging.getLogger(__name__)

_ACCEPT_BACKLOG = 128
# The socket's file is the address's to remove: it stays where systemd listens on it.
_KEEPS_FILE = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}


class Server:
    """All sessions of one daemon over one store."""

    def __init__(
        self,
        store: Store,
        mover: Mover,
        address: SocketAddress,
        admission: Admission,
        *,
        tenants: Tenants,
        sessions_max: int,
        orphan_grace_seconds: float,
        verify_loads: bool,
        prefaults: bool,
        recorder: Recorder | None = None,
    ) -> None:
        self.store = store
        self.mover = mover
        self.tenants = tenants
        self.hints: Hints
        self.handoffs = Handoffs(store)
        self.host_name = ""
        self.pulls = Pulls(self, {})
        self.endpoint: PeerEndpoint | None = None
        self.sharing: Sharing | None = None
        self.nixl: Nixl | None = None
        self.address = address
        self.verify_loads = verify_loads
        self.prefaults = prefaults
        self.draining = False
        self.recorder = recorder
        self.latencies = Latencies()
        self.engines = EngineCounters()
        self.tracing = Tracing(time.monotonic, time.time)
        self.name = f"kvstore {__version__}"
        self.loop: asyncio.AbstractEventLoop
        self._admission = admission
        self._sessions: dict[SessionId, Session] = {}
        self._sessions_max = sessions_max
        self._orphan_grace_seconds = orphan_grace_seconds
        self._refused_uids: set[int] = set()
        self._last_session = 0
        self.started_at = time.monotonic()
        self._listener: asyncio.Server | None = None
        self._settled = asyncio.Event()

    async def start(self, listening: socket.socket) -> None:
        """Accept sessions on *listening*, a bound Unix socket."""
        self.loop = asyncio.get_running_loop()
        self.hints = Hints(self.store, self.mover, self.loop)
        self._listener = await self.loop.create_unix_server(
            self._new_session,
            sock=listening,
            backlog=_ACCEPT_BACKLOG,
            **_KEEPS_FILE,  # type: ignore[arg-type]  # what this version takes
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

    def reconfigure(
        self,
        admission: Admission,
        tenants: Tenants,
        *,
        sessions_max: int,
        orphan_grace_seconds: float,
    ) -> None:
        """Judge new sessions by these from now on; those that are open stay."""
        self._admission = admission
        self.tenants = tenants
        self._sessions_max = sessions_max
        self._orphan_grace_seconds = orphan_grace_seconds
        self._refused_uids.clear()

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
        self.engines.end(session.id)
        orphaned = self.store.end_session(session.id)
        self.handoffs.end_session(session.id, self.loop.time())
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

    @property
    def session_count(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    @property
    def client_names(self) -> dict[SessionId, str]:
        """What the clients of open sessions call themselves."""
        return {number: session.client for number, session in self._sessions.items()}

    def stats(self) -> m.DaemonStats:
        """Return one look at everything."""
        return daemon_stats(self)

    def new_session_id(self) -> SessionId:
        """Return an id that no session has had."""
        self._last_session += 1
        return SessionId(self._last_session)

    def _new_session(self) -> Session:
        return Session(self, self.new_session_id())
