"""A remote tier made of a dict, with faults on request. Tests of slower tiers start here."""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.errors import TierError
from kvstore.hashing import Digests64, block_digests, root_of
from kvstore.tiers.base import Recovered, RecoveredRun, Shard, ShardKey, TierUsage
from kvstore.types import Digest, NamespaceId, Place, TierKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# A dict finds its shards by key.
_PLACE: Final = Place(0)


class Fault(Enum):
    """What can go wrong with one call."""

    FAIL = auto()
    """The medium reports an error."""

    CORRUPT = auto()
    """One bit of what is stored has flipped."""

    FORGET = auto()
    """The shard is gone, though it was written."""

    HANG = auto()
    """No answer ever; the caller must give up."""


class _Kept(NamedTuple):
    payload: bytearray
    shard: Shard


class FakeTier:
    """Keeps shards in a dict up to *capacity_bytes*; *script* gives the fault of call n, if any.

    Calls are numbered from 0 over write, read, remove, find and probe, in the order in which they
    are made. It is durable and shared: what tests of recovery and of other hosts need.
    """

    def __init__(
        self,
        capacity_bytes: int,
        script: Iterable[tuple[int, Fault]] = (),
        *,
        kind: TierKind = TierKind.REDIS,
    ) -> None:
        self.kind: Final = kind
        self._capacity_bytes = capacity_bytes
        self._script = dict(script)
        self._calls = 0
        self._kept: dict[ShardKey, _Kept] = {}
        self._manifests: dict[NamespaceId, bytes] = {}

    def usage(self) -> TierUsage:
        """Return how full the dict is."""
        used = sum(len(kept.payload) for kept in self._kept.values())
        return TierUsage(self._capacity_bytes, used, self._capacity_bytes - used)

    async def write(self, shard: Shard, source: memoryview) -> Place | None:
        """Keep a copy, unless it does not fit or the script says otherwise."""
        await self._fault(shard.key)
        replaced = len(self._kept[shard.key].payload) if shard.key in self._kept else 0
        if self.usage().used_bytes - replaced + len(source) > self._capacity_bytes:
            return None
        self._kept[shard.key] = _Kept(bytearray(source), shard)
        return _PLACE

    async def read(
        self, shard: Shard, place: Place, target: memoryview, table: Digests64 | None = None
    ) -> bool:
        """Fill *target* with what was written, if it is still what was written."""
        await self._fault(shard.key)
        kept = self._kept.get(shard.key)
        if kept is None or len(kept.payload) != len(target):
            return False
        if root_of(block_digests(kept.payload)) != shard.root:
            del self._kept[shard.key]
            return False
        target[:] = kept.payload
        if table is not None:
            table[:] = block_digests(target)
        return True

    async def remove(self, shard: Shard, place: Place) -> bool:
        """Forget the shard."""
        await self._fault(shard.key)
        return self._kept.pop(shard.key, None) is not None

    async def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """Keep the manifest."""
        self._manifests[namespace] = manifest

    async def probe(self) -> None:
        """Count as a call, too, with the fault that the script has for it."""
        await self._fault(None)

    def manifests(self) -> dict[NamespaceId, bytes]:
        """Return all manifests."""
        return dict(self._manifests)

    def recover(self) -> Iterator[RecoveredRun]:
        """Yield all shards in the order in which they were written."""
        for (namespace, digest, heads), parent, size_bytes, root in (
            kept.shard for kept in self._kept.values()
        ):
            yield RecoveredRun(
                namespace,
                heads,
                [digest],
                [parent],
                np.array([size_bytes], np.uint32),
                np.array([root], np.uint64),
                np.array([_PLACE], np.uint64),
            )

    async def find(
        self, namespace: NamespaceId, digests: Sequence[Digest]
    ) -> list[list[Recovered]]:
        """Return the shards of each digest."""
        await self._fault(None)
        return [
            [
                Recovered(kept.shard, _PLACE)
                for key, kept in self._kept.items()
                if (key.namespace, key.digest) == (namespace, digest)
            ]
            for digest in digests
        ]

    def close(self) -> None:
        """Do nothing: what is kept outlives whoever used it."""

    async def _fault(self, key: ShardKey | None) -> None:
        """Let the fault of this call happen; raises `TierError` when the medium fails."""
        fault = self._script.get(self._calls)
        self._calls += 1
        await asyncio.sleep(0)
        if fault is Fault.FAIL:
            raise TierError("the script says so")
        if fault is Fault.HANG:
            await asyncio.get_running_loop().create_future()
        elif key in self._kept and fault is Fault.FORGET:
            del self._kept[key]
        elif key in self._kept and fault is Fault.CORRUPT:
            self._kept[key].payload[0] ^= 1
