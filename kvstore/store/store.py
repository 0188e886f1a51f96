"""The one owner of truth: what is kept, who holds it, what may leave.

Every change of the index, of leases, reservations and the arena's extents goes through here.
Synchronous and without a clock of its own: *now* is an argument, in seconds, monotonic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvstore.errors import ChecksumError, RequestError, TooLargeError
from kvstore.limits import DIGEST_SIZE_BYTES
from kvstore.protocol.manifest import Manifest
from kvstore.store.history import Fate
from kvstore.store.leases import Reservation
from kvstore.store.namespace import Namespace
from kvstore.store.quota import DEFAULT_TENANT
from kvstore.store.recompute import Worth, run_lengths, worth_loading
from kvstore.store.shards import ShardRecord, bytes_for, choose_cover, covers, is_at_hand
from kvstore.store.shelves import NO_TENANT, Shelves
from kvstore.tiers.record_layout import Owner
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
    TierKind,
)

NO_LEASE = LeaseId(0)
_HOST = TierKind.HOST
# What another host holds for itself is not kept: it may be gone at any time.
_KEEPING = ~TierKind.PEER


class Hits(NamedTuple):
    """What a look-up found: *hits* chunks count, *arriving* more are being written behind them.

    *tiers* is run-length: (tier bits, chunks), in prefix order, over the chunks found.
    *expected_seconds* is what their load takes, by all that is known.
    """

    hits: int
    arriving: int
    tiers: list[tuple[int, int]]
    lease: LeaseId
    expected_seconds: float = 0.0


class Granted(NamedTuple):
    """What became of one key of a reserve; the rest is there only when it was reserved."""

    outcome: ReserveOutcome
    reservation: ReservationId = ReservationId(0)
    extent: Extent = Extent(0, 0)
    is_pooled: bool = False


class Loading(NamedTuple):
    """Leased chunks on their way to a session: for each, the shards that cover *heads*.

    *direct* are the tiers whose memory the session has mapped.
    """

    session: SessionId
    space: Namespace
    heads: HeadRange
    lease: LeaseId
    slots: list[int]
    chunks: list[list[ShardRecord]]
    direct: int = _HOST

    @property
    def is_at_hand(self) -> bool:
        """Whether all of it can be read where it lies."""
        chunks = self.chunks
        return all(s.tiers & _HOST or self.has_at_hand(s) for chunk in chunks for s in chunk)

    def has_at_hand(self, shard: ShardRecord) -> bool:
        """Return whether the session can read *shard* where it lies."""
        return is_at_hand(shard, self.heads, self.direct)

    def is_pooled(self, shard: ShardRecord) -> bool:
        """Return whether the session reads *shard*, which it has at hand, in the device tier."""
        return is_at_hand(shard, self.heads, self.direct & TierKind.DEVICE)


class Store(Shelves):
    """Namespaces, chunks, leases and reservations of one daemon over its tiers."""

    # --- namespaces ---------------------------------------------------------------------

    def enter(self, manifest: Manifest, tenant: str = NO_TENANT) -> Namespace:
        """Return the namespace of *manifest*, new or known, with one more session in it.

        That of a *tenant* is another. Raises `TooLargeError` when one chunk is larger than the
        arena, `LimitError` when there are too many namespaces.
        """
        space = self.open(manifest, tenant)
        space.entered += 1
        return space

    def open(self, manifest: Manifest, tenant: str = NO_TENANT) -> Namespace:
        """Return the namespace of *manifest* and *tenant*; see `enter`."""
        space = self._spaces.get(manifest.namespace_id(tenant))
        if space is None:
            self._check_fits(manifest.chunk_bytes)
            space = self.index.open_namespace(manifest, tenant)
            self._spaces = {known.id: known for known in self.index.namespaces}
        return space

    def known(self, namespace: NamespaceId) -> Namespace | None:
        """Return the namespace with this id, if it is known."""
        return self._spaces.get(namespace)

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
        recompute_seconds: float = 0.0,
    ) -> Hits:
        """Count the leading chunks, or with *window* those of a sliding group, and lease them.

        Chunks whose load takes longer than the *recompute_seconds* of each are not counted.
        """
        present, slots = self.index.prefix(space, digests, window)
        arriving = self._count_arriving(space, digests, present)
        tiers = run_lengths(self.index.tiers(slots))
        hits, expected = present, 0.0
        if any(not bits & _HOST for bits, _ in tiers):
            worth = self._worth(slots, tiers, recompute_seconds)
            if worth.chunks < len(slots):
                hits, slots = (0 if window else worth.chunks), slots[: worth.chunks]
                tiers = run_lengths(self.index.tiers(slots)) if hits else []
                slots = slots if hits else []
            expected = worth.expected_seconds if hits else 0.0
        self._count_outcomes(space, digests, present, hits, arriving)
        self._count_tiers(tiers, hits)
        if hits < present:
            arriving = 0
            self._note_first(space, digests[hits], Fate.DECLINED)
        granted = self._lease(session, slots, now) if lease and slots else NO_LEASE
        return Hits(hits, arriving, tiers, granted, expected)

    def _worth(
        self,
        slots: Sequence[int],
        tiers: Sequence[tuple[int, int]],
        recompute_seconds: float,
        direct: int = _HOST,
    ) -> Worth:
        assert self._movement is not None, "what is in slower tiers was moved there"
        movement, sizes = self._movement, self.slower.sizes(slots, tiers)

        def seconds_for(bits: int, chunks: int) -> float:
            return 0.0 if bits & direct else movement.expected_seconds(bits, chunks, sizes[bits])

        return worth_loading(tiers, seconds_for, recompute_seconds)

    def _count_outcomes(
        self, space: Namespace, digests: Sequence[Digest], present: int, hits: int, arriving: int
    ) -> None:
        """Count what became of each of *digests*: the outcomes add up to their number."""
        counters, rest = self.counters, len(digests) - present - arriving
        unavailable = 0
        if rest and self.index.is_degraded:
            behind = self.index.leading(space, digests[present + arriving :])
            unavailable = sum(not self.index.is_usable(slot) for slot in behind)
        counters.lookup_chunks_ready += hits
        counters.lookup_chunks_declined += present - hits
        counters.lookup_chunks_arriving += arriving
        counters.lookup_chunks_unavailable += unavailable
        counters.lookup_chunks_miss += rest - unavailable

    def _count_tiers(self, tiers: Sequence[tuple[int, int]], hits: int) -> None:
        """Count each hit for the fastest tier that has it.

        Those before a window, which are not looked at, count for the same tier as its first.
        """
        unseen = hits - sum(chunks for _, chunks in tiers)
        for bits, chunks in tiers:
            self.hit_chunks[bits & -bits] += chunks + unseen
            unseen = 0

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
        """Lease the leading chunks that are in the host tier and return their shards.

        A use of every chunk returned. The lease is `NO_LEASE` when there are none.
        """
        loading = self.begin_load(session, space, digests, heads, now)
        return self.end_load(loading, len(loading.slots))

    def begin_load(
        self,
        session: SessionId,
        space: Namespace,
        digests: Sequence[Digest],
        heads: HeadRange,
        now: float,
        *,
        recompute_seconds: float = 0.0,
        direct: int = _HOST,
    ) -> Loading:
        """Lease the leading chunks, whichever tiers they are in, until `end_load`."""
        self._check_heads(space, heads)
        hits, slots = self.index.prefix(space, digests)
        tiers = run_lengths(self.index.tiers(slots))
        if any(not bits & direct for bits, _ in tiers):
            slots = slots[: self._worth(slots, tiers, recompute_seconds, direct).chunks]
            self.counters.load_chunks_declined += hits - len(slots)
        lease = self._lease(session, slots, now) if slots else NO_LEASE
        usable = self.index.usable
        chunks = [choose_cover(self.index.shards(slot), heads, usable, direct) for slot in slots]
        return Loading(session, space, heads, lease, slots, chunks, direct)

    def end_load(self, loading: Loading, count: int) -> tuple[LeaseId, list[list[ShardRecord]]]:
        """Narrow a load to its first *count* chunks that are at hand; return their shards.

        A use of every chunk returned. The lease is `NO_LEASE` when there are none, or when it
        ended meanwhile.
        """
        if not self.leases.holds(loading.session, loading.lease):
            return NO_LEASE, []
        if loading.is_at_hand and count == len(loading.slots):
            slots, chunks = loading.slots, loading.chunks
        else:
            slots, chunks = self._arrived(loading, count)
            if len(slots) < len(loading.slots):
                digest = self.index.digest(loading.slots[len(slots)])
                self._note_first(loading.space, digest, Fate.LATE)
            for slot in loading.slots[len(slots) :]:
                self.index.release(slot)
            if not slots:
                self.leases.end(loading.session, [loading.lease])
                self._sweep()
                return NO_LEASE, []
            self.leases.narrow(loading.lease, slots)
            self._sweep()
        # The head of the prefix is used last, so that it is the most recent.
        for slot in reversed(slots):
            if self.index.tiers_of(slot) & _HOST:
                self.residents.touch(slot)
        if self.device is not None and loading.direct != _HOST:
            self.device.loaded(loading, slots, chunks)
        if self._movement is not None:
            self._movement.used(slots)
        self.counters.load_chunks += len(slots)
        self.counters.load_bytes += sum(bytes_for(chunk, loading.heads) for chunk in chunks)
        return loading.lease, chunks

    def _arrived(self, loading: Loading, count: int) -> tuple[list[int], list[list[ShardRecord]]]:
        """Return the leading slots of a load whose shards are all at hand, with those."""
        chunks: list[list[ShardRecord]] = []
        for slot in loading.slots[:count]:
            here = [shard for shard in self.index.shards(slot) if loading.has_at_hand(shard)]
            if not covers([shard.heads for shard in here], loading.heads):
                break
            chunks.append(choose_cover(here, loading.heads, direct=loading.direct))
        return loading.slots[: len(chunks)], chunks

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
        tenant: int = DEFAULT_TENANT,
        pooled: bool = False,
    ) -> list[Granted]:
        """Give room for the shard *heads* of consecutive chunks, evicting where needed.

        The room counts for *tenant*; with *pooled* it may be in the device tier. Chunks present,
        or being written by someone, get none.
        Raises `TooLargeError` and changes nothing when a chunk could never fit.
        """
        self._check_heads(space, heads)
        self._check_parent(parent)
        if sizes and len(sizes) != len(digests):
            raise RequestError(f"{len(sizes)} sizes for {len(digests)} digests")
        wanted = list(sizes) or [space.manifest.shard_bytes(heads)] * len(digests)
        self._check_fits(max(wanted))
        self.reservations.check_room(session, len(digests))
        granted: list[Granted] = []
        for digest, size in zip(digests, wanted, strict=True):
            wish = Reservation(
                session, space, digest, parent, heads, Extent(0, size), tenant, pooled
            )
            granted.append(self._reserve_one(wish))
            parent = digest
        if self._movement is not None:
            self._movement.pressed()
        return granted

    def commit(self, session: SessionId, reservation: ReservationId, root: Root) -> Reservation:
        """Publish a filled reservation once its bytes are found to match *root*; return it.

        Raises `ReservationError` when the session has no such reservation, and
        `ChecksumError`, which frees it, when the bytes are not those of *root*.
        """
        record = self.reservations.get(session, reservation)
        # What is in the device tier is verified when it is copied down, and by who loads it.
        if not record.is_pooled and not self.host.verify(record.extent, root):
            self.counters.checksum_failures += 1
            self._abandon(reservation, Fate.DAMAGED_AT_COMMIT)
            raise ChecksumError(
                f"reservation {reservation}: its bytes do not match root {root:#018x}"
            )
        self.reservations.end(reservation)
        self._publish(record, root)
        self.announce(record.space, record.digest)
        return record

    def abort(self, session: SessionId, reservations: Iterable[ReservationId]) -> int:
        """Free *reservations* of *session*, all or none; raises `ReservationError`."""
        wanted = list(dict.fromkeys(reservations))
        for reservation in wanted:
            self.reservations.get(session, reservation)
        for reservation in wanted:
            self._abandon(reservation)
        return len(wanted)

    def delete(
        self, space: Namespace, digests: Sequence[Digest], fate: Fate = Fate.DELETED
    ) -> tuple[int, int]:
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
                self.history.note(space, digest, fate, _HOST)
                self._remove(slot)
                gone += 1
        self.counters.delete_chunks += gone
        return gone, busy

    # --- holding ------------------------------------------------------------------------

    def release(self, session: SessionId, leases: Iterable[LeaseId]) -> int:
        """End *leases* of *session*, all or none; raises `LeaseError`."""
        ended = self.leases.end(session, leases)
        self._unhold(ended)
        return len(ended)

    def open_session(self, session: SessionId, writer: Owner) -> None:
        """Note which process writes to what *session* reserves, for a restart to find."""
        self._writers[session] = writer

    def end_session(self, session: SessionId) -> bool:
        """End the leases of *session* and withdraw its reservations.

        Returns whether it had reservations. Their room stays set aside until `bury`: a client
        that is still alive may yet write there.
        """
        self._unhold(self.leases.end_session(session))
        self._writers.pop(session, None)
        ended = self.reservations.end_session(session)
        if ended:
            self._orphans[session] = ended
        self.counters.abort_chunks += len(ended)
        for record in ended:
            self.history.note(record.space, record.digest, Fate.ABORTED, _HOST)
            self.announce(record.space, record.digest)
        return bool(ended)

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

    def _reserve_one(self, wish: Reservation) -> Granted:
        counters, space, digest = self.counters, wish.space, wish.digest
        slot = space.find(digest)
        if slot != NO_SLOT and self.has_shard(slot, wish.heads, self.index.usable & _KEEPING):
            counters.reserve_chunks_present += 1
            return Granted(ReserveOutcome.PRESENT)
        if self.reservations.is_arriving(space, digest, wish.heads):
            counters.reserve_chunks_arriving += 1
            return Granted(ReserveOutcome.ARRIVING)
        if wish.is_pooled and self.device is not None:
            extent = self.device.take(wish.tenant, wish.extent.size_bytes)
            if extent is not None:
                return self._grant(wish._replace(extent=extent))
        wish = wish._replace(is_pooled=False)
        extent = self.room.take(wish.tenant, wish.extent.size_bytes)
        if extent is None:
            self.history.note(space, digest, Fate.NO_ROOM, _HOST)
            counters.reserve_chunks_no_space += 1
            return Granted(ReserveOutcome.NO_SPACE)
        if not self.host.fill(extent, self._writers.get(wish.session, Owner())):
            self.room.give_back(wish.tenant, extent)
            counters.reserve_chunks_no_space += 1
            return Granted(ReserveOutcome.NO_SPACE)
        return self._grant(wish._replace(extent=extent))

    def _grant(self, wish: Reservation) -> Granted:
        self.counters.reserve_chunks_reserved += 1
        made = self.reservations.make(wish)
        return Granted(ReserveOutcome.RESERVED, made, wish.extent, wish.is_pooled)

    def _publish(self, record: Reservation, root: Root) -> None:
        space, shard = record.space, ShardRecord(record.heads, record.extent, root)
        self.reuse.stored(record.tenant, record.digest, space.chunk_bytes)
        self.counters.commit_chunks += 1
        self.counters.commit_bytes += record.extent.size_bytes
        if record.is_pooled and self.device is not None:
            self.device.publish(record, root)
            return
        slot = self._place(space, record.digest, record.parent, shard, record.tenant)
        if slot == NO_SLOT:
            self.room.give_back(record.tenant, record.extent)
            return
        self.room.publish(slot, shard)
        self.room.record(slot, shard, record.parent)
        if self._movement is not None:
            self._movement.published(slot, record.heads)

    def _abandon(self, reservation: ReservationId, fate: Fate = Fate.ABORTED) -> None:
        record = self.reservations.end(reservation)
        self.history.note(record.space, record.digest, fate, _HOST)
        self._free(record)
        self.counters.abort_chunks += 1
        self.announce(record.space, record.digest)

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
