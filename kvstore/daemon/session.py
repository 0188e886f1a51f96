"""One session: a connection, its state, and the answers to its requests.

Frames come in, each is judged by the state machine, carried out on the store and answered,
nearly always within the same call. Whatever a peer sends, only its own session suffers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, assert_never, cast

from kvstore.daemon.peers import PeerProcess, credentials_of
from kvstore.errors import (
    DeadlineError,
    DrainingError,
    InternalError,
    KVStoreError,
    LimitError,
    ManifestError,
    ProtocolError,
    RequestError,
)
from kvstore.limits import (
    ATTACHMENTS_PER_SESSION_MAX,
    EXTENTS_PER_REPLY_MAX,
    HELLO_DEADLINE_SECONDS,
    WRITE_BUFFER_MAX_BYTES,
)
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader, frame
from kvstore.protocol.machine import SessionMachine, SessionState
from kvstore.protocol.manifest import decode_manifest
from kvstore.store.index import Namespace
from kvstore.store.shards import ShardRecord
from kvstore.types import Digest, HeadRange, LeaseId, ReservationId, Root, SessionId

if TYPE_CHECKING:
    from kvstore.daemon.server import Server

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.001
# How long a session that ends may take to read why.
_FAREWELL_SECONDS = 1.0


class _Wait(NamedTuple):
    """A look-up that waits for the chunk *digest*, which is being written."""

    timer: asyncio.TimerHandle
    space: Namespace
    digest: Digest
    changed: Callable[[], None]


class Session(asyncio.Protocol):
    """The protocol of one connection. Created by the server, ends with its socket."""

    def __init__(self, server: Server, session_id: SessionId) -> None:
        self.id = session_id
        self.client = ""
        self.peer: PeerProcess | None = None
        self._server = server
        self._store = server.store
        self._machine = SessionMachine()
        self._reader = FrameReader()
        self._frames: Iterator[bytes] = iter(())
        self._is_heard = True
        self._spaces: list[Namespace] = []
        self._arena_sent = False
        self._waits: dict[int, _Wait] = {}
        self._transport: asyncio.Transport
        self._socket: socket.socket
        self._closing = False

    # --- the connection -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Judge the peer; an unwelcome one is told why and closed."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_MAX_BYTES)
        # uvloop shows a stand-in for the socket; a duplicate of the descriptor is a real one.
        self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        peer = credentials_of(self._socket)
        try:
            self._server.admit(self, peer)
        except KVStoreError as error:
            self._fail(0, error)
            return
        self.peer = PeerProcess(peer.pid)
        self._server.loop.call_later(HELLO_DEADLINE_SECONDS, self._expect_hello)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free all that the session held."""
        for request_id in list(self._waits):
            self._end_wait(request_id)
        for space in self._spaces:
            self._store.leave(space)
        self._socket.close()
        self._closing = True
        self._server.ended(self)

    def pause_writing(self) -> None:
        """Stop answering, and so reading, a client that does not read its replies."""
        self._is_heard = False
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on where it stopped."""
        self._is_heard = True
        self._work()
        if self._is_heard and not self._closing:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Answer all requests that *data* completes; what breaks the protocol ends the session."""
        # What is left over from before, while its answers were not read, comes first.
        self._frames = chain(self._frames, self._reader.feed(data))
        self._work()

    def _work(self) -> None:
        """Answer the requests that are here, for as long as the answers are read."""
        try:
            while self._is_heard and not self._closing:
                body = next(self._frames, None)
                if body is None:
                    self._frames = iter(())
                    return
                self._receive(m.decode_request(body))
        except ProtocolError as error:
            self._fail(0, error)

    def close(self, error: KVStoreError) -> None:
        """End the session from the daemon's side, saying why."""
        self._fail(0, error)

    # --- requests -----------------------------------------------------------------------

    def _receive(self, request: m.AnyRequest) -> None:
        counters = self._store.counters
        counters.requests += 1
        try:
            self._machine.receive(request)
        except LimitError as error:
            counters.request_errors += 1
            self._send(_error(request.request_id, error))
            return
        except ProtocolError as error:
            self._send(_error(request.request_id, error))
            raise
        try:
            reply = self._answer(request)
        except KVStoreError as error:
            counters.request_errors += 1
            reply = _error(request.request_id, error)
        except Exception:
            log.exception(
                "request failed", extra={"session": self.id, "request": type(request).__name__}
            )
            counters.request_errors += 1
            reply = _error(request.request_id, InternalError("the daemon's log says why"))
        if reply is not None:
            self._reply(reply)
        if self._server.draining:
            self._server.settle()

    def _answer(self, request: m.AnyRequest) -> m.AnyReply | None:
        """Return the reply to *request*, or None when it will be sent later."""
        match request:
            case m.Lookup():
                return self._lookup(request)
            case m.Load():
                return self._load(request)
            case m.Reserve():
                return self._reserve(request)
            case m.Commit():
                return self._commit(request)
            case m.Release():
                ended = self._store.release(self.id, map(LeaseId, request.leases))
                return m.Done(request.request_id, ended)
            case m.Abort():
                freed = self._store.abort(self.id, map(ReservationId, request.reservations))
                return m.Done(request.request_id, freed)
            case m.Pin() | m.Unpin() | m.Delete():
                return self._keep(request)
            case m.Hello() | m.Attach() | m.Stats() | m.Ping():
                return self._converse(request)
            case _:
                assert_never(request)

    def _converse(self, request: m.Hello | m.Attach | m.Stats | m.Ping) -> m.AnyReply | None:
        match request:
            case m.Hello():
                self.client = request.client
                return m.Welcome(request.request_id, m.PROTOCOL_VERSION, self._server.name)
            case m.Attach():
                return self._attach(request)
            case m.Stats():
                return m.StatsReply(request.request_id, self._server.stats())
            case m.Ping():
                return m.Pong(request.request_id, request.payload)
            case _:
                assert_never(request)

    def _keep(self, request: m.Pin | m.Unpin | m.Delete) -> m.Done:
        space, digests = self._space(request.space), _digests(request.digests)
        match request:
            case m.Pin():
                return m.Done(
                    request.request_id, self._store.pin(space, digests, hard=request.hard)
                )
            case m.Unpin():
                return m.Done(request.request_id, self._store.unpin(space, digests))
            case m.Delete():
                gone, busy = self._store.delete(space, digests)
                return m.Done(request.request_id, gone, busy)
            case _:
                assert_never(request)

    def _attach(self, request: m.Attach) -> m.AnyReply | None:
        self._refuse_when_draining()
        if len(self._spaces) >= ATTACHMENTS_PER_SESSION_MAX:
            raise LimitError(f"more than {ATTACHMENTS_PER_SESSION_MAX} namespaces in one session")
        manifest = decode_manifest(request.manifest)
        if manifest.chunk_bytes != request.chunk_bytes:
            raise ManifestError(
                f"attach.chunk_bytes is {request.chunk_bytes}, but by its manifest a chunk has "
                f"{manifest.chunk_bytes} bytes"
            )
        space = self._store.enter(manifest)
        self._spaces.append(space)
        self._machine.attached()
        host = self._store.host
        reply = m.Attached(
            request.request_id,
            len(self._spaces) - 1,
            manifest.namespace_id(),
            host.arena.size_bytes,
            round(self._store.leases.ttl_seconds * 1000),
            host.checksums,
            host.checksums and self._server.verify_loads,
            self._server.prefaults,
        )
        if self._arena_sent:
            return reply
        self._arena_sent = True
        self._machine.answered(request.request_id)
        self._send_with_arena(frame(reply))
        return None

    def _lookup(self, request: m.Lookup) -> m.Found | None:
        if request.wait and self._park(request):
            return None
        return self._found(request)

    def _found(self, request: m.Lookup) -> m.Found:
        found = self._store.lookup(
            self.id,
            self._space(request.space),
            _digests(request.digests),
            self._server.loop.time(),
            window=request.window,
            lease=request.lease,
        )
        return m.Found(request.request_id, found.hits, found.arriving, found.tiers, found.lease)

    def _park(self, request: m.Lookup) -> bool:
        """Hold *request* back while the chunk behind its hits is being written."""
        space = self._space(request.space)
        blocking = self._store.arriving_next(space, _digests(request.digests), request.window)
        if blocking is None:
            return False
        waiting = self._waits.get(request.request_id)
        timer = waiting.timer if waiting else self._make_timer(request)
        changed = partial(self._resume, request)
        self._store.watch(space, blocking, changed)
        self._waits[request.request_id] = _Wait(timer, space, blocking, changed)
        return True

    def _make_timer(self, request: m.Lookup) -> asyncio.TimerHandle:
        return self._server.loop.call_later(request.deadline_ms / 1000, self._finish_wait, request)

    def _resume(self, request: m.Lookup) -> None:
        if not self._park(request):
            self._finish_wait(request)

    def _finish_wait(self, request: m.Lookup) -> None:
        self._end_wait(request.request_id)
        try:
            self._reply(self._found(request))
        except KVStoreError as error:
            self._reply(_error(request.request_id, error))

    def _end_wait(self, request_id: int) -> None:
        wait = self._waits.pop(request_id)
        wait.timer.cancel()
        self._store.unwatch(wait.space, wait.digest, wait.changed)

    def _load(self, request: m.Load) -> m.Loaded:
        space = self._space(request.space)
        heads = _heads(request, space)
        digests = _digests(request.digests)
        now = self._server.loop.time()
        lease, chunks = self._store.load(self.id, space, digests, heads, now)
        return m.Loaded(request.request_id, lease, _shards(chunks))

    def _reserve(self, request: m.Reserve) -> m.Reserved:
        self._refuse_when_draining()
        space = self._space(request.space)
        places = self._store.reserve(
            self.id,
            space,
            _digests(request.digests),
            parent=Digest(request.parent) if request.parent else None,
            heads=_heads(request, space),
            sizes=request.sizes,
        )
        slots = [m.Slot(place.outcome, place.reservation, place.extent.offset) for place in places]
        return m.Reserved(request.request_id, slots)

    def _commit(self, request: m.Commit) -> m.Committed:
        failures: list[m.Failure] = []
        for filled in request.filled:
            try:
                self._store.commit(self.id, ReservationId(filled.reservation), Root(filled.root))
            except KVStoreError as error:
                self._store.counters.request_errors += 1
                failures.append(m.Failure(filled.reservation, error.code, str(error)))
        return m.Committed(request.request_id, failures)

    # --- replies ------------------------------------------------------------------------

    def _reply(self, reply: m.AnyReply) -> None:
        self._machine.answered(reply.request_id)
        self._send(reply)

    def _send(self, reply: m.AnyReply) -> None:
        if not self._closing:
            self._transport.write(frame(reply))

    def _send_with_arena(self, reply: bytes) -> None:
        """Send *reply* and the arena's descriptor with it, once all earlier replies are out."""
        if self._closing:
            return
        try:
            if self._transport.get_write_buffer_size():
                raise BlockingIOError  # as the socket itself would say
            sent = socket.send_fds(self._socket, [reply], [self._store.host.arena.fd])
        except BlockingIOError:
            self._server.loop.call_later(_RETRY_SECONDS, self._send_with_arena, reply)
            return
        except OSError as error:
            self._fail(0, ProtocolError(f"the arena could not be passed: {error.strerror}"))
            return
        if sent < len(reply):
            self._transport.write(reply[sent:])

    def _fail(self, request_id: int, error: KVStoreError) -> None:
        """Say why and end the session."""
        if self._closing:
            return
        self._store.counters.session_errors += 1
        log.info(
            "session ends", extra={"session": self.id, "client": self.client, "reason": str(error)}
        )
        self._send(_error(request_id, error))
        self._closing = True
        self._transport.close()
        self._server.loop.call_later(_FAREWELL_SECONDS, self._transport.abort)

    def _expect_hello(self) -> None:
        if self._machine.state is SessionState.NEW:
            self._fail(0, DeadlineError(f"no hello within {HELLO_DEADLINE_SECONDS} s"))

    def _refuse_when_draining(self) -> None:
        if self._server.draining:
            raise DrainingError("the daemon is shutting down")

    def _space(self, number: int) -> Namespace:
        if number >= len(self._spaces):
            raise RequestError(f"space {number} was not attached in this session")
        return self._spaces[number]


def _error(request_id: int, error: KVStoreError) -> m.Error:
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
