"""A real store over a real arena, without a daemon, and a session that writes and reads it."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.hashing import block_digests, root_of, table_offset
from kvstore.limits import KIB, MIB
from kvstore.metrics import Counters
from kvstore.protocol.manifest import Manifest
from kvstore.store.namespace import Namespace
from kvstore.store.store import Granted, Store
from kvstore.tiers.host import HostTier, Verification
from kvstore.transfer.arena import Arena
from kvstore.types import Digest, Extent, HeadRange, ReserveOutcome, Root, SessionId
from tests.support.making import make_digests, make_payload

LEASE_TTL_SECONDS = 10.0


def make_store(
    *,
    capacity_bytes: int = MIB,
    eviction: str = "lru",
    checksums: bool = True,
    verification: Verification = "sample",
) -> Store:
    """Return an empty store; close its `host` when done."""
    host = HostTier(Arena.create(capacity_bytes), checksums=checksums, verification=verification)
    return Store(host, eviction=eviction, lease_ttl_seconds=LEASE_TTL_SECONDS, counters=Counters())


def write_chunk(store: Store, extent: Extent, payload: bytes) -> Root:
    """Fill *extent* the way a client does: bytes, then their table; return the root."""
    store.host.view(extent)[:] = payload
    blocks = block_digests(payload)
    table = blocks.tobytes()
    start = extent.offset + table_offset(extent.size_bytes)
    if store.host.checksums:
        store.host.arena.view[start : start + len(table)] = table
    return root_of(blocks)


class Engine:
    """One session in one namespace of a store."""

    def __init__(self, store: Store, manifest: Manifest, session: int = 1) -> None:
        self.store = store
        self.session = SessionId(session)
        self.space: Namespace = store.enter(manifest)
        self.manifest = manifest
        self.now = 0.0

    def reserve(
        self,
        digests: Sequence[Digest],
        *,
        parent: Digest | None = None,
        heads: HeadRange | None = None,
        sizes: Sequence[int] = (),
    ) -> list[Granted]:
        wanted = heads or self.manifest.all_heads
        return self.store.reserve(
            self.session, self.space, digests, parent=parent, heads=wanted, sizes=sizes
        )

    def commit(self, digest: Digest, place: Granted) -> None:
        payload = make_payload(digest, place.extent.size_bytes)
        root = write_chunk(self.store, place.extent, payload)
        self.store.commit(self.session, place.reservation, root)

    def put(
        self,
        digests: Sequence[Digest],
        *,
        parent: Digest | None = None,
        heads: HeadRange | None = None,
    ) -> list[ReserveOutcome]:
        """Store *digests* and return what became of each."""
        places = self.reserve(digests, parent=parent, heads=heads)
        for digest, place in zip(digests, places, strict=True):
            if place.outcome is ReserveOutcome.RESERVED:
                self.commit(digest, place)
        return [place.outcome for place in places]

    def hits(self, digests: Sequence[Digest], *, window: int = 0) -> int:
        found = self.store.lookup(self.session, self.space, digests, self.now, window=window)
        return found.hits

    def lease(self, digests: Sequence[Digest]) -> int:
        found = self.store.lookup(self.session, self.space, digests, self.now, lease=True)
        return found.lease

    def load(self, digests: Sequence[Digest], heads: HeadRange | None = None):
        wanted = heads or self.manifest.all_heads
        return self.store.load(self.session, self.space, digests, wanted, self.now)


def chunks_that_fit(store: Store, manifest: Manifest) -> int:
    """Return how many whole chunks the arena can hold."""
    return store.host.usage().capacity_bytes // store.host.footprint(manifest.chunk_bytes)


def page_aligned(count: int) -> int:
    """Return the bytes of *count* pages."""
    return count * 4 * KIB


def fill_up(engine: Engine, prompt: int = 0) -> list[Digest]:
    """Fill the arena with one prefix and return its digests."""
    digests = make_digests(chunks_that_fit(engine.store, engine.manifest), prompt)
    assert set(engine.put(digests)) == {ReserveOutcome.RESERVED}
    return digests
