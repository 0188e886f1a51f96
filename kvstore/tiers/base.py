"""What every tier promises, whatever it is made of.

A tier keeps the bytes of whole shards. The store alone knows what is kept where and asks
tiers to act; a tier never decides to forget.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kvstore.types import Digest, Extent, HeadRange, NamespaceId, Root, TierKind


class TierUsage(NamedTuple):
    """How full a tier is, in bytes, padding and tables included."""

    capacity_bytes: int
    used_bytes: int
    largest_free_bytes: int


class ShardKey(NamedTuple):
    """Names one shard everywhere: equal keys hold equal bytes."""

    namespace: NamespaceId
    digest: Digest
    heads: HeadRange


class Tier(Protocol):
    """Promises of all tiers.

    `used_bytes` never exceeds `capacity_bytes`, at any instant.
    """

    @property
    def kind(self) -> TierKind:
        """Which tier this is."""

    def usage(self) -> TierUsage:
        """Return how full the tier is. Takes microseconds and touches no device."""

    def close(self) -> None:
        """Let go of everything. Idempotent."""


class MappedTier(Tier, Protocol):
    """A tier whose memory engines map, and so fill and read themselves: device and host."""

    def allocate(self, size_bytes: int) -> Extent | None:
        """Return room for *size_bytes*, or None, without changing anything, when there is none."""

    def free(self, extent: Extent) -> None:
        """Take back what `allocate` gave; its bytes may be overwritten from now on."""

    def verify(self, extent: Extent, root: Root) -> bool:
        """Return whether the bytes in *extent* are those that *root* stands for."""

    def view(self, extent: Extent) -> memoryview:
        """Return the bytes of *extent*, writable, valid until it is freed."""


class RemoteTier(Tier, Protocol):
    """A tier that bytes are copied to and from: disk, Redis, peers.

    Calls may fail, be slow and be cancelled at any await; none of that ever leaves a shard
    that can be read half. Failures of the medium are values (False, None), not exceptions.
    """

    async def write(self, key: ShardKey, source: memoryview, root: Root) -> bool:
        """Keep a copy of *source*; return whether it was kept, whole.

        *source* is leased for the duration of the call. Writing a key again replaces it.
        """

    async def read(self, key: ShardKey, target: memoryview) -> Root | None:
        """Fill *target* with the shard and return its root, or None when it is not here.

        The bytes have been checked against the key and the checksum; when they fail, the
        shard is dropped and None returned. *target* may then hold anything.
        """

    async def remove(self, key: ShardKey) -> bool:
        """Forget the shard; return whether it was here."""
