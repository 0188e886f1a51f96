"""What an earlier daemon left in the host tier, brought back: the arena was kept, it was not.

Records say what is where. Those that cannot be true are dropped and counted; what was being
written is set aside until nobody can write there any more; all else is served again, in the
order in which it was published. The checksum table of every shard is held against its root at
once. Its bytes are verified by every client that loads it and behind everybody's back, or, for
clients that do not verify, before it is served at all.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.errors import KVStoreError
from kvstore.protocol.manifest import decode_namespace
from kvstore.store.quota import DEFAULT_TENANT
from kvstore.store.shards import ShardRecord
from kvstore.store.soundness import apart, known, tenant_mark, within
from kvstore.tiers.record_layout import FILLING, HAS_PARENT, RECORD, Owner
from kvstore.types import NO_SLOT, Digest, Extent, HeadRange, NamespaceId, Root

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.store.soundness import Mask
    from kvstore.store.store import Store
    from kvstore.tiers.host import HostTier
    from kvstore.tiers.records import Records, Rows

_READY_COLUMNS: Final = (
    "offset", "size_bytes", "root", "head_start", "head_stop", "flags", "tenant",
    "namespace", "digest", "parent",
)  # fmt: skip
_BATCH_ROWS: Final = 4096
_OWNER_COLUMNS: Final = ("offset", "size_bytes", "pid", "started", "pid_space")


class Left(NamedTuple):
    """One shard that was left, and where it belongs."""

    space: Namespace
    digest: Digest
    parent: Digest | None
    shard: ShardRecord
    tenant: int


class Recovery:
    """The host tier of an earlier daemon, on its way back into *store*, which has no chunks there.

    With *proven_first* nothing is served before `prove` has verified it, for clients that do
    not. *aside* has the extents that were being written, by who may still write there; the
    caller gives them up (`Store.give_up_room`) once that is over. *left* counts the shards that
    come back, *dropped*, by reason, those that do not.
    """

    def __init__(self, store: Store, *, proven_first: bool = False) -> None:
        """Take in what is left. Blocking: some 20 us a shard."""
        self.aside: dict[Owner, list[Extent]] = {}
        self.dropped: Counter[str] = Counter()
        self.left = 0
        self.left_bytes = 0
        self._store = store
        self._proven_first = proven_first
        self._spaces: dict[NamespaceId, Namespace] = {}
        self._rows: Rows = np.empty(0, dtype=RECORD)
        if store.host.records is not None:
            self._take_in(store.host.records)
        if proven_first:
            self._hold_all()
        else:
            self._publish_all()
            self._leave_spaces()

    async def prove(self) -> None:
        """Verify every byte, one shard at a time; what is wrong is dropped and counted.

        What has left the arena since is passed over.
        """
        early: list[Left] = []
        for left in self._lefts():
            if not (self._proven_first or self._is_served(left)):
                continue
            is_right = await asyncio.to_thread(
                self._store.host.verify_bytes, left.shard.extent, left.shard.root
            )
            if self._proven_first:
                self._publish_proven(left, early, is_right=is_right)
            elif not is_right and self._is_served(left):
                self._count_wrong()
                self._store.room.vacate(left.space.find(left.digest), evicted=False)
            if is_right and self._is_served(left):
                # What was on its way to a slower tier when its daemon ended is so again.
                self._store.offer(left.space.find(left.digest))
        self._adopt(early)
        if self._proven_first:
            self._leave_spaces()

    # --- taking in ----------------------------------------------------------------------------

    def _take_in(self, records: Records) -> None:
        found = records.scan()
        self._count("torn", found.torn)
        self._open_spaces(records, found.rows)
        kept = self._sound(found.rows)
        records.resume(found, kept)
        rows = found.rows[kept]
        rows = rows[np.argsort(rows["sequence"], kind="stable")]
        self._store.host.occupy(map(Extent, rows["offset"].tolist(), rows["size_bytes"].tolist()))
        filling = rows["state"] == FILLING
        self._set_aside(rows[filling])
        self._rows = rows[~filling]
        self.left = len(self._rows)
        self._store.counters.recover_shards = self.left
        self.left_bytes = int(self._rows["size_bytes"].sum())

    def _open_spaces(self, records: Records, rows: Rows) -> None:
        """Enter the namespaces that *rows* are of, so that none of them goes meanwhile."""
        in_use = set(rows["namespace"].tolist())
        for namespace, introduction in records.namespaces().items():
            if namespace not in in_use:
                continue
            try:
                manifest, tenant = decode_namespace(introduction)
                # A version that knows another field has another name for the same manifest.
                if manifest.namespace_id(tenant) == namespace:
                    self._spaces[namespace] = self._store.enter(manifest, tenant)
            except KVStoreError:
                continue

    def _leave_spaces(self) -> None:
        for space in self._spaces.values():
            self._store.leave(space)

    def _sound(self, rows: Rows) -> Mask:
        """Return which of *rows* are to be used; counts the others by the first reason not to."""
        tests: tuple[tuple[str, Callable[[Rows, HostTier], Mask]], ...] = (
            ("out of bounds", within),
            ("overlapping", apart),
            ("of no known namespace", self._is_known),
            ("of other bytes", _has_table),
        )
        kept = np.arange(len(rows))
        for reason, test in tests:
            holds = test(rows[kept], self._store.host)
            self._count(reason, len(kept) - int(holds.sum()))
            kept = kept[holds]
        sound = np.zeros(len(rows), dtype=np.bool_)
        sound[kept] = True
        return sound

    def _is_known(self, rows: Rows, _: HostTier) -> Mask:
        heads = {namespace: space.manifest.kv_heads for namespace, space in self._spaces.items()}
        writing: Mask = rows["state"] == FILLING
        return writing | known(rows, heads)

    def _set_aside(self, rows: Rows) -> None:
        for offset, size_bytes, *owner in rows[list(_OWNER_COLUMNS)].tolist():
            extent = Extent(offset, size_bytes)
            self._store.hold_room(DEFAULT_TENANT, extent)
            self.aside.setdefault(Owner(*owner), []).append(extent)

    def _lefts(self) -> Iterator[Left]:
        """Yield all shards that are left, in the order in which they were published."""
        tenants = {tenant_mark(name): number for number, name in enumerate(self._store.tenants)}
        for start in range(0, len(self._rows), _BATCH_ROWS):
            rows = self._rows[start : start + _BATCH_ROWS]
            for row in rows[list(_READY_COLUMNS)].tolist():
                offset, size_bytes, root, first, end, flags, mark, namespace, digest, parent = row
                yield Left(
                    self._spaces[namespace],
                    digest,
                    parent if flags & HAS_PARENT else None,
                    ShardRecord(HeadRange(first, end), Extent(offset, size_bytes), root),
                    tenants.get(mark, DEFAULT_TENANT),
                )

    # --- publishing ---------------------------------------------------------------------------

    def _publish_all(self) -> None:
        early: list[Left] = []
        for left in self._lefts():
            self._publish(left, early)
        self._adopt(early)

    def _hold_all(self) -> None:
        for left in self._lefts():
            self._store.hold_room(left.tenant, left.shard.extent)

    def _publish_proven(self, left: Left, early: list[Left], *, is_right: bool) -> None:
        if is_right:
            self._store.unhold_room(left.shard.extent)
            self._publish(left, early)
        else:
            self._count_wrong()
            self._store.give_up_room(left.shard.extent)

    def _publish(self, left: Left, early: list[Left]) -> None:
        """Serve one shard; note it as *early* when the chunk before it is not there yet."""
        if not self._store.restore(*left):
            self._count("kept twice", 1)
        elif left.parent is not None and left.space.find(left.parent) == NO_SLOT:
            early.append(left)

    def _adopt(self, early: Iterable[Left]) -> None:
        """Put chunks that came before their parents where they belong."""
        for left in early:
            assert left.parent is not None, "only children come early"
            slot, parent = left.space.find(left.digest), left.space.find(left.parent)
            if NO_SLOT not in {slot, parent}:
                self._store.index.adopt(slot, parent)

    def _is_served(self, left: Left) -> bool:
        """Return whether the very bytes that were left are served now."""
        slot = left.space.find(left.digest)
        shard = None if slot == NO_SLOT else self._store.index.shard(slot, left.shard.heads)
        return (
            shard is not None
            and shard.is_in_host
            and (shard.extent, shard.root) == (left.shard.extent, left.shard.root)
        )

    def _count_wrong(self) -> None:
        self._store.counters.checksum_failures += 1
        self._count("of other bytes", 1)

    def _count(self, reason: str, number: int) -> None:
        if number:
            self.dropped[reason] += number
            self._store.counters.recover_shards_dropped += number


def _has_table(rows: Rows, host: HostTier) -> Mask:
    """Return which of *rows* are of a shard whose checksum table is the one of its root."""
    columns = rows[["state", "offset", "size_bytes", "root"]].tolist()
    return np.fromiter(
        (
            state == FILLING or host.verify_table(Extent(offset, size_bytes), Root(root))
            for state, offset, size_bytes, root in columns
        ),
        dtype=np.bool_,
        count=len(rows),
    )
