"""A store with a device tier over the stand-in, its mover, and engines that fill the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from kvstore.gpu.device import Event, Wait, host_bytes, wait_for
from kvstore.gpu.standin import Standin
from kvstore.hashing import block_digests, root_of
from kvstore.limits import MIB
from kvstore.store.device import DeviceRoom
from kvstore.store.store import Granted
from kvstore.tiers.device import DeviceTier
from kvstore.types import Digest, HeadRange, ReserveOutcome, TierKind
from tests.support.making import make_payload
from tests.support.stores import Engine, write_chunk
from tests.support.tiers import Slower, Tiers
from tests.support.waiting import DEADLINE_SECONDS

DEVICE, HOST = TierKind.DEVICE, TierKind.HOST
BOTH = DEVICE | HOST


def impatient(event: Event) -> None:
    """Wait for an event, and lose patience soon."""
    wait_for(event, seconds=0.05)


async def until(condition: Callable[[], object]) -> None:
    """Return once *condition* is true; fails the test without that."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110  # tests alone look at it
            await asyncio.sleep(0.001)


class PooledTiers(Tiers):
    """Tiers whose fastest is a pool of *pool_bytes*, on a stand-in that can be told to fail."""

    def __init__(
        self,
        *,
        pool_bytes: int = MIB,
        capacity_bytes: int = 4 * MIB,
        slower: Sequence[Slower] = (),
        timeout_seconds: float = DEADLINE_SECONDS,
        wait: Wait = wait_for,
    ) -> None:
        self.device = Standin(np.random.default_rng(1))
        self.tier = DeviceTier(self.device, self.device.pools().make(pool_bytes), wait=wait)
        super().__init__(
            [Slower(self.tier, "never"), *slower],
            capacity_bytes=capacity_bytes,
            timeout_seconds=timeout_seconds,
        )
        self.guard = self.guards[DEVICE]
        self.room = DeviceRoom(self.store, self.guard, self.mover.bring)
        self.store.device = self.room

    async def run(self) -> None:
        """Move between tiers, and bring up into the pool."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.mover.run())
            group.create_task(self.room.promotions.run())

    async def settle(self) -> None:
        """Wait until nothing is being moved, up or down, or waits to be."""
        while self.mover.is_busy or not self.room.promotions.is_idle:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    def be_patient(self) -> None:
        """Give copies all the time that a test has."""
        self.tier._down.wait = self.tier._up.wait = wait_for
        self.guard._timeout_seconds = DEADLINE_SECONDS

    def view(self, extent) -> np.ndarray:
        """Return the bytes of *extent* of the pool."""
        return host_bytes(self.tier.pool.address + extent.offset, extent.size_bytes)

    def reserve(
        self,
        engine: Engine,
        digests: Sequence[Digest],
        *,
        parent: Digest | None = None,
        heads: HeadRange | None = None,
    ) -> list[Granted]:
        wanted = heads or engine.manifest.all_heads
        return self.store.reserve(
            engine.session, engine.space, digests, parent=parent, heads=wanted, pooled=True
        )

    def fill(self, engine: Engine, digest: Digest, place: Granted) -> None:
        """Write and commit what was reserved, wherever that is."""
        payload = make_payload(digest, place.extent.size_bytes)
        if place.is_pooled:
            self.view(place.extent)[:] = np.frombuffer(payload, np.uint8)
            root = root_of(block_digests(payload))
        else:
            root = write_chunk(self.store, place.extent, payload)
        self.store.commit(engine.session, place.reservation, root)

    def put(self, engine: Engine, digests: Sequence[Digest], **words) -> list[bool]:
        """Store *digests*; return for each that was new whether it went to the pool."""
        places = self.reserve(engine, digests, **words)
        for digest, place in zip(digests, places, strict=True):
            if place.outcome is ReserveOutcome.RESERVED:
                self.fill(engine, digest, place)
        return [one.is_pooled for one in places if one.outcome is ReserveOutcome.RESERVED]

    def bits(self, engine: Engine, digests: Sequence[Digest]) -> list[int]:
        """Return the tiers that have each of *digests*."""
        slots = [engine.space.find(digest) for digest in digests]
        return [0 if slot < 0 else self.store.index.tiers_of(slot) for slot in slots]

    def read(self, engine: Engine, digests: Sequence[Digest]) -> list[bytes]:
        """Load what an engine on the device has at hand; return the bytes, from where they lie."""
        heads = engine.manifest.all_heads
        loading = self.store.begin_load(
            engine.session, engine.space, digests, heads, engine.now, direct=BOTH
        )
        lease, chunks = self.store.end_load(loading, len(loading.slots))
        found = [
            bytes(self.view(self.room.place_of(slot, shard)))
            if loading.is_pooled(shard)
            else bytes(self.store.host.view(shard.extent))
            for slot, chunk in zip(loading.slots, chunks, strict=False)
            for shard in chunk
        ]
        if lease:
            self.store.release(engine.session, [lease])
        return found
