"""Daemons without sockets that reserve, publish, evict and give up, until they are killed.

`python -m tests.support.churn PATH KILLS SEED`: each is a fork that goes on from what the one
before it left; after each kill everything that is left is verified. Says "whole" and counts at
the end, or what is wrong.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from itertools import count
from pathlib import Path

import numpy as np

from kvstore.hashing import block_digests, root_of, table_offset
from kvstore.limits import MIB
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.host import HostTier
from kvstore.tiers.kept import KeptArena
from kvstore.tiers.record_layout import READY, Owner
from kvstore.types import Digest, Extent, HeadRange, NamespaceId, Root
from tests.support.making import loose_digest, make_payload

SIZE_BYTES = MIB
SHARD_BYTES_MAX = 70_000
NAMESPACES = 3
STEPS_MAX = 60


def take_over(path: Path) -> tuple[HostTier, dict[Extent, Shard], list[Extent]]:
    """Open the tier at *path*; return it, what it holds, and what was being written.

    Raises `AssertionError` unless every byte is right and no two extents overlap.
    """
    memory = KeptArena(path, SIZE_BYTES)
    assert memory.cold == "", memory.cold
    tier = HostTier(memory)
    found = memory.records.scan()
    memory.records.resume(found, np.ones(len(found.rows), dtype=bool))
    extents = [Extent(row["offset"].item(), row["size_bytes"].item()) for row in found.rows]
    tier.occupy(extents)  # fails on what overlaps
    holding: dict[Extent, Shard] = {}
    writing: list[Extent] = []
    for extent, row in zip(extents, found.rows, strict=True):
        if row["state"] != READY:
            writing.append(extent)
            continue
        root, digest = Root(row["root"].item()), Digest(row["digest"].item())
        assert tier.verify_bytes(extent, root), f"bytes of {extent}"
        assert tier.view(extent) == make_payload(digest, extent.size_bytes), f"digest of {extent}"
        namespace = NamespaceId(row["namespace"].item())
        assert memory.records.knows(namespace), f"namespace of {extent}"
        key = ShardKey(namespace, digest, HeadRange(0, 1))
        holding[extent] = Shard(key, None, extent.size_bytes, root)
    tier.check(extents)
    return tier, holding, writing


def put(tier: HostTier, extent: Extent, number: int) -> Shard:
    """Write and publish one shard, as client and daemon do together."""
    payload = make_payload(loose_digest(number), extent.size_bytes)
    tier.view(extent)[:] = payload
    blocks = block_digests(payload)
    start = extent.offset + table_offset(extent.size_bytes)
    tier.arena.view[start : start + blocks.nbytes] = blocks.tobytes()
    namespace = NamespaceId(bytes([number % NAMESPACES]) * 16)
    key = ShardKey(namespace, loose_digest(number), HeadRange(0, 1))
    shard = Shard(key, None, extent.size_bytes, root_of(blocks))
    tier.publish(extent, shard, lambda: b"introduction of " + namespace)
    return shard


def churn(path: Path, rng: np.random.Generator, progress: mmap.mmap) -> None:
    """Work on the tier at *path* for ever, counting the steps in *progress*."""
    tier, holding, writing = take_over(path)
    owner = Owner(os.getpid(), 1, 1)
    steps = progress_of(progress)
    for extent in writing:
        tier.free(extent)
    for number in count(int(rng.integers(2**40))):
        extent = tier.allocate(int(rng.integers(1, SHARD_BYTES_MAX)))
        if extent is None:
            victim = list(holding)[rng.integers(len(holding))]
            del holding[victim]
            tier.free(victim)
        elif tier.fill(extent, owner) and rng.random() < 0.9:
            holding[extent] = put(tier, extent, number)
        else:
            tier.view(extent)[:] = bytes(extent.size_bytes)
            tier.free(extent)
        steps[0] += 1


def progress_of(progress: mmap.mmap) -> memoryview:
    return memoryview(progress).cast("Q")


def kill_one(path: Path, rng: np.random.Generator, progress: mmap.mmap) -> None:
    """Let one daemon work for a while and kill it at no particular instant."""
    steps = progress_of(progress)
    steps[0] = 0
    child = os.fork()
    if child == 0:
        try:
            churn(path, rng, progress)
        finally:
            os._exit(1)
    wanted = int(rng.integers(1, STEPS_MAX))
    while steps[0] < wanted:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the daemon ended by itself"
    for _ in range(rng.integers(2000)):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(path: Path, kills: int, seed: int) -> None:
    """Kill *kills* daemons, and look at what each has left."""
    seeds = np.random.SeedSequence(seed).spawn(kills)
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    KeptArena(path, SIZE_BYTES).close()
    held = written = 0
    for chosen in seeds:
        kill_one(path, np.random.default_rng(chosen), progress)
        tier, holding, writing = take_over(path)
        held += len(holding)
        written += len(writing)
        tier.close()
    sys.stdout.write(f"whole {held} {written}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
