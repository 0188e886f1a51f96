"""A faulty way to a server: what comes over it is late, cut, slow, lost or meant for others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Self

Spoil = Callable[["Link", bytes], Awaitable[None]]
"""Does with bytes from the server what the fault wants."""


class Link:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.delivered = 0

    async def deliver(self, chunk: bytes) -> None:
        self.delivered += len(chunk)
        self.client.write(chunk)
        await self.client.drain()

    def reset(self) -> None:
        """End the client's connection with RST, and the server's."""
        raw = self.client.get_extra_info("socket")
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.transport.abort()
        self.server.transport.abort()

    def close(self) -> None:
        """End both connections in order."""
        self.client.close()
        self.server.close()


class FaultyProxy:
    """Forwards to *port* on this host; set `fault` to what shall go wrong from then on."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self.fault: Spoil = faithful
        self.is_swallowing = False
        self.links: list[Link] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for link in self.links:
            link.client.transport.abort()
            link.server.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def mend(self) -> None:
        """Let new bytes pass, and end the connections whose bytes were lost."""
        self.fault, self.is_swallowing = faithful, False
        for link in self.links:
            link.reset()
        self.links.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, forth)
        self.links.append(link)
        for pump in (self._up(reader, link), self._down(back, link)):
            task = asyncio.create_task(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _up(self, reader: asyncio.StreamReader, link: Link) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(1 << 16):
                if not self.is_swallowing:
                    link.server.write(chunk)
                    await link.server.drain()
        link.close()

    async def _down(self, reader: asyncio.StreamReader, link: Link) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(1 << 16):
                await self.fault(link, chunk)
        link.close()


async def faithful(link: Link, chunk: bytes) -> None:
    """Do nothing wrong."""
    await link.deliver(chunk)


async def lost(link: Link, chunk: bytes) -> None:
    """Deliver nothing, while both connections stand."""


def late(seconds: float) -> Spoil:
    """Deliver everything *seconds* later."""

    async def spoil(link: Link, chunk: bytes) -> None:
        await asyncio.sleep(seconds)
        await link.deliver(chunk)

    return spoil


def dripping(size: int, seconds: float) -> Spoil:
    """Deliver *size* bytes every so often."""

    async def spoil(link: Link, chunk: bytes) -> None:
        for start in range(0, len(chunk), size):
            await link.deliver(chunk[start : start + size])
            await asyncio.sleep(seconds)

    return spoil


def cut(size: int, *, with_reset: bool) -> Spoil:
    """Deliver *size* bytes on each connection, then end it."""

    async def spoil(link: Link, chunk: bytes) -> None:
        await link.deliver(chunk[: max(0, size - link.delivered)])
        if link.delivered >= size:
            if with_reset:
                link.reset()
            else:
                link.close()

    return spoil


def flipped_once(offset: int) -> Spoil:
    """Change one bit of the byte at *offset* of all that comes from now on."""
    passed = 0

    async def spoil(link: Link, chunk: bytes) -> None:
        nonlocal passed
        place = offset - passed
        passed += len(chunk)
        if 0 <= place < len(chunk):
            chunk = chunk[:place] + bytes([chunk[place] ^ 1]) + chunk[place + 1 :]
        await link.deliver(chunk)

    return spoil


class Swapped:
    """Delivers to each connection what the server has told the one before it.

    Nobody is told anything before two connections have been answered.
    """

    def __init__(self) -> None:
        self._links: list[Link] = []
        self._waiting: dict[int, list[bytes]] = {}

    async def __call__(self, link: Link, chunk: bytes) -> None:
        if link not in self._links:
            self._links.append(link)
        place = self._links.index(link)
        other = place ^ 1
        self._waiting.setdefault(other, []).append(chunk)
        if len(self._links) > max(place, other):
            for to in (place, other):
                for kept in self._waiting.pop(to, []):
                    await self._links[to].deliver(kept)
