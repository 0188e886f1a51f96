"""One connected socket on which no call waits longer than it may, plain or TLS.

Blocking, for one thread at a time; only `abort` is for others. The kernel keeps the time of a
plain socket, which takes fewer calls and fewer changes of thread than Python's time-outs do.
Whatever ends a call early breaks the socket for good: what is still to come can then never be
taken for something else.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final

from kvstore.limits import MIB

_TIMEVAL: Final = struct.Struct("@ll")
# What one call of TLS is given; it copies, so that more would not be sooner.
_TLS_PART_BYTES: Final = MIB


class BoundedSocket(ABC):
    """A connected socket. *stall_seconds* bounds every wait in which no byte moves."""

    other_side: ClassVar[str] = "the other side"

    def __init__(self, connection: socket.socket, stall_seconds: float) -> None:
        self._socket = connection
        self._tls = connection if isinstance(connection, ssl.SSLSocket) else None
        self._stall_seconds = stall_seconds
        self._ends_at = 0.0
        self.is_broken = False
        self.sent_bytes = 0
        if self._tls is None:
            connection.settimeout(None)

    @abstractmethod
    def _failure(self, reason: str, *, is_timeout: bool) -> Exception:
        """Return what is raised when the connection fails, or not all is done in time."""

    def is_quiet(self) -> bool:
        """Return whether the connection still stands and nothing has come unasked."""
        if self.is_broken:
            return False
        try:
            if self._tls is not None:
                if self._tls.pending():
                    return False
                # Under a time-out Python would wait for bytes before it asks for them.
                self._tls.settimeout(0)
            # The socket below: TLS would take bytes off it.
            came = socket.socket.recv(self._socket, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        # TLS has messages of its own, which may come at any time.
        return self._tls is not None and came != b""

    def abort(self) -> None:
        """End whatever another thread is doing here, at once: its next read or write fails."""
        self.is_broken = True
        with contextlib.suppress(OSError):
            # Not what TLS makes of it, which waits and forgets what the other thread uses.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    # --- for those who speak over it ------------------------------------------------------

    def _send(self, parts: Sequence[memoryview]) -> None:
        """Send all of *parts*, as if they were one."""
        left = [part for part in parts if len(part)]
        while left:
            self._bound_wait(socket.SO_SNDTIMEO)
            try:
                if self._tls is not None:
                    sent = self._tls.send(left[0][:_TLS_PART_BYTES])
                else:
                    sent = self._socket.sendmsg(left)
            except OSError as error:
                raise self._broken(error) from error
            self.sent_bytes += sent
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def _receive_some(self, view: memoryview, flags: int = 0) -> int:
        """Receive at least one byte and at most what *view* holds; return how many came."""
        self._bound_wait(socket.SO_RCVTIMEO)
        try:
            size = self._socket.recv_into(view, 0, flags if self._tls is None else 0)
        except OSError as error:
            raise self._broken(error) from error
        if size == 0:
            raise self._fail(f"{self.other_side} has closed the connection")
        return size

    def _fill(self, view: memoryview) -> None:
        """Receive as much as *view* holds."""
        got = 0
        while got < len(view):
            got += self._receive_some(view[got:], socket.MSG_WAITALL)

    def _bound_wait(self, option: int) -> None:
        """Bound the next wait by the deadline and by the time in which nothing moves."""
        if self.is_broken:
            raise self._fail("the connection was ended")
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise self._fail("not done in time", is_timeout=True)
        seconds = min(left, self._stall_seconds)
        try:
            if self._tls is not None:
                self._tls.settimeout(seconds)
            else:
                whole, rest = divmod(max(1, round(seconds * 1e6)), 10**6)
                self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, rest))
        except OSError as error:
            raise self._broken(error) from error

    def _broken(self, error: OSError) -> Exception:
        if isinstance(error, TimeoutError | BlockingIOError):
            return self._fail("nothing moves", is_timeout=True)
        return self._fail(error.strerror or str(error))

    def _fail(self, reason: str, *, is_timeout: bool = False) -> Exception:
        self.is_broken = True
        return self._failure(reason, is_timeout=is_timeout)
