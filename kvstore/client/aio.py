"""The client for asyncio programs: the same calls as `kvstore.client.sync`, awaited.

Copies in and out of the arena are plain functions (`Vacancy.fill`, `LoadedChunks.copy_to`);
run them in a thread when they are long.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import time
from typing import TYPE_CHECKING, Final, Self, TypeVar

from kvstore.client.chunks import AttachedSpace, LoadedChunks, Vacancy, check_digests
from kvstore.client.connection import checked, deadline_ms
from kvstore.client.handoff import AsyncHandoffs
from kvstore.errors import FrameError, KVStoreError, UnavailableError, from_code
from kvstore.limits import LOOKUP_NAME_MAX_CHARS, PATIENCE_SECONDS
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader, frame
from kvstore.transfer.arena import ArenaMapping
from kvstore.types import Digest, HeadRange, HintKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from kvstore.protocol.manifest import Manifest

Reply = TypeVar("Reply", bound=m.Message)

_RECEIVE_BYTES: Final = 256 * 1024
_TIMEOUT_SECONDS: Final = 5.0


class AsyncConnection:
    """A session on the running loop; many requests may be in flight.

    Reads and writes the socket itself, because no asyncio transport can receive the arena's
    descriptor. As in `Connection`, any failure ends it for good.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arena_fd: int | None = None
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[m.AnyReply]] = {}
        self._frames = FrameReader()
        self._unsent = bytearray()
        self._failure: str | None = None
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise UnavailableError(f"no socket to be had: {error.strerror}") from error

    @property
    def is_open(self) -> bool:
        """Whether the session still stands, as far as is known here."""
        return self._failure is None

    async def open(self, client: str, timeout_seconds: float, tenant: str = "") -> None:
        """Connect and say hello."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._loop.sock_connect(self._socket, os.fspath(self.path))
        except (OSError, TimeoutError) as error:
            self._socket.close()
            raise UnavailableError(f"{self.path}: {error}") from error
        self._loop.add_reader(self._socket, self._readable)
        deadline = deadline_ms(timeout_seconds)
        hello = m.Hello(self.next_id(), deadline, m.PROTOCOL_VERSION, client, tenant)
        try:
            await self.call(hello, m.Welcome, timeout_seconds)
        except KVStoreError:
            self.close()
            raise

    def next_id(self) -> int:
        """Return a request id that this session has not used."""
        return next(self._ids)

    async def call(self, request: m.Request, kind: type[Reply], timeout_seconds: float) -> Reply:
        """Send *request* and return its reply; see `Connection.call`.

        A cancelled call leaves the session whole: its reply is dropped when it comes, but
        what it asked for may have been done, and ends with the session.
        """
        waiting: asyncio.Future[m.AnyReply] = self._loop.create_future()
        self._waiting[request.request_id] = waiting
        try:
            self.post(request)
            async with asyncio.timeout(timeout_seconds):
                reply = await waiting
        except TimeoutError:
            # A loop that was held up sees the reply and the end of its time in one turn.
            if waiting.done() and not waiting.cancelled():
                return checked(waiting.result(), kind)
            self._fail(f"{self.path}: no answer within {timeout_seconds} s")
            raise UnavailableError(f"{self.path}: no answer within {timeout_seconds} s") from None
        finally:
            self._waiting.pop(request.request_id, None)
        return checked(reply, kind)

    def post(self, request: m.Request) -> None:
        """Send *request* and take no interest in its reply."""
        if self._failure is not None:
            raise UnavailableError(self._failure)
        self._unsent += frame(request)
        self._writable()

    def close(self) -> None:
        """End the session. Idempotent."""
        self._fail("the connection was closed")

    def _writable(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(f"{self.path}: {error}")
            return
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._socket, self._writable)
        else:
            self._loop.remove_writer(self._socket)

    def _readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _RECEIVE_BYTES, 1)
            if fds:
                self.arena_fd = fds[0]
            if not data:
                raise ConnectionResetError("the daemon closed the session")
            for body in self._frames.feed(data):
                self._deliver(m.decode_reply(body))
        except BlockingIOError:
            return
        except (OSError, FrameError) as error:
            self._fail(f"{self.path}: {error}")

    def _deliver(self, reply: m.AnyReply) -> None:
        if reply.request_id == 0 and isinstance(reply, m.Error):
            self._fail(f"{self.path}: {reply.message}", from_code(reply.code, reply.message))
            return
        waiting = self._waiting.pop(reply.request_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def _fail(self, reason: str, error: KVStoreError | None = None) -> None:
        if self._failure is not None:
            return
        self._failure = reason
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error or UnavailableError(reason))


class AsyncClient:
    """A session with the daemon, for one event loop; every error is typed."""

    def __init__(self, connection: AsyncConnection, timeout_seconds: float) -> None:
        self._connection = connection
        self._timeout_seconds = timeout_seconds
        self._arena: ArenaMapping | None = None

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        name: str = "",
        tenant: str = "",
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> Self:
        """Open a session at the socket *path*, for *tenant* if it is one's.

        *timeout_seconds* bounds every call.
        """
        connection = AsyncConnection(path)
        await connection.open(name, timeout_seconds, tenant)
        return cls(connection, timeout_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def attach(self, manifest: Manifest) -> AsyncSpace:
        """Enter the namespace of *manifest*; raises `ManifestError` or `TooLargeError`."""
        request = m.Attach(*self._head(), manifest.encode(), manifest.chunk_bytes)
        attached = await self._connection.call(request, m.Attached, self._timeout_seconds)
        if self._arena is None:
            if self._connection.arena_fd is None:
                raise UnavailableError("the daemon did not pass its arena")
            self._arena = ArenaMapping.open(self._connection.arena_fd)
            if attached.prefaulted:
                self._arena.map_in()
        space = AttachedSpace(manifest, attached, self._arena)
        return AsyncSpace(self._connection, space, self._timeout_seconds)

    async def ping(self, payload: bytes = b"") -> bytes:
        """Return *payload* as it comes back from the daemon."""
        request = m.Ping(*self._head(), payload)
        return (await self._connection.call(request, m.Pong, self._timeout_seconds)).payload

    async def stats(self) -> m.DaemonStats:
        """Return what the daemon holds and has done."""
        request = m.Stats(*self._head())
        return (await self._connection.call(request, m.StatsReply, self._timeout_seconds)).stats

    def close(self) -> None:
        """End the session; the daemon frees all that it held. Idempotent."""
        self._connection.close()
        if self._arena is not None:
            self._arena.stop()

    def _head(self) -> tuple[int, int]:
        return self._connection.next_id(), deadline_ms(self._timeout_seconds)


class AsyncSpace:
    """One namespace, entered through one client."""

    def __init__(
        self, connection: AsyncConnection, space: AttachedSpace, timeout_seconds: float
    ) -> None:
        self.attached = space
        self.manifest = space.manifest
        self._connection = connection
        self._timeout_seconds = timeout_seconds

    @property
    def handoffs(self) -> AsyncHandoffs:
        """The hand-offs of this namespace."""
        return AsyncHandoffs(self._connection, self.attached, self._timeout_seconds)

    async def lookup(
        self,
        digests: Sequence[Digest],
        *,
        window: int = 0,
        wait: bool = False,
        lease: bool = False,
        recompute_us: int = 0,
        name: str = "",
        timeout_seconds: float | None = None,
    ) -> m.Found:
        """Count the leading chunks present; see `kvstore.client.sync.Space.lookup`."""
        timeout_seconds = timeout_seconds or self._timeout_seconds
        deadline = deadline_ms(timeout_seconds * 0.9 if wait else timeout_seconds)
        request = m.Lookup(
            self._connection.next_id(),
            deadline,
            self.attached.number,
            check_digests(digests),
            window,
            wait,
            lease,
            recompute_us,
            name[:LOOKUP_NAME_MAX_CHARS],
            self.attached.traceparent(),
        )
        return await self._connection.call(request, m.Found, timeout_seconds)

    async def load(
        self,
        digests: Sequence[Digest],
        *,
        heads: HeadRange | None = None,
        recompute_us: int = 0,
        patience_seconds: float | None = None,
    ) -> LoadedChunks:
        """Lease the leading chunks present; see `kvstore.client.sync.Space.load`."""
        wanted = heads or self.manifest.all_heads
        patience = self._timeout_seconds * 0.9 if patience_seconds is None else patience_seconds
        asked_at = time.monotonic()
        request = m.Load(
            self._connection.next_id(),
            deadline_ms(patience),
            self.attached.number,
            check_digests(digests),
            *wanted,
            recompute_us,
            self.attached.traceparent(),
        )
        loaded = await self._connection.call(request, m.Loaded, patience + self._timeout_seconds)
        return LoadedChunks(
            self.attached,
            digests,
            wanted,
            loaded,
            asked_at=asked_at,
            let_go=self._let_go,
            is_open=lambda: self._connection.is_open,
        )

    async def release(self, lease: int) -> None:
        """End *lease*; raises `LeaseError` when this session does not hold it."""
        request = m.Release(self._connection.next_id(), self._deadline(), [lease])
        await self._connection.call(request, m.Done, self._timeout_seconds)

    @contextlib.asynccontextmanager
    async def reserve(
        self,
        digests: Sequence[Digest],
        *,
        parent: Digest | None = None,
        heads: HeadRange | None = None,
        sizes: Sequence[int] = (),
    ) -> AsyncIterator[list[Vacancy]]:
        """Reserve room for consecutive chunks; see `kvstore.client.sync.Space.reserve`."""
        wanted = heads or self.manifest.all_heads
        request = m.Reserve(
            *self._head(),
            check_digests(digests),
            parent or b"",
            *wanted,
            list(sizes),
            self.attached.traceparent(),
        )
        reserved = await self._connection.call(request, m.Reserved, self._timeout_seconds)
        lengths = sizes or [self.manifest.shard_bytes(wanted)] * len(digests)
        vacancies = [
            Vacancy(self.attached, digest, slot, size)
            for digest, slot, size in zip(digests, reserved.slots, lengths, strict=True)
        ]
        try:
            yield vacancies
        except BaseException:
            self._abort([v.reservation for v in vacancies if v.is_reserved])
            raise
        self._abort([v.reservation for v in vacancies if v.is_reserved and v.root is None])
        await self._commit(
            [m.Filled(v.reservation, v.root) for v in vacancies if v.root is not None]
        )

    async def prefetch(self, digests: Sequence[Digest]) -> int:
        """Have chunks brought into the host tier ahead of need; return how many will come."""
        request = m.Prefetch(*self._head(), check_digests(digests))
        return (await self._connection.call(request, m.Done, self._timeout_seconds)).count

    async def hint(
        self, digests: Sequence[Digest], kind: HintKind, *, seconds: int = 0, host: str = ""
    ) -> int:
        """Say what is expected of a conversation (see `messages.Hint`); return its chunks here."""
        request = m.Hint(*self._head(), check_digests(digests), kind, seconds, host)
        return (await self._connection.call(request, m.Done, self._timeout_seconds)).count

    async def pin(self, digests: Sequence[Digest], *, hard: bool = False) -> int:
        """Pin the chunks that are present; return their number."""
        request = m.Pin(*self._head(), check_digests(digests), hard)
        return (await self._connection.call(request, m.Done, self._timeout_seconds)).count

    async def unpin(self, digests: Sequence[Digest]) -> int:
        """End the pins on chunks; return how many had one."""
        request = m.Unpin(*self._head(), check_digests(digests))
        return (await self._connection.call(request, m.Done, self._timeout_seconds)).count

    async def delete(self, digests: Sequence[Digest], *, damaged: bool = False) -> m.Done:
        """Remove chunks, perhaps as *damaged*; those in use are counted as busy and stay."""
        request = m.Delete(*self._head(), check_digests(digests), damaged)
        return await self._connection.call(request, m.Done, self._timeout_seconds)

    async def _commit(self, filled: Sequence[m.Filled]) -> None:
        if not filled:
            return
        patience = PATIENCE_SECONDS if self.attached.through else self._timeout_seconds
        request = m.Commit(
            self._connection.next_id(),
            deadline_ms(patience),
            list(filled),
            self.attached.traceparent(),
        )
        committed = await self._connection.call(
            request, m.Committed, patience + self._timeout_seconds
        )
        for failure in committed.failures:
            raise from_code(failure.code, failure.message)

    def _head(self) -> tuple[int, int, int]:
        return self._connection.next_id(), self._deadline(), self.attached.number

    def _deadline(self) -> int:
        return deadline_ms(self._timeout_seconds)

    def _abort(self, reservations: list[int]) -> None:
        if reservations:
            request = m.Abort(self._connection.next_id(), self._deadline(), reservations)
            with contextlib.suppress(UnavailableError):
                self._connection.post(request)

    def _let_go(self, lease: int) -> None:
        request = m.Release(self._connection.next_id(), self._deadline(), [lease])
        with contextlib.suppress(UnavailableError):
            self._connection.post(request)
