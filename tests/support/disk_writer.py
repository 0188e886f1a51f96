"""A process that writes to a disk tier and removes from it, telling what it has done, until it is
killed."""

from __future__ import annotations

import asyncio
import random  # noqa: TID251  # every Random here is made from a seed
from multiprocessing.connection import Connection
from pathlib import Path

from kvstore.limits import KIB, MIB
from kvstore.tiers.base import Shard
from kvstore.types import Place
from tests.support.disks import disk_tier, number_of, payload_of, recovered, shard_of

CAPACITY = 12 * MIB
LANES = 3
SIZES = (700, 64 * KIB, 300 * KIB + 1, 2 * MIB + 5)


def run(path: Path, seed: int, tell: Connection) -> None:
    """Work on the tier in *path* for ever. Tells ("kept", n) after, ("removing", n) before."""
    asyncio.run(_work(path, random.Random(seed), tell))


async def _work(path: Path, rng: random.Random, tell: Connection) -> None:
    async with disk_tier(path, CAPACITY) as tier:
        kept: dict[int, tuple[Shard, Place]] = {}
        for shard, place in recovered(tier):
            kept[number_of(shard)] = shard, place
        numbers = iter(range(max(kept, default=0) + 1, 10**9))
        tell.send(("ready", 0))

        async def lane() -> None:
            for number in numbers:
                shard = shard_of(number, rng.choice(SIZES))
                source = memoryview(payload_of(number, shard.size_bytes))
                while (place := await tier.write(shard, source)) is None:
                    victim = rng.choice(list(kept))
                    tell.send(("removing", victim))
                    await tier.remove(*kept.pop(victim))
                kept[number] = shard, place
                tell.send(("kept", number))

        await asyncio.gather(*(lane() for _ in range(LANES)))
