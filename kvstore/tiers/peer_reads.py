"""Reads of one other daemon, gathered: what waits together is asked for together.

A request names as many chunks as its bounds allow, and a few are under way at once. What has come
is answered at once, whatever becomes of the rest of its request.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from kvstore.errors import KVStoreError, TierError
from kvstore.hashing import Digests64
from kvstore.limits import (
    PEER_LANES,
    PEER_SPEED_MIN_BYTES_PER_SECOND,
    PEER_TIMEOUT_SECONDS,
    PULL_BATCH_BYTES,
    PULL_BATCH_CHUNKS_MAX,
)
from kvstore.protocol import peering as p
from kvstore.transfer.settling import settle

log = logging.getLogger(__name__)

PEER_TIER_SECONDS: Final = 4 * PEER_TIMEOUT_SECONDS
"""What a call may take besides its bytes: to wait for others, to dial, and to be answered."""

Came = Digests64 | p.Gone | p.Busy
Wanted = tuple[p.Want, memoryview]


class PeerLine(Protocol):
    """The way to one other daemon. Both raise `TierError`, or worse when it breaks the protocol."""

    async def have(self, request: p.Have) -> p.Holding:
        """Return what it holds, one answer for each digest asked for."""

    async def take(self, wanted: Sequence[Wanted], arrived: Callable[[int, Came], None]) -> None:
        """Fill each target with the shard that is wanted there.

        *arrived* is told of each as it comes, in order: its number, and the digests of its
        blocks, whose root has been compared, or why there are none. Cancelled, it ends when no
        target is touched any more.
        """


class _Read:
    """One shard that is wanted. *ended* is what came of it, None when the peer has failed."""

    __slots__ = ("batch", "ended", "target", "want")

    def __init__(self, want: p.Want, target: memoryview) -> None:
        self.want = want
        self.target = target
        self.ended: asyncio.Future[Came | None] = asyncio.get_running_loop().create_future()
        self.batch: asyncio.Task[None] | None = None


class PeerReads:
    """What is read from the peer at *line*.

    Nothing is asked for while *may_ask* says no. Of every request, *ended* is told when it began
    and what went wrong, if anything.
    """

    def __init__(
        self,
        line: PeerLine,
        clock: Callable[[], float],
        may_ask: Callable[[], bool],
        ended: Callable[[float, Exception | None], None],
    ) -> None:
        self._line = line
        self._clock = clock
        self._may_ask = may_ask
        self._ended = ended
        self._waiting: deque[_Read] = deque()
        self._batches: dict[asyncio.Task[None], Sequence[_Read]] = {}
        self._starting: asyncio.Handle | None = None

    async def read(self, want: p.Want, target: memoryview) -> Came | None:
        """Fill *target* with what is wanted; return what came, or None when the peer fails.

        Cancelled, it breaks off the request that it is part of.
        """
        read = _Read(want, target)
        self._waiting.append(read)
        if self._starting is None:
            # Not before all that is wanted by now is known.
            self._starting = asyncio.get_running_loop().call_soon(self._start)
        try:
            return await asyncio.shield(read.ended)
        except asyncio.CancelledError:
            if read.batch is None and not read.ended.done():
                self._waiting.remove(read)
            elif read.batch is not None and not read.ended.done():
                read.batch.cancel()
                await settle(read.ended)
            raise

    def close(self) -> None:
        """Break off everything. Idempotent."""
        for batch in self._batches:
            batch.cancel()
        self._give_up()

    def _start(self) -> None:
        """Ask for what waits, as far as there is a way free."""
        self._starting = None
        while self._waiting and len(self._batches) < PEER_LANES:
            # Those before may have shown that it does not answer.
            if not self._may_ask():
                self._give_up()
                return
            reads = self._next_batch()
            batch = asyncio.get_running_loop().create_task(self._take(reads), name="peer batch")
            for read in reads:
                read.batch = batch
            self._batches[batch] = reads
            batch.add_done_callback(self._done)

    def _next_batch(self) -> list[_Read]:
        """Return what is to be asked for at once: its share of all, so that every way has some."""
        count = len(self._waiting) + sum(map(len, self._batches.values()))
        share = min(-(-count // PEER_LANES), PULL_BATCH_CHUNKS_MAX)
        reads, size_bytes = [self._waiting.popleft()], 0
        while self._waiting and len(reads) < share:
            size_bytes += len(reads[-1].target)
            if size_bytes + len(self._waiting[0].target) > PULL_BATCH_BYTES:
                break
            reads.append(self._waiting.popleft())
        return reads

    async def _take(self, reads: Sequence[_Read]) -> None:
        wanted = [(read.want, read.target) for read in reads]
        size_bytes = sum(len(read.target) for read in reads)

        def arrived(number: int, came: Came) -> None:
            if not reads[number].ended.done():
                reads[number].ended.set_result(came)

        began_at = self._clock()
        failure: Exception | None = None
        try:
            # Silence on the line ends much sooner, by the line itself.
            seconds = PEER_TIER_SECONDS + size_bytes / PEER_SPEED_MIN_BYTES_PER_SECOND
            async with asyncio.timeout(seconds):
                await self._line.take(wanted, arrived)
        except asyncio.CancelledError:
            # Whoever has lost patience has seen what we have.
            failure = TierError("no answer in time")
            raise
        except (KVStoreError, TimeoutError) as error:
            failure = error
        except Exception as error:
            log.exception("peer not read")
            failure = error
        finally:
            self._ended(began_at, failure)

    def _done(self, batch: asyncio.Task[None]) -> None:
        """Answer who waits for what has not come; go on with others."""
        _fail(self._batches.pop(batch))
        self._start()

    def _give_up(self) -> None:
        """Answer all whose chunks have not been asked for."""
        _fail(self._waiting)
        self._waiting.clear()


def _fail(reads: Iterable[_Read]) -> None:
    for read in reads:
        if not read.ended.done():
            read.ended.set_result(None)
