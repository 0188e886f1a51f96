"""One connection between two daemons: small frames, and bytes straight from and to the arena.

A wire is a bounded socket: every call ends by the deadline that `begin` has set, or when no byte
has moved for the time that the wire allows.
"""

from __future__ import annotations

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
    PEER_PART_BYTES,
    PEER_SOCKET_BUFFER_BYTES,
)
from kvstore.transfer import copies
from kvstore.transfer.bounded_socket import BoundedSocket
from kvstore.transfer.native import address_of

_LENGTH: Final = struct.Struct("<I")
_KEEPALIVE: Final = {
    socket.TCP_KEEPIDLE: 10,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
}


class WireError(Exception):
    """The connection failed, or the other side does not keep to the protocol; it is broken."""


class WireTimeoutError(WireError):
    """Nothing has come, or could be sent, in time."""


class WireProtocolError(WireError):
    """The other side has sent what it may not, or other bytes than it announced."""


class Wire(BoundedSocket):
    """A connected socket. *stall_seconds* bounds every wait in which no byte moves."""

    def __init__(self, connection: socket.socket, stall_seconds: float) -> None:
        super().__init__(connection, stall_seconds)
        self._usual_stall_seconds = stall_seconds

    def begin(self, seconds: float, *, patient: bool = False) -> None:
        """Let the calls from now on end within *seconds*; *patient* ones may wait as long."""
        self._ends_at = time.monotonic() + seconds
        self._stall_seconds = seconds if patient else self._usual_stall_seconds

    def close(self) -> None:
        """Close the connection; only for whoever has the wire. Idempotent."""
        self.is_broken = True
        self._socket.close()

    def _failure(self, reason: str, *, is_timeout: bool) -> WireError:
        return WireTimeoutError(reason) if is_timeout else WireError(reason)

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
        """Fill *target* and return the digests of its blocks."""
        digests: Digests64 = np.zeros(block_count(len(target)), dtype=np.uint64)
        for start in range(0, len(target), PEER_PART_BYTES):
            part = target[start : start + PEER_PART_BYTES]
            self._fill(part)
            first = start // CHECKSUM_BLOCK_BYTES
            found = copies.digest_blocks_at(address_of(part), len(part))
            digests[first : first + len(found)] = found
        return digests


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
