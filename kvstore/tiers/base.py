"""What every tier promises, whatever it is made of.

A tier keeps the bytes of whole shards. The store alone knows what is kept where and asks
tiers to act; a tier never decides to forget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.hashing import Digests64
from kvstore.types import Digest, Extent, HeadRange, NamespaceId, Place, Root, TierKind


class TierUsage(NamedTuple):
    """How full a tier is, in bytes, padding and tables included.

    A capacity of 0 stands for one that is not known here: a server's.
    """

    capacity_bytes: int
    used_bytes: int
    largest_free_bytes: int


class ShardKey(NamedTuple):
    """Names one shard everywhere: equal keys hold equal bytes."""

    namespace: NamespaceId
    digest: Digest
    heads: HeadRange


class Shard(NamedTuple):
    """One shard as every tier knows it: all that is needed to find, place and check it.

    *parent* is the digest of the chunk before it, None at the start of a prefix. *root* is
    always that of the bytes, also where the host tier keeps no checksums.
    """

    key: ShardKey
    parent: Digest | None
    size_bytes: int
    root: Root


class Tier(Protocol):
    """Promises of all tiers.

    `used_bytes` never exceeds a known `capacity_bytes`, at any instant.
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

    Calls may be slow and may be cancelled at any await; neither ever leaves a shard that can
    be read half. A cancelled call ends only when nothing of it touches *source* or *target* any
    more. When the medium fails (an I/O error, no connection, no answer in time) they
    raise `TierError`, which says nothing about what is kept.
    """

    async def write(self, shard: Shard, source: memoryview) -> Place | None:
        """Keep a copy of *source*, the bytes of *shard*; return where, or None without room.

        *source* stays as it is for the duration of the call. Writing a key again replaces it.
        """

    async def read(
        self, shard: Shard, place: Place, target: memoryview, table: Digests64 | None = None
    ) -> bool:
        """Fill *target*, `shard.size_bytes` long, with *shard*; return whether it was here.

        The bytes have been checked, where they are now, against key and root; *table* gets the
        digests of their blocks by which that was done. What fails the check is set aside,
        counted and gone: False. After False or an error both may hold anything.
        """

    async def remove(self, shard: Shard, place: Place) -> bool:
        """Forget *shard*; return whether it was here."""

    async def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """Keep the canonical *manifest* beside the shards of *namespace*; comes before them.

        *namespace* are the first 16 bytes of the SHA-256 of *manifest*.
        """

    async def probe(self) -> None:
        """Do the least that shows whether the medium works; raises `TierError` when it does not."""


class Recovered(NamedTuple):
    """One shard that a durable tier found when it was opened."""

    shard: Shard
    place: Place


class RecoveredRun(NamedTuple):
    """Shards of one namespace, with the same heads, that a durable tier found: columns.

    There may be millions of them, and a start waits for all.
    """

    namespace: NamespaceId
    heads: HeadRange
    digests: list[Digest]
    parents: list[Digest | None]
    sizes: npt.NDArray[np.uint32]
    roots: npt.NDArray[np.uint64]
    places: npt.NDArray[np.uint64]

    def each(self) -> Iterator[Recovered]:
        """Yield the shards one by one."""
        sizes, roots, places = self.sizes.tolist(), self.roots.tolist(), self.places.tolist()
        for digest, parent, size_bytes, root, place in zip(
            self.digests, self.parents, sizes, roots, places, strict=True
        ):
            key = ShardKey(self.namespace, digest, self.heads)
            yield Recovered(Shard(key, parent, size_bytes, root), place)


class DurableTier(RemoteTier, Protocol):
    """A remote tier that only this daemon writes, and that survives it: disk."""

    def manifests(self) -> dict[NamespaceId, bytes]:
        """Return all manifests that were introduced and are still whole."""

    def recover(self) -> Iterator[RecoveredRun]:
        """Yield what is kept, from its index alone; payloads are not read.

        Of each namespace, and about in all, the oldest come first. Blocking: for a thread,
        once, before the first write.
        """


class SharedTier(RemoteTier, Protocol):
    """A remote tier that other daemons write, too: Redis, peers."""

    async def find(
        self, namespace: NamespaceId, digests: Sequence[Digest]
    ) -> list[list[Recovered]]:
        """Return, for each digest, the shards that are there now, of whatever heads.

        They may be gone when they are read.
        """
