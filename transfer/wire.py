"""One connection between two daemons: small frames, and bytes straight from and to the arena.

Blocking, for one thread at a time. Every call ends by the deadline that `begin` has set, or
when no byte has moved for the time that a wire allows. Whatever ends one early breaks the
wire for good: what is still to come can then never be taken for something else.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from kvstore.hashing import Digests64, block_count
from kvstore.limits import (
    CHECKSUM_BLOCK_BYTES,
    FRAME_SIZE_MAX_BYTES,
    MIB,
    PEER_PART_BYTES,
    PEER_SOCKET_BUFFER_BYTES,
)
from kvstore.transfer import copies
from kvstore.transfer.native import address_of

_LENGTH: Final = struct.Struct("<I")
_TIMEVAL: Final = struct.Struct("@ll")
_KEEPALIVE: Final = {
    socket.TCP_KEEPIDLE: 10,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
}
# What one call of TLS is given; it copies, so that more would not be sooner.
_TLS_PART_BYTES: Final = MIB


class WireError(Exception):
    """The connection failed, or the other side does not keep to the protocol; it is broken."""


class WireTimeoutError(WireError):
    """Nothing has come, or could be sent, in time."""


class WireProtocolError(WireError):
    """The other side has sent what it may not, or other bytes than it announced."""


class Wire:
    """A connected socket. *stall_seconds* bounds every wait in which no byte moves."""

    def __init__(self, connection: socket.socket, stall_seconds: float) -> None:
        self._socket = connection
        self._is_tls = isinstance(connection, ssl.SSLSocket)
        self._usual_stall_seconds = stall_seconds
        self._stall_seconds = stall_seconds
        self._ends_at = 0.0
        self.is_broken = False
        self.sent_bytes = 0
        self.received_bytes = 0
        if not self._is_tls:
            connection.settimeout(None)

    def begin(self, seconds: float, *, patient: bool = False) -> None:
        """Let the calls from now on end within *seconds*; *patient* ones may wait as long."""
        self._ends_at = time.monotonic() + seconds
        self._stall_seconds = seconds if patient else self._usual_stall_seconds

    def is_quiet(self) -> bool:
        """Return whether the connection still stands and nothing has come unasked."""
        if self.is_broken:
            return False
        try:
            # The socket below: TLS would take bytes off it.
            came = socket.socket.recv(self._socket, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        # Messages of TLS itself may come at any time; those of ours are in frames.
        return self._is_tls and came != b""

    def abort(self) -> None:
        """End whatever another thread is doing here, at once: its next read or write fails."""
        self.is_broken = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; only for whoever has the wire. Idempotent."""
        self.is_broken = True
        self._socket.close()

    # --- frames -------------------------------------------------------------------------

    def send_frame(self, body: bytes) -> None:
        """Send *body* with its length before it."""
        self.send_frames([body])

    def send_frames(self, bodies: Sequence[bytes]) -> None:
        """Send *bodies*, each with its length before it, at once."""
        framed = b"".join(_LENGTH.pack(len(body)) + body for body in bodies)
        self._send([memoryview(framed)])

    def receive_frame(self) -> bytes:
        """Return the body of the next frame; raises `WireError`."""
        head = bytearray(_LENGTH.size)
        self._fill(memoryview(head))
        (length,) = _LENGTH.unpack(head)
        if not 1 <= length <= FRAME_SIZE_MAX_BYTES:
            self.is_broken = True
            raise WireProtocolError(
                f"a frame of {length} bytes, 1 to {FRAME_SIZE_MAX_BYTES} are allowed"
            )
        body = bytearray(length)
        self._fill(memoryview(body))
        return bytes(body)

    # --- bulk ---------------------------------------------------------------------------

    def send_bytes(self, head: bytes, source: memoryview) -> None:
        """Send the frame *head* and *source* behind it."""
        self._send([memoryview(_LENGTH.pack(len(head))), memoryview(head), source])

    def receive_bytes(self, target: memoryview) -> Digests64:
        """Fill *target* and return the digests of its blocks, taken while they are in a cache."""
        digests: Digests64 = np.zeros(block_count(len(target)), dtype=np.uint64)
        for start in range(0, len(target), PEER_PART_BYTES):
            part = target[start : start + PEER_PART_BYTES]
            self._fill(part)
            first = start // CHECKSUM_BLOCK_BYTES
            found = copies.digest_blocks_at(address_of(part), len(part))
            digests[first : first + len(found)] = found
        return digests

    # --- bytes --------------------------------------------------------------------------

    def _send(self, parts: Sequence[memoryview]) -> None:
        left = [part for part in parts if len(part)]
        while left:
            sent = self._send_some(left)
            self.sent_bytes += sent
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def _send_some(self, parts: list[memoryview]) -> int:
        self._bound_wait(socket.SO_SNDTIMEO)
        try:
            if self._is_tls:
                return self._socket.send(parts[0][:_TLS_PART_BYTES])
            return self._socket.sendmsg(parts)
        except OSError as error:
            raise self._broken(error) from error

    def _fill(self, view: memoryview) -> None:
        got = 0
        while got < len(view):
            self._bound_wait(socket.SO_RCVTIMEO)
            try:
                size = self._socket.recv_into(
                    view[got:], 0, 0 if self._is_tls else socket.MSG_WAITALL
                )
            except OSError as error:
                raise self._broken(error) from error
            if size == 0:
                self.is_broken = True
                raise WireError("the other side has closed the connection")
            got += size
            self.received_bytes += size

    def _broken(self, error: OSError) -> WireError:
        self.is_broken = True
        if isinstance(error, TimeoutError | BlockingIOError):
            return WireTimeoutError("nothing moves")
        return WireError(error.strerror or str(error))

    def _bound_wait(self, option: int) -> None:
        """Bound the next wait by the deadline and by the time in which nothing moves."""
        if self.is_broken:
            raise WireError("the connection was ended")
        left = self._ends_at - time.monotonic()
        if left <= 0:
            self.is_broken = True
            raise WireTimeoutError("not done in time")
        seconds = min(left, self._stall_seconds)
        try:
            if self._is_tls:
                self._socket.settimeout(seconds)
            else:
                whole, rest = divmod(max(1, round(seconds * 1e6)), 10**6)
                self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, rest))
        except OSError as error:
            raise self._broken(error) from error


def prepare(connection: socket.socket) -> None:
    """Set what every connection between daemons has: large buffers, no delay, keep-alive."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, PEER_SOCKET_BUFFER_BYTES)


def dial(
    host: str, port: int, tls: ssl.SSLContext | None, *, timeout_seconds: float
) -> socket.socket:
    """Return a connection to *host*; raises `WireError`."""
    try:
        connection = socket.create_connection((host, port), timeout_seconds)
    except OSError as error:
        raise WireError(f"{host}:{port}: {error.strerror or error}") from error
    try:
        prepare(connection)
        return connection if tls is None else tls.wrap_socket(connection, server_hostname=host)
    except OSError as error:
        connection.close()
        raise WireError(f"{host}:{port}: {error.strerror or error}") from error
    except ValueError as error:
        connection.close()
        raise WireError(f"{host}:{port}: {error}") from error
