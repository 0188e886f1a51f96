"""A store over several tiers with its mover, without a daemon; slower tiers are scripted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import NamedTuple

from kvstore.limits import MIB
from kvstore.metrics import Counters
from kvstore.store.admission import Admission
from kvstore.store.mover import Mover
from kvstore.store.promotion import PendingLoad
from kvstore.store.quota import Share, Shares
from kvstore.store.route import Answer, WritePolicy
from kvstore.store.shelves import SlowTier
from kvstore.store.store import Loading, Store
from kvstore.store.transcode import Transcoder
from kvstore.tiers.fake import FakeTier, Fault
from kvstore.tiers.guard import GuardedTier
from kvstore.tiers.host import HostTier
from kvstore.transfer.arena import Arena
from kvstore.types import Digest, HeadRange, TierKind
from tests.support.stores import LEASE_TTL_SECONDS, Engine

DISK, REDIS = TierKind.DISK, TierKind.REDIS
ALONE = (Share(""),)


async def at_once(work: Callable[[], Answer]) -> Answer:
    """Run *work* here and now: no thread, so that a run can be repeated."""
    return work()


class Slower(NamedTuple):
    """One slower tier to test with."""

    tier: FakeTier
    policy: WritePolicy = "back"
    admission: Admission | None = None
    codec: str = ""


class Tiers:
    """A store, its mover and the tiers below; `Engine`s write to it and read from it."""

    def __init__(
        self,
        slower: Sequence[Slower],
        *,
        capacity_bytes: int = MIB,
        eviction: str = "lru",
        tenants: Sequence[Share] = ALONE,
        timeout_seconds: float = 1.0,
        checksums: bool = True,
    ) -> None:
        self.clock = asyncio.get_running_loop().time
        host = HostTier(Arena.create(capacity_bytes), checksums=checksums)
        self.store = Store(
            host,
            eviction=eviction,
            lease_ttl_seconds=LEASE_TTL_SECONDS,
            counters=Counters(),
            tenants=tenants,
            slower=[_known(one.tier, tenants) for one in slower],
        )
        self.mover = Mover(self.store, clock=self.clock, in_thread=at_once)
        self.guards = {
            one.tier.kind: GuardedTier(one.tier, clock=self.clock, timeout_seconds=timeout_seconds)
            for one in slower
        }
        for one in slower:
            transcoder = Transcoder(one.codec) if one.codec else None
            self.mover.add(self.guards[one.tier.kind], one.policy, one.admission, transcoder)

    def engine(self, manifest, session: int = 1) -> Engine:
        return Engine(self.store, manifest, session)

    async def run(self) -> None:
        """Do what is to be done in the background, until cancelled."""
        await self.mover.run()

    async def settle(self) -> None:
        """Wait until nothing is being moved or waits to be."""
        while self.mover.is_busy:  # noqa: ASYNC110  # tests alone look at it
            await asyncio.sleep(0.001)

    async def load(
        self, engine: Engine, digests: Sequence[Digest], heads: HeadRange | None = None
    ) -> list[bytes]:
        """Load as a session does, without a deadline; return the bytes of each chunk."""
        loading, pending, answered = self.ask(engine, digests, heads)
        del pending
        count = await answered
        lease, chunks = self.store.end_load(loading, count)
        got = [
            b"".join(bytes(self.store.host.view(shard.extent)) for shard in chunk)
            for chunk in chunks
        ]
        if lease:
            self.store.release(engine.session, [lease])
        return got

    def ask(
        self,
        engine: Engine,
        digests: Sequence[Digest],
        heads: HeadRange | None = None,
        *,
        deadline: float = 1e9,
    ) -> tuple[Loading, PendingLoad, asyncio.Future[int]]:
        """Begin a load; its future has the number of chunks that came."""
        answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        wanted = heads or engine.manifest.all_heads
        loading = self.store.begin_load(engine.session, engine.space, digests, wanted, engine.now)
        pending = self.mover.load(loading, digests, deadline, answered.set_result)
        return loading, pending, answered

    def evict_all(self) -> None:
        """Let every chunk leave the host tier."""
        while (slot := self.store.room.next_victim(0, 1)) >= 0:
            self.store.room.evict(slot)


def _known(tier: FakeTier, tenants: Sequence[Share]) -> SlowTier:
    capacity = tier.usage().capacity_bytes
    shares = Shares(tier.kind.name.lower(), capacity, tenants)
    return SlowTier(tier.kind, "lru", shares)


@contextlib.asynccontextmanager
async def running(tiers: Tiers) -> AsyncIterator[Tiers]:
    """Let the mover of *tiers* work inside the block; the store's laws hold behind it."""
    task = asyncio.create_task(tiers.run())
    await asyncio.sleep(0)
    try:
        yield tiers
        await tiers.settle()
        tiers.store.check()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        tiers.store.host.close()


def fake(
    kind: TierKind = REDIS,
    script: Iterable[tuple[int, Fault]] = (),
    capacity_bytes: int = 64 * MIB,
) -> FakeTier:
    return FakeTier(capacity_bytes, script, kind=kind)
