"""A client made of a bare socket: it sends what it is told, right or wrong."""

from __future__ import annotations

import array
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from kvstore.hashing import block_digests, root_of, table_offset
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader, frame
from kvstore.protocol.manifest import Manifest
from kvstore.types import Digest, ReserveOutcome, Root
from tests.support.waiting import DEADLINE_SECONDS

MINUTE_MS = 60_000


def framed(body: bytes) -> bytes:
    """Return *body* behind its length."""
    return len(body).to_bytes(4, "little") + body


class RawPeer:
    """One connection to the daemon at *path*."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_SECONDS)
        self.socket.connect(os.fspath(path))
        self.arena_fd: int | None = None
        self._reader = FrameReader()
        self._bodies: Iterator[bytes] = iter(())
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        if self.arena_fd is not None:
            os.close(self.arena_fd)
            self.arena_fd = None

    def next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    # --- sending ------------------------------------------------------------------------

    def send(self, *requests: m.Request) -> None:
        self.send_raw(b"".join(map(frame, requests)))

    def send_raw(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, kind: type[m.Request], *fields: object) -> m.AnyReply | None:
        """Send one request and return the next reply."""
        return self.ask_for(MINUTE_MS, kind, *fields)

    def ask_for(self, ms: int, kind: type[m.Request], *fields: object) -> m.AnyReply | None:
        """Send one request with a deadline of *ms* and return the next reply."""
        self.send(kind(self.next_id(), ms, *fields))
        return self.receive()

    # --- receiving ----------------------------------------------------------------------

    def receive(self) -> m.AnyReply | None:
        """Return the next reply, or None when the daemon has closed the session."""
        while True:
            for body in self._bodies:
                return m.decode_reply(body)
            data = self._receive_bytes()
            if not data:
                return None
            self._bodies = self._reader.feed(data)

    def receive_all(self) -> list[m.AnyReply]:
        """Return all replies until the daemon closes the session."""
        return list(iter(self.receive, None))

    def _receive_bytes(self) -> bytes:
        room = socket.CMSG_SPACE(4)
        try:
            data, ancillary, _, _ = self.socket.recvmsg(1 << 16, room)
        except ConnectionResetError:
            return b""
        for _, _, packed in ancillary:
            (self.arena_fd,) = array.array("i", packed[:4])
        return data

    # --- the usual beginning --------------------------------------------------------------

    def hello(self) -> Self:
        assert isinstance(self.ask(m.Hello, m.PROTOCOL_VERSION, "raw"), m.Welcome)
        return self

    def attach(self, manifest: Manifest) -> m.AnyReply | None:
        return self.ask(m.Attach, manifest.encode(), manifest.chunk_bytes)

    def enter(self, manifest: Manifest) -> Self:
        """Say hello and enter the namespace of *manifest*, as number 0."""
        attached = self.hello().attach(manifest)
        assert isinstance(attached, m.Attached), attached
        return self

    def reserve(self, digest: Digest) -> m.Slot:
        """Reserve room for one chunk of namespace 0, which must be had."""
        reserved = self.ask(m.Reserve, 0, [digest])
        assert isinstance(reserved, m.Reserved), reserved
        assert reserved.slots[0].outcome == ReserveOutcome.RESERVED
        return reserved.slots[0]

    def commit(self, slot: m.Slot, root: int) -> list[int]:
        """Commit one reservation and return the codes of what failed."""
        committed = self.ask(m.Commit, [m.Filled(slot.reservation, root)])
        assert isinstance(committed, m.Committed), committed
        return [failure.code for failure in committed.failures]

    def abort(self, slot: m.Slot) -> None:
        """Give back one reservation."""
        assert self.ask(m.Abort, [slot.reservation]) == m.Done(self._last_id, 1)

    def write_chunk(self, offset: int, payload: bytes) -> Root:
        """Put *payload* and its checksum table into the arena; return their root."""
        assert self.arena_fd is not None
        blocks = block_digests(payload)
        with mmap.mmap(self.arena_fd, 0) as arena:
            arena[offset : offset + len(payload)] = payload
            start = offset + table_offset(len(payload))
            arena[start : start + blocks.nbytes] = blocks.tobytes()
        return root_of(blocks)

    def is_alive(self) -> bool:
        """Return whether the session still answers."""
        return isinstance(self.ask(m.Ping, b"alive"), m.Pong)


def error_codes(replies: list[m.AnyReply]) -> list[tuple[int, int]]:
    """Return (request id, code) of every error among *replies*."""
    return [(r.request_id, r.code) for r in replies if isinstance(r, m.Error)]
