"""How much more memory would help: miss-ratio curves of live traffic, by hashed sampling.

SHARDS in its fixed-size form (Waldspurger et al., FAST 2015): a chunk is sampled when its digest
lies below a threshold, so that all uses of a sampled chunk are seen. The distance between two
uses, in bytes of other sampled chunks and divided by the sampling rate, is the capacity from
which on an LRU would have had it. When too many chunks are sampled the threshold falls.

A look-up is only noted; which of its chunks are sampled, and their distances, is left to `work`.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from kvstore.limits import (
    DIGEST_SIZE_BYTES,
    REUSE_NOTED_MAX,
    REUSE_PENDING_MAX,
    REUSE_SAMPLES_MAX,
    REUSE_SAMPLES_MIN,
    REUSE_SAMPLES_TOTAL_MAX,
    TENANTS_MAX,
)
from kvstore.protocol.framing import first_bytes
from kvstore.types import Digest

_HASH_BITS: Final = 24
_HASH_SPAN: Final = 1 << _HASH_BITS
# At first one chunk in sixteen: those whose digest begins with a byte below this.
_FIRST_BYTES: Final = 16
_FIRST_THRESHOLD: Final = _FIRST_BYTES << (_HASH_BITS - 8)
_STEPS_PER_DOUBLING: Final = 16
_BUCKETS: Final = 52 * _STEPS_PER_DOUBLING


class _Uses(NamedTuple):
    """The sampled chunks of one look-up, or of one store (*is_counted* is False)."""

    tenant: int
    digests: list[Digest]
    size_bytes: int
    is_counted: bool


class Stack:
    """The sampled chunks of one tenant in the order of their last use, with their bytes.

    The bytes behind a place are sums in a Fenwick tree over times; when the times run out, they
    are dealt out anew.
    """

    def __init__(self, samples_max: int) -> None:
        self.threshold = _FIRST_THRESHOLD
        self.asked = 0
        self.references = 0
        self._samples_max = samples_max
        self._times = 4 * samples_max
        self._now = 0
        self._total_bytes = 0
        self._tree = array("q", bytes(8 * (self._times + 1)))
        self._used: dict[Digest, tuple[int, int]] = {}
        self._largest: list[tuple[int, Digest]] = []
        # What a cache as large as the bucket says would have hit, and what none would have.
        self._weights = [0.0] * _BUCKETS
        self._cold = 0.0

    def __len__(self) -> int:
        """Return the number of sampled chunks."""
        return len(self._used)

    @property
    def rate(self) -> float:
        """The share of all chunks that is sampled."""
        return self.threshold / _HASH_SPAN

    def use(self, digests: Sequence[Digest], size_bytes: int, *, is_counted: bool) -> None:
        """Note a use of *digests*, all at once: those of one prefix, the head first."""
        sampled = [digest for digest in digests if _hash(digest) < self.threshold]
        if is_counted:
            weight = 1.0 / self.rate
            for digest in sampled:
                self.references += 1
                self._count(digest, weight)
        # The head is used last: it stays longest.
        for digest in reversed(sampled):
            self._touch(digest, size_bytes)
        while len(self._used) > self._samples_max:
            self._lower()

    def hit_rate(self, capacity_bytes: int) -> float:
        """Return the share of uses that a cache of *capacity_bytes* would have hit.

        A few chunks are used so often that their being sampled or not shifts all of it: what
        the sample has too many of, or too few, counts as uses of those, which are always hits
        (the correction of the paper, "SHARDS-adj").
        """
        if not self.asked:
            return 0.0
        surplus = sum(self._weights) + self._cold - self.asked
        hits = sum(self._weights[: _bucket(capacity_bytes)]) - surplus
        return min(max(hits / self.asked, 0.0), 1.0)

    def lower_by_half(self) -> None:
        """Sample half as many chunks from now on."""
        self._forget_from(self.threshold // 2)

    def _count(self, digest: Digest, weight: float) -> None:
        used = self._used.get(digest)
        if used is None:
            self._cold += weight
            return
        behind = self._total_bytes - self._sum(used[0])
        # The chunk itself takes room, too.
        distance = int((behind + used[1]) / self.rate)
        self._weights[min(_bucket(distance), _BUCKETS - 1)] += weight

    def _touch(self, digest: Digest, size_bytes: int) -> None:
        # Taken out and put in again, so that all stay in the order of their last use.
        used = self._used.pop(digest, None)
        if used is None:
            heapq.heappush(self._largest, (-_hash(digest), digest))
        else:
            self._add(used[0], -used[1])
        if self._now >= self._times:
            self._deal_times()
        self._now += 1
        self._used[digest] = (self._now, size_bytes)
        self._add(self._now, size_bytes)

    def _lower(self) -> None:
        """Sample one chunk less: the one that lies highest sets the threshold."""
        self._forget_from(-self._largest[0][0])

    def _forget_from(self, threshold: int) -> None:
        """Let *threshold* hold, and forget what does not lie below it."""
        self.threshold = max(threshold, 1)
        while self._largest and -self._largest[0][0] >= self.threshold:
            _, digest = heapq.heappop(self._largest)
            time, size_bytes = self._used.pop(digest)
            self._add(time, -size_bytes)

    def _deal_times(self) -> None:
        """Give the sampled chunks new times, in their order."""
        sizes = np.zeros(self._times + 1, np.int64)
        for time, (digest, (_, size_bytes)) in enumerate(self._used.items(), 1):
            self._used[digest] = (time, size_bytes)
            sizes[time] = size_bytes
        self._now = len(self._used)
        # Each node of the tree is the sum of those that differ from it in its lowest bits.
        sums, nodes = np.cumsum(sizes), np.arange(self._times + 1)
        tree = sums - sums[nodes & (nodes - 1).clip(0)]
        self._tree = array("q", tree.astype(np.int64).tobytes())

    def _add(self, time: int, size_bytes: int) -> None:
        tree, times = self._tree, self._times
        self._total_bytes += size_bytes
        while time <= times:
            tree[time] += size_bytes
            time += time & -time

    def _sum(self, time: int) -> int:
        tree, total = self._tree, 0
        while time:
            total += tree[time]
            time &= time - 1
        return total


class Reuse:
    """The stacks of all tenants, and what look-ups and stores have noted for them."""

    def __init__(self, tenants: int = 1) -> None:
        share = REUSE_SAMPLES_TOTAL_MAX // min(max(tenants, 1), TENANTS_MAX)
        self._samples_max = max(REUSE_SAMPLES_MIN, min(REUSE_SAMPLES_MAX, share))
        self._stacks: dict[int, Stack] = {}
        # What nobody has looked at yet: look-ups, each with its frame, and sampled stores without.
        self._noted: list[tuple[int, Sequence[Digest], int, bytes | None]] = []
        self._noted_chunks = 0
        self._pending: deque[_Uses] = deque()
        self._count = 0
        self._asked = [0] * TENANTS_MAX
        self.is_on = False
        self._first_bytes = _FIRST_BYTES
        self._second_bytes = 256
        self._table = _table(_FIRST_BYTES)

    def stack(self, tenant: int) -> Stack | None:
        """Return what is known of *tenant*, if it was ever heard of."""
        stack = self._stacks.get(tenant)
        if stack is not None:
            stack.asked = self._asked[tenant]
        return stack

    def looked_up(
        self, tenant: int, digests: Sequence[Digest], size_bytes: int, frame: bytes = b""
    ) -> None:
        """Note a look-up of *digests*, which came in *frame*; nothing else, as somebody waits."""
        self._noted.append((tenant, digests, size_bytes, frame))
        self._noted_chunks += len(digests)
        if self._noted_chunks > REUSE_NOTED_MAX:
            self._select()

    def stored(self, tenant: int, digest: Digest, size_bytes: int) -> None:
        """Note that *digest* was stored: a use, but nobody asked for it."""
        if self.is_on and digest[0] < self._first_bytes:
            self._noted.append((tenant, [digest], size_bytes, None))
            self._noted_chunks += 1
            if self._noted_chunks > REUSE_NOTED_MAX:
                self._select()

    def work(self, most: int = REUSE_PENDING_MAX) -> None:
        """Take the distances of what was noted since, of *most* chunks at most."""
        self._select()
        if not self._pending:
            return
        while self._pending and most > 0:
            uses = self._pending.popleft()
            self._count -= len(uses.digests)
            most -= len(uses.digests)
            stack = self._stacks.get(uses.tenant)
            if stack is None:
                stack = self._stacks[uses.tenant] = Stack(self._samples_max)
                stack.threshold = self._first_bytes << (_HASH_BITS - 8)
            stack.use(uses.digests, uses.size_bytes, is_counted=uses.is_counted)
        self._retune()

    def _select(self) -> None:
        """Let go of what was noted but is not sampled."""
        noted, self._noted, self._noted_chunks = self._noted, [], 0
        for tenant, digests, size_bytes, frame in noted:
            if frame is None:
                self._put(_Uses(tenant, list(digests), size_bytes, is_counted=False))
                continue
            self._asked[tenant] += len(digests)
            sampled = self._sampled(digests, frame)
            if sampled:
                self._put(_Uses(tenant, sampled, size_bytes, is_counted=True))

    def _sampled(self, digests: Sequence[Digest], frame: bytes) -> list[Digest]:
        marks = first_bytes(frame, digests) or b"".join(digests)[::DIGEST_SIZE_BYTES]
        wanted = 0
        if self._first_bytes > 1:
            marks, wanted = marks.translate(self._table), 1
        at = marks.find(wanted)
        sampled: list[Digest] = []
        while at >= 0:
            # Where the first byte says little any more, the second says most of the rest.
            if digests[at][1] < self._second_bytes:
                sampled.append(digests[at])
            at = marks.find(wanted, at + 1)
        return sampled

    def _put(self, uses: _Uses) -> None:
        """Keep *uses* for later; more than can be worked on means that too much is sampled.

        Where the rate is so low already that this should not be, the oldest are let go.
        """
        self._pending.append(uses)
        self._count += len(uses.digests)
        if self._count > REUSE_PENDING_MAX:
            self._first_bytes = max(self._first_bytes // 2, 1)
            self._table = _table(self._first_bytes)
            for stack in self._stacks.values():
                stack.lower_by_half()
            self._prune()

    def _prune(self) -> None:
        """Let go of pending uses of what is not sampled any more, and of the oldest if need be."""
        thresholds = {tenant: stack.threshold for tenant, stack in self._stacks.items()}
        pending = self._pending
        self._pending, self._count = deque(), 0
        for uses in reversed(pending):
            threshold = thresholds.get(uses.tenant, self._first_bytes << (_HASH_BITS - 8))
            left = [digest for digest in uses.digests if _hash(digest) < threshold]
            if left and self._count + len(left) <= REUSE_PENDING_MAX // 2:
                self._pending.appendleft(uses._replace(digests=left))
                self._count += len(left)

    def _retune(self) -> None:
        """Select only what some stack still samples."""
        highest = max(stack.threshold for stack in self._stacks.values())
        # Of a digest whose first byte is 0, when no other is sampled any more.
        self._second_bytes = min(256, -(-highest >> (_HASH_BITS - 16)))
        first_bytes = -(-highest >> (_HASH_BITS - 8))
        if first_bytes != self._first_bytes:
            self._first_bytes = first_bytes
            self._table = _table(first_bytes)


def points(
    stack: Stack, capacity_bytes: int, times: Sequence[float], also: Callable[[int], int]
) -> list[tuple[float, int, float]]:
    """Return (times, bytes, hit rate) for multiples of a capacity.

    *also* makes the bytes of a tier those of all tiers down to it.
    """
    sizes = [(factor, int(capacity_bytes * factor)) for factor in times]
    return [(factor, size, stack.hit_rate(also(size))) for factor, size in sizes]


def _table(first_bytes: int) -> bytes:
    return bytes(first < first_bytes for first in range(256))


def _hash(digest: Digest) -> int:
    return int.from_bytes(digest[:3], "big")


def _bucket(size_bytes: int) -> int:
    """Return the number of the bucket that ends at or behind *size_bytes*."""
    if size_bytes <= 1:
        return 0
    return min(_BUCKETS, math.ceil(math.log2(size_bytes) * _STEPS_PER_DOUBLING))
