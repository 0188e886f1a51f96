"""One session: a connection, its state, and the answers to its requests.

Frames come in, each is judged by the state machine, carried out on the store and answered,
nearly always within the same call. Whatever a peer sends, only its own session suffers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, cast

from kvstore.daemon.answers import Answers, error_reply
from kvstore.daemon.peers import PeerProcess, credentials_of
from kvstore.errors import (
    DeadlineError,
    InternalError,
    KVStoreError,
    LimitError,
    ProtocolError,
    RefusedError,
)
from kvstore.limits import HELLO_DEADLINE_SECONDS, WRITE_BUFFER_MAX_BYTES
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader, frame
from kvstore.protocol.machine import SessionMachine, SessionState
from kvstore.types import SessionId

if TYPE_CHECKING:
    from kvstore.daemon.server import Server

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.001
# How long a session that ends may take to read why.
_FAREWELL_SECONDS = 1.0


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
        self._answers = Answers(server, session_id, self._reply)
        self._uid = -1
        # What is answered later, and since when that is waited for.
        self._began: dict[int, tuple[str, float]] = {}
        self._arena_sent = False
        self._pool_sent = False
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
        self._uid = peer.uid
        try:
            self._server.admit(self, peer)
        except KVStoreError as error:
            self._fail(0, error)
            return
        self.peer = PeerProcess(peer.pid)
        self._server.loop.call_later(HELLO_DEADLINE_SECONDS, self._expect_hello)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free all that the session held."""
        self._answers.end()
        if self._answers.spans is not None:
            self._answers.spans.end_all()
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
                request = m.decode_request(body)
                if isinstance(request, m.Lookup):
                    self._answers.sample(request, body)
                self._receive(request)
        except ProtocolError as error:
            self._fail(0, error)

    def close(self, error: KVStoreError) -> None:
        """End the session from the daemon's side, saying why."""
        self._fail(0, error)

    # --- requests -----------------------------------------------------------------------

    def _receive(self, request: m.AnyRequest) -> None:
        counters, began_at = self._store.counters, perf_counter()
        counters.requests += 1
        try:
            self._machine.receive(request)
        except LimitError as error:
            counters.request_errors += 1
            self._send(error_reply(request.request_id, error))
            return
        except ProtocolError as error:
            self._send(error_reply(request.request_id, error))
            raise
        if self._answers.spans is not None:
            self._answers.spans.begin(request)
        try:
            reply = self._answer(request)
        except KVStoreError as error:
            counters.request_errors += 1
            reply = error_reply(request.request_id, error)
        except Exception:
            log.exception(
                "request failed", extra={"session": self.id, "request": type(request).__name__}
            )
            counters.request_errors += 1
            reply = error_reply(request.request_id, InternalError("the daemon's log says why"))
        op = type(request).__name__.lower()
        if reply is not None:
            self._reply(reply)
            self._server.latencies.observe(op, perf_counter() - began_at)
        elif request.request_id in self._machine.in_flight:
            self._began[request.request_id] = (op, began_at)
        if self._server.draining:
            self._server.settle()

    def _answer(self, request: m.AnyRequest) -> m.AnyReply | None:
        """Return the reply to *request*, or None when it will be sent later."""
        match request:
            case m.Hello():
                return self._greet(request)
            case m.Attach():
                return self._attach(request)
            case _:
                return self._answers.answer(request)

    def _greet(self, request: m.Hello) -> m.Welcome:
        self.client = request.client
        try:
            number, scope = self._server.tenants.admit(request.tenant, self._uid)
        except RefusedError as error:
            self._fail(request.request_id, error)
            raise
        self._answers.act_for(number, scope)
        return m.Welcome(request.request_id, request.version, self._server.name)

    def _attach(self, request: m.Attach) -> m.Attached | None:
        reply = self._answers.attach(request)
        self._machine.attached()
        fds = self._descriptors(reply)
        if not fds:
            return reply
        self._machine.answered(request.request_id)
        self._send_with(fds, frame(reply))
        return None

    def _descriptors(self, reply: m.Attached) -> list[int]:
        """Return the descriptors that go with *reply*: each once in a session."""
        fds: list[int] = []
        if not self._arena_sent:
            self._arena_sent = True
            fds.append(self._store.host.arena.fd)
        device = self._store.device
        if device is not None and reply.pool_bytes and not self._pool_sent:
            self._pool_sent = True
            if device.tier.pool.exported.fd >= 0:
                fds.append(device.tier.pool.exported.fd)
        return fds

    # --- replies ------------------------------------------------------------------------

    def _reply(self, reply: m.AnyReply) -> None:
        if self._began:
            self._observe(reply.request_id)
        if self._answers.spans is not None:
            self._answers.spans.end(reply)
        self._machine.answered(reply.request_id)
        self._send(reply)

    def _observe(self, request_id: int) -> None:
        """Note how long a request took whose answer came later."""
        op, began_at = self._began.pop(request_id, ("", 0.0))
        if op:
            self._server.latencies.observe(op, perf_counter() - began_at)

    def _send(self, reply: m.AnyReply) -> None:
        if not self._closing:
            self._transport.write(frame(reply))

    def _send_with(self, fds: list[int], reply: bytes) -> None:
        """Send *reply* and descriptors with it, once all earlier replies are out."""
        if self._closing:
            return
        try:
            if self._transport.get_write_buffer_size():
                raise BlockingIOError  # as the socket itself would say
            sent = socket.send_fds(self._socket, [reply], fds)
        except BlockingIOError:
            self._server.loop.call_later(_RETRY_SECONDS, self._send_with, fds, reply)
            return
        except OSError as error:
            self._fail(0, ProtocolError(f"memory could not be passed: {error.strerror}"))
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
        self._send(error_reply(request_id, error))
        self._closing = True
        self._transport.close()
        self._server.loop.call_later(_FAREWELL_SECONDS, self._transport.abort)

    def _expect_hello(self) -> None:
        if self._machine.state is SessionState.NEW:
            self._fail(0, DeadlineError(f"no hello within {HELLO_DEADLINE_SECONDS} s"))
