"""What the store knows of the tiers below the host tier: what lies there, and what leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kvstore.limits import CHUNK_SIZE_MAX_BYTES, REMEMBERED_CHUNKS_MAX
from kvstore.store.history import Fate
from kvstore.store.shards import ShardRecord, find_form, whole_bytes
from kvstore.tiers.base import ShardKey
from kvstore.types import NO_SLOT, Digest, Extent, HeadRange, Place, TierKind

if TYPE_CHECKING:
    from kvstore.store.history import History
    from kvstore.store.index import Index
    from kvstore.store.namespace import Namespace
    from kvstore.store.residence import Residents
    from kvstore.tiers.base import Recovered, RecoveredRun

# Tiers whose room is ours to give: what is there is known, however much it is.
_OURS: Final = TierKind.DEVICE | TierKind.DISK


class SlowerTiers:
    """Keeps index, order of leaving and accounts of all tiers but the host tier in step.

    *residents* has the tiers there are. One whose capacity is not known here forgets by
    itself; what is there is remembered up to a bound, and found again when it is asked for.
    *forming* are the bits of those that make forms of their own.
    """

    def __init__(
        self, index: Index, residents: Mapping[TierKind, Residents], history: History
    ) -> None:
        self.residents = residents
        self._history = history
        self.forming = 0
        self.let_go: dict[TierKind, Callable[[ShardKey], None]] = {}
        """Who is told, by tier, of what is there no more: those whose room is freed at once."""
        self._index = index

    def entered(self, slot: int, written: ShardRecord, kind: TierKind, place: Place) -> None:
        """Note that *written*, a shard of *slot* or a form of one, lies in *kind*, at *place*."""
        former = self._index.shard(slot, written.heads, kind)
        if former is not None and former.root != written.root:
            self.left(slot, kind, written.heads)
        self._enter(slot, kind, written._replace(tiers=kind, place=place))

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
        space, digest = self._index.space_of(slot), self._index.digest(slot)
        if heads is None or {shard.heads for shard in there} == {heads}:
            residents.forget(slot, evicted=evicted)
        if evicted:
            self._history.note(space, digest, Fate.EVICTED_FOR_ROOM, kind)
        lost = self._index.lose(slot, kind, heads)
        residents.gave(space, lost)
        for shard in lost:
            residents.shares.refund(tenant, shard.size_bytes)
            if kind in self.let_go:
                self.let_go[kind](ShardKey(space.id, digest, shard.heads))
        return lost

    def learn(self, space: Namespace, kind: TierKind, found: Recovered, *, tenant: int) -> int:
        """Note a shard that a tier says it has; return its slot, or `NO_SLOT` when it is refused.

        A tier may hold what no daemon of ours wrote: what does not fit the manifest is refused.
        Bytes that differ from those known here, of the same key, are left alone, unless the tier
        makes forms of its own.
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
            return self.add(space, digest, parent, record, tenant)
        forms = [known for known in self._index.shards(slot) if known.heads == heads]
        former = next((known for known in forms if known.tiers & kind), None)
        if former is None:
            if not forms or find_form(forms, record) is not None or kind & self.forming:
                self._enter(slot, kind, record)
        elif former.tiers == kind and find_form([former], record) is None:
            # Another daemon has written this key anew, with bytes that are as good.
            self.left(slot, kind, heads)
            return self.learn(space, kind, found, tenant=tenant)
        return slot

    def add(
        self, space: Namespace, digest: Digest, parent: int, record: ShardRecord, tenant: int
    ) -> int:
        """Publish the first shard of a chunk, which is in one slower tier; return its slot."""
        slot = self._index.add(space, digest, parent, record, tenant)
        self._charge(slot, TierKind(record.tiers), record, is_new=True)
        return slot

    def recover(self, kind: TierKind, found: Iterable[tuple[Namespace, int, RecoveredRun]]) -> int:
        """Take in what the tier *kind* has kept: (namespace, tenant, shards); return how many."""
        early: list[tuple[Namespace, int, Digest | None]] = []
        count = 0
        for space, tenant, run in found:
            if self._is_fresh(space, run):
                first = self._recover_run(space, kind, run, tenant)
                roots = self._index.tree.roots(first, len(run.digests))
                early += ((space, slot, run.parents[slot - first]) for slot in roots)
                count += len(run.digests)
                continue
            for one in run.each():
                slot = self.learn(space, kind, one, tenant=tenant)
                if slot != NO_SLOT:
                    early.append((space, slot, one.shard.parent))
                    count += 1
        for space, slot, parent in early:
            above = NO_SLOT if parent is None else space.find(parent)
            if above != NO_SLOT:
                self._index.adopt(slot, above)
        return count

    def next_victim(self, kind: TierKind, tenant: int, need_bytes: int) -> int:
        """Return the slot that leaves the tier *kind* for *need_bytes* of *tenant*."""
        return self.residents[kind].next_victim(
            tenant, need_bytes, lambda slot: self.bytes_of(slot, kind)
        )

    def sizes(self, slots: Sequence[int], runs: Iterable[tuple[int, int]]) -> dict[int, int]:
        """Return tier bits -> what a chunk of such a run takes in its fastest tier.

        *runs* are (tier bits, chunks) over *slots*; the first chunk of a kind speaks for all.
        """
        found: dict[int, int] = {}
        position = 0
        for bits, count in runs:
            if bits not in found:
                found[bits] = self.bytes_of(slots[position], bits & -bits)
            position += count
        return found

    def bytes_of(self, slot: int, kind: int) -> int:
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

    def _is_fresh(self, space: Namespace, run: RecoveredRun) -> bool:
        """Return whether *run* is of whole chunks none of which is known, and none comes twice."""
        return (
            run.heads == space.manifest.all_heads
            and int(run.sizes.min()) > 0
            and int(run.sizes.max()) <= CHUNK_SIZE_MAX_BYTES
            and len(set(run.digests)) == len(run.digests)
            and space.ready.keys().isdisjoint(run.digests)
            and space.partial.keys().isdisjoint(run.digests)
        )

    def _recover_run(self, space: Namespace, kind: TierKind, run: RecoveredRun, tenant: int) -> int:
        """Take in *run*, which is fresh, all at once; return its first slot."""
        count, size_bytes = len(run.digests), int(run.sizes.sum(dtype="u8"))
        first = self._index.add_run(space, kind, run, tenant)
        residents = self.residents[kind]
        residents.shares.charge(tenant, size_bytes)
        residents.gained_whole(space, count, size_bytes)
        residents.admit_run(first, count, size_bytes // count)
        return first

    def _enter(self, slot: int, kind: TierKind, record: ShardRecord) -> None:
        """Note *record*, which is in *kind*: bytes that are known, or a form of their own."""
        is_new = not self._index.tiers_of(slot) & kind
        known = find_form(self._index.shards(slot), record)
        if known is None:
            self._index.add_shard(slot, record)
        else:
            # Only the durable tier has places: another must not take that one's away.
            place = record.place if kind is TierKind.DISK else known.place
            here = known._replace(tiers=known.tiers | kind, place=place)
            self._index.replace(slot, known, here)
        if known is None or not known.tiers & kind:
            self._charge(slot, kind, record, is_new=is_new)

    def _charge(self, slot: int, kind: TierKind, record: ShardRecord, *, is_new: bool) -> None:
        residents = self.residents[kind]
        residents.shares.charge(self._index.tenant_of(slot), record.size_bytes)
        residents.gained(self._index.space_of(slot), record)
        if is_new:
            heads = self._index.space_of(slot).manifest.kv_heads
            residents.admit(slot, whole_bytes(record, heads))
        if residents.count > REMEMBERED_CHUNKS_MAX and not kind & _OURS:
            self._forget_one(kind, slot)

    def _forget_one(self, kind: TierKind, newest: int) -> None:
        """Forget that a chunk is in the tier *kind*; it is found there again if need be."""
        oldest = self.residents[kind].oldest()
        if oldest not in {NO_SLOT, newest} and not self._index.is_held(oldest):
            space, digest = self._index.space_of(oldest), self._index.digest(oldest)
            self._history.note(space, digest, Fate.FORGOTTEN, kind)
            self.left(oldest, kind)
