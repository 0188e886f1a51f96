"""What is to be moved between the host tier and one slower tier, and in which order.

Loads go first, the earliest deadline before all others, then prefetches; removals, which make
room, and writes yield to loads. Decides only: the mover acts.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from kvstore.limits import (
    REMOVE_QUEUE_CHUNKS_MAX,
    TIER_READS_BYTES,
    TIER_READS_MAX,
    TIER_WRITES_MAX,
    WRITE_QUEUE_CHUNKS_MAX,
)
from kvstore.store.namespace import Namespace
from kvstore.tiers.base import Shard
from kvstore.types import Digest, HeadRange, Place, TierKind

NO_DEADLINE: Final = math.inf
# Under loads without end, one write at a time goes on after this.
_PATIENCE_SECONDS: Final = 1.0

FetchKey = tuple[int, HeadRange]
WriteKey = tuple[Namespace, Digest, HeadRange]


class TierRead(NamedTuple):
    """One call that read a shard from a slower tier, by `time.perf_counter`."""

    kind: TierKind
    size_bytes: int
    began_at: float
    ended_at: float


class Fetch:
    """One shard on its way into the host tier, for all who wait for it.

    *tried* are the bits of the tiers that could not give it. One without a waiter that was
    not prefetched is of no use to anybody.
    """

    __slots__ = (
        "deadline",
        "heads",
        "is_prefetch",
        "is_running",
        "parent",
        "reads",
        "runs_as_load",
        "size_bytes",
        "slot",
        "ticket",
        "tried",
        "waiters",
    )

    def __init__(self, slot: int, heads: HeadRange, parent: Digest | None) -> None:
        self.slot = slot
        self.heads = heads
        self.parent = parent
        self.deadline = NO_DEADLINE
        self.is_prefetch = False
        self.is_running = False
        self.runs_as_load = False
        self.size_bytes = 0
        self.ticket = 0
        self.tried = 0
        self.reads: tuple[TierRead, ...] = ()
        self.waiters: dict[Callable[[Fetch, bool], None], None] = {}

    @property
    def key(self) -> FetchKey:
        """What makes two fetches the same."""
        return self.slot, self.heads

    @property
    def is_needed(self) -> bool:
        """Whether anybody has use for it."""
        return self.is_prefetch or bool(self.waiters)


class Write:
    """One shard that is to be copied to a slower tier; *done* are told how that went.

    *above* is the chunk before it, where the tier does not have that one yet. *run* is what
    its lane knows it by.
    """

    __slots__ = (
        "above",
        "digest",
        "done",
        "heads",
        "is_urgent",
        "queued_at",
        "run",
        "size_bytes",
        "space",
    )

    def __init__(
        self,
        space: Namespace,
        digest: Digest,
        heads: HeadRange,
        size_bytes: int,
        *,
        is_urgent: bool,
        queued_at: float,
        above: Digest | None = None,
    ) -> None:
        self.space = space
        self.digest = digest
        self.heads = heads
        self.size_bytes = size_bytes
        self.is_urgent = is_urgent
        self.queued_at = queued_at
        self.above = above
        self.run = 0
        self.done: list[Callable[[bool], None]] = []

    @property
    def key(self) -> WriteKey:
        """What makes two writes the same."""
        return self.space, self.digest, self.heads

    @property
    def key_above(self) -> WriteKey | None:
        """The key of the write that has to come first for this one to be of use."""
        return None if self.above is None else (self.space, self.above, self.heads)

    def finish(self, *, kept: bool) -> None:
        """Tell all who wait for it."""
        done, self.done = self.done, []
        for tell in done:
            tell(kept)


class Removal:
    """One shard that a slower tier is to forget."""

    __slots__ = ("place", "shard")

    def __init__(self, shard: Shard, place: Place) -> None:
        self.shard = shard
        self.place = place


Job = Fetch | Write | Removal


class Lane:
    """The queues before one slower tier. *writes_max_bytes* bounds what waits to be written.

    *reads_max* are read at once, beyond the usual only while their bytes are few.
    """

    def __init__(self, writes_max_bytes: int, reads_max: int = TIER_READS_MAX) -> None:
        self.write_bytes = 0
        self.dropped_writes = 0
        self._writes_max_bytes = writes_max_bytes
        self._reads_max = reads_max
        # (not a load, deadline, ticket, fetch); only the last ticket of a fetch is good.
        self._fetches: list[tuple[bool, float, int, Fetch]] = []
        self._writes: dict[WriteKey, Write] = {}
        # The same in runs, the oldest first: in each, everyone continues the one before.
        self._runs: dict[int, dict[WriteKey, Write]] = {}
        self._under_way: dict[WriteKey, Write] = {}
        self._removals: deque[Removal] = deque()
        self._reading = 0
        self._reading_bytes = 0
        self._reading_loads = 0
        self._writing = 0

    @property
    def write_chunks(self) -> int:
        """How many writes wait."""
        return len(self._writes)

    @property
    def fetch_chunks(self) -> int:
        """How many fetches wait, those that nobody needs any more included."""
        return len(self._fetches)

    @property
    def is_loading(self) -> bool:
        """Whether somebody waits for a load, under way or not."""
        return self._reading_loads > 0 or self._has_loads()

    @property
    def is_settled(self) -> bool:
        """Whether nothing waits to be written or is being written."""
        return not (self._writes or self._removals or self._writing)

    @property
    def is_quiet(self) -> bool:
        """Whether no fetch waits or is under way."""
        return not (self._fetches or self._reading)

    # --- putting in ---------------------------------------------------------------------

    def put_fetch(self, fetch: Fetch) -> None:
        """Queue *fetch*, or queue it again with a deadline that has moved forward."""
        is_load = bool(fetch.waiters)
        fetch.ticket = next(_tickets)
        heapq.heappush(self._fetches, (not is_load, fetch.deadline, fetch.ticket, fetch))

    def take_fetches(self) -> list[Fetch]:
        """Take out all fetches that wait."""
        waiting = [fetch for *_, ticket, fetch in self._fetches if _is_good(ticket, fetch)]
        self._fetches.clear()
        return waiting

    def put_write(self, write: Write) -> bool:
        """Queue *write*; return whether there is room, for which others may have to give way.

        The oldest prefix that nobody waits for gives, from its end, so that what is left of it
        is of use. One whose chunk before neither is in the tier nor on its way pushes nobody out.
        One for the same shard is joined, under way or not. Urgent ones, whose bytes are held in
        the host tier and have their bound there, are bounded in number alone.
        """
        waiting = self._writes.get(write.key) or self._under_way.get(write.key)
        if waiting is not None:
            waiting.done += write.done
            waiting.is_urgent |= write.is_urgent
            return True
        while not self._has_room(write):
            giver = self._giver(write)
            if giver is None:
                self.dropped_writes += 1
                return False
            self._drop(giver)
        self._enter(write)
        return True

    def has_write(self, key: WriteKey) -> bool:
        """Return whether that shard waits to be written, or is being written."""
        return key in self._writes or key in self._under_way

    def take_urgent_writes(self) -> list[Write]:
        """Take out all writes that somebody waits for."""
        urgent = [write for write in self._writes.values() if write.is_urgent]
        for write in urgent:
            self._take_write(write)
        return urgent

    def put_removal(self, removal: Removal) -> None:
        """Queue *removal*; beyond the bound it is left to the tier's own cleaning."""
        if len(self._removals) < REMOVE_QUEUE_CHUNKS_MAX:
            self._removals.append(removal)

    # --- taking out ---------------------------------------------------------------------

    def next(self, now: float, *, writes: bool = True) -> Job | None:
        """Return what is to be done next, which then counts as under way, or None.

        Without *writes* only fetches are.
        """
        fetch = self._next_fetch()
        if fetch is not None:
            return fetch
        if not writes or self._writing >= self._writes_allowed(now):
            return None
        if self._removals:
            self._writing += 1
            return self._removals.popleft()
        for write in self._writes.values():
            self._writing += 1
            self._take_write(write)
            self._under_way[write.key] = write
            return write
        return None

    def ended(self, job: Job) -> None:
        """Note that *job* is under way no more."""
        if isinstance(job, Fetch):
            self._reading -= 1
            self._reading_bytes -= job.size_bytes
            self._reading_loads -= job.runs_as_load
            job.is_running = job.runs_as_load = False
        else:
            self._writing -= 1
            if isinstance(job, Write):
                del self._under_way[job.key]

    def _next_fetch(self) -> Fetch | None:
        has_many = self._reading >= TIER_READS_MAX and self._reading_bytes >= TIER_READS_BYTES
        if has_many or self._reading >= self._reads_max:
            return None
        while self._fetches:
            *_, ticket, fetch = heapq.heappop(self._fetches)
            if _is_good(ticket, fetch):
                fetch.is_running = True
                self._reading += 1
                self._reading_bytes += fetch.size_bytes
                fetch.runs_as_load = bool(fetch.waiters)
                self._reading_loads += fetch.runs_as_load
                return fetch
        return None

    def _writes_allowed(self, now: float) -> int:
        if not self._reading_loads and not self._has_loads():
            return TIER_WRITES_MAX
        oldest = next(iter(self._writes.values()), None)
        return int(oldest is not None and now - oldest.queued_at > _PATIENCE_SECONDS)

    def _has_loads(self) -> bool:
        while self._fetches and not _is_good(*self._fetches[0][2:]):
            heapq.heappop(self._fetches)
        return bool(self._fetches) and not self._fetches[0][0]

    def _has_room(self, write: Write) -> bool:
        fits = self.write_bytes + write.size_bytes <= self._writes_max_bytes
        return len(self._writes) < WRITE_QUEUE_CHUNKS_MAX and (fits or write.is_urgent)

    def _giver(self, write: Write) -> Write | None:
        """Return who gives way to *write*; None when that is *write* itself, or nobody."""
        above = write.key_above
        before = None if above is None else self._writes.get(above)
        if above is not None and not (self.has_write(above) or write.is_urgent):
            return None
        for number, run in self._runs.items():
            if before is not None and before.run == number and not write.is_urgent:
                return None
            giver = next((one for one in reversed(run.values()) if not one.is_urgent), None)
            if giver is not None:
                return giver
        return None

    def _enter(self, write: Write) -> None:
        """Queue *write*, at the end of the run that it continues or in one of its own."""
        above = write.key_above
        before = None if above is None else self._writes.get(above)
        if before is not None and next(reversed(self._runs[before.run])) == above:
            write.run = before.run
        else:
            write.run = next(_tickets)
            self._runs[write.run] = {}
        self._runs[write.run][write.key] = write
        self._writes[write.key] = write
        self.write_bytes += write.size_bytes

    def _drop(self, write: Write) -> None:
        self._take_write(write)
        self.dropped_writes += 1
        write.finish(kept=False)

    def _take_write(self, write: Write) -> None:
        del self._writes[write.key]
        self.write_bytes -= write.size_bytes
        run = self._runs[write.run]
        del run[write.key]
        if not run:
            del self._runs[write.run]


_tickets: Final = itertools.count(1)


def _is_good(ticket: int, fetch: Fetch) -> bool:
    return ticket == fetch.ticket and fetch.is_needed and not fetch.is_running
