"""A remote tier made of a dict, with faults on request. Tests of slower tiers start here."""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.hashing import block_digests, root_of
from kvstore.tiers.base import ShardKey, TierUsage
from kvstore.types import TierKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.types import Root


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
    root: Root


class FakeTier:
    """Keeps shards in a dict up to *capacity_bytes*; *script* gives the fault of call n, if any.

    Calls are numbered from 0 over all verbs, in the order in which they are made.
    """

    kind: Final = TierKind.REDIS

    def __init__(self, capacity_bytes: int, script: Iterable[tuple[int, Fault]] = ()) -> None:
        self._capacity_bytes = capacity_bytes
        self._script = dict(script)
        self._calls = 0
        self._kept: dict[ShardKey, _Kept] = {}

    def usage(self) -> TierUsage:
        """Return how full the dict is."""
        used = sum(len(kept.payload) for kept in self._kept.values())
        return TierUsage(self._capacity_bytes, used, self._capacity_bytes - used)

    async def write(self, key: ShardKey, source: memoryview, root: Root) -> bool:
        """Keep a copy, unless it does not fit or the script says otherwise."""
        if await self._fault(key) is Fault.FAIL:
            return False
        replaced = len(self._kept[key].payload) if key in self._kept else 0
        if self.usage().used_bytes - replaced + len(source) > self._capacity_bytes:
            return False
        self._kept[key] = _Kept(bytearray(source), root)
        return True

    async def read(self, key: ShardKey, target: memoryview) -> Root | None:
        """Fill *target* with what was written, if it is still what was written."""
        if await self._fault(key) is Fault.FAIL or key not in self._kept:
            return None
        kept = self._kept[key]
        if len(kept.payload) != len(target) or root_of(block_digests(kept.payload)) != kept.root:
            del self._kept[key]
            return None
        target[:] = kept.payload
        return kept.root

    async def remove(self, key: ShardKey) -> bool:
        """Forget the shard."""
        if await self._fault(key) is Fault.FAIL:
            return False
        return self._kept.pop(key, None) is not None

    def close(self) -> None:
        """Forget everything."""
        self._kept.clear()

    async def _fault(self, key: ShardKey) -> Fault | None:
        """Return the fault of this call, having done to the dict what it stands for."""
        fault = self._script.get(self._calls)
        self._calls += 1
        await asyncio.sleep(0)
        if fault is Fault.HANG:
            await asyncio.get_running_loop().create_future()
        elif fault is Fault.FORGET:
            self._kept.pop(key, None)
        elif fault is Fault.CORRUPT and key in self._kept:
            self._kept[key].payload[0] ^= 1
        return fault
