"""One connection to the daemon, shared by any number of threads.

Requests are sent as they come; whichever waiting thread holds the reader's place reads for
all. Any failure ends the connection for good, and with it the session: a reply that is still
outstanding can then never be taken for another's, and the daemon frees what it had promised.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

from kvstore.errors import FrameError, KVStoreError, UnavailableError, from_code
from kvstore.limits import DEADLINE_MAX_MS
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader, frame
from kvstore.types import BytesLike

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Reply = TypeVar("Reply", bound=m.Message)

_RECEIVE_BYTES: Final = 256 * 1024
_UNWANTED: Final = None
# How often a thread that waits for bytes looks at its deadline. The kernel does the waiting,
# in the one system call that also receives.
_RECEIVE_TICK_SECONDS: Final = 0.004


class Waiter:
    """The place where one reply will be put.

    Most threads read their reply themselves; only one that finds another reading has an event
    made, because that costs more than the rest of a call.
    """

    __slots__ = ("_event", "reply", "then")

    def __init__(self) -> None:
        self.reply: m.AnyReply | None = None
        self.then: Callable[[m.AnyReply], None] | None = None
        self._event: threading.Event | None = None

    def sleep(self, seconds: float) -> None:
        """Return when woken, or after *seconds*; the first time at once.

        Whatever happened before there was an event has woken nobody, so the caller looks at
        everything again.
        """
        if self._event is None:
            self._event = threading.Event()
            return
        self._event.wait(seconds)
        self._event.clear()

    def wake(self) -> None:
        """End the sleep of the thread that waits here, if it sleeps."""
        if self._event is not None:
            self._event.set()


class Connection:
    """A session with the daemon at *path*. Thread-safe. All failures are typed errors."""

    def __init__(
        self, path: Path, *, client: str, timeout_seconds: float, tenant: str = ""
    ) -> None:
        self.path = path
        self.arena_fd: int | None = None
        self._pool_fd = -1
        self._taking_fd = threading.Lock()
        self._expects_fd = True
        self._ids = itertools.count(1)
        self._waiters: dict[int, Waiter | None] = {}
        self._frames = FrameReader()
        # One for all replies: to allocate as much for each costs more than to receive it.
        self._received = memoryview(bytearray(_RECEIVE_BYTES))
        self._reading = threading.Lock()
        self._sending = threading.RLock()
        self._failure: str | None = None
        self._socket = _connect(path, timeout_seconds)
        self._pid = os.getpid()
        deadline = deadline_ms(timeout_seconds)
        hello = m.Hello(self.next_id(), deadline, m.PROTOCOL_VERSION, client, tenant)
        try:
            self.server = self.call(hello, m.Welcome, timeout_seconds).server
        except KVStoreError:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether the session still stands, as far as is known here."""
        return self._failure is None

    def next_id(self) -> int:
        """Return a request id that this session has not used."""
        return next(self._ids)

    def call(self, request: m.Request, kind: type[Reply], timeout_seconds: float) -> Reply:
        """Send *request* and return its reply, which is of *kind*.

        Raises the error that the daemon answered with, or `UnavailableError` when there is
        no answer in time, which also ends the connection.
        """
        return self.finish(self.begin(request), kind, timeout_seconds)

    def begin(self, request: m.Request) -> Waiter:
        """Send *request*; its reply is had from `finish`."""
        waiter = Waiter()
        self._send(request, waiter)
        return waiter

    def finish(self, waiter: Waiter, kind: type[Reply], timeout_seconds: float) -> Reply:
        """Return the reply that *waiter* stands for; see `call`."""
        return checked(self._wait(waiter, timeout_seconds), kind)

    def finish_slowly(
        self, waiter: Waiter, kind: type[Reply], timeout_seconds: float, alive_seconds: float
    ) -> Reply:
        """Return a reply that may take long; meanwhile the daemon must show that it lives.

        One that gives no sign of life within *alive_seconds* is given up as in `call`.
        """
        ends_at = time.monotonic() + timeout_seconds
        while not self._await(waiter, min(ends_at, time.monotonic() + alive_seconds / 2)):
            if time.monotonic() >= ends_at:
                return self.finish(waiter, kind, 0.0)
            asked = self.begin(m.Ping(self.next_id(), deadline_ms(alive_seconds)))
            self._wait(asked, alive_seconds / 2)
        return self.finish(waiter, kind, timeout_seconds)

    def abandon(self, waiter: Waiter, then: Callable[[m.AnyReply], None]) -> None:
        """Stop waiting; *then* gets the reply whenever it comes, from whoever reads it."""
        waiter.then = then
        reply = waiter.reply
        if reply is not None:
            self._hand_over(waiter, reply)

    def post(self, request: m.Request) -> None:
        """Send *request* and take no interest in its reply."""
        self._send(request, _UNWANTED)

    def expect_fd(self, timeout_seconds: float) -> None:
        """Have the next descriptor taken in, too, until `take_fd`; it would be lost otherwise."""
        self._expects_fd = True
        # Whichever thread reads now does not know it. When this is answered, all that follow do.
        self.call(m.Ping(self.next_id(), deadline_ms(timeout_seconds)), m.Pong, timeout_seconds)

    def take_fd(self) -> int:
        """Return the descriptor that has come, -1 for none; it is the caller's from now on."""
        self._expects_fd = False
        return self._swap_fd(-1)

    def _swap_fd(self, fd: int) -> int:
        with self._taking_fd:
            before, self._pool_fd = self._pool_fd, fd
        return before

    def close(self) -> None:
        """End the session. Idempotent."""
        self._fail("the connection was closed")

    def _send(self, request: m.Request, waiter: Waiter | None) -> None:
        data = frame(request)
        if os.getpid() != self._pid:
            raise UnavailableError("a connection cannot be used across fork; open a new one")
        with self._sending:
            if self._failure is not None:
                raise UnavailableError(self._failure)
            if waiter is not _UNWANTED:
                self._waiters[request.request_id] = waiter
            try:
                self._socket.sendall(data)
            except OSError as error:
                self._fail(f"{self.path}: {error}")
                raise UnavailableError(f"{self.path}: {error}") from error

    def _wait(self, waiter: Waiter, timeout_seconds: float) -> m.AnyReply:
        # A tick early, because the last one may end that much late.
        ends_at = time.monotonic() + max(
            timeout_seconds - _RECEIVE_TICK_SECONDS, timeout_seconds / 2
        )
        if not self._await(waiter, ends_at):
            self._fail(f"{self.path}: no answer within {timeout_seconds} s")
            raise UnavailableError(self._failure or "")
        assert waiter.reply is not None, "it has been waited for"
        return waiter.reply

    def _await(self, waiter: Waiter, ends_at: float) -> bool:
        """Wait for a reply until *ends_at*; return whether it is there.

        What has come is read in any case: a thread that was held up may be here only then.
        """
        while waiter.reply is None:
            if self._failure is not None:
                raise UnavailableError(self._failure)
            left = ends_at - time.monotonic()
            if self._reading.acquire(blocking=False):
                try:
                    self._read_until(waiter, ends_at)
                finally:
                    if not self.is_open:
                        self._close_socket()
                    self._reading.release()
                    self._pass_on()
            elif left > 0:
                waiter.sleep(left)
            if time.monotonic() >= ends_at:
                break
        return waiter.reply is not None

    def _read_until(self, waiter: Waiter, ends_at: float) -> None:
        """Read for all threads until *waiter* has its reply; failures end the connection."""
        while waiter.reply is None and self._failure is None:
            try:
                for body in self._frames.feed(self._receive()):
                    self._deliver(m.decode_reply(body))
            except BlockingIOError:
                pass
            except (OSError, FrameError) as error:
                self._fail(f"{self.path}: {error}")
            if time.monotonic() >= ends_at:
                return

    def _receive(self) -> BytesLike:
        """Return what has come, good until the next call."""
        data: BytesLike
        if not self._expects_fd:
            data = self._received[: self._socket.recv_into(self._received)]
        else:
            data, fds, _, _ = socket.recv_fds(self._socket, _RECEIVE_BYTES, 1)
            if fds and self.arena_fd is None:
                self.arena_fd = fds[0]
                self._expects_fd = False
            elif fds:
                _close_fd(self._swap_fd(fds[0]))
        if not data:
            raise ConnectionResetError("the daemon closed the session")
        return data

    def _deliver(self, reply: m.AnyReply) -> None:
        if reply.request_id == 0 and isinstance(reply, m.Error):
            self._fail(f"{self.path}: {reply.message}")
            return
        waiter = self._waiters.pop(reply.request_id, _UNWANTED)
        if waiter is not _UNWANTED:
            waiter.reply = reply
            waiter.wake()
            if waiter.then is not None:
                self._hand_over(waiter, reply)

    def _hand_over(self, waiter: Waiter, reply: m.AnyReply) -> None:
        """Give *reply* to whom it was left to, once."""
        then, waiter.then = waiter.then, None
        if then is not None:
            then(reply)

    def _pass_on(self) -> None:
        """Wake the others: one of them reads on, or all learn of the failure."""
        for waiter in list(self._waiters.values()):
            if waiter is not _UNWANTED:
                waiter.wake()

    def _fail(self, reason: str) -> None:
        if os.getpid() != self._pid:
            # A forked child lets go of its copy: the session, and the locks, are its parent's.
            self._failure = reason
            self._socket.close()
            return
        if self._failure is None:
            self._failure = reason
            # Wakes a thread that is reading or sending; that thread then closes the socket.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._reading.acquire(blocking=False):
            try:
                self._close_socket()
            finally:
                self._reading.release()
        self._pass_on()

    def _close_socket(self) -> None:
        """Close, while no other thread can be inside a call on the descriptor.

        What was passed here and nobody has taken goes, too: who asked for it may have given up.
        """
        with self._sending:
            self._socket.close()
        _close_fd(self._swap_fd(-1))


def _close_fd(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def deadline_ms(timeout_seconds: float) -> int:
    """Return the deadline that goes with a wait of *timeout_seconds*, within its limits."""
    return min(max(1, int(timeout_seconds * 1000)), DEADLINE_MAX_MS)


def checked(reply: m.AnyReply, kind: type[Reply]) -> Reply:
    """Return *reply* as the *kind* it must be; raises the error that it stands for."""
    if isinstance(reply, kind):
        return reply
    if isinstance(reply, m.Error):
        raise from_code(reply.code, reply.message)
    raise FrameError(f"the daemon answered with {type(reply).__name__}, not {kind.__name__}")


def _connect(path: Path, timeout_seconds: float) -> socket.socket:
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"no socket to be had: {error.strerror}") from error
    try:
        connection.settimeout(timeout_seconds)
        connection.connect(os.fspath(path))
        connection.settimeout(None)
        _set_timeout(connection, socket.SO_RCVTIMEO, _RECEIVE_TICK_SECONDS)
        _set_timeout(connection, socket.SO_SNDTIMEO, timeout_seconds)
    except OSError as error:
        connection.close()
        raise UnavailableError(f"{path}: {error.strerror or error}") from error
    return connection


def _set_timeout(connection: socket.socket, option: int, seconds: float) -> None:
    whole = int(seconds)
    value = struct.pack("ll", whole, int((seconds - whole) * 1_000_000))
    connection.setsockopt(socket.SOL_SOCKET, option, value)
