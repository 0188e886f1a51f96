"""What the store knows of the tiers below the host tier: what lies there, and what leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kvstore.limits import CHUNK_SIZE_MAX_BYTES, REMEMBERED_CHUNKS_MAX
from kvstore.store.history import Fate
from kvstore.store.shards import ShardRecord
from kvstore.types import NO_SLOT, Digest, Extent, HeadRange, Place, TierKind

if TYPE_CHECKING:
    from kvstore.store.history import History
    from kvstore.store.index import Index
    from kvstore.store.namespace import Namespace
    from kvstore.store.residence import Residents
    from kvstore.tiers.base import Recovered


class SlowerTiers:
    """Keeps index, order of leaving and accounts of all tiers but the host tier in step.

    *residents* has the tiers there are. One whose capacity is not known here forgets by
    itself; what is there is remembered up to a bound, and found again when it is asked for.
    """

    def __init__(
        self, index: Index, residents: Mapping[TierKind, Residents], history: History
    ) -> None:
        self.residents = residents
        self._history = history
        self._index = index

    def entered(self, slot: int, heads: HeadRange, kind: TierKind, place: Place) -> None:
        """Note that the shard *heads* of *slot* lies in the tier *kind*, at *place*."""
        known = self._index.shard(slot, heads)
        assert known is not None, f"slot {slot} has a shard {heads}"
        self._note(slot, kind, known, place)

    def left(
        self, slot: int, kind: TierKind, heads: HeadRange | None = None, *, evicted: bool = False
    ) -> list[ShardRecord]:
        """Note that *slot*, or its shard *heads*, is in the tier *kind* no more.

        Returns the shards that were there.
        """
        there = [shard for shard in self._index.shards(slot) if shard.tiers & kind]
        if not there:
            return []
        residents, tenant = self.residents[kind], self._index.tenant_of(slot)
        if heads is None or {shard.heads for shard in there} == {heads}:
            residents.forget(slot, evicted=evicted)
        space = self._index.space_of(slot)
        if evicted:
            self._history.note(space, self._index.digest(slot), Fate.EVICTED_FOR_ROOM, kind)
        lost = self._index.lose(slot, kind, heads)
        residents.gave(space, lost)
        for shard in lost:
            residents.shares.refund(tenant, shard.size_bytes)
        return lost

    def learn(self, space: Namespace, kind: TierKind, found: Recovered, *, tenant: int) -> int:
        """Note a shard that a tier says it has; return its slot, or `NO_SLOT` when it is refused.

        A tier may hold what no daemon of ours wrote: what does not fit the manifest is refused.
        Bytes that differ from those known here, of the same key, are left alone.
        """
        shard, place = found
        heads, digest = shard.key.heads, shard.key.digest
        if not 0 <= heads.start < heads.stop <= space.manifest.kv_heads:
            return NO_SLOT
        if not 0 < shard.size_bytes <= CHUNK_SIZE_MAX_BYTES:
            return NO_SLOT
        slot = space.find(digest)
        record = ShardRecord(heads, Extent(0, shard.size_bytes), shard.root, kind, place)
        if slot == NO_SLOT:
            parent = NO_SLOT if shard.parent is None else space.find(shard.parent)
            slot = self._index.add(space, digest, parent, record, tenant)
            self._charge(slot, kind, record, is_new=True)
            return slot
        known = self._index.shard(slot, heads)
        if known is None:
            self._index.add_shard(slot, record)
            self._admit(slot, kind, record)
        elif (known.root, known.size_bytes) == (shard.root, shard.size_bytes):
            if not known.tiers & kind:
                self._note(slot, kind, known, place)
        elif known.tiers == kind:
            # Another daemon has written this key anew, with bytes that are as good.
            self.left(slot, kind, heads)
            return self.learn(space, kind, found, tenant=tenant)
        return slot

    def recover(
        self, kind: TierKind, found: Iterable[tuple[Namespace, int, Sequence[Recovered]]]
    ) -> int:
        """Take in what the tier *kind* has kept: (namespace, tenant, shards); return how many."""
        early: list[tuple[Namespace, int, Digest]] = []
        count = 0
        for space, tenant, run in found:
            for slot, one in self._recover_run(space, kind, run, tenant):
                count += 1
                parent = one.shard.parent
                if parent is not None and self._index.tree.parent(slot) == NO_SLOT:
                    early.append((space, slot, parent))
        for space, slot, parent in early:
            above = space.find(parent)
            if above != NO_SLOT:
                self._index.adopt(slot, above)
        return count

    def next_victim(self, kind: TierKind, tenant: int, need_bytes: int) -> int:
        """Return the slot that leaves the tier *kind* for *need_bytes* of *tenant*."""
        return self.residents[kind].next_victim(
            tenant, need_bytes, lambda slot: self.bytes_of(slot, kind)
        )

    def bytes_of(self, slot: int, kind: TierKind) -> int:
        """Return the bytes of *slot* in the tier *kind*."""
        return sum(s.size_bytes for s in self._index.shards(slot) if s.tiers & kind)

    def check(self) -> None:
        """Raise `AssertionError` unless counts and accounts are those of the index."""
        for kind, residents in self.residents.items():
            here = [slot for slot in self._index.slots() if self._index.tiers_of(slot) & kind]
            assert residents.count == len(here), f"chunks in {kind.name}"
            used = [0] * len(residents.shares)
            for slot in here:
                used[self._index.tenant_of(slot)] += self.bytes_of(slot, kind)
            residents.shares.check(used)
            residents.check_holdings(here)

    def _recover_run(
        self, space: Namespace, kind: TierKind, run: Iterable[Recovered], tenant: int
    ) -> Iterator[tuple[int, Recovered]]:
        """Take in *run* and yield what is kept of it with its slots: whole new chunks at once."""
        whole = space.manifest.all_heads
        fresh: dict[Digest, Recovered] = {}
        others: list[Recovered] = []
        for one in run:
            (_, digest, heads), _, size_bytes, _ = one.shard
            is_whole = heads == whole and 0 < size_bytes <= CHUNK_SIZE_MAX_BYTES
            if is_whole and digest not in fresh and space.find(digest) == NO_SLOT:
                fresh[digest] = one
            else:
                others.append(one)
        if fresh:
            plain = list(fresh.values())
            first = self._index.add_run(space, kind, plain, tenant)
            residents = self.residents[kind]
            size_bytes = sum(one.shard.size_bytes for one in plain)
            residents.shares.charge(tenant, size_bytes)
            residents.gained_whole(space, len(plain), size_bytes)
            residents.admit_run(first, len(plain), space.chunk_bytes)
            yield from enumerate(plain, first)
        for one in others:
            slot = self.learn(space, kind, one, tenant=tenant)
            if slot != NO_SLOT:
                yield slot, one

    def _note(self, slot: int, kind: TierKind, known: ShardRecord, place: Place) -> None:
        is_new = not self._index.tiers_of(slot) & kind
        if known.tiers & kind:
            self._index.gain(slot, known.heads, kind, place=place)
            return
        self._index.gain(slot, known.heads, kind, place=place)
        self._charge(slot, kind, known, is_new=is_new)

    def _admit(self, slot: int, kind: TierKind, record: ShardRecord) -> None:
        here = sum(1 for shard in self._index.shards(slot) if shard.tiers & kind)
        self._charge(slot, kind, record, is_new=here == 1)

    def _charge(self, slot: int, kind: TierKind, record: ShardRecord, *, is_new: bool) -> None:
        residents = self.residents[kind]
        residents.shares.charge(self._index.tenant_of(slot), record.size_bytes)
        residents.gained(self._index.space_of(slot), record)
        if is_new:
            residents.admit(slot, self._index.space_of(slot).chunk_bytes)
        if residents.count > REMEMBERED_CHUNKS_MAX and kind is not TierKind.DISK:
            self._forget_one(kind, slot)

    def _forget_one(self, kind: TierKind, newest: int) -> None:
        """Forget that a chunk is in the tier *kind*; it is found there again if need be."""
        oldest = self.residents[kind].oldest()
        if oldest not in {NO_SLOT, newest} and not self._index.is_held(oldest):
            space, digest = self._index.space_of(oldest), self._index.digest(oldest)
            self._history.note(space, digest, Fate.FORGOTTEN, kind)
            self.left(oldest, kind)
