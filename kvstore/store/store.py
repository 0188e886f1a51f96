"""The one owner of truth: what is kept, who holds it, what may leave.

Every change of the index, of leases, reservations and the arena's extents goes through here.
Synchronous and without a clock of its own: *now* is an argument, in seconds, monotonic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from kvstore.errors import ChecksumError, RequestError, TooLargeError
from kvstore.limits import DIGEST_SIZE_BYTES
from kvstore.metrics import Counters
from kvstore.protocol.manifest import Manifest
from kvstore.store.index import (
    Index,
    Namespace,
    ShardRecord,
    choose_cover,
    covers,
)
from kvstore.store.leases import Lease, Leases, Reservation, Reservations
from kvstore.store.planner import cheapest_window, next_victim
from kvstore.store.policy import EvictionPolicy
from kvstore.tiers.host import HostTier
from kvstore.types import (
    NO_SLOT,
    Digest,
    Extent,
    HeadRange,
    LeaseId,
    NamespaceId,
    ReservationId,
    ReserveOutcome,
    Root,
    SessionId,
)

NO_LEASE = LeaseId(0)


class Hits(NamedTuple):
    """What a look-up found: *hits* chunks count, *arriving* more are being written behind them.

    *tiers* is run-length: (tier bits, chunks), in prefix order, over the chunks found.
    """

    hits: int
    arriving: int
    tiers: list[tuple[int, int]]
    lease: LeaseId


class Place(NamedTuple):
    """What became of one key of a reserve; the rest is there only when it was reserved."""

    outcome: ReserveOutcome
    reservation: ReservationId = ReservationId(0)
    extent: Extent = Extent(0, 0)


class Store:
    """Namespaces, chunks, leases and reservations of one daemon over its host tier."""

    def __init__(
        self,
        host: HostTier,
        policy: EvictionPolicy,
        *,
        lease_ttl_seconds: float,
        counters: Counters,
    ) -> None:
        self.host = host
        self.index = Index()
        self.leases = Leases(lease_ttl_seconds)
        self.reservations = Reservations()
        self.counters = counters
        self._policy = policy
        self._spaces: dict[NamespaceId, Namespace] = {}
        self._orphans: dict[SessionId, list[Extent]] = {}
        self._watchers: dict[tuple[int, Digest], dict[Callable[[], None], None]] = {}

    # --- namespaces ---------------------------------------------------------------------

    def enter(self, manifest: Manifest) -> Namespace:
        """Return the namespace of *manifest*, new or known, with one more session in it.

        Raises `TooLargeError` when one chunk is larger than the arena, `LimitError` when
        there are too many namespaces.
        """
        space = self._spaces.get(manifest.namespace_id())
        if space is None:
            self._check_fits(manifest.chunk_bytes)
            space = self.index.open_namespace(manifest)
            self._spaces = {known.id: known for known in self.index.namespaces}
        space.entered += 1
        return space

    def leave(self, space: Namespace) -> None:
        """Count one session less in *space*. Its chunks stay."""
        assert space.entered > 0, "a namespace is left as often as it was entered"
        space.entered -= 1

    # --- reading ------------------------------------------------------------------------

    def lookup(
        self,
        session: SessionId,
        space: Namespace,
        digests: Sequence[Digest],
        now: float,
        *,
        window: int = 0,
        lease: bool = False,
    ) -> Hits:
        """Count the leading chunks, or with *window* those of a sliding group, and lease them."""
        hits, slots = self.index.prefix(space, digests, window)
        arriving = self._count_arriving(space, digests, hits)
        tiers = _run_lengths(self.index.tiers(slots))
        self.counters.lookup_chunks_ready += hits
        self.counters.lookup_chunks_arriving += arriving
        self.counters.lookup_chunks_miss += len(digests) - hits - arriving
        granted = self._lease(session, slots, now) if lease and slots else NO_LEASE
        return Hits(hits, arriving, tiers, granted)

    def arriving_next(
        self, space: Namespace, digests: Sequence[Digest], window: int
    ) -> Digest | None:
        """Return the chunk right behind the hits when it is being written; counts nothing."""
        hits, _ = self.index.prefix(space, digests, window)
        behind = digests[hits : hits + 1]
        return behind[0] if behind and self.reservations.is_arriving(space, behind[0]) else None

    def load(
        self,
        session: SessionId,
        space: Namespace,
        digests: Sequence[Digest],
        heads: HeadRange,
        now: float,
    ) -> tuple[LeaseId, list[list[ShardRecord]]]:
        """Lease the leading chunks and return, for each, the shards that cover *heads*.

        A use of every chunk returned. The lease is `NO_LEASE` when there are none.
        """
        self._check_heads(space, heads)
        slots = self.index.leading(space, digests)
        if not slots:
            return NO_LEASE, []
        lease = self._lease(session, slots, now)
        chunks = [choose_cover(self.index.shards(slot), heads) for slot in slots]
        # The head of the prefix is used last, so that it is the most recent.
        for slot in reversed(slots):
            self._policy.touch(slot)
        self.counters.load_chunks += len(slots)
        self.counters.load_bytes += len(slots) * space.manifest.shard_bytes(heads)
        return lease, chunks

    # --- writing ------------------------------------------------------------------------

    def reserve(
        self,
        session: SessionId,
        space: Namespace,
        digests: Sequence[Digest],
        *,
        parent: Digest | None,
        heads: HeadRange,
        sizes: Sequence[int] = (),
    ) -> list[Place]:
        """Give room for the shard *heads* of consecutive chunks, evicting where needed.

        Chunks present, or being written by someone, get none. Raises `TooLargeError` and
        changes nothing when a chunk could never fit.
        """
        self._check_heads(space, heads)
        self._check_parent(parent)
        if sizes and len(sizes) != len(digests):
            raise RequestError(f"{len(sizes)} sizes for {len(digests)} digests")
        wanted = list(sizes) or [space.manifest.shard_bytes(heads)] * len(digests)
        self._check_fits(max(wanted))
        self.reservations.check_room(session, len(digests))
        places: list[Place] = []
        for digest, size in zip(digests, wanted, strict=True):
            places.append(self._reserve_one(session, space, digest, parent, heads, size))
            parent = digest
        return places

    def commit(self, session: SessionId, reservation: ReservationId, root: Root) -> None:
        """Publish a filled reservation once its bytes are found to match *root*.

        Raises `ReservationError` when the session has no such reservation, and
        `ChecksumError`, which frees it, when the bytes are not those of *root*.
        """
        record = self.reservations.get(session, reservation)
        if not self.host.verify(record.extent, root):
            self.counters.checksum_failures += 1
            self._abandon(reservation)
            raise ChecksumError(
                f"reservation {reservation}: its bytes do not match root {root:#018x}"
            )
        self.reservations.end(reservation)
        self._publish(record, root)
        self._announce(record.space, record.digest)

    def abort(self, session: SessionId, reservations: Iterable[ReservationId]) -> int:
        """Free *reservations* of *session*, all or none; raises `ReservationError`."""
        wanted = list(dict.fromkeys(reservations))
        for reservation in wanted:
            self.reservations.get(session, reservation)
        for reservation in wanted:
            self._abandon(reservation)
        return len(wanted)

    def delete(self, space: Namespace, digests: Sequence[Digest]) -> tuple[int, int]:
        """Remove chunks; return how many went and how many stay because they are in use.

        The last of a prefix goes first, so that a tail never outlives its head.
        """
        gone = busy = 0
        for digest in reversed(digests):
            slot = space.find(digest)
            if slot == NO_SLOT:
                busy += self.reservations.is_arriving(space, digest)
            elif self.index.is_held(slot):
                busy += 1
            else:
                self._drop(slot, evicted=False)
                gone += 1
        self.counters.delete_chunks += gone
        return gone, busy

    # --- holding ------------------------------------------------------------------------

    def release(self, session: SessionId, leases: Iterable[LeaseId]) -> int:
        """End *leases* of *session*, all or none; raises `LeaseError`."""
        ended = self.leases.end(session, leases)
        self._unhold(ended)
        return len(ended)

    def pin(self, space: Namespace, digests: Sequence[Digest], *, hard: bool) -> int:
        """Pin the chunks that are present; return their number."""
        slots = [slot for digest in digests if (slot := space.find(digest)) != NO_SLOT]
        for slot in slots:
            self.index.pin(slot, hard=hard)
        return len(slots)

    def unpin(self, space: Namespace, digests: Sequence[Digest]) -> int:
        """End the pins on the chunks; return how many had one."""
        slots = [slot for digest in digests if (slot := space.find(digest)) != NO_SLOT]
        return sum(self.index.unpin(slot) for slot in slots)

    def expire(self, now: float) -> int:
        """End the leases whose time is over; return their number."""
        ended = self.leases.expire(now)
        self._unhold(ended)
        self.counters.lease_expirations += len(ended)
        return len(ended)

    def end_session(self, session: SessionId) -> bool:
        """End the leases of *session* and withdraw its reservations.

        Returns whether it had reservations. Their room stays set aside until `bury`: a client
        that is still alive may yet write there.
        """
        self._unhold(self.leases.end_session(session))
        ended = self.reservations.end_session(session)
        if ended:
            self._orphans[session] = [record.extent for record in ended]
        self.counters.abort_chunks += len(ended)
        for record in ended:
            self._announce(record.space, record.digest)
        return bool(ended)

    def bury(self, session: SessionId) -> None:
        """Free what an ended session had reserved: nobody can write there any more."""
        for extent in self._orphans.pop(session, ()):
            self.host.free(extent)

    def watch(self, space: Namespace, digest: Digest, changed: Callable[[], None]) -> None:
        """Call *changed* once, when the arriving chunk *digest* is published or given up."""
        self._watchers.setdefault((space.number, digest), {})[changed] = None

    def unwatch(self, space: Namespace, digest: Digest, changed: Callable[[], None]) -> None:
        """End a watch; nothing happens when *changed* has been called."""
        watchers = self._watchers.get((space.number, digest), {})
        watchers.pop(changed, None)
        if not watchers:
            self._watchers.pop((space.number, digest), None)

    # --- the law ------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `AssertionError` unless every law of the store holds."""
        self.index.check()
        self.host.check(extent for extent, _ in self._extents())
        held: dict[int, int] = {}
        for lease in self.leases:
            for slot in lease.slots:
                held[slot] = held.get(slot, 0) + 1
        for slot in self.index.slots():
            assert self.index.lease_count(slot) == held.pop(slot, 0), f"leases of slot {slot}"
        assert not held, "leased chunks are present"

    # --- inside -------------------------------------------------------------------------

    def _count_arriving(self, space: Namespace, digests: Sequence[Digest], start: int) -> int:
        if not len(self.reservations):
            return 0
        count = 0
        for digest in digests[start:]:
            if not self.reservations.is_arriving(space, digest):
                break
            count += 1
        return count

    def _lease(self, session: SessionId, slots: list[int], now: float) -> LeaseId:
        lease = self.leases.grant(session, slots, now)
        for slot in slots:
            self.index.lease(slot)
        return lease

    def _unhold(self, ended: Iterable[Lease]) -> None:
        for lease in ended:
            for slot in lease.slots:
                self.index.release(slot)

    def _reserve_one(
        self,
        session: SessionId,
        space: Namespace,
        digest: Digest,
        parent: Digest | None,
        heads: HeadRange,
        size_bytes: int,
    ) -> Place:
        counters = self.counters
        slot = space.find(digest)
        if slot != NO_SLOT and self._has_shard(slot, heads):
            counters.reserve_chunks_present += 1
            return Place(ReserveOutcome.PRESENT)
        if self.reservations.is_arriving(space, digest, heads):
            counters.reserve_chunks_arriving += 1
            return Place(ReserveOutcome.ARRIVING)
        extent = self._allocate(size_bytes)
        if extent is None:
            counters.reserve_chunks_no_space += 1
            return Place(ReserveOutcome.NO_SPACE)
        record = Reservation(session, space, digest, parent, heads, extent)
        counters.reserve_chunks_reserved += 1
        return Place(ReserveOutcome.RESERVED, self.reservations.make(record), extent)

    def _has_shard(self, slot: int, heads: HeadRange) -> bool:
        return covers([shard.heads for shard in self.index.shards(slot)], heads)

    def _publish(self, record: Reservation, root: Root) -> None:
        space, shard = record.space, ShardRecord(record.heads, record.extent, root)
        slot = space.find(record.digest)
        if slot != NO_SLOT and self._has_shard(slot, record.heads):
            # Shards cut otherwise got here first; this copy would only take up room.
            self.host.free(record.extent)
        elif slot == NO_SLOT:
            parent = NO_SLOT if record.parent is None else space.find(record.parent)
            slot = self.index.add(space, record.digest, parent, shard)
            self._policy.admit(slot, space.manifest.chunk_bytes, fingerprint(record.digest))
        else:
            self.index.add_shard(slot, shard)
        self.counters.commit_chunks += 1
        self.counters.commit_bytes += record.extent.size_bytes

    def _abandon(self, reservation: ReservationId) -> None:
        record = self.reservations.end(reservation)
        self.host.free(record.extent)
        self.counters.abort_chunks += 1
        self._announce(record.space, record.digest)

    def _announce(self, space: Namespace, digest: Digest) -> None:
        for changed in self._watchers.pop((space.number, digest), ()):
            changed()

    def _allocate(self, size_bytes: int) -> Extent | None:
        """Return room, evicting in the policy's order, then by the cheapest window.

        Chunks of different sizes can leave holes that are each too small; once twice the
        need was freed in vain, clearing one window is cheaper than going on.
        """
        extent = self.host.allocate(size_bytes)
        freed_bytes = 0
        while extent is None:
            victim = next_victim(self.index, self._policy)
            if victim == NO_SLOT or freed_bytes > 2 * size_bytes:
                return self.host.allocate(size_bytes) if self._clear_window(size_bytes) else None
            freed_bytes += self._evict(victim)
            extent = self.host.allocate(size_bytes)
        return extent

    def _clear_window(self, size_bytes: int) -> bool:
        extents = list(self._extents())
        held = [slot == NO_SLOT or self.index.is_held(slot) for _, slot in extents]
        cleared = cheapest_window(
            [extent.offset for extent, _ in extents],
            [self.host.footprint(extent.size_bytes) for extent, _ in extents],
            held,
            self.host.footprint(size_bytes),
            self.host.usage().capacity_bytes,
        )
        if cleared is None:
            return False
        for slot in {extents[position][1] for position in cleared}:
            self._evict(slot)
        return True

    def _evict(self, slot: int) -> int:
        freed_bytes = self._drop(slot, evicted=True)
        self.counters.evict_chunks += 1
        self.counters.evict_bytes += freed_bytes
        return freed_bytes

    def _drop(self, slot: int, *, evicted: bool) -> int:
        digest = self.index.digest(slot)
        self._policy.forget(slot, fingerprint(digest), evicted=evicted)
        extents = self.index.remove(slot)
        for extent in extents:
            self.host.free(extent)
        return sum(extent.size_bytes for extent in extents)

    def _extents(self) -> Iterator[tuple[Extent, int]]:
        """Yield every extent in use, with its slot, or `NO_SLOT` when it is not published."""
        for slot in self.index.slots():
            for shard in self.index.shards(slot):
                yield shard.extent, slot
        for record in self.reservations:
            yield record.extent, NO_SLOT
        for orphans in self._orphans.values():
            for extent in orphans:
                yield extent, NO_SLOT

    def _check_fits(self, size_bytes: int) -> None:
        capacity = self.host.usage().capacity_bytes
        if self.host.padded(size_bytes) > capacity:
            raise TooLargeError(f"a chunk of {size_bytes} bytes in an arena of {capacity} bytes")

    def _check_heads(self, space: Namespace, heads: HeadRange) -> None:
        if not 0 <= heads.start < heads.stop <= space.manifest.kv_heads:
            raise RequestError(
                f"heads [{heads.start}, {heads.stop}) of a model with {space.manifest.kv_heads}"
            )

    def _check_parent(self, parent: Digest | None) -> None:
        if parent is not None and len(parent) != DIGEST_SIZE_BYTES:
            raise RequestError(
                f"a parent digest of {len(parent)} bytes, {DIGEST_SIZE_BYTES} needed"
            )


def _run_lengths(tiers: bytes) -> list[tuple[int, int]]:
    """Return (tier bits, chunks) for every run of equal bytes."""
    runs: list[tuple[int, int]] = []
    while tiers:
        rest = tiers.lstrip(tiers[:1])
        runs.append((tiers[0], len(tiers) - len(rest)))
        tiers = rest
    return runs


def fingerprint(digest: Digest) -> int:
    """Return 64 bits that recognise *digest* in a policy's memory."""
    return int.from_bytes(digest[:8], "little")
