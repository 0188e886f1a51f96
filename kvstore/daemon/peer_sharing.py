"""What this host lets others have of its host tier: what it says of it, and when it sends it.

The directory is told in the background, many chunks at a time. Whatever becomes of it, engines
here do not notice: news that cannot be told are forgotten, and all is told anew later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvstore.errors import TierError
from kvstore.limits import (
    DIRECTORY_BATCH_CHUNKS,
    DIRECTORY_BEAT_SECONDS,
    DIRECTORY_GATHER_SECONDS,
    DIRECTORY_NEWS_MAX,
    PEER_SPARE_SENDS_MAX,
    PEER_TURN_SECONDS,
)
from kvstore.store.shards import choose_cover, covers
from kvstore.types import NO_SLOT, Digest, NamespaceId, TierKind

if TYPE_CHECKING:
    from kvstore.store.mover import Mover
    from kvstore.store.namespace import Namespace
    from kvstore.store.shards import ShardRecord
    from kvstore.store.store import Store
    from kvstore.tiers.peer_directory import Directory

log = logging.getLogger(__name__)


def held_shards(store: Store, space: Namespace, digest: Digest) -> list[ShardRecord]:
    """Return the shards in the host tier that make the chunk *digest* whole; nothing if none do."""
    slot = space.ready.get(digest, NO_SLOT)
    if slot == NO_SLOT or not store.index.tiers_of(slot) & TierKind.HOST:
        return []
    here = [shard for shard in store.index.shards(slot) if shard.is_in_host]
    heads = space.manifest.all_heads
    return choose_cover(here, heads) if covers([shard.heads for shard in here], heads) else []


class Turns:
    """Who is sent chunks for a tier elsewhere: so many at once, one chunk while loads here wait."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._gate = asyncio.Semaphore(PEER_SPARE_SENDS_MAX)
        self._taken = 0

    async def take(self) -> bool:
        """Return whether it is the caller's turn, who then has to `give` it back."""
        if self._taken and self.is_short:
            return False
        try:
            async with asyncio.timeout(PEER_TURN_SECONDS):
                await self._gate.acquire()
        except TimeoutError:
            return False
        self._taken += 1
        return True

    def give(self) -> None:
        """End a turn."""
        self._taken -= 1
        self._gate.release()

    @property
    def is_short(self) -> bool:
        """Whether engines here wait for slower tiers: but for peers, which wait for us."""
        routes = self._mover.routes.values()
        return any(r.lane.is_loading for r in routes if r.kind is not TierKind.PEER)


class _Told:
    """How large one namespace's set in the directory has to be, and what it lacks."""

    def __init__(self) -> None:
        self.size = 0
        self.is_stale = True
        self.changed: dict[Digest, None] = {}

    def spoil(self) -> None:
        """Tell all of it anew: what the directory knows is not known here."""
        self.is_stale = True
        self.changed.clear()


class Sharing:
    """Tells *directory*, under *name*, what the host tier of *store* holds. `run` must be running.

    It takes one command for some hundred chunks that come or leave, and one for each namespace
    with every beat.
    """

    def __init__(
        self,
        store: Store,
        directory: Directory,
        name: str,
        clock: Callable[[], float],
        *,
        owns_directory: bool = False,
    ) -> None:
        self._store = store
        self._directory = directory
        self._owns_directory = owns_directory
        self._name = name
        self._clock = clock
        self._told: dict[NamespaceId, _Told] = {}
        self._news = asyncio.Event()
        self._is_failing = False
        # An earlier daemon may have left chunks in memory.
        for space in store.index.namespaces:
            self._told[space.id] = _Told()
        self._news.set()
        store.room.on_change = self._changed

    async def run(self) -> None:
        """Tell what there is to tell, until cancelled."""
        beat_at = self._clock() + DIRECTORY_BEAT_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, beat_at - self._clock())):
                    await self._news.wait()
            pause_seconds = DIRECTORY_GATHER_SECONDS
            try:
                if self._clock() >= beat_at:
                    beat_at = self._clock() + DIRECTORY_BEAT_SECONDS
                    await self._renew()
                self._news.clear()
                await self._tell()
                self._note(None)
            except TierError as error:
                self._store.counters.directory_failures += 1
                self._note(error)
                pause_seconds = DIRECTORY_BEAT_SECONDS
            await asyncio.sleep(pause_seconds)

    async def close(self) -> None:
        """Say that nothing is held here any more, if that can be said.

        Closes the directory if it is its own, not the peer tier's.
        """
        self._store.room.on_change = None
        try:
            with contextlib.suppress(TierError):
                await self._directory.withdraw(list(self._told), self._name)
        finally:
            if self._owns_directory:
                self._directory.close()

    def _changed(self, space: Namespace, digest: Digest) -> None:
        """Note that *digest* has come into the host tier, or has left it."""
        told = self._told.get(space.id)
        if told is None:
            told = self._told[space.id] = _Told()
        elif not told.is_stale:
            told.changed[digest] = None
            if len(told.changed) > DIRECTORY_NEWS_MAX:
                told.spoil()
        self._news.set()

    async def _tell(self) -> None:
        for namespace, told in list(self._told.items()):
            space = self._store.known(namespace)
            try:
                if told.is_stale:
                    await self._tell_all(namespace, told, space)
                if told.changed:
                    digests = list(told.changed)
                    told.changed.clear()
                    await self._tell_of(namespace, told, space, digests)
            except BaseException:
                told.spoil()
                raise

    async def _tell_all(self, namespace: NamespaceId, told: _Told, space: Namespace | None) -> None:
        """Replace what the directory knows of *namespace*; what changes meanwhile comes after."""
        told.is_stale, told.size = False, 0
        await self._directory.withdraw([namespace], self._name)
        if space is not None:
            await self._tell_of(namespace, told, space, list(space.ready))

    async def _tell_of(
        self,
        namespace: NamespaceId,
        told: _Told,
        space: Namespace | None,
        digests: Sequence[Digest],
    ) -> None:
        """Say of each of *digests* whether it is held now."""
        for batch in _batches(digests):
            came: list[Digest] = []
            went: list[Digest] = []
            for digest in batch:
                is_here = space is not None and held_shards(self._store, space, digest)
                (came if is_here else went).append(digest)
            told.size += await self._directory.change(namespace, self._name, came, went)
            self._store.counters.directory_chunks_told += len(batch)

    async def _renew(self) -> None:
        """Let all sets stand for longer; tell anew what is not as large as it has to be."""
        before = {namespace: told.size for namespace, told in self._told.items()}
        sizes = await self._directory.renew(list(before), self._name)
        for (namespace, expected), size in zip(before.items(), sizes, strict=True):
            told = self._told[namespace]
            if size != expected:
                told.spoil()
            elif not (size or told.is_stale or told.changed):
                del self._told[namespace]

    def _note(self, error: TierError | None) -> None:
        """Log when telling begins to fail, and when it ends."""
        if error is not None and not self._is_failing:
            log.warning("directory not told", extra={"reason": str(error)})
        elif error is None and self._is_failing:
            log.info("directory is told again")
        self._is_failing = error is not None


def _batches(digests: Sequence[Digest]) -> Iterator[Sequence[Digest]]:
    for start in range(0, len(digests), DIRECTORY_BATCH_CHUNKS):
        yield digests[start : start + DIRECTORY_BATCH_CHUNKS]
