"""Whether engines can be served: found out as an engine would, through the data socket."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from pathlib import Path
from typing import Final, TypeVar

from kvstore.admin.schema import Check, Readiness
from kvstore.client.aio import AsyncConnection
from kvstore.client.connection import deadline_ms
from kvstore.errors import KVStoreError, UnavailableError
from kvstore.limits import DIGEST_SIZE_BYTES, READINESS_SECONDS, READINESS_TIMEOUT_SECONDS
from kvstore.protocol import messages as m
from kvstore.protocol.manifest import Manifest
from kvstore.types import ReserveOutcome

Answer = TypeVar("Answer", bound=m.Message)

_MANIFEST: Final = Manifest(
    model="kvstore/readiness",
    revision="1",
    dtype="opaque",
    layers=1,
    kv_heads=1,
    head_dim=1,
    chunk_tokens=1,
    layout="opaque",
    opaque_bytes=4096,
)
_DIGEST: Final = bytes(DIGEST_SIZE_BYTES)


class Probe:
    """Opens a session, maps the arena, and has room reserved and given back, as engines do.

    Nothing is stored. An answer holds for `READINESS_SECONDS`; those who ask meanwhile share it.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._probed_at = float("-inf")
        self._checks: list[Check] = []
        self._probing = asyncio.Lock()

    async def readiness(self, *, draining: bool) -> Readiness:
        """Return whether engines can be served now."""
        async with self._probing:
            if time.monotonic() - self._probed_at >= READINESS_SECONDS:
                self._checks = [await self._probe()]
                self._probed_at = time.monotonic()
        detail = "the daemon is shutting down" if draining else ""
        checks = [*self._checks, Check(name="draining", ok=not draining, detail=detail)]
        is_ready = all(check.ok for check in checks)
        return Readiness(status="ready" if is_ready else "not ready", checks=checks)

    async def _probe(self) -> Check:
        try:
            async with asyncio.timeout(READINESS_TIMEOUT_SECONDS):
                await self._go_through()
        except (KVStoreError, OSError, TimeoutError) as error:
            detail = str(error) or f"no answer within {READINESS_TIMEOUT_SECONDS} s"
            return Check(name="data path", ok=False, detail=detail)
        return Check(name="data path", ok=True)

    async def _go_through(self) -> None:
        connection = AsyncConnection(self._socket)
        await connection.open("readiness", READINESS_TIMEOUT_SECONDS)
        try:
            await _ask(connection, m.Attach, m.Attached, _MANIFEST.encode(), _MANIFEST.chunk_bytes)
            await _ask(connection, m.Lookup, m.Found, 0, [_DIGEST])
            reserved = await _ask(connection, m.Reserve, m.Reserved, 0, [_DIGEST])
            slot = reserved.slots[0]
            # Without room, as when all that is kept is leased, the answer is what counts.
            if slot.outcome == ReserveOutcome.RESERVED:
                _touch(connection.arena_fd, slot.offset)
                await _ask(connection, m.Abort, m.Done, [slot.reservation])
        finally:
            connection.close()
            if connection.arena_fd is not None:
                os.close(connection.arena_fd)


async def _ask(
    connection: AsyncConnection, kind: type[m.Request], answer: type[Answer], *fields: object
) -> Answer:
    request = kind(connection.next_id(), deadline_ms(READINESS_TIMEOUT_SECONDS), *fields)
    return await connection.call(request, answer, READINESS_TIMEOUT_SECONDS)


def _touch(arena_fd: int | None, offset: int) -> None:
    """Write to the room that was reserved, as an engine would."""
    if arena_fd is None:
        raise UnavailableError("the daemon did not pass its arena")
    with mmap.mmap(arena_fd, _MANIFEST.opaque_bytes, offset=offset) as page:
        page[:] = bytes(len(page))
