"""Where other daemons call: hand-offs that are open here, what is held, and the bytes of it.

A thread for each connection, which asks the event loop for all that it may say and send. What
a caller may see: that it does not know the token, and then nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from kvstore.daemon.handoffs import HandoffWait
from kvstore.daemon.peer_grants import Grants
from kvstore.daemon.peer_sharing import Turns, held_shards
from kvstore.errors import ConfigError, FrameError, KVStoreError, ManifestError, RefusedError
from kvstore.limits import (
    PEER_FOLLOW_SECONDS,
    PEER_IDLE_SECONDS,
    PEER_NONCE_SIZE_BYTES,
    PEER_OFFERS_MAX,
    PEER_SESSIONS_MAX,
    PEER_SHARDS_PER_CHUNK_MAX,
    PEER_SPEED_MIN_BYTES_PER_SECOND,
    PEER_TIMEOUT_SECONDS,
    PEER_TURN_BYTES,
    PULL_BATCH_BYTES,
    PULL_BATCH_CHUNKS_MAX,
)
from kvstore.protocol import peering as p
from kvstore.store.handoffs import HandoffKey
from kvstore.store.shards import choose_cover
from kvstore.store.store import NO_LEASE
from kvstore.transfer.wire import Wire, WireError, WireProtocolError, prepare
from kvstore.types import (
    NO_SLOT,
    Digest,
    HandoffState,
    HeadRange,
    LeaseId,
    NamespaceId,
    SessionId,
    TierKind,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from kvstore.daemon.server import Server
    from kvstore.settings import ListenAddress
    from kvstore.store.namespace import Namespace

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_ACCEPT_PAUSE_SECONDS: Final = 0.1
_NOT_HELD: Final = p.HeldChunk(b"", [])


class _Ready(NamedTuple):
    """A shard that is leased for as long as it is being sent."""

    lease: LeaseId
    view: memoryview
    has_turn: bool = False


class PeerEndpoint:
    """Serves other daemons at *listen* until its `run` is cancelled.

    With *shares* it says what the host tier holds, and sends that for the tiers of others.
    """

    def __init__(
        self,
        server: Server,
        listen: ListenAddress,
        *,
        name: str,
        token: bytes,
        tls: ssl.SSLContext | None,
        shares: bool = False,
    ) -> None:
        self._server = server
        self._store = server.store
        self._listen = listen
        self._name = name
        self._token = token
        self._tls = tls
        self._shares = shares
        self._turns = Turns(server.mover)
        self._threads = ThreadPoolExecutor(PEER_SESSIONS_MAX, "peer-session")
        self._grants = Grants(server, self._begin, self._end)
        self._wires: set[Wire] = set()
        self._is_closing = False
        self._sessions = 0
        self._listener: socket.socket | None = None

    @property
    def port(self) -> int:
        """The port that callers find it at."""
        assert self._listener is not None, "it is bound"
        port: int = self._listener.getsockname()[1]
        return port

    def bind(self) -> None:
        """Take the address; raises `ConfigError` when that cannot be."""
        host, port = self._listen
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(PEER_SESSIONS_MAX)
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"peer.listen {self._listen} cannot be had: {error.strerror}"
            ) from None
        listener.setblocking(False)
        self._listener = listener

    async def run(self) -> None:
        """Serve until cancelled; then end all connections."""
        assert self._listener is not None, "it is bound"
        loop = self._server.loop
        log.info("peers may call", extra={"host": self._listen.host, "port": self.port})
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(self._listener)
                except OSError as error:
                    # Out of descriptors, say: engines are served on, and callers come again.
                    log.warning("peer not accepted", extra={"reason": error.strerror})
                    await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                    continue
                self._accept(connection, address)
        finally:
            self._listener.close()
            # Those that are yet to be among them see this, and end by themselves.
            self._is_closing = True
            for wire in list(self._wires):
                wire.abort()
            # Until none of them reads the arena any more; what they ask is still answered.
            await asyncio.to_thread(self._threads.shutdown)

    def _accept(self, connection: socket.socket, address: object) -> None:
        if self._sessions >= PEER_SESSIONS_MAX:
            self._store.counters.peer_sessions_refused += 1
            connection.close()
            return
        self._sessions += 1
        # A lease of its own, and so a session, for what it is being sent.
        session = self._server.new_session_id()
        loop = self._server.loop
        serving = loop.run_in_executor(self._threads, self._serve, connection, session)

        def ended(_: object) -> None:
            self._sessions -= 1
            self._store.end_session(session)
            error = None if serving.cancelled() else serving.exception()
            if isinstance(error, KVStoreError | WireProtocolError):
                self._store.counters.peer_faults += 1
                log.warning("peer refused", extra={"from": str(address), "reason": str(error)})
            elif isinstance(error, WireError | OSError):
                log.info("peer gone", extra={"from": str(address), "reason": str(error)})
            elif error is not None:
                log.error("peer not served", exc_info=error)

        serving.add_done_callback(ended)

    # --- in a thread --------------------------------------------------------------------

    def _serve(self, connection: socket.socket, session: SessionId) -> None:
        connection.setblocking(True)
        connection.settimeout(PEER_TIMEOUT_SECONDS)
        with contextlib.closing(connection):
            prepare(connection)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            wire = Wire(connection, PEER_TIMEOUT_SECONDS)
            self._wires.add(wire)
            if self._is_closing:
                wire.abort()
            try:
                self._greet(wire)
                ahead: p.AnyPeerMessage | None = None
                while True:
                    ahead = self._answer_one(wire, session, ahead)
            finally:
                self._wires.discard(wire)
                wire.close()

    def _greet(self, wire: Wire) -> None:
        wire.begin(PEER_TIMEOUT_SECONDS)
        nonce = secrets.token_bytes(PEER_NONCE_SIZE_BYTES)
        wire.send_frame(p.encode(p.PeerNonce(p.PEER_VERSION_MIN, nonce, p.PEER_VERSION)))
        hello = _decode(wire)
        if not isinstance(hello, p.PeerHello):
            raise RefusedError("it does not greet as peers do")
        p.agree(hello.version, hello.version)
        expected = p.caller_proof(self._token, nonce, hello.nonce, hello.name)
        if not p.is_proof(expected, hello.proof):
            _say(wire, RefusedError("the token is not known here (peer.token_file)"))
            raise RefusedError(f"{hello.name[:64]!r} does not know the token")
        proof = p.called_proof(self._token, nonce, hello.nonce, self._name)
        wire.send_frame(p.encode(p.PeerWelcome(self._name, proof)))
        self._server.loop.call_soon_threadsafe(self._count_session)

    def _answer_one(
        self, wire: Wire, session: SessionId, ahead: p.AnyPeerMessage | None
    ) -> p.AnyPeerMessage | None:
        """Answer *ahead*, or what comes next; return what has been read behind it, if anything."""
        wire.begin(PEER_IDLE_SECONDS, patient=True)
        request = ahead or _decode(wire)
        ahead = None
        try:
            match request:
                case p.Follow():
                    answer: p.PeerMessage = self._ask(self._follow(request))
                case p.Want():
                    wants, ahead = _read_ahead(wire, request)
                    self._send(wire, wants, session)
                    return ahead
                case p.Grant():
                    self._grants.serve(wire, request, session)
                    return None
                case p.PeerLeave():
                    answer = self._ask(self._leave(request))
                case p.Have():
                    answer = self._ask(self._have(request))
                case _:
                    raise FrameError(f"{type(request).__name__} is nothing to ask")
        except KVStoreError as error:
            _say(wire, error)
            raise
        wire.begin(PEER_TIMEOUT_SECONDS)
        wire.send_frame(p.encode(answer))
        return None

    def _send(self, wire: Wire, wants: Sequence[p.Want], session: SessionId) -> None:
        """Send what is wanted, one by one. The event loop is asked as seldom as can be."""
        left = list(wants)
        while left:
            begun = self._ask(self._begin_some(left, session))
            before = wire.sent_bytes
            try:
                for want, ready in zip(left, begun, strict=False):
                    _send_one(wire, want, ready)
            finally:
                sent = wire.sent_bytes - before
                self._server.loop.call_soon_threadsafe(self._end_some, session, begun, sent)
            left = left[len(begun) :]

    def _ask(self, question: Coroutine[object, object, Answer]) -> Answer:
        """Return what the event loop answers."""
        return asyncio.run_coroutine_threadsafe(question, self._server.loop).result()

    # --- on the event loop --------------------------------------------------------------

    def _count_session(self) -> None:
        self._store.counters.peer_sessions_opened += 1

    def _key(self, request: p.Follow | p.PeerLeave) -> HandoffKey | None:
        names = list(self._server.tenants.names)
        if request.tenant not in names:
            return None
        tenant = names.index(request.tenant)
        return HandoffKey(tenant, NamespaceId(request.namespace), request.name)

    async def _follow(self, request: p.Follow) -> p.Following:
        key, handoffs = self._key(request), self._server.handoffs
        if key is None:
            return p.Following(HandoffState.ABSENT, [], is_last=True)
        if not handoffs.is_known(key) and handoffs.is_known_elsewhere(key):
            raise ManifestError(
                f"hand-off {request.name!r} is of another manifest than the one that asks for it"
            )
        loop = self._server.loop
        news: asyncio.Future[None] = loop.create_future()
        wait = HandoffWait(handoffs, key, lambda: news.set_result(None))
        try:
            seconds = min(request.wait_ms / 1000, PEER_FOLLOW_SECONDS)
            wait.watch(request.first, loop, seconds, early=request.early)
            await news
        finally:
            wait.cancel()
        standing = handoffs.standing(key, request.first, loop.time())
        space = self._store.known(key.namespace)
        some = list(standing.digests[:PEER_OFFERS_MAX])
        offers = [] if space is None else [self._offer(space, digest) for digest in some]
        is_awaited = request.early and standing.state is HandoffState.ABSENT
        is_last = standing.is_last and len(some) == len(standing.digests) and not is_awaited
        payload = standing.payload if is_last else b""
        return p.Following(standing.state, offers, is_last, payload, standing.consumers)

    def _offer(self, space: Namespace, digest: Digest) -> p.Offer:
        """Return what *digest* consists of now; of a chunk in too many parts, nothing."""
        index = self._store.index
        slots = index.prefix(space, [digest])[1]
        shards = [
            p.OfferedShard(*shard.heads, shard.size_bytes, shard.root)
            for slot in slots
            for shard in choose_cover(index.shards(slot), space.manifest.all_heads, index.usable)
        ]
        return p.Offer(digest, shards if len(shards) <= PEER_SHARDS_PER_CHUNK_MAX else [])

    async def _have(self, request: p.Have) -> p.Holding:
        space = self._store.known(NamespaceId(request.namespace))
        digests = [Digest(digest) for digest in request.digests]
        if space is None or not self._shares:
            return p.Holding([_NOT_HELD] * len(digests))
        return p.Holding([self._held(space, digest) for digest in digests])

    def _held(self, space: Namespace, digest: Digest) -> p.HeldChunk:
        """Return what *digest* consists of in the host tier; in too many parts, nothing."""
        shards = held_shards(self._store, space, digest)
        if not 0 < len(shards) <= PEER_SHARDS_PER_CHUNK_MAX:
            return _NOT_HELD
        parent = self._store.index.parent_digest(space.ready[digest]) or b""
        offered = [p.OfferedShard(*shard.heads, shard.size_bytes, shard.root) for shard in shards]
        return p.HeldChunk(parent, offered)

    async def _begin_some(
        self, wants: Sequence[p.Want], session: SessionId
    ) -> list[_Ready | p.Gone | p.Busy]:
        """Begin with the first of *wants*, and with as many more as are at hand at once.

        For tiers those share a turn, as far as it goes; each has its own while loads here wait.
        """
        first = await self._begin(wants[0], session)
        begun = [first]
        left_bytes = PEER_TURN_BYTES if wants[0].spare else PULL_BATCH_BYTES
        if wants[0].spare and (not isinstance(first, _Ready) or self._turns.is_short):
            return begun
        for before, want in itertools.pairwise(wants):
            left_bytes -= before.shard.size_bytes
            is_alike = want.spare == before.spare
            if left_bytes <= 0 or not is_alike or not self._is_in_host(want):
                break
            try:
                begun.append(await self._lease(want, session))
            except KVStoreError:
                # Met again as the first of what is left, and then said.
                break
        return begun

    async def _begin(self, want: p.Want, session: SessionId) -> _Ready | p.Gone | p.Busy:
        """Lease the shard that is wanted, or say why not."""
        if not want.spare:
            return await self._lease(want, session)
        if not self._shares or not self._is_in_host(want):
            return p.Gone()
        if not await self._turns.take():
            return p.Busy()
        ready: _Ready | p.Gone = p.Gone()
        try:
            # It may have left the host tier meanwhile: others' tiers are not worth a slow load.
            if self._is_in_host(want):
                ready = await self._lease(want, session)
        finally:
            if isinstance(ready, p.Gone):
                self._turns.give()
        return ready if isinstance(ready, p.Gone) else ready._replace(has_turn=True)

    def _is_in_host(self, want: p.Want) -> bool:
        space = self._store.known(NamespaceId(want.namespace))
        slot = NO_SLOT if space is None else space.find(Digest(want.digest))
        heads = HeadRange(want.shard.head_start, want.shard.head_stop)
        return slot != NO_SLOT and self._store.index.shard(slot, heads, TierKind.HOST) is not None

    async def _lease(self, want: p.Want, session: SessionId) -> _Ready | p.Gone:
        """Lease the shard, brought up from a slower tier if need be."""
        space = self._store.known(NamespaceId(want.namespace))
        heads = HeadRange(want.shard.head_start, want.shard.head_stop)
        if space is None or not 0 <= heads.start < heads.stop <= space.manifest.kv_heads:
            return p.Gone()
        digest, now = Digest(want.digest), self._server.loop.time()
        loading = self._store.begin_load(session, space, [digest], heads, now)
        count = len(loading.slots)
        if not loading.is_at_hand:
            came: asyncio.Future[int] = self._server.loop.create_future()
            pending = self._server.mover.load(
                loading, [digest], now + PEER_TIMEOUT_SECONDS, came.set_result
            )
            timer = self._server.loop.call_later(PEER_TIMEOUT_SECONDS, pending.give_up)
            count = await came
            timer.cancel()
        lease, chunks = self._store.end_load(loading, count)
        shard = chunks[0][0] if chunks and len(chunks[0]) == 1 else None
        wanted = (heads, want.shard.size_bytes, want.shard.root)
        if shard is None or (shard.heads, shard.size_bytes, shard.root) != wanted:
            self._release(session, lease)
            return p.Gone()
        return _Ready(lease, self._store.host.view(shard.extent))

    def _end_some(
        self, session: SessionId, begun: Sequence[_Ready | p.Gone | p.Busy], sent_bytes: int
    ) -> None:
        self._store.counters.peer_sent_bytes += sent_bytes
        for ready in begun:
            if isinstance(ready, _Ready):
                self._end(session, ready, 0)

    def _end(self, session: SessionId, ready: _Ready, sent: int) -> None:
        self._store.counters.peer_sent_bytes += sent
        self._release(session, ready.lease)
        if ready.has_turn:
            self._turns.give()

    def _release(self, session: SessionId, lease: LeaseId) -> None:
        if lease != NO_LEASE and self._store.leases.holds(session, lease):
            self._store.release(session, [lease])

    async def _leave(self, request: p.PeerLeave) -> p.Left:
        key = self._key(request)
        if key is not None:
            consumer = self._server.new_session_id()
            self._server.handoffs.leave(consumer, key, self._server.loop.time())
        return p.Left()


def _send_one(wire: Wire, want: p.Want, ready: _Ready | p.Gone | p.Busy) -> None:
    """Send one shard, or that it cannot be had."""
    wire.begin(PEER_TIMEOUT_SECONDS + want.shard.size_bytes / PEER_SPEED_MIN_BYTES_PER_SECOND)
    if isinstance(ready, _Ready):
        wire.send_bytes(p.encode(p.Sending(len(ready.view))), ready.view)
    else:
        wire.send_frame(p.encode(ready))


def _read_ahead(wire: Wire, first: p.Want) -> tuple[list[p.Want], p.AnyPeerMessage | None]:
    """Return *first* and what is wanted behind it; also what came in place of one more, if any."""
    wants, size_bytes = [first], first.shard.size_bytes
    wire.begin(PEER_TIMEOUT_SECONDS)
    while len(wants) < PULL_BATCH_CHUNKS_MAX and size_bytes < PULL_BATCH_BYTES:
        if wire.is_quiet():
            break
        request = _decode(wire)
        if not isinstance(request, p.Want):
            return wants, request
        wants.append(request)
        size_bytes += request.shard.size_bytes
    return wants, None


def _decode(wire: Wire) -> p.AnyPeerMessage:
    try:
        return p.decode(wire.receive_frame())
    except FrameError as error:
        _say(wire, error)
        raise


def _say(wire: Wire, error: KVStoreError) -> None:
    """Say why the connection ends, if it can still be said."""
    with contextlib.suppress(WireError):
        wire.begin(PEER_TIMEOUT_SECONDS)
        wire.send_frame(p.encode(p.PeerFault(error.code, str(error)[:512])))
