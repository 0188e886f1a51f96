"""Stores over one kept arena, one after the other, as daemons that end and start have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvstore.hashing import block_digests, root_of, table_offset
from kvstore.limits import MIB
from kvstore.metrics import Counters
from kvstore.store.quota import Share
from kvstore.store.recovery import Recovery
from kvstore.store.soundness import tenant_mark
from kvstore.store.store import Store
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.host import HostTier
from kvstore.tiers.kept import KeptArena
from kvstore.types import Extent, HeadRange, Root
from tests.support.making import loose_digest, make_manifest, make_payload
from tests.support.stores import LEASE_TTL_SECONDS

MANIFEST = make_manifest()
TENANTS = (Share(""), Share("anna"), Share("bert"))


class KeptStores:
    """Starts stores over the arena at *path*; each ends the one before it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._running: Store | None = None

    def __call__(self, *, tenants: Sequence[Share] = TENANTS) -> Store:
        self._end()
        self._running = Store(
            HostTier(KeptArena(self.path, MIB)),
            eviction="lru",
            lease_ttl_seconds=LEASE_TTL_SECONDS,
            counters=Counters(),
            tenants=tenants,
        )
        return self._running

    def close(self) -> None:
        """End the last one, which must be in order."""
        if self._running is not None:
            self._running.check()
        self._end()

    def _end(self) -> None:
        if self._running is not None:
            self._running.host.close()


def bring_back(store: Store) -> Recovery:
    """Bring back what is left; the store is in order then."""
    recovery = Recovery(store)
    store.check()
    return recovery


def write_bytes(tier: HostTier, extent: Extent, payload: bytes) -> Root:
    """Fill *extent* as a client does, and return the root."""
    blocks = block_digests(payload)
    tier.view(extent)[:] = payload
    start = extent.offset + table_offset(extent.size_bytes)
    tier.arena.view[start : start + blocks.nbytes] = blocks.tobytes()
    return root_of(blocks)


def publish(tier: HostTier, extent: Extent, number: int, **changed) -> None:
    """Record a shard by hand, whose bytes are right unless *changed*."""
    size = extent.size_bytes
    fields = {"heads": MANIFEST.all_heads, "root": None, "tenant": ""} | changed
    root = fields["root"]
    if root is None:
        root = write_bytes(tier, extent, make_payload(loose_digest(number), size))
    shard = make_shard(number, size, fields["heads"], root)
    tier.publish(extent, shard, MANIFEST.encode, tenant_mark(fields["tenant"]))


def make_shard(number: int, size_bytes: int, heads: HeadRange, root: Root) -> Shard:
    """Return the shard of a loose digest."""
    key = ShardKey(MANIFEST.namespace_id(), loose_digest(number), heads)
    return Shard(key, None, size_bytes, root)
