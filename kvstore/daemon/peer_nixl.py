"""Bytes of hand-offs by NIXL: what is granted to other daemons here, and what is read from them.

Which chunks, where they lie and for how long is said on the authenticated connection between two
daemons; NIXL moves the bytes and nothing else. Where it does not, they come over that connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvstore.daemon.peer_link import receive
from kvstore.hashing import Digests64, root_of
from kvstore.limits import (
    NIXL_PAUSE_SECONDS,
    NIXL_RESTART_SECONDS,
    NIXL_RUNS_MAX,
    PEER_SPEED_MIN_BYTES_PER_SECOND,
    PEER_TIMEOUT_SECONDS,
)
from kvstore.metrics import Counters
from kvstore.protocol import peering as p
from kvstore.transfer import copies
from kvstore.transfer.arena import Arena
from kvstore.transfer.native import address_of
from kvstore.transfer.nixl import Nixl, NixlError, Run
from kvstore.transfer.wire import Wire, WireProtocolError

log = logging.getLogger(__name__)

Wanted = Sequence[tuple[p.Want, memoryview]]


class _Pause(NamedTuple):
    """Until when a peer is not read from, and why."""

    ends_at: float
    reason: str


class NixlReads:
    """How the daemon *peer* is read from. For the threads of the link to it."""

    def __init__(self, nixl: Nixl, peer: str, arena: Arena, counters: Counters) -> None:
        self._nixl = nixl
        self._peer = peer
        self._base = address_of(arena.view)
        self._counters = counters
        self._pause = _Pause(0.0, "")
        self._reason = ""

    def fetch(
        self, wire: Wire, wanted: Wanted, loop: asyncio.AbstractEventLoop
    ) -> Iterator[Digests64 | None] | None:
        """Bring what is *wanted* here, and yield the digests of each, or None where it has gone.

        Returns None when it cannot be done, and nothing is being done any more: *wire* is as it
        was. Raises `WireError` as any use of it, also for bytes that are not those announced.
        """
        try:
            is_here = self._read(wire, wanted, loop)
        except NixlError as error:
            loop.call_soon_threadsafe(self._fell_back, str(error))
            return None
        came = zip(wanted, is_here, strict=True)
        size_bytes = sum(len(target) for (_, target), here in came if here)
        loop.call_soon_threadsafe(self._came, size_bytes)
        return _checked(wire, wanted, is_here)

    def _read(self, wire: Wire, wanted: Wanted, loop: asyncio.AbstractEventLoop) -> Sequence[bool]:
        """Return which of *wanted* have been read; raises `NixlError`."""
        pause = self._pause
        if time.monotonic() < pause.ends_at:
            raise NixlError(pause.reason)
        if self._nixl.agent is None:
            raise NixlError(self._nixl.reason)
        if len(wanted) > NIXL_RUNS_MAX:
            raise NixlError(f"{len(wanted)} shards at once, at most {NIXL_RUNS_MAX}")
        granted = self._ask(wire, wanted)
        is_read = False
        try:
            if any(run.size_bytes for run in granted.runs):
                bringing = self._bring(granted, wanted)
                asyncio.run_coroutine_threadsafe(bringing, loop).result()
            is_read = True
        except NixlError as error:
            self._pause = _Pause(time.monotonic() + NIXL_PAUSE_SECONDS, str(error))
            raise
        finally:
            wire.begin(PEER_TIMEOUT_SECONDS)
            wire.send_frame(p.encode(p.Returned(is_read)))
        return [run.size_bytes > 0 for run in granted.runs]

    def _ask(self, wire: Wire, wanted: Wanted) -> p.Granted:
        """Return where what is wanted lies there; raises `NixlError` when it is not granted."""
        # Twice: it may have to bring them up from a slower tier.
        wire.begin(2 * PEER_TIMEOUT_SECONDS, patient=True)
        asked = p.Grant(self._nixl.known(self._peer), [want for want, _ in wanted])
        wire.send_frame(p.encode(asked))
        answer = receive(wire)
        if isinstance(answer, p.NotGranted):
            reason = f"it grants nothing: {answer.reason}"
            self._pause = _Pause(time.monotonic() + NIXL_RESTART_SECONDS, reason)
            raise NixlError(reason)
        sizes = [len(target) for _, target in wanted]
        if not isinstance(answer, p.Granted) or not _fits(answer.runs, sizes):
            wire.is_broken = True
            raise WireProtocolError(f"{answer!r:.80} in place of a grant of {len(sizes)} shards")
        return answer

    async def _bring(self, granted: p.Granted, wanted: Wanted) -> None:
        await self._nixl.meet(self._peer, granted.agent, granted.metadata)
        runs = [
            Run(address_of(target) - self._base, granted.address + run.offset, run.size_bytes)
            for (_, target), run in zip(wanted, granted.runs, strict=True)
            if run.size_bytes
        ]
        size_bytes = sum(run.size_bytes for run in runs)
        seconds = PEER_TIMEOUT_SECONDS + size_bytes / PEER_SPEED_MIN_BYTES_PER_SECOND
        await self._nixl.read(self._peer, runs, seconds)

    # --- on the event loop --------------------------------------------------------------

    def _came(self, size_bytes: int) -> None:
        self._reason = ""
        self._counters.peer_nixl_bytes += size_bytes

    def _fell_back(self, reason: str) -> None:
        self._counters.peer_nixl_fallbacks += 1
        if reason != self._reason:
            log.warning("tcp in place of NIXL", extra={"peer": self._peer, "reason": reason})
        self._reason = reason


def _fits(runs: Sequence[p.GrantedRun], sizes: Sequence[int]) -> bool:
    """Return whether each of *runs* is what was asked for, or says that it has gone."""
    return len(runs) == len(sizes) and all(
        run.size_bytes in {0, size} for run, size in zip(runs, sizes, strict=True)
    )


def _checked(wire: Wire, wanted: Wanted, is_here: Sequence[bool]) -> Iterator[Digests64 | None]:
    """Yield the digests of what has come, compared with the roots that were announced."""
    for (want, target), here in zip(wanted, is_here, strict=True):
        if not here:
            yield None
            continue
        blocks = copies.digest_blocks_at(address_of(target), len(target))
        if root_of(blocks) != want.shard.root:
            wire.is_broken = True
            raise WireProtocolError("bytes came that are not those announced")
        yield blocks
