"""Who is in one tier, whose they are, and in which order they leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from kvstore.store.planner import next_victim
from kvstore.store.policy import Columns, EvictionPolicy, make_policy
from kvstore.types import NO_SLOT, Digest, TierKind

if TYPE_CHECKING:
    from kvstore.store.index import Index
    from kvstore.store.namespace import Namespace
    from kvstore.store.quota import Shares
    from kvstore.store.shards import ShardRecord


class Holdings(NamedTuple):
    """The bytes of all shards in one tier: as they are kept, and without any codec.

    What has come in since the start, less what has left, is what is there.
    """

    stored_bytes: int = 0
    raw_bytes: int = 0
    entered_bytes: int = 0
    left_bytes: int = 0


class Residents:
    """The chunks of one tier. Each tenant's have an order of leaving of their own.

    The accounts in *shares* are the store's to keep; here they only decide who gives.
    """

    def __init__(self, index: Index, kind: TierKind, eviction: str, shares: Shares) -> None:
        self.kind = kind
        self.shares = shares
        self.count = 0
        self._entered_bytes = 0
        self._left_bytes = 0
        # Bytes stored, and without any codec, by the codec that the namespace names.
        self._by_codec: dict[str, list[int]] = {}
        self._index = index
        self._eviction = eviction
        self._columns = Columns()
        self._policies: dict[int, EvictionPolicy] = {}
        self._counts = [0] * len(shares)

    def admit(self, slot: int, size_bytes: int) -> None:
        """Take *slot* in, which has just entered the tier."""
        index, tenant = self._index, self._index.tenant_of(slot)
        after = index.tree.continued(slot, self.kind)
        if after != NO_SLOT and not (
            index.tiers_of(after) & self.kind and index.tenant_of(after) == tenant
        ):
            after = NO_SLOT
        self._policy(tenant).admit(slot, size_bytes, fingerprint(index.digest(slot)), after)
        self._counts[tenant] += 1
        self.count += 1

    def admit_run(self, first: int, count: int, size_bytes: int) -> None:
        """Take in *count* chunks of one tenant, *first* and those behind it, the oldest first."""
        tenant = self._index.tenant_of(first)
        self._policy(tenant).admit_run(first, count, size_bytes)
        self._counts[tenant] += count
        self.count += count

    @property
    def holdings(self) -> Holdings:
        """The bytes that are here, and those that came and went."""
        entered, left = self._entered_bytes, self._left_bytes
        raw_bytes = sum(raw for _, raw in self._by_codec.values())
        return Holdings(entered - left, raw_bytes, entered, left)

    @property
    def by_codec(self) -> dict[str, tuple[int, int]]:
        """The bytes stored here, and what they are without any codec, by codec of namespaces."""
        return {codec: (kept, raw) for codec, (kept, raw) in self._by_codec.items() if kept}

    def gained(self, space: Namespace, shard: ShardRecord) -> None:
        """Count the bytes of *shard*, which has come in."""
        self._entered_bytes += shard.extent.size_bytes
        self._count(space, shard.extent.size_bytes, space.head_bytes * shard.heads.width)

    def gained_whole(self, space: Namespace, count: int, size_bytes: int) -> None:
        """Count *count* whole chunks of *space*, of *size_bytes* together, that have come in."""
        self._entered_bytes += size_bytes
        self._count(space, size_bytes, space.head_bytes * space.manifest.kv_heads * count)

    def gave(self, space: Namespace, shards: Iterable[ShardRecord]) -> None:
        """Count the bytes of *shards*, which have left."""
        for shard in shards:
            self._left_bytes += shard.extent.size_bytes
            self._count(space, -shard.extent.size_bytes, -space.head_bytes * shard.heads.width)

    def check_holdings(self, slots: Iterable[int]) -> None:
        """Raise `AssertionError` unless the bytes are those of *slots*, which are all here."""
        found: dict[str, tuple[int, int]] = {}
        for slot in slots:
            space = self._index.space_of(slot)
            here = [shard for shard in self._index.shards(slot) if shard.tiers & self.kind]
            kept, raw = found.get(space.manifest.codec, (0, 0))
            kept += sum(shard.extent.size_bytes for shard in here)
            raw += sum(space.head_bytes * shard.heads.width for shard in here)
            found[space.manifest.codec] = kept, raw
        assert self.by_codec == found, f"bytes in {self.kind.name}"
        stored = sum(kept for kept, _ in found.values())
        assert self.holdings.stored_bytes == stored, f"bytes in {self.kind.name}"

    def _count(self, space: Namespace, stored_bytes: int, raw_bytes: int) -> None:
        bytes_here = self._by_codec.setdefault(space.manifest.codec, [0, 0])
        bytes_here[0] += stored_bytes
        bytes_here[1] += raw_bytes

    def touch(self, slot: int) -> None:
        """Note a use of *slot*."""
        self._policies[self._index.tenant_of(slot)].touch(slot)

    def hasten(self, slot: int) -> None:
        """Let *slot* leave before all others of its tenant."""
        self._policies[self._index.tenant_of(slot)].hasten(slot)

    def defer(self, slot: int) -> None:
        """Let *slot*, if it is here, leave after all others of its tenant."""
        if self._index.tiers_of(slot) & self.kind:
            self._policies[self._index.tenant_of(slot)].defer(slot)

    def resume(self, slot: int) -> None:
        """Let *slot* leave in its turn again, and those before it that waited for its pin to end.

        Nothing happens where it is soft-pinned still, not here, or `NO_SLOT`.
        """
        while slot != NO_SLOT and self._index.tiers_of(slot) & self.kind:
            policy = self._policies[self._index.tenant_of(slot)]
            if self._index.is_soft_pinned(slot) or not policy.is_deferred(slot):
                break
            policy.resume(slot)
            slot = self._index.tree.parent(slot)

    def forget(self, slot: int, *, evicted: bool) -> None:
        """Take *slot* out, which is about to leave the tier."""
        tenant = self._index.tenant_of(slot)
        mark = fingerprint(self._index.digest(slot))
        was_deferred = self._policies[tenant].is_deferred(slot)
        self._policies[tenant].forget(slot, mark, evicted=evicted)
        if was_deferred:
            self.resume(self._index.tree.parent(slot))
        self._counts[tenant] -= 1
        self.count -= 1

    def chunks_of(self, tenant: int) -> int:
        """Return how many chunks of *tenant* are here."""
        return self._counts[tenant]

    def next_victim(
        self,
        writer: int,
        need_bytes: int,
        size_of: Callable[[int], int],
        is_spared: Callable[[int], bool] | None = None,
    ) -> int:
        """Return the slot that leaves for *need_bytes* of the tenant *writer*, or `NO_SLOT`."""
        if self.kind is TierKind.HOST and self._index.held_in_host == self.count:
            return NO_SLOT

        def find(owner: int) -> int:
            policy, count = self._policy(owner), self._counts[owner]
            return next_victim(self._index, policy, self.kind, count=count, is_spared=is_spared)

        return self.shares.choose(writer, need_bytes, find, size_of)

    def oldest(self) -> int:
        """Return the slot that would leave next, whosever and wherever in its prefix it is.

        For tiers that are only remembered here, where the order of prefixes is not ours.
        """
        for tenant, policy in self._policies.items():
            if self._counts[tenant]:
                return policy.candidate()
        return NO_SLOT

    def _policy(self, tenant: int) -> EvictionPolicy:
        policy = self._policies.get(tenant)
        if policy is None:
            policy = self._policies[tenant] = make_policy(self._eviction, self._columns)
        return policy


def fingerprint(digest: Digest) -> int:
    """Return 64 bits that recognise *digest* in a policy's memory."""
    return int.from_bytes(digest[:8], "little")
