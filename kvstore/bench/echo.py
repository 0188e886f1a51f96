"""The floor of every round trip: a server that only counts bytes, and a blocking client.

A request says how long the reply shall be, so that both have the sizes of the call that they
are compared with. The server is an asyncio protocol on the daemon's own kind of event loop.

Run as `python -m kvstore.bench.echo SOCKET`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from pathlib import Path
from typing import Final, Self, cast

import uvloop

from kvstore.bench.daemon import ChildProcess

_HEADER: Final = struct.Struct("<II")
_RECEIVE_BYTES: Final = 256 * 1024
_READY_SECONDS_MAX: Final = 10.0


class EchoProtocol(asyncio.Protocol):
    """Answers a request once all of it is there."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep *transport*."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer all requests that *data* completes."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            length, reply_length = _HEADER.unpack_from(self._buffer)
            if len(self._buffer) < length:
                return
            del self._buffer[:length]
            self._transport.write(bytes(reply_length))


class EchoClient:
    """Blocking calls of an echo server, with nothing between them and the socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._received = bytearray(_RECEIVE_BYTES)

    def call(self, request: bytes, reply_bytes: int) -> None:
        """Send *request*, made by `request_of`, and receive its reply."""
        self._socket.sendall(request)
        while reply_bytes > 0:
            received = self._socket.recv_into(self._received)
            assert received, "the echo server is alive"
            reply_bytes -= received

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class EchoServer(ChildProcess):
    """An echo server in its own process, and a client of it."""

    def __init__(self) -> None:
        super().__init__(lambda socket: ["-m", "kvstore.bench.echo", str(socket)])
        self._client: EchoClient | None = None
        self.wait_until(self._connect, _READY_SECONDS_MAX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.client.close()
        super().__exit__(*details)

    @property
    def client(self) -> EchoClient:
        """The connection that has been open since the server was ready."""
        assert self._client is not None, "the server is ready"
        return self._client

    def _connect(self) -> bool:
        with contextlib.suppress(OSError):
            self._client = EchoClient(self.socket)
        return self._client is not None


def request_of(request_bytes: int, reply_bytes: int) -> bytes:
    """Return a request of *request_bytes* that asks for *reply_bytes*."""
    assert request_bytes >= _HEADER.size, "a request holds its header"
    return _HEADER.pack(request_bytes, reply_bytes) + bytes(request_bytes - _HEADER.size)


async def _serve(path: Path) -> None:
    server = await asyncio.get_running_loop().create_unix_server(EchoProtocol, str(path))
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(sys.argv[1])))
