"""What a store stands on: index, tiers, leases and who holds what, and the law over all.

Knows nothing of requests: they are the store's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvstore.metrics import Counters
from kvstore.store.history import Fate, History
from kvstore.store.index import Index
from kvstore.store.leases import Lease, Leases, Reservation, Reservations
from kvstore.store.namespace import Namespace
from kvstore.store.quota import DEFAULT_TENANT, Share, Shares
from kvstore.store.recent import RecentLookups
from kvstore.store.residence import Holdings, Residents
from kvstore.store.reuse import Reuse
from kvstore.store.room import HostRoom
from kvstore.store.shards import ShardRecord, covers, find_form, whole_bytes
from kvstore.store.slower import SlowerTiers
from kvstore.tiers.host import HostTier
from kvstore.tiers.record_layout import Owner
from kvstore.types import (
    NO_SLOT,
    Digest,
    Extent,
    HeadRange,
    NamespaceId,
    SessionId,
    TierKind,
)

if TYPE_CHECKING:
    from kvstore.store.device import DeviceRoom

NO_TENANT = ""
_HOST = TierKind.HOST
_EVICTING = TierKind.DEVICE | TierKind.DISK


class SlowTier(NamedTuple):
    """A tier below the host tier, as the store knows it."""

    kind: TierKind
    eviction: str
    shares: Shares


class Movement(Protocol):
    """What moves bytes between tiers, as the store sees it. No call waits."""

    def published(self, slot: int, heads: HeadRange) -> None:
        """Note new bytes in the host tier."""

    def used(self, slots: Sequence[int]) -> None:
        """Note a use of chunks in the host tier."""

    def pressed(self) -> None:
        """Note that room was taken."""

    def removed(self, slot: int, shards: Sequence[ShardRecord]) -> None:
        """Note that *slot* is about to be forgotten: slower tiers are to let go of *shards*."""

    def is_wanted(self, slot: int) -> bool:
        """Return whether a slower tier takes *slot* when it leaves the host tier."""

    def expected_seconds(self, tiers: int, chunks: int, chunk_bytes: int) -> float:
        """Return what it takes to bring chunks from *tiers* into the host tier."""


class Shelves:
    """All that is kept, in whichever tier, and all that holds it."""

    def __init__(
        self,
        host: HostTier,
        *,
        eviction: str,
        lease_ttl_seconds: float,
        counters: Counters,
        tenants: Sequence[Share] = (Share(NO_TENANT),),
        slower: Sequence[SlowTier] = (),
    ) -> None:
        evicting = [_HOST, *(tier.kind for tier in slower if tier.kind & _EVICTING)]
        self.host = host
        self.index = Index(evicting)
        self.leases = Leases(lease_ttl_seconds)
        self.reservations = Reservations()
        self.counters = counters
        self.tenants = [share.tenant for share in tenants]
        self.hit_chunks: dict[int, int] = dict.fromkeys(TierKind, 0)
        shares = Shares("host", host.usage().capacity_bytes, tenants)
        self.residents = Residents(self.index, _HOST, eviction, shares)
        self.history = History()
        self.recent = RecentLookups()
        self.reuse = Reuse(len(tenants))
        self.room = HostRoom(
            self.index, host, self.residents, counters, self.history, self._unpublished
        )
        self.slower = SlowerTiers(
            self.index,
            {tier.kind: Residents(self.index, *tier) for tier in slower},
            self.history,
        )
        self.promoting: dict[Extent, int] = {}
        self.device: DeviceRoom | None = None
        self._movement: Movement | None = None
        self._spaces: dict[NamespaceId, Namespace] = {}
        self._orphans: dict[SessionId, list[Reservation]] = {}
        self._writers: dict[SessionId, Owner] = {}
        self._watchers: dict[tuple[int, Digest], dict[Callable[[], None], None]] = {}
        self._holds: dict[int, int] = {}

    def attach_movement(self, movement: Movement) -> None:
        """Let *movement* hear of all that happens."""
        self._movement = movement
        self.room.is_wanted = movement.is_wanted

    def tenant_number(self, tenant: str) -> int:
        """Return whose chunks those of *tenant* are; of one that is not configured, nobody's."""
        return self.tenants.index(tenant) if tenant in self.tenants else DEFAULT_TENANT

    def holdings(self, kind: TierKind) -> Holdings:
        """Return the bytes that are in the tier *kind*, and those that came and went."""
        here = self.residents if kind is _HOST else self.slower.residents.get(kind)
        return Holdings() if here is None else here.holdings

    def expected_seconds(self, tiers: int, chunks: int, chunk_bytes: int) -> float:
        """Return what it takes to bring chunks from *tiers* up; 0 for those in the host tier."""
        if tiers & _HOST or self._movement is None:
            return 0.0
        return self._movement.expected_seconds(tiers, chunks, chunk_bytes)

    # --- holding ------------------------------------------------------------------------

    def hold(self, slot: int) -> None:
        """Keep *slot* where it is while its bytes are being moved, until `let_go`."""
        self.index.lease(slot)
        self._holds[slot] = self._holds.get(slot, 0) + 1

    def let_go(self, slot: int) -> None:
        """End one hold on *slot*."""
        self._holds[slot] -= 1
        if not self._holds[slot]:
            del self._holds[slot]
        self.index.release(slot)
        self._sweep()

    def pin(self, space: Namespace, digests: Sequence[Digest], *, hard: bool) -> int:
        """Pin the chunks that are present; return their number."""
        slots = [slot for digest in digests if (slot := space.find(digest)) != NO_SLOT]
        for slot in slots:
            self.index.pin(slot, hard=hard)
        for residents in () if hard else (self.residents, *self.slower.residents.values()):
            for slot in slots:
                residents.defer(slot)
        return len(slots)

    def unpin(self, space: Namespace, digests: Sequence[Digest]) -> int:
        """End the pins on the chunks; return how many had one."""
        slots = [slot for digest in digests if (slot := space.find(digest)) != NO_SLOT]
        unpinned = sum(self.index.unpin(slot) for slot in slots)
        for residents in (self.residents, *self.slower.residents.values()):
            for slot in slots:
                residents.resume(slot)
        self._sweep()
        return unpinned

    def expire(self, now: float) -> int:
        """End the leases whose time is over; return their number."""
        ended = self.leases.expire(now)
        self._unhold(ended)
        self.counters.lease_expirations += len(ended)
        return len(ended)

    def keep(self, space: Namespace, digests: Sequence[Digest], *, kept: bool) -> None:
        """Let the leading chunks leave last, or no longer."""
        for slot in self.index.leading(space, digests):
            self.index.keep(slot, kept=kept)

    def hasten(self, space: Namespace, digests: Sequence[Digest]) -> None:
        """Let chunks leave first that belong to this prefix alone, from its end on."""
        below = NO_SLOT
        for digest in reversed(digests):
            slot = space.find(digest)
            if slot == NO_SLOT or not self.index.tiers_of(slot) & _HOST:
                continue
            if self.index.tree.has_others(slot, below):
                break
            self.residents.hasten(slot)
            below = slot

    def bury(self, session: SessionId) -> None:
        """Free what an ended session had reserved: nobody can write there any more."""
        for record in self._orphans.pop(session, ()):
            self._free(record)

    def watch(self, space: Namespace, digest: Digest, changed: Callable[[], None]) -> None:
        """Call *changed* once, when the arriving chunk *digest* is published or given up."""
        self._watchers.setdefault((space.number, digest), {})[changed] = None

    def unwatch(self, space: Namespace, digest: Digest, changed: Callable[[], None]) -> None:
        """End a watch; nothing happens when *changed* has been called."""
        watchers = self._watchers.get((space.number, digest), {})
        watchers.pop(changed, None)
        if not watchers:
            self._watchers.pop((space.number, digest), None)

    def announce(self, space: Namespace, digest: Digest) -> None:
        """Call all who watch *digest*."""
        for changed in self._watchers.pop((space.number, digest), ()):
            changed()

    # --- between tiers ------------------------------------------------------------------

    def take_room(self, slot: int, size_bytes: int) -> Extent | None:
        """Return room for a shard of *slot* that comes from a slower tier, or None."""
        tenant = self.index.tenant_of(slot)
        extent = self.room.take(tenant, size_bytes)
        if extent is not None:
            self.promoting[extent] = tenant
        return extent

    def hold_room(self, tenant: int, extent: Extent) -> None:
        """Charge *extent*, which the host tier has given already, to *tenant*."""
        self.residents.shares.charge(tenant, self.host.footprint(extent.size_bytes))
        self.promoting[extent] = tenant

    def unhold_room(self, extent: Extent) -> None:
        """End `hold_room`; the extent stays allocated."""
        tenant = self.promoting.pop(extent)
        self.residents.shares.refund(tenant, self.host.footprint(extent.size_bytes))

    def give_up_room(self, extent: Extent) -> None:
        """Take back what `take_room` gave, or `hold_room` held."""
        self.room.give_back(self.promoting.pop(extent), extent)

    def promoted(self, slot: int, read: ShardRecord, extent: Extent, parent: Digest | None) -> bool:
        """Publish the shard *read* of *slot*, which was read into *extent* and is right.

        Returns False, and frees the extent, when it is not needed any more.
        """
        shard = find_form(self.index.shards(slot), read)
        if shard is None or self.index.shard(slot, read.heads, _HOST) is not None:
            self.give_up_room(extent)
            return False
        del self.promoting[extent]
        here = shard._replace(extent=extent, tiers=shard.tiers | _HOST)
        self.index.replace(slot, shard, here)
        space = self.index.space_of(slot)
        above = NO_SLOT if parent is None else space.find(parent)
        if above != NO_SLOT:
            self.index.adopt(slot, above)
        self.room.publish(slot, here)
        self.room.record(slot, here, parent)
        return True

    def demoted(self, slot: int, heads: HeadRange) -> None:
        """Note bytes in the host tier that engines have stored in the device tier."""
        assert self._movement is not None, "somebody has moved them"
        self.counters.demote_chunks += 1
        self._movement.published(slot, heads)

    def offer(self, slot: int) -> None:
        """Let slower tiers that lack *slot* take it, as after a use of it."""
        if self._movement is not None:
            self._movement.used([slot])

    def restore(
        self,
        space: Namespace,
        digest: Digest,
        parent: Digest | None,
        shard: ShardRecord,
        tenant: int,
    ) -> bool:
        """Publish a shard that an earlier daemon left, in an extent that counts as allocated.

        Returns False, and frees the extent, when it is not needed.
        """
        shares, need = self.residents.shares, self.host.footprint(shard.size_bytes)
        if space.find(digest) == NO_SLOT:
            above = NO_SLOT if parent is None else space.find(parent)
            slot = self.index.add(space, digest, above, shard, tenant)
            shares.charge(tenant, need)
            self.residents.admit(slot, whole_bytes(shard, space.manifest.kv_heads))
            self.residents.gained(space, shard)
            return True
        shares.charge(tenant, need)
        slot = self._place(space, digest, parent, shard, tenant)
        if slot == NO_SLOT:
            self.room.give_back(tenant, shard.extent)
            return False
        self.room.publish(slot, shard)
        return True

    # --- the law ------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `AssertionError` unless every law of the store holds."""
        self.index.check()
        extents = list(self.room.extents())
        self.host.check(extent for extent, _ in extents)
        if self.device is not None:
            unpublished = self._unpublished_records()
            self.device.check(record.extent for record in unpublished if record.is_pooled)
        self._check_accounts()
        self.slower.check()
        held = dict(self._holds)
        for lease in self.leases:
            for slot in lease.slots:
                held[slot] = held.get(slot, 0) + 1
        for slot in self.index.slots():
            assert self.index.lease_count(slot) == held.pop(slot, 0), f"leases of slot {slot}"
        assert not held, "leased chunks are present"

    def _check_accounts(self) -> None:
        """Raise `AssertionError` unless every extent is charged to who has it."""
        used = [0] * len(self.tenants)
        in_host = [slot for slot in self.index.slots() if self.index.tiers_of(slot) & _HOST]
        assert self.residents.count == len(in_host), "chunks in the host tier"
        for slot in in_host:
            used[self.index.tenant_of(slot)] += self.room.footprint_of(slot)
        for record in self._unpublished_records():
            if record.is_pooled:
                continue
            used[record.tenant] += self.host.footprint(record.extent.size_bytes)
        for extent, tenant in self.promoting.items():
            used[tenant] += self.host.footprint(extent.size_bytes)
        self.residents.shares.check(used)
        self.residents.check_holdings(in_host)

    # --- inside -------------------------------------------------------------------------

    def _note_first(self, space: Namespace, digest: Digest, fate: Fate) -> None:
        """Remember why a prefix ended before *digest*, though it is in some tier."""
        slot = space.find(digest)
        bits = 0 if slot == NO_SLOT else self.index.tiers_of(slot)
        if bits:
            self.history.note(space, digest, fate, TierKind(bits & -bits))

    def _unhold(self, ended: Iterable[Lease]) -> None:
        for lease in ended:
            for slot in lease.slots:
                self.index.release(slot)
        self._sweep()

    def _sweep(self) -> None:
        """Forget lost chunks that nobody holds any more."""
        if self.index.hollow:
            self.index.drop_hollow()

    def has_shard(self, slot: int, heads: HeadRange, tiers: int) -> bool:
        """Return whether *tiers* together hold *heads* of *slot*."""
        shards = self.index.shards(slot)
        return covers([shard.heads for shard in shards if shard.tiers & tiers], heads)

    def _place(
        self,
        space: Namespace,
        digest: Digest,
        parent: Digest | None,
        shard: ShardRecord,
        tenant: int,
    ) -> int:
        """Enter a shard in the host tier into the index; return its slot.

        `NO_SLOT` when shards cut otherwise got there first: it would only take up room.
        """
        slot = space.find(digest)
        if slot != NO_SLOT and self.has_shard(slot, shard.heads, _HOST):
            return NO_SLOT
        above = NO_SLOT if parent is None else space.find(parent)
        if slot == NO_SLOT:
            return self.index.add(space, digest, above, shard, tenant)
        self._merge(slot, tenant, shard)
        if above != NO_SLOT:
            self.index.adopt(slot, above)
        return slot

    def _merge(self, slot: int, tenant: int, shard: ShardRecord) -> None:
        """Add *shard* to *slot*, whose other shards, or same one, may lie in slower tiers."""
        owner, need = self.index.tenant_of(slot), self.host.footprint(shard.size_bytes)
        if owner != tenant:
            # All of a chunk is one tenant's: that of its first shard.
            self.residents.shares.refund(tenant, need)
            self.residents.shares.charge(owner, need)
        forms = [known for known in self.index.shards(slot) if known.heads == shard.heads]
        known = find_form(forms, shard)
        if known is not None:
            here = known._replace(extent=shard.extent, tiers=known.tiers | _HOST)
            self.index.replace(slot, known, here)
            return
        # Computed anew, with other bytes: copies of the old ones are of no use any more. What a
        # tier has made itself is as good as what it would make of these.
        self.index.add_shard(slot, shard)
        stale = [form._replace(tiers=form.tiers & ~self.slower.forming) for form in forms]
        self.forget_slower(slot, [form for form in stale if form.tiers])

    def forget_slower(self, slot: int, shards: Sequence[ShardRecord]) -> None:
        """Let all slower tiers forget *shards* of *slot*."""
        if self._movement is not None:
            self._movement.removed(slot, shards)
        for kind in self.slower.residents:
            for shard in shards:
                if shard.tiers & kind:
                    self.slower.left(slot, kind, shard.heads)

    def _remove(self, slot: int) -> None:
        """Let *slot*, which is not held, leave all tiers."""
        self.index.lease(slot)
        self.forget_slower(slot, [s for s in self.index.shards(slot) if s.tiers & ~_HOST])
        if self.index.tiers_of(slot) & _HOST:
            self.room.vacate(slot, evicted=False)
        self.index.release(slot)
        self._sweep()

    def _unpublished_records(self) -> Iterator[Reservation]:
        yield from self.reservations
        for orphans in self._orphans.values():
            yield from orphans

    def _free(self, record: Reservation) -> None:
        """Free the room of *record*, which is reserved no more, and in which nothing is kept."""
        if not record.is_pooled:
            self.room.give_back(record.tenant, record.extent)
            return
        assert self.device is not None, "what is pooled has a pool"
        self.device.free(record.extent)

    def _unpublished(self) -> Iterator[Extent]:
        """Yield every extent of the arena in use that is no chunk's."""
        yield from (r.extent for r in self._unpublished_records() if not r.is_pooled)
        yield from self.promoting
