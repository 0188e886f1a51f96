"""The peer tier: what other daemons hold in their host tiers, read and never written.

The directory says where a chunk may be, its holder says of what it consists and sends it. Only
daemons that are configured are ever asked; one that is dead, busy or lies costs a bounded miss,
and is left alone for a while, while the others are asked on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from kvstore.errors import KVStoreError, ProtocolError, RequestError, TierError
from kvstore.hashing import Digests64
from kvstore.limits import (
    BREAKER_PAUSE_MAX_SECONDS,
    PEER_ASK_SECONDS,
    PEER_HOLDERS_MAX,
    PEER_READS_MAX,
)
from kvstore.protocol import peering as p
from kvstore.tiers.base import Recovered, Shard, ShardKey, TierUsage
from kvstore.tiers.guard import Breaker
from kvstore.tiers.peer_reads import PeerLine, PeerReads
from kvstore.types import Digest, HeadRange, NamespaceId, Place, Root, TierKind

if TYPE_CHECKING:
    from kvstore.protocol.manifest import Manifest
    from kvstore.tiers.peer_directory import Directory

log = logging.getLogger(__name__)

# Who has a shard is remembered here.
_PLACE: Final = Place(0)
# A chunk that its first holder does not have after all is asked for at another one.
_ROUNDS: Final = 2


class PeerCounters(msgspec.Struct):
    """What has happened since the start. All only grow."""

    asked_chunks: int = 0
    """Chunks that the directory named a holder for, and that were asked for there."""

    stale: int = 0
    """Those of them, or of chunks wanted later, that the holder did not have any more."""

    busy: int = 0
    """Chunks that their holder had no time to send."""

    peer_failures: int = 0
    """Calls of one peer that failed; while it is left alone there are none."""

    lies: int = 0
    """Those of them in which it broke the protocol, or sent what cannot be."""


class _Peer:
    """One other daemon, and whether to ask it at present."""

    def __init__(self, name: str, line: PeerLine) -> None:
        self.name = name
        self.line = line
        self.breaker = Breaker()
        self.asked_again_at = 0.0


class PeerTier:
    """Reads what peers hold. Nothing is ever written to them, and nothing removed there."""

    kind: Final = TierKind.PEER
    reads_max: Final = PEER_READS_MAX

    def __init__(self, directory: Directory, clock: Callable[[], float]) -> None:
        self.directory: Final = directory
        self.counters = PeerCounters()
        self._clock = clock
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[str, PeerReads] = {}
        self._manifest_of: Callable[[NamespaceId], Manifest | None] = lambda _: None
        # Shard -> the name of its holder, the one that was of use last at the end.
        self._holders: OrderedDict[ShardKey, str] = OrderedDict()
        self._turn = 0
        self._asking: set[asyncio.Future[p.Holding]] = set()

    def connect(
        self,
        lines: Mapping[str, PeerLine],
        manifest_of: Callable[[NamespaceId], Manifest | None],
    ) -> None:
        """Ask *lines*, the configured daemons by name, from now on; before, nobody is asked."""
        self._peers = {name: _Peer(name, line) for name, line in lines.items()}
        self._reads = {
            name: PeerReads(
                peer.line, self._clock, partial(self._may_ask, peer), partial(self._ended, peer)
            )
            for name, peer in self._peers.items()
        }
        self._manifest_of = manifest_of

    def usage(self) -> TierUsage:
        """Return zeros: how much room there is elsewhere is not ours to know."""
        return TierUsage(0, 0, 0)

    def close(self) -> None:
        """Let go of the directory; the lines belong to whoever has given them. Idempotent."""
        for asking in self._asking:
            asking.cancel()
        for reads in self._reads.values():
            reads.close()
        self.directory.close()

    # --- promises of a shared tier --------------------------------------------------------

    async def write(self, shard: Shard, source: memoryview) -> Place | None:
        """Refuse: what other hosts hold is theirs to decide."""
        return None

    async def remove(self, shard: Shard, place: Place) -> bool:
        """Do nothing: it stays there, and by now may have been found there again."""
        return False

    async def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """Do nothing: peers know the manifests of what they hold."""

    async def probe(self) -> None:
        """Ask whether the directory answers; each peer is tried again in its own time."""
        await self.directory.probe()

    async def read(
        self, shard: Shard, place: Place, target: memoryview, table: Digests64 | None = None
    ) -> bool:
        """Fill *target* from the daemon that said that it has *shard*.

        One that fails has lost it, as far as this tier goes: it is found again when it answers.
        """
        name = self._holders.pop(shard.key, "")
        if name not in self._reads:
            return False
        offered = p.OfferedShard(*shard.key.heads, shard.size_bytes, shard.root)
        want = p.Want(shard.key.namespace, shard.key.digest, offered, spare=True)
        came = await self._reads[name].read(want, target)
        if came is None:
            return False
        if isinstance(came, p.Gone):
            self.counters.stale += 1
            return False
        self._remember(shard.key, name)
        if isinstance(came, p.Busy):
            self.counters.busy += 1
            raise TierError(f"peer {name} has no time now")
        if table is not None:
            table[:] = came
        return True

    async def find(
        self, namespace: NamespaceId, digests: Sequence[Digest]
    ) -> list[list[Recovered]]:
        """Return what peers hold of *digests*, by their own word.

        The directory is asked with one command for each peer, then each peer that it names, all
        at once.
        """
        found: list[list[Recovered]] = [[] for _ in digests]
        names = [name for name, peer in self._peers.items() if self._may_ask(peer)]
        manifest = self._manifest_of(namespace)
        if not names or manifest is None:
            return found
        rows = await self.directory.holders(namespace, digests, names)
        left = {
            name: {at for at, is_held in enumerate(row) if is_held}
            for name, row in zip(names, rows, strict=True)
        }
        for _ in range(_ROUNDS):
            chosen = self._choose(left)
            if not chosen:
                break
            questions = [
                self._ask(name, manifest, namespace, [digests[at] for at in places])
                for name, places in chosen.items()
            ]
            answers = await asyncio.gather(*questions)
            for places, answer in zip(chosen.values(), answers, strict=True):
                for at, shards in zip(places, answer, strict=True):
                    found[at] = shards
            missing = {at for places in chosen.values() for at in places if not found[at]}
            left = {
                name: (places & missing) - set(chosen.get(name, ()))
                for name, places in left.items()
            }
        return found

    # --- how ------------------------------------------------------------------------------

    def _choose(self, left: Mapping[str, set[int]]) -> dict[str, list[int]]:
        """Return whom to ask for which positions: each one peer, and as few of them as may be.

        Of several that have as much, each gets its turn.
        """
        names = [name for name, places in left.items() if places]
        if not names:
            return {}
        self._turn += 1
        start = self._turn % len(names)
        names = sorted(names[start:] + names[:start], key=lambda name: -len(left[name]))
        chosen: dict[str, list[int]] = {}
        taken: set[int] = set()
        for name in names:
            places = sorted(left[name] - taken)
            if places:
                chosen[name] = places
                taken.update(places)
        return chosen

    async def _ask(
        self, name: str, manifest: Manifest, namespace: NamespaceId, digests: Sequence[Digest]
    ) -> list[list[Recovered]]:
        """Return what the peer *name* says that it has of *digests*; nothing when it fails."""
        peer = self._peers[name]
        self.counters.asked_chunks += len(digests)
        began_at = self._clock()
        asking = asyncio.ensure_future(peer.line.have(p.Have(namespace, list(digests))))
        # Given up, it may take a while to end: nobody waits for that.
        self._asking.add(asking)
        asking.add_done_callback(self._asked)
        try:
            await asyncio.wait([asking], timeout=PEER_ASK_SECONDS)
            if not asking.done():
                raise TierError("it does not say in time what it holds")
            shards = _shards(asking.result(), manifest, namespace, digests)
        except KVStoreError as error:
            self._failed(peer, began_at, error)
            return [[] for _ in digests]
        finally:
            asking.cancel()
        self._succeeded(peer)
        self.counters.stale += shards.count([])
        for chunk in shards:
            for one in chunk:
                self._remember(one.shard.key, peer.name)
        return shards

    def _asked(self, asking: asyncio.Future[p.Holding]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()

    def _remember(self, key: ShardKey, name: str) -> None:
        self._holders[key] = name
        self._holders.move_to_end(key)
        if len(self._holders) > PEER_HOLDERS_MAX:
            self._holders.popitem(last=False)

    def _may_ask(self, peer: _Peer) -> bool:
        """Return whether *peer* is asked now: one that fails is, once after every pause."""
        return not peer.breaker.is_open or self._clock() >= peer.asked_again_at

    def _ended(self, peer: _Peer, began_at: float, failure: Exception | None) -> None:
        """Note how a call of *peer* went that began at *began_at*."""
        if failure is None:
            self._succeeded(peer)
        else:
            self._failed(peer, began_at, failure)

    def _succeeded(self, peer: _Peer) -> None:
        if peer.breaker.is_open:
            peer.breaker.probed(answered=True)
            log.info("peer answers again", extra={"peer": peer.name})
        peer.breaker.succeeded()

    def _failed(self, peer: _Peer, began_at: float, error: Exception) -> None:
        """Leave *peer* alone if that was enough; at once, and for longest, when it has lied."""
        now, breaker = self._clock(), peer.breaker
        is_lie = isinstance(error, ProtocolError | RequestError)
        self.counters.peer_failures += 1
        self.counters.lies += is_lie
        if breaker.is_open:
            breaker.probed(answered=False)
        if is_lie:
            breaker.begin_on_trial()
            breaker.pause_seconds = BREAKER_PAUSE_MAX_SECONDS
        if breaker.failed(began_at, now):
            log.warning(
                "peer left alone",
                extra={
                    "peer": peer.name,
                    "reason": str(error) or type(error).__name__,
                    "pause_seconds": breaker.pause_seconds,
                },
            )
        peer.asked_again_at = now + breaker.pause_seconds


def _shards(
    holding: p.Holding, manifest: Manifest, namespace: NamespaceId, digests: Sequence[Digest]
) -> list[list[Recovered]]:
    """Return what *holding* says of *digests*; raises `RequestError` for what cannot be."""
    if len(holding.chunks) != len(digests):
        raise RequestError(f"{len(holding.chunks)} answers about {len(digests)} digests")
    found: list[list[Recovered]] = []
    for digest, chunk in zip(digests, holding.chunks, strict=True):
        p.check_shards(chunk.shards, manifest)
        parent = Digest(chunk.parent) if len(chunk.parent) == len(digest) else None
        found.append(
            [
                Recovered(
                    Shard(
                        ShardKey(namespace, digest, HeadRange(one.head_start, one.head_stop)),
                        parent,
                        one.size_bytes,
                        Root(one.root),
                    ),
                    _PLACE,
                )
                for one in chunk.shards
            ]
        )
    return found
