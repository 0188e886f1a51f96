"""Between a tier and those who use it: time-outs, a breaker, counters and a meter.

A tier that fails is left alone for a while, and what is only there counts as missing. It is
then probed until it answers; nobody has to restart anything.

closed --3 failures, or 1 s of trouble--> open --probe succeeds--> closed, on trial
                                          ^  |                        |
                                          +--+ probe fails: twice     | first failure: open
                                               the pause              | first success: closed
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Final, TypeVar

import msgspec

from kvstore.errors import TierError
from kvstore.hashing import Digests64
from kvstore.limits import (
    BREAKER_FAILURES_MAX,
    BREAKER_PAUSE_MAX_SECONDS,
    BREAKER_PAUSE_MIN_SECONDS,
    BREAKER_TROUBLE_MAX_SECONDS,
    TIER_BANDWIDTH_FLOOR_BYTES,
    TIER_READS_MAX,
    TIER_TIMEOUT_SECONDS,
)
from kvstore.tiers.base import Recovered, RemoteTier, Shard, SharedTier, TierUsage
from kvstore.tiers.meter import Meter
from kvstore.types import Digest, NamespaceId, Place, TierKind

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class GuardCounters(msgspec.Struct, kw_only=True):
    """What one tier was asked and how it went."""

    read_chunks: int = 0
    read_bytes: int = 0
    read_chunks_gone: int = 0
    write_chunks: int = 0
    write_bytes: int = 0
    write_chunks_refused: int = 0
    evict_chunks: int = 0
    remove_chunks: int = 0
    find_requests: int = 0
    find_chunks: int = 0
    failures: int = 0
    timeouts: int = 0
    refused_while_open: int = 0
    breaker_trips: int = 0


class Breaker:
    """When to leave a tier alone. No clock of its own: *now* is an argument."""

    def __init__(self) -> None:
        self.is_open = False
        self.pause_seconds = BREAKER_PAUSE_MIN_SECONDS
        self._failures = 0
        self._troubled_since = 0.0
        self._is_on_trial = False

    def begin_on_trial(self) -> None:
        """Open at the first failure, until a call succeeds: nothing speaks for the tier yet."""
        self._is_on_trial = True

    def succeeded(self) -> None:
        """Note that a call was answered."""
        self._failures = 0
        if not self.is_open:
            self._is_on_trial = False
            self.pause_seconds = BREAKER_PAUSE_MIN_SECONDS

    def failed(self, began_at: float, now: float) -> bool:
        """Note that a call made at *began_at* has failed; return whether this opens the breaker."""
        if not self._failures:
            self._troubled_since = began_at
        self._troubled_since = min(self._troubled_since, began_at)
        self._failures += 1
        is_enough = (
            self._is_on_trial
            or self._failures >= BREAKER_FAILURES_MAX
            or now - self._troubled_since >= BREAKER_TROUBLE_MAX_SECONDS
        )
        if self.is_open or not is_enough:
            return False
        self.is_open = True
        return True

    def probed(self, *, answered: bool) -> None:
        """Note how a probe went: one that was answered closes the breaker, on trial."""
        self.pause_seconds = min(2 * self.pause_seconds, BREAKER_PAUSE_MAX_SECONDS)
        if answered:
            self.is_open = False
            self._is_on_trial = True
            self._failures = 0


class GuardedTier:
    """A remote tier that never takes longer than it may. Every failure is a `TierError`.

    A call that is given up may still be going on in the tier. *let_go* is called when it has
    ended, in every case once; until then the memory that it was given is not free.
    """

    def __init__(
        self,
        tier: RemoteTier,
        *,
        clock: Callable[[], float],
        timeout_seconds: float = TIER_TIMEOUT_SECONDS,
    ) -> None:
        self.tier: Final = tier
        self.kind: Final[TierKind] = tier.kind
        self.reads_max: Final[int] = getattr(tier, "reads_max", TIER_READS_MAX)
        self.is_shared: Final = hasattr(tier, "find") and tier.kind is not TierKind.DISK
        self.counters = GuardCounters()
        self.reads = Meter(clock)
        self.writes = Meter(clock)
        self.on_change: Callable[[], None] = lambda: None
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._breaker = Breaker()
        self._opened = asyncio.Event()
        self._going_on: set[object] = set()

    @property
    def is_usable(self) -> bool:
        """Whether the tier is asked at present."""
        return not self._breaker.is_open

    def usage(self) -> TierUsage:
        """Return how full the tier is."""
        return self.tier.usage()

    async def read(
        self,
        shard: Shard,
        place: Place,
        target: memoryview,
        let_go: Callable[[], None],
        table: Digests64 | None = None,
    ) -> bool:
        """See `RemoteTier.read`."""
        size = shard.size_bytes
        began_at, moved = self.reads.begin(), 0
        try:
            here = await self._call(self.tier.read(shard, place, target, table), size, let_go)
            moved = size if here else 0
        finally:
            self.reads.end(began_at, moved)
        self.counters.read_chunks += here
        self.counters.read_bytes += moved
        self.counters.read_chunks_gone += not here
        return here

    async def write(
        self, shard: Shard, source: memoryview, let_go: Callable[[], None]
    ) -> Place | None:
        """See `RemoteTier.write`."""
        size = shard.size_bytes
        began_at, moved = self.writes.begin(), 0
        try:
            place = await self._call(self.tier.write(shard, source), size, let_go)
            moved = 0 if place is None else size
        finally:
            self.writes.end(began_at, moved)
        self.counters.write_chunks += place is not None
        self.counters.write_bytes += moved
        self.counters.write_chunks_refused += place is None
        return place

    async def remove(self, shard: Shard, place: Place) -> bool:
        """See `RemoteTier.remove`."""
        was_here = await self._call(self.tier.remove(shard, place))
        self.counters.remove_chunks += was_here
        return was_here

    async def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """See `RemoteTier.introduce`."""
        await self._call(self.tier.introduce(namespace, manifest))

    async def find(
        self, namespace: NamespaceId, digests: Sequence[Digest]
    ) -> list[list[Recovered]]:
        """See `SharedTier.find`."""
        shared: SharedTier = self.tier  # type: ignore[assignment]  # as `is_shared` says
        assert self.is_shared, f"tier {self.kind.name} is asked only for what was put there"
        found = await self._call(shared.find(namespace, digests))
        self.counters.find_requests += 1
        self.counters.find_chunks += sum(map(bool, found))
        return found

    async def check(self) -> None:
        """Find out whether the tier answers, as with any other call: see `RemoteTier.probe`."""
        await self._call(self.tier.probe())

    async def greet(self) -> None:
        """Find out whether the tier answers, before anybody needs it; if not, it is left alone."""
        self._breaker.begin_on_trial()
        began_at = self._clock()
        try:
            await self._bounded(self.tier.probe(), self._timeout_seconds, _nothing)
        except TierError as error:
            self._failed(began_at, error)
        else:
            self._breaker.succeeded()

    async def keep_probing(self) -> None:
        """Whenever the breaker is open, probe the tier until it answers; until cancelled."""
        while True:
            await self._opened.wait()
            await asyncio.sleep(self._breaker.pause_seconds)
            try:
                await self._bounded(self.tier.probe(), self._timeout_seconds, _nothing)
            except TierError as error:
                log.info("tier still failing", extra=self._fields(error))
                self._breaker.probed(answered=False)
            else:
                self._breaker.probed(answered=True)
                self._opened.clear()
                log.info("tier answers again", extra={"tier": self.kind.name.lower()})
                self.on_change()

    async def _call(
        self,
        asked: Coroutine[object, object, Answer],
        size_bytes: int = 0,
        let_go: Callable[[], None] = lambda: None,
    ) -> Answer:
        if self._breaker.is_open:
            asked.close()
            let_go()
            self.counters.refused_while_open += 1
            raise TierError(f"the {self.kind.name.lower()} tier is not asked while it fails")
        began_at = self._clock()
        timeout = self._timeout_seconds + size_bytes / TIER_BANDWIDTH_FLOOR_BYTES
        try:
            answer = await self._bounded(asked, timeout, let_go)
        except TierError as error:
            self._failed(began_at, error)
            raise
        self._breaker.succeeded()
        return answer

    async def _bounded(
        self, asked: Awaitable[Answer], seconds: float, let_go: Callable[[], None]
    ) -> Answer:
        """Wait for *asked* up to *seconds*; whatever it raises is a `TierError`."""
        going_on = asyncio.ensure_future(asked)
        self._going_on.add(going_on)

        def ended(_: object) -> None:
            self._going_on.discard(going_on)
            if not going_on.cancelled():
                going_on.exception()  # seen, also when nobody waits for it any more
            let_go()

        going_on.add_done_callback(ended)
        try:
            await asyncio.wait({going_on}, timeout=seconds)
        finally:
            is_over = going_on.done()
            going_on.cancel()
        if not is_over:
            self.counters.timeouts += 1
            raise TierError(f"no answer within {seconds:.1f} s")
        if going_on.cancelled():
            raise TierError("the tier gave the call up")
        error = going_on.exception()
        if error is None:
            return going_on.result()
        if isinstance(error, TierError):
            raise error
        log.error("tier fails in a way that it should not", exc_info=error)
        raise TierError(f"{type(error).__name__}: {error}") from error

    def _failed(self, began_at: float, error: TierError) -> None:
        self.counters.failures += 1
        if self._breaker.failed(began_at, self._clock()):
            self.counters.breaker_trips += 1
            log.warning("tier left alone", extra=self._fields(error))
            self._opened.set()
            self.on_change()

    def _fields(self, error: TierError) -> dict[str, object]:
        return {
            "tier": self.kind.name.lower(),
            "reason": str(error),
            "pause_seconds": self._breaker.pause_seconds,
        }


def _nothing() -> None:
    """Let go of nothing."""
