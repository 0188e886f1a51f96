"""One slower tier as the mover sees it, and how single shards travel to and from it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeVar

import numpy as np

from kvstore.errors import ChecksumError, TierError
from kvstore.hashing import Digests64, block_count, root_of
from kvstore.limits import TIER_TRANSCODES_MAX
from kvstore.protocol.manifest import encode_namespace
from kvstore.store.admission import Admission, AdmitAll
from kvstore.store.history import Fate
from kvstore.store.lane import Removal, TierRead
from kvstore.store.residence import fingerprint
from kvstore.store.shards import tiers_with
from kvstore.store.transcode import Stored, Transcoder, count, form_of
from kvstore.tiers.base import Shard, ShardKey
from kvstore.transfer.copies import digest_blocks
from kvstore.types import NO_SLOT, Digest, Extent, NamespaceId, TierKind

if TYPE_CHECKING:
    from kvstore.store.lane import Fetch, Lane, Write
    from kvstore.store.shards import ShardRecord
    from kvstore.store.shelves import Shelves
    from kvstore.store.store import Store
    from kvstore.tiers.guard import GuardedTier

_HOST: Final = TierKind.HOST
# A tier that says that it is full, though by its figures it is not, is asked so often.
_WRITE_TRIES_MAX: Final = 16

WritePolicy = Literal["through", "back", "on_evict", "never"]
Answer = TypeVar("Answer")


class Threads(Protocol):
    """Runs what takes long without the GIL, such as checksums, beside the event loop."""

    async def __call__(self, work: Callable[[], Answer], /) -> Answer:
        """Return what *work* returns."""


class Route:
    """The way between the host tier and one slower tier."""

    def __init__(
        self,
        store: Store,
        tier: GuardedTier,
        lane: Lane,
        policy: WritePolicy,
        admission: Admission | None,
        in_thread: Threads,
        transcoder: Transcoder | None = None,
    ) -> None:
        self.tier = tier
        self.kind: Final = tier.kind
        self.lane = lane
        self.policy = policy
        self.is_offered: Final = policy in {"through", "back"}
        self.admission = admission or AdmitAll()
        self.is_selective: Final = not isinstance(self.admission, AdmitAll)
        self.finding = 0
        self._store = store
        self._in_thread = in_thread
        self._introduced: set[NamespaceId] = set()
        self._transcoder = transcoder
        self._transcoding = asyncio.Semaphore(TIER_TRANSCODES_MAX)
        self._making_room = asyncio.Lock()
        self._taking_bytes = 0

    @property
    def knows_capacity(self) -> bool:
        """Whether it is for us to make room there; a server does so itself."""
        return self.tier.usage().capacity_bytes > 0 and not self.tier.is_shared

    @property
    def codec(self) -> str:
        """The codec of the forms that the tier keeps; empty where it keeps what was stored."""
        return self._transcoder.codec if self._transcoder else ""

    def admits(self, slot: int) -> bool:
        """Return whether the tier takes *slot* in, as far as its admission has a say."""
        return self.admission.admits(fingerprint(self._store.index.digest(slot)))

    def note_use(self, slot: int) -> None:
        """Tell the admission of a use of *slot*."""
        index = self._store.index
        self.admission.note(fingerprint(index.digest(slot)), index.space_of(slot).chunk_bytes)

    def lacks(self, slot: int, record: ShardRecord) -> bool:
        """Return whether *record* is in the host tier, and no form of it here where one may be."""
        if self.policy == "never":
            return False
        forms = self._store.index.shards(slot)
        return record.is_in_host and not tiers_with(forms, record.heads) & self.kind

    def fields(self, error: TierError) -> dict[str, object]:
        """Return what a log says of *error*."""
        return {"tier": self.kind.name.lower(), "reason": str(error)}

    def remove(self, slot: int, shards: Sequence[ShardRecord]) -> None:
        """Queue what the tier is to forget of *shards* of *slot*.

        From the device tier it is gone as soon as the index lets go of it.
        """
        for record in shards if self.kind is not TierKind.DEVICE else ():
            if record.tiers & self.kind:
                self.lane.put_removal(Removal(self._shard(slot, record), record.place))

    @property
    def is_settled(self) -> bool:
        """Whether all is kept that is to be kept when the daemon ends.

        What engines have put into the device tier is not, before it has been fetched.
        """
        return self.lane.is_settled and (self.kind is not TierKind.DEVICE or self.lane.is_quiet)

    def lacks_above(self, slot: int) -> Digest | None:
        """Return the chunk before *slot* where the tier does not have it."""
        index = self._store.index
        parent = index.tree.parent(slot)
        is_there = parent == NO_SLOT or index.tiers_of(parent) & self.kind
        return None if is_there else index.digest(parent)

    # --- up -----------------------------------------------------------------------------

    def put_fetch(self, fetch: Fetch) -> None:
        """Queue *fetch*, whose shard is here."""
        record = self._store.index.shard(fetch.slot, fetch.heads, self.kind)
        fetch.size_bytes = 0 if record is None else record.size_bytes
        self.lane.put_fetch(fetch)

    async def fetch(self, fetch: Fetch) -> bool:
        """Bring a shard into the host tier; return whether it is there now.

        Raises `TierError` when the tier could not say.
        """
        store, slot = self._store, fetch.slot
        if store.index.shard(slot, fetch.heads, _HOST) is not None:
            return True
        record = store.index.shard(slot, fetch.heads, self.kind)
        if record is None:
            return False
        extent = store.take_room(slot, record.size_bytes)
        if extent is None:
            return False
        room = TakenRoom(partial(store.give_up_room, extent))
        store.hold(slot)

        def ended() -> None:
            store.let_go(slot)
            room.ended()

        began_at = perf_counter()
        try:
            shard = self._shard(slot, record)
            target = store.host.view(extent)
            damaged = self._damaged
            blocks = np.zeros(block_count(record.size_bytes), np.uint64)
            here = await self.tier.read(shard, record.place, target, ended, blocks)
        except BaseException:
            room.discard()
            raise
        finally:
            read = TierRead(self.kind, record.size_bytes, began_at, perf_counter())
            fetch.reads = (*fetch.reads, read)
        if not here or root_of(blocks) != record.root:
            room.discard()
            store.counters.checksum_failures += here
            self._note_gone(slot, is_damaged=here or self._damaged > damaged)
            store.slower.left(slot, self.kind, fetch.heads)
            return False
        return self._publish(fetch, record, extent, blocks)

    def _publish(
        self, fetch: Fetch, record: ShardRecord, extent: Extent, blocks: Digests64
    ) -> bool:
        store = self._store
        store.host.seal(extent, blocks)
        if store.promoted(fetch.slot, record, extent, fetch.parent):
            if self.kind is TierKind.DEVICE:
                store.demoted(fetch.slot, fetch.heads)
            else:
                store.counters.promote_chunks += 1
                store.counters.promote_bytes += extent.size_bytes
        return store.index.shard(fetch.slot, fetch.heads, _HOST) is not None

    @property
    def _damaged(self) -> int:
        """How many copies the tier itself has found damaged, and dropped."""
        return getattr(getattr(self.tier.tier, "counters", None), "quarantined", 0)

    def _note_gone(self, slot: int, *, is_damaged: bool) -> None:
        """Remember that the tier has no good copy of *slot*; what servers keep has an end."""
        gone = Fate.LOST if self.kind is TierKind.DISK else Fate.EXPIRED
        index = self._store.index
        fate = Fate.DAMAGED if is_damaged else gone
        self._store.history.note(index.space_of(slot), index.digest(slot), fate, self.kind)

    # --- down ---------------------------------------------------------------------------

    async def write(self, write: Write) -> bool:
        """Copy a shard from the host tier, if it is still there; return whether it is kept.

        Raises `TierError` when the tier could not say.
        """
        store = self._store
        slot = write.space.find(write.digest)
        record = None if slot == NO_SLOT else store.index.shard(slot, write.heads)
        if record is None:
            return False
        if store.index.shard(slot, write.heads, self.kind) is not None:
            return True
        if not record.is_in_host:
            return False
        store.hold(slot)
        try:
            return await self._copy_down(slot, record)
        except ChecksumError:
            # Whoever loads it will see the same, and delete it.
            store.counters.checksum_failures += 1
            return False
        finally:
            store.let_go(slot)

    async def _copy_down(self, slot: int, record: ShardRecord) -> bool:
        store = self._store
        await self._introduce(slot)
        source = store.host.view(record.extent)
        if not store.host.checksums:
            root = root_of(await self._in_thread(lambda: digest_blocks(source)))
            plain = store.index.shard(slot, record.heads, _HOST)
            assert plain is not None, "what is held stays"
            record = plain._replace(root=root)
            store.index.replace(slot, plain, record)
        record, source = await self._smaller(slot, record, source)
        for _ in range(_WRITE_TRIES_MAX):
            if not await self._make_room(slot, record.size_bytes):
                return False
            store.hold(slot)
            shard = shard_of(store, slot, record)
            self._taking_bytes += record.size_bytes
            try:
                place = await self.tier.write(shard, source, lambda: store.let_go(slot))
            finally:
                self._taking_bytes -= record.size_bytes
            if place is not None:
                store.slower.entered(slot, record, self.kind, place)
                return True
            if not self.knows_capacity or not await self._evict_for(slot, record.size_bytes):
                return False
        return False

    async def _smaller(
        self, slot: int, record: ShardRecord, source: memoryview
    ) -> tuple[ShardRecord, memoryview]:
        """Return the form of a shard that the tier is to have, and its bytes.

        Raises `ChecksumError` when the bytes in the host tier are damaged.
        """
        if self._transcoder is None:
            return record, source
        index = self._store.index
        is_first = index.parent_digest(slot) is None
        manifest = index.space_of(slot).manifest
        stored = Stored(manifest, record.heads, is_first, source, record.root)
        async with self._transcoding:
            made = await self._in_thread(partial(form_of, self._transcoder, stored))
        count(self._store.counters, stored, made)
        if isinstance(made, str):
            return record, source
        form = record._replace(extent=Extent(0, len(made.payload)), root=made.root)
        return form, made.payload

    async def _introduce(self, slot: int) -> None:
        space = self._store.index.space_of(slot)
        if space.id not in self._introduced:
            await self.tier.introduce(space.id, encode_namespace(space.manifest, space.tenant))
            self._introduced.add(space.id)

    async def _make_room(self, slot: int, size_bytes: int) -> bool:
        """Evict until *slot* fits by the tier's figures and its tenant's quota."""
        if not self.knows_capacity:
            return True
        shares = self._store.slower.residents[self.kind].shares
        tenant = self._store.index.tenant_of(slot)
        # One at a time: what one has made room with, another would evict again.
        async with self._making_room:
            while True:
                usage = self.tier.usage()
                used_bytes = usage.used_bytes + self._taking_bytes
                has_room = used_bytes + size_bytes <= usage.capacity_bytes
                if has_room and not shares.is_over(tenant, size_bytes):
                    return True
                if not await self._evict_for(slot, size_bytes):
                    # What is under way may still fit.
                    return usage.used_bytes + size_bytes <= usage.capacity_bytes

    async def _evict_for(self, slot: int, size_bytes: int) -> bool:
        """Evict one chunk for *slot*, unless the admission says that it is worth more."""
        store = self._store
        tenant = store.index.tenant_of(slot)
        victim = store.slower.next_victim(self.kind, tenant, size_bytes)
        if victim == NO_SLOT:
            return False
        newcomer, leaver = store.index.digest(slot), store.index.digest(victim)
        if not self.admission.admits(fingerprint(newcomer), fingerprint(leaver)):
            return False
        await self._evict(victim)
        return True

    async def _evict(self, slot: int) -> None:
        store = self._store
        store.hold(slot)
        try:
            for record in store.index.shards(slot):
                if record.tiers & self.kind:
                    await self.tier.remove(self._shard(slot, record), record.place)
                    store.slower.left(slot, self.kind, record.heads, evicted=True)
            self.tier.counters.evict_chunks += 1
        finally:
            store.let_go(slot)

    def _shard(self, slot: int, record: ShardRecord) -> Shard:
        return shard_of(self._store, slot, record)


class TakenRoom:
    """Room that is being copied into: given up when nothing touches it any more, unless kept."""

    def __init__(self, give_up: Callable[[], None]) -> None:
        self._give_up = give_up
        self._has_ended = False
        self._is_unwanted = False

    def ended(self) -> None:
        """Note that nobody copies into the room any more."""
        self._has_ended = True
        if self._is_unwanted:
            self._give_up()

    def discard(self) -> None:
        """Give the room up as soon as that is safe."""
        if self._has_ended:
            self._give_up()
        else:
            self._is_unwanted = True


def shard_of(store: Shelves, slot: int, record: ShardRecord) -> Shard:
    """Return *record* of *slot* as tiers know it."""
    space, digest = store.index.space_of(slot), store.index.digest(slot)
    key = ShardKey(space.id, digest, record.heads)
    return Shard(key, store.index.parent_digest(slot), record.size_bytes, record.root)
