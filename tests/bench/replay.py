"""Hit rates by tier: traces of LLM traffic replayed against the store's own decisions.

The store, its index, planner, policies, admissions and quotas are the daemon's; time is the
trace's, and no bytes move: the arena is never written to, and the disk tier only counts. A
request looks its prompt up, loads what is there (from disk through the host tier), and stores
the rest and its answer. A hit counts for the fastest tier that has the chunk.

Run: python -m tests.bench.replay [--traffic chat,programs] [--requests 20000] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from kvstore.limits import MIB
from kvstore.metrics import Counters
from kvstore.store.admission import make_admission
from kvstore.store.namespace import Namespace
from kvstore.store.quota import DEFAULT_TENANT, Share, Shares
from kvstore.store.residence import fingerprint
from kvstore.store.shards import ShardRecord
from kvstore.store.shelves import NO_TENANT, SlowTier
from kvstore.store.store import Store
from kvstore.tiers.host import HostTier
from kvstore.transfer.arena import Arena
from kvstore.types import (
    NO_SLOT,
    Digest,
    HeadRange,
    Place,
    ReserveOutcome,
    Root,
    SessionId,
    TierKind,
)
from tests.bench.traces import TRAFFIC, Request, trace
from tests.support.making import opaque_manifest

CHUNK_BYTES = MIB
SESSION = SessionId(1)
HEADS = HeadRange(0, 1)
ADMISSIONS = ("all", "second_touch", "tinylfu")


class DryDisk:
    """A disk tier without a disk: writes through what its admission takes, evicts for the rest."""

    def __init__(self, store: Store, admission: str, capacity_bytes: int) -> None:
        self.written_chunks = 0
        self._store = store
        self._residents = store.slower.residents[TierKind.DISK]
        self._capacity_bytes = capacity_bytes
        self._admission = make_admission(admission, capacity_bytes)
        self._used_bytes = 0
        store.attach_movement(self)

    def published(self, slot: int, heads: HeadRange) -> None:
        """Write new bytes down."""
        del heads
        self._note(slot)
        self._offer(slot)

    def used(self, slots: Sequence[int]) -> None:
        """Note a use, and write down what was not worth it before."""
        for slot in slots:
            self._note(slot)
            self._offer(slot)

    def pressed(self) -> None:
        """Do nothing: what is here was written through."""

    def removed(self, slot: int, shards: Sequence[ShardRecord]) -> None:
        """Do nothing: a trace deletes nothing."""

    def is_wanted(self, slot: int) -> bool:
        """Return False: what is wanted was written through."""
        del slot
        return False

    def expected_seconds(self, tiers: int, chunks: int, chunk_bytes: int) -> float:
        """Return 0: nothing is known."""
        del tiers, chunks, chunk_bytes
        return 0.0

    def _note(self, slot: int) -> None:
        self._admission.note(fingerprint(self._store.index.digest(slot)), CHUNK_BYTES)

    def _offer(self, slot: int) -> None:
        index, slower = self._store.index, self._store.slower
        if index.tiers_of(slot) & TierKind.DISK:
            return
        mark, tenant = fingerprint(index.digest(slot)), index.tenant_of(slot)
        shares = self._residents.shares
        # Once before anything else: a selective admission may not want it at all.
        if not self._admission.admits(mark):
            return
        while self._used_bytes + CHUNK_BYTES > self._capacity_bytes or shares.is_over(
            tenant, CHUNK_BYTES
        ):
            victim = slower.next_victim(TierKind.DISK, tenant, CHUNK_BYTES)
            leaver = None if victim == NO_SLOT else fingerprint(index.digest(victim))
            if leaver is None or not self._admission.admits(mark, leaver):
                return
            slower.left(victim, TierKind.DISK, evicted=True)
            self._used_bytes -= CHUNK_BYTES
        self._used_bytes += CHUNK_BYTES
        self.written_chunks += 1
        stored = index.shard(slot, HEADS)
        assert stored is not None, "what is written is known"
        slower.entered(slot, stored, TierKind.DISK, Place(0))


@dataclass
class Tally:
    """What became of the chunks that requests asked for."""

    asked: int = 0
    host: int = 0
    disk: int = 0

    @property
    def host_rate(self) -> float:
        """Share of chunks found in the host tier."""
        return self.host / max(1, self.asked)

    @property
    def rate(self) -> float:
        """Share of chunks found in any tier."""
        return (self.host + self.disk) / max(1, self.asked)


class Replay:
    """A store without bytes, and the requests of any number of tenants."""

    def __init__(
        self,
        *,
        host_chunks: int,
        disk_chunks: int = 0,
        eviction: str = "s3fifo",
        admission: str = "all",
        tenants: Sequence[Share] = (Share(NO_TENANT),),
    ) -> None:
        """Make room for *host_chunks* and *disk_chunks*; *tenants* have shares of both tiers."""
        disk_bytes = disk_chunks * CHUNK_BYTES
        slower = []
        if disk_chunks:
            # Of the disk, each has the same part as of the host tier.
            scale = disk_chunks / host_chunks
            shares = [_scaled(share, scale) for share in tenants]
            slower = [SlowTier(TierKind.DISK, eviction, Shares("disk", disk_bytes, shares))]
        self.store = Store(
            HostTier(Arena.create(host_chunks * CHUNK_BYTES), checksums=False),
            eviction=eviction,
            lease_ttl_seconds=3600.0,
            counters=Counters(),
            tenants=tenants,
            slower=slower,
        )
        self.disk = DryDisk(self.store, admission, disk_bytes) if disk_chunks else None
        manifest = opaque_manifest(CHUNK_BYTES)
        self._spaces = [self.store.enter(manifest, share.tenant) for share in tenants]
        self.tallies = [Tally() for _ in tenants]

    def run(self, requests: Iterable[Request], tenant: int = DEFAULT_TENANT) -> Tally:
        """Play *requests* as those of *tenant*; return its tally."""
        for request in requests:
            self.play(request, tenant)
        return self.tallies[tenant]

    def play(self, request: Request, tenant: int = DEFAULT_TENANT) -> None:
        """Look up, load, store."""
        store, space = self.store, self._spaces[tenant]
        tally, now = self.tallies[tenant], request.time_seconds
        tally.asked += len(request.prompt)
        chunks = [*request.prompt, *request.answer]
        found = store.lookup(SESSION, space, request.prompt, now) if request.prompt else None
        if found is not None and found.hits:
            for bits, count in found.tiers:
                if bits & TierKind.HOST:
                    tally.host += count
                else:
                    tally.disk += count
            self._load(space, request.prompt[: found.hits], now)
        self._store(space, chunks, tenant)

    def close(self) -> None:
        """Give the arena back."""
        self.store.host.close()

    def _load(self, space: Namespace, digests: Sequence[Digest], now: float) -> None:
        store = self.store
        loading = store.begin_load(SESSION, space, digests, HEADS, now)
        for position, slot in enumerate(loading.slots):
            if store.index.tiers_of(slot) & TierKind.HOST:
                continue
            extent = store.take_room(slot, CHUNK_BYTES)
            if extent is None:
                break
            parent = digests[position - 1] if position else None
            below = store.index.shard(slot, HEADS)
            assert below is not None, "what is loaded is known"
            store.promoted(slot, below, extent, parent)
        lease, _ = store.end_load(loading, len(loading.slots))
        if lease:
            store.release(SESSION, [lease])

    def _store(self, space: Namespace, digests: Sequence[Digest], tenant: int) -> None:
        """Store what is not there, a few at a time as engines do."""
        store = self.store
        known = len(store.index.leading(space, digests))
        for start in range(known, len(digests), 64):
            batch = digests[start : start + 64]
            parent = digests[start - 1] if start else None
            granted = store.reserve(
                SESSION, space, batch, parent=parent, heads=HEADS, tenant=tenant
            )
            for one in granted:
                if one.outcome is ReserveOutcome.RESERVED:
                    store.commit(SESSION, one.reservation, Root(0))


def _scaled(share: Share, scale: float) -> Share:
    quota = None if share.quota_bytes is None else int(share.quota_bytes * scale)
    return Share(share.tenant, quota, int(share.floor_bytes * scale))


@dataclass(frozen=True)
class Row:
    """What one store made of one trace."""

    traffic: str
    host_chunks: int
    disk_chunks: int
    eviction: str
    admission: str
    host_rate: float
    disk_rate: float
    rate: float
    written_share: float
    microseconds_per_chunk: float


def measure(
    traffic: str,
    requests: Sequence[Request],
    host_chunks: int,
    disk_chunks: int,
    eviction: str,
    admission: str,
) -> Row:
    """Replay *requests* against one store."""
    replay = Replay(
        host_chunks=host_chunks, disk_chunks=disk_chunks, eviction=eviction, admission=admission
    )
    started = time.perf_counter()
    tally = replay.run(requests)
    seconds = time.perf_counter() - started
    replay.close()
    committed = replay.store.counters.commit_chunks
    return Row(
        traffic,
        host_chunks,
        disk_chunks,
        eviction,
        admission if disk_chunks else "-",
        tally.host_rate,
        tally.rate - tally.host_rate,
        tally.rate,
        (replay.disk.written_chunks / max(1, committed)) if replay.disk else 0.0,
        seconds / max(1, tally.asked) * 1e6,
    )


def main() -> None:
    """Print hit rates for every store asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traffic", default="chat;programs;agents;chat,programs,agents")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--host", default="2000,8000,32000", help="host tiers, in chunks")
    parser.add_argument("--disk", type=int, default=4, help="disk as a multiple of the host; 0 off")
    parser.add_argument("--admissions", default=",".join(ADMISSIONS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    header = (
        "traffic                  host    disk   eviction admission      host   disk    all written"
    )
    if not wanted.json:
        print(header)
    for traffic in wanted.traffic.split(";"):
        kinds = tuple(traffic.split(","))
        assert set(kinds) <= set(TRAFFIC), f"traffic is one of {', '.join(TRAFFIC)}"
        requests = list(trace(kinds, wanted.requests, wanted.seed))
        for host_chunks in map(int, wanted.host.split(",")):
            for admission in wanted.admissions.split(",") if wanted.disk else ["all"]:
                for eviction in ("lru", "s3fifo"):
                    disk_chunks = host_chunks * wanted.disk
                    row = measure(traffic, requests, host_chunks, disk_chunks, eviction, admission)
                    _print(row, as_json=wanted.json)


def _print(row: Row, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(row)), flush=True)
        return
    print(
        f"{row.traffic:22} {row.host_chunks:7} {row.disk_chunks:7}   {row.eviction:8} "
        f"{row.admission:12} {row.host_rate:6.3f} {row.disk_rate:6.3f} {row.rate:6.3f} "
        f"{row.written_share:7.2f}  {row.microseconds_per_chunk:5.1f} us",
        flush=True,
    )


if __name__ == "__main__":
    main()
